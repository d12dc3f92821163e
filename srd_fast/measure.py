"""How far a student is from its teacher on a batch, and how much memory the process has used."""

import resource
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .losses import distillation_loss
from .models import find_head, last_hidden_state
from .teacher import TeacherSource


class Divergences(NamedTuple):
    """Sums over the tokens of a batch, in nats: KL(teacher, student) at T = 1, cross-entropy of the labels."""

    kl: Tensor
    cross_entropy: Tensor
    num_tokens: Tensor


@torch.no_grad()
def measure_batch(student: nn.Module, teacher: TeacherSource, inputs: dict[str, Any]) -> Divergences:
    """Measure a collated batch (input_ids, attention_mask, labels: [B, L]) without gradients or full logits."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    head, teacher_head = find_head(student), teacher.head
    out = distillation_loss(
        last_hidden_state(student, ids, mask)[:, :-1],
        head.weight,  # type: ignore[arg-type]
        teacher.hidden_states(ids, mask)[:, :-1],
        teacher_head.weight,  # type: ignore[arg-type]
        inputs["labels"][:, 1:],
        divergence="forward_kl",
        temperature=1.0,
        student_bias=head.bias,
        teacher_bias=teacher_head.bias,
        student_softcap=head.softcap,
        teacher_softcap=teacher_head.softcap,
        student_scale=head.scale,
        teacher_scale=teacher_head.scale,
        reduction="sum",
    )
    return Divergences(out.divergence, out.cross_entropy, out.num_items)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far, in MB: allocated on the CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
