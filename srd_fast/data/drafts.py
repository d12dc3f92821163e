"""A row on its way to a tokenised sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .conversations import Conversation, Turn
from .templates import PromptTemplate, get_template

AS_IT_IS = get_template("{instruction}")


@dataclass(frozen=True)
class Draft:
    """A row rendered: what is left is to tokenise it, and to cut it where it is too long.

    Args:
        row: it was made of.
        prompt: guarded.
        answer: guarded.
        ended: whether the answer has the token that ends it.
        references: that answers are scored against.
        chat: the conversation; None for a prompt of text.
        said: of a conversation, the references as the row has them.
        later: what is said in a conversation behind the answer, where all answers are trained on.
        fields: of a prompt of text.
        template: of a prompt of text.
        parse: whether special tokens in the fields are parsed.
        privileged: the prompt of the teacher, guarded; empty where it has none of its own.
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
