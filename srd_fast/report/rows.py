"""Every row of a run as data for the page's script, within a number of bytes.

The tables are JSON in blocks that no browser executes; `page.js` draws them with `textContent` alone. A plain script of
two hundred lines, because nothing else is needed: plotting libraries weigh one to five megabytes, a page's whole
allowance, and want `unsafe-eval` or styles of their own. The page's Content-Security-Policy names the script by its
hash, so that no other can run. Without scripts the page is what it was: these tables are in addition.
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

# Characters of a text, from which the most generous that fits is chosen.
LIMITS = (6000, 2000, 600, 240)
# Of a table's bytes, what ids and scores may take before rows are left out.
SHARE_OF_SCORES = 0.93
# For what a column of texts has beside them: at most, and as a share of a table's bytes.
COMMON_BYTES, SHARE_OF_COMMON = 20_000, 0.01


@dataclass(frozen=True)
class Column:
    """A number of each row, NaN where there is none. minor: left out on narrow screens."""

    title: str
    unit: str
    values: FloatArray
    minor: bool = False


@dataclass(frozen=True)
class Texts:
    """A text of each row, or None."""

    label: str
    values: Sequence[str | None]
    whole: bool = False


@dataclass(frozen=True)
class Table:
    """Rows that the page can sort, filter and turn over.

    Args:
        ids: of the rows.
        columns: their numbers.
        texts: what opens on a click. The first is shown in part beside the id.
        places: names of the groups, and of each row the number of its own.
        extra: further entries for the script.
    """

    ids: Sequence[str]
    columns: Sequence[Column]
    texts: Sequence[Texts]
    places: tuple[Sequence[str], npt.NDArray[np.int64]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def fit(table: Table, budget: int) -> tuple[str, str]:
    """Write a table in at most `budget` bytes of UTF-8.

    Where it is larger, texts are cut, then left out, and then rows are: those that stay are spread evenly over the
    order of the table.

    Args:
        table: the rows.
        budget: bytes.

    Returns:
        The JSON text, fit for a script element, and one sentence on what was left out; empty if nothing was.
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
    # Golden steps reach every part of the table before they come back to the first.
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
    """The digits that are shown."""
    form = ".1f" if column.unit == "points" else ".4g"
    found = (float(format(x, form)) for x in column.values[index].tolist())
    return [None if not np.isfinite(x) else int(x) if x == int(x) else x for x in found]


def _limit(texts: Sequence[Texts], index: npt.NDArray[np.int64], room: int) -> int:
    lengths = np.array([[len(t.values[i] or "") for i in index] for t in texts], dtype=np.int64)
    return next((limit for limit in LIMITS if 1.05 * np.minimum(lengths, limit).sum() < room), LIMITS[-1])


def _cut(text: str | None, limit: int) -> str | None:
    """The text; of a longer one both ends, since a prompt begins with its template and ends with what is asked."""
    if text is None or len(text) <= limit:
        return text
    return f"{text[: limit // 2]} […] {text[-limit // 2 :]}"


def _common_lines(texts: Iterable[str | None], most: int) -> list[str]:
    """The lines that a tenth of the texts have, at least three: those of a template, not of a row. most: bytes."""
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
    """JSON without a character that could end a script element or begin a comment in it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
