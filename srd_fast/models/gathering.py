"""Gather a student that is sharded over many processes in the memory of one, to save it."""

from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, distributed, nn

from .adapters import untie_adapted_embeddings
from .heads import unwrap
from .wrapping import FSDPModule, FullyShardedDataParallel, loading_whole

if distributed.is_available():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


def whole_student(wrapped: nn.Module, inner: nn.Module) -> nn.Module | None:
    """Gather a sharded model, with its adapters if it has any. All processes call this together.

    Args:
        wrapped: the model as it is called in training.
        inner: the model inside.

    Returns:
        In the first process, a model of the same class with the same configuration and weights, on the CPU. In the
        others, None.
    """
    state = _whole_state(wrapped, inner)
    if distributed.get_rank() != 0:
        return None
    with loading_whole(), init_empty_weights(include_buffers=False):
        copy = _without_weights(inner)
    # Each weight keeps its dtype, even if adapters have another one than their model.
    copy.load_state_dict(state, assign=True)
    base: Any = unwrap(copy)
    base.tie_weights()
    return copy.eval()


def _whole_state(wrapped: nn.Module, inner: nn.Module) -> dict[str, Tensor]:
    """All weights by name, on the CPU, in the first process; the result in other processes is not used."""
    if not any(hasattr(p, "ds_shape") for p in inner.parameters()):
        # FSDP1 crashes with a segmentation fault if it is to move weights to the CPU that are on the CPU already.
        moves = not (isinstance(wrapped, FullyShardedDataParallel) and next(wrapped.parameters()).device.type == "cpu")
        options = StateDictOptions(full_state_dict=True, cpu_offload=moves)
        return get_model_state_dict(wrapped, options=options)  # type: ignore[return-value]
    from deepspeed import zero

    state = {}
    for name, x in inner.state_dict(keep_vars=True).items():
        with zero.GatheredParameters([x] if hasattr(x, "ds_shape") else []):
            if distributed.get_rank() == 0:
                state[name] = x.detach().to("cpu", copy=True)
    return state


def _without_weights(model: nn.Module) -> nn.Module:
    """A model of the same class and configuration, with the same adapters, but without weights."""
    inner: Any = unwrap(model)
    config = deepcopy(inner.config)
    # Set if transformers sharded the model while loading. Saving the whole copy must not wait for other processes.
    config.__dict__.pop("distributed_config", None)
    copy = _class_before_sharding(inner)._from_config(config, dtype=torch.float32)
    copy.generation_config = inner.generation_config
    if inner is model:
        return copy
    outer: Any = model
    (first, config), *others = outer.peft_config.items()
    with_adapters = _class_before_sharding(outer)(copy, config, adapter_name=first)
    for name, config in others:
        with_adapters.add_adapter(name, config)
    with_adapters.base_model.set_adapter(outer.active_adapters)
    untie_adapted_embeddings(with_adapters)
    return with_adapters


def _class_before_sharding(model: nn.Module) -> Any:
    """The model's own class. FSDP2 replaces it by a new class that inherits from it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
