"""A cache, and a teacher that runs for samples that the cache does not hold, such as a student's fresh answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .source import RowsOfSamples, TeacherRows, TeacherSource


class CacheBesideTeacher:
    """Two sources of one teacher's rows: the cache for batches collated with its rows, a live teacher for others.

    Args:
        cached: the cache.
        live: the same teacher as a live model.
    """

    def __init__(self, cached: RowsOfSamples, live: TeacherSource) -> None:
        self.cached, self.live = cached, live
        self.num_classes = live.num_classes

    def to(self, device: torch.device | str) -> "CacheBesideTeacher":
        """Move the part of the cache that all batches share."""
        self.cached = self.cached.to(device)
        return self

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The cache's rows of samples."""
        return self.cached.collate(samples)

    def collate_ahead(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """The cache's rows of samples, which another thread reads meanwhile."""
        return self.cached.collate_ahead(samples)

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """The rows that came with a batch, else those of the live teacher."""
        source: TeacherSource = self.cached if "teacher" in batch else self.live
        return source.rows(batch, temperature)


def at_work(teacher: TeacherSource) -> TeacherSource:
    """The live part of a `CacheBesideTeacher`; any other source itself."""
    return teacher.live if isinstance(teacher, CacheBesideTeacher) else teacher


def from_cache(teacher: TeacherSource) -> TeacherSource:
    """The cache of a `CacheBesideTeacher`; any other source itself."""
    return teacher.cached if isinstance(teacher, CacheBesideTeacher) else teacher
