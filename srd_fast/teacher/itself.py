"""The student as its own teacher: the starting student, or a moving average of the student."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import UserError
from .live import LiveTeacher

# What `SRDTrainer` takes as `teacher_model`.
SELF = "self"
_FILE = "teacher.safetensors"


def check_decay(decay: float | None, keeps_dtype: bool = False) -> None:
    """Refuse a decay that is out of range, or that cannot work in the weights' dtype.

    Args:
        decay: `self_ema_decay`.
        keeps_dtype: whether weights in bfloat16 or float16 are trained in that dtype, in which small changes vanish.

    Raises:
        UserError: the decay cannot be used.
    """
    number = isinstance(decay, (int, float)) and not isinstance(decay, bool)
    if decay is not None and not (number and 0 <= decay < 1):
        raise UserError(f"self_ema_decay must be from 0 to below 1, or null for a teacher that stays, got {decay!r}")
    if decay is not None and keeps_dtype:
        raise UserError("self_ema_decay needs weights in float32, and keep_student_dtype is true; set it to false")


class OwnTeacher(LiveTeacher):
    """A student's weights at the time of construction, as its teacher.

    Weights that are not trained are in memory only once, for both. So with adapters, the teacher is the same model with
    the initial adapters; if these begin at zero, that is the model without adapters.

    Args:
        student: a whole causal language model or encoder-decoder model, before it is trained.
        device: where it runs.
        dtype: the training's dtype. A teacher that shares no weights and has no decay is converted to it; any other
            keeps the student's dtype and runs with autocast to this one.
        decay: after each step the teacher becomes decay * teacher + (1 - decay) * student, 0 to below 1. None: the
            teacher does not change.

    Raises:
        UserError: as `LiveTeacher` raises it.
    """

    def __init__(
        self, student: nn.Module, device: torch.device | str, dtype: torch.dtype, decay: float | None = None
    ) -> None:
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        model = copy.deepcopy(student, dict(shared))
        alone = not shared and decay is None
        super().__init__(model.to(dtype) if alone else model, device, autocast=None if alone else dtype)
        pairs = zip(model.named_parameters(), student.parameters(), strict=True)
        trained = [(name, mine, theirs) for (name, mine), theirs in pairs if theirs.requires_grad]
        self._mine = {name: mine for name, mine, _ in trained}
        self._theirs = [theirs for _, _, theirs in trained]
        self.moves = decay is not None
        self._average = get_ema_multi_avg_fn(0.0 if decay is None else decay)

    @torch.no_grad()
    def follow(self) -> None:
        """Move towards the current student, if there is a decay."""
        if self.moves:
            self._average(list(self._mine.values()), self._theirs, 0)

    def save(self, checkpoint: Path) -> None:
        """Save a teacher that moves. This must come before the file that marks the checkpoint as complete."""
        if self.moves:
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_file({name: x.detach().contiguous() for name, x in self._mine.items()}, checkpoint / _FILE)

    def load(self, checkpoint: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            UserError: the checkpoint has no teacher, or another student's.
        """
        if not self.moves:
            return
        file = checkpoint / _FILE
        saved = load_file(file) if file.is_file() else {}
        if saved.keys() != self._mine.keys():
            raise UserError(
                f"resume_from_checkpoint: {str(checkpoint)!r} has no moving average of this student: it was saved "
                "without self_ema_decay, or with another student; start from the beginning"
            )
        for name, mine in self._mine.items():
            mine.copy_(saved[name])
