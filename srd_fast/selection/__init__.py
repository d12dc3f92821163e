"""Selective distillation: which positions, classes and samples the loss sees (SE-KD, arXiv 2602.01395).

Positions and samples are chosen by a signal of the student or the teacher, before any work on the teacher's logits or
on gradients. Classes are drawn from the teacher's distribution (sparse logit sampling, arXiv 2503.16870), so that the
loss needs no V-wide teacher row; its mean is the forward KL over all classes.
"""

from .batches import BatchSelection, SelectedPositions, batch_generator
from .positions import (
    ALL,
    POSITION_POLICIES,
    QUEUE,
    SIGNALS,
    Candidates,
    Chosen,
    CurriculumPositions,
    DrawnPositions,
    PositionPolicy,
    ThresholdPositions,
    TopPositions,
    check_rows_have_signal,
    counts_of_samples,
    items_of,
    make_position_policy,
    position_policy_names,
    register_position_policy,
    rows_of_samples,
    share_of,
)
from .samples import SAMPLE_POLICIES, register_sample_policy, sample_means, sample_policy_names, select_samples
from .signals import Signals, sample_classes, take_rows

__all__ = [
    "ALL",
    "POSITION_POLICIES",
    "QUEUE",
    "SAMPLE_POLICIES",
    "SIGNALS",
    "BatchSelection",
    "Candidates",
    "Chosen",
    "CurriculumPositions",
    "DrawnPositions",
    "PositionPolicy",
    "SelectedPositions",
    "Signals",
    "ThresholdPositions",
    "TopPositions",
    "batch_generator",
    "check_rows_have_signal",
    "counts_of_samples",
    "items_of",
    "make_position_policy",
    "position_policy_names",
    "register_position_policy",
    "register_sample_policy",
    "rows_of_samples",
    "sample_classes",
    "sample_means",
    "sample_policy_names",
    "select_samples",
    "share_of",
    "take_rows",
]
