"""A tokenizer's chat template: where its prompts end, and where its answers begin and end.

The prompt is the rendering of the turns before an answer, with the generation prompt. The answer is the rest of the
rendering of the whole conversation. So it has everything that the template makes of a turn: stripped text, an empty
think block, a tool call, the end of the turn.
"""

import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time
from functools import cache, cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserError, first_line
from .conversations import ASSISTANT, USER, Conversation
from .encoding import TextEncoder
from .files import shown

logger = logging.getLogger(__name__)

# The date that `strftime_now` gives to a template. With today's date, tomorrow's prompts would differ from those that
# were reflected on, cached and trained on. It must never change.
FIXED_DATE = date(2025, 1, 1)
_DATE = "strftime_now"
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuV"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_chat_template_kwargs(kwargs: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Check variables for a chat template.

    Args:
        kwargs: names to values that JSON can hold, or None.
        tokenizer: names of its own arguments are refused.

    Returns:
        The variables, with dates as text.

    Raises:
        UserError: they are not names with such values.
    """
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(k, str) for k in kwargs):
        raise UserError(f"chat_template_kwargs must be names with values, got {shown(repr(kwargs))}")
    taken = {*inspect.signature((tokenizer or PreTrainedTokenizerBase).apply_chat_template).parameters, "messages"}
    wrong = sorted((taken - {"documents"}) & set(kwargs))
    if wrong:
        raise UserError(f"chat_template_kwargs has {wrong[0]!r}, which the rows or the library itself decide")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(kwargs), default=_day))
    except (TypeError, ValueError) as e:
        raise UserError(f"chat_template_kwargs must hold what JSON can: {first_line(e)}") from None
    given = plain.get(_DATE)
    if given is not None:
        try:
            date.fromisoformat(str(given))
        except ValueError:
            raise UserError(f"chat_template_kwargs.{_DATE} must be a date such as 2025-01-31, got {given!r}") from None
    return plain


def template_key(template: str, kwargs: Mapping[str, Any] | None) -> str:
    """The text by which a teacher cache knows the template of its samples."""
    return template if not kwargs else f"{template} {json.dumps(dict(kwargs), sort_keys=True)}"


def _day(value: Any) -> str:
    if isinstance(value, date):  # YAML makes one of 2025-01-31
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not")


@cache
def _tell_date() -> None:
    logger.info(
        "the chat template asks for today's date and always gets %s, so that prompts stay the same; "
        "chat_template_kwargs {%s: 2025-12-31} sets another", FIXED_DATE, _DATE,
    )  # fmt: skip


def _alike(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class ChatTemplate:
    """The chat template of a tokenizer with its variables.

    Args:
        encoder: the tokenizer's encoder.
        kwargs: variables such as enable_thinking or date_string. `strftime_now`, a date, is given to a template that
            asks for today's date.

    Raises:
        UserError: the tokenizer has no chat template, or a variable is not allowed.
    """

    def __init__(self, encoder: TextEncoder, kwargs: Mapping[str, Any] | None = None) -> None:
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError("template 'chat' needs a tokenizer with a chat template; this one has none, use 'alpaca'")
        self._kwargs = check_chat_template_kwargs(kwargs, self.tokenizer)
        given = self._kwargs.pop(_DATE, None)
        self._today = datetime.combine(FIXED_DATE if given is None else date.fromisoformat(str(given)), time())
        self._told = self._told_tools = False
        self._known: dict[str, tuple[str, bool]] = {}
        self._tells_date = given is None and "date_string" not in self._kwargs

    def split(self, conversation: Conversation, parse: bool = False) -> tuple[str, str]:
        """Render a conversation.

        Args:
            conversation: the conversation, with its answer.
            parse: whether special tokens in its texts are parsed.

        Returns:
            The prompt and the answer, as guarded texts. The answer ends where the template ends the turn.

        Raises:
            UserError: the template refuses the turns, or its two renderings do not agree.
        """
        others = self.ends if not parse else ()
        turns = self.encoder.guard(list(conversation.turns), parse, others)
        answer = self.encoder.guard(conversation.answer, parse, others)
        tools = self.encoder.guard(conversation.tools, parse, others)
        prompt, _ = self._render(turns, tools, add_generation_prompt=True)
        whole, marked = self._render([*turns, answer], tools)
        self._check_shown([*turns, answer], tools, whole)
        if not whole.startswith(prompt):
            prompt = self._beginning(turns, answer, tools, prompt, whole)
        start = len(prompt)
        if marked is not None:
            if not marked or marked[-1][1] <= start:
                raise UserError("the chat template's {% generation %} marks leave the answer out")
            start = max(start, marked[-1][0])
        return whole[:start], whole[start:]

    def behind(
        self, conversation: Conversation, later: Sequence[dict[str, Any]], before: str, parse: bool = False
    ) -> tuple[list[tuple[str, bool]], bool]:
        """Render the turns after the first answer of a conversation.

        Args:
            conversation: the conversation up to that answer.
            later: the turns after it. The last one is an answer.
            before: the rendering up to the end of the first answer.
            parse: whether special tokens in the texts are parsed.

        Returns:
            Guarded pieces that continue `before`, each with whether it is an answer; and whether the last piece ends in
            the token that ends an answer.

        Raises:
            UserError: the template refuses the turns, or renders an answer differently once other turns follow.
        """
        turns = (*conversation.turns, conversation.answer, *later)
        answers = [i for i in range(len(turns) - len(later), len(turns)) if turns[i]["role"] == ASSISTANT]
        splits = [self.split(replace(conversation, turns=turns[:i], answer=turns[i]), parse) for i in answers]
        whole, ended = "".join(splits[-1]), False
        pieces: list[tuple[str, bool]] = []
        for number, (prompt, said) in zip([None, *answers], [(before, ""), *splits]):
            said, ended = self.ended(said) if said else ("", False)
            if not whole.startswith(prompt + said) or not prompt.startswith(before):
                turn = f"turn {number + 1}" if number else "the first answer"
                raise UserError(
                    f"the chat template writes {turn} differently once others follow; train_on 'last' trains only on "
                    "the last answer"
                )
            if number:
                pieces += [(prompt[len(before) :], False), (said, True)]
            before = prompt + said
        return pieces, ended

    def _check_shown(self, turns: list[dict[str, Any]], tools: Any, whole: str) -> None:
        """Refuse a rendering that leaves out tool calls or results of tools: what remains would be wrong."""
        for number, turn in enumerate(turns):
            lost = [{**turn, "tool_calls": []}] if turn.get("tool_calls") else []
            lost += [{**turn, "content": ""}] if turn.get("role") == "tool" and turn.get("content") else []
            for without in lost:
                try:
                    same = self._render([*turns[:number], without, *turns[number + 1 :]], tools)[0] == whole
                except UserError:
                    continue
                if same:
                    what = "the result of a tool" if turn["role"] == "tool" else "the tool_calls of a turn"
                    raise UserError(
                        f"the chat template leaves out {what}; take a tokenizer whose template has it, or render the "
                        "rows yourself as prompt/completion"
                    )
        if tools and not self._told_tools:
            self._told_tools = True
            if self._render(turns, None)[0] == whole:
                logger.warning("the chat template leaves out tools: no prompt says which there are")

    def _beginning(
        self, turns: list[dict[str, Any]], answer: dict[str, Any], tools: Any, prompt: str, whole: str
    ) -> str:
        """Find where answers begin if the template's generation prompt differs from the beginning of a finished turn.

        Raises:
            UserError: the generation prompt has text that finished answers lack, or the answer changes earlier turns.
        """
        of_turn = {k: v for k, v in answer.items() if k in ("role", "name")}
        others = [self._render([*turns, {**of_turn, "content": x}], tools)[0] for x in ("b", "c")]
        begins = others[0][: _alike(*others)]
        before, _ = self._render(turns, tools)
        opened = prompt.removeprefix(begins).strip() if prompt.startswith(begins) else ""
        if opened or not all(text.startswith(before) for text in (prompt, begins)) or not whole.startswith(begins):
            same = max(0, _alike(whole, prompt) - 20)
            raise UserError(
                f"the chat template does not say where the answer begins: the prompt ends in '{shown(prompt[same:])}', "
                f"and with the answer it goes '{shown(whole[same:])}'; chat_template_kwargs (such as enable_thinking) "
                "may help, or render the rows yourself as prompt/completion"
            )
        if not self._told:
            logger.warning(
                "the chat template's generation prompt ends in '%s', but finished answers follow '%s': prompts "
                "end in the latter", shown(prompt[-30:]), shown(begins[-30:]),
            )  # fmt: skip
            self._told = True
        return begins

    def _render(
        self, turns: list[dict[str, Any]], tools: Any, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """A rendering, and where its {% generation %} marks begin and end; None for a template without."""
        turns = [self._content_as_wanted(t) for t in turns]
        try:
            template, has_marks = self._dated(self.tokenizer.get_chat_template(tools=tools))
            if not has_marks:
                text = self.tokenizer.apply_chat_template(
                    turns, tools=tools, chat_template=template, tokenize=False,
                    add_generation_prompt=add_generation_prompt, **self._kwargs,
                )  # fmt: skip
                return str(text), None
            rendered: Any = render_jinja_template(
                [turns], tools=tools, chat_template=template, return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt, **{**self.tokenizer.special_tokens_map, **self._kwargs},
            )  # fmt: skip
            (text,), (marked,) = rendered
            return text, marked
        except Exception as e:  # a chat template is a program, and may raise any error
            raise UserError(f"the chat template fails: {shown(first_line(e), 200)}") from e

    def _dated(self, template: str) -> tuple[str, bool]:
        """The template with its own `strftime_now`, see `_with_date`, and whether it has {% generation %} marks."""
        if template not in self._known:
            self._known[template] = self._with_date(template), bool(_MARKED.search(template))
        return self._known[template]

    def _with_date(self, template: str) -> str:
        """The template with its own `strftime_now` for the fixed date. A function cannot be passed as a variable."""
        if _DATE not in template:
            return template
        if self._tells_date:
            _tell_date()
        written = {x: self._today.strftime(f"%{x}") for x in _DIRECTIVES}
        short = {f"-{x}": text.lstrip("0") or "0" for x, text in written.items()}
        chain = "".join(f" | replace('%{x}', {text!r})" for x, text in (short | written).items())
        return f"{{%- macro {_DATE}(format) -%}}{{{{ format{chain} }}}}{{%- endmacro %}}\n{template}"

    def _content_as_wanted(self, turn: dict[str, Any]) -> dict[str, Any]:
        if self._wants_parts and isinstance(turn.get("content"), str):
            return {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        return turn

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template prints a content only if it is a list of parts, not if it is text."""
        shapes: tuple[Any, ...] = ("srdprobe", [{"type": "text", "text": "srdprobe"}])
        printed = []
        for content in shapes:
            try:
                text = self.tokenizer.apply_chat_template(
                    [{"role": USER, "content": content}], tokenize=False, **self._kwargs
                )
            except Exception:  # as for rows
                text = ""
            printed.append("srdprobe" in str(text))
        return printed == [False, True]

    @cached_property
    def tail(self) -> str:
        """The text that the template writes after an answer; empty if it refuses the simplest conversation."""
        question = {"role": USER, "content": "a"}
        try:
            texts = [self._render([question, {"role": ASSISTANT, "content": x}], None)[0] for x in ("b", "c")]
        except UserError:
            return ""
        same = _alike(*(text[::-1] for text in texts))
        return texts[0][len(texts[0]) - same :]

    @cached_property
    def ends_in(self) -> str:
        """The text that the template writes between question and answer; empty if it refuses a simple conversation."""
        question = [{"role": USER, "content": "a"}]
        try:
            asked, _ = self._render(question, None)
            prompt, _ = self._render(question, None, add_generation_prompt=True)
        except UserError:
            return ""
        return prompt.removeprefix(asked) if prompt.startswith(asked) else ""

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens that end an answer, as texts."""
        return tuple(mark for _, mark in self.encoder.trailing(self.tail))

    def ended(self, answer: str) -> tuple[str, bool]:
        """Cut an answer after the token that ends it, where generation stops.

        Args:
            answer: a guarded text.

        Returns:
            The answer, and whether it ends in such a token. If not, white space that the template adds is removed.
        """
        found = self.encoder.trailing(answer)
        known = [end for end, mark in found if mark in self.ends]
        # An answer may end in another token, such as the end of a tool call. Breaks hide such tokens in the data.
        other = [end for end, mark in found if mark in self.encoder.special][-1:] if self.ends else []
        for end in (*known, *other):
            return answer[:end], True
        return answer.removesuffix(self.tail[len(self.tail.rstrip()) :]), False
