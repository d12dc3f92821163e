"""A cache for the samples that it holds, and a teacher that runs for all others, such as a student's fresh answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .source import RowsOfSamples, TeacherRows, TeacherSource


class CacheBesideTeacher:
    """Two sources of one teacher's rows. A batch that was collated with the cache's rows has them; others are run.

    Args:
        cached: the cache.
        live: the same teacher, at work.
    """

    def __init__(self, cached: RowsOfSamples, live: TeacherSource) -> None:
        self.cached, self.live = cached, live
        self.num_classes = live.num_classes

    def to(self, device: torch.device | str) -> "CacheBesideTeacher":
        """Move what the cache's batches share."""
        self.cached = self.cached.to(device)
        return self

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The cache's rows of samples."""
        return self.cached.collate(samples)

    def collate_ahead(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """The cache's rows of samples, while another thread reads them."""
        return self.cached.collate_ahead(samples)

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """The rows that came with a batch, else those of the teacher at work."""
        source: TeacherSource = self.cached if "teacher" in batch else self.live
        return source.rows(batch, temperature)


def at_work(teacher: Any) -> Any:
    """The part of a source that runs a model in a step: of one beside a cache that, else the source itself."""
    return teacher.live if isinstance(teacher, CacheBesideTeacher) else teacher


def from_cache(teacher: Any) -> Any:
    """The cache in a source that has one beside a model, else the source itself."""
    return teacher.cached if isinstance(teacher, CacheBesideTeacher) else teacher
