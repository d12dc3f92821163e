"""A row that is rendered but not tokenised yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .conversations import Conversation, Turn
from .templates import PromptTemplate, get_template

AS_IT_IS = get_template("{instruction}")


@dataclass(frozen=True)
class Draft:
    """A rendered row, which remains to be tokenised, and cut if it is too long.

    Guarded texts are explained in `encoding.py`.

    Args:
        row: the row itself.
        prompt: the prompt, a guarded text.
        answer: the answer, a guarded text.
        ended: whether the answer contains the token that ends it.
        references: the texts that answers are compared with.
        chat: the conversation; None for a prompt from a template of text.
        said: for a conversation, the references as the row has them.
        later: for a conversation whose answers are all trained on, the turns after the first answer.
        fields: the template's fields, for a prompt from a template of text.
        template: the template, for a prompt from a template of text.
        parse: whether special tokens in the fields are parsed.
        privileged: the teacher's prompt, a guarded text; empty if it is the student's.
    """

    row: Mapping[str, Any]
    prompt: str
    answer: str
    ended: bool
    references: list[str]
    chat: Conversation | None = None
    said: list[str] = field(default_factory=list)
    later: tuple[Turn, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    template: PromptTemplate = AS_IT_IS
    parse: bool = False
    privileged: str = ""
