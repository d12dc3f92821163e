"""Turns one row's columns into one tokenised sample."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .chat import ChatTemplate, check_chat_template_kwargs
from .conversations import ASSISTANT, USER, Conversation, conversation_of, tools_of, with_system
from .encoding import TextEncoder
from .templates import PromptTemplate, get_template

IGNORE_INDEX = -100
CHAT = "chat"
# No token has more characters. Text beyond this many characters for each token of the limit would be cut off anyway,
# and a tokenizer takes a minute for ten megabytes of text.
_LONGEST_TOKEN = 256
# What `Tokenisation` counts of a row that did not fit.
PROMPTS_CUT, RESPONSES_CUT, TURNS_DROPPED = "prompts_cut", "responses_cut", "turns_dropped"


class Tokenisation:
    """Tokenises prompts and responses for one tokenizer, template and length limit.

    Args:
        tokenizer: the student's, which is also the teacher's.
        template: "alpaca", "chat", or a text with `{instruction}` and optionally `{input}`.
        max_prompt_length: tokens, at least 1. A longer prompt loses the end of its input text, then of its instruction,
            but never the template's own text. A longer chat first loses its oldest exchanges, each from one question to
            the next, but never its system turn or its last question.
        max_response_length: tokens, at least 1, with the one that ends the response. A longer response is cut, and
            then nothing ends it.
        chat_template_kwargs: variables for the chat template, such as enable_thinking or date_string. `strftime_now` is
            the date that a template gets when it asks for today; default: 2025-01-01, on every day.
        parse_special_tokens: whether the text of a special token in the data is that token. Default: in
            prompt/completion rows, which may be rendered already, but not with template "chat", nor in other rows.
        encoder_decoder: the model reads the prompt with an encoder. Prompt and response are then texts of their own,
            with the special tokens that the tokenizer gives to each.

    Raises:
        UserError: a length is below 1, the tokenizer has no end-of-sequence token, the template or its variables cannot
            be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "alpaca",
        max_prompt_length: int = 512,
        max_response_length: int = 512,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special_tokens: bool | None = None,
        encoder_decoder: bool = False,
    ) -> None:
        if max_prompt_length < 1 or max_response_length < 1:
            raise UserError(
                f"max_prompt_length and max_response_length must be at least 1, got {max_prompt_length} "
                f"and {max_response_length}"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token; responses must end in one")
        if parse_special_tokens not in (True, False, None):
            raise UserError(f"parse_special_tokens must be true, false or null, got {parse_special_tokens!r}")
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self._chat_template_kwargs = check_chat_template_kwargs(chat_template_kwargs, tokenizer)
        self._all_chat = template == CHAT
        if self._all_chat:
            _ = self.chat
        self.template: PromptTemplate = get_template("alpaca" if self._all_chat else template)
        self.max_prompt_length = max_prompt_length
        self.max_response_length = max_response_length
        self._parse = parse_special_tokens
        self.encoder_decoder = encoder_decoder

    @cached_property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template."""
        return ChatTemplate(self.encoder, self._chat_template_kwargs)

    @cached_property
    def _ends(self) -> frozenset[str]:
        """Texts of the tokens that end an answer."""
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        return frozenset({str(self.tokenizer.eos_token), *(self.chat.ends if has_chat else ())})

    def is_chat(self, columns: Sequence[str]) -> bool:
        """Whether the chat template applies to rows with these columns."""
        return "messages" in columns or (self._all_chat and "labels" not in columns)

    def sample(
        self, row: Mapping[str, Any], columns: Sequence[str], cuts: Counter[str] | None = None
    ) -> dict[str, Any]:
        """Make one tokenised sample, without its id.

        Args:
            row: values by column.
            columns: those of its format.
            cuts: is told what was cut: prompts_cut, responses_cut, turns_dropped.

        Raises:
            UserError: the row cannot be used; the message is the reason.
        """
        counted: Counter[str] = Counter()
        if "labels" in columns:
            return self._tokenised(row)
        if self.is_chat(columns):
            conversation, references = self._conversation(row, columns)
            prompt, prompt_ids, answer = self._chat_prompt(conversation, counted)
            answer, ended = self.chat.ended(answer)
            said = self.encoder.plain(answer)
            # With a tool call the content is a part of what there is to score; thoughts may be gone from the rendering.
            if conversation.does_more_than_say or references[0].strip() not in said:
                references = [self.encoder.without_special(said).strip()]
        else:
            fields, references, template = self._fields(row, columns)
            parse = "prompt" in columns if self._parse is None else self._parse
            prompt, prompt_ids = self.prompt_ids(fields, template, parse, counted)
            answer, ended = self._up_to_end(self.encoder.guard(references[0], parse))
            if parse:
                references = [self._said(r) for r in references]
        if not prompt_ids:
            raise UserError("the prompt is empty: there is nothing to answer")
        response = self.response_ids(answer, ended, counted)
        if cuts is not None:
            cuts.update(counted)
        return {
            "prompt": prompt,
            "references": self._given_references(row) or references,
            "input_ids": prompt_ids + response,
            "labels": [IGNORE_INDEX] * len(prompt_ids) + response,
        }

    def response_ids(self, text: str, ended: bool = False, cuts: Counter[str] | None = None) -> list[int]:
        """Ids of a response within the limit.

        Args:
            text: guarded.
            ended: whether the text ends in a token that ends a response. Otherwise EOS does.
            cuts: is told if the response was cut; it then ends in its last token that has room.
        """
        most = self.max_response_length
        kept = text[: most * _LONGEST_TOKEN]
        begun = self.encoder.target_ids(kept) if self.encoder_decoder else self.encoder.continuation_ids(kept)
        ids = begun + ([] if ended else [self.tokenizer.eos_token_id])
        if cuts is not None and (len(ids) > most or kept != text):
            cuts[RESPONSES_CUT] += 1
        return ids[:most]

    def prompt_ids(
        self,
        fields: Mapping[str, Any],
        template: PromptTemplate | None = None,
        parse: bool = False,
        cuts: Counter[str] | None = None,
    ) -> tuple[str, list[int]]:
        """Render and tokenise a prompt of text within the limit.

        Args:
            fields: texts by name.
            template: default: that of the tokenisation.
            parse: whether special tokens in the fields are parsed.
            cuts: is told if the prompt was cut.

        Returns:
            The prompt and its ids.

        Raises:
            UserError: the template alone is too long.
        """
        template = template or self.template
        given = dict(fields)
        fields = {
            **fields,
            **{c: (fields.get(c) or "")[: self.max_prompt_length * _LONGEST_TOKEN] for c in template.cut_order},
        }

        def made() -> tuple[str, list[int]]:
            text = template.render(self.encoder.guard(fields, parse))
            return encodable(self.encoder.plain(text), "the prompt"), self._text_prompt_ids(text)

        for cut in template.cut_order:
            text, ids = made()
            while len(ids) > self.max_prompt_length and fields[cut]:
                fields[cut] = self._cut_end(fields[cut], len(ids) - self.max_prompt_length)
                text, ids = made()
            if len(ids) <= self.max_prompt_length:
                if cuts is not None and any(fields[c] != (given.get(c) or "") for c in template.cut_order):
                    cuts[PROMPTS_CUT] += 1
                return text, ids
        raise UserError(
            f"the prompt template alone is {len(ids)} tokens, above max_prompt_length {self.max_prompt_length}"
        )

    def _text_prompt_ids(self, text: str) -> list[int]:
        """Ids of a guarded prompt, with the tokenizer's special tokens but none twice; only an encoder's has an end."""
        ids, bos, eos = self.encoder.ids(text, special=True), self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.encoder_decoder:
            return ids[1:] if ids[:2] == [bos, bos] else ids
        if ids[:2] == [bos, bos]:  # rendered already
            return self.encoder.ids(text)
        # Some tokenizers end every text; between prompt and response that would end the sample.
        return ids[:-1] if ids[-1:] == [eos] and self.encoder.ids(text)[-1:] != [eos] else ids

    def _chat_prompt(self, conversation: Conversation, cuts: Counter[str]) -> tuple[str, list[int], str]:
        """The prompt of a conversation within the limit, its ids, and the answer as the template has it."""
        parse, most = bool(self._parse), self.max_prompt_length

        def made(c: Conversation) -> tuple[str, list[int], str]:
            prompt, answer = self.chat.split(c, parse)
            return self.encoder.plain(prompt), self._ids_up_to(prompt, most), answer

        found = made(conversation)
        if len(found[1]) <= most:
            return found
        exchanges = len(conversation.exchanges())
        dropped = bisect_left(range(exchanges), True, key=lambda n: len(made(conversation.without(n))[1]) <= most)
        shorter = conversation.without(min(dropped, exchanges - 1))
        question = shorter.turns[-1]["content"]
        text = question[: most * _LONGEST_TOKEN]
        prompt, ids, answer = made(shorter.asking(text))
        while len(ids) > most and text:
            text = self._cut_end(text, len(ids) - most)
            prompt, ids, answer = made(shorter.asking(text))
        if len(ids) > most:
            raise UserError(
                f"without its older turns and its question the chat is still longer than max_prompt_length {most}"
            )
        cuts[TURNS_DROPPED] += len(conversation.turns) - len(shorter.turns)
        cuts[PROMPTS_CUT] += text != question
        return prompt, ids, answer

    def _ids_up_to(self, text: str, most: int) -> list[int]:
        """Ids of a guarded text, or of so much of it that there are more than `most`."""
        return self.encoder.ids(text[: (most + 1) * _LONGEST_TOKEN])

    def _cut_end(self, text: str, excess: int) -> str:
        ids = self.encoder.ids(self.encoder.guard(text))
        shorter = str(self.tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=True)).rstrip("�")
        return shorter if len(shorter) < len(text) else text[: len(text) - excess]

    def _up_to_end(self, text: str) -> tuple[str, bool]:
        """A guarded text up to the token that ends an answer, if it ends in one, and whether it does."""
        for end, mark in self.encoder.trailing(text):
            if mark in self._ends:
                return text[:end], True
        return text, False

    def _without_end(self, text: str) -> str:
        """A text of the data without a token at its end that ends an answer."""
        whole, ended = self._up_to_end(text)
        return whole.removesuffix(next(t for t in self.encoder.added if whole.endswith(t))) if ended else text

    def _said(self, text: str) -> str:
        """A text of the data as a generation of it is read."""
        return self.encoder.without_special(self._without_end(text))

    def _conversation(self, row: Mapping[str, Any], columns: Sequence[str]) -> tuple[Conversation, list[str]]:
        """The conversation of a row of any format, and its references."""
        if "messages" in columns:
            conversation = conversation_of(row)
            references = [conversation.answer["content"]]
        else:
            fields, references, _ = self._fields(row, columns)
            text = fields["instruction"] + (f"\n\n{fields['input']}" if fields.get("input") else "")
            if not text:
                raise UserError("the prompt is empty: there is nothing to answer")
            turns = with_system([{"role": USER, "content": text}], row)
            conversation = Conversation(tuple(turns), {"role": ASSISTANT, "content": references[0]}, tools_of(row))
        if not self._parse:
            return conversation, references
        answer = {**conversation.answer, "content": self._without_end(conversation.answer["content"])}
        return replace(conversation, answer=answer), [self._said(r) for r in references]

    def _fields(
        self, row: Mapping[str, Any], columns: Sequence[str]
    ) -> tuple[dict[str, str], list[str], PromptTemplate]:
        if "prompt" in columns:
            fields = {"instruction": _text(row, "prompt")}
            return fields, _references(row["completion"], "completion"), get_template("{instruction}")
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
        # The student answers the first turn, whose prompt ends at the first label, so that turn alone is its reference.
        response = labels[start : next((i for i in range(start, len(ids)) if labels[i] == IGNORE_INDEX), len(ids))]
        if self.tokenizer.convert_ids_to_tokens(response[-1]) in self._ends:
            response = response[:-1]
        references = [str(self.tokenizer.decode(response, skip_special_tokens=True))]
        references = self._given_references(row) or references
        prompt = str(self.tokenizer.decode(ids[:start])) if row.get("prompt") is None else _text(row, "prompt")
        return {"prompt": prompt, "references": references, "input_ids": ids, "labels": labels}

    def _given_references(self, row: Mapping[str, Any]) -> list[str] | None:
        """The texts in the column `references`, or None without one."""
        given = row.get("references")
        if given is not None and not isinstance(given, list):
            raise UserError(f"references must be a list of texts, got {type(given).__name__}")
        return _references(given, "references") if given else None


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


def given_tests(row: Mapping[str, Any]) -> list[str]:
    """The tests in the column `tests`; none without one."""
    given = row.get("tests")
    return [] if given is None or (isinstance(given, (str, list)) and not given) else _references(given, "tests")


def first_label(labels: Sequence[int]) -> int:
    """Index of the first token with loss, which is the length of the prompt."""
    return next((i for i, x in enumerate(labels) if x != IGNORE_INDEX), len(labels))
