"""A batch with the teacher's rows of its samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..data import with_loss_rows
from .cache import TeacherCache


class StepCollator:
    """Collates as another collator does, and adds what a step would else have to ask the device or the disk for.

    collate: the collator. teacher: a cache whose rows of the samples go with them, or None. ahead: whether these may
    come later, read by another thread until the batch is moved to its device.
    """

    def __init__(self, collate: Callable[..., Any], teacher: TeacherCache | None, ahead: bool = False) -> None:
        self.collate, self.teacher, self.ahead = collate, teacher, ahead

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        teacher = self.teacher
        if teacher is None:
            return with_loss_rows(self.collate(samples))
        # First, so that reading begins.
        rows = teacher.collate_ahead(samples) if self.ahead else teacher.collate(samples)
        return {**with_loss_rows(self.collate(samples)), "teacher": rows}
