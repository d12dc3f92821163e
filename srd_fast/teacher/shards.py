"""Safetensors files with a digest of their content: written completely or not at all, each by one process."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import DamagedFileError
from ..files import lock, temporary_path
from .descriptors import Descriptors, identity_of

_DIGEST = "blake2b"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def payload_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the names, dtypes, shapes and bytes of tensors."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
        state.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


@contextmanager
def locked(partial: Path, wait: bool = True) -> Iterator[int | None]:
    """Open and lock a file, or yield None if another process has locked it. The lock ends with the process."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not lock(descriptor, wait=wait):
                yield None
                return
            if not _is_at(partial, descriptor):
                continue  # renamed by its last holder
            yield descriptor
            return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def publish(descriptor: int, partial: Path, target: Path, content: bytes) -> None:
    """Write the locked file, flush it to disk, and rename it to `target`."""
    os.ftruncate(descriptor, 0)
    with os.fdopen(os.dup(descriptor), "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, target)


def write_once(target: Path, make: Callable[[], Mapping[str, Tensor]], wait: bool) -> bool:
    """Write `make()` to `target`, unless that exists.

    The bytes are written to a hidden, locked file and flushed to disk; then the file is renamed. A killed writer leaves
    the hidden file unlocked, and the next writer uses it.

    Args:
        target: the file.
        make: makes its tensors; called only if they have to be written.
        wait: wait for another process that is writing the file.

    Returns:
        False if another process is writing it and `wait` is off, else True.
    """
    partial = temporary_path(target)
    if target.exists() and not partial.exists():
        return True
    with locked(partial, wait) as descriptor:
        if descriptor is None:
            return False
        if target.exists():  # another process finished it meanwhile
            partial.unlink(missing_ok=True)
            return True
        tensors = {name: x.cpu().contiguous() for name, x in make().items()}
        publish(descriptor, partial, target, save(tensors, {_DIGEST: payload_digest(tensors)}))
        return True


def checked_digest(path: Path) -> str:
    """Return the digest stored in a file, after comparing it with the content.

    Raises:
        DamagedFileError: the file is missing or unreadable, or its content is not what was written.
    """
    try:
        with safe_open(path, "pt") as f:
            told = (f.metadata() or {}).get(_DIGEST)
        found = payload_digest(load_file(path))
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        raise DamagedFileError(path, f"cannot be read: {e}") from e
    if told != found:
        raise DamagedFileError(path, f"its checksum is {found}, not {told} as when it was written")
    return found


_DESCRIPTORS = Descriptors()


class Column(NamedTuple):
    """A tensor of a file.

    Attributes:
        begin: where it begins in the file, in bytes.
        row_bytes: bytes of one row.
        dtype: dtype of its elements.
        row_shape: shape of one row.
    """

    begin: int
    row_bytes: int
    dtype: torch.dtype
    row_shape: tuple[int, ...]


class OpenFile:
    """A file from which runs of rows are read, by any number of threads and of forked processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as f:
            self._identity = identity_of(f.fileno())
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        self.columns = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = entry["shape"]
            row_bytes = (end - begin) // max(1, shape[0])
            self.columns[name] = Column(8 + length + begin, row_bytes, _DTYPES[entry["dtype"]], tuple(shape[1:]))

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Read rows of a tensor.

        Args:
            name: the tensor's name.
            start: the first row.
            out: [rows, ...] receives the rows: contiguous, on the CPU, in the tensor's dtype.

        Raises:
            DamagedFileError: the file is too short.
        """
        if not out.numel():
            return
        column, view = self.columns[name], out.view(torch.uint8).numpy().reshape(-1)
        offset = column.begin + start * column.row_bytes
        with self._descriptor() as descriptor:
            if hasattr(os, "preadv"):
                count = os.preadv(descriptor, [view.data], offset)
            else:  # not on Windows and older macOS
                with self.path.open("rb") as f:
                    f.seek(offset)
                    count = f.readinto(view.data)
        if count != view.nbytes:
            raise DamagedFileError(self.path, "it is shorter than when it was opened")

    def will_need(self, name: str, start: int, count: int) -> None:
        """Ask the operating system to read rows ahead, without waiting for it."""
        if hasattr(os, "posix_fadvise"):
            column = self.columns[name]
            offset, size = column.begin + start * column.row_bytes, count * column.row_bytes
            with self._descriptor() as descriptor:
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _descriptor(self) -> AbstractContextManager[int]:
        return _DESCRIPTORS.reading(id(self), self.path, self._identity)

    def __del__(self) -> None:
        _DESCRIPTORS.close(id(self))
