"""Loss and gradient from hidden states, a chunk of rows at a time, so that no larger logits tensor ever exists.

Shape letters: N packed rows, C rows of a chunk, D width, V classes, S student, T teacher.

The forward pass computes the gradient together with the loss, chunk by chunk, because the logits of a chunk are gone
afterwards; `backward` only scales it. In two cases the factors on the rows are known only in `backward`: with one loss
per row, and in a second backward through a retained graph. The chunks then run a second time.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import EAGER_BUFFERS, RowCoefficients, RowDivergence, RowValues, SparseDivergence, compact_rows
from .backends import compact_backend, row_backend
from .buffers import GradientSum, budget_of, chunk_rows, halve_budget, is_out_of_memory, scale_in_place, workspace
from .head import Head

logger = logging.getLogger(__name__)


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
        memory_budget: bytes of working memory of a chunk; None: the device's default.
        compact: D for a teacher that is known at few classes.
        projection_ND: [N, D] the part of D's gradient on the hidden states that `compact` leaves out, times -T.
        student_NV: [N, V] the student's logits before the softcap, where they were computed already; overwritten.
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
    compact: SparseDivergence | None = None
    projection_ND: Tensor | None = None
    student_NV: Tensor | None = None


class _Gradients(NamedTuple):
    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


class _Side:
    """One model's rows and head in the dtype of the products, and the place of its logits."""

    def __init__(
        self, name: str, hidden_ND: Tensor, head: Head, rows: PackedRows, logits_NV: Tensor | None = None
    ) -> None:
        self.name, self.hidden_ND, self.logits_NV = name, hidden_ND, logits_NV
        self.head = head if rows.gemm_dtype is None else head.to(rows.gemm_dtype)
        self.classes = head.num_classes(hidden_ND)
        weight = self.head.weight
        self.gemm_dtype = hidden_ND.dtype if weight is None else weight.dtype
        self.dtype = self.gemm_dtype if weight is None else rows.logits_dtype or self.gemm_dtype

    def logits(self, part: slice) -> Tensor:
        """[C, V] in the workspace. Given logits, and rows of a head without weight, are returned as they are."""
        if self.logits_NV is not None:
            return self.logits_NV[part]
        hidden_CD = self.hidden_ND[part]
        if self.head.weight is None:
            return hidden_CD
        device = hidden_CD.device
        return self.head.project(hidden_CD, workspace.take(self.name, len(hidden_CD), self.classes, self.dtype, device))

    @property
    def owned(self) -> bool:
        """Whether the logits are in the workspace."""
        return self.head.weight is not None and self.logits_NV is None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's logits in the workspace."""
        return 0 if self.logits_NV is not None else self.classes * self.dtype.itemsize


class _ChunkRows:
    """The row loss of a chunk, with the teacher's logits or what is known of them.

    teacher: the side with the teacher's head, or None.
    """

    def __init__(self, student: _Side, rows: PackedRows) -> None:
        self.rows, self.student, self.teacher = rows, student, None
        self._function: Callable[..., RowValues]
        if rows.compact is not None:
            self.backend = compact_backend(rows.backend, student.hidden_ND.device, student.dtype, student.classes)
            return
        if rows.teacher_ND is not None and rows.teacher_head is not None:
            # If the student's logits were given, the buffer in which they were computed is free.
            name = "teacher" if rows.student_NV is None else "student"
            self.teacher = _Side(name, rows.teacher_ND, rows.teacher_head, rows)
        device, divergence, sides = student.hidden_ND.device, rows.divergence, self.sides
        most_classes, owned = max(s.classes for s in sides), all(s.owned for s in sides)
        self._function, self.backend = row_backend(rows.backend, device, student.dtype, most_classes, divergence, owned)

    @property
    def sides(self) -> list[_Side]:
        """The models whose logits a chunk holds."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def __call__(self, part: slice, student_CV: Tensor, **options: Any) -> RowValues:
        """Run `distillation_rows` or `compact_rows` on a part. options: row_weights_C, gradient_CV."""
        rows, labels_C = self.rows, self.rows.labels_N[part]
        options["student_softcap"] = self.student.head.softcap
        if rows.compact is not None:
            compiled = self.backend == "compile"
            return compact_rows(
                student_CV, rows.compact.rows(part), labels_C, rows.coefficients, compiled=compiled, **options
            )
        teacher_CV = None
        if self.teacher is not None:
            teacher_CV, options["teacher_softcap"] = self.teacher.logits(part), self.teacher.head.softcap
        return self._function(student_CV, teacher_CV, labels_C, rows.divergence, rows.coefficients, **options)


# Called with the samples, rows, student's logits and values of a chunk, before the next chunk overwrites the logits.
Visitor = Callable[[slice, slice, Tensor, RowValues], None]


def _whole_samples(counts: Sequence[int], most: int) -> list[tuple[slice, slice]]:
    """Divide samples into chunks as (samples, rows): whole samples, at most `most` rows, or one longer sample."""
    chunks: list[tuple[slice, slice]] = []
    first, begin, end = 0, 0, 0
    for i, count in enumerate(counts):
        if i > first and end + count - begin > most:
            chunks.append((slice(first, i), slice(begin, end)))
            first, begin = i, end
        end += count
    return [*chunks, (slice(first, len(counts)), slice(begin, end))] if counts else chunks


def run_chunks(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    counts: Sequence[int] | None = None,
    visit: Visitor | None = None,
) -> tuple[RowValues, _Gradients]:
    """Compute the values of all rows, and the gradients of sum(weights * loss).

    Args:
        hidden_ND: [N, D] the student's hidden states.
        head: the student's.
        rows: everything else about the rows.
        weights_N: [N] factor on each row in the gradients, or None for 1.
        needs: whether the gradients of hidden states, weight and bias are computed.
        counts: rows of each sample, where no sample may be divided between two chunks.
        visit: called after each chunk.

    Returns:
        Unweighted values of each row, and the gradients, None where not asked for.
    """
    n, device = hidden_ND.shape[0], hidden_ND.device
    student = _Side("student", hidden_ND, head, rows, rows.student_NV)
    row_loss = _ChunkRows(student, rows)

    # The gradient overwrites the logits, unless they are wider than the products or belong to the caller.
    separate = any(needs) and student.dtype != student.gemm_dtype
    logits_bytes = sum(side.row_bytes for side in row_loss.sides)
    logits_bytes += separate * student.classes * student.gemm_dtype.itemsize
    wide = torch.promote_types(student.dtype, torch.float32)
    most_classes = max(side.classes for side in row_loss.sides)
    temporary_bytes = EAGER_BUFFERS * most_classes * wide.itemsize if row_loss.backend == "eager" else 0
    budget = budget_of(device, rows.memory_budget)
    if rows.student_NV is not None:
        budget = max(budget - rows.student_NV.numel() * rows.student_NV.element_size(), budget // 2)
    chunk = chunk_rows(n, max(1, logits_bytes), temporary_bytes, device, budget)
    whole_samples = None if counts is None else _whole_samples(counts, chunk)
    parts = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
    parts = parts if whole_samples is None else [part for _, part in whole_samples]

    d_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs[0] else None
    sums = [
        GradientSum(x, name, student.gemm_dtype, several=len(parts) > 1, anything=n > 0)
        if x is not None and needed
        else None
        for x, name, needed in ((head.weight, "d_weight", needs[1]), (head.bias, "d_bias", needs[2]))
    ]
    values = RowValues(*(torch.empty(n, dtype=wide, device=device) for _ in range(3)))
    for number, part in enumerate(parts):
        student_CV = student.logits(part)
        g_CV = student_CV if any(needs) else None
        if separate:
            g_CV = workspace.take("gradient", part.stop - part.start, student.classes, student.gemm_dtype, device)
        elif head.weight is None and d_hidden_ND is not None:
            g_CV = d_hidden_ND[part]
        weights_C = None if weights_N is None else weights_N[part]
        of_chunk = row_loss(part, student_CV, row_weights_C=weights_C, gradient_CV=g_CV)
        for whole, piece in zip(values, of_chunk):
            whole[part] = piece
        if visit is not None and whole_samples is not None:
            visit(whole_samples[number][0], part, student_CV, of_chunk)
        if g_CV is None or head.weight is None:
            continue
        if d_hidden_ND is not None:
            if rows.projection_ND is None:
                _write_hidden(d_hidden_ND[part], g_CV, student.head)
            else:
                factor = rows.coefficients.divergence / rows.coefficients.temperature
                missing_CD = rows.projection_ND[part].to(wide) * factor
                missing_CD = missing_CD if weights_C is None else missing_CD * weights_C[:, None]
                _write_hidden(d_hidden_ND[part], g_CV, student.head, missing_CD)
        for total in sums:
            if total is not None:
                total.add(g_CV, hidden_ND[part], head.scale, first=number == 0, last=part.stop == n)
    return values, _Gradients(d_hidden_ND, *(None if x is None else x.total for x in sums))


def run_or_halve(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    counts: Sequence[int] | None = None,
    visit: Visitor | None = None,
) -> tuple[RowValues, _Gradients]:
    """`run_chunks`. Where memory runs out, the budget is halved for this and all later calls, and the call repeated."""
    try:
        return run_chunks(hidden_ND, head, rows, weights_N, needs, counts, visit)
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
    # Outside the handler: in it the exception still holds the failed call's tensors.
    budget = halve_budget(hidden_ND.device, rows.memory_budget)
    logger.warning(
        "out of memory in the loss: its chunk goes on with memory_budget=%d; set that to avoid this warning", budget
    )
    if hidden_ND.is_cuda:
        torch.cuda.empty_cache()
    # The given logits may have been overwritten with gradients.
    return run_chunks(hidden_ND, head, replace(rows, student_NV=None), weights_N, needs, counts, visit)


def _write_hidden(target_CD: Tensor, g_CV: Tensor, head: Head, minus_CD: Tensor | None = None) -> None:
    """Write g @ weight * scale - minus to `target_CD`."""
    assert head.weight is not None
    if minus_CD is not None:
        # The two nearly cancel where the student is good, so the product is rounded as late as the device allows.
        narrow_on_gpu = g_CV.is_cuda and g_CV.element_size() < 4
        product_CD = (
            torch.mm(g_CV, head.weight, out_dtype=torch.float32) if narrow_on_gpu else torch.mm(g_CV, head.weight)
        )
        target_CD.copy_(product_CD.to(minus_CD.dtype) * head.scale - minus_CD)
        return
    if target_CD.dtype == g_CV.dtype:
        torch.mm(g_CV, head.weight, out=target_CD)
    else:
        target_CD.copy_(torch.mm(g_CV, head.weight))
    if head.scale != 1.0:
        target_CD *= head.scale


class ChunkedLoss(torch.autograd.Function):
    """(hidden_ND, weight, bias, rows, per_row, gradient) -> loss, divergence_N, cross_entropy_N, entropy_N.

    loss is the weighted sum over the rows, or [N] with `per_row`. The other three carry no gradient.
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
            values, grads = run_or_halve(hidden_ND, head, rows, rows.weights_N, needs)
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
        # Scaled in place and handed over, so that no second copy exists.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            head = Head(weight, bias, rows.student_softcap, rows.student_scale)
            weights_N = grad_loss.expand(hidden_ND.shape[0])
            weights_N = weights_N if rows.weights_N is None else weights_N * rows.weights_N
            rows = replace(rows, student_NV=None)  # that memory may belong to another loss by now
            with torch.autocast(hidden_ND.device.type, enabled=False):
                _, grads = run_or_halve(hidden_ND, head, rows, weights_N, ctx.needs_input_grad[:3])
        else:
            for g in grads:
                if g is not None:
                    scale_in_place(g, grad_loss)
        return (*grads, None, None, None)
