"""Prompt templates that are text: Alpaca's, or a user's own. The tokenizer's chat template is in `chat.py`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..errors import UserError

# Taori et al., Stanford Alpaca, 2023: the prompt format of the paper's instruction-tuned baselines.
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
        ends_in: the text after the last field, which separates the prompt from its answer.
        cut_order: fields that may be cut when the prompt is too long, in this order.
    """

    render: Callable[[Mapping[str, Any]], str]
    ends_in: str = ""
    cut_order: tuple[str, ...] = ("input", "instruction")


def _render_alpaca(fields: Mapping[str, Any]) -> str:
    chosen = _ALPACA_INPUT if fields.get("input") else _ALPACA
    return substituted(chosen, fields)


def substituted(template: str, fields: Mapping[str, Any]) -> str:
    """Fill a format string with fields; missing ones become empty."""
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
        return PromptTemplate(_render_alpaca, _ALPACA.rpartition("}")[2])
    try:
        parts = list(Formatter().parse(template))
        names = {name for _, name, _, _ in parts if name is not None}
    except ValueError as e:
        raise UserError(f"template {template!r} is not a format string: {e}") from e
    if "instruction" not in names or not names <= {"instruction", "input"}:
        raise UserError(
            f"template must be 'alpaca', 'chat' or text with {{instruction}} and optionally {{input}}, got {template!r}"
        )

    def render(fields: Mapping[str, Any]) -> str:
        if "input" in names or not fields.get("input"):
            return substituted(template, fields)
        joined = f"{fields['instruction']}\n{fields['input']}"
        return substituted(template, {**fields, "instruction": joined})

    return PromptTemplate(render, parts[-1][0] if parts[-1][1] is None else "")


# The text before an answer in known layouts, and the template that makes it.
_LAYOUTS = {
    "### Response:": "alpaca",
    "### Assistant:": "### Human: {instruction}\n### Assistant:",
    "[/INST]": "[INST] {instruction} [/INST]",
    "<|im_start|>assistant": "chat",
    "<|start_header_id|>assistant": "chat",
    "<start_of_turn>model": "chat",
    "<|assistant|>": "chat",
    "\nAssistant:": "Human: {instruction}\n\nAssistant:",
    "\nASSISTANT:": "USER: {instruction}\nASSISTANT:",
    "\nAnswer:": "Question: {instruction}\nAnswer:",
    "\nA:": "Q: {instruction}\nA:",
}


def parted(text: str, ends_in: str, template: str) -> tuple[str, str]:
    """Split a text that a template made into prompt and answer, after the last place where the template ends a prompt.

    Args:
        text: the prompt followed by its answer.
        ends_in: the text that the template writes before an answer.
        template: the template as it was given, for messages.

    Raises:
        UserError: the text does not have what the template writes. The message proposes a template that fits.
    """
    for mark in (ends_in, ends_in.strip()):
        before, found, answer = text.rpartition(mark) if mark.strip() else ("", "", "")
        if found:
            return before + found, answer
    near = next((other for mark, other in _LAYOUTS.items() if mark in text and other != template), None)
    other = json.dumps(near or "Q: {instruction}\nA:")
    why = f"has no {ends_in.strip()!r} before an answer, as" if ends_in.strip() else "cannot be split by"
    raise UserError(
        f"text {why} template {template!r}; give the one that it was written with, such as template: {other}, "
        "or the columns prompt and completion"
    )
