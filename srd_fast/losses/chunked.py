"""Loss and gradient from hidden states without the full logits tensor: in chunks of rows, or in blocks of classes.

Shape letters: N packed rows, D width, V classes, S student, T teacher.

The forward pass computes the gradient together with the loss, chunk by chunk, because the logits of a chunk are gone
afterwards; `backward` only scales it. In two cases the factors on the rows are known only in `backward`: with one loss
per row, and in a second backward through a retained graph. The work is then done a second time.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import ClassPasses, RowValues
from .buffers import budget_of, halve_budget, is_out_of_memory, scale_in_place
from .class_order import run_class_blocks
from .head import Head
from .order import HeadWork, LossWork, plan_loss, with_backend
from .packed import Gradients, PackedRows
from .row_order import Visitor, run_chunks
from .shard_order import run_shard

logger = logging.getLogger(__name__)


def _side(hidden_ND: Tensor, head: Head, rows: PackedRows, given: bool = False) -> HeadWork:
    classes, weight = head.num_classes(hidden_ND), head.weight
    stored, width = (hidden_ND.dtype, 0) if weight is None else (weight.dtype, weight.shape[1])
    return HeadWork(classes, width, hidden_ND.dtype, stored, *rows.dtypes(hidden_ND, head), head.scale != 1.0, given)


def _why_rows(rows: PackedRows, student: HeadWork, teacher: HeadWork | None, visited: bool) -> str | None:
    if visited or student.given or not student.width or (teacher is not None and not teacher.width):
        return "logits are given or asked for, and these are whole rows"
    if rows.divergence is not None and rows.divergence.formula is None:
        return "a registered divergence sees whole rows"
    if rows.standardize and rows.divergence is not None:
        return "standardize_logits needs a row's mean and deviation before its softmax"
    return None


def _work_of(
    hidden_ND: Tensor, head: Head, rows: PackedRows, needs: tuple[bool, bool, bool], visited: bool
) -> tuple[LossWork, str]:
    """What a loss has to do, and the backend of its rows. visited: whether each chunk's logits go to a visitor."""
    student = _side(hidden_ND, head, rows, rows.student_NV is not None)
    teacher = None
    if rows.teacher_ND is not None and rows.teacher_head is not None:
        teacher = _side(rows.teacher_ND, rows.teacher_head, rows)
    why_rows = _why_rows(rows, student, teacher, visited)
    if rows.order == "classes" and why_rows is not None:
        raise UserError(f"order 'classes' cannot run: {why_rows}; use order='auto'")
    passes = ClassPasses.of(rows.divergence, rows.teacher_lse_N is not None, any(needs))
    sizes = LossWork(len(hidden_ND), student, teacher, hidden_ND.device, needs[0], needs[1], passes=passes)
    standardised = rows.standardize and rows.divergence is not None
    return with_backend(
        replace(sizes, rows_only=why_rows is not None, standardised=standardised),
        rows.backend,
        rows.divergence,
        rows.compact is not None,
    )


def run_packed(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    counts: Sequence[int] | None = None,
    visit: Visitor | None = None,
) -> tuple[RowValues, Gradients]:
    """Compute the values of all rows, and the gradients of sum(weights * loss), in the order that `plan_loss` chooses.

    Args:
        hidden_ND: [N, D] the student's hidden states.
        head: the student's.
        rows: the labels, the teacher and the options.
        weights_N: [N] factor on each row in the gradients, or None for 1.
        needs: whether the gradients of hidden states, weight and bias are computed.
        counts: number of rows of each sample, if no sample may be divided between two chunks.
        visit: called after each chunk.

    Returns:
        Unweighted values of each row, and the gradients, None for those not in `needs`.
    """
    if head.shard is not None:
        if counts is not None:
            raise UserError(
                "logits are asked for, and no rank has whole rows of them where a head is in shards; "
                "gather it (head_in_shards=False in SRDConfig)"
            )
        return run_shard(hidden_ND, head, rows, weights_N, needs)
    work, backend = _work_of(hidden_ND, head, rows, needs, counts is not None)
    budget = budget_of(hidden_ND.device, rows.memory_budget)
    if rows.student_NV is not None:
        budget = max(budget - rows.student_NV.numel() * rows.student_NV.element_size(), budget // 2)
    plan = plan_loss(work, budget, rows.order)
    if plan.order == "classes":
        return run_class_blocks(hidden_ND, head, rows, weights_N, (plan.rows, plan.classes), backend, needs)
    return run_chunks(hidden_ND, head, rows, weights_N, plan.rows, backend, needs, counts, visit)


def run_or_halve(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    needs: tuple[bool, bool, bool] = (False, False, False),
    counts: Sequence[int] | None = None,
    visit: Visitor | None = None,
) -> tuple[RowValues, Gradients]:
    """Call `run_packed`. If memory runs out, halve the budget for this and all later calls, and call it again.

    With a head in shards the error is raised instead: the other ranks would not repeat the call.
    """
    try:
        return run_packed(hidden_ND, head, rows, weights_N, needs, counts, visit)
    except RuntimeError as e:
        if head.shard is not None or not is_out_of_memory(e):
            raise
    # Outside the handler, because inside it the exception still holds the tensors of the failed call.
    budget = halve_budget(hidden_ND.device, rows.memory_budget)
    logger.warning(
        "out of memory in the loss: it goes on with memory_budget=%d; set that to avoid this warning", budget
    )
    if hidden_ND.is_cuda:
        torch.cuda.empty_cache()
    # The given logits may have been overwritten with gradients.
    return run_packed(hidden_ND, head, replace(rows, student_NV=None), weights_N, needs, counts, visit)


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
        head = Head(weight, bias, rows.student_softcap, rows.student_scale, rows.shard)
        # needs_input_grad is true for inputs that require one even while gradients are switched off: see `gradient`.
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
        # Gradients are enabled inside a backward pass only under create_graph=True.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the distillation loss has no second derivative: call backward without create_graph=True"
            )
        grad_loss: Tensor | None = grad_outputs[0]
        hidden_ND, weight, bias = ctx.saved_tensors
        rows: PackedRows = ctx.rows
        # Scaled in place and given away, so that no second copy exists.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            head = Head(weight, bias, rows.student_softcap, rows.student_scale, rows.shard)
            assert grad_loss is not None
            weights_N = grad_loss.expand(hidden_ND.shape[0])
            weights_N = weights_N if rows.weights_N is None else weights_N * rows.weights_N
            rows = replace(rows, student_NV=None)  # that memory may belong to another loss by now
            with torch.autocast(hidden_ND.device.type, enabled=False):
                _, grads = run_or_halve(hidden_ND, head, rows, weights_N, ctx.needs_input_grad[:3])
            grad_loss = None
        of_head = grad_loss
        if rows.shard is not None and rows.shard.head_gradient != 1.0:
            one = hidden_ND.new_ones((), dtype=torch.float32) if grad_loss is None else grad_loss
            of_head = one * rows.shard.head_gradient
        for g, factor in zip(grads, (grad_loss, of_head, of_head)):
            if g is not None and factor is not None:
                scale_in_place(g, factor)
        return (*grads, None, None, None)
