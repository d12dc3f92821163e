"""A stand-in for the teacher, for training only on the cross-entropy."""

from collections.abc import Mapping
from typing import Any

import torch

from ..losses import Sampled
from .source import TeacherRows, labels_with_loss


class NoTeacher:
    """A source in which each label is the teacher's whole distribution. It costs nothing.

    The forward KL to it is the cross-entropy. Other divergences have no meaning with it.

    Args:
        num_classes: the student's number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """The labels with loss, as one draw each from a distribution without entropy."""
        labels_N = labels_with_loss(batch)
        return Sampled(labels_N[:, None], torch.zeros(len(labels_N), device=labels_N.device))
