"""The distillation loss with a teacher that is known by a few numbers a row, such as those that a cache on disk keeps.

Shape letters: N rows with loss, in the order of `labels.flatten()`; R some of them; K classes of a row; B = K + 1
buckets; V classes; D width. p, q: softmaxes of teacher and student at the temperature T of the call; z: the student's
logits.

    TopK        D of p and q over K classes and one bucket for all others. Any divergence.
    Sampled     K draws of p. The expected loss is KL(p, q), the expected gradient its gradient.
    Projected   KL(p, q) exactly, where the student's head is frozen: sum_v p_v z_v is linear in the hidden state.

Buckets: with w as in `srd_fast.kernels.divergences` and S = sum(w) over the buckets, dD/d(z_v/T) is w_v - q_v S for a
class with a bucket of its own, and q_v (w_rest / q_rest - S) for the others.

Sampled: the KL's gradient depends on p only through a mean over p, and so does the KL once the entropy is known. The
mean over draws is therefore unbiased for both (Anshumann et al., Sparse Logit Sampling, arXiv 2503.16870).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import LOGIT_FLOOR, RowDivergence, SparseDivergence
from .divergences import get_divergence
from .head import Head, VocabularyShard
from .options import LossOptions, require
from .packing import DistillationOutput, StudentRows, check_classes
from .vocabulary import head_of, plain, refusing_together


class TopK(NamedTuple):
    """A teacher known by K classes of each row, usually the likeliest, and one bucket for all other classes.

    Attributes:
        ids_NK: [N, K] int64, the classes, distinct within a row; K from 1 to V.
        log_p_NK: [N, K] their log-probabilities in the full softmax at T, in nats, float32 or float64.
        log_tail_N: [N] logarithm of the probability of all other classes together, in nats; -inf for none.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor


class Sampled(NamedTuple):
    """A teacher known by draws from each row's softmax.

    Attributes:
        ids_NK: [N, K] int64, K draws with replacement from the softmax at T.
        entropy_N: [N] the exact entropy of that softmax, in nats.
    """

    ids_NK: Tensor
    entropy_N: Tensor


class Projected(NamedTuple):
    """A teacher known by the mean of the student's head under each row's softmax p at T.

    Attributes:
        projection_ND: [N, D] p @ weight * scale, D the student's width.
        entropy_N: [N] entropy of p, in nats.
        bias_N: [N] p @ bias * scale; zeros where the head has no bias.
    """

    projection_ND: Tensor
    entropy_N: Tensor
    bias_N: Tensor


CompactTeacher = TopK | Sampled | Projected


@dataclass(frozen=True)
class _Buckets(SparseDivergence):
    """The divergence for `TopK`. log_p_CB: the teacher's log-probabilities, the bucket of all other classes last."""

    log_p_CB: Tensor
    divergence: RowDivergence
    apart = True

    def __call__(self, log_q_CB: Tensor, log_sum_C1: Tensor) -> tuple[Tensor, Tensor]:
        log_p_CB = self.log_p_CB.to(log_q_CB.dtype).clamp(min=LOGIT_FLOOR)
        value_C, w_CB = self.divergence(log_p_CB, log_q_CB)
        return value_C[:, None], w_CB - log_q_CB.exp() * w_CB.sum(1, keepdim=True)


@dataclass(frozen=True)
class _Draws(SparseDivergence):
    """The forward KL for `Sampled`."""

    ids_CK: Tensor
    entropy_C: Tensor
    apart = False

    def __call__(self, log_q_CB: Tensor, log_sum_C1: Tensor) -> tuple[Tensor, Tensor]:
        sorted_CK = self.ids_CK.sort(1).values
        ends_CK = torch.searchsorted(sorted_CK, self.ids_CK, right=True)
        count_CK = ends_CK - torch.searchsorted(sorted_CK, self.ids_CK)
        value_C1 = -log_q_CB[:, :-1].mean(1, keepdim=True) - self.entropy_C[:, None]
        gradient_CB = log_q_CB.exp()
        gradient_CB[:, :-1] -= count_CK.to(log_q_CB.dtype) / count_CK.shape[1]
        return value_C1, gradient_CB


@dataclass(frozen=True)
class _Mean(SparseDivergence):
    """The forward KL for `Projected`, without the projection's part of the gradient on the hidden states.

    known_C: all of D except the logarithm of the student's sum.
    """

    known_C: Tensor
    apart = False

    def __call__(self, log_q_CB: Tensor, log_sum_C1: Tensor) -> tuple[Tensor, Tensor]:
        return log_sum_C1 + self.known_C[:, None], log_q_CB.exp()


def _check_rows(teacher: CompactTeacher, student: StudentRows) -> None:
    """Refuse a teacher whose tensors do not have N rows, the device of the labels and the right kind of number."""
    kind, count, device = type(teacher).__name__, len(student.labels_N), student.labels.device
    for name, x in teacher._asdict().items():
        what = f"teacher.{name} of {kind}"
        require(isinstance(x, Tensor), f"{what} must be a tensor, got {type(x).__name__}")
        dimensions = 2 if name.endswith(("_NK", "_ND")) else 1
        require(
            x.dim() == dimensions and x.shape[0] == count,
            f"{what} has shape {tuple(x.shape)}, but must have {dimensions} dimension{'s' * (dimensions > 1)} and one "
            f"row for each of the {count} labels with loss",
        )
        require(x.device == device, f"{what} is on {x.device} and labels on {device}")
        if name == "ids_NK":
            require(x.dtype in (torch.int64, torch.int32), f"{what} must be int64, got {x.dtype}")
            require(x.shape[1] > 0, f"{what} must have at least one column, got shape {tuple(x.shape)}")
            check_classes(what, x, student.head.num_classes(student.hidden_ND))
        else:
            require(x.is_floating_point(), f"{what} must be floating point, got {x.dtype}")


def _check_top_k(teacher: TopK) -> None:
    require(
        teacher.log_p_NK.shape == teacher.ids_NK.shape,
        f"teacher.log_p_NK has shape {tuple(teacher.log_p_NK.shape)} and ids_NK {tuple(teacher.ids_NK.shape)}: they "
        "must be equal",
    )
    # As with labels, values on a GPU are not read: that would make the host wait.
    if teacher.ids_NK.device.type == "cpu":
        repeated_N = teacher.ids_NK.sort(1).values.diff(dim=1).eq(0).any(1).numpy()
        first = "".join(str(row) for row in repeated_N.nonzero()[0][:1])
        require(not first, f"teacher.ids_NK of TopK must be distinct within a row, row {first} repeats one")


def check_rest(name: str, teacher: str) -> None:
    """Refuse a divergence that needs every class by itself, for a teacher that has most classes in one bucket.

    Args:
        name: name of the divergence.
        teacher: what the message calls the teacher.

    Raises:
        UserError: the divergence needs every class.
    """
    formula = get_divergence(name).bind(0.0, 0.0).formula
    if formula is not None and formula.row_first is not None and formula.row_first.every_class:
        raise UserError(
            f"divergence {name!r} needs every class by itself, and {teacher} has most classes in one bucket: use the "
            "teacher's hidden states, or another divergence"
        )


def _check_projected(teacher: Projected, head: Head) -> None:
    assert head.weight is not None
    for name, x in (("student_weight", head.weight), ("student_bias", head.bias)):
        require(
            x is None or not x.requires_grad,
            f"{name} requires a gradient, but a Projected teacher holds for one head only: freeze it, or use TopK, "
            "Sampled or distillation_loss",
        )
    require(
        head.softcap is None,
        f"student_softcap must be None with a Projected teacher, got {head.softcap!r}: capped logits are not linear in "
        "the hidden state",
    )
    width = head.weight.shape[1]
    require(
        teacher.projection_ND.shape[1] == width,
        f"teacher.projection_ND is {teacher.projection_ND.shape[1]} wide but student_weight is [V, D] = "
        f"{tuple(head.weight.shape)}",
    )


def _known(teacher: Projected, student: StudentRows, temperature: float) -> Tensor:
    """Return -entropy - sum_v p_v z_v / T, [N]."""
    weight = student.head.weight
    assert weight is not None
    # Rounded as for the product with the head, so that both are off by the same error, which cancels.
    hidden_ND = student.hidden_ND.detach().to(student.gemm_dtype or weight.dtype).to(student.compute)
    mean_z_N = (hidden_ND * teacher.projection_ND).sum(1) + teacher.bias_N
    return (-teacher.entropy_N - mean_z_N / temperature).to(student.compute)


def compact_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: CompactTeacher,
    labels: Tensor,
    *,
    divergence: str = "skew_reverse_kl",
    temperature: float = 2.0,
    skew: float = 0.1,
    beta: float = 0.5,
    sft_weight: float = 0.1,
    temperature_scaling: bool = True,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    student_logits: Tensor | None = None,
    order: str = "auto",
    vocabulary: VocabularyShard | None = None,
) -> DistillationOutput:
    """Distillation loss with a teacher known by a few numbers a row, instead of by its hidden states and head.

    With `TopK`, D is over K classes and the bucket of all others: at most the full divergence, and equal to it from
    K = V - 1 on. With `Sampled`, loss and gradient are right on average over draws. With `Projected`, both are those of
    `distillation_loss`, but with a head in a narrow dtype the gradient is the small difference of two rounded products.

    Args:
        student_hidden: [..., D] last hidden states after the final norm, any float dtype.
        student_weight: [V, D] the student's head, or a DTensor that is divided by classes, see `distillation_loss`.
            With `Projected` it must not require a gradient.
        teacher: `TopK` with any divergence, or `Sampled` or `Projected` with "forward_kl". Its N rows belong to the
            labels with loss, in the order of `labels.flatten()`, and are for the same `temperature`. It receives no
            gradient.
        labels: [...] int64 or int32 class indices that belong to the hidden states (already shifted), or
            `ignore_index`.
        divergence: the name of D, one of `divergence_names()`.
        temperature: T, above 0. D compares the two softmaxes at T; cross-entropy and entropy are at temperature 1.
        skew: s of the skew divergences, 0 to 1. Other divergences ignore it.
        beta: beta of the JSD, 0 (forward KL) to 1 (reverse KL). Other divergences ignore it.
        sft_weight: weight of the cross-entropy on the labels, 0 to 1. D has the rest, 1 - sft_weight.
        temperature_scaling: multiply D by T^2 in the loss.
        student_bias: [V] bias of the student's head. With `Projected` it must not require a gradient.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c). None: they stay. With `Projected` it
            must be None.
        student_scale: factor above 0 on the student's logits, before the softcap.
        token_weights: [...] factor on each label's loss. It does not enter `num_items`.
        num_items: denominator of the mean, above 0: the tokens of all accumulation steps and ranks, for example.
            Default: the number of labels with loss here.
        reduction: "mean", "sum", or "none" for one value per label, 0 where the label is ignored.
        ignore_index: the label that has no loss. None: every label has one, which saves a wait for the GPU.
        backend: "compile" (`torch.compile`, on a CPU), "eager", or "auto": compile on a CPU from 16,384 classes on,
            else eager.
        memory_budget: bytes that the loss may allocate beyond its inputs (the rows with loss, once packed) and their
            gradients. If it needs more for the smallest chunk, it takes that. Default: a twentieth of a GPU's memory,
            at most 4 GiB, and 512 MiB elsewhere.
        logits_dtype: dtype of the logits: None for that of the matrix products, or torch.float32. With a head in a
            narrower dtype, float32 logits take twice the memory and make the gradient ten times more exact.
        student_logits: [..., V] the student's logits before the softcap, in the dtype of the matrix products, where
            they were computed already. That saves a product. They are overwritten.
        order: "rows" or "classes", whichever the outer loop is over, or "auto" for the one that is predicted to be
            faster within `memory_budget`. See `distillation_loss`.
        vocabulary: which classes `student_weight` has, if it is this rank's block of a vocabulary in shards.

    Returns:
        The loss and its parts.

    Raises:
        UserError: an argument is wrong. The message names the argument, its value and what it should be. It is a
            ValueError.

    Examples:
        >>> import torch
        >>> hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8)
        >>> labels = torch.tensor([[-100, 4, 2], [-100, -100, 0]])
        >>> top = torch.log_softmax(torch.randn(3, 11) / 2.0, -1).topk(4)
        >>> teacher = TopK(top.indices, top.values, torch.log1p(-top.values.exp().sum(1)))
        >>> out = compact_distillation_loss(hidden, weight, teacher, labels, divergence="jsd")
        >>> out.loss.backward()
        >>> int(out.num_items), hidden.grad[0, 0].abs().sum().item()
        (3, 0.0)
    """
    with refusing_together(vocabulary, student_weight):
        head = head_of(student_weight, student_bias, student_softcap, student_scale, vocabulary)
    with refusing_together(head.shard, student_weight):
        options = LossOptions(
            divergence, temperature, skew, beta, sft_weight, temperature_scaling, reduction, ignore_index, backend,
            memory_budget, logits_dtype, order,
        )  # fmt: skip
        student_hidden = plain("student_hidden", student_hidden)
        student = StudentRows(student_hidden, head, labels, options, token_weights, num_items, student_logits)
    return loss_beside_compact_teacher(student, teacher)


def loss_beside_compact_teacher(student: StudentRows, teacher: CompactTeacher) -> DistillationOutput:
    """Compute the loss of a student and a teacher that is known by a few numbers a row.

    Args:
        student: its rows with loss, the labels and the options.
        teacher: `TopK`, `Sampled` or `Projected`, with a row for each label with loss.

    Returns:
        The loss and its parts.

    Raises:
        UserError: the teacher is of another type, or does not fit the labels, the student or the divergence.
    """
    with refusing_together(student.head.shard, student.head.weight):
        divergence, projection_ND = _known_rows(student, teacher)
    return student.loss(compact=divergence, projection_ND=projection_ND)


def _known_rows(student: StudentRows, teacher: CompactTeacher) -> tuple[SparseDivergence, Tensor | None]:
    """Check the teacher, and return its D, and for `Projected` the projection, as `PackedRows` takes them."""
    head, options = student.head, student.options
    if not isinstance(teacher, (TopK, Sampled, Projected)):
        raise UserError(f"teacher must be a TopK, Sampled or Projected, got {type(teacher).__name__}")
    require(
        not options.standardize_logits,
        f"standardize_logits must be False with a {type(teacher).__name__} teacher: it lacks most logits of a row",
    )
    _check_rows(teacher, student)
    if isinstance(teacher, TopK):
        _check_top_k(teacher)
        check_rest(options.divergence, "a TopK teacher")
        ids_NK, log_p_NK, log_tail_N = (x.detach() for x in teacher)
        log_p_NB = torch.cat((log_p_NK, log_tail_N[:, None].to(log_p_NK.dtype)), 1)
        return _Buckets(ids_NK.long(), log_p_NB, options.row_divergence), None
    require(
        options.divergence == "forward_kl",
        f"divergence must be 'forward_kl' with a {type(teacher).__name__} teacher, got {options.divergence!r}",
    )
    if isinstance(teacher, Sampled):
        return _Draws(teacher.ids_NK.long().contiguous(), teacher.entropy_N.detach().to(student.compute)), None
    _check_projected(teacher, head)
    teacher = Projected(*(x.detach() for x in teacher))
    known_N = _known(teacher, student, options.temperature)
    return _Mean(None, known_N), teacher.projection_ND
