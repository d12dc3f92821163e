"""Read only the head of a model from its files, if another engine runs the model."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from ..errors import UserError, first_line
from ..losses import Head
from .adapters import adapter_base
from .encoder_decoder import is_encoder_decoder
from .heads import head_as_it_lies
from .loading import resolve_model
from .saving import model_without_weights

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def head_of_files(source: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Head, int]:
    """Load a causal language model's head without reading the weights of its body.

    Args:
        source: a folder or hub id, with weights in safetensors. The body may be quantised in any way.
        dtype: dtype of the head.
        device: where the head goes.

    Returns:
        The head, and how many tokens the model has embeddings for.

    Raises:
        UserError: the model is an adapter, has an encoder or an architecture that transformers does not have, or its
            files hold no full weight of a head.
    """
    path = resolve_model(source)
    if adapter_base(path) is not None:
        raise UserError(
            f"model {source!r} is an adapter, whose head cannot be read separately: merge it first (merge_and_unload, "
            "save_pretrained)"
        )
    model: Any = model_without_weights(source)
    if model is None or is_encoder_decoder(model):
        raise UserError(f"model {source!r}: only a causal language model that transformers knows has a head to read")
    head = head_as_it_lies(model, "teacher")
    outer, inner = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is not None
    tied = outer.weight is inner.weight or bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    names = {id(module): name for name, module in model.named_modules()}
    files = _files(path, source)
    weight = _read(files, path, f"{names[id(inner if tied else outer)]}.weight", head.weight.shape)
    bias = None if head.bias is None else _read(files, path, f"{names[id(outer)]}.bias", head.bias.shape)
    if weight is None or (bias is None) != (head.bias is None):
        raise UserError(
            f"model {source!r}: its files hold no full head of {tuple(head.weight.shape)}; the loss needs its full "
            "weight: quantise the model without it (modules_to_not_convert, ignore: ['lm_head'])"
        )
    whole = replace(head, weight=weight.to(dtype), bias=None if bias is None else bias.to(dtype))
    return whole.on(device), inner.weight.shape[0]


def _files(path: str, source: str) -> Mapping[str, str]:
    """Name of each weight -> the file that it is in."""
    try:
        index = cached_file(path, _INDEX, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            found: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            return found
        single = cached_file(path, _WEIGHTS, _raise_exceptions_for_missing_entries=False)
        if single is not None:
            with safe_open(single, "pt") as f:
                return dict.fromkeys(f.keys(), _WEIGHTS)
    except Exception as e:  # damaged files raise errors of many libraries
        raise UserError(f"model {source!r}: its weights cannot be read: {first_line(e)}") from e
    raise UserError(f"model {source!r} has no weights in safetensors ({_WEIGHTS} or {_INDEX})")


def _read(files: Mapping[str, str], path: str, name: str, shape: torch.Size) -> Tensor | None:
    """Read a weight by its name in the model. Its name in the files may have another prefix."""
    last = ".".join(name.split(".")[-2:])
    for candidate in (name, *(x for x in files if x != name and (x == last or x.endswith(f".{last}")))):
        if candidate in files:
            file = cached_file(path, files[candidate])
            with safe_open(file, "pt") as f:
                found = f.get_tensor(candidate)
            if found.shape == shape and found.is_floating_point() and found.dtype.itemsize > 1:
                return found
    return None
