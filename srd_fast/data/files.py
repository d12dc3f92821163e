"""Files of rows: json lines, a JSON array, CSV and TSV, parquet, Arrow; compressed or not. Each is read as a stream."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError, first_line


@dataclass(frozen=True)
class SourceRow:
    """A row of a source, or the reason why it is not one.

    Args:
        where: its place: "line 3" of json lines or CSV, otherwise "row 3".
        columns: its values by column; None if it is not a row.
        reason: why it is not a row.
    """

    where: str
    columns: Mapping[str, Any] | None
    reason: str = ""


Read = Callable[[], Iterator[SourceRow]]
# Suffixes of files of rows. A file of any other name is read as json lines.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_AT_ONCE = 1000


def _zstd(path: Path) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def file_rows(path: Path) -> tuple[Read, int]:
    """Return how to read a file's rows, and their number. The file is read to its end once, to find damage.

    Raises:
        UserError: the file cannot be read. The message names it.
    """
    suffix = suffix_of(path)
    if suffix in (".parquet", ".arrow"):
        if path.suffix in _OPENERS:
            raise UserError(
                f"data file {str(path)!r} is a compressed {suffix} file, a format that is compressed itself; unpack it"
            )
        read = _parquet_values if suffix == ".parquet" else _arrow_values
        return lambda: _numbered(read(path)), _counted_tables(path, suffix)
    if suffix in (".csv", ".tsv"):
        return lambda: _table_rows(path, suffix), sum(1 for _ in _table_rows(path, suffix))
    return _json_rows(path)


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, ignoring .gz and the like."""
    return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix.lower()


def shown(text: str, limit: int = 80) -> str:
    """A text for a message: one line of at most `limit` characters, with escapes for what cannot be printed."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def source_row(where: str, value: Any) -> SourceRow:
    """A row with its columns if the value is an object, otherwise with the reason."""
    if isinstance(value, Mapping):
        return SourceRow(where, value)
    return SourceRow(where, None, f"expected an object, got {type(value).__name__}")


def _numbered(rows: Iterable[Any]) -> Iterator[SourceRow]:
    return (source_row(f"row {number}", row) for number, row in enumerate(rows, 1))


# Parquet and Arrow


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(_AT_ONCE)
    except Exception as e:  # pyarrow raises many kinds; all mean that the file is not usable
        raise UserError(f"data file {str(path)!r} is not readable parquet: {first_line(e)}") from e


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Read either of Arrow's layouts: a stream, as `datasets` writes it, or a file with an index."""
    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                yield from pa.ipc.open_stream(mapped)
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(mapped)
                yield from (file.get_batch(i) for i in range(file.num_record_batches))
    except Exception as e:  # as above
        raise UserError(f"data file {str(path)!r} is not readable Arrow: {first_line(e)}") from e


def _parquet_values(path: Path) -> Iterator[Any]:
    return (row for batch in _parquet_batches(path) for row in batch.to_pylist())


def _arrow_values(path: Path) -> Iterator[Any]:
    return (
        row
        for batch in _arrow_batches(path)
        for start in range(0, len(batch), _AT_ONCE)
        for row in batch.slice(start, _AT_ONCE).to_pylist()
    )


def _counted_tables(path: Path, suffix: str) -> int:
    return sum(len(batch) for batch in (_parquet_batches if suffix == ".parquet" else _arrow_batches)(path))


# Text


def _opened(path: Path) -> Iterator[bytes]:
    """Open a file as lines, with their line ends, after a byte order mark if there is one.

    Raises:
        UserError: the file cannot be read, or is UTF-16 or UTF-32.
    """
    try:
        with _OPENERS.get(path.suffix, lambda p: p.open("rb"))(path) as f:
            first = f.readline()
            if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"data file {str(path)!r} is UTF-16 or UTF-32; write it as UTF-8")
            yield first.removeprefix(codecs.BOM_UTF8)
            yield from f
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as e:
        raise UserError(f"data file {str(path)!r} cannot be read: {first_line(e)}") from e


def _table_rows(path: Path, suffix: str) -> Iterator[SourceRow]:
    """Rows of CSV or TSV. Every value is text; one that is missing at the end of its line is None."""
    csv.field_size_limit(2**31 - 1)
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(_opened(path), 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as e:
                raise UserError(f"data file {str(path)!r}, line {number}: {_not_utf8(line, e)}") from e

    try:
        text = lines()
        first = next(text, "")
        delimiter = "\t" if suffix == ".tsv" else max(",;\t|", key=first.count)
        reader = csv.reader(_before(first, text), delimiter=delimiter)
        names = next(reader, [])
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"data file {str(path)!r} has two columns called {shown(twice)!r}")
        for values in reader:
            if not values:
                continue
            where = f"line {number}"
            if len(values) > len(names):
                reason = f"{len(values)} values for {len(names)} columns; put a text with {delimiter!r} in it in quotes"
                yield SourceRow(where, None, reason)
            else:
                yield SourceRow(where, dict(zip(names, values + [None] * (len(names) - len(values)))))
    except csv.Error as e:
        raise UserError(f"data file {str(path)!r}, line {number}: {first_line(e)}") from e


def _before(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _json_rows(path: Path) -> tuple[Read, int]:
    lines = _numbered_lines(path)
    head = next(lines, None)
    if head is None:
        return lambda: iter(()), 0
    if head[1].lstrip().startswith(b"["):
        try:
            whole = _parsed(b"".join(_opened(path)))
        except UserError as e:
            # If the first line alone is a valid list, these are json lines, not one array.
            if _json_line(*head).reason != "expected an object, got list":
                raise UserError(f"data file {str(path)!r} is {e}") from e
        else:
            return lambda: _numbered(whole), len(whole)
    count = 1 + sum(1 for _ in lines)
    return lambda: (_json_line(number, line) for number, line in _numbered_lines(path)), count


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank. Lines end in line feeds, or, in a file without those, in carriage returns."""
    lines = _opened(path)
    first = next(lines, b"")
    every: Iterable[bytes] = (first,) if first.endswith(b"\n") else first.split(b"\r")
    for number, line in enumerate((line for some in (every, lines) for line in some), 1):
        if line.strip():
            yield number, line


def _json_line(number: int, line: bytes) -> SourceRow:
    try:
        return source_row(f"line {number}", _parsed(line.removesuffix(b"\n")))
    except UserError as e:
        return SourceRow(f"line {number}", None, str(e))


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as e:
        raise UserError(_not_utf8(content, e)) from e
    except ValueError as e:
        raise UserError(f"not valid JSON ({e})") from e
    except RecursionError as e:
        raise UserError("not usable JSON: nested too deeply") from e


def _not_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {error.start} is {content[error.start]:#x}; save the file in UTF-8"
