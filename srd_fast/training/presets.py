"""Presets of a training, by name: the papers' values, and those of their authors' code."""

from typing import Any

# SE-KD (arXiv 2602.01395): KL at temperature 1 on the fifth of each response's tokens where the student is least sure.
_SE_KD: dict[str, Any] = {
    "divergence": "forward_kl",
    "temperature": 1.0,
    "sft_weight": 0.0,
    "position_selection": "topk_student_entropy",
    "position_ratio": 0.2,
}
# Stages as separate runs, as in the code of both papers' authors.
_STAGES_ALONE: dict[str, Any] = {
    "epochs_per_stage": 8,
    "learning_rate": 1e-4,
    "min_learning_rate": 1e-7,
    "restart_learning_rate": True,
    "reset_optimizer": True,
    "temperature_scaling": "official",
    "per_device_train_batch_size": 16,
}
# `paper`: arXiv 2508.06135. `official`: the authors' code, where it differs. POCL: arXiv 2506.05695, which drops no
# sample. SE-KD3X: SE-KD that also selects classes and samples. `learnable` is about curation; here it is the defaults.
TRAINING_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "temperature_start": 1.0,
        "temperature_end": 2.0,
        "sft_weight_start": 0.3,
        "sft_weight_end": 0.1,
        "epochs_per_stage": 8,
    },
    "official": {
        **_STAGES_ALONE,
        "temperature": [1.0, 1.5, 2.0],
        "sft_weight": [0.2, 0.1, 0.0],
    },
    "learnable": {},
    "POCL": {
        **_STAGES_ALONE,
        "temperature": [1.0, 1.33, 1.67, 2.0],
        "sft_weight": [0.3, 0.2, 0.1, 0.0],
    },
    "SE-KD": _SE_KD,
    "SE-KD3X": {
        **_SE_KD,
        "class_sampling": 64,
        "sample_selection": "topk_student_entropy",
        "sample_ratio": 0.2,
    },
}


def with_preset(preset: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a preset, replaced by the given ones. A given start or end removes the preset's list of stages."""
    base = dict(TRAINING_PRESETS[preset])
    for name in ("temperature", "sft_weight"):
        if f"{name}_start" in fields or f"{name}_end" in fields:
            base.pop(name, None)
    return {**base, **fields}
