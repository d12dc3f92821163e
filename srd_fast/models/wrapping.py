"""What is around a model, or in its place, when many processes train it: DDP, FSDP, DeepSpeed.

Each of them does its work in the call of a module: there it gathers weights that lie in shards, and prepares for the
backward pass. The loss needs hidden states and the weight of the head, and never calls the model as a whole, so what
it does runs in place of the module's own forward.
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
else:  # torch built without it: nothing is of these classes

    class FSDPModule:  # type: ignore[no-redef]
        """Stands for the class that is not there."""

    class FullyShardedDataParallel:  # type: ignore[no-redef]
        """Stands for the class that is not there."""

    class DTensor:  # type: ignore[no-redef]
        """Stands for the class that is not there."""


R = TypeVar("R")


def call_through(wrapped: nn.Module, inner: nn.Module, forward: Callable[..., R], *args: Any) -> R:
    """Run `forward` inside the call of a module and of what is around it.

    Where nothing is around it, or nothing that has work to do, this is `forward(*args)`.

    Args:
        wrapped: the module, as it is called in training.
        inner: the module inside; `wrapped` itself where nothing is around it, or something in its place.
        forward: with gradients it gives a tuple, of which the first is a tensor that leads to all gradients, and the
            others are passed by the wrapper, which may cast what it sees. Without gradients it gives anything.
        args: of `forward`.

    Returns:
        What `forward` returns.
    """
    differentiates, in_place = torch.is_grad_enabled(), wrapped is inner
    if in_place and not _has_hooks(inner):
        return forward(*args)
    if isinstance(wrapped, DistributedDataParallel) and not differentiates:
        return forward(*args)  # each process has all weights, so it may be the only one that calls
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
        return found[0]  # FSDP's hooks are on the tensor itself; what it returns is cast to its `output_dtype`
    return (seen, *found[0][1:])  # type: ignore[return-value]


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module's call gathers its weights though nothing is around it: FSDP2 and ZeRO-3 work in its place."""
    return isinstance(module, FSDPModule) or hasattr(module, "ds_id")


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of a weight, also of one that ZeRO-3 has emptied here and keeps in shards."""
    return getattr(weight, "ds_shape", weight.shape)


def is_emptied(model: nn.Module) -> bool:
    """Whether ZeRO-3 has loaded a model in shards, and nothing gathers them in its calls before training begins."""
    return not hasattr(model, "ds_id") and any(p.shape != whole_shape(p) for p in model.parameters())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have all weights whole in each process for a while, of a model that is emptied. They must not change meanwhile.

    Args:
        model: any model; nothing is done to others.
    """
    if not is_emptied(model):
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(list(model.parameters())):
        yield


@contextmanager
def loading_whole() -> Iterator[None]:
    """Let one process make models for itself meanwhile, where a ZeRO-3 configuration would have all make shards."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = cast(Any, deepspeed)._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
