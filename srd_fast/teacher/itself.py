"""The student as its own teacher: as it was at the start, or as a moving average of what it has become since."""

import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..errors import UserError
from .live import LiveTeacher

# What `SRDTrainer` takes in place of a teacher.
SELF = "self"
_FILE = "teacher.safetensors"


def check_decay(decay: float | None, keeps_dtype: bool = False) -> None:
    """Refuse a decay of a moving average that is none.

    Args:
        decay: `self_ema_decay`.
        keeps_dtype: whether narrow weights are trained as they are: small parts of them vanish.

    Raises:
        UserError: with the way out.
    """
    number = isinstance(decay, (int, float)) and not isinstance(decay, bool)
    if decay is not None and not (number and 0 <= decay < 1):
        raise UserError(f"self_ema_decay must be from 0 to below 1, or null for a teacher that stays, got {decay!r}")
    if decay is not None and keeps_dtype:
        raise UserError("self_ema_decay needs weights in float32, and keep_student_dtype is true; set it to false")


class OwnTeacher(LiveTeacher):
    """A student's weights as they are now, as its teacher.

    Weights that are not trained stand in memory once, for both. So beside a student with adapters the teacher is the
    same model with the adapters as they began, which is, with adapters that begin at zero, the model without them.

    Args:
        student: a causal language model or an encoder-decoder model, whole, before it is trained.
        device: where it runs.
        dtype: of the training. A copy that shares nothing, and does not move, has it; any other has the student's
            dtype, and autocast to this one.
        decay: after each step the teacher becomes decay * teacher + (1 - decay) * student, 0 to below 1. None: it stays
            as it is.

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
        """Move towards the student, as it is now, where there is a decay."""
        if self.moves:
            self._average(list(self._mine.values()), self._theirs, 0)

    def save(self, checkpoint: Path) -> None:
        """Save a teacher that moves, before the file that completes the checkpoint."""
        if self.moves:
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_file({name: x.detach().contiguous() for name, x in self._mine.items()}, checkpoint / _FILE)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it has no teacher, or that of another student.
        """
        if not self.moves:
            return
        file = checkpoint / _FILE
        saved = load_file(file) if file.is_file() else {}
        if saved.keys() != self._mine.keys():
            raise UserError(
                f"resume_from_checkpoint: {str(checkpoint)!r} has no moving average of this student: it was saved "
                "without self_ema_decay, or of another one; start anew"
            )
        for name, mine in self._mine.items():
            mine.copy_(saved[name])
