"""Loss and gradient from hidden states, a chunk of rows at a time, so that no larger logits tensor ever exists.

Shape letters: N packed rows, C rows of a chunk, D width, V classes, S student, T teacher. The gradient is computed in
the forward pass, chunk by chunk beside the loss, because the logits of a chunk are gone afterwards; `backward` only
scales it. Where the factors on the rows are known in `backward` alone (one loss per row, or a second backward through a
retained graph), the chunks run once more.
"""

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import ALIGNMENT, EAGER_BUFFERS, RowCoefficients, RowDivergence, RowValues, block_bytes
from .backends import row_backend

_DEFAULT_BUDGET = {"cuda": 1 << 30}
_DEFAULT_BUDGET_ELSEWHERE = 512 << 20
# A matrix product's rows on a GPU come in tiles of this many.
_GPU_TILE = 128
# Classes at a time where a product has another dtype than the tensor it goes to.
_CLASSES_AT_ONCE = 8192


class _Workspace(threading.local):
    """The chunk's buffers, kept from call to call: the operating system zeroes what is allocated anew, page by page."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, columns] of undefined content, rows aligned for 128-bit accesses, what follows them scratch."""
        stride = -(-columns // ALIGNMENT) * ALIGNMENT
        key = name, device, dtype
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < rows * stride:
            # Gone before the new one comes. A tensor made in inference mode could not be written outside of it.
            self.buffers.pop(key, None)
            with torch.inference_mode(False):
                buffer = torch.empty(rows * stride, dtype=dtype, device=device)
            # A GPU's caching allocator keeps freed memory by itself, and can give it to others meanwhile.
            if device.type == "cpu":
                self.buffers[key] = buffer
        return buffer[: rows * stride].view(rows, stride)[:, :columns]


_workspace = _Workspace()


def free_workspace() -> None:
    """Free the buffers that this thread's losses on the CPU keep between calls, `memory_budget` bytes at most."""
    _workspace.buffers.clear()


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(z / softcap), z = scale * (hidden @ weight.T + bias).

    weight: [V, D], or None where the "hidden states" are logits already. bias: [V] or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def project(self, hidden_CD: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits before the softcap, [C, V], in `out` or a new tensor of the weight's dtype.

        Without a weight the hidden states themselves, not a copy. `out` in float32 with a narrower weight receives the
        unrounded products.
        """
        weight = self.weight
        if weight is None:
            return hidden_CD
        hidden_CD = hidden_CD.to(weight.dtype)
        if self.scale != 1.0:
            hidden_CD = hidden_CD * self.scale
        if out is None:
            out = hidden_CD.new_empty(hidden_CD.shape[0], weight.shape[0])
        if out.dtype != weight.dtype:
            self._project_wide(hidden_CD, weight, out)
        elif self.bias is None:
            torch.mm(hidden_CD, weight.t(), out=out)
        else:
            torch.addmm(self.bias.to(weight.dtype) * self.scale, hidden_CD, weight.t(), out=out)
        return out

    def _project_wide(self, hidden_CD: Tensor, weight: Tensor, out: Tensor) -> None:
        if out.is_cuda:
            torch.mm(hidden_CD, weight.t(), out_dtype=out.dtype, out=out)
        else:
            # No CPU product of narrow matrices keeps its float32 sums, so a slice of the weight is widened at a time.
            for part in _class_slices(weight.shape[0]):
                torch.mm(hidden_CD.to(out.dtype), weight[part].to(out.dtype).t(), out=out[:, part])
        if self.bias is not None:
            out += self.bias.to(out.dtype) * self.scale

    def to(self, dtype: torch.dtype) -> "Head":
        """The head with weight and bias in `dtype`."""
        weight, bias = (None if x is None else x.to(dtype) for x in (self.weight, self.bias))
        return Head(weight, bias, self.softcap, self.scale)

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


def _class_slices(num_classes: int) -> list[slice]:
    return [slice(v, min(v + _CLASSES_AT_ONCE, num_classes)) for v in range(0, num_classes, _CLASSES_AT_ONCE)]


def chunk_rows(num_rows: int, logits_bytes: int, temporary_bytes: int, device: torch.device, budget: int | None) -> int:
    """Rows of a chunk, at least 1: as many as fit in the budget, then the same for every chunk.

    Args:
        logits_bytes: what a row keeps in buffers for the whole chunk.
        temporary_bytes: what a row needs besides while its block of rows is worked on.
        budget: bytes; None for 1 GiB on CUDA and 512 MiB elsewhere.
    """
    budget = budget or _DEFAULT_BUDGET.get(device.type, _DEFAULT_BUDGET_ELSEWHERE)
    block = block_bytes(device)
    fitting = (budget - block) // logits_bytes if budget >= 2 * block else budget // (logits_bytes + temporary_bytes)
    if device.type == "cuda" and fitting > _GPU_TILE:
        fitting -= fitting % _GPU_TILE
    chunks = max(1, -(-num_rows // max(1, fitting)))
    rows = -(-num_rows // chunks)
    if device.type == "cuda" and rows > _GPU_TILE:
        rows += -rows % _GPU_TILE
    return max(1, rows)


def run_chunks(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[RowValues, _Gradients]:
    """Per-row values of all rows, and the gradients asked for (hidden, weight, bias) of sum(weights * loss)."""
    n, device = hidden_ND.shape[0], hidden_ND.device
    teacher_ND, teacher_head = rows.teacher_ND, rows.teacher_head
    targets = head
    if rows.gemm_dtype is not None:
        head = head.to(rows.gemm_dtype)
        teacher_head = None if teacher_head is None else teacher_head.to(rows.gemm_dtype)
    gemm_dtype = hidden_ND.dtype if head.weight is None else head.weight.dtype
    logits_dtype = gemm_dtype if head.weight is None else rows.logits_dtype or gemm_dtype
    v_S, v_T, teacher_dtype = head.num_classes(hidden_ND), 0, logits_dtype
    if teacher_ND is not None and teacher_head is not None:
        v_T = teacher_head.num_classes(teacher_ND)
        teacher_dtype = teacher_ND.dtype
        if teacher_head.weight is not None:
            teacher_dtype = rows.logits_dtype or teacher_head.weight.dtype

    owned = head.weight is not None and (teacher_head is None or teacher_head.weight is not None)
    backend, name = row_backend(rows.backend, device, logits_dtype, max(v_S, v_T), rows.divergence, owned)
    separate = any(needs) and logits_dtype != gemm_dtype
    logits_bytes = v_S * (logits_dtype.itemsize + separate * gemm_dtype.itemsize) + v_T * teacher_dtype.itemsize
    compute_bytes = torch.promote_types(logits_dtype, torch.float32).itemsize
    temporary = EAGER_BUFFERS * compute_bytes * max(v_S, v_T) if name == "eager" else 0
    chunk = chunk_rows(n, logits_bytes, temporary, device, rows.memory_budget)

    pieces = []
    grads = _allocate(hidden_ND, targets, gemm_dtype, needs, several=n > chunk)
    for start in range(0, n, chunk):
        part = slice(start, min(start + chunk, n))
        c = part.stop - part.start
        student_CV, teacher_CV = hidden_ND[part], None
        if head.weight is not None:
            student_CV = head.project(student_CV, _workspace.take("student", c, v_S, logits_dtype, device))
        if teacher_ND is not None and teacher_head is not None:
            teacher_CV = teacher_ND[part]
            if teacher_head.weight is not None:
                teacher_CV = teacher_head.project(teacher_CV, _workspace.take("teacher", c, v_T, teacher_dtype, device))
        g_CV = None
        if any(needs):
            g_CV = student_CV
            if separate:
                g_CV = _workspace.take("gradient", c, v_S, gemm_dtype, device)
            elif head.weight is None and grads.hidden_ND is not None:
                g_CV = grads.hidden_ND[part]
        pieces.append(
            backend(
                student_CV,
                teacher_CV,
                rows.labels_N[part],
                rows.divergence,
                rows.coefficients,
                student_softcap=head.softcap,
                teacher_softcap=None if teacher_head is None else teacher_head.softcap,
                row_weights_C=None if weights_N is None else weights_N[part],
                gradient_CV=g_CV,
            )
        )
        if g_CV is not None and head.weight is not None:
            _accumulate(grads, g_CV, hidden_ND, part, head)
    if not pieces:
        empty = torch.promote_types(logits_dtype, torch.float32)
        return RowValues(*(hidden_ND.new_empty(0, dtype=empty) for _ in range(3))), grads
    return RowValues(*(torch.cat(values) for values in zip(*pieces))), grads


def _allocate(
    hidden_ND: Tensor, head: Head, gemm_dtype: torch.dtype, needs: tuple[bool, bool, bool], several: bool
) -> _Gradients:
    """Tensors for the gradients. Sums over several chunks are kept in float32 at least."""

    def like(x: Tensor | None, needed: bool) -> Tensor | None:
        if x is None or not needed:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32) if several else x.dtype
        # Without rows no product writes it.
        return torch.empty_like(x, dtype=dtype) if len(hidden_ND) else torch.zeros_like(x)

    hidden = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs[0] else None
    weight, bias = like(head.weight, needs[1]), like(head.bias, needs[2])
    return _Gradients(hidden, weight, bias)


def _accumulate(grads: _Gradients, g_CV: Tensor, hidden_ND: Tensor, part: slice, head: Head) -> None:
    """The products of a chunk: into its rows of the hidden gradient, onto the sums for weight and bias."""
    assert head.weight is not None
    first = part.start == 0
    if grads.hidden_ND is not None:
        target = grads.hidden_ND[part]
        if target.dtype == g_CV.dtype:
            torch.mm(g_CV, head.weight, out=target)
        else:
            target.copy_(torch.mm(g_CV, head.weight))
        if head.scale != 1.0:
            target *= head.scale
    if grads.weight_VD is not None:
        hidden_CD = hidden_ND[part].to(g_CV.dtype)
        if head.scale != 1.0:
            hidden_CD = hidden_CD * head.scale
        if grads.weight_VD.dtype == g_CV.dtype:
            torch.addmm(grads.weight_VD, g_CV.t(), hidden_CD, beta=0 if first else 1, out=grads.weight_VD)
        else:
            for classes in _class_slices(g_CV.shape[1]):
                product = torch.mm(g_CV[:, classes].t(), hidden_CD)
                if first:
                    grads.weight_VD[classes] = product
                else:
                    grads.weight_VD[classes] += product
    if grads.bias_V is not None:
        total = g_CV.sum(0, dtype=torch.promote_types(g_CV.dtype, torch.float32)) * head.scale
        if first:
            grads.bias_V.copy_(total)
        else:
            grads.bias_V.add_(total)


def _scale(x: Tensor, factor: Tensor) -> None:
    """Multiply in place by a scalar tensor, which a product in bfloat16 would first round to 8 bits."""
    if factor.device.type == "cpu" and factor == 1:
        return
    if x.element_size() >= factor.element_size():
        x.mul_(factor)
        return
    for part in _class_slices(x.shape[0]):
        x[part] = x[part].to(factor.dtype) * factor


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
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
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
                    _scale(g, grad_loss)
        cast = [None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden_ND, weight, bias))]
        return (*cast, None, None, None)
