"""Adapters inside a model, and wrappers around it (DDP, FSDP)."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import UserError


def with_adapters(model: nn.Module, peft_config: Any) -> nn.Module:
    """Make a PEFT model.

    Args:
        model: a causal language model.
        peft_config: of the peft package, for adapters in the layers.

    Returns:
        The model with adapters.

    Raises:
        UserError: peft is not installed, or the configuration is for trained prompts.
    """
    try:
        from peft import get_peft_model
    except ImportError as e:
        raise UserError(f"peft_config needs the peft package: pip install 'srd-fast[peft]' ({e})") from e
    if getattr(peft_config, "is_prompt_learning", False):
        raise UserError(
            f"peft_config is {type(peft_config).__name__}: trained prompts add positions that the teacher does not "
            "have; use adapters in the layers, such as LoraConfig"
        )
    return get_peft_model(model, peft_config)


def call_through(wrapped: nn.Module, inner: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    """Run `forward` inside the call of a wrapper such as DDP or FSDP, which prepares for the backward pass there."""
    if wrapped is inner:
        return forward(*args)
    original = inner.forward

    def once(*a: Any, **k: Any) -> Any:
        inner.forward = original
        return forward(*a, **k)

    inner.forward = once
    try:
        return wrapped(*args)
    finally:
        inner.forward = original
