"""Callbacks of each optimizer step."""

import time
from typing import Any

from transformers import TrainerCallback

from ..curriculum import Curriculum
from ..teacher import OwnTeacher


class StepHooks(TrainerCallback):
    """Clears the optimizer's state before the first step of each later stage, and sums the seconds that steps take.

    Evaluation and saving happen outside of steps, so they do not count in tokens per second.

    Args:
        curriculum: the schedule, which knows where stages begin.
        reset_optimizer: whether the optimizer's state is cleared.
    """

    def __init__(self, curriculum: Curriculum, reset_optimizer: bool) -> None:
        self.curriculum, self.reset_optimizer = curriculum, reset_optimizer
        self.seconds, self.steps, self._began = 0.0, 0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()
        if self.reset_optimizer and self.curriculum.is_stage_start(state.global_step):
            optimizer = kwargs["optimizer"]
            getattr(optimizer, "optimizer", optimizer).state.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.monotonic() - self._began
        self.steps += 1

    def take(self) -> tuple[float, int]:
        """Return seconds and steps since the last call, each at least a little above 0."""
        taken = max(self.seconds, 1e-9), max(self.steps, 1)
        self.seconds, self.steps = 0.0, 0
        return taken


class FollowStudent(TrainerCallback):
    """Moves a teacher towards its student after each optimizer step.

    Args:
        teacher: the teacher that is a moving average of its student.
    """

    def __init__(self, teacher: OwnTeacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.teacher.follow()
