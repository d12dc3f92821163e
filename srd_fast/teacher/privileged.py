"""A teacher that reads more than its student: its rows are for the same answers, after its own prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..data import seen_by_teacher
from .beside import at_work
from .collator import StepCollator
from .source import RowsOfSamples, TeacherRows, TeacherSource


class PrivilegedTeacher:
    """A source of rows for samples with `privileged_ids`.

    A row belongs to a label, and both prompts are followed by the same answer, so the rows need no other alignment.

    Args:
        source: the source for samples as the teacher sees them: a live model, a cache, or both.
        collate: makes a batch of samples.
    """

    def __init__(self, source: TeacherSource, collate: Callable[..., Any]) -> None:
        self.source, self.collate_tokens = source, collate
        self.num_classes = source.num_classes

    def at_work(self) -> "PrivilegedTeacher":
        """The teacher without its cache."""
        return PrivilegedTeacher(at_work(self.source), self.collate_tokens)

    def to(self, device: torch.device | str) -> "PrivilegedTeacher":
        """Move the part that all batches share."""
        if isinstance(self.source, RowsOfSamples):
            self.source = self.source.to(device)
        return self

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What `rows` needs of samples: the cache's rows, or the batch on which the teacher will run."""
        seen = [seen_by_teacher(sample) for sample in samples]
        if isinstance(self.source, RowsOfSamples):
            return {"teacher": self.source.collate(seen)}
        return StepCollator(self.collate_tokens, None)(seen)

    def collate_ahead(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same as `collate`, but another thread reads the cache's rows."""
        if isinstance(self.source, RowsOfSamples):
            return {"teacher": self.source.collate_ahead([seen_by_teacher(sample) for sample in samples])}
        return self.collate(samples)

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """The rows of a batch that was collated with them."""
        return self.source.rows(batch["teacher"], temperature)
