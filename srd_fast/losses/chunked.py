"""Loss and gradient from hidden states, a chunk of rows at a time, so that no larger logits tensor ever exists.

Shape letters: N packed rows, C rows of a chunk, D width, V classes. The gradient is computed in the forward pass, chunk
by chunk beside the loss, because the logits of a chunk are gone afterwards; `backward` only scales it. With one loss
per row the factors on the rows are known in `backward` alone, so there the chunks run once more.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import RowCoefficients, RowDivergence, RowValues, distillation_rows

# V-wide tensors of the compute dtype alive at once for a row of a chunk in the eager backend, both logits included.
_EAGER_BUFFERS = 10
_DEFAULT_BUDGET = {"cuda": 1 << 30}
_DEFAULT_BUDGET_ELSEWHERE = 256 << 20


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(z / softcap), z = scale * (hidden @ weight.T + bias).

    weight: [V, D], or None where the "hidden states" are logits already. bias: [V] or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def project(self, hidden_CD: Tensor) -> Tensor:
        """Logits before the softcap, [C, V], in the weight's dtype: a fresh tensor."""
        if self.weight is None:
            return hidden_CD.clone()
        logits_CV = torch.mm(hidden_CD.to(self.weight.dtype) * self.scale, self.weight.t())
        if self.bias is not None:
            logits_CV += self.bias.to(logits_CV.dtype) * self.scale
        return logits_CV

    def arguments(self, side: str) -> dict[str, Any]:
        """The head as keyword arguments of `distillation_loss`; side: "student" or "teacher"."""
        parts = {"weight": self.weight, "bias": self.bias, "softcap": self.softcap, "scale": self.scale}
        return {f"{side}_{name}": value for name, value in parts.items()}

    def num_classes(self, hidden: Tensor) -> int:
        """V."""
        return hidden.shape[-1] if self.weight is None else self.weight.shape[0]


@dataclass(frozen=True)
class PackedRows:
    """All of a loss but the tensors that carry gradients.

    teacher_ND / teacher_head: both None for cross-entropy and entropy alone. labels_N: below V. weights_N: factor on
    each row's loss or None for 1. chunk: rows at a time.
    """

    teacher_ND: Tensor | None
    teacher_head: Head | None
    labels_N: Tensor
    weights_N: Tensor | None
    divergence: RowDivergence | None
    coefficients: RowCoefficients
    chunk: int
    student_softcap: float | None = None
    student_scale: float = 1.0


class _Gradients(NamedTuple):
    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def rows_per_chunk(num_classes: int, device: torch.device, dtype: torch.dtype, memory_budget: int | None) -> int:
    """Rows whose working memory fits in `memory_budget` bytes (default: 1 GiB on CUDA, else 256 MiB), at least 1."""
    budget = memory_budget or _DEFAULT_BUDGET.get(device.type, _DEFAULT_BUDGET_ELSEWHERE)
    itemsize = max(dtype.itemsize, torch.float32.itemsize)
    return max(1, budget // (num_classes * itemsize * _EAGER_BUFFERS))


def run_chunks(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[RowValues, _Gradients]:
    """Per-row values of all rows, and the gradients asked for (hidden, weight, bias) of sum(weights * loss)."""
    n = hidden_ND.shape[0]
    accumulate = torch.promote_types(hidden_ND.dtype, torch.float32)
    values = RowValues(*(torch.empty(n, dtype=accumulate, device=hidden_ND.device) for _ in range(3)))
    grads = _Gradients(
        torch.empty_like(hidden_ND) if needs[0] else None,
        torch.zeros_like(head.weight, dtype=accumulate) if needs[1] and head.weight is not None else None,
        torch.zeros_like(head.bias, dtype=accumulate) if needs[2] and head.bias is not None else None,
    )
    for start in range(0, n, rows.chunk):
        part = slice(start, start + rows.chunk)
        g_CV = head.project(hidden_ND[part])
        teacher_CV = None
        if rows.teacher_ND is not None and rows.teacher_head is not None:
            teacher_CV = rows.teacher_head.project(rows.teacher_ND[part])
        chunk_values = distillation_rows(
            g_CV,
            teacher_CV,
            rows.labels_N[part],
            rows.divergence,
            rows.coefficients,
            student_softcap=head.softcap,
            teacher_softcap=None if rows.teacher_head is None else rows.teacher_head.softcap,
            row_weights_C=None if weights_N is None else weights_N[part],
            gradient=any(needs),
        )
        for whole, piece in zip(values, chunk_values):
            whole[part] = piece
        if grads.hidden_ND is not None:
            back = g_CV if head.weight is None else torch.mm(g_CV, head.weight) * head.scale
            grads.hidden_ND[part] = back.to(hidden_ND.dtype)
        if grads.weight_VD is not None:
            scaled_CD = hidden_ND[part].to(g_CV.dtype) * head.scale
            grads.weight_VD.add_(torch.mm(g_CV.t(), scaled_CD))
        if grads.bias_V is not None:
            grads.bias_V.add_(g_CV.sum(0, dtype=accumulate), alpha=head.scale)
    return values, grads


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
        ctx.per_row, ctx.rows = per_row, rows
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden_ND, weight, bias))
        if per_row:
            ctx.save_for_backward(hidden_ND, weight, bias)
        else:
            ctx.grads = grads
        ctx.mark_non_differentiable(*values)
        return loss_N if per_row else loss_N.sum(), *values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        grad_loss = grad_outputs[0]
        if ctx.per_row:
            hidden_ND, weight, bias = ctx.saved_tensors
            rows: PackedRows = ctx.rows
            head = Head(weight, bias, rows.student_softcap, rows.student_scale)
            weights_N = grad_loss if rows.weights_N is None else grad_loss * rows.weights_N
            with torch.autocast(hidden_ND.device.type, enabled=False):
                _, grads = run_chunks(hidden_ND, head, rows, weights_N, ctx.needs_input_grad[:3])
        else:
            grads = _Gradients(*(None if g is None else g * grad_loss.to(g.dtype) for g in ctx.grads))
        cast = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return (*cast, None, None, None)
