"""How far a student is from its teacher on a batch, and how much memory the process has used."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses import Head, LossOptions, StudentRows, token_cross_entropy
from ..models import hidden_states, through_head
from ..suggest import unknown_name
from ..teacher import TeacherSource, distillation_loss_of_rows, labels_with_loss, rows_with_loss

# Values of an evaluation during training, without the prefix "eval_". For each, lower is better.
METRICS = ("loss", "kl", "cross_entropy")
_FORWARD_KL = LossOptions("forward_kl", temperature=1.0, reduction="none", ignore_index=None)


def check_best_metric(
    name: str | None, sets: Sequence[str] = (), of_answers: Iterable[str] | None = None, teacher: bool = True
) -> None:
    """Refuse a `metric_for_best_model` that evaluations do not measure.

    Args:
        name: the metric's name.
        sets: names of the data sets, if there are several.
        of_answers: names of the metrics of generated answers; None if evaluations generate no answers.
        teacher: whether there is a teacher, with whom the student can be compared.

    Raises:
        UserError: the metric is unknown.
    """
    metrics = [*(x for x in METRICS if teacher or x != "kl"), *(of_answers or ())]
    known = [f"{of_set}_{metric}" for of_set in sets for metric in metrics] or metrics
    if name is not None and name.removeprefix("eval_") not in known:
        way = "; metrics of answers, such as rouge_l, are there with eval_generate" if of_answers is None else ""
        raise UserError(unknown_name("metric_for_best_model", name, known) + way)


class Divergences(NamedTuple):
    """Sums over the tokens of a batch, in nats.

    Attributes:
        kl: KL(teacher, student) at T = 1; 0 without a teacher.
        cross_entropy: the cross-entropy of the labels.
        num_tokens: the number of tokens.
    """

    kl: Tensor
    cross_entropy: Tensor
    num_tokens: Tensor


class TokenDivergences(NamedTuple):
    """Values of each of N tokens, in nats.

    Attributes:
        kl_N: [N] KL(teacher, student) at T = 1; 0 without a teacher.
        cross_entropy_N: [N] the cross-entropy of the labels.
    """

    kl_N: Tensor
    cross_entropy_N: Tensor

    def summed(self) -> Divergences:
        """The sums over the tokens."""
        tokens = torch.full((), len(self.kl_N), device=self.kl_N.device)
        return Divergences(self.kl_N.sum(), self.cross_entropy_N.sum(), tokens)


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
    return measure_tokens(student, teacher, inputs, look).summed()


@torch.no_grad()
def measure_tokens(
    student: nn.Module,
    teacher: TeacherSource | None,
    inputs: dict[str, Any],
    look: Callable[[Head, Tensor], None] | None = None,
) -> TokenDivergences:
    """Measure a student as `measure_batch` does, but return the values of single tokens.

    Args:
        student: a causal language model.
        teacher: source of the teacher's rows; None: `kl_N` is 0.
        inputs: a batch of the collator, on the student's device.
        look: gets the head and the [N, D] states of the tokens with loss too.

    Returns:
        The values of the tokens with loss, sample after sample.
    """
    labels_N = labels_with_loss(inputs)

    def measure(head: Head, hidden_ND: Tensor) -> TokenDivergences:
        if look is not None:
            look(head, hidden_ND)
        if teacher is None:
            losses = token_cross_entropy(hidden_ND, head, labels_N)
            return TokenDivergences(torch.zeros_like(losses), losses)
        out = distillation_loss_of_rows(StudentRows(hidden_ND, head, labels_N, _FORWARD_KL), teacher.rows(inputs, 1.0))
        return TokenDivergences(out.divergence, out.cross_entropy)

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
