"""Turns one row's columns into one tokenised sample."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError, first_line
from .sources import shown
from .templates import PromptTemplate, get_template

IGNORE_INDEX = -100
# No token has more characters. Text beyond this many characters for each token of the limit would be cut off anyway,
# and a tokenizer takes a minute for ten megabytes of text.
_LONGEST_TOKEN = 256


class Tokenisation:
    """Tokenises prompts and responses for one tokenizer, template and length limit.

    Args:
        tokenizer: the student's, which is also the teacher's.
        template: "alpaca", "chat", or a text with `{instruction}` and optionally `{input}`.
        max_prompt_length: tokens, at least 1. A longer prompt loses the end of its input text, then of its instruction,
            but never the template's own text.
        max_response_length: tokens, at least 1, with the end-of-sequence token, which is always there.
        encoder_decoder: the model reads the prompt with an encoder. Prompt and response are then texts of their own,
            with the special tokens that the tokenizer gives to each.

    Raises:
        UserError: a length is below 1, the tokenizer has no end-of-sequence token, or the template cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "alpaca",
        max_prompt_length: int = 512,
        max_response_length: int = 512,
        encoder_decoder: bool = False,
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
        self.encoder_decoder = encoder_decoder
        self._marker = [] if encoder_decoder else self._prefix_space_marker()
        self._opening = self._target_opening() if encoder_decoder else []

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def _prefix_space_marker(self) -> list[int]:
        """The ids of a newline if this tokenizer puts a space before every text (SentencePiece), else none.

        Such a tokenizer would turn the response "a" into " a"; after a newline it does not.
        """
        newline, alone, behind = self._ids("\n"), self._ids("a"), self._ids("\na")
        shift = behind[: len(newline)] == newline and behind[len(newline) :] != alone
        return newline if shift else []

    def _target_ids(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text that a decoder writes: some tokenizers treat it unlike one that the encoder reads."""
        return list(self.tokenizer(text_target=text, add_special_tokens=special).input_ids)

    def _target_opening(self) -> list[int]:
        """The ids that the tokenizer puts before a target: BART's <s>, a code of the language."""
        plain, whole = self._target_ids("a"), self._target_ids("a", special=True)
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[: next(starts, 0)]

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response, cut to the limit, with EOS at the end."""
        text = text[: self.max_response_length * _LONGEST_TOKEN]
        if self.encoder_decoder:
            ids = [*self._opening, *self._target_ids(text)]
        elif self._marker and self._ids("\n" + text)[: len(self._marker)] == self._marker:
            ids = self._ids("\n" + text)[len(self._marker) :]
        else:
            ids = self._ids(text)
        return [*ids[: self.max_response_length - 1], self.tokenizer.eos_token_id]

    def prompt_ids(self, fields: Mapping[str, Any], template: PromptTemplate | None = None) -> tuple[str, list[int]]:
        """Render and tokenise a prompt within the limit.

        Raises:
            UserError: the template alone is too long.
        """
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
            return encodable(template.render(fields), "the prompt")
        except UserError:
            raise
        except Exception as e:  # a chat template is a program of its own, and refuses turns with any error
            raise UserError(f"the chat template fails: {shown(first_line(e), 200)}") from e

    def _prompt_ids(self, text: str, template: PromptTemplate) -> list[int]:
        ids = self._ids(text, special=template.adds_special_tokens)
        if self.encoder_decoder:
            return ids
        # Some tokenizers end every text; between prompt and response that would end the sample.
        ended = ids[-1:] == [self.tokenizer.eos_token_id] and template.adds_special_tokens
        return ids[:-1] if ended and self._ids(text)[-1:] != ids[-1:] else ids

    def _cut_end(self, text: str, excess: int) -> str:
        ids = self._ids(text)
        shorter = str(self.tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=True)).rstrip("�")
        return shorter if len(shorter) < len(text) else text[: len(text) - excess]

    def sample(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
        """Make one tokenised sample, without its id.

        Raises:
            UserError: the row cannot be used; the message is the reason.
        """
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
                encodable(m["role"] + m["content"], "messages")
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
    return encodable(value, column)


def encodable(text: str, column: str) -> str:
    """Return the text if it is Unicode that can be written. JSON may carry half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{column} holds half of a surrogate pair at character {e.start}") from None
    return text


def _references(value: Any, column: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) for v in values):
        raise UserError(f"{column} must be text or a list of texts, got {type(value).__name__}")
    return [encodable(v, column) for v in values]


def _given_references(row: Mapping[str, Any]) -> list[str] | None:
    """The texts in the column `references`, or None without one."""
    given = row.get("references")
    if given is not None and not isinstance(given, list):
        raise UserError(f"references must be a list of texts, got {type(given).__name__}")
    return _references(given, "references") if given else None


def given_tests(row: Mapping[str, Any]) -> list[str]:
    """The tests in the column `tests`; none without one."""
    given = row.get("tests")
    return [] if given is None or (isinstance(given, (str, list)) and not given) else _references(given, "tests")


def first_label(labels: Sequence[int]) -> int:
    """Index of the first token with loss, which is the length of the prompt."""
    return next((i for i, x in enumerate(labels) if x != IGNORE_INDEX), len(labels))
