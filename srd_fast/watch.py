"""Reflection and training that go wrong, seen as soon as they do."""

import logging
import statistics
from collections import Counter
from collections.abc import Sequence

from .errors import NotFiniteError

logger = logging.getLogger(__name__)

# Logged values of a stage from which its trend is judged.
_LEAST_VALUES = 8
_SHOWN_IDS = 16
# Share of answers that are the same, from which they rank nothing; of fewer than so many it says little.
_ALIKE, _LEAST_ANSWERS = 0.9, 8


def warn_of_answers_alike(answers: Sequence[str]) -> None:
    """A warning where nearly all of a student's answers are empty, or one and the same."""
    if len(answers) < _LEAST_ANSWERS:
        return
    text, count = Counter(answers).most_common(1)[0]
    if count >= _ALIKE * len(answers):
        what = "empty" if not text else f"the same: {text[:60]!r}"
        logger.warning(
            "%d of %d of the student's answers are %s. They rank nothing; check that the student was warmed up, that "
            "its template is the one it was trained with, and max_new_tokens", count, len(answers), what,
        )  # fmt: skip


def not_finite(what: str, step: int, place: str, sample_ids: Sequence[str], checkpoint: str | None) -> NotFiniteError:
    """The error for optimizer step `step` (from 0). place: stage, temperature, learning rate."""
    shown = ", ".join(sample_ids[:_SHOWN_IDS]) + (", ..." if len(sample_ids) > _SHOWN_IDS else "")
    good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return NotFiniteError(
        f"step {step + 1}: {what} ({place}); the optimizer did not move, and {good}. The step's samples: {shown}. "
        "Look at them, lower learning_rate, or train in bf16 or float32 if this is fp16"
    )


class DivergenceTrend:
    """Warns at the end of a stage over which the divergence to the teacher has risen.

    Temperature and weights are constant in a stage, so its values are of one kind.
    """

    def __init__(self) -> None:
        self.stage, self.values = 0, list[float]()

    def add(self, stage: int, divergence: float) -> None:
        """A logged value of a stage (from 1)."""
        if stage != self.stage:
            self.end()
            self.stage = stage
        self.values.append(divergence)

    def end(self) -> None:
        """The stage is over."""
        values, self.values = self.values, []
        quarter = len(values) // 4
        if len(values) < _LEAST_VALUES:
            return
        first, last = statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])
        if last > first:
            logger.warning(
                "stage %d: the divergence to the teacher rose from %.4g to %.4g; check learning_rate (too high?), that "
                "teacher and student have one tokenizer and template, and the cache (srd-fast cache CONFIG --force)",
                self.stage, first, last,
            )  # fmt: skip
