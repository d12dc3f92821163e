"""Wrappers around a model that many processes train: DDP, FSDP, DeepSpeed.

Each of them works when a module is called: then it gathers sharded weights and prepares the backward pass. The loss
needs hidden states and the head's weight, and never calls the whole model. So it runs inside the module's call, in
place of its forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import deepspeed

if distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
else:  # torch was built without it, so nothing is of these classes

    class FSDPModule:  # type: ignore[no-redef]
        """Stands for the class that is not there."""

    class FullyShardedDataParallel:  # type: ignore[no-redef]
        """Stands for the class that is not there."""

    class DTensor:  # type: ignore[no-redef]
        """Stands for the class that is not there."""


R = TypeVar("R")


def call_through(wrapped: nn.Module, inner: nn.Module, forward: Callable[..., R], *args: Any) -> R:
    """Run `forward` inside the call of a module and its wrapper.

    Without a wrapper, or with one that has nothing to do, this is `forward(*args)`.

    Args:
        wrapped: the module, as it is called in training.
        inner: the module inside; `wrapped` itself without a wrapper, or with one that replaces the module.
        forward: with gradients, it must return a tuple: first a tensor from which all gradients are reached, then
            values that bypass the wrapper, which may cast what it sees. Without gradients, it may return anything.
        *args: arguments of `forward`.

    Returns:
        What `forward` returns.
    """
    differentiates, in_place = torch.is_grad_enabled(), wrapped is inner
    if in_place and not _has_hooks(inner):
        return forward(*args)
    if isinstance(wrapped, DistributedDataParallel) and not differentiates:
        return forward(*args)  # each process has all weights, so it may call alone
    own, found = vars(inner).get("forward"), list[Any]()

    def restore() -> None:
        if own is None:
            vars(inner).pop("forward", None)
        else:
            vars(inner)["forward"] = own

    def once(*a: Any, **k: Any) -> Any:
        restore()
        result: Any = forward(*a, **k)
        found.append(result)
        return result[0] if differentiates else None

    vars(inner)["forward"] = once
    try:
        seen = wrapped(*args)
    finally:
        restore()
    if not differentiates or isinstance(inner, FSDPModule):
        return found[0]  # FSDP's hooks are on the tensor itself; its return value is cast to its `output_dtype`
    return (seen, *found[0][1:])  # type: ignore[return-value]


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module's call gathers its weights although it has no wrapper: FSDP2 and ZeRO-3 change the module."""
    return isinstance(module, FSDPModule) or hasattr(module, "ds_id")


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of the whole weight, even if ZeRO-3 has emptied it and keeps it in shards."""
    return getattr(weight, "ds_shape", weight.shape)


def is_emptied(model: nn.Module) -> bool:
    """Whether ZeRO-3 has loaded a model in shards that no call gathers before training begins."""
    return not hasattr(model, "ds_id") and any(p.shape != whole_shape(p) for p in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a model that ZeRO-3 has emptied, in each process, until the block ends.

    The weights must not change in the block.

    Args:
        model: any model; nothing happens if it is not emptied.
    """
    if not is_emptied(model):
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(list(model.parameters())):
        yield


@contextmanager
def loading_whole() -> Iterator[None]:
    """Let one process make models for itself in the block, although a ZeRO-3 configuration would shard them."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = cast(Any, deepspeed)._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
