"""Watch loss and gradient of every step without waiting for the device, and warn when training gets worse.

The host queues a step's work long before a GPU has done it, so it cannot know without waiting whether the step's loss
is finite. Here the device records the first step that is not finite. A flag on the device keeps a fused optimizer from
changing weights in that step and all later ones. The host learns of it from a copy that arrives later.
"""

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NotFiniteError

logger = logging.getLogger(__name__)

# With fewer logged values in a stage, no trend is computed.
_LEAST_VALUES = 8
# A stage whose last quarter is less than this times its first one counts as flat.
_RISE = 1.02
_SHOWN_IDS = 16


class BadStep(NamedTuple):
    """An optimizer step whose loss or gradient norm is NaN or infinite.

    Attributes:
        step: its number, from 0.
        loss: the step's loss.
        gradient_norm: the step's gradient norm.
    """

    step: int
    loss: float
    gradient_norm: float


class StepCheck:
    """Records the first step whose loss or gradient norm is not finite; until there is one, the last step.

    Args:
        device: the device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = torch.zeros(3, device=device)
        self._arrives: tuple[Tensor, Any] | None = None

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor | float) -> Tensor:
        """Record a step, before the optimizer makes it.

        Args:
            step: its number, from 0.
            loss: scalar.
            gradient_norm: scalar.

        Returns:
            Scalar float32 on the device: 0 until the first step that is not finite, 1 from that step on. Fused
            optimizers take it as `found_inf`, like that of `torch.amp.GradScaler`, and change nothing if it is 1.
        """
        this = torch.stack([self._scalar(x) for x in (step, loss, gradient_norm)])
        self._last = torch.where(self._last.isfinite().all(), this, self._last)
        return self._last.isfinite().all().logical_not().float()

    def _scalar(self, x: Tensor | float) -> Tensor:
        if isinstance(x, Tensor):
            return x.detach().float()
        return torch.full((), x, dtype=torch.float32, device=self.device)

    def look(self, wait: bool = False) -> BadStep | None:
        """The first bad step that the host knows of, or None. wait: first wait for the device."""
        if self.device.type != "cuda":
            return _bad(self._last)
        if wait:
            self._arrives = None
            return _bad(self._last.cpu())
        if self._arrives is not None:
            values, event = self._arrives
            if not event.query():
                return None
            self._arrives = None
            if (bad := _bad(values)) is not None:
                return bad
        # The device keeps the first bad step, so none is missed if some steps are not copied.
        event = torch.cuda.Event()
        values = torch.empty(3, pin_memory=True).copy_(self._last, non_blocking=True)
        event.record()
        self._arrives = values, event
        return None


def _bad(last: Tensor) -> BadStep | None:
    step, loss, norm = last.tolist()
    return None if math.isfinite(loss) and math.isfinite(norm) else BadStep(int(step), loss, norm)


def skips_on_the_device(optimizer: Any) -> bool:
    """Whether an optimizer changes nothing if its `found_inf` is 1, as torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def not_finite(what: str, step: int, place: str, sample_ids: Sequence[str], checkpoint: str | None) -> NotFiniteError:
    """Make the error for optimizer step `step` (from 0). place: stage, temperature, learning rate."""
    shown = ", ".join(sample_ids[:_SHOWN_IDS]) + (", ..." if len(sample_ids) > _SHOWN_IDS else "")
    good = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
    return NotFiniteError(
        f"step {step + 1}: {what} ({place}); the optimizer did not move, and {good}. The step's samples: {shown}. "
        "Look at them, lower learning_rate, or train in bf16 or float32 if this is fp16"
    )


class DivergenceTrend:
    """Warns at the end of a stage in which the divergence to the teacher has risen.

    Temperature and weights are constant in a stage, so its values can be compared.
    """

    def __init__(self) -> None:
        self.stage, self.values = 0, list[float]()

    def add(self, stage: int, divergence: float) -> None:
        """Record a logged value of a stage (from 1)."""
        if stage != self.stage:
            self.end()
            self.stage = stage
        self.values.append(divergence)

    def end(self) -> None:
        """Judge the stage's values, and forget them."""
        values, self.values = self.values, []
        quarter = len(values) // 4
        if len(values) < _LEAST_VALUES:
            return
        first, last = statistics.fmean(values[:quarter]), statistics.fmean(values[-quarter:])
        if last > _RISE * first:
            logger.warning(
                "stage %d: the divergence to the teacher rose from %.4g to %.4g; check learning_rate (too high?), that "
                "teacher and student have one tokenizer and template, and the cache (srd-fast cache CONFIG --force)",
                self.stage, first, last,
            )  # fmt: skip
