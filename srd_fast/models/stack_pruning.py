"""Depth pruning of an encoder-decoder model: layers of its encoder and of its decoder."""

import copy
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .layer_choice import chosen_layers

# Entries with the number of layers of a stack, besides `num_hidden_layers` in the stack's own config.
_COUNTS = {
    "encoder": ("num_layers", "encoder_layers", "num_encoder_layers"),
    "decoder": ("num_decoder_layers", "decoder_layers"),
}
# In T5, only the first layer of a stack has position biases; the other layers use them too.
_OF_THE_FIRST = "relative_attention_bias"


def prune_stacks(model: Any, layers: int | list[int], encoder_layers: int | list[int] | None) -> list[int]:
    """Cut an encoder-decoder model, in place, as `prune_depth` says.

    Args:
        model: the model, without adapters.
        layers: how many layers of the decoder to keep, or their indices.
        encoder_layers: the same for the encoder. Default: as `layers`.

    Returns:
        The indices kept in the decoder.

    Raises:
        UserError: a stack does not have these layers, or the remaining model could not be loaded again. The model is
            then unchanged.
    """
    wanted = {"encoder": layers if encoder_layers is None else encoder_layers, "decoder": layers}
    kept = {
        name: chosen_layers(len(_layers_of(model, name)[2]), given, f"the teacher's {name}'s")
        for name, given in wanted.items()
    }
    fewest = len(kept["decoder"])
    if hasattr(model.config, "num_decoder_layers") and len(kept["encoder"]) < fewest:
        raise UserError(
            f"encoder_layers leaves {len(kept['encoder'])} layers and layers {fewest}: transformers cannot generate "
            f"with a {type(model).__name__} whose decoder is deeper; keep at least {fewest} layers of the encoder"
        )
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
    _prune(shell, kept)
    _check_config(shell)
    _prune(model, kept)
    return kept["decoder"]


def _prune(model: Any, kept: dict[str, list[int]]) -> None:
    for name, indices in kept.items():
        stack, place, members = _layers_of(model, name)
        _cut(stack, place, members, indices)
        _tell(model.config, stack.config, name, len(members), indices)


def _layers_of(model: Any, name: str) -> tuple[Any, str, nn.ModuleList]:
    """The encoder or decoder, the name of its list of layers, and that list."""
    stack = model.get_encoder() if name == "encoder" else model.get_decoder()
    lists = [(n, m) for n, m in stack.named_children() if isinstance(m, nn.ModuleList)]
    if len(lists) != 1:
        raise UserError(
            f"cannot prune {type(model).__name__}: expected one list of layers in its {name}, found "
            f"{[n for n, _ in lists]}; make the student yourself and give it as student=DIR"
        )
    return stack, *lists[0]


def _cut(stack: nn.Module, place: str, members: nn.ModuleList, kept: list[int]) -> None:
    layers = [members[i] for i in kept]
    own = dict(layers[0].named_modules())
    for path, module in members[0].named_modules():
        if path.endswith(_OF_THE_FIRST) and path not in own:
            layers[0].set_submodule(path, module)
            layers[0].get_submodule(path.rpartition(".")[0]).has_relative_attention_bias = True  # type: ignore[assignment]
    for position, layer in enumerate(layers):
        for part in layer.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = position  # type: ignore[assignment]
    setattr(stack, place, nn.ModuleList(layers))


def _tell(config: Any, own: Any, name: str, total: int, kept: list[int]) -> None:
    """Write the kept layers into the model's config and into the stack's own."""
    for key in _COUNTS[name]:
        if getattr(config, key, None) == total:
            setattr(config, key, len(kept))
    if own is not config:
        own.num_hidden_layers = len(kept)
    lists = own if own is not config or name == "encoder" else None
    for key, value in list(vars(lists).items()) if lists is not None else []:
        if ("layer" in key or "window" in key) and isinstance(value, list) and len(value) == total:
            setattr(lists, key, [value[i] for i in kept])


def _check_config(model: nn.Module) -> None:
    """Refuse a model if its changed config describes another model.

    Raises:
        UserError: the message names a weight that only one of the two has.
    """
    with torch.device("meta"):
        described = type(model)(model.config).state_dict()
    found = {name: x.shape for name, x in model.state_dict().items()}
    wanted = {name: x.shape for name, x in described.items()}
    differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if differing:
        raise UserError(
            f"cannot prune {type(model).__name__}: the kind of its layers follows from their places, so that "
            f"{differing[0]} would not be loaded again; make the student yourself and give it as student=DIR"
        )
