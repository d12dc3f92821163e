"""Prompt templates: Alpaca's, the tokenizer's own chat template, or a user's string."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

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
    """A prompt template.

    Args:
        render: makes the prompt's text from fields.
        adds_special_tokens: whether the tokenizer adds its special tokens to the text.
        cut_order: fields that may be cut when the prompt is too long, in this order.
        is_chat: whether it is the tokenizer's chat template.
    """

    render: Callable[[Mapping[str, Any]], str]
    adds_special_tokens: bool = True
    cut_order: tuple[str, ...] = ("input", "instruction")
    is_chat: bool = False


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


def get_template(template: str, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """Find a template by name, or make one from a text.

    Args:
        template: "alpaca", "chat", or a text with `{instruction}` and optionally `{input}`.
        tokenizer: for "chat", whose template it is.

    Returns:
        The template.

    Raises:
        UserError: the tokenizer has no chat template for "chat", or the text has other fields.
    """
    if template == "alpaca":
        return PromptTemplate(_render_alpaca)
    if template == "chat":
        return _chat(tokenizer)
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


def _chat(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("template 'chat' needs a tokenizer with a chat template; this one has none, use 'alpaca'")

    def render(fields: Mapping[str, Any]) -> str:
        text = fields["instruction"] + (f"\n\n{fields['input']}" if fields.get("input") else "")
        turns = [*fields.get("history", []), {"role": fields.get("role", "user"), "content": text}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    return PromptTemplate(render, adds_special_tokens=False, is_chat=True)
