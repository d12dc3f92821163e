"""The inputs of a loss after packing, the same for both orders of work.

Shape letters: N packed rows, D width, V classes, S student, T teacher.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import RowCoefficients, RowDivergence, SparseDivergence
from .head import Head, VocabularyShard


@dataclass(frozen=True)
class PackedRows:
    """Everything a loss needs besides the student's hidden states, weight and bias, which carry gradients.

    Args:
        teacher_ND: [N, D_T] hidden states. None for cross-entropy and entropy alone, or where `compact` gives D.
        teacher_head: turns them into logits; None if and only if `teacher_ND` is.
        labels_N: [N] int64, each below V.
        weights_N: [N] factor on each row's loss, or None for 1.
        divergence: D, or None where there is no teacher or `compact` gives it.
        coefficients: weights of cross-entropy and D, and the temperature.
        student_softcap: of the student's logits, or None.
        student_scale: factor on the student's logits.
        gemm_dtype: dtype of both heads' products; None: each head's own.
        logits_dtype: dtype of the logits; None: that of the products.
        backend: "triton", "compile", "eager" or "auto".
        memory_budget: bytes that the loss may allocate beyond inputs and gradients; None: the device's default.
        order: "rows" or "classes", whichever the outer loop is over, or "auto" for the faster one.
        compact: D for a teacher that is known at few classes.
        projection_ND: [N, D] the part of D's gradient on the hidden states that `compact` leaves out, times -T.
        student_NV: [N, V] the student's logits before the softcap, if they were computed already; overwritten.
        teacher_lse_N: [N] logarithm of the teacher's sum of e^(z/T) over the common classes, if it is known, from
            unrounded products in the dtype of its head.
        shard: this rank's classes, if the student's head has only those.
        standardize: whether D is of standardised logits.
    """

    teacher_ND: Tensor | None
    teacher_head: Head | None
    labels_N: Tensor
    weights_N: Tensor | None
    divergence: RowDivergence | None
    coefficients: RowCoefficients
    student_softcap: float | None = None
    student_scale: float = 1.0
    gemm_dtype: torch.dtype | None = None
    logits_dtype: torch.dtype | None = None
    backend: str = "auto"
    memory_budget: int | None = None
    order: str = "auto"
    compact: SparseDivergence | None = None
    projection_ND: Tensor | None = None
    student_NV: Tensor | None = None
    teacher_lse_N: Tensor | None = None
    shard: VocabularyShard | None = None
    standardize: bool = False

    def dtypes(self, hidden_ND: Tensor, head: Head) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes of a head's products with these hidden states, and of its logits."""
        if head.weight is None:
            return hidden_ND.dtype, hidden_ND.dtype
        products = self.gemm_dtype or head.weight.dtype
        return products, self.logits_dtype or products

    def missing(self, part: slice, weights_N: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[C, D] what `projection_ND` subtracts from the gradient on some rows' hidden states."""
        assert self.projection_ND is not None
        missing_CD = self.projection_ND[part].to(dtype) * (self.coefficients.divergence / self.coefficients.temperature)
        return missing_CD if weights_N is None else missing_CD * weights_N[part, None]


class Gradients(NamedTuple):
    """Gradients of the weighted sum of the rows' losses; None for those that nobody needs."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
