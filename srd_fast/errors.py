"""What a caller may want to catch. Being stopped is no error, but a KeyboardInterrupt: `srd_fast.run.stopping`."""

from pathlib import Path
from typing import Any


class SRDFastError(Exception):
    """What every error of this package is. Nothing raises it itself."""


class UserError(SRDFastError, ValueError):
    """Raised for bad input: names the field, the value and the way out. The command line prints it and exits with 2."""


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
