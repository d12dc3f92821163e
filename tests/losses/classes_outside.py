"""A pytest plugin, `-p classes_outside`: losses have the classes outside where they can, in blocks and parts."""

import dataclasses
from typing import Any

from srd_fast.losses import chunked
from srd_fast.losses.order import LossPlan, LossWork, plan_loss


def plan(work: LossWork, budget: int, order: str = "auto") -> LossPlan:
    """`plan_loss`, with small blocks."""
    if work.rows_only or order == "rows":
        return plan_loss(work, budget, order)
    planned = plan_loss(work, budget, "classes")
    most = max(side.classes for side in work.sides)
    # A narrow head's gradient is rounded once where its rows come together, as `plan_loss` has it on a CPU.
    parts = 1 if work.student.weight.itemsize < 4 else 2
    size: dict[str, Any] = {"rows": -(-work.rows // parts), "classes": -(-most // 3)}
    return dataclasses.replace(planned, **{name: max(1, n) for name, n in size.items()})


chunked.plan_loss = plan
