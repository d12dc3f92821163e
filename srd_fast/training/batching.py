"""From the curriculum's samples to what a training step gets: batches, divided by tokens, with the teacher's rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from ..curriculum import Curriculum
from ..data import divide_by_tokens, with_loss_rows
from ..teacher import TeacherCache

MICRO_BATCHES = "micro_batches"
# Steps whose samples the system is told to read from the cache beforehand.
_AHEAD = 4


class IndexStream(Sampler[int]):
    """The curriculum's samples; tells `will_need` of those of each step a few steps before their turn."""

    def __init__(self, curriculum: Curriculum, will_need: Callable[[list[int]], None] | None = None) -> None:
        self.curriculum, self.will_need = curriculum, will_need

    def __iter__(self) -> Iterator[int]:
        size = self.curriculum.batch_size
        ahead = islice(self.curriculum.indices(), _AHEAD * size, None)
        for number, index in enumerate(self.curriculum.indices()):
            yield index
            if self.will_need is not None and number % size == 0 and (coming := list(islice(ahead, size))):
                self.will_need(coming)

    def __len__(self) -> int:
        return self.curriculum.sample_passes


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


class TokenBatches:
    """Collates the samples of a step as several micro-batches of at most so many tokens.

    The result has one key, `MICRO_BATCHES`.
    """

    def __init__(self, collate: StepCollator, max_tokens: int, flattened: bool) -> None:
        self.collate, self.max_tokens, self.flattened = collate, max_tokens, flattened

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(s["input_ids"]) for s in samples]
        parts = divide_by_tokens(lengths, self.max_tokens, self.flattened)
        return {MICRO_BATCHES: [self.collate([samples[i] for i in part]) for part in parts]}


def micro_batches(batch: Mapping[str, Any]) -> list[Any]:
    """The micro-batches of what a collator gave: itself, where it is not divided."""
    return batch.get(MICRO_BATCHES, [batch])


@contextmanager
def casts_kept() -> Iterator[None]:
    """Autocast keeps its copies of the weights from one micro-batch to the next, as it does within a forward pass.

    The weights must not change within, and nothing may run them with gradients switched off.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
