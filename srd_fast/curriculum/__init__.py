"""Which samples are trained on, and when: curation by difficulty into subsets, then a schedule of stages."""

from .curation import CURATION_PRESETS, DEFAULT_SIGNALS, HIGHER_IS_EASIER, KNEE, check_band, curate, replan
from .plan import METHODS, RANKED, SHUFFLED, CurriculumPlan, Signal
from .plan_file import PLAN_FORMAT
from .schedule import Curriculum, Stage, per_stage

__all__ = [
    "CURATION_PRESETS",
    "DEFAULT_SIGNALS",
    "HIGHER_IS_EASIER",
    "KNEE",
    "METHODS",
    "PLAN_FORMAT",
    "RANKED",
    "SHUFFLED",
    "Curriculum",
    "CurriculumPlan",
    "Signal",
    "Stage",
    "check_band",
    "curate",
    "per_stage",
    "replan",
]
