"""The steps of a run. Each reads files of the run folder and writes others."""

from ..modes import LIVE
from .answers import answer_inputs, answer_step
from .cache import cache_inputs, cache_teacher
from .controls import CONTROLS, adopt_evaluations, check_controls, control_config, control_folder, control_outputs
from .data import check_rows_of_run, prepare, prepare_inputs
from .inputs import Checks, check_group, check_inputs, student_without_weights
from .outcome import evaluate_inputs, evaluate_step, report
from .run import ANSWERS, PRUNE, Run
from .selection import (
    PARTS,
    curate_inputs,
    curate_step,
    init_student,
    reflect_inputs,
    reflect_shard,
    reflect_step,
    shard_parts,
    student_inputs,
)
from .training import distill, distill_inputs

__all__ = [
    "ANSWERS",
    "CONTROLS",
    "LIVE",
    "PARTS",
    "PRUNE",
    "Checks",
    "Run",
    "adopt_evaluations",
    "answer_inputs",
    "answer_step",
    "cache_inputs",
    "cache_teacher",
    "check_controls",
    "check_group",
    "check_inputs",
    "check_rows_of_run",
    "control_config",
    "control_folder",
    "control_outputs",
    "curate_inputs",
    "curate_step",
    "distill",
    "distill_inputs",
    "evaluate_inputs",
    "evaluate_step",
    "init_student",
    "prepare",
    "prepare_inputs",
    "reflect_inputs",
    "reflect_shard",
    "reflect_step",
    "report",
    "shard_parts",
    "student_inputs",
    "student_without_weights",
]
