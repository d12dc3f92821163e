"""A data set that is made part by part: in memory, and from a certain size on in a memory-mapped file."""

import hashlib
import mmap
import tempfile
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ..errors import UserError

# Beyond this many bytes a data set would compete with the models for memory.
_MOST_BYTES = 256 << 20


class Tables:
    """Collects rows, and makes a data set from them.

    Args:
        schema: the rows' Arrow schema.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = 0
        self._schema = schema
        self._parts: list[pa.Table] = []
        self._bytes = 0
        self._digest = hashlib.blake2b(digest_size=8)
        self._file: Any = None
        self._writer: Any = None

    def add(self, columns: dict[str, list[Any]]) -> None:
        """Add rows.

        Raises:
            UserError: they are too large for memory, and do not fit on the disk of temporary files either.
        """
        part = pa.Table.from_pydict(columns, schema=self._schema)
        self.rows += len(part)
        self._bytes += part.nbytes
        for batch in part.to_batches():
            self._digest.update(batch.serialize())
        self._parts.append(part)
        if self._writer is not None or self._bytes > _MOST_BYTES:
            self._write()

    def dataset(self) -> Dataset:
        """All rows. The data set's fingerprint depends only on their content."""
        if self._writer is None:
            table = pa.concat_tables(self._parts)
        else:
            self._writer.close()
            self._file.flush()
            # The file has no name and exists only through the mapping: it is gone when the process ends or is killed.
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
        return Dataset(table, fingerprint=self._digest.hexdigest())

    def _write(self) -> None:
        """Move the parts in memory to the file."""
        try:
            if self._writer is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
                self._writer = pa.ipc.new_stream(self._file, self._schema)
            for part in self._parts:
                self._writer.write_table(part)
        except OSError as e:
            raise UserError(f"the tokenised rows do not fit on the disk of temporary files: {e}; set TMPDIR") from e
        self._parts.clear()
