"""The exceptions of this package. Being stopped is a KeyboardInterrupt instead: see `srd_fast.run.stopping`."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

R = TypeVar("R")


class SRDFastError(Exception):
    """The common base of this package's errors. It is never raised itself."""


class UserError(SRDFastError, ValueError):
    """Raised for bad input. It names the field, the value and the way out; the command prints it and exits with 2."""


class Fault(NamedTuple):
    """One thing that is wrong with what a user gave.

    Attributes:
        names: the fields that it is about. If there are several, it is about their combination.
        text: one line: the field, its value, and the way out.
    """

    names: tuple[str, ...]
    text: str


class FaultsError(UserError):
    """Raised for everything that is wrong with a config, one line a fault.

    Args:
        faults: at least one.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(fault.text for fault in faults))
        self.faults = tuple(faults)

    def __reduce__(self) -> tuple[Any, ...]:
        return FaultsError, (self.faults,)


class Faults:
    """Collects faults, so that all of them can be reported at once.

    A field with a fault is not checked again: what follows from a wrong value is not a fault of its own. Names with
    dots are keys of sections. If a key is wrong, so is its section, and if a section is wrong, so are all its keys.
    """

    def __init__(self) -> None:
        self.found: list[Fault] = []
        self._doubted: set[str] = set()

    def check(self, names: str | Iterable[str], look: Callable[..., R], *given: Any) -> R | None:
        """Call `look`, unless one of its fields is known to be wrong, and keep the fault that it raises.

        Args:
            names: the field that it checks, or the fields.
            look: raises a UserError if something is wrong.
            *given: arguments of `look`.

        Returns:
            What `look` returns; None if it was not called, or raised.
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
        """Add the faults of an error, except those about a combination with a field that is already known to be wrong.

        Args:
            error: has the faults.
            prefix: is put before each name that is not empty.
        """
        for names, text in error.faults:
            own = tuple(prefix + name for name in names)
            if len(own) < 2 or not any(map(self.doubts, own)):
                self.add(own, text)

    def add(self, names: tuple[str, ...], text: str) -> None:
        """Add a fault.

        Args:
            names: the fields that it is about.
            text: one line.
        """
        self.found.append(Fault(names, text))
        if len(names) == 1:
            self._doubted.update(names)

    def doubt(self, names: Iterable[str]) -> None:
        """Skip all later checks of these fields."""
        self._doubted.update(names)

    def doubts(self, name: str) -> bool:
        """Whether a field, its section or one of its keys is known to be wrong."""
        return any(x == name or x.startswith(f"{name}.") or name.startswith(f"{x}.") for x in self._doubted)

    @property
    def wrong(self) -> list[str]:
        """The fields that are wrong, or whose checks are skipped."""
        return sorted(self._doubted)

    def tell(self) -> None:
        """End the checks: raise all faults, if there are any.

        Raises:
            FaultsError: there were faults.
        """
        if self.found:
            raise FaultsError(self.found)


class StaleCacheError(UserError):
    """Raised when a teacher cache is opened or filled that was made with another teacher, dtype, template or kind.

    Args:
        folder: the cache's folder.
        what: the name of what differs.
        found: its value in the folder.
        wanted: the value that was asked for.
    """

    def __init__(self, folder: Path, what: str, found: Any, wanted: Any) -> None:
        super().__init__(
            f"teacher_cache {str(folder)!r} was made with another {what}: {found!r} there, {wanted!r} here; "
            "delete the folder, or name another one"
        )


class DamagedFileError(UserError):
    """Raised when a file of a teacher cache does not hold what was written to it.

    Args:
        path: the file.
        reason: what is wrong with it, in words.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"teacher cache: {path} is damaged: {reason}")
        self.path = path


class NotFiniteError(UserError):
    """Raised by training when the loss or its gradient is NaN or infinite, before an optimizer step is made of it."""


class EngineDiedError(UserError):
    """Raised when the process of a generation engine dies in the middle of its work, and again after a restart."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
