"""Open the files of a run folder. A fault becomes a UserError that names the file and the place."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from srd_fast.errors import UserError, first_line


class Fields:
    """Typed access to a parsed JSON object. Errors name the file and the key."""

    def __init__(self, path: Path, data: Any, where: str = "") -> None:
        if not isinstance(data, dict):
            raise UserError(f"{path}: {where or 'the file'} must be a JSON object, found {_kind(data)}")
        self.path, self.data, self.where = path, data, where

    def fail(self, name: str, wanted: str) -> UserError:
        """Make the error for a key with a wrong value."""
        key = f"{self.where}.{name}" if self.where else name
        return UserError(f"{self.path}: {key} must be {wanted}, found {_kind(self.data.get(name))}")

    def text(self, name: str) -> str:
        """A string; empty when the key is missing or null."""
        value = self.data.get(name)
        if not isinstance(value, str | None):
            raise self.fail(name, "a string")
        return value or ""

    def number(self, name: str) -> float:
        """A number; NaN when the key is missing or null."""
        value = self.data.get(name)
        if value is None:
            return math.nan
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(name, "a number")
        return float(value)

    def child(self, name: str) -> "Fields":
        """An object; empty when the key is missing or null."""
        value = self.data.get(name)
        if not isinstance(value, dict | None):
            raise self.fail(name, "an object")
        return Fields(self.path, value or {}, f"{self.where}.{name}" if self.where else name)

    def items(self, name: str) -> list[Any]:
        """A list; empty when the key is missing or null."""
        value = self.data.get(name)
        if not isinstance(value, list | None):
            raise self.fail(name, "a list")
        return value or []

    def objects(self, name: str) -> list["Fields"]:
        """A list of objects."""
        return [Fields(self.path, item, f"{name}[{i}]") for i, item in enumerate(self.items(name))]

    def numeric(self) -> list[str]:
        """The keys whose values are numbers."""
        return [n for n, x in self.data.items() if isinstance(x, int | float) and not isinstance(x, bool)]

    def numbers(self) -> dict[str, float]:
        """Every key of this object as a number."""
        return {name: self.number(name) for name in self.data}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


def read_text(path: Path) -> str | None:
    """The text of a file; None if there is no file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> Fields | None:
    """The object in a JSON file; None if there is no file."""
    text = read_text(path)
    if text is None:
        return None
    try:
        return Fields(path, json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON (line {error.lineno}: {error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{path}: not readable JSON (objects in objects, too deep)") from error


def read_rows(path: Path) -> pa.Table | None:
    """The ids, prompts and references of a split's rows; None if there is no file."""
    table = read_table(path, ("sample_id", "prompt", "references"))
    if table is None:
        return None
    check_texts(table, path, ("sample_id", "prompt"))
    kind = table.schema.field("references").type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if len(table) and not (lists and (_is_text(kind.value_type) or pa.types.is_null(kind.value_type))):
        raise UserError(f"{path}: column 'references' must hold lists of strings, found {kind}")
    return table


def check_texts(table: pa.Table, path: Path, names: Sequence[str]) -> None:
    """Refuse columns that do not hold strings."""
    for name in names:
        kind = table.schema.field(name).type
        if len(table) and not _is_text(kind):
            raise UserError(f"{path}: column {name!r} must hold strings, found {kind}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def index_of(table: pa.Table) -> dict[str, int]:
    """sample_id -> its row."""
    return {sample_id: row for row, sample_id in enumerate(table["sample_id"].to_pylist())}


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] | None = ()) -> pa.Table | None:
    """The named columns of a Parquet file, all columns with ``optional=None``; None if there is no file."""
    if not path.exists():
        return None
    try:
        names = pq.read_schema(path).names
        missing = [name for name in required if name not in names]
        if missing:
            raise UserError(f"{path}: column {missing[0]!r} is missing; found {', '.join(names) or 'no columns'}")
        wanted = None if optional is None else [*required, *(name for name in optional if name in names)]
        return pq.read_table(path, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
