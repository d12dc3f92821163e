"""A table of named things to which users can add their own: divergences, engines, kinds of teacher cache and others."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from .errors import UserError
from .suggest import unknown_name

T = TypeVar("T")


def each_once(kind: str, things: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Make a dict of names and things, in their order, and refuse a name that occurs twice.

    Args:
        kind: what the message calls such a thing.
        things: pairs of a name and a thing.

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, T] = {}
    for name, thing in things:
        if name in found:
            raise UserError(f"two {kind}s are called {name!r}: give each once, under its own name")
        found[name] = thing
    return found


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: what messages call such a thing; usually the name of the setting that takes its name.
        things: the built-in ones.
        reserved: further names that the setting takes, such as "auto". The caller knows what they mean.
        synonyms: what others call a thing -> its name here, for the message about an unknown name.

    Examples:
        >>> colours = Registry("colour", {"red": 0xFF0000})
        >>> colours.register("green", 0x00FF00)
        >>> colours.get("gren")
        Traceback (most recent call last):
        srd_fast.errors.UserError: unknown colour 'gren'; did you mean 'green'? Known: green, red
    """

    def __init__(
        self,
        kind: str,
        things: Mapping[str, T],
        reserved: Iterable[str] = (),
        synonyms: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.kind, self.reserved, self.synonyms = kind, frozenset(reserved), synonyms
        self._things = dict(things)

    def __contains__(self, name: object) -> bool:
        # A config may hold anything where a name should be, even a list.
        return isinstance(name, str) and (name in self._things or name in self.reserved)

    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        return sorted({*self._things, *self.reserved})

    def things(self) -> list[T]:
        """All things, in the order in which they were added."""
        return list(self._things.values())

    def check(self, name: Any) -> None:
        """Refuse an unknown name.

        Raises:
            UserError: the name is unknown. The message has the nearest name and all names.
        """
        if name not in self:
            raise UserError(unknown_name(self.kind, name, self.names(), synonyms=self.synonyms))

    def get(self, name: str) -> T:
        """Look up a thing by its name, which must not be a reserved one.

        Raises:
            UserError: the name is unknown. The message has the nearest name and all names.
        """
        self.check(name)
        return self._things[name]

    def register(self, name: str, thing: T, *, replace: bool = False) -> None:
        """Add a thing.

        Args:
            name: a new name; an existing one only with `replace`, and never a reserved one.
            thing: what the name stands for.
            replace: whether an existing thing of this name is replaced.

        Raises:
            UserError: the name is taken, or is not text.
        """
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"the name of a {self.kind} must be text that is not empty, got {name!r}")
        if name in self.reserved:
            raise UserError(f"{self.kind} {name!r} exists already; take another name")
        if name in self._things and not replace:
            raise UserError(f"{self.kind} {name!r} exists already; pass replace=True or take another name")
        self._things[name] = thing

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Undo at the end of the block what was registered or replaced in it."""
        before = dict(self._things)
        try:
            yield
        finally:
            self._things = before
