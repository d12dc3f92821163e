"""Prompt templates that are text: Alpaca's, or a user's own. The tokenizer's chat template is in `chat.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..errors import UserError

# Taori et al., Stanford Alpaca, 2023: the prompt format that instruction-tuned baselines of the paper share.
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt template of text.

    Args:
        render: makes the prompt's text from fields.
        cut_order: fields that may be cut when the prompt is too long, in this order.
    """

    render: Callable[[Mapping[str, Any]], str]
    cut_order: tuple[str, ...] = ("input", "instruction")


def _render_alpaca(fields: Mapping[str, Any]) -> str:
    chosen = _ALPACA_INPUT if fields.get("input") else _ALPACA
    return _substitute(chosen, fields)


def _substitute(template: str, fields: Mapping[str, Any]) -> str:
    parts = []
    for literal, name, _, _ in Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(fields.get(name) or "")
    return "".join(parts)


def get_template(template: str) -> PromptTemplate:
    """Find a template by name, or make one from a text.

    Args:
        template: "alpaca", or a text with `{instruction}` and optionally `{input}`.

    Returns:
        The template.

    Raises:
        UserError: the text has other fields.
    """
    if template == "alpaca":
        return PromptTemplate(_render_alpaca)
    try:
        names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as e:
        raise UserError(f"template {template!r} is not a format string: {e}") from e
    if "instruction" not in names or not names <= {"instruction", "input"}:
        raise UserError(
            f"template must be 'alpaca', 'chat' or text with {{instruction}} and optionally {{input}}, got {template!r}"
        )

    def render(fields: Mapping[str, Any]) -> str:
        if "input" in names or not fields.get("input"):
            return _substitute(template, fields)
        joined = f"{fields['instruction']}\n{fields['input']}"
        return _substitute(template, {**fields, "instruction": joined})

    return PromptTemplate(render)
