"""How far a student is from its teacher on a batch, and how much memory the process has used."""

import resource
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .data import IGNORE_INDEX
from .losses import distillation_loss, token_cross_entropy
from .models import find_head, last_hidden_state
from .teacher import TeacherSource


class Divergences(NamedTuple):
    """Sums over the tokens of a batch, in nats: KL(teacher, student) at T = 1, cross-entropy of the labels."""

    kl: Tensor
    cross_entropy: Tensor
    num_tokens: Tensor


@torch.no_grad()
def measure_batch(student: nn.Module, teacher: TeacherSource | None, inputs: dict[str, Any]) -> Divergences:
    """Measure a collated batch (input_ids, attention_mask, labels: [B, L]) without gradients or full logits.

    Without a teacher `kl` is 0.
    """
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
    hidden_BLD, head = last_hidden_state(student, ids, mask)[:, :-1], find_head(student)
    if teacher is None:
        kept = labels != IGNORE_INDEX
        losses = token_cross_entropy(hidden_BLD[kept], head, labels[kept])
        return Divergences(losses.new_zeros(()), losses.sum(), kept.sum())
    out = distillation_loss(
        student_hidden=hidden_BLD,
        teacher_hidden=teacher.hidden_states(ids, mask)[:, :-1],
        labels=labels,
        divergence="forward_kl",
        temperature=1.0,
        reduction="sum",
        **head.arguments("student"),
        **teacher.head.arguments("teacher"),
    )
    return Divergences(out.divergence, out.cross_entropy, out.num_items)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far, in MB: allocated on the CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
