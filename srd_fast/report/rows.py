"""All rows of a run as data for the page's script, within a limit of bytes.

The tables are JSON in blocks that no browser executes; `page.js` draws them, using only `textContent`. It is a plain
script of two hundred lines, because plotting libraries take one to five megabytes, the page's whole limit, and need
`unsafe-eval` or their own styles. The page's Content-Security-Policy names the script by its hash, so that no other can
run. Without scripts, only these tables are missing from the page.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from srd_fast.report.numbers import rows as rows_in_words
from srd_fast.report.plots import GOLDEN
from srd_fast.report.read import FloatArray

# Limits on the characters of a text; the largest with which the table fits is chosen.
LIMITS = (6000, 2000, 600, 240)
# The share of a table's bytes that ids and scores may take before rows are left out.
SHARE_OF_SCORES = 0.93
# For the overhead of a column of texts: the most bytes, and the share of a table's bytes.
COMMON_BYTES, SHARE_OF_COMMON = 20_000, 0.01


@dataclass(frozen=True)
class Column:
    """A number for each row, NaN if it has none. minor: whether it is left out on narrow screens."""

    title: str
    unit: str
    values: FloatArray
    minor: bool = False


@dataclass(frozen=True)
class Texts:
    """A text for each row, or None."""

    label: str
    values: Sequence[str | None]
    whole: bool = False


@dataclass(frozen=True)
class Table:
    """Rows that the page can sort, filter and page through.

    Args:
        ids: the rows' ids.
        columns: their numbers.
        texts: the texts that open on a click. The beginning of the first is shown beside the id.
        places: names of the groups, and for each row the number of its group.
        extra: further entries for the script.
    """

    ids: Sequence[str]
    columns: Sequence[Column]
    texts: Sequence[Texts]
    places: tuple[Sequence[str], npt.NDArray[np.int64]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def fit(table: Table, budget: int) -> tuple[str, str]:
    """Write a table in at most `budget` bytes of UTF-8.

    If it is larger, texts are cut, then left out, and then rows are left out. The remaining rows are spread evenly over
    the order of the table.

    Args:
        table: the rows.
        budget: bytes.

    Returns:
        The JSON text, safe in a script element, and a sentence about what was left out; empty if nothing was.
    """
    total = len(table.ids)
    index = np.arange(total)
    core = _core(table, index)
    size = len(as_json(core).encode(errors="replace"))
    if size > SHARE_OF_SCORES * budget and total:
        index = np.unique(
            np.linspace(0, total - 1, max(int(total * 0.95 * SHARE_OF_SCORES * budget / size), 1)).astype(int)
        )
        core = _core(table, index)
        size = len(as_json(core).encode(errors="replace"))
    # The labels, brackets and common lines of the texts, and the number of each row that has them, with commas.
    beside = min(COMMON_BYTES, int(SHARE_OF_COMMON * budget))
    room = budget - size - len(table.texts) * beside
    each = len(f"{len(index)},") + len(table.texts)
    limit = _limit(table.texts, index, room - each * len(index))
    found: dict[int, list[str | None]] = {}
    # Steps by the golden ratio reach all parts of the table before they return to the first.
    for place in np.argsort(np.arange(len(index)) * GOLDEN % 1).tolist() if table.texts else ():
        of_row = [_cut(t.values[index[place]], limit) for t in table.texts]
        room -= each + sum(len(as_json(x).encode(errors="replace")) for x in of_row)
        if room < 0:
            break
        found[place] = of_row
    with_texts = sorted(found)
    columns = [[found[place][i] for place in with_texts] for i in range(len(table.texts))]
    core["with_texts"] = with_texts
    core["texts"] = [
        {"label": t.label, "whole": t.whole, "common": _common_lines(column, beside // 2), "values": column}
        for t, column in zip(table.texts, columns)
    ]
    return as_json(core), _left_out(total, len(index), len(found) if table.texts else len(index), limit)


def _core(table: Table, index: npt.NDArray[np.int64]) -> dict[str, Any]:
    core: dict[str, Any] = {
        "ids": [table.ids[i] for i in index],
        "columns": [
            {"title": c.title, "unit": c.unit, "minor": c.minor, "values": _rounded(c, index)} for c in table.columns
        ],
        **table.extra,
    }
    if table.places is not None:
        core["places"], core["place"] = list(table.places[0]), table.places[1][index].tolist()
    return core


def _rounded(column: Column, index: npt.NDArray[np.int64]) -> list[float | int | None]:
    """The numbers, rounded to the displayed digits."""
    form = ".1f" if column.unit == "points" else ".4g"
    found = (float(format(x, form)) for x in column.values[index].tolist())
    return [None if not np.isfinite(x) else int(x) if x == int(x) else x for x in found]


def _limit(texts: Sequence[Texts], index: npt.NDArray[np.int64], room: int) -> int:
    lengths = np.array([[len(t.values[i] or "") for i in index] for t in texts], dtype=np.int64)
    return next((limit for limit in LIMITS if 1.05 * np.minimum(lengths, limit).sum() < room), LIMITS[-1])


def _cut(text: str | None, limit: int) -> str | None:
    """The text; if it is longer, its two ends, since a prompt begins with its template and ends with the question."""
    if text is None or len(text) <= limit:
        return text
    return f"{text[: limit // 2]} […] {text[-limit // 2 :]}"


def _common_lines(texts: Iterable[str | None], most: int) -> list[str]:
    """Lines that at least three texts and a tenth of them have, such as a template's. most: bytes of all lines."""
    some = [x for x in texts if x]
    counts = Counter(line for x in some for line in {line.strip() for line in x.split("\n")})
    found = [line for line, n in counts.most_common(50) if line and n >= max(3, len(some) / 10)]
    return found if len(as_json(found).encode(errors="replace")) <= most else []


def _left_out(total: int, listed: int, with_text: int, limit: int) -> str:
    parts = []
    if listed < total:
        parts.append(
            f"{listed:,} of {rows_in_words(total)} are listed, spread evenly over the order; the figures count all"
        )
    if with_text < listed:
        parts.append(f"{with_text:,} of the listed have their texts, so that the page stays small")
    if with_text and limit < LIMITS[0]:
        parts.append(f"texts of more than {limit} characters are cut")
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def as_json(content: Any) -> str:
    """JSON without characters that could end a script element or begin a comment in it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
