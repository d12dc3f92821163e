"""Convert conversations in any common format to the `messages` that chat templates take: a list of role and content."""

import json
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .conversations import ASSISTANT, SYSTEM, USER, Turn
from .files import shown

CALL, RESULT = "function_call", "tool"
# Names of the sides of a conversation -> role. Roles that are not here stay as they are: templates know others.
ROLES = {
    USER: ("user", "human", "prompter", "customer", "instruction", "question"),
    ASSISTANT: ("assistant", "gpt", "model", "bot", "chatbot", "ai", "agent", "chatgpt", "bard", "bing", "claude"),
    SYSTEM: ("system", "system_prompt"),
    RESULT: ("tool", "observation", "function", "function_response", "tool_response", "function-response"),
    CALL: ("function_call", "tool_call", "function-call"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
# Keys under which one entry holds what a side says, often of both sides.
_SIDES = {
    **{name: role for name, role in _ROLE_OF.items() if role in (SYSTEM, USER, ASSISTANT)},
    **dict.fromkeys(("input", "query", "prompt"), USER),
    **dict.fromkeys(("output", "answer", "response"), ASSISTANT),
}
_ROLE_KEYS = ("role", "from", "speaker", "author")
_CONTENT_KEYS = ("content", "value", "text", "parts", "message")
_MORE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")


def is_standard(messages: Any) -> bool:
    """Whether these are turns with roles, one of them the assistant's."""
    return (
        isinstance(messages, list)
        and all(isinstance(turn, Mapping) and isinstance(turn.get("role"), str) for turn in messages)
        and any(turn["role"] == ASSISTANT for turn in messages)
    )


def as_messages(given: Any, column: str) -> Any:
    """Convert turns in any common format to `messages`.

    Args:
        given: turns with role/content or from/value; entries with what each side says under its name, one side or both
            (human/assistant, input/output); alternating texts, the user's first; pairs of such texts; a mapping of
            lists, as some files store a list of mappings; or any of these as JSON text.
        column: where it was found, for messages.

    Returns:
        The messages. `messages` themselves are returned unchanged.

    Raises:
        UserError: it is something else, or a turn lacks its speaker or its text.
    """
    if is_standard(given):
        return given
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise UserError(f"{column} is text that begins like a list but is not JSON") from None
    if isinstance(given, Mapping) and given and all(isinstance(values, list) for values in given.values()):
        given = [dict(zip(given, values)) for values in zip(*given.values())]
    if not isinstance(given, list):
        raise UserError(f"{column} must be a list of {{'role': text, 'content': text}}, got {type(given).__name__}")
    if all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        given = [text for pair in given for text in pair]
    if all(isinstance(text, str) for text in given):
        return [{"role": (USER, ASSISTANT)[number % 2], "content": text} for number, text in enumerate(given)]
    return [turn for number, entry in enumerate(given, 1) for turn in _turns(entry, f"turn {number} of {column}")]


def _turns(entry: Any, where: str) -> list[Turn]:
    """The turns of an entry: one, or those of both sides where each stands under the name of its side."""
    if isinstance(entry, Mapping) and all(entry.get(k) is None for k in _ROLE_KEYS):
        named = [(_SIDES.get(str(k).lower()), text) for k, text in entry.items() if isinstance(text, str)]
        said = [(role, text) for role, text in named if role]
        sides = {role: text for role, text in said if text or role != SYSTEM}
        if sides and len(said) == len(dict(said)):  # no role twice
            return [{"role": role, "content": sides[role]} for role in (SYSTEM, USER, ASSISTANT) if role in sides]
    return [_turn(entry, where)]


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise UserError(f"{where} must be {{'role': text, 'content': text}}, got {type(turn).__name__}")
    speaker = next((turn[k] for k in _ROLE_KEYS if turn.get(k) is not None), None)
    if not isinstance(speaker, str):
        raise UserError(
            f"{where} does not say who speaks: none of {', '.join(_ROLE_KEYS)} is text, and no key is a side's, such "
            "as human or assistant"
        )
    role = _ROLE_OF.get(speaker.strip().lower(), speaker)
    content = next((turn[k] for k in _CONTENT_KEYS if turn.get(k) is not None), None)
    more = {k: turn[k] for k in _MORE_KEYS if turn.get(k) is not None}
    if role == CALL:
        return {"role": ASSISTANT, "content": "", **more, "tool_calls": _calls(content, where)}
    if content is None and not more:
        raise UserError(f"{where} ({shown(speaker, 20)}) says nothing: none of {', '.join(_CONTENT_KEYS)} has a value")
    return {"role": role, "content": "" if content is None else content, **more}


def _calls(content: Any, where: str) -> list[dict[str, Any]]:
    """The function calls of a turn: one or several, each with name and arguments, usually as JSON text."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f"{where} calls a function, and its text is not JSON with name and arguments")
    return [{"type": "function", "function": dict(call)} for call in calls]


def joined_turns(prompt: Any, answer: Any, of_prompt: str, of_answer: str) -> list[Turn]:
    """Join a prompt and an answer, each given as text or turns, to one list of messages.

    Args:
        prompt: the prompt; None if the answer is a whole conversation.
        answer: the assistant's answer, or a conversation that begins with the prompt.
        of_prompt: the prompt's column, for messages.
        of_answer: the answer's column, for messages.
    """
    said = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else _listed(answer, of_answer)
    if prompt is None or any(turn.get("role") == USER for turn in said):
        return said
    return [*([{"role": USER, "content": prompt}] if isinstance(prompt, str) else _listed(prompt, of_prompt)), *said]


def _listed(given: Any, column: str) -> list[Turn]:
    turns: list[Turn] = as_messages(given, column)
    return list(turns)
