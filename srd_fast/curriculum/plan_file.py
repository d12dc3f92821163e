"""plan.json: a plan as a file, written in pieces, so that millions of samples are never one text in memory."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import UserError
from ..files import temporary_path

PLAN_FORMAT = "srd_fast.plan/1"
# The type of columns with ids and reasons.
TEXT = pa.large_string()
_CHUNK = 1 << 16


def write_plan(
    path: str | Path,
    settings: Mapping[str, Any],
    subsets: Sequence[pa.Array],
    dropped: pa.RecordBatch,
    unscored: pa.RecordBatch,
    numbers: Mapping[str, pa.RecordBatch],
) -> None:
    """Write a plan as JSON, atomically and in pieces.

    Args:
        path: the file.
        settings: values that JSON can hold, written first.
        subsets: sample ids of each subset.
        dropped: columns sample_id and reason.
        unscored: columns sample_id and reason.
        numbers: by name, columns sample_id and a number.
    """
    target = Path(path)
    ids = (_block("[]", _pieces(s, _json_items, 3), 3) for s in subsets)
    blocks = {
        "subsets": _block("[]", ids, 2),
        "dropped": _block("[]", _pieces(dropped, _json_reasons, 2), 2),
        "unscored": _block("[]", _pieces(unscored, _json_reasons, 2), 2),
        **{name: _block("{}", _pieces(rows, _json_numbers, 2), 2) for name, rows in numbers.items()},
    }
    with temporary_path(target).open("w", encoding="utf-8") as f:
        f.write(json.dumps({"format": PLAN_FORMAT, **settings}, indent=1, ensure_ascii=False).removesuffix("\n}"))
        for name, block in blocks.items():
            f.write(f',\n "{name}": ')
            f.writelines(block)
        f.write("\n}\n")
    os.replace(temporary_path(target), target)


def read_plan(path: str | Path) -> dict[str, Any]:
    """Read what `write_plan` wrote.

    Returns:
        Its settings and columns by name, without the entry for the format.

    Raises:
        UserError: the file is missing or is not a plan.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        if content.pop("format", None) != PLAN_FORMAT:
            raise ValueError(f"its format is not {PLAN_FORMAT!r}")
        _check_subsets(content["subsets"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise unreadable(path, e) from e
    return content


def unreadable(path: str | Path, error: Exception) -> UserError:
    """Make the error for a file that is not a plan."""
    return UserError(f"plan {str(path)!r} cannot be read ({error}); make it again with `srd-fast curate`")


def _block(brackets: str, pieces: Iterable[Iterable[str]], depth: int) -> Iterator[str]:
    """Yield a list or object laid out as by `json.dumps(..., indent=1)`. A piece is the text of some of its items."""
    start = brackets[0]
    for piece in pieces:
        yield start + _line(depth)
        yield from piece
        start = ","
    yield brackets if start == brackets[0] else _line(depth - 1) + brackets[1]


def _pieces(rows: pa.Array | pa.RecordBatch, text: Callable[[Any, str], str], depth: int) -> Iterator[tuple[str]]:
    for start in range(0, len(rows), _CHUNK):
        yield (text(rows.slice(start, _CHUNK), "," + _line(depth)),)


def _line(depth: int) -> str:
    return "\n" + " " * depth


def _quoted(ids: pa.Array) -> Iterable[str]:
    return map(json.encoder.encode_basestring, ids.to_pylist())


def _json_items(ids: pa.Array, between: str) -> str:
    return between.join(_quoted(ids))


def _json_numbers(rows: pa.RecordBatch, between: str) -> str:
    numbers = rows.column(1).cast(TEXT).to_pylist()  # the shortest that reads back equal, as repr has it, but faster
    return between.join(map(": ".join, zip(_quoted(rows["sample_id"]), numbers)))


def _json_reasons(rows: pa.RecordBatch, between: str) -> str:
    row = '{{\n   "sample_id": {},\n   "reason": {}\n  }}'.format
    return between.join(map(row, *map(_quoted, rows.columns)))


def _check_subsets(subsets: Any) -> None:
    if not isinstance(subsets, list) or not all(isinstance(s, list) for s in subsets):
        raise ValueError("its subsets are not lists")
    ids = [i for subset in subsets for i in subset]
    if not all(isinstance(i, str) for i in ids) or len(set(ids)) != len(ids):
        raise ValueError("its subsets do not hold each sample_id once")
    if not subsets or not subsets[0]:
        raise ValueError("its first subset is empty")
