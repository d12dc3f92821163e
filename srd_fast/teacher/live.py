"""A teacher that runs beside the student."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses import Head
from ..models import check_head, find_head, last_hidden_state, unwrap


class TeacherSource(Protocol):
    """Gives the teacher's head, and its last hidden states for the rows of a batch."""

    head: Head

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L, D_T] last hidden states after the final norm, without gradient."""


class LiveTeacher:
    """A teacher in eval mode and its own dtype, outside autocast; its hidden states carry no gradient.

    `freeze` switches off the gradients of its parameters, so that no optimizer can train it.

    Raises:
        UserError for a quantised teacher, or one whose head cannot be rebuilt from its hidden states.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None, freeze: bool = True) -> None:
        if getattr(unwrap(model), "hf_quantizer", None) is not None:
            raise UserError("the teacher is quantised; distillation needs its full weights (bfloat16 is fine)")
        self.model = model.to(device) if device is not None else model
        self.model.eval()
        if freeze:
            self.model.requires_grad_(False)
        check_head(self.model, "teacher")
        self.head = find_head(self.model)

    @torch.no_grad()
    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L, D_T] last hidden states."""
        with torch.autocast(input_ids.device.type, enabled=False):
            return last_hidden_state(self.model, input_ids, attention_mask)
