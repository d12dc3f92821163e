"""SRD-Fast: selective reflection distillation of large language models.

from srd_fast import reflect, curate, SRDConfig, SRDTrainer, evaluate, distillation_loss
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .curriculum import CurriculumPlan, Signal, curate
    from .errors import UserError
    from .losses import (
        DistillationLoss,
        DistillationOutput,
        Projected,
        Sampled,
        TopK,
        compact_distillation_loss,
        distillation_loss,
        distillation_loss_from_logits,
        divergence_names,
        register_divergence,
    )
    from .reflection import Sampling, reflect, register_difficulty, register_engine
    from .teacher import TeacherCache, build_teacher_cache, open_teacher_cache
    from .training.config import SRDConfig
    from .training.evaluation import evaluate
    from .training.trainer import SRDTrainer

# Importing torch and transformers takes seconds, which `srd-fast --help` should not wait for.
_HOME = {
    "CurriculumPlan": "curriculum",
    "DistillationLoss": "losses",
    "DistillationOutput": "losses",
    "Projected": "losses",
    "SRDConfig": "training.config",
    "SRDTrainer": "training.trainer",
    "Sampled": "losses",
    "Sampling": "reflection",
    "Signal": "curriculum",
    "TeacherCache": "teacher",
    "TopK": "losses",
    "UserError": "errors",
    "build_teacher_cache": "teacher",
    "compact_distillation_loss": "losses",
    "curate": "curriculum",
    "distillation_loss": "losses",
    "distillation_loss_from_logits": "losses",
    "divergence_names": "losses",
    "evaluate": "training.evaluation",
    "open_teacher_cache": "teacher",
    "reflect": "reflection",
    "register_difficulty": "reflection",
    "register_divergence": "losses",
    "register_engine": "reflection",
}
__all__ = [
    "CurriculumPlan",
    "DistillationLoss",
    "DistillationOutput",
    "Projected",
    "SRDConfig",
    "SRDTrainer",
    "Sampled",
    "Sampling",
    "Signal",
    "TeacherCache",
    "TopK",
    "UserError",
    "build_teacher_cache",
    "compact_distillation_loss",
    "curate",
    "distillation_loss",
    "distillation_loss_from_logits",
    "divergence_names",
    "evaluate",
    "open_teacher_cache",
    "reflect",
    "register_difficulty",
    "register_divergence",
    "register_engine",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'srd_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
