"""Columns under other names: the mapping that a user gives, and the mapping that an error message proposes."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rapidfuzz import fuzz

from ..errors import UserError
from ..suggest import unknown_name
from .files import shown
from .formats import CARRIED, RowFormat, ordered_formats

_ASKED = ("prompt", "instruction", "question", "query", "input", "problem", "task", "request", "user", "human")
_ANSWERED = ("completion", "output", "answer", "response", "reply", "solution", "target", "assistant", "result")
_ABOUT_THE_ROW = {"id", "idx", "index", "uuid", "url", "category", "type", "lang", "language", "split", "topic", "date"}
_BESIDE = ("context", "passage", "document", "schema", "evidence", "explanation", "reasoning")
_NEAR = 80
# What to type where nothing else helps.
OWN_ROWS = "make rows yourself with data_function: FILE.py:FUNCTION"


def check_columns(given: Any) -> dict[str, str]:
    """Check a mapping of columns.

    Args:
        given: a column of a row format -> the column, or `column.key`, of the data; or None.

    Returns:
        The mapping.

    Raises:
        UserError: it is not such a mapping, or no row format has one of its columns.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(x, str) and x for pair in given.items() for x in pair):
        raise UserError(
            f"columns must say which column is which, such as {{instruction: question, output: answer}}, "
            f"got {shown(repr(given))}"
        )
    known = {c for each in ordered_formats() for c in (*each.columns, *each.optional)} | set(CARRIED)
    for name in given:
        if name not in known:
            raise UserError("columns: " + unknown_name("column of a row format", shown(name), known))
    if given and not _formats_with(given):
        raise UserError(f"columns: no row format has {', '.join(sorted(given))} together")
    return dict(given)


def mapped_formats(columns: Mapping[str, str]) -> list[RowFormat]:
    """The row formats that read every column of a mapping; all formats, if the mapping has only carried columns."""
    return _formats_with(columns) or ordered_formats()


def _formats_with(columns: Mapping[str, str]) -> list[RowFormat]:
    wanted = {c for c in columns if c not in CARRIED}
    return [each for each in ordered_formats() if wanted <= {*each.columns, *each.optional}]


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with the columns of a mapping in addition to its own; one that it lacks is None."""
    return {**row, **{name: value_at(row, place) for name, place in columns.items()}}


def value_at(row: Mapping[str, Any], place: str) -> Any:
    """The value of a column, or of `column.key` within it; None if there is none."""
    if place in row:
        return row[place]
    value: Any = row
    for key in place.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def check_found(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], name: str) -> None:
    """Refuse a mapping from a column that no row has.

    Raises:
        UserError: no row has the column. The message has the nearest existing one.
    """
    missing, names = dict.fromkeys(columns.values()), set[str]()
    for row in rows:
        for place in [p for p in missing if p in row or value_at(row, p) is not None]:
            del missing[place]
        if not missing:
            return
        if len(names) < 1000:
            names.update(map(str, row))
    if missing and names:
        raise UserError(f"columns: {name} has no such column: {unknown_name('column', next(iter(missing)), names)}")


def advice(row: Mapping[str, Any]) -> str:
    """Say what to type for data whose columns are not a row format.

    Args:
        row: a row of the data, with values.
    """
    talk = next((c for c, v in row.items() if isinstance(v, list) and v and isinstance(v[0], Mapping)), None)
    if talk is not None:
        return f"Say which column is which, if this is right: {_written({'messages': talk})}; or {OWN_ROWS}"
    texts = _places_of_text(row)
    if len(texts) < 2:
        return f"A row needs two texts, a question and its answer. {OWN_ROWS[:1].upper()}{OWN_ROWS[1:]}"
    asked = max(texts, key=lambda c: _likeness(c, _ASKED) - max(_likeness(c, _ANSWERED), _likeness(c, _BESIDE)))
    others = [c for c in texts if c != asked]
    answered = max(others, key=lambda c: _likeness(c, _ANSWERED) - max(_likeness(c, _ASKED), _likeness(c, _BESIDE)))
    names = ("prompt", "completion") if "prompt" in _words(asked) else ("instruction", "output")
    return f"Say which column is which: {_written(dict(zip(names, (asked, answered))))}; or {OWN_ROWS}"


def _written(columns: Mapping[str, str]) -> str:
    """A mapping in the notation of YAML."""

    def quoted(name: str) -> str:
        return name if re.fullmatch(r"[^\W\d][\w.-]*", name) else repr(shown(name, 40))

    return "columns: {" + ", ".join(f"{k}: {quoted(v)}" for k, v in columns.items()) + "}"


def _places_of_text(row: Mapping[str, Any]) -> list[str]:
    """Columns with text, except those that only describe the row, in their order; if none, keys within columns."""

    def texts(items: Iterable[tuple[str, Any]]) -> list[str]:
        named = [(c, v) for c, v in items if not _ABOUT_THE_ROW.intersection(_words(c)) and c not in CARRIED]
        return [c for c, v in named if isinstance(v, str) or (isinstance(v, list) and v and isinstance(v[0], str))]

    found = texts((str(c), v) for c, v in row.items())
    within = ((f"{c}.{k}", v) for c, inner in row.items() if isinstance(inner, Mapping) for k, v in inner.items())
    return found if len(found) > 1 else [*found, *texts(within)]


def _words(name: str) -> list[str]:
    """The words in a column's name, in lower case: user and query for userQuery."""
    return [w.lower() for w in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+|[^\W\d_]+", name)]


def _likeness(name: str, words: Iterable[str]) -> float:
    """How similar a column's name is to one of the words, 0 to 100."""
    near = max((fuzz.ratio(part, word) for part in _words(name) for word in words), default=0.0)
    return near if near >= _NEAR else 0.0
