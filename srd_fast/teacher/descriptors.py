"""Keep files open for reading, but never more at once than a process may have."""

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DamagedFileError

# These files may use one in so many of a process's descriptors; the other number is for systems without a limit.
_SHARE = 4
_MOST = 256


def _most() -> int:
    if sys.platform == "win32":
        return _MOST
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if limit == resource.RLIM_INFINITY else max(1, min(_MOST, limit // _SHARE))


class _Entry:
    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.users, self.dropped = descriptor, 0, False


class Descriptors:
    """Opens files when they are read, and closes those that have not been read for the longest time.

    Any number of threads may read at once. A forked process opens files again with descriptors of its own.

    Args:
        most: most open files, not counting additional ones that are being read. Default: a quarter of the process's
            limit, at most 256.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self._open: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._renew_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)  # a thread may hold it at the moment of the fork

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()  # the collector may drop a reader while this thread holds it

    @contextmanager
    def reading(self, key: Hashable, path: Path, identity: tuple[int, int]) -> Iterator[int]:
        """Yield the descriptor of a file, which stays open until the block ends.

        Args:
            key: the reader's key.
            path: the file.
            identity: the result of `identity_of` when the reader first opened the file.

        Raises:
            DamagedFileError: the file cannot be opened, or was replaced by another one.
        """
        with self._lock:
            entry = self._open.get(key)
            if entry is None:
                entry = self._open[key] = _Entry(_opened(path, identity))
            self._open.move_to_end(key)
            entry.users += 1
            self._close_old()
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.users -= 1
                if entry.dropped and not entry.users:
                    os.close(entry.descriptor)

    def _close_old(self) -> None:
        if self.most is None:
            self.most = _most()
        for key in list(self._open)[: max(0, len(self._open) - self.most)]:
            self._drop(key)

    def _drop(self, key: Hashable) -> None:
        entry = self._open.pop(key, None)
        if entry is not None:
            entry.dropped = True
            if not entry.users:
                os.close(entry.descriptor)

    def close(self, key: Hashable) -> None:
        """Close a reader's file."""
        with self._lock:
            self._drop(key)


def identity_of(descriptor: int) -> tuple[int, int]:
    """Inode number and size of an open file: a file that replaces it differs in one of them."""
    found = os.fstat(descriptor)
    return found.st_ino, found.st_size


def _opened(path: Path, identity: tuple[int, int]) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as e:
        raise DamagedFileError(path, f"cannot be read: {e}") from e
    if identity_of(descriptor) != identity:
        os.close(descriptor)
        raise DamagedFileError(path, "it is not the file that was there when the cache was opened")
    return descriptor
