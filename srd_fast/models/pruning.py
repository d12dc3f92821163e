"""Depth pruning: a student cut out of its teacher by keeping some of the layers.

The configuration decides what the student is. It is cut first, and a model is built from it without weights. Each layer
of that model must have the same classes, shapes and settings as the teacher's layer that it takes over. So the student
that is trained in memory is the one that will be loaded from its folder.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError, first_line
from .encoder_decoder import is_encoder_decoder
from .layer_choice import chosen_layers
from .layer_config import COUNTS, cut_config
from .stack_pruning import prune_stacks
from .text import text_config, text_tower

_OWN_STUDENT = "make the student yourself and give it as student=DIR"
# A layer's own number, which changes with its place.
_NUMBER = re.compile(r"(^|_)(layer|block)_?(idx|index|id|number)$")


def prune_depth(
    model: PreTrainedModel, layers: int | list[int], encoder_layers: int | list[int] | None = None
) -> list[int]:
    """Cut `model` to some of its layers, in place.

    Args:
        model: a decoder whose text part holds its layers in one nn.ModuleList (Llama, GPT-2, Gemma, ...), or an
            encoder-decoder model (T5, BART, ...). Other towers stay whole.
        layers: how many to keep (see `layers_to_keep`), or the indices to keep, in order.
        encoder_layers: the same for the encoder of an encoder-decoder model, whose decoder then has `layers`. Default:
            as `layers`.

    Returns:
        The indices kept; of an encoder-decoder model, those of the decoder. The config is changed with them
        (`num_hidden_layers`, per-layer lists and other entries that decide a layer's kind), so that the model can be
        saved and loaded.

    Raises:
        UserError: the model has fewer layers or no such index, its layers cannot be found, or no configuration of its
            kind can describe the layers kept. The model is then unchanged.
    """
    if is_encoder_decoder(model):
        return prune_stacks(model, layers, encoder_layers)
    if encoder_layers is not None:
        raise UserError(f"encoder_layers is {encoder_layers}, but {type(model).__name__} has no encoder; leave it out")
    stack = _find_layers(model)
    total = len(_layers(model, stack))
    kept = chosen_layers(total, layers)
    if kept == [*range(total)]:
        return kept
    cut = _cut(model, stack, kept)
    if isinstance(cut, str):
        choices = _alternatives(kept, _layers(model, stack))
        other = next((choice for choice in choices if not isinstance(_cut(model, stack, choice), str)), None)
        way_out = _OWN_STUDENT if other is None else f"layers {other} would do"
        raise UserError(f"cannot prune {type(model).__name__} to layers {kept}: {cut}; {way_out}")
    cut.become(model)
    return kept


def _find_layers(model: PreTrainedModel) -> str:
    """The name of the list of layers."""
    tower, config = text_tower(model), text_config(model.config)
    counts = {config.num_hidden_layers, getattr(config, "num_layers", None)}
    stacks: list[str] = []
    for name, module in tower.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and len(module) in counts and not nested:
            stacks.append(name)
    if len(stacks) != 1:
        raise UserError(
            f"cannot prune {type(model).__name__}: expected one list of {config.num_hidden_layers} layers in its body, "
            f"found {stacks}; {_OWN_STUDENT}"
        )
    prefix = next(name for name, module in model.named_modules() if module is tower)
    return f"{prefix}.{stacks[0]}" if prefix else stacks[0]


def _layers(model: PreTrainedModel, stack: str) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(stack))


def _alternatives(wished: list[int], layers: nn.ModuleList) -> list[list[int]]:
    """Other choices of as many layers: first and last ones, the nearest to the wish first; or all of a rarer class."""
    count, total = len(wished), len(layers)
    choices = [[*range(front), *range(total - count + front, total)] for front in range(count + 1)]
    choices.sort(key=lambda kept: sum(abs(a - b) for a, b in zip(kept, wished)))
    common = Counter(map(type, layers)).most_common(1)[0][0]
    rarer = [i for i, layer in enumerate(layers) if type(layer) is not common]
    others = sorted(set(range(total)) - set(rarer), key=lambda i: (i not in wished, i))
    return [*choices, sorted(rarer + others[: count - len(rarer)])] if 0 < len(rarer) <= count else choices


@dataclass
class _Cut:
    """A student without weights.

    Args:
        student: built from the cut configuration, on the device "meta".
        tensors: the teacher's tensor for each of its parameters and buffers, by name; a dimension may have to be cut.
        kept: indices of the layers kept.
        total: how many the teacher has.
    """

    student: PreTrainedModel
    tensors: dict[str, Tensor]
    kept: list[int]
    total: int

    def become(self, model: PreTrainedModel) -> None:
        """Turn the teacher into the student, with the teacher's own tensors."""
        cut: dict[int, Tensor] = {}  # so that a tensor that two modules share stays one
        for name, module in self.student.named_modules(remove_duplicate=False):
            for kind in (module._parameters, module._buffers):
                for own, empty in kind.items():
                    if empty is None:
                        continue
                    whole = self.tensors[f"{name}.{own}".lstrip(".")]
                    if id(whole) not in cut:
                        cut[id(whole)] = self._fit(whole, empty.shape)
                    kind[own] = cut[id(whole)]
        kept = {name: vars(model)[name] for name in ("generation_config",) if name in vars(model)}
        self.student.train(model.training)
        vars(model).update({**vars(self.student), **kept})

    def _fit(self, whole: Tensor, shape: torch.Size) -> Tensor:
        if whole.shape == shape:
            return whole
        dim = next(d for d, (old, new) in enumerate(zip(whole.shape, shape)) if old != new)
        parts = whole.detach().unflatten(dim, (self.total, -1))
        index = torch.tensor(self.kept, device=whole.device)
        fitted = parts.index_select(dim, index).flatten(dim, dim + 1)
        return nn.Parameter(fitted, whole.requires_grad) if isinstance(whole, nn.Parameter) else fitted


def _cut(model: PreTrainedModel, stack: str, kept: list[int]) -> _Cut | str:
    """The student with these layers, or the reason why a configuration cannot describe it."""
    total = len(_layers(model, stack))
    reason = ""
    for lists_are_indices in (False, True):
        try:
            config = cut_config(model.config, kept, total, lists_are_indices)
            with torch.device("meta"):
                student = type(model)(config)
        except Exception as e:  # each configuration and model has its own checks
            reason = reason or f"its configuration for them is refused: {first_line(e)}"
            continue
        found = _compare(model, student, stack, kept)
        if not isinstance(found, str):
            return _Cut(student, found, kept, total)
        reason = reason or found
    return reason


def _compare(
    teacher: PreTrainedModel, student: PreTrainedModel, stack: str, kept: list[int]
) -> dict[str, Tensor] | str:
    """The teacher's tensor for each name in the student, or the first difference between two layers."""
    total = len(_layers(teacher, stack))
    theirs = {n: m for n, m in teacher.named_modules(remove_duplicate=False)}
    ours = {n: m for n, m in student.named_modules(remove_duplicate=False)}
    inside = re.compile(rf"{re.escape(stack)}\.(\d+)(\.|$)")

    def before(name: str) -> str:
        return inside.sub(lambda m: f"{stack}.{kept[int(m[1])]}{m[2]}", name)

    if len(_layers(student, stack)) != len(kept):
        return f"a model of its configuration has {len(_layers(student, stack))} layers, not {len(kept)}"
    whole = {n for n in theirs if (m := inside.match(n)) is None or int(m[1]) in kept}
    differing = {before(n) for n in ours} ^ whole
    if differing:
        return f"{_place(min(differing), stack)} would be there in only one of teacher and student"
    tensors: dict[str, Tensor] = {}
    for name, module in ours.items():
        old, place = theirs[before(name)], _place(before(name), stack)
        if type(module) is not type(old):
            return f"{place} is {type(old).__name__} in the teacher and would be {type(module).__name__}"
        if inside.match(name):
            for key, (a, b) in settings(old, module):
                return f"{place} has {key} {a!r} in the teacher and would have {b!r}"
        for own in {**old._parameters, **old._buffers, **module._parameters, **module._buffers}:
            a, b = getattr(old, own, None), getattr(module, own, None)
            if a is None and b is None:
                continue
            if a is None or b is None or not _fits(a, b, total, len(kept)):
                shapes = [None if x is None else tuple(x.shape) for x in (a, b)]
                return f"{place}.{own} has the shape {shapes[0]} in the teacher and would have {shapes[1]}"
            tensors[f"{name}.{own}".lstrip(".")] = a
    return tensors


def _place(name: str, stack: str) -> str:
    return re.sub(rf"^{re.escape(stack)}\.(\d+)", r"layer \1", name).replace(".", " ", 1) if name else "the model"


def _fits(whole: Tensor, empty: Tensor, total: int, kept: int) -> bool:
    """Whether two shapes are equal, except for one dimension that holds a part for each layer."""
    if whole.dim() != empty.dim():
        return False
    differing = [(a, b) for a, b in zip(whole.shape, empty.shape) if a != b]
    return not differing or (len(differing) == 1 and differing[0][0] * kept == differing[0][1] * total)


def settings(old: nn.Module, new: nn.Module) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the plain attributes in which two modules differ.

    Args:
        old: a module.
        new: a module of the same class.

    Yields:
        The attribute's name, and both values. A layer's own number and the number of layers do not count.
    """
    plain = (bool, int, float, str, type(None))
    for key in sorted(vars(old).keys() & vars(new).keys() - {"training", *COUNTS}):
        a, b = vars(old)[key], vars(new)[key]
        if isinstance(a, plain) and isinstance(b, plain) and a != b and not _NUMBER.search(key):
            yield key, (a, b)
