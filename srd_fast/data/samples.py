"""From rows of any usual format to tokenised samples with a stable `sample_id`.

The standard formats, recognised by their columns; `formats.py` converts all others to one of these:

    instruction, input (optional), output      the prompt template applies; output may be a list of references
    prompt, completion                         the prompt is used as it is, even if it is rendered already and begins
                                               and ends in special tokens (template "chat" makes it a user turn)
    messages: [{"role", "content"}, ...]       the tokenizer's chat template; the last assistant turn is the response
    input_ids, labels                          tokenised already; labels are -100 for tokens without loss. If there are
                                               several turns, all are trained on, and the first is answered and scored
    text                                       a prompt that the template made, and its answer

Turns of `messages` may have other keys that the chat template knows (name, tool_calls, reasoning_content, ...); their
content is text, or a list of parts of text. For the chat template, the column `tools` holds schemas of functions, and
`system` a system text.

With a `privileged_template`, samples also have the teacher's prompt, `privileged_ids`, see `privileged.py`. It may
contain the text of the column `privileged`.

If there is a column `references` (a list of texts), answers are compared with these texts instead of the response. A
column `tests` (a text or a list of texts) holds Python tests that the code in an answer must pass, see
`reflection/execution.py`.

A tokenised sample has the columns sample_id, prompt, references, input_ids, labels and tests (empty if there are none).
The prompt and the response are tokenised separately and joined as ids, so training sees exactly the prompt ids that
generation starts from.

A data set has one format, the one that most of its rows have. Every row becomes a sample, or is rejected with its place
and a reason: used + rejected = rows (for json lines, the lines that are not blank).
"""

import gc
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from datasets import Dataset, Features

from ..errors import UserError, first_line
from .columns import PRIVILEGED_FEATURES, TOKENISED_FEATURES
from .files import SourceRow, shown
from .formats import RowFormat, choose_format
from .mapping import OWN_ROWS, advice, check_columns, check_found, mapped_formats, renamed
from .own_rows import DataFunction, made_rows
from .prompts import PROMPTS_CUT, RESPONSES_CUT, TURNS_DROPPED
from .rows import Rows
from .sources import rows_of
from .tables import Tables
from .tokenisation import Tokenisation
from .values import encodable, given_tests

logger = logging.getLogger(__name__)

_WITHOUT_TESTS = Features({name: kind for name, kind in TOKENISED_FEATURES.items() if name != "tests"})
_MOST_NAMES = 100
_AT_ONCE = 1000


@dataclass
class PreparedData:
    """Tokenised samples, and the rows that could not be used.

    Args:
        dataset: the samples.
        rejected: place and reason of each row that was not used.
        cuts: the numbers of prompts_cut, responses_cut and turns_dropped, because of a length limit.
    """

    dataset: Dataset
    rejected: list[tuple[str, str]] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)


def _row_format(rows: Iterable[Mapping[str, Any]], among: Sequence[RowFormat]) -> RowFormat:
    """The format that most rows have.

    Raises:
        UserError: no row has a known format. The message proposes what to type.
    """
    found = choose_format(rows, among)
    if found is not None:
        return found
    names: set[str] = set()
    example: dict[str, Any] = {}
    for row in rows:
        names.update(map(str, row))
        for name in [c for c in row if row[c] is not None and c not in example][:_MOST_NAMES]:
            example[name] = row[name]
    near = max(among, key=lambda each: len(names.intersection(each.columns)))
    missing = [c for c in near.columns if c not in names]
    if not missing:
        return near
    which = f"; missing {missing} for {near} rows" if len(missing) < len(near.columns) else ", which fit no row format"
    raise UserError(f"data has the columns {_listed(names)}{which}. {advice(example)}")


def _listed(names: Iterable[str]) -> str:
    """Some column names as a list for a message; only the first ones if there are many."""
    first = sorted(map(str, names))
    return str([shown(name) for name in first[:20]]) + (f" and {len(first) - 20} more" if len(first) > 20 else "")


def content_id(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """16 hex digits that depend only on the content of the row."""
    said = {c: row.get(c) for c in columns if row.get(c) not in (None, "")}
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass
class _Reading:
    """Makes samples of rows of one format, in their order.

    Args:
        row_format: the rows' format; None if there are no rows at all.
        tokenisation: tokenises them.
    """

    row_format: RowFormat | None
    tokenisation: Tokenisation
    rejected: list[tuple[str, str]] = field(default_factory=list)
    cuts: Counter[str] = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)
    _unprivileged: list[str] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)
    _places: dict[str, str] = field(default_factory=dict)
    _repeated: dict[str, list[str]] = field(default_factory=dict)
    _without: str = ""

    def __post_init__(self) -> None:
        self.features = TOKENISED_FEATURES if self.tokenisation.privileged is None else PRIVILEGED_FEATURES
        self.tables = Tables(self.features.arrow_schema)

    def take(self, rows: Sequence[SourceRow]) -> None:
        """Make samples of the next rows."""
        read = [self._read(row) for row in rows]
        whole = [row for row in read if not isinstance(row.standard, UserError)]
        made = iter(self.tokenisation.samples([row.standard for row in whole], self.cuts))  # type: ignore[misc]
        samples = []
        for row in read:
            sample = row.standard if isinstance(row.standard, UserError) else next(made)
            try:
                if isinstance(sample, UserError):
                    raise sample
                tests = given_tests(row.columns)
            except UserError as e:
                self.rejected.append((row.where + (f" ({shown(row.sample_id)})" if row.sample_id else ""), str(e)))
                continue
            samples.append({"sample_id": row.sample_id, **sample, "tests": tests})
            self._without = self._without or ("" if row.has_given_id else row.where)
        if samples:
            self.tables.add({name: [sample[name] for sample in samples] for name in self.features})

    def check_given_ids(self) -> None:
        """Refuse a sample_id that several rows have, and data in which only some rows have one.

        Raises:
            UserError: there are such rows. The message names their places.
        """
        for given, where in self._repeated.items():
            raise UserError(
                f"sample_id {shown(given)!r} is used by {len(where)} rows; it must be unique: {_places(where)}"
            )
        if self._places and self._without:
            raise UserError(f"{self._without} has no sample_id while others have one; give all rows one")

    def check_privileged(self, name: str) -> None:
        """Refuse data with rows that lack the text for the teacher.

        Args:
            name: what messages call the data.

        Raises:
            UserError: there are such rows. The message names their places.
        """
        if self._unprivileged:
            raise UserError(
                f"{name}: {len(self._unprivileged)} rows have nothing that only the teacher could read: "
                f"{_places(self._unprivileged)}; give each a text in the column privileged (another one: columns: "
                "{privileged: NAME}; tokenised rows: privileged_ids), or a privileged_template without {privileged}"
            )

    def _read(self, row: SourceRow) -> "_Row":
        columns = row.columns
        if columns is None or self.row_format is None:
            return _Row(row.where, {}, None, UserError(row.reason))
        kind, standard, wrong = self._standard(columns, self.row_format)
        is_chat = self.tokenisation.is_chat(kind)
        known = (*kind, "input") if "instruction" in kind else kind
        sample_id = self._content_id(standard, (*known, "tools", "system") if is_chat else known)
        if not is_chat:
            self.unused.update(c for c in ("tools", "system") if standard.get(c))
        given = None
        try:
            given = _given_id(columns)
            if given is not None:
                self._note_id(given, row.where)
                sample_id = given
            if wrong is not None:
                raise wrong
            if self.tokenisation.lacks_privileged(standard, kind):
                self._unprivileged.append(row.where)
                raise UserError("there is nothing that only the teacher could read")
            if sample_id is None:
                raise UserError("the row is nested too deeply, or holds what JSON cannot")
        except UserError as e:
            return _Row(row.where, columns, sample_id, e)
        return _Row(row.where, columns, sample_id, (standard, kind), given is not None)

    @staticmethod
    def _standard(
        row: Mapping[str, Any], row_format: RowFormat
    ) -> tuple[tuple[str, ...], Mapping[str, Any], UserError | None]:
        """The columns of the standard format, the row in that format, and otherwise the reason why there is none."""
        try:
            _check_values(row, row_format.columns)
            return *row_format.standard(row), None
        except UserError as e:
            return row_format.columns, row, e

    def _content_id(self, row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
        """A hash of the content, with a number if the content occurs again; None if it cannot be hashed."""
        try:
            base = content_id(row, columns)
        except (RecursionError, TypeError, ValueError):  # nested too deeply, keys of several types, arrays
            return None
        self._seen[base] += 1
        return f"{base}-{self._seen[base] - 1}" if self._seen[base] > 1 else base

    def _note_id(self, given: str, where: str) -> None:
        first = self._places.setdefault(given, where)
        if first is not where:
            self._repeated.setdefault(given, [first]).append(where)


def _places(where: Sequence[str]) -> str:
    """The first few places, for a message."""
    return ", ".join(where[:5]) + (", ..." if len(where) > 5 else "")


@dataclass
class _Row:
    """A row before it is tokenised.

    Args:
        where: its place.
        columns: its values.
        sample_id: the id of its sample.
        standard: the row in a standard format with that format's columns, or why it cannot be used.
        has_given_id: whether the user gave the id.
    """

    where: str
    columns: Mapping[str, Any]
    sample_id: str | None
    standard: tuple[Mapping[str, Any], tuple[str, ...]] | UserError
    has_given_id: bool = False


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


def prepare_dataset(
    data: Any,
    tokenisation: Tokenisation,
    name: str = "data",
    max_bad_rows: int | float | None = None,
    columns: Mapping[str, str] | None = None,
    data_function: str | DataFunction | None = None,
) -> PreparedData:
    """Tokenise rows. Those that cannot be used are listed in `rejected`, in their order, never silently dropped.

    Args:
        data: what `rows_of` takes: rows, a data set, a DataFrame, a file, a folder, a hub name; or what `read_source`
            returns, so that messages have the rows' places in their file.
        tokenisation: the tokenizer, template and limits.
        name: what messages call the data.
        max_bad_rows: how many rows may be rejected: a number, or a share in (0, 1) of all rows. None: all but one.
        columns: a column of a row format -> the column, or `column.key`, of the data.
        data_function: makes the rows, see `made_rows`: a function, or its place, `FILE.py:FUNCTION`.

    Returns:
        The samples and the rejected rows.

    Raises:
        UserError: columns are missing, ids repeat, no row can be used, or more than `max_bad_rows` cannot; or a row
            lacks the text for the teacher that the tokenisation needs.
    """
    if isinstance(data, Dataset) and data.features == PRIVILEGED_FEATURES and len(data):
        return PreparedData(data)
    if isinstance(data, Dataset) and data.features == TOKENISED_FEATURES and len(data) and not tokenisation.privileged:
        return PreparedData(data)
    if isinstance(data, Dataset) and data.features == _WITHOUT_TESTS and len(data):
        return PreparedData(data.add_column("tests", [[]] * len(data), feature=TOKENISED_FEATURES["tests"]))
    mapping = check_columns(columns)
    rows = rows_of(data, name) if data_function is None else made_rows(data, data_function, name)
    if mapping:
        check_found(mapping, _Columns(rows), name)
        rows = rows.mapped(lambda row: renamed(row, mapping))
    count = len(rows)
    if not count:
        raise UserError(f"{name} is empty")
    found = _Columns(rows)
    reading = _Reading(_row_format(found, mapped_formats(mapping)) if any(True for _ in found) else None, tokenisation)
    every = iter(rows)
    while some := list(islice(every, _AT_ONCE)):
        with _uncollected():
            reading.take(some)
    reading.check_given_ids()
    reading.check_privileged(name)
    rejected, cuts = reading.rejected, reading.cuts
    if not reading.tables.rows:
        raise UserError(
            f"{name}: none of {count} rows is usable; first: {_told(rejected[:1])}. Repair them, or {OWN_ROWS}"
        )
    if rejected and max_bad_rows is not None:
        _check_rejected(rejected, count, name, max_bad_rows)
    if rejected:
        logger.warning("%s: %d of %d rows rejected; first: %s", name, len(rejected), count, _told(rejected[:1]))
    samples = reading.tables.dataset()
    if reading.unused:
        logger.warning(
            "%s: the column %s is not used: only the chat template has a place for it (template: chat)",
            name, " and ".join(sorted(reading.unused)),
        )  # fmt: skip
    if cuts.total():
        logger.warning(
            "%s: of %d rows %d prompts and %d responses are cut, and %d turns dropped, to fit max_prompt_length %d and "
            "max_response_length %d", name, len(samples), cuts[PROMPTS_CUT], cuts[RESPONSES_CUT], cuts[TURNS_DROPPED],
            tokenisation.max_prompt_length, tokenisation.max_response_length,
        )  # fmt: skip
    return PreparedData(samples, rejected, cuts)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turn Python's search for reference cycles off: new lists trigger it again and again, a tenth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class _Columns:
    """The values of all entries that are rows, read again for each pass."""

    rows: Rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (row.columns for row in self.rows if row.columns is not None)


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
