"""From rows of any usual format to tokenised samples with a stable `sample_id`.

Row formats, told apart by their columns:

    instruction, input (optional), output      the prompt template applies; output may be a list of references
    prompt, completion                         the prompt is taken as it stands (template "chat" makes it a user turn)
    messages: [{"role", "content"}, ...]       the tokenizer's chat template; the last assistant turn is the response
    input_ids, labels                          tokenised already; labels are -100 where there is no loss

A column `references` (a list of texts) replaces the response as what answers are scored against. A column `tests` (a
text or a list of texts) holds Python source that the code in an answer has to pass, see `reflection/execution.py`.

A tokenised sample has the columns sample_id, prompt, references, input_ids, labels and tests (empty where there are
none). The prompt and the response are tokenised apart and joined as ids, so training sees exactly the prompt ids that
generation starts from.

Data is of one format, that which most of its rows have. Every row becomes a sample, or is rejected with its place and a
reason: used + rejected = rows, of json lines the lines that are not blank.
"""

import codecs
import gzip
import hashlib
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .errors import UserError, first_line
from .templates import PromptTemplate, get_template

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
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
# Characters: no token is longer. What lies further behind than as many as the limit has tokens is cut off anyway, and a
# tokenizer takes a minute for a text of ten megabytes.
_LONGEST_TOKEN = 256
_FORMATS = (("instruction", "output"), ("prompt", "completion"), ("messages",), ("input_ids", "labels"))


@dataclass
class PreparedData:
    """Tokenised samples, and the rows that could not be used: (where, reason)."""

    dataset: Dataset
    rejected: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class SourceRow:
    """A row as it was found: where ("line 3" of json lines, else "row 3"), and its columns, or why it has none."""

    where: str
    columns: Mapping[str, Any] | None
    reason: str = ""


def read_rows(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """Rows of a json-lines file (also .gz), a json array, a parquet file, or a `datasets` hub name.

    Raises:
        UserError naming the file, and the line where there is one.
    """
    rows = read_source(source, split)
    for row in rows:
        if row.columns is None:
            raise UserError(f"data file {str(source)!r}, {row.where}: {row.reason}")
    return [dict(row.columns) for row in rows if row.columns is not None]


def read_source(source: str | Path, split: str = "train") -> list[SourceRow]:
    """`read_rows` with the place of each row; a line that is no row is there with the reason.

    Raises:
        UserError naming the file, where it has no rows at all or cannot be read to its end.
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
    """The file or folder that a source names, None where there is none. Raises UserError for an impossible name."""
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as e:  # too long, a user without a home, a NUL in it
        raise UserError(f"data {shown(str(source))!r} is no name of a file: {shown(first_line(e), 200)}") from e


def shown(text: str, limit: int = 80) -> str:
    """A text for a message: one line, at most `limit` characters, what cannot be printed as an escape."""
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
    return [_source_row(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _source_row(where: str, value: Any) -> SourceRow:
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
    # Where no line ends in a line feed, a carriage return ends it; with one, it is a blank.
    lines = content.split(b"\n" if b"\n" in content else b"\r")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if content.lstrip().startswith(b"["):
        try:
            whole = _parsed(content)
        except UserError as e:
            # Json lines with a list for a first line are no array: their first line alone is whole.
            if _json_line(*numbered[0]).reason != "expected an object, got list":
                raise UserError(f"data file {str(path)!r} is {e}") from e
        else:
            return _numbered(whole)
    return [_json_line(number, line) for number, line in numbered]


def _json_line(number: int, line: bytes) -> SourceRow:
    try:
        return _source_row(f"line {number}", _parsed(line))
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


def _row_format(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The format that most rows have: with a value in all of its columns, or else with all of its columns."""
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
    """The first of some column names, as a list in a message."""
    first = sorted(map(str, names))
    return str([shown(name) for name in first[:20]]) + (f" and {len(first) - 20} more" if len(first) > 20 else "")


def content_id(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """16 hex digits that depend on what the row says and on nothing else."""
    said = {c: row.get(c) for c in columns if row.get(c) not in (None, "")}
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _content_ids(rows: Iterable[Mapping[str, Any] | None], columns: Sequence[str]) -> list[str | None]:
    """Content hashes, repeated content numbered; None for what is no row and for rows that have no hash."""
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
    """The user's `sample_id`, None without one. Raises UserError for what cannot be one."""
    given = row.get("sample_id")
    if given is None:
        return None
    if isinstance(given, (list, Mapping)):
        raise UserError(f"sample_id must be text or a number, got {type(given).__name__}")
    try:
        return _encodable(str(given), "sample_id")
    except UserError:
        raise
    except ValueError as e:  # a number of more than 4,300 digits
        raise UserError(f"sample_id cannot be written: {first_line(e)}") from e


def _check_given_ids(places: Mapping[str, list[str]], without: str) -> None:
    """Refuse a sample_id of several rows, and data where only some rows have one.

    Args:
        places: of each id, where it stands.
        without: the first usable row that has none, if there is one.
    """
    for given, where in places.items():
        if len(where) > 1:
            listed = ", ".join(where[:5]) + (", ..." if len(where) > 5 else "")
            raise UserError(f"sample_id {shown(given)!r} is used by {len(where)} rows; it must be unique: {listed}")
    if places and without:
        raise UserError(f"{without} has no sample_id while others have one; give all rows one")


class Tokenisation:
    """Tokenises prompts and responses for one tokenizer, template and length limit.

    Args:
        tokenizer: the student's (and so the teacher's).
        template: "alpaca", "chat", or a string with `{instruction}` and optionally `{input}`.
        max_prompt_length: tokens; a longer prompt loses the end of its *input* text (then of its instruction), never
            the template's own text.
        max_response_length: tokens with the end-of-sequence token, which is always there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "alpaca",
        max_prompt_length: int = 512,
        max_response_length: int = 512,
    ) -> None:
        if max_prompt_length < 1 or max_response_length < 1:
            raise UserError(
                f"max_prompt_length and max_response_length must be at least 1, got {max_prompt_length} "
                f"and {max_response_length}"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token; responses must end in one")
        self.tokenizer = tokenizer
        self.template: PromptTemplate = get_template(template, tokenizer)
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self._marker = self._prefix_space_marker()

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def _prefix_space_marker(self) -> list[int]:
        """Ids of a newline if this tokenizer puts a space before every text (SentencePiece), else none.

        Such a tokenizer would turn the response "a" into " a"; behind a newline it does not.
        """
        newline, alone, behind = self._ids("\n"), self._ids("a"), self._ids("\na")
        shift = behind[: len(newline)] == newline and behind[len(newline) :] != alone
        return newline if shift else []

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response, cut to the limit, ending in EOS."""
        text = text[: self.max_response_length * _LONGEST_TOKEN]
        if self._marker and self._ids("\n" + text)[: len(self._marker)] == self._marker:
            ids = self._ids("\n" + text)[len(self._marker) :]
        else:
            ids = self._ids(text)
        return [*ids[: self.max_response_length - 1], self.tokenizer.eos_token_id]

    def prompt_ids(self, fields: Mapping[str, Any], template: PromptTemplate | None = None) -> tuple[str, list[int]]:
        """Rendered prompt and its ids within the limit. Raises UserError if the template alone is too long."""
        template = template or self.template
        fields = dict(fields)
        for cut in template.cut_order:
            fields[cut] = (fields.get(cut) or "")[: self.max_prompt_length * _LONGEST_TOKEN]
        for cut in template.cut_order:
            text = self._render(fields, template)
            ids = self._prompt_ids(text, template)
            while len(ids) > self.max_prompt_length and fields.get(cut):
                fields[cut] = self._cut_end(fields[cut], len(ids) - self.max_prompt_length)
                text = self._render(fields, template)
                ids = self._prompt_ids(text, template)
            if len(ids) <= self.max_prompt_length:
                return text, ids
        raise UserError(
            f"the prompt template alone is {len(ids)} tokens, above max_prompt_length {self.max_prompt_length}"
        )

    def _render(self, fields: Mapping[str, Any], template: PromptTemplate) -> str:
        try:
            return _encodable(template.render(fields), "the prompt")
        except UserError:
            raise
        except Exception as e:  # a chat template is a program of its own, and refuses turns with any error
            raise UserError(f"the chat template fails: {shown(first_line(e), 200)}") from e

    def _prompt_ids(self, text: str, template: PromptTemplate) -> list[int]:
        ids = self._ids(text, special=template.adds_special_tokens)
        # Some tokenizers end every text; between prompt and response that would end the sample.
        ended = ids[-1:] == [self.tokenizer.eos_token_id] and template.adds_special_tokens
        return ids[:-1] if ended and self._ids(text)[-1:] != ids[-1:] else ids

    def _cut_end(self, text: str, excess: int) -> str:
        ids = self._ids(text)
        shorter = str(self.tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=True)).rstrip("�")
        return shorter if len(shorter) < len(text) else text[: len(text) - excess]

    def sample(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
        """One tokenised sample without its id. Raises UserError with the reason for a row that cannot be used."""
        if "labels" in columns:
            return self._tokenised(row)
        fields, references, template = self._fields(row, columns)
        prompt, prompt_ids = self.prompt_ids(fields, template)
        if not prompt_ids:
            raise UserError("the prompt is empty: there is nothing to answer")
        response = self.response_ids(references[0])
        references = _given_references(row) or references
        return {
            "prompt": prompt,
            "references": references,
            "input_ids": prompt_ids + response,
            "labels": [IGNORE_INDEX] * len(prompt_ids) + response,
        }

    def _fields(
        self, row: Mapping[str, Any], columns: Sequence[str]
    ) -> tuple[dict[str, Any], list[str], PromptTemplate]:
        if "messages" in columns:
            messages = row["messages"]
            if not isinstance(messages, list) or not all(
                isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            ):
                raise UserError("messages must be a list of {'role': text, 'content': text}")
            last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
            if last == 0:
                raise UserError("messages need an assistant turn after a user turn")
            for m in messages:
                _encodable(m["role"] + m["content"], "messages")
            chat = get_template("chat", self.tokenizer)
            history = [dict(m) for m in messages[:last]]
            fields = {"history": history[:-1], "instruction": history[-1]["content"], "role": history[-1]["role"]}
            return fields, _references(messages[last]["content"], "messages"), chat
        if "prompt" in columns:
            fields = {"instruction": _text(row, "prompt")}
            template = self.template if self.template.is_chat else get_template("{instruction}", self.tokenizer)
            return fields, _references(row["completion"], "completion"), template
        given = row.get("input")
        fields = {"instruction": _text(row, "instruction"), "input": "" if given is None else _text(row, "input")}
        return fields, _references(row["output"], "output"), self.template

    def _tokenised(self, row: Mapping[str, Any]) -> dict[str, Any]:
        ids, labels = row["input_ids"], row["labels"]
        if not isinstance(ids, list) or not isinstance(labels, list) or len(ids) != len(labels):
            raise UserError("input_ids and labels must be lists of the same length")
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in (*ids, *labels)):
            raise UserError("input_ids and labels must hold whole numbers")
        size = len(self.tokenizer)
        bad = [i for i in ids if not 0 <= i < size] + [x for x in labels if x != IGNORE_INDEX and not 0 <= x < size]
        if bad:
            raise UserError(f"token id {bad[0]} is outside the tokenizer's {size}")
        start = first_label(labels)
        if start == len(labels) or start == 0:
            raise UserError("labels must have -100 over the prompt and then at least one token with loss")
        limit = self.max_prompt_length + self.max_response_length
        if len(ids) > limit:
            raise UserError(f"{len(ids)} tokens, above max_prompt_length + max_response_length = {limit}")
        response = [x for x in labels[start:] if x != IGNORE_INDEX]
        references = [str(self.tokenizer.decode(response, skip_special_tokens=True))]
        references = _given_references(row) or references
        prompt = str(self.tokenizer.decode(ids[:start])) if row.get("prompt") is None else _text(row, "prompt")
        return {"prompt": prompt, "references": references, "input_ids": ids, "labels": labels}


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{column} must be text, got {type(value).__name__}")
    return _encodable(value, column)


def _encodable(text: str, column: str) -> str:
    """The text, if it is Unicode that can be written: JSON may carry half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{column} holds half of a surrogate pair at character {e.start}") from None
    return text


def _references(value: Any, column: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) for v in values):
        raise UserError(f"{column} must be text or a list of texts, got {type(value).__name__}")
    return [_encodable(v, column) for v in values]


def _given_references(row: Mapping[str, Any]) -> list[str] | None:
    """What a column `references` says the answers to score against are; None without one."""
    given = row.get("references")
    if given is not None and not isinstance(given, list):
        raise UserError(f"references must be a list of texts, got {type(given).__name__}")
    return _references(given, "references") if given else None


def _given_tests(row: Mapping[str, Any]) -> list[str]:
    """What a column `tests` holds, none without one."""
    given = row.get("tests")
    return [] if given is None or (isinstance(given, (str, list)) and not given) else _references(given, "tests")


def first_label(labels: Sequence[int]) -> int:
    """Index of the first token with loss: the length of the prompt."""
    return next((i for i, x in enumerate(labels) if x != IGNORE_INDEX), len(labels))


def prepare_dataset(
    data: Dataset | Iterable[Mapping[str, Any] | SourceRow],
    tokenisation: Tokenisation,
    name: str = "data",
    max_bad_rows: int | float | None = None,
) -> PreparedData:
    """Tokenise rows. Unusable rows are listed in `rejected`, in the order of the rows, never silently dropped.

    Args:
        data: rows, or what `read_source` gives, whose places are then those of the file.
        max_bad_rows: how many rows may be rejected: a number, or a share in (0, 1) of all rows. None: all but one.

    Raises:
        UserError for missing columns, repeated ids, when no row is usable, or when more are not than `max_bad_rows`.
    """
    if isinstance(data, Dataset) and data.features == TOKENISED_FEATURES and len(data):
        return PreparedData(data)
    if isinstance(data, Dataset) and data.features == _WITHOUT_TESTS and len(data):
        return PreparedData(data.add_column("tests", [[]] * len(data), feature=TOKENISED_FEATURES["tests"]))
    rows = [
        row if isinstance(row, SourceRow) else _source_row(f"row {number}", row)
        for number, row in enumerate(data.to_list() if isinstance(data, Dataset) else data, 1)
    ]
    if not rows:
        raise UserError(f"{name} is empty")
    found = [row.columns for row in rows if row.columns is not None]
    columns = _row_format(found) if found else ()
    known = (*columns, "input") if "instruction" in columns else columns
    samples: list[dict[str, Any]] = []
    rejected: list[tuple[str, str]] = []
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
            sample = tokenisation.sample(row.columns, columns)
            samples.append({"sample_id": sample_id, **sample, "tests": _given_tests(row.columns)})
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
    return PreparedData(Dataset.from_list(samples, features=TOKENISED_FEATURES), rejected)


def _check_values(row: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Refuse a row without a value in each of the format's columns."""
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


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """[B, L] int64, shorter rows filled at the end."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


@dataclass
class DistillationCollator:
    """Batches tokenised samples, padded at the end, or with `flatten` one behind the other.

    Padded: input_ids, attention_mask, labels, each [B, L]. The attention mask comes from lengths, never from the pad
    id, which may be the EOS id.

    Flattened: input_ids, position_ids (from 0 in each sample), labels, each [1, L] with L the sum of the lengths, and
    cu_seq_lens [B + 1] int32: where each sample begins, then L. There is no attention_mask.

    Labels stand at their own tokens, to be shifted by one later. The first label of a sample has no token before it, so
    in a flattened batch it is always -100: shifted, nothing is predicted across the border of two samples.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate."""
        ids = [s["input_ids"] for s in samples]
        if self.flatten:
            return {
                "input_ids": _row([x for row in ids for x in row]),
                "position_ids": _row([i for row in ids for i in range(len(row))]),
                "labels": _row([x for s in samples for x in (IGNORE_INDEX, *s["labels"][1:])]),
                "cu_seq_lens": torch.tensor([0, *accumulate(map(len, ids))], dtype=torch.int32),
            }
        return {
            "input_ids": pad_right(ids, self.pad_token_id),
            "attention_mask": pad_right([[1] * len(x) for x in ids], 0),
            "labels": pad_right([s["labels"] for s in samples], IGNORE_INDEX),
        }


def _row(values: list[int]) -> torch.Tensor:
    """[1, L] int64."""
    return torch.tensor([values], dtype=torch.long)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with: the tokenizer's, else its EOS."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that the largest batch meets the memory limit first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
