"""What a mode and a preset give to the sections of a config."""

from collections.abc import Mapping
from typing import Any

from ..curriculum import CURATION_PRESETS
from ..reflection.reflect import REFLECTION_PRESETS
from ..training.presets import TRAINING_PRESETS, with_preset
from .modes import KD, MODES, mode_fields


def take_out_what_follows(content: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Leave out of a complete config, as a run writes it, what its own mode, its preset and the defaults give.

    Then another mode or preset, given beside it, has its own values. What was given and is the same goes too.

    Args:
        content: the config.
        defaults: sections with their defaults; `distill` has none.
    """
    follows: dict[str, Any] = {"mode": content.get("mode", KD)}
    preset = content.get("preset")
    if isinstance(preset, str) and preset in TRAINING_PRESETS:
        add_preset(follows, preset)
    for name in (*defaults, "distill"):
        section, default = content.get(name), defaults.get(name)
        values = {**({} if default is None else default.model_dump()), **follows.get(name, {})}
        if isinstance(section, dict):
            # 60 and 60.0 are not the same to a fingerprint.
            same = {k for k, v in section.items() if k in values and type(v) is type(values[k]) and v == values[k]}
            for of_stages in ("temperature", "sft_weight"):  # a list, or start and end: one of them replaces others
                keys = {of_stages, f"{of_stages}_start", f"{of_stages}_end"}
                if not keys & (section.keys() | values.keys()) <= same:
                    same -= keys
            content[name] = {k: v for k, v in section.items() if k not in same}


def add_preset(content: dict[str, Any], preset: str) -> None:
    """Add a preset's values, and those of the mode, to the sections of a config where they have none of their own.

    Args:
        content: the config.
        preset: the preset's name.
    """
    if isinstance(content.setdefault("distill", {}), dict):
        mode = content.get("mode", KD)
        own = mode_fields(MODES.get(mode), content["distill"]) if mode in MODES else content["distill"]
        content["distill"] = with_preset(preset, own)
    for section, presets in (("curate", CURATION_PRESETS), ("reflect", REFLECTION_PRESETS)):
        if isinstance(content.get(section, {}), dict):
            content[section] = {**presets.get(preset, {}), **content.get(section, {})}
