"""SRD-Fast: selective reflection distillation of large language models.

from srd_fast import reflect, curate, SRDConfig, SRDTrainer, evaluate, distillation_loss
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .curriculum import CurriculumPlan, Signal, curate
    from .data import register_row_format, row_format_names
    from .errors import (
        DamagedFileError,
        EngineDiedError,
        FaultsError,
        NotFiniteError,
        SRDFastError,
        StaleCacheError,
        UserError,
    )
    from .integrations import (
        attach_curriculum,
        cache_from_top_k,
        model_distillation_loss,
        read_official_reflections,
    )
    from .losses import (
        DistillationLoss,
        DistillationOutput,
        Projected,
        Sampled,
        TopK,
        VocabularyShard,
        compact_distillation_loss,
        distillation_loss,
        distillation_loss_from_logits,
        divergence_names,
        register_divergence,
    )
    from .reflection import Sampling, difficulty_names, engine_names, reflect, register_difficulty, register_engine
    from .selection import (
        position_policy_names,
        register_position_policy,
        register_sample_policy,
        sample_policy_names,
    )
    from .teacher import (
        RemoteTeacher,
        TeacherCache,
        VLLMTeacher,
        build_teacher_cache,
        cache_kind_names,
        open_teacher_cache,
        register_cache_kind,
        serve_teacher,
        split_ranks,
    )
    from .training.config import SRDConfig
    from .training.evaluation import evaluate
    from .training.trainer import SRDTrainer

    __version__: str

# Importing torch and transformers takes seconds, which `srd-fast --help` should not wait for.
_HOME = {
    "CurriculumPlan": "curriculum",
    "DamagedFileError": "errors",
    "DistillationLoss": "losses",
    "DistillationOutput": "losses",
    "EngineDiedError": "errors",
    "NotFiniteError": "errors",
    "Projected": "losses",
    "RemoteTeacher": "teacher",
    "SRDConfig": "training.config",
    "SRDFastError": "errors",
    "SRDTrainer": "training.trainer",
    "Sampled": "losses",
    "Sampling": "reflection",
    "Signal": "curriculum",
    "FaultsError": "errors",
    "StaleCacheError": "errors",
    "TeacherCache": "teacher",
    "TopK": "losses",
    "UserError": "errors",
    "VLLMTeacher": "teacher",
    "VocabularyShard": "losses",
    "attach_curriculum": "integrations",
    "build_teacher_cache": "teacher",
    "cache_from_top_k": "integrations",
    "cache_kind_names": "teacher",
    "compact_distillation_loss": "losses",
    "curate": "curriculum",
    "difficulty_names": "reflection",
    "distillation_loss": "losses",
    "distillation_loss_from_logits": "losses",
    "divergence_names": "losses",
    "engine_names": "reflection",
    "evaluate": "training.evaluation",
    "model_distillation_loss": "integrations",
    "open_teacher_cache": "teacher",
    "position_policy_names": "selection",
    "read_official_reflections": "integrations",
    "reflect": "reflection",
    "register_cache_kind": "teacher",
    "register_difficulty": "reflection",
    "register_divergence": "losses",
    "register_engine": "reflection",
    "register_position_policy": "selection",
    "register_row_format": "data",
    "register_sample_policy": "selection",
    "row_format_names": "data",
    "sample_policy_names": "selection",
    "serve_teacher": "teacher",
    "split_ranks": "teacher",
}
__all__ = [
    "CurriculumPlan",
    "DamagedFileError",
    "DistillationLoss",
    "DistillationOutput",
    "EngineDiedError",
    "FaultsError",
    "NotFiniteError",
    "Projected",
    "RemoteTeacher",
    "SRDConfig",
    "SRDFastError",
    "SRDTrainer",
    "Sampled",
    "Sampling",
    "Signal",
    "StaleCacheError",
    "TeacherCache",
    "TopK",
    "UserError",
    "VLLMTeacher",
    "VocabularyShard",
    "attach_curriculum",
    "build_teacher_cache",
    "cache_from_top_k",
    "cache_kind_names",
    "compact_distillation_loss",
    "curate",
    "difficulty_names",
    "distillation_loss",
    "distillation_loss_from_logits",
    "divergence_names",
    "engine_names",
    "evaluate",
    "model_distillation_loss",
    "open_teacher_cache",
    "position_policy_names",
    "read_official_reflections",
    "reflect",
    "register_cache_kind",
    "register_difficulty",
    "register_divergence",
    "register_engine",
    "register_position_policy",
    "register_row_format",
    "register_sample_policy",
    "row_format_names",
    "sample_policy_names",
    "serve_teacher",
    "split_ranks",
]


def _version() -> str:
    """The version of the installed distribution. A checkout that is only on the path has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("srd-fast")
    except PackageNotFoundError:
        return "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'srd_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
