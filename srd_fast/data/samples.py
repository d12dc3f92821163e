"""From rows of any usual format to tokenised samples with a stable `sample_id`.

Row formats, told apart by their columns:

    instruction, input (optional), output      the prompt template applies; output may be a list of references
    prompt, completion                         the prompt is taken as it is, also if it is rendered already and begins
                                               and ends in special tokens (template "chat" makes it a user turn)
    messages: [{"role", "content"}, ...]       the tokenizer's chat template; the last assistant turn is the response
    input_ids, labels                          tokenised already; labels are -100 where there is no loss. Of several
                                               turns all are trained on, and the first is answered and scored

Turns of `messages` may have whatever else the chat template knows (name, tool_calls, reasoning_content, ...); their
content is text, or a list of parts of text. Where the chat template is used, the column `tools` holds schemas of
functions, and `system` a system text.

A column `references` (a list of texts) replaces the response as the texts that answers are scored against. A column
`tests` (a text or a list of texts) holds Python source that the code in an answer has to pass, see
`reflection/execution.py`.

A tokenised sample has the columns sample_id, prompt, references, input_ids, labels and tests (empty where there are
none). The prompt and the response are tokenised separately and joined as ids, so training sees exactly the prompt ids
that generation starts from.

All data has one format, the one that most of its rows have. Every row becomes a sample, or is rejected with its place
and a reason: used + rejected = rows (for json lines, the lines that are not blank).
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features, List, Value

from ..errors import UserError, first_line
from .sources import SourceRow, shown, source_row
from .tokenisation import PROMPTS_CUT, RESPONSES_CUT, TURNS_DROPPED, Tokenisation, encodable, given_tests

logger = logging.getLogger(__name__)

TOKENISED_FEATURES = Features(
    {
        "sample_id": Value("string"),
        "prompt": Value("string"),
        "references": List(Value("string")),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "tests": List(Value("string")),
    }
)
_WITHOUT_TESTS = Features({name: kind for name, kind in TOKENISED_FEATURES.items() if name != "tests"})
_FORMATS = (("instruction", "output"), ("prompt", "completion"), ("messages",), ("input_ids", "labels"))


@dataclass
class PreparedData:
    """Tokenised samples, and the rows that could not be used.

    Args:
        dataset: the samples.
        rejected: place and reason of each row that was not used.
        cuts: how many prompts_cut, responses_cut and turns_dropped there are, because they exceed a limit.
    """

    dataset: Dataset
    rejected: list[tuple[str, str]] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)


def _row_format(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The format that most rows have: with a value in all of its columns, or else just with all of its columns."""
    filled: Counter[tuple[str, ...]] = Counter()
    there: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        for wanted in _FORMATS:
            if all(c in row for c in wanted):
                there[wanted] += 1
                filled[wanted] += all(row[c] is not None for c in wanted)
    if there:
        return max(_FORMATS, key=lambda wanted: (filled[wanted], there[wanted]))
    names = {str(c) for row in rows for c in row}
    near = max(_FORMATS, key=lambda wanted: len(names.intersection(wanted)))
    missing = [c for c in near if c not in names]
    if not missing:
        return near
    raise UserError(
        f"data has the columns {_listed(names)}; missing {missing} for {'/'.join(near)} rows. Known formats: "
        + ", ".join("/".join(f) for f in _FORMATS)
    )


def _listed(names: Iterable[str]) -> str:
    """Some column names as a list for a message; only the first if there are many."""
    first = sorted(map(str, names))
    return str([shown(name) for name in first[:20]]) + (f" and {len(first) - 20} more" if len(first) > 20 else "")


def content_id(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """16 hex digits that depend only on the content of the row."""
    said = {c: row.get(c) for c in columns if row.get(c) not in (None, "")}
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _content_ids(rows: Iterable[Mapping[str, Any] | None], columns: Sequence[str]) -> list[str | None]:
    """Content hashes, numbered where content repeats; None for a row without columns or without a hash."""
    seen: Counter[str] = Counter()
    ids: list[str | None] = []
    for row in rows:
        try:
            base = None if row is None else content_id(row, columns)
        except (RecursionError, TypeError, ValueError):  # nested too deeply, keys of several types, arrays
            base = None
        ids.append(f"{base}-{seen[base]}" if base is not None and seen[base] else base)
        if base is not None:
            seen[base] += 1
    return ids


def _given_id(row: Mapping[str, Any]) -> str | None:
    """The user's `sample_id`, or None.

    Raises:
        UserError: the value cannot be an id.
    """
    given = row.get("sample_id")
    if given is None:
        return None
    if isinstance(given, (list, Mapping)):
        raise UserError(f"sample_id must be text or a number, got {type(given).__name__}")
    try:
        return encodable(str(given), "sample_id")
    except UserError:
        raise
    except ValueError as e:  # a number of more than 4,300 digits
        raise UserError(f"sample_id cannot be written: {first_line(e)}") from e


def _check_given_ids(places: Mapping[str, list[str]], without: str) -> None:
    """Refuse a sample_id that several rows have, and data where only some rows have one.

    Args:
        places: where each id occurs.
        without: the place of the first usable row without an id, or "".

    Raises:
        UserError: naming the places.
    """
    for given, where in places.items():
        if len(where) > 1:
            listed = ", ".join(where[:5]) + (", ..." if len(where) > 5 else "")
            raise UserError(f"sample_id {shown(given)!r} is used by {len(where)} rows; it must be unique: {listed}")
    if places and without:
        raise UserError(f"{without} has no sample_id while others have one; give all rows one")


def prepare_dataset(
    data: Dataset | Iterable[Mapping[str, Any] | SourceRow],
    tokenisation: Tokenisation,
    name: str = "data",
    max_bad_rows: int | float | None = None,
) -> PreparedData:
    """Tokenise rows. Those that cannot be used are listed in `rejected`, in their order, never silently dropped.

    Args:
        data: rows, or what `read_source` returns, whose places are then those in the file.
        tokenisation: the tokenizer, template and limits.
        name: of the data, for messages.
        max_bad_rows: how many rows may be rejected: a number, or a share in (0, 1) of all rows. None: all but one.

    Returns:
        The samples and the rejected rows.

    Raises:
        UserError: columns are missing, ids repeat, no row can be used, or more than `max_bad_rows` cannot.
    """
    if isinstance(data, Dataset) and data.features == TOKENISED_FEATURES and len(data):
        return PreparedData(data)
    if isinstance(data, Dataset) and data.features == _WITHOUT_TESTS and len(data):
        return PreparedData(data.add_column("tests", [[]] * len(data), feature=TOKENISED_FEATURES["tests"]))
    rows = [
        row if isinstance(row, SourceRow) else source_row(f"row {number}", row)
        for number, row in enumerate(data.to_list() if isinstance(data, Dataset) else data, 1)
    ]
    if not rows:
        raise UserError(f"{name} is empty")
    found = [row.columns for row in rows if row.columns is not None]
    columns = _row_format(found) if found else ()
    known = (*columns, "input") if "instruction" in columns else columns
    if columns and tokenisation.is_chat(columns):
        known = (*known, "tools", "system")
    samples: list[dict[str, Any]] = []
    rejected: list[tuple[str, str]] = []
    cuts: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    without = ""
    for row, content in zip(rows, _content_ids([row.columns for row in rows], known)):
        where, sample_id = row.where, content
        try:
            if row.columns is None:
                raise UserError(row.reason)
            given = _given_id(row.columns)
            if given is not None:
                places.setdefault(given, []).append(row.where)
                sample_id = given
            _check_values(row.columns, columns)
            if sample_id is None:
                raise UserError("the row is nested too deeply, or holds what JSON cannot")
            sample = tokenisation.sample(row.columns, columns, cuts)
            samples.append({"sample_id": sample_id, **sample, "tests": given_tests(row.columns)})
            without = without or (row.where if given is None else "")
        except UserError as e:
            where += f" ({shown(sample_id)})" if sample_id is not None else ""
            rejected.append((where, str(e)))
    _check_given_ids(places, without)
    if not samples:
        raise UserError(f"{name}: none of {len(rows)} rows is usable; first: {_told(rejected[:1])}")
    if rejected and max_bad_rows is not None:
        _check_rejected(rejected, len(rows), name, max_bad_rows)
    if rejected:
        logger.warning("%s: %d of %d rows rejected; first: %s", name, len(rejected), len(rows), _told(rejected[:1]))
    if cuts.total():
        logger.warning(
            "%s: of %d rows %d prompts and %d responses are cut, and %d turns dropped, to fit max_prompt_length %d and "
            "max_response_length %d", name, len(samples), cuts[PROMPTS_CUT], cuts[RESPONSES_CUT], cuts[TURNS_DROPPED],
            tokenisation.max_prompt_length, tokenisation.max_response_length,
        )  # fmt: skip
    return PreparedData(Dataset.from_list(samples, features=TOKENISED_FEATURES), rejected, cuts)


def _check_values(row: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Refuse a row that lacks a value in one of the format's columns."""
    missing = [c for c in columns if row.get(c) is None]
    if not missing:
        return
    other = "" if len(missing) < len(columns) else f"; the columns of this row are {_listed(row)}"
    raise UserError(f"no value in {', '.join(missing)}{other}")


def _check_rejected(rejected: Sequence[tuple[str, str]], count: int, name: str, most: int | float) -> None:
    """Refuse more rejected rows than `most`, a number or a share of the `count` rows."""
    if len(rejected) > (most if isinstance(most, int) else most * count):
        raise UserError(
            f"{name}: {len(rejected)} of {count} rows rejected, more than max_bad_rows={most}; mend them, or raise "
            f"max_bad_rows (null: no limit); first: {_told(rejected[:3])}"
        )


def _told(rejected: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{where}: {reason}" for where, reason in rejected)
