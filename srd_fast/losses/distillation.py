"""`distillation_loss`: the distillation loss of SRD from hidden states, or from logits where a loop has them already.

    loss = sft_weight * CE(labels, student) + (1 - sft_weight) * scale * D(teacher, student)

with D over softmaxes at `temperature` and scale = temperature^2 (Hinton et al., arXiv 1503.02531) or 1.
"""

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .head import Head, VocabularyShard
from .options import LossOptions, check_names
from .packing import (
    DistillationOutput,
    StudentRows,
    check_head_numbers,
    check_num_items,
    check_side,
    check_teacher_lse,
    check_teacher_shard,
    check_vocabularies,
)
from .vocabulary import head_of, plain, refusing_together


def loss_beside_head(
    student: StudentRows, teacher: Tensor, teacher_head: Head, teacher_lse: Tensor | None = None
) -> DistillationOutput:
    """Compute the loss of a student and a teacher that is known by its hidden states or logits.

    Args:
        student: its rows with loss, the labels and the options.
        teacher: [..., D_T] hidden states, or [..., V_T] logits if its head has no weight; [...] is the labels' shape.
        teacher_head: turns them into logits.
        teacher_lse: [...] as in `distillation_loss`.

    Returns:
        The loss and its parts.

    Raises:
        UserError: the teacher does not fit the labels or the student.
    """
    lse_N = None
    with refusing_together(student.head.shard, student.head.weight):
        check_side("teacher", teacher, teacher_head, student.labels)
        check_vocabularies(student.num_classes, teacher_head.num_classes(teacher))
        check_teacher_shard(teacher_head.shard, student.head.shard)
        if teacher_lse is not None:
            check_teacher_lse(teacher_lse, student.labels)
        if (
            teacher_lse is not None
            and teacher_head.weight is not None
            and student.gemm_dtype in (None, teacher_head.weight.dtype)
        ):
            lse_N = student.of_rows(teacher_lse)
    return student.loss(
        teacher_ND=student.of_rows(teacher),
        teacher_head=teacher_head,
        divergence=student.options.row_divergence,
        teacher_lse_N=lse_N,
    )


def distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    divergence: str = "skew_reverse_kl",
    temperature: float = 2.0,
    skew: float = 0.1,
    beta: float = 0.5,
    sft_weight: float = 0.1,
    temperature_scaling: bool = True,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    student_logits: Tensor | None = None,
    teacher_lse: Tensor | None = None,
    order: str = "auto",
    vocabulary: VocabularyShard | None = None,
    teacher_vocabulary: VocabularyShard | None = None,
    standardize_logits: bool = False,
) -> DistillationOutput:
    """Distillation loss from last hidden states; the gradient flows into the student's hidden states, weight and bias.

    Rows with `labels == ignore_index` are left out first and cost nothing. The others run through both heads a chunk at
    a time. Matrix products run in the dtype of each head, or of autocast where that is on; softmaxes and sums in
    float32 (float64 for float64 input). The two vocabularies may differ by padding: D is then over the classes that
    both have, everything else over all of the student's.

    Args:
        student_hidden: [..., D_S] last hidden states after the final norm, any float dtype.
        student_weight: [V_S, D_S] the student's head. A DTensor that is divided by classes is never gathered: all ranks
            of its mesh call this with the same rows, or with rows of their own and `vocabulary`. Its gradient is a
            DTensor.
        teacher_hidden: [..., D_T] the teacher's last hidden states. It receives no gradient.
        teacher_weight: [V_T, D_T] the teacher's head, or a DTensor. It receives no gradient.
        labels: [...] int64 or int32 class indices that belong to the hidden states (already shifted), or
            `ignore_index`.
        divergence: the name of D, one of `divergence_names()`.
        temperature: T, above 0. D compares the two softmaxes at T; cross-entropy and entropy are at temperature 1.
        skew: s of the skew divergences, 0 to 1. Other divergences ignore it.
        beta: beta of the JSD, 0 (forward KL) to 1 (reverse KL). Other divergences ignore it.
        sft_weight: weight of the cross-entropy on the labels, 0 to 1. D has the rest, 1 - sft_weight.
        temperature_scaling: multiply D by T^2 in the loss.
        student_bias: [V_S] bias of the student's head.
        teacher_bias: [V_T] bias of the teacher's head. It receives no gradient.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c). None: they stay.
        teacher_softcap: the same for the teacher's logits.
        student_scale: factor above 0 on the student's logits, before the softcap.
        teacher_scale: the same for the teacher's logits.
        token_weights: [...] factor on each label's loss. It does not enter `num_items`.
        num_items: denominator of the mean, above 0: the tokens of all accumulation steps and ranks, for example.
            Default: the number of labels with loss here.
        reduction: "mean", "sum", or "none" for one value per label, 0 where the label is ignored.
        ignore_index: the label that has no loss. None: every label has one, so a GPU need not be asked how many do.
        backend: "triton" (on a GPU), "compile" (`torch.compile`, on a CPU), "eager", or "auto": Triton on a GPU,
            compile on a CPU from 16,384 classes on, else eager.
        memory_budget: bytes that the loss may allocate beyond its inputs (the rows with loss, once packed) and their
            gradients; the least that it can do with where that is more. Default: a twentieth of a GPU's memory, at most
            4 GiB, and 512 MiB elsewhere.
        logits_dtype: dtype of the logits: None for that of the matrix products, or torch.float32. With heads in a
            narrower dtype, float32 logits take twice the memory and make the gradient ten times more exact.
        student_logits: [..., V_S] the student's logits before the softcap, in the dtype of the matrix products, where
            they were computed already. That saves a product. They are overwritten.
        teacher_lse: [...] log sum_v e^(z_v / T) of the teacher's logits z, after scale, bias and softcap, over the
            classes that both have, if it was computed when the teacher ran. It saves a product in the order "classes".
            The logits must be unrounded products in the dtype of the teacher's head. It is not used where autocast runs
            the products in another dtype.
        order: "rows": the outer loop is over chunks of rows, each of which sees all classes; working memory holds the
            logits of a chunk. "classes": the outer loop is over blocks of classes, each of which is computed for all
            rows, more than once; it needs almost no working memory. "auto": whichever is predicted to be faster within
            `memory_budget`.
        vocabulary: which classes `student_weight` has, if it is this rank's block of a vocabulary in shards.
        teacher_vocabulary: the same for `teacher_weight`. It may be whole beside a student in shards.
        standardize_logits: let D compare softmaxes at T of (z - mean) / deviation of each row's logits z (Sun et al.,
            arXiv 2403.01427). Mean and standard deviation are over the classes that both have, without logits of -inf.
            Cross-entropy and entropy stay those of z. The order is then "rows", and no vocabulary may be in shards.

    Returns:
        The loss and its parts. If each rank has rows of its own, they are those of this rank's rows.

    Raises:
        UserError: an argument is wrong. The message names the argument, its value and what it should be. It is a
            ValueError.

    Examples:
        >>> import torch
        >>> h_S, w_S, h_T, w_T = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(2, 3, 16), torch.randn(11, 16)
        >>> labels = torch.tensor([[-100, 4, 2], [-100, -100, 0]])
        >>> out = distillation_loss(h_S.requires_grad_(), w_S, h_T, w_T, labels, divergence="jsd")
        >>> out.loss.backward()
        >>> int(out.num_items), h_S.grad[0, 0].abs().sum().item()
        (3, 0.0)
    """
    with refusing_together(vocabulary, student_weight):
        head = head_of(student_weight, student_bias, student_softcap, student_scale, vocabulary)
    with refusing_together(head.shard, student_weight):
        options = LossOptions(
            divergence, temperature, skew, beta, sft_weight, temperature_scaling, reduction, ignore_index, backend,
            memory_budget, logits_dtype, order, standardize_logits,
        )  # fmt: skip
        teacher_head = head_of(
            teacher_weight, teacher_bias, teacher_softcap, teacher_scale, teacher_vocabulary, side="teacher"
        )
        student_hidden = plain("student_hidden", student_hidden)
        student = StudentRows(student_hidden, head, labels, options, token_weights, num_items, student_logits)
        teacher_hidden = plain("teacher_hidden", teacher_hidden)
    return loss_beside_head(student, teacher_hidden, teacher_head, teacher_lse)


def distillation_loss_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str = "skew_reverse_kl",
    temperature: float = 2.0,
    skew: float = 0.1,
    beta: float = 0.5,
    sft_weight: float = 0.1,
    temperature_scaling: bool = True,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    standardize_logits: bool = False,
) -> DistillationOutput:
    """Distillation loss for loops that have logits; the gradient flows into the student's logits.

    It computes the same as `distillation_loss`, but cannot save the memory of the logits, which exist already.

    Args:
        student_logits: [..., V_S] before the softcap, any float dtype.
        teacher_logits: [..., V_T] before the softcap, any float dtype. It receives no gradient. V_S and V_T may differ
            by padding: D is then over the classes that both have.
        labels: [...] int64 or int32 class indices that belong to the logits (already shifted), or `ignore_index`.
        divergence: the name of D, one of `divergence_names()`.
        temperature: T, above 0. D compares the two softmaxes at T; cross-entropy and entropy are at temperature 1.
        skew: s of the skew divergences, 0 to 1. Other divergences ignore it.
        beta: beta of the JSD, 0 (forward KL) to 1 (reverse KL). Other divergences ignore it.
        sft_weight: weight of the cross-entropy on the labels, 0 to 1. D has the rest, 1 - sft_weight.
        temperature_scaling: multiply D by T^2 in the loss.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c). None: they stay.
        teacher_softcap: the same for the teacher's logits.
        token_weights: [...] factor on each label's loss. It does not enter `num_items`.
        num_items: denominator of the mean, above 0: the tokens of all accumulation steps and ranks, for example.
            Default: the number of labels with loss here.
        reduction: "mean", "sum", or "none" for one value per label, 0 where the label is ignored.
        ignore_index: the label that has no loss. None: every label has one, so a GPU need not be asked how many do.
        backend: "triton" (on a GPU), "compile" (`torch.compile`, on a CPU), "eager", or "auto": Triton on a GPU,
            compile on a CPU from 16,384 classes on, else eager.
        memory_budget: bytes that the loss may allocate beyond its inputs (the rows with loss, once packed) and their
            gradients; the least that it can do with where that is more. Default: a twentieth of a GPU's memory, at most
            4 GiB, and 512 MiB elsewhere.
        standardize_logits: let D compare softmaxes at T of (z - mean) / deviation of each row's logits z (Sun et al.,
            arXiv 2403.01427). Mean and standard deviation are over the classes that both have, without logits of -inf.
            Cross-entropy and entropy stay those of z.

    Returns:
        The loss and its parts.

    Raises:
        UserError: an argument is wrong. The message names the argument, its value and what it should be. It is a
            ValueError.
    """
    options = LossOptions(
        divergence, temperature, skew, beta, sft_weight, temperature_scaling, reduction, ignore_index, backend,
        memory_budget, standardize_logits=standardize_logits,
    )  # fmt: skip
    student = StudentRows(student_logits, Head(None, None, student_softcap), labels, options, token_weights, num_items)
    return loss_beside_head(student, teacher_logits, Head(None, None, teacher_softcap))


class DistillationLoss(nn.Module):
    """`distillation_loss` as a module with fixed options, as in `DistillationLoss(divergence="jsd", temperature=2.0)`.

    Args:
        **options: keyword arguments of `distillation_loss`, such as `temperature` and `reduction`. A call may override
            them.

    Raises:
        UserError: an option is unknown or its value is wrong.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        keywords = inspect.signature(distillation_loss).parameters.values()
        check_names(list(options), [k.name for k in keywords if k.kind is k.KEYWORD_ONLY])
        of_loss = {f.name for f in fields(LossOptions)}
        LossOptions(**{name: value for name, value in options.items() if name in of_loss})
        for side in ("student", "teacher"):
            check_head_numbers(side, options.get(f"{side}_softcap"), options.get(f"{side}_scale", 1.0))
        check_num_items(options.get("num_items"))
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        **options: Any,
    ) -> DistillationOutput:
        """Compute `distillation_loss` with the module's options.

        Args:
            student_hidden: [..., D_S] last hidden states after the final norm, any float dtype.
            student_weight: [V_S, D_S] the student's head.
            teacher_hidden: [..., D_T] the teacher's last hidden states. It receives no gradient.
            teacher_weight: [V_T, D_T] the teacher's head. It receives no gradient.
            labels: [...] int64 or int32 class indices that belong to the hidden states (already shifted), or
                `ignore_index`.
            **options: keyword arguments of `distillation_loss`, used instead of the module's.

        Returns:
            The loss and its parts.

        Raises:
            UserError: an argument is wrong. The message names it, its value and what it should be.
        """
        merged = {**self.options, **options}
        return distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **merged)

    def extra_repr(self) -> str:
        """Show the options in the module's `repr`.

        Returns:
            The options that were given, as `name=value`.
        """
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
