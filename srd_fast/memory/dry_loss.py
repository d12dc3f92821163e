"""The loss of a step on fake tensors: it allocates what the real loss would, and computes nothing."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import ClassPasses
from ..losses import Head, get_divergence
from ..losses.buffers import budget_of
from ..losses.order import HeadWork, LossWork, plan_loss, with_backend
from ..models import find_head
from ..run.config import RunConfig
from ..run.steps import LIVE, Run
from ..training.config import SRDConfig


@dataclass(frozen=True)
class LossSizes:
    """Bytes that `ChunkedLoss` allocates, according to `plan_loss`.

    kept: the workspace. working: everything else.
    """

    kept: int
    working: int


def loss_sizes(
    config: RunConfig, args: SRDConfig, run: Run, student: Any, head_T: Head, rows: int, training: bool
) -> LossSizes:
    """Plan the loss of a micro-batch as the step would. head_T: the teacher's, of which only the shape counts."""
    head = find_head(student)
    assert head.weight is not None
    assert head_T.weight is not None
    autocast = args.bf16 or args.fp16
    # The products run in autocast's dtype; a float32 loss gets a teacher in float32.
    products = run.dtype if autocast else head.weight.dtype

    def side(head: Head, weight: Tensor, hidden: torch.dtype) -> HeadWork:
        scaled = head.scale != 1.0
        classes, width = weight.shape
        return HeadWork(classes, width, hidden, weight.dtype, products, args.logits or products, scaled)

    of_student = side(head, head.weight, run.dtype if autocast else head.weight.dtype)
    of_teacher, divergence = None, None
    if config.cache.kind in (LIVE, "hidden"):
        of_teacher = side(head_T, head_T.weight, run.dtype)
        divergence = get_divergence(args.divergence).bind(args.skew, args.beta)
    trained = training and head.weight.requires_grad
    passes = ClassPasses.of(divergence, lse_is_known=False, writes=training)
    standardised = args.standardize_logits and divergence is not None
    whole_rows = standardised or (divergence is not None and divergence.formula is None)
    sizes = LossWork(
        rows, of_student, of_teacher, run.device, training, trained,
        passes=passes, rows_only=whole_rows, standardised=standardised,
    )  # fmt: skip
    work, _ = with_backend(sizes, args.backend, divergence, compact=of_teacher is None)
    plan = plan_loss(work, budget_of(run.device, args.memory_budget))
    packed = 0
    if run.device.type == "cpu":  # the product makes a packed copy of a block of the head
        packed = max(s.width * s.products.itemsize for s in (of_student, of_teacher or of_student)) * plan.classes
    return LossSizes(plan.workspace, plan.bytes - plan.workspace + packed)


class AllocatedLoss(torch.autograd.Function):
    """Allocates what `ChunkedLoss` would."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, working: int) -> Tensor:
        grads = [
            torch.empty_like(x) if x is not None and n else None
            for x, n in zip((hidden_ND, weight, bias), ctx.needs_input_grad)
        ]
        scratch = torch.empty(working, dtype=torch.uint8, device=hidden_ND.device)
        ctx.grads = grads
        del scratch
        ctx.save_for_backward(hidden_ND, weight, bias)
        return hidden_ND.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*grads, None)
