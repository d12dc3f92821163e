"""Rows of json lines, json, parquet or the hub, with their places. A line that is no row is kept with the reason."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import UserError, first_line


@dataclass(frozen=True)
class SourceRow:
    """A row as it was found.

    Args:
        where: its place: "line 3" of json lines, otherwise "row 3".
        columns: its values by column, or None if it has none.
        reason: why it has none.
    """

    where: str
    columns: Mapping[str, Any] | None
    reason: str = ""


def read_rows(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """Read the rows of a json-lines file (also .gz), a json array, a parquet file, or a `datasets` hub name.

    Args:
        source: the file or name.
        split: of a hub data set.

    Returns:
        The rows.

    Raises:
        UserError: the file cannot be read, or has something other than rows. The message names the file and line.
    """
    rows = read_source(source, split)
    for row in rows:
        if row.columns is None:
            raise UserError(f"data file {str(source)!r}, {row.where}: {row.reason}")
    return [dict(row.columns) for row in rows if row.columns is not None]


def read_source(source: str | Path, split: str = "train") -> list[SourceRow]:
    """Read rows as `read_rows` does, each with its place; a line that is not a row is kept with the reason.

    Args:
        source: a json-lines file (also .gz), a json array, a parquet file, or a `datasets` hub name.
        split: of a hub data set.

    Returns:
        The rows and their places.

    Raises:
        UserError: the file is empty or cannot be read to its end. The message names it.
    """
    path = source_path(source)
    if path is None:
        if str(source).endswith((".jsonl", ".json", ".parquet", ".gz")) or str(source).startswith((".", "/", "~")):
            raise UserError(f"data file {str(source)!r} does not exist")
        return _numbered(_hub_rows(str(source), split))
    if path.is_dir():
        raise UserError(f"data {str(source)!r} is a folder; give a .jsonl, .json or .parquet file or a hub name")
    if not path.is_file():
        raise UserError(f"data {str(source)!r} is a device or a pipe; give a .jsonl, .json or .parquet file")
    rows = _numbered(_parquet_rows(path)) if path.suffix == ".parquet" else _json_rows(path)
    if not rows:
        raise UserError(f"data file {str(source)!r} is empty")
    return rows


def source_path(source: str | Path) -> Path | None:
    """The file or folder that a source names, or None if there is none.

    Raises:
        UserError: no file can have this name.
    """
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as e:  # too long, a user without a home, a NUL in it
        raise UserError(f"data {shown(str(source))!r} is no name of a file: {shown(first_line(e), 200)}") from e


def shown(text: str, limit: int = 80) -> str:
    """A text for a message: one line of at most `limit` characters, with escapes for what cannot be printed."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _hub_rows(name: str, split: str) -> list[Any]:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split).to_list()
    except Exception as e:  # network, hub and parsing errors of many kinds
        raise UserError(f"data {name!r} is no file here, and as a hub name it fails: {first_line(e)}") from e


def _parquet_rows(path: Path) -> list[Any]:
    try:
        with pq.ParquetFile(path) as file:
            return file.read().to_pylist()
    except Exception as e:  # pyarrow raises many kinds; all mean that the file is not usable
        raise UserError(f"data file {str(path)!r} is not readable parquet: {first_line(e)}") from e


def _numbered(rows: Iterable[Any]) -> list[SourceRow]:
    return [source_row(f"row {number}", row) for number, row in enumerate(rows, 1)]


def source_row(where: str, value: Any) -> SourceRow:
    """A row with its columns if the value is an object, otherwise with the reason."""
    if isinstance(value, Mapping):
        return SourceRow(where, value)
    return SourceRow(where, None, f"expected an object, got {type(value).__name__}")


def _json_rows(path: Path) -> list[SourceRow]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as f:
            content = f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"data file {str(path)!r} cannot be read: {e}") from e
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"data file {str(path)!r} is UTF-16 or UTF-32; write it as UTF-8")
    content = content.removeprefix(codecs.BOM_UTF8)
    # Lines end in line feeds; in a file without any, in carriage returns.
    lines = content.split(b"\n" if b"\n" in content else b"\r")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if content.lstrip().startswith(b"["):
        try:
            whole = _parsed(content)
        except UserError as e:
            # Json lines whose first line is a list are not one array: there the first line alone is valid JSON.
            if _json_line(*numbered[0]).reason != "expected an object, got list":
                raise UserError(f"data file {str(path)!r} is {e}") from e
        else:
            return _numbered(whole)
    return [_json_line(number, line) for number, line in numbered]


def _json_line(number: int, line: bytes) -> SourceRow:
    try:
        return source_row(f"line {number}", _parsed(line))
    except UserError as e:
        return SourceRow(f"line {number}", None, str(e))


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8: byte {e.start} is {content[e.start]:#x}") from e
    except ValueError as e:
        raise UserError(f"not valid JSON ({e})") from e
    except RecursionError as e:
        raise UserError("not usable JSON: nested too deeply") from e
