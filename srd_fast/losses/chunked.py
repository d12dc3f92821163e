"""Loss and gradient from hidden states, a chunk of rows at a time, so that no larger logits tensor ever exists.

Shape letters: N packed rows, C rows of a chunk, D width, V classes, S student, T teacher. The gradient is computed in
the forward pass, chunk by chunk beside the loss, because the logits of a chunk are gone afterwards; `backward` only
scales it. Where the factors on the rows are known in `backward` alone (one loss per row, or a second backward through a
retained graph), the chunks run once more.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import EAGER_BUFFERS, RowCoefficients, RowDivergence, RowValues
from .backends import row_backend
from .buffers import GradientSum, chunk_rows, scale_in_place, workspace
from .head import Head


@dataclass(frozen=True)
class PackedRows:
    """All of a loss but the tensors that carry gradients.

    teacher_ND / teacher_head: both None for cross-entropy and entropy alone. labels_N: below V. weights_N: factor on
    each row's loss or None for 1. gemm_dtype: of the heads' products, None for each head's own. logits_dtype: of the
    logits, None for that of the products.
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


class _Gradients(NamedTuple):
    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


class _Side:
    """A model's rows and head as the products take them, and where its logits go."""

    def __init__(self, name: str, hidden_ND: Tensor, head: Head, rows: PackedRows) -> None:
        self.name, self.hidden_ND = name, hidden_ND
        self.head = head if rows.gemm_dtype is None else head.to(rows.gemm_dtype)
        self.classes = head.num_classes(hidden_ND)
        weight = self.head.weight
        self.gemm_dtype = hidden_ND.dtype if weight is None else weight.dtype
        self.dtype = self.gemm_dtype if weight is None else rows.logits_dtype or self.gemm_dtype

    def logits(self, part: slice) -> Tensor:
        """[C, V] in the workspace; without a weight the rows as they are."""
        hidden_CD = self.hidden_ND[part]
        if self.head.weight is None:
            return hidden_CD
        device = hidden_CD.device
        return self.head.project(hidden_CD, workspace.take(self.name, len(hidden_CD), self.classes, self.dtype, device))


def run_chunks(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[RowValues, _Gradients]:
    """Per-row values of all rows, and the gradients asked for (hidden, weight, bias) of sum(weights * loss)."""
    n, device = hidden_ND.shape[0], hidden_ND.device
    student, teacher = _Side("student", hidden_ND, head, rows), None
    if rows.teacher_ND is not None and rows.teacher_head is not None:
        teacher = _Side("teacher", rows.teacher_ND, rows.teacher_head, rows)
    sides = [side for side in (student, teacher) if side is not None]
    most_classes = max(side.classes for side in sides)
    owned = all(side.head.weight is not None for side in sides)
    row_function, backend = row_backend(rows.backend, device, student.dtype, most_classes, rows.divergence, owned)

    # The gradient replaces the logits unless those are wider than the products, or not ours to write.
    separate = any(needs) and student.dtype != student.gemm_dtype
    logits_bytes = sum(side.classes * side.dtype.itemsize for side in sides)
    logits_bytes += separate * student.classes * student.gemm_dtype.itemsize
    wide = torch.promote_types(student.dtype, torch.float32)
    temporary_bytes = EAGER_BUFFERS * most_classes * wide.itemsize if backend == "eager" else 0
    chunk = chunk_rows(n, logits_bytes, temporary_bytes, device, rows.memory_budget)

    d_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs[0] else None
    sums = [
        GradientSum(x, name, student.gemm_dtype, several=n > chunk, anything=n > 0)
        if x is not None and needed
        else None
        for x, name, needed in ((head.weight, "d_weight", needs[1]), (head.bias, "d_bias", needs[2]))
    ]
    values = RowValues(*(torch.empty(n, dtype=wide, device=device) for _ in range(3)))
    for start in range(0, n, chunk):
        part = slice(start, min(start + chunk, n))
        student_CV = student.logits(part)
        g_CV = student_CV if any(needs) else None
        if separate:
            g_CV = workspace.take("gradient", part.stop - start, student.classes, student.gemm_dtype, device)
        elif head.weight is None and d_hidden_ND is not None:
            g_CV = d_hidden_ND[part]
        of_chunk = row_function(
            student_CV,
            None if teacher is None else teacher.logits(part),
            rows.labels_N[part],
            rows.divergence,
            rows.coefficients,
            student_softcap=head.softcap,
            teacher_softcap=None if teacher is None else teacher.head.softcap,
            row_weights_C=None if weights_N is None else weights_N[part],
            gradient_CV=g_CV,
        )
        for whole, piece in zip(values, of_chunk):
            whole[part] = piece
        if g_CV is None or head.weight is None:
            continue
        if d_hidden_ND is not None:
            _write_hidden(d_hidden_ND[part], g_CV, student.head)
        for total in sums:
            if total is not None:
                total.add(g_CV, hidden_ND[part], head.scale, first=start == 0, last=part.stop == n)
    return values, _Gradients(d_hidden_ND, *(None if x is None else x.total for x in sums))


def _write_hidden(target_CD: Tensor, g_CV: Tensor, head: Head) -> None:
    assert head.weight is not None
    if target_CD.dtype == g_CV.dtype:
        torch.mm(g_CV, head.weight, out=target_CD)
    else:
        target_CD.copy_(torch.mm(g_CV, head.weight))
    if head.scale != 1.0:
        target_CD *= head.scale


class ChunkedLoss(torch.autograd.Function):
    """(hidden_ND, weight, bias, rows, per_row, gradient) -> loss, divergence_N, cross_entropy_N, entropy_N.

    loss is the weighted sum over the rows, or [N] with `per_row`; the other three carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: PackedRows,
        per_row: bool,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = Head(weight, bias, rows.student_softcap, rows.student_scale)
        # Autograd says what needs a gradient even where gradients are switched off.
        needs = ctx.needs_input_grad[:3] if gradient and not per_row else (False, False, False)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            values, grads = run_chunks(hidden_ND, head, rows, rows.weights_N, needs)
        loss_N = rows.coefficients.cross_entropy * values.cross_entropy
        loss_N = loss_N + rows.coefficients.divergence * values.divergence
        if rows.weights_N is not None:
            loss_N = loss_N * rows.weights_N
        ctx.rows = rows
        ctx.grads = None if per_row else grads
        ctx.save_for_backward(hidden_ND, weight, bias)
        ctx.mark_non_differentiable(*values)
        return loss_N if per_row else loss_N.sum(), *values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        # Only create_graph=True switches gradients on here.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the distillation loss has no second derivative: call backward without create_graph=True"
            )
        grad_loss = grad_outputs[0]
        hidden_ND, weight, bias = ctx.saved_tensors
        rows: PackedRows = ctx.rows
        # Scaled in place and given away, so that there are never two of them.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            head = Head(weight, bias, rows.student_softcap, rows.student_scale)
            weights_N = grad_loss.expand(hidden_ND.shape[0])
            weights_N = weights_N if rows.weights_N is None else weights_N * rows.weights_N
            with torch.autocast(hidden_ND.device.type, enabled=False):
                _, grads = run_chunks(hidden_ND, head, rows, weights_N, ctx.needs_input_grad[:3])
        else:
            for g in grads:
                if g is not None:
                    scale_in_place(g, grad_loss)
        return (*grads, None, None, None)
