"""Files that are written completely or not at all, digests of their content, and locks."""

import errno
import hashlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, first_line

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_LEAST_FREE = 1 << 20


def content_digest(path: Path, suffixes: Container[str] | None = None) -> str | None:
    """Hash of a file's content, or of all files below a folder (those with one of `suffixes`); None without files."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [f for f in files if suffixes is None or f.suffix in suffixes]
    if not files:
        return None
    state = hashlib.blake2b(digest_size=16)
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        state.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as f:
            while block := f.read(1 << 22):
                state.update(block)
    return state.hexdigest()


def temporary_path(target: Path) -> Path:
    """A hidden name beside `target` for a file that is being written. It is renamed to `target` when finished."""
    return target.with_name(f".{target.name}.partial")


def write_text(target: Path, text: str) -> None:
    """Write a text file in one step: readers see the old content or the new, never a part of it."""
    temporary = temporary_path(target)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, target)


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists. A link is deleted, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_folder(finished: Path, target: Path) -> None:
    """Move a finished folder to `target`, replacing an older one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(finished, target)


def _holder(path: Path) -> str:
    """The holder named in a locked file. If the lock is shared, the holder named in a locked `<lock>-*` beside it."""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    parts = () if text else sorted(path.parent.glob(path.name + "-*"))
    return text or next((_holder(part) for part in parts if _is_held(part)), "another process")


def _is_held(path: Path) -> bool:
    with path.open("rb") as f:
        return not lock(f.fileno(), shared=True)


def lock(descriptor: int, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed or its process ends.

    Args:
        descriptor: of the open file.
        shared: allow other holders that also ask for a shared lock.
        wait: wait until the lock is free.

    Returns:
        False if another process has the lock. True where the file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
    return True


@contextmanager
def in_use(folder: Path, what: str, name: str = ".lock", shared: bool = False) -> Iterator[None]:
    """Lock a folder against other processes; with `shared`, only against those that do not share it.

    The lock ends with the process, however that ends, so no lock is ever stale. Where the file system has no locks,
    nothing is locked.

    Args:
        folder: the folder.
        what: what the message calls it.
        name: name of the lock file in the folder.
        shared: whether other holders may share the folder.

    Raises:
        UserError: another process has locked the folder. The message names the process.
    """
    path = folder / name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock(descriptor, shared):
            raise UserError(
                f"{what} {str(folder)!r} is in use by {_holder(path)}: wait for it or stop it, or choose another {what}"
            )
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = f"process {os.getpid()} on {socket.gethostname()}, which began at {began} with {' '.join(sys.argv)}"
        os.ftruncate(descriptor, 0)
        if not shared:  # with a shared lock, the last to write may be the first to end
            os.pwrite(descriptor, owner[:900].encode(errors="replace"), 0)
        yield
    finally:
        os.close(descriptor)


def disk_trouble(error: BaseException, folder: Path) -> str | None:
    """Explain an error that comes from a full or read-only disk, whichever library raised it.

    Returns:
        One line, or None for any other error.
    """
    number = getattr(error, "errno", None)
    text = str(error)
    named = getattr(error, "filename", None)
    if number in (errno.EACCES, errno.EPERM) and named and not Path(os.fsdecode(named)).is_relative_to(folder):
        return f"{text}: it must be readable"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "Read-only file system" in text:
        return f"{text}: the folder must be writable"
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = _LEAST_FREE
    # Libraries word a full disk differently, or only report that fewer bytes were written than they asked for.
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in text or "os error 28" in text
    if full or (free < _LEAST_FREE and isinstance(error, (OSError, RuntimeError, ValueError))):
        return f"no space left on the disk of {str(folder)!r} ({first_line(error)})"
    return None
