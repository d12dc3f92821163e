"""Wrappers around a model (DDP, FSDP)."""

from collections.abc import Callable
from typing import Any

from torch import nn


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
