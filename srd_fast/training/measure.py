"""How far a student is from its teacher on a batch, and how much memory the process has used."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses import Head, LossOptions, StudentRows, token_cross_entropy
from ..models import hidden_states, through_head
from ..suggest import unknown_name
from ..teacher import TeacherSource, distillation_loss_of_rows, labels_with_loss, rows_with_loss

# What an evaluation during training gives, without the prefix "eval_". Of each, less is better.
METRICS = ("loss", "kl", "cross_entropy")
_FORWARD_KL = LossOptions("forward_kl", temperature=1.0, reduction="sum", ignore_index=None)


def check_best_metric(name: str | None, sets: Sequence[str] = ()) -> None:
    """Refuse a `metric_for_best_model` that evaluation does not give.

    Args:
        name: of the metric.
        sets: names of the data sets, where there are several.

    Raises:
        UserError: it is unknown.
    """
    known = [f"{of_set}_{metric}" for of_set in sets for metric in METRICS] or METRICS
    if name is not None and name.removeprefix("eval_") not in known:
        raise UserError(unknown_name("metric_for_best_model", name, known))


class Divergences(NamedTuple):
    """Sums over the tokens of a batch, in nats.

    Attributes:
        kl: KL(teacher, student) at T = 1; 0 without a teacher.
        cross_entropy: of the labels.
        num_tokens: how many tokens.
    """

    kl: Tensor
    cross_entropy: Tensor
    num_tokens: Tensor


@torch.no_grad()
def measure_batch(
    student: nn.Module,
    teacher: TeacherSource | None,
    inputs: dict[str, Any],
    look: Callable[[Head, Tensor], None] | None = None,
) -> Divergences:
    """Measure a student on a collated batch, without gradients and without full logits.

    Args:
        student: a causal language model.
        teacher: source of the teacher's rows; None: `kl` is 0.
        inputs: a batch of the collator, on the student's device.
        look: gets the head and the [N, D] states of the tokens with loss too.

    Returns:
        Sums over the batch's tokens.
    """
    labels_N = labels_with_loss(inputs)

    def measure(head: Head, hidden_ND: Tensor) -> Divergences:
        if look is not None:
            look(head, hidden_ND)
        if teacher is None:
            losses = token_cross_entropy(hidden_ND, head, labels_N)
            return Divergences(losses.new_zeros(()), losses.sum(), torch.tensor(len(labels_N), device=losses.device))
        out = distillation_loss_of_rows(StudentRows(hidden_ND, head, labels_N, _FORWARD_KL), teacher.rows(inputs, 1.0))
        # Not `num_items`, which a head in shards counts over all ranks.
        tokens = torch.full((), len(labels_N), device=labels_N.device)
        return Divergences(out.divergence, out.cross_entropy, tokens)

    return through_head(student, measure, rows_with_loss(hidden_states(student, inputs), inputs))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB: allocated on the CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
