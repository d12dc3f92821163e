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
"""

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
_FORMATS = (("instruction", "output"), ("prompt", "completion"), ("messages",), ("input_ids", "labels"))


@dataclass
class PreparedData:
    """Tokenised samples, and the rows that could not be used: (where, reason)."""

    dataset: Dataset
    rejected: list[tuple[str, str]] = field(default_factory=list)


def read_rows(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """Rows of a json-lines file (also .gz), a json array, a parquet file, or a `datasets` hub name.

    Raises:
        UserError naming the file, and the line where there is one.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix in {".jsonl", ".json", ".parquet", ".gz"} or str(source).startswith((".", "/", "~")):
            raise UserError(f"data file {str(source)!r} does not exist")
        return _hub_rows(str(source), split)
    if path.is_dir():
        raise UserError(f"data {str(source)!r} is a folder; give a .jsonl, .json or .parquet file or a hub name")
    if path.suffix == ".parquet":
        try:
            rows = Dataset.from_parquet(str(path)).to_list()
        except Exception as e:  # pyarrow and datasets raise many kinds; all mean that the file is not usable
            raise UserError(f"data file {str(source)!r} is not readable parquet: {e}") from e
    else:
        rows = _json_rows(path)
    if not rows:
        raise UserError(f"data file {str(source)!r} is empty")
    return rows


def _hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split).to_list()
    except Exception as e:  # network, hub and parsing errors of many kinds
        raise UserError(f"data {name!r} is no file here, and as a hub name it fails: {first_line(e)}") from e


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as f:
            text = f.read().decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"data file {str(path)!r} cannot be read: {e}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"data file {str(path)!r} is not UTF-8: byte {e.start} is {e.object[e.start]:#x}") from e
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as e:
            raise UserError(f"data file {str(path)!r} is not valid JSON: {e}") from e
        numbered = list(enumerate(rows, 1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except ValueError as e:
                    raise UserError(f"data file {str(path)!r}, line {number}: not valid JSON ({e})") from e
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"data file {str(path)!r}, line {number}: expected an object, got {type(row).__name__}")
    return [row for _, row in numbered]


def _row_format(columns: Iterable[str]) -> tuple[str, ...]:
    names = set(columns)
    for wanted in _FORMATS:
        if names.issuperset(wanted):
            return wanted
    near = max(_FORMATS, key=lambda wanted: len(names.intersection(wanted)))
    missing = [c for c in near if c not in names]
    raise UserError(
        f"data has the columns {sorted(names)}; missing {missing} for {'/'.join(near)} rows. Known formats: "
        + ", ".join("/".join(f) for f in _FORMATS)
    )


def content_id(row: Mapping[str, Any], columns: Sequence[str]) -> str:
    """16 hex digits that depend on what the row says and on nothing else."""
    said = {c: row.get(c) for c in columns if row.get(c) not in (None, "")}
    text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sample_ids(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """The user's `sample_id`, or a content hash; repeated content is numbered, repeated user ids are refused."""
    given = [row.get("sample_id") for row in rows]
    if any(g is not None for g in given):
        if any(g is None for g in given):
            raise UserError(f"row {given.index(None) + 1} has no sample_id while others have one; give all rows one")
        ids = [str(g) for g in given]
        repeated = [i for i, n in Counter(ids).items() if n > 1]
        if repeated:
            raise UserError(f"sample_id {repeated[0]!r} is used by {ids.count(repeated[0])} rows; it must be unique")
        return ids
    seen: Counter[str] = Counter()
    ids = []
    for row in rows:
        base = content_id(row, columns)
        ids.append(f"{base}-{seen[base]}" if seen[base] else base)
        seen[base] += 1
    return ids


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
            text = template.render(fields)
            ids = self._prompt_ids(text, template)
            while len(ids) > self.max_prompt_length and fields.get(cut):
                fields[cut] = self._cut_end(fields[cut], len(ids) - self.max_prompt_length)
                text = template.render(fields)
                ids = self._prompt_ids(text, template)
            if len(ids) <= self.max_prompt_length:
                return text, ids
        raise UserError(
            f"the prompt template alone is {len(ids)} tokens, above max_prompt_length {self.max_prompt_length}"
        )

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
                _encodable(m["content"], "messages")
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
    return [] if given is None or given in ("", []) else _references(given, "tests")


def first_label(labels: Sequence[int]) -> int:
    """Index of the first token with loss: the length of the prompt."""
    return next((i for i, x in enumerate(labels) if x != IGNORE_INDEX), len(labels))


def prepare_dataset(
    data: Dataset | Iterable[Mapping[str, Any]], tokenisation: Tokenisation, name: str = "data"
) -> PreparedData:
    """Tokenise rows. Unusable rows are listed in `rejected`, never silently dropped.

    Raises:
        UserError for missing columns, repeated ids, or when no row is usable.
    """
    if isinstance(data, Dataset) and data.features == TOKENISED_FEATURES and len(data):
        return PreparedData(data)
    if isinstance(data, Dataset) and data.features == _WITHOUT_TESTS and len(data):
        return PreparedData(data.add_column("tests", [[]] * len(data), feature=TOKENISED_FEATURES["tests"]))
    rows = data.to_list() if isinstance(data, Dataset) else list(data)
    if not rows:
        raise UserError(f"{name} is empty")
    columns = _row_format(set().union(*(row.keys() for row in rows)))
    known = (*columns, "input") if "instruction" in columns else columns
    samples: list[dict[str, Any]] = []
    rejected: list[tuple[str, str]] = []
    for number, (sample_id, row) in enumerate(zip(_sample_ids(rows, known), rows), 1):
        missing = [c for c in columns if row.get(c) is None]
        try:
            if missing:
                raise UserError(f"no value in {', '.join(missing)}")
            samples.append({"sample_id": sample_id, **tokenisation.sample(row, columns), "tests": _given_tests(row)})
        except UserError as e:
            rejected.append((f"row {number} ({sample_id})", str(e)))
    if not samples:
        raise UserError(f"{name}: none of {len(rows)} rows is usable; first: {rejected[0][0]}: {rejected[0][1]}")
    if rejected:
        logger.warning("%s: %d of %d rows rejected; first: %s: %s", name, len(rejected), len(rows), *rejected[0])
    return PreparedData(Dataset.from_list(samples, features=TOKENISED_FEATURES), rejected)


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
