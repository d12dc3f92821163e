"""Conversations from rows: turns, tools and a system text, in the form that chat templates take."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from ..suggest import unknown_name
from .files import shown

Turn = dict[str, Any]

_SHAPE = "messages must be a list of {'role': text, 'content': text}"
ASSISTANT, SYSTEM, USER = "assistant", "system", "user"
# Which of the assistant's turns have loss.
LAST, ALL = TRAIN_ON = ("last", "all")


@dataclass(frozen=True)
class Conversation:
    """The turns before an answer, and the answer.

    Args:
        turns: the turns before the answer, at least one.
        answer: the assistant's turn.
        tools: schemas of the functions that the assistant may call, or None.
    """

    turns: tuple[Turn, ...]
    answer: Turn
    tools: list[Any] | None = None

    @property
    def does_more_than_say(self) -> bool:
        """Whether the answer has more than its content, such as a tool call."""
        silent = not self.answer["content"] and any(v for k, v in self.answer.items() if k not in ("role", "name"))
        return silent or bool(self.answer.get("tool_calls"))

    def exchanges(self) -> list[int]:
        """Where each exchange begins: at a user's turn; the first one right after the system's turn."""
        first = next((i for i, t in enumerate(self.turns) if t["role"] not in (SYSTEM, "developer")), 0)
        users = [i for i, t in enumerate(self.turns) if t["role"] == USER and i > first]
        return [first, *users]

    def without(self, count: int) -> "Conversation":
        """The conversation without its `count` oldest exchanges. Turns before the first exchange stay."""
        starts = self.exchanges()
        return replace(self, turns=(*self.turns[: starts[0]], *self.turns[starts[count] :]))

    def up_to_first_answer(self) -> "tuple[Conversation, tuple[Turn, ...]]":
        """The conversation up to the assistant's first turn that follows another turn, and the turns after that."""
        turns = (*self.turns, self.answer)
        first = next(i for i, turn in enumerate(turns) if turn["role"] == ASSISTANT and i > 0)
        return replace(self, turns=turns[:first], answer=turns[first]), turns[first + 1 :]

    def asking(self, text: str) -> "Conversation":
        """The conversation with another text in the turn before the answer."""
        return replace(self, turns=(*self.turns[:-1], {**self.turns[-1], "content": text}))


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """The conversation in the columns `messages`, `tools` and `system`, up to the last assistant turn.

    Keys with the value null count as absent: parquet writes one for every key that another turn has.

    Raises:
        UserError: the columns hold something else, or no assistant turn follows another turn.
    """
    try:
        return _conversation(row)
    except RecursionError:
        raise UserError("messages or tools are nested too deeply") from None


def _conversation(row: Mapping[str, Any]) -> Conversation:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise UserError(_SHAPE)
    turns = [_turn(m, number) for number, m in enumerate(messages, 1)]
    last = max((i for i, t in enumerate(turns) if t["role"] == ASSISTANT), default=0)
    if last == 0:
        raise UserError("messages need an assistant turn after a user turn")
    return Conversation(tuple(with_system(turns[:last], row)), turns[last], tools_of(row))


def one_exchange(row: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The question, as fields of a prompt template, and the answer of a conversation with nothing else.

    Raises:
        UserError: the conversation has more turns, or the columns hold no conversation.
    """
    conversation = conversation_of(row)
    (first, *more) = conversation.turns
    if more or first["role"] != USER or conversation.tools or conversation.does_more_than_say:
        raise UserError(
            "the tokenizer has no chat template, and a prompt template has place for only one question; "
            "take a tokenizer with one, or render the rows yourself as prompt/completion"
        )
    return {"instruction": first["content"]}, [conversation.answer["content"]]


def with_system(turns: list[Turn], row: Mapping[str, Any]) -> list[Turn]:
    """Put the text of the column `system` before the turns.

    Raises:
        UserError: the column does not hold text, or the turns have another system text.
    """
    text = row.get("system")
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        raise UserError(f"system must be text, got {type(text).__name__}")
    own = [t["content"] for t in turns if t["role"] == SYSTEM]
    if own == [text]:
        return turns
    if own:
        raise UserError("there is a system turn in messages and another text in the column system; keep one of them")
    return [_encodable({"role": SYSTEM, "content": text}, "system"), *turns]


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The schemas in the column `tools`, which may be JSON text; None if there are none.

    Raises:
        UserError: the column holds something else.
    """
    given = row.get("tools")
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except ValueError as e:
            raise UserError(f"tools is text but not JSON ({e})") from None
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise UserError(f"tools must be a list of schemas, or that as JSON text, got {type(given).__name__}")
    return _encodable([_without_nulls(tool) for tool in given], "tools")


def _turn(message: Mapping[str, Any], number: int) -> Turn:
    turn = {k: _without_nulls(v) for k, v in message.items() if v is not None}
    if not isinstance(turn.get("role"), str):
        raise UserError(f"{_SHAPE}; turn {number} has no role")
    where = f"turn {number} ({shown(turn['role'], 20)}) of messages"
    if turn.get("tool_calls"):
        turn["tool_calls"] = _calls(turn["tool_calls"], where)
    if "content" not in turn and not any(turn.get(k) for k in turn if k != "role"):
        raise UserError(f"{_SHAPE}; {where} has no content")
    return _encodable({**turn, "content": _text(turn.get("content", ""), where)}, "messages")


def _text(content: Any, where: str) -> str:
    """A content as one text; it may be given as a list of parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{_SHAPE}; the content of {where} is {type(content).__name__}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UserError(f"{where} has a part of type {shown(str(kind))!r}: only parts of text can be used")
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls with their arguments as objects, as templates need them; they may be given as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"tool_calls of {where} must be a list of objects")
    return [_with_arguments(call) for call in calls]


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, **({} if arguments is None else {"arguments": arguments})}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _encodable(value: Any, column: str) -> Any:
    """Return a value, if all texts in it can be encoded as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{column} holds half of a surrogate pair at character {e.start}") from None
    except (TypeError, ValueError):
        raise UserError(f"{column} holds what JSON cannot") from None
    return value


def check_train_on(train_on: str, encoder_decoder: bool = False) -> None:
    """Refuse an unknown choice of turns, or one on which the model cannot be trained.

    Raises:
        UserError: the choice is unknown, or does not fit the model.
    """
    if train_on not in TRAIN_ON:
        raise UserError(unknown_name("train_on", train_on, TRAIN_ON))
    if train_on == ALL and encoder_decoder:
        raise UserError(
            "train_on 'all' needs a causal language model; an encoder-decoder model writes one answer: last"
        )
