"""Make tokenised samples of rows."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .chat import ChatTemplate, check_chat_template_kwargs
from .columns import IGNORE_INDEX, PRIVILEGED_IDS
from .conversations import (
    ALL,
    ASSISTANT,
    LAST,
    USER,
    Conversation,
    Turn,
    check_train_on,
    conversation_of,
    one_exchange,
    tools_of,
    with_system,
)
from .drafts import AS_IT_IS, Draft
from .encoding import TextEncoder
from .formats import TEXT
from .privileged import PrivilegedTemplate
from .prompts import LONGEST_TOKEN, RESPONSES_CUT, Prompts
from .templates import PromptTemplate, get_template, parted
from .tokenised_rows import given_privileged_ids, tokenised_sample
from .values import encodable, given_references, text_of, texts_of

T = TypeVar("T")
CHAT = "chat"


def _or_error(make: Callable[..., T], *args: Any) -> T | UserError:
    try:
        return make(*args)
    except UserError as e:
        return e


class Tokenisation:
    """Tokenises prompts and responses for one tokenizer, template and length limit.

    Args:
        tokenizer: the student's, which is also the teacher's.
        template: "alpaca", "chat", or a text with `{instruction}` and optionally `{input}`.
        max_prompt_length: the most tokens of a prompt, at least 1. A longer prompt loses the end of its input text,
            then of its instruction, but never the template's own text. A longer chat loses its oldest exchanges (a
            question up to the next one), but never its system turn or its last question.
        max_response_length: the most tokens of a response, at least 1, including its end token. A longer response is
            cut and has no end token.
        chat_template_kwargs: variables for the chat template, such as enable_thinking or date_string. `strftime_now` is
            the date that a template gets when it asks for today's date. Default: always 2025-01-01.
        parse_special_tokens: whether the text of a special token in the data becomes that token. Default: only in
            prompt/completion rows, which may be rendered already, and not with template "chat".
        encoder_decoder: whether the model reads the prompt with an encoder. Prompt and response are then encoded
            separately, each with the tokenizer's special tokens.
        train_on: which of the assistant's turns of a conversation have loss: "last", or "all". With "all", the first
            one is answered and scored, and everything after its question has at most max_response_length tokens.
        privileged_template: what the teacher reads, see `PrivilegedTemplate`; samples then have its prompt too.
            Default: the teacher reads the same as the student.
        max_privileged_length: the most tokens of the teacher's prompt, at least 1. A row with a longer one is rejected.

    Raises:
        UserError: a length is below 1, the tokenizer has no end-of-sequence token, a template or its variables cannot
            be used, or all turns are to be trained on with an encoder-decoder model.
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
        train_on: str = LAST,
        privileged_template: str | None = None,
        max_privileged_length: int = 2048,
    ) -> None:
        if min(max_prompt_length, max_response_length, max_privileged_length) < 1:
            raise UserError(
                "max_prompt_length, max_response_length and max_privileged_length must be at least 1, got "
                f"{max_prompt_length}, {max_response_length} and {max_privileged_length}"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token; responses must end in one")
        if parse_special_tokens not in (True, False, None):
            raise UserError(f"parse_special_tokens must be true, false or null, got {parse_special_tokens!r}")
        check_train_on(train_on, encoder_decoder)
        self._all_turns = train_on == ALL
        self.tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        self.encoder = TextEncoder(tokenizer)
        self._chat_template_kwargs = check_chat_template_kwargs(chat_template_kwargs, tokenizer)
        self._name, self._all_chat = template, template == CHAT
        if self._all_chat:
            _ = self.chat
        self.template: PromptTemplate = get_template("alpaca" if self._all_chat else template)
        self.prompts = Prompts(self.encoder, max_prompt_length, encoder_decoder)
        self.privileged = None if privileged_template is None else PrivilegedTemplate(privileged_template)
        self._teachers = Prompts(self.encoder, max_privileged_length, encoder_decoder)
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
        return frozenset({str(self.tokenizer.eos_token), *(self.chat.ends if self.is_chat(["messages"]) else ())})

    def is_chat(self, columns: Sequence[str]) -> bool:
        """Whether the chat template applies to rows with these columns."""
        has_chat = bool(getattr(self.tokenizer, "chat_template", None))
        return has_chat if "messages" in columns else self._all_chat and not {"labels", TEXT} & set(columns)

    def without_privileged(self) -> "Tokenisation":
        """The same tokenisation without a prompt of the teacher's own."""
        found = copy.copy(self)
        found.privileged = None
        return found

    def lacks_privileged(self, row: Mapping[str, Any], columns: Sequence[str]) -> bool:
        """Whether a row lacks the text for the teacher that the template needs."""
        if self.privileged is None:
            return False
        return row.get(PRIVILEGED_IDS) is None if "labels" in columns else self.privileged.lacks(row)

    def sample(
        self, row: Mapping[str, Any], columns: Sequence[str], cuts: Counter[str] | None = None
    ) -> dict[str, Any]:
        """Make one tokenised sample, without its id.

        Args:
            row: values by column.
            columns: the columns of its standard format.
            cuts: counts what was cut: prompts_cut, responses_cut, turns_dropped.

        Raises:
            UserError: the row cannot be used; the message is the reason.
        """
        (made,) = self.samples([(row, columns)], cuts)
        if isinstance(made, UserError):
            raise made
        return made

    def samples(
        self, rows: Iterable[tuple[Mapping[str, Any], Sequence[str]]], cuts: Counter[str] | None = None
    ) -> list[dict[str, Any] | UserError]:
        """Make tokenised samples, without their ids. Those that fit the limits are tokenised together.

        Args:
            rows: each with the columns of its standard format.
            cuts: counts what was cut.

        Returns:
            For each row its sample, or the reason why it has none.
        """
        drafts = [_or_error(self._draft, row, columns) for row, columns in rows]
        rendered = [d for d in drafts if isinstance(d, Draft)]
        prompts = iter(self.prompts.ids_of_all([(d.prompt, d.chat is not None) for d in rendered]))
        answers = iter(self._answers_together([d.answer for d in rendered]))
        privileged = iter(self._privileged_ids(rendered))
        made: list[dict[str, Any] | UserError] = []
        for draft in drafts:
            if isinstance(draft, Draft):
                ids = next(prompts), next(answers), next(privileged)
                made.append(_or_error(self._finish, draft, *ids, cuts))
            else:
                made.append(draft)
        return made

    def _privileged_ids(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Ids of the teacher's prompts."""
        if self.privileged is None:
            return [[] for _ in drafts]
        return self._teachers.ids_of_all([(d.privileged, d.chat is not None) for d in drafts])

    def _with_privileged(self, sample: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        if self.privileged is None:
            return sample
        if len(ids) > self._teachers.most:
            raise UserError(
                f"the prompt of the teacher is longer than max_privileged_length {self._teachers.most}; raise that, or "
                "shorten the privileged text"
            )
        return {**sample, PRIVILEGED_IDS: ids}

    def _answers_together(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of answers. A very long answer is cut first: only its beginning has room."""
        kept = [text[: self.max_response_length * LONGEST_TOKEN] for text in answers]
        return (self.encoder.target_ids_of_all if self.encoder_decoder else self.encoder.continuation_ids_of_all)(kept)

    def _draft(self, row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any] | Draft:
        """Render a row. A row that is tokenised already becomes its sample."""
        if "labels" in columns:
            made = tokenised_sample(row, self.tokenizer, self._ends, self.max_prompt_length + self.max_response_length)
            ids = [] if self.privileged is None else given_privileged_ids(row, self.tokenizer)
            return self._with_privileged(made, ids)
        if self.is_chat(columns):
            conversation, references = self._conversation(row, columns)
            later: tuple[Turn, ...] = ()
            if self._all_turns:
                conversation, later = conversation.up_to_first_answer()
                references = [conversation.answer["content"]] if later else references
            prompt, answer = self.chat.split(conversation, bool(self._parse))
            theirs = ""
            if self.privileged is not None:
                more = self.privileged.conversation(conversation, row, references[0])
                theirs, _ = self.chat.split(more, bool(self._parse))
            draft = self._of_chat(row, conversation, references, prompt, answer)
            return replace(draft, later=later, privileged=theirs)
        fields, references, template = self._fields(row, columns)
        by_row = not {"prompt", TEXT}.isdisjoint(columns)
        parse = by_row if self._parse is None else self._parse
        prompt = template.render(self.encoder.guard(self.prompts.bounded(fields, template), parse))
        encodable(self.encoder.plain(prompt), "the prompt")
        answer, ended = self._up_to_end(self.encoder.guard(references[0], parse))
        if parse:
            references = [self._said(r) for r in references]
        theirs = ""
        if self.privileged is not None:
            seen = self.privileged.fields(fields, row, references[0])
            theirs = template.render(self.encoder.guard(seen, parse))
            encodable(self.encoder.plain(theirs), "the prompt of the teacher")
        return Draft(
            row, prompt, answer, ended, references, fields=fields, template=template, parse=parse, privileged=theirs
        )

    def _of_chat(
        self, row: Mapping[str, Any], conversation: Conversation, references: list[str], prompt: str, answer: str
    ) -> Draft:
        answer, ended = self.chat.ended(answer)
        text, said = self.encoder.plain(answer), references
        # With a tool call, the content is only a part of the answer; and the rendering may leave out thoughts.
        if conversation.does_more_than_say or references[0].strip() not in text:
            references = [self.encoder.without_special(text).strip()]
        return Draft(row, prompt, answer, ended, references, chat=conversation, said=said)

    def _finish(
        self,
        draft: Draft,
        prompt_ids: list[int],
        begun: list[int],
        privileged_ids: list[int],
        cuts: Counter[str] | None,
    ) -> dict[str, Any]:
        """Make the sample of a draft whose texts are tokenised. Only a prompt that is too long is rendered again."""
        counted: Counter[str] = Counter()
        too_long = len(prompt_ids) > self.max_prompt_length
        if draft.chat is not None and too_long:
            chat, prompt, prompt_ids, answer = self.prompts.shorter_chat(
                self.chat, draft.chat, bool(self._parse), counted
            )
            draft = replace(self._of_chat(draft.row, chat, draft.said, prompt, answer), later=draft.later)
            (begun,) = self._answers_together([draft.answer])
        prompt = self.encoder.plain(draft.prompt)
        if draft.chat is None and (too_long or self.prompts.is_cut(draft.fields)):
            prompt, prompt_ids = self.prompts.fitted(draft.fields, draft.template, draft.parse, counted)
        if not prompt_ids:
            raise UserError("the prompt is empty: there is nothing to answer")
        if draft.chat is not None and draft.later:
            response, labels = self._all_answers(draft, draft.chat, begun, counted)
        else:
            labels = response = self._up_to_limit(draft.answer, begun, draft.ended, counted)
        sample = {
            "prompt": prompt,
            "references": given_references(draft.row) or draft.references,
            "input_ids": prompt_ids + response,
            "labels": [IGNORE_INDEX] * len(prompt_ids) + labels,
        }
        sample = self._with_privileged(sample, privileged_ids)
        if cuts is not None:
            cuts.update(counted)
        return sample

    def _all_answers(
        self, draft: Draft, chat: Conversation, begun: list[int], cuts: Counter[str]
    ) -> tuple[list[int], list[int]]:
        """Ids and labels of everything after the first question of a conversation, within the limit."""
        ids, labels = list(begun), list(begun)
        pieces, ended = self.chat.behind(chat, draft.later, draft.prompt + draft.answer, bool(self._parse))
        for text, is_answer in pieces:
            some = self.encoder.continuation_ids(text)
            ids += some
            labels += some if is_answer else [IGNORE_INDEX] * len(some)
        end = [] if ended else [self._eos]
        most = self.max_response_length
        if len(ids) + len(end) > most:
            cuts[RESPONSES_CUT] += 1
        return [*ids, *end][:most], [*labels, *end][:most]

    def response_ids(self, text: str, ended: bool = False, cuts: Counter[str] | None = None) -> list[int]:
        """Ids of a response within the limit.

        Args:
            text: a guarded text.
            ended: whether the text ends in a token that ends a response. If not, EOS is added.
            cuts: counts the response if it was cut; it then ends in the last token that fits.
        """
        (begun,) = self._answers_together([text])
        return self._up_to_limit(text, begun, ended, cuts)

    def _up_to_limit(self, text: str, begun: list[int], ended: bool, cuts: Counter[str] | None) -> list[int]:
        most = self.max_response_length
        ids = begun + ([] if ended else [self._eos])
        if cuts is not None and (len(ids) > most or len(text) > most * LONGEST_TOKEN):
            cuts[RESPONSES_CUT] += 1
        return ids[:most]

    def prompt_ids(
        self,
        fields: Mapping[str, Any],
        template: PromptTemplate | None = None,
        parse: bool = False,
        cuts: Counter[str] | None = None,
    ) -> tuple[str, list[int]]:
        """Render and tokenise a prompt from a template of text, cut to the limit.

        Args:
            fields: texts by name.
            template: the prompt's template. Default: that of the tokenisation.
            parse: whether special tokens in the fields are parsed.
            cuts: counts the prompt if it was cut.

        Returns:
            The prompt and its ids.

        Raises:
            UserError: the template alone is too long.
        """
        return self.prompts.fitted(fields, template or self.template, parse, cuts)

    def _up_to_end(self, text: str) -> tuple[str, bool]:
        """A guarded text without anything after its end token, and whether it has one."""
        for end, mark in self.encoder.trailing(text):
            if mark in self._ends:
                return text[:end], True
        return text, False

    def _without_end(self, text: str) -> str:
        """A text of the data without its end token, if it has one."""
        whole, ended = self._up_to_end(text)
        return whole.removesuffix(next(t for t in self.encoder.added if whole.endswith(t))) if ended else text

    def _said(self, text: str) -> str:
        """A text of the data in the form in which a generated answer is read."""
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
            return {"instruction": text_of(row, "prompt")}, texts_of(row["completion"], "completion"), AS_IT_IS
        if TEXT in columns:
            ends_in = self.chat.ends_in if self._all_chat else self.template.ends_in
            prompt, answer = parted(text_of(row, TEXT), ends_in, self._name)
            return {"instruction": prompt}, [answer], AS_IT_IS
        if "messages" in columns:
            return *one_exchange(row), self.template
        given = row.get("input")
        fields = {"instruction": text_of(row, "instruction"), "input": "" if given is None else text_of(row, "input")}
        return fields, texts_of(row["output"], "output"), self.template
