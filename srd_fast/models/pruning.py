"""Depth pruning: a student cut out of its teacher by keeping some of the layers."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from .encoder_decoder import is_encoder_decoder
from .layer_choice import chosen_layers
from .stack_pruning import prune_stacks


def prune_depth(
    model: PreTrainedModel, layers: int | list[int], encoder_layers: int | list[int] | None = None
) -> list[int]:
    """Cut `model` to some of its layers, in place.

    Args:
        model: a decoder whose body holds its layers in one nn.ModuleList (Llama, GPT-2, Gemma, ...), or an
            encoder-decoder model (T5, BART, ...).
        layers: how many to keep (see `layers_to_keep`), or the indices to keep, in order.
        encoder_layers: the same for the encoder of an encoder-decoder model, whose decoder then has `layers`. Default:
            as `layers`.

    Returns:
        The indices kept, of an encoder-decoder model those of the decoder. The config is changed with them
        (`num_hidden_layers` and per-layer lists), so the model saves and loads.

    Raises:
        UserError: the model does not have so many layers or such an index, or its layers cannot be found.
    """
    if is_encoder_decoder(model):
        return prune_stacks(model, layers, encoder_layers)
    if encoder_layers is not None:
        raise UserError(f"encoder_layers is {encoder_layers}, but {type(model).__name__} has no encoder; leave it out")
    config: Any = model.config
    total = config.num_hidden_layers
    body: Any = model.base_model
    stacks = [(n, m) for n, m in body.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total]
    if len(stacks) != 1:
        raise UserError(
            f"cannot prune {type(model).__name__}: expected one list of {total} layers in its body, found "
            f"{[n for n, _ in stacks]}; make the student yourself and give it as student=DIR"
        )
    kept = chosen_layers(total, layers)
    name, stack = stacks[0]
    layers_kept = nn.ModuleList([stack[i] for i in kept])
    body.set_submodule(name, layers_kept)
    for position, layer in enumerate(layers_kept):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = position  # type: ignore[assignment]
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    return kept
