"""What a model is, as a hash of its weights and configuration."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from .placement import is_dispatched, is_sharded, state_of, unpack

# Entries of a configuration that do not change what the model computes.
_NOT_OF_THE_MODEL = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_NOT_OF_THE_MODEL |= {"distributed_config"}


def model_digest(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers, with their dtypes, and of its configuration.

    It does not depend on the device. For a sharded model, all processes that have shards must call this together.
    """
    unpack(model)  # so that a packed and an unpacked model have the same hash
    state = ((name, x) for key, value in state_of(model) for name, x in _plain_tensors(key, value))

    def digest(x: torch.Tensor) -> str:
        content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"{x.dtype}{tuple(x.shape)}{hashlib.blake2b(content, digest_size=16).hexdigest()}"

    if is_dispatched(model) or is_sharded(model):
        of_names = {name: digest(x) for name, x in state}  # there may be no room for two weights at once
    else:
        held = dict(state)
        by_place = {(x.data_ptr(), x.shape): x for x in held.values()}
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(by_place, pool.map(digest, by_place.values())))
        of_names = {name: digests[x.data_ptr(), x.shape] for name, x in held.items()}
    listed = [f"{name}:{found}" for name, found in sorted(of_names.items())]
    config: Any = getattr(model, "config", None)
    told = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_THE_MODEL}
    listed.append(json.dumps(told, sort_keys=True, default=str))
    return hashlib.blake2b("\n".join(listed).encode(), digest_size=16).hexdigest()


def _plain_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an entry of a model's state; for a quantised tensor, those inside it, each with its own name."""
    if hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{name}.{part}", getattr(value, part))
    elif isinstance(value, torch.Tensor):
        yield name, value
