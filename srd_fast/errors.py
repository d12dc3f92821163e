"""What a caller may want to catch. Being stopped is no error, but a KeyboardInterrupt: `srd_fast.run.stopping`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

R = TypeVar("R")


class SRDFastError(Exception):
    """What every error of this package is. Nothing raises it itself."""


class UserError(SRDFastError, ValueError):
    """Raised for bad input: names the field, the value and the way out. The command line prints it and exits with 2."""


class Fault(NamedTuple):
    """One thing that is wrong with what a user gave.

    Attributes:
        names: the fields that it is about. Of several, it is about how they go together.
        text: one line: the field, its value, and the way out.
    """

    names: tuple[str, ...]
    text: str


class FaultsError(UserError):
    """Raised for all that is wrong with a config, one line a fault.

    Args:
        faults: at least one.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(fault.text for fault in faults))
        self.faults = tuple(faults)

    def __reduce__(self) -> tuple[Any, ...]:
        return FaultsError, (self.faults,)


class Faults:
    """Collects faults, so that all of them can be told at once.

    A field that is wrong is not looked at again: what follows from a wrong value is no fault of its own. Names with
    dots are keys of sections; a section is wrong where one of its keys is, and the other way round.
    """

    def __init__(self) -> None:
        self.found: list[Fault] = []
        self._doubted: set[str] = set()

    def check(self, names: str | Iterable[str], look: Callable[..., R], *given: Any) -> R | None:
        """Call `look` unless one of its fields is known to be wrong, and keep what it has to say.

        Args:
            names: the field that it looks at, or the fields.
            look: raises a UserError where something is wrong.
            *given: its arguments.

        Returns:
            What `look` returns; None where it was not called, or raised.
        """
        fields = (names,) if isinstance(names, str) else tuple(names)
        if not any(map(self.doubts, fields)):
            try:
                return look(*given)
            except FaultsError as e:
                self.take(e)
            except UserError as e:
                self.add(fields, " ".join(str(e).split()))
        return None

    def take(self, error: FaultsError, prefix: str = "") -> None:
        """Add the faults of others, but for those about how fields go together of which one is wrong already.

        Args:
            error: with the faults.
            prefix: before each name that is not an empty one.
        """
        for names, text in error.faults:
            own = tuple(prefix + name for name in names)
            if len(own) < 2 or not any(map(self.doubts, own)):
                self.add(own, text)

    def add(self, names: tuple[str, ...], text: str) -> None:
        """Note a fault.

        Args:
            names: the fields that it is about.
            text: one line.
        """
        self.found.append(Fault(names, text))
        if len(names) == 1:
            self._doubted.update(names)

    def doubt(self, names: Iterable[str]) -> None:
        """Skip all later checks of some fields."""
        self._doubted.update(names)

    def doubts(self, name: str) -> bool:
        """Whether a field is wrong, its section is, or a key of it."""
        return any(x == name or x.startswith(f"{name}.") or name.startswith(f"{x}.") for x in self._doubted)

    @property
    def wrong(self) -> list[str]:
        """The fields that are wrong, or not to be looked at."""
        return sorted(self._doubted)

    def tell(self) -> None:
        """End the checks.

        Raises:
            FaultsError: there were faults.
        """
        if self.found:
            raise FaultsError(self.found)


class StaleCacheError(UserError):
    """Raised where a teacher cache is opened or filled that another teacher, dtype, template or kind has made.

    Args:
        folder: of the cache.
        what: differs, in words.
        found: what the folder says of it.
        wanted: what was asked for.
    """

    def __init__(self, folder: Path, what: str, found: Any, wanted: Any) -> None:
        super().__init__(
            f"teacher_cache {str(folder)!r} was made with another {what}: {found!r} there, {wanted!r} here; "
            "delete the folder, or name another one"
        )


class DamagedFileError(UserError):
    """Raised where a file of a teacher cache does not hold what was written to it.

    Args:
        path: of the file.
        reason: what is wrong with it, in words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"teacher cache: {path} is damaged: {reason}")
        self.path = path


class NotFiniteError(UserError):
    """Raised by training where the loss or its gradient is NaN or infinite; no optimizer step was made of it."""


class EngineDiedError(UserError):
    """Raised where a generation engine's process ends in the middle of its work, and again when started anew."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
