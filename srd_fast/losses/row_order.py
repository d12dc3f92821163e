"""Loss and gradient with the rows outside: chunk by chunk, so that only a chunk's logits are ever in memory.

Shape letters: N packed rows, C rows of a chunk, D width, V classes, S student, T teacher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import RowValues, compact_rows, standardised_rows
from .backends import row_backend
from .buffers import GradientSum, workspace
from .head import Head
from .packed import Gradients, PackedRows


class _Side:
    """The rows and the head of one model in the dtype of the products, and the buffer of its logits."""

    def __init__(
        self, name: str, hidden_ND: Tensor, head: Head, rows: PackedRows, logits_NV: Tensor | None = None
    ) -> None:
        self.name, self.hidden_ND, self.logits_NV = name, hidden_ND, logits_NV
        self.gemm_dtype, self.dtype = rows.dtypes(hidden_ND, head)
        self.head = head.to(self.gemm_dtype)
        self.classes = head.num_classes(hidden_ND)

    def logits(self, part: slice) -> Tensor:
        """Compute [C, V] in the workspace. Logits that were given are returned as they are."""
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


class _ChunkRows:
    """The row loss of a chunk, with the teacher's logits or with a compact teacher.

    teacher: the side with the teacher's head, or None.
    """

    def __init__(self, student: _Side, rows: PackedRows, backend: str) -> None:
        self.rows, self.student, self.backend = rows, student, backend
        self.teacher: _Side | None = None
        if rows.teacher_ND is not None and rows.teacher_head is not None:
            # If the student's logits were given, the student's buffer is free.
            name = "teacher" if rows.student_NV is None else "student"
            self.teacher = _Side(name, rows.teacher_ND, rows.teacher_head, rows)
        sides = [student] if self.teacher is None else [student, self.teacher]
        self._function = row_backend(backend, all(s.owned for s in sides))

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
            if rows.standardize and rows.divergence is not None:
                return standardised_rows(
                    self._function, student_CV, teacher_CV, labels_C, rows.divergence, rows.coefficients, **options
                )
        return self._function(student_CV, teacher_CV, labels_C, rows.divergence, rows.coefficients, **options)


# Called with the samples, rows, student's logits and values of a chunk, before the next chunk overwrites the logits.
Visitor = Callable[[slice, slice, Tensor, RowValues], None]


def _whole_samples(counts: Sequence[int], most: int) -> list[tuple[slice, slice]]:
    """Divide samples into chunks, (samples, rows): whole samples of at most `most` rows, or one longer sample."""
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
    chunk: int,
    backend: str,
    needs: tuple[bool, bool, bool] = (False, False, False),
    counts: Sequence[int] | None = None,
    visit: Visitor | None = None,
) -> tuple[RowValues, Gradients]:
    """Compute the values of all rows, and the gradients of sum(weights * loss).

    Args:
        hidden_ND: [N, D] the student's hidden states.
        head: the student's.
        rows: the labels, the teacher and the options.
        weights_N: [N] factor on each row in the gradients, or None for 1.
        chunk: C, at least 1.
        backend: what runs the row function: "triton", "compile" or "eager".
        needs: whether the gradients of hidden states, weight and bias are computed.
        counts: number of rows of each sample, if no sample may be divided between two chunks.
        visit: called after each chunk.

    Returns:
        Unweighted values of each row, and the gradients, None for those not in `needs`.
    """
    n, device = hidden_ND.shape[0], hidden_ND.device
    student = _Side("student", hidden_ND, head, rows, rows.student_NV)
    row_loss = _ChunkRows(student, rows, backend)
    # The gradient overwrites the logits, unless their dtype is wider than that of the products.
    separate = any(needs) and student.dtype != student.gemm_dtype
    whole_samples = None if counts is None else _whole_samples(counts, chunk)
    parts = [slice(i, min(i + chunk, n)) for i in range(0, n, chunk)]
    parts = parts if whole_samples is None else [part for _, part in whole_samples]

    d_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs[0] else None
    sums = [
        GradientSum(torch.empty_like(x) if n else torch.zeros_like(x), name, student.gemm_dtype, several=len(parts) > 1)
        if x is not None and needed
        else None
        for x, name, needed in ((head.weight, "d_weight", needs[1]), (head.bias, "d_bias", needs[2]))
    ]
    wide = torch.promote_types(student.dtype, torch.float32)
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
                _write_hidden(d_hidden_ND[part], g_CV, student.head, rows.missing(part, weights_N, wide))
        for total in sums:
            if total is not None:
                total.add(g_CV, hidden_ND[part], head.scale, first=number == 0, last=part.stop == n)
    return values, Gradients(d_hidden_ND, *(None if x is None else x.total for x in sums))


def _write_hidden(target_CD: Tensor, g_CV: Tensor, head: Head, minus_CD: Tensor | None = None) -> None:
    """Write g @ weight * scale - minus to `target_CD`."""
    assert head.weight is not None
    if minus_CD is not None:
        # If the student is good, the two nearly cancel, so the product is rounded as late as the device allows.
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
