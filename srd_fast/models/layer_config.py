"""Cut the per-layer entries of a configuration to the layers that are kept."""

import copy
import re
from typing import Any

from transformers import PreTrainedConfig

from .text import text_config

# Entries with the number of layers.
COUNTS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers"}
# Names of lists with one entry for each layer.
_PER_LAYER = re.compile(r"layer|pattern|intermediate_size$")
# Entries k: the first k layers, or the last k, are of another kind.
_FIRST = {"first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index"}
_LAST = {"num_kv_shared_layers"}
# Layer i is of another kind where i % period == offset.
_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
# Prefixes of entries about layers of other tasks or towers, which are not cut.
_OTHERS = ("mtp_", "vision_", "audio_", "encoder_")


def cut_config(config: PreTrainedConfig, kept: list[int], total: int, lists_are_indices: bool) -> PreTrainedConfig:
    """Make the configuration of a model with only some of the layers, as it will be loaded from the model's folder.

    Per-layer lists are cut, and lists of layer numbers get the new numbers. Numbers that decide which kind a layer is
    are chosen, where possible, so that the kept layers keep their kinds. The caller must check that by building a model
    from the result.

    Args:
        config: the configuration of the whole model.
        kept: indices of the layers to keep.
        total: how many layers there are.
        lists_are_indices: read a list [0, 1, ..., total - 1] as layer numbers, not as a value for each layer.

    Returns:
        A new configuration.
    """
    told: dict[str, Any] = copy.deepcopy(config.to_dict())
    text = text_config(config)
    name = next((n for n in getattr(config, "sub_configs", {}) if getattr(config, n, None) is text), None)
    part = told if name is None else told[name]
    part |= {key: _cut(key, value, kept, total, lists_are_indices) for key, value in part.items()}
    part |= _kinds_by_number(text, part, kept)
    made: Any = type(config).from_dict(told)
    made.name_or_path = config.name_or_path
    for new, old in ((made, config), (text_config(made), text)):
        new._attn_implementation = old._attn_implementation
    return made


def _cut(key: str, value: Any, kept: list[int], total: int, lists_are_indices: bool) -> Any:
    if key.startswith(_OTHERS):
        return value
    if isinstance(value, dict) and key == "per_layer_config":
        by_number = {int(number): entries for number, entries in value.items()}
        return {new: by_number[old] for new, old in enumerate(kept) if old in by_number}
    if isinstance(value, list) and _PER_LAYER.search(key):
        numbers = all(type(x) is int and 0 <= x < total for x in value) and value == sorted(set(value))
        if numbers and (len(value) < total or (lists_are_indices and len(value) == total)):
            return [new for new, old in enumerate(kept) if old in value]
        return [value[i] for i in kept] if len(value) == total else value
    if type(value) is not int:
        return value
    if key in COUNTS and value % total == 0:
        return value // total * len(kept)
    if key in _FIRST:
        return sum(i < value for i in kept)
    if key in _LAST:
        return sum(i >= total - value for i in kept)
    if key == "moe_layer_end_index" and value >= 0:
        return sum(i <= value for i in kept) - 1
    return value


def _kinds_by_number(text: Any, part: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Entries that decide a layer's kind by its number, adapted to the new numbers of the kept layers."""
    entries: dict[str, Any] = {}
    for period, offset in _PERIODS:
        if period in part:
            wanted = {new for new, old in enumerate(kept) if old % part[period] == part[offset]}
            entries |= dict(zip((period, offset), _period(wanted, len(kept), (part[period], part[offset]))))
    if "decoder_sparse_step" in part and "mlp_only_layers" in part:
        step, dense = text.decoder_sparse_step, text.mlp_only_layers or []
        are_dense = [new for new, old in enumerate(kept) if old in dense or (old + 1) % step]
        entries |= {"decoder_sparse_step": 1, "mlp_only_layers": are_dense}
    if part.get("block_types"):
        entries["block_types"] = [part["block_types"][i % len(part["block_types"])] for i in kept]
    if "attention_types" in part and "attention_layers" in part:
        entries["attention_types"] = [[part["attention_layers"], 1]]
    return entries


def _period(wanted: set[int], count: int, before: tuple[int, int]) -> tuple[int, int]:
    """A period and an offset that select exactly the wanted ones of `count` numbers; `before` if there are none."""
    pairs = [before, *((p, o) for p in range(1, count + 2) for o in range(p))]
    return next(((p, o) for p, o in pairs if {i for i in range(count) if i % p == o} == wanted), before)
