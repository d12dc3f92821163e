"""Collate a batch together with the teacher's rows of its samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..data import WEIGHT, DistillationCollator, with_borders, with_loss_rows
from .source import RowsOfSamples


class StepCollator:
    """Collates like another collator, and adds what a step would otherwise have to wait for.

    If samples have a `weight`, the batch has loss_weights [N] float32, one for each row with loss.

    Args:
        collate: the other collator.
        teacher: a source whose rows are added, such as a cache, or None.
        ahead: let another thread read these rows until the batch is moved to its device.
    """

    def __init__(self, collate: Callable[..., Any], teacher: RowsOfSamples | None, ahead: bool = False) -> None:
        self.collate, self.teacher, self.ahead = collate, teacher, ahead

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        teacher = self.teacher
        if teacher is None:
            return self._collated(samples)
        # First, so that reading starts at once.
        rows = teacher.collate_ahead(samples) if self.ahead else teacher.collate(samples)
        return {**self._collated(samples), "teacher": rows}

    def _collated(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        weights = [s[WEIGHT] for s in samples if WEIGHT in s]
        if weights:
            samples = [{k: v for k, v in s.items() if k != WEIGHT} for s in samples]
        if not isinstance(self.collate, DistillationCollator):
            # Other collators expect lists: with arrays, `[-100] + labels` would add numbers.
            samples = [{k: getattr(v, "tolist", lambda v=v: v)() for k, v in s.items()} for s in samples]
        batch = with_loss_rows(with_borders(self.collate(samples)))
        if weights:
            of_rows = np.repeat(np.array(weights, np.float32), batch["loss_counts"])
            batch["loss_weights"] = torch.from_numpy(of_rows)
        return batch
