"""`distillation_loss`: the distillation loss of SRD from hidden states, or from logits where a loop has them already.

    loss = sft_weight * CE(labels, student) + (1 - sft_weight) * scale * D(teacher, student)

with D over softmaxes at `temperature` and scale = temperature^2 (Hinton et al., arXiv 1503.02531) or 1.
"""

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .head import Head
from .options import LossOptions, check_names
from .packing import (
    DistillationOutput,
    StudentRows,
    check_head_numbers,
    check_num_items,
    check_side,
    check_vocabularies,
)


def loss_beside_head(
    student: Tensor,
    student_head: Head,
    teacher: Tensor,
    teacher_head: Head,
    labels: Tensor,
    options: LossOptions,
    *,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    student_logits: Tensor | None = None,
) -> DistillationOutput:
    """`distillation_loss` of heads, with options that were checked before; what is of the batch alone as there."""
    rows = StudentRows(student, student_head, labels, options, token_weights, num_items, student_logits)
    check_side("teacher", teacher, teacher_head, labels)
    check_vocabularies(student_head.num_classes(student), teacher_head.num_classes(teacher))
    return rows.loss(teacher_ND=rows.of_rows(teacher), teacher_head=teacher_head, divergence=options.row_divergence)


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
) -> DistillationOutput:
    """Distillation loss from last hidden states; the gradient flows into the student's hidden states, weight and bias.

    Rows with `labels == ignore_index` are packed out first and cost nothing; the others run through both heads a chunk
    at a time. The GEMMs run in each head's dtype, or autocast's where that is on; softmaxes and reductions in float32
    (float64 for float64 input).

    Args:
        student_hidden: [..., D_S] last hidden states after the final norm, any float dtype.
        student_weight: [V_S, D_S] head.
        teacher_hidden: [..., D_T]; teacher_weight: [V_T, D_T]. Neither receives a gradient.
        labels: [...] class indices aligned with the hidden states (shifted already), or `ignore_index`.
        divergence: a name from `divergence_names()`.
        temperature: T > 0 of both softmaxes in D. Cross-entropy and entropy are at temperature 1.
        skew: s of the skew divergences, 0 to 1. beta: of the JSD, 0 (forward KL) to 1 (reverse KL).
        sft_weight: a, 0 to 1, weight of the cross-entropy on the labels.
        temperature_scaling: multiply D by T^2.
        student_bias, teacher_bias: [V]. *_softcap: c of c * tanh(z / c). *_scale: factor on the logits.
        token_weights: [...] factor on each token's loss; it does not enter `num_items`.
        num_items: denominator of the mean, e.g. the tokens of all accumulation steps and ranks. Default: those here.
        reduction: "mean", "sum" or "none" (one value per label, 0 where ignored).
        ignore_index: label without loss; None: every label has one, and a GPU need not be asked how many.
        backend: "triton" (a GPU), "compile" (`torch.compile`, for a CPU), "eager", or "auto": Triton on a GPU, compile
            on a CPU from 16,384 classes on, else eager.
        memory_budget: bytes for a chunk's working memory. Default 1 GiB on CUDA, 512 MiB elsewhere.
        logits_dtype: None for the dtype of the GEMMs, or torch.float32: with narrower heads the logits are then not
            rounded, which takes twice the memory and makes the gradient an order of magnitude more exact.
        student_logits: [..., V_S] before the softcap, in the dtype of the GEMMs, where they were computed already; it
            saves their product, and they are overwritten.

    V_S and V_T may differ by padding: D is then over the common classes, the rest over all of the student's.

    Raises:
        UserError (a ValueError) that names the argument, its value and what it should be.

    Example:
        >>> import torch
        >>> h_S, w_S, h_T, w_T = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(2, 3, 16), torch.randn(11, 16)
        >>> labels = torch.tensor([[-100, 4, 2], [-100, -100, 0]])
        >>> out = distillation_loss(h_S.requires_grad_(), w_S, h_T, w_T, labels, divergence="jsd")
        >>> out.loss.backward()
        >>> int(out.num_items), h_S.grad[0, 0].abs().sum().item()
        (3, 0.0)
    """
    options = LossOptions(
        divergence, temperature, skew, beta, sft_weight, temperature_scaling, reduction, ignore_index, backend,
        memory_budget, logits_dtype,
    )  # fmt: skip
    return loss_beside_head(
        student_hidden,
        Head(student_weight, student_bias, student_softcap, student_scale),
        teacher_hidden,
        Head(teacher_weight, teacher_bias, teacher_softcap, teacher_scale),
        labels,
        options,
        token_weights=token_weights,
        num_items=num_items,
        student_logits=student_logits,
    )


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
) -> DistillationOutput:
    """`distillation_loss` for loops that have logits: [..., V_S] and [..., V_T]. Everything else as there."""
    options = LossOptions(
        divergence, temperature, skew, beta, sft_weight, temperature_scaling, reduction, ignore_index, backend,
        memory_budget,
    )  # fmt: skip
    student_head, teacher_head = Head(None, None, student_softcap), Head(None, None, teacher_softcap)
    data: dict[str, Any] = {"token_weights": token_weights, "num_items": num_items}
    return loss_beside_head(student_logits, student_head, teacher_logits, teacher_head, labels, options, **data)


class DistillationLoss(nn.Module):
    """`distillation_loss` with its options fixed: `DistillationLoss(divergence="jsd", temperature=2.0)(h, w, ...)`.

    Options may be given again in the call, where they win. Their names are those of `distillation_loss`.
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
        """See `distillation_loss`."""
        merged = {**self.options, **options}
        return distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **merged)

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
