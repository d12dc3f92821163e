"""Which passes over blocks of classes a divergence needs; `class_blocks.py` says what they do."""

from typing import NamedTuple

import torch

from .divergences import RowDivergence
from .row_first import looks


class ClassPasses(NamedTuple):
    """Which passes rows go through.

    Attributes:
        reads_teacher: whether `read` takes the teacher's logits.
        weighs: whether there is a pass for D and sum(w).
        crosses: whether `read` finds D.
        gathers: whether there is a pass for sums that the terms of D need.
        looks: how often the teacher is looked at before that one.
        of_both: passes over both sides between the first and the gradient.
    """

    reads_teacher: bool
    weighs: bool
    crosses: bool
    gathers: bool = False
    looks: int = 0

    @property
    def of_both(self) -> int:
        """Count the passes over both sides between the first and the gradient.

        Returns:
            Their number.
        """
        return self.weighs + self.gathers

    @staticmethod
    def of(
        divergence: RowDivergence | None, lse_is_known: bool, writes: bool, compute: torch.dtype = torch.float32
    ) -> "ClassPasses":
        """Find the fewest passes.

        Args:
            divergence: D, one with a formula, or None.
            lse_is_known: whether the teacher's log-sum-exp is.
            writes: whether a gradient follows.
            compute: dtype of the sums.

        Returns:
            The passes.
        """
        if divergence is None or divergence.formula is None:
            return ClassPasses(False, False, False)
        side, first = divergence.formula.one_read, divergence.formula.row_first
        if first is not None:
            # dD/dx needs no sum(w), so D may come as late as the gradient. A head begins with the largest logit, if not
            # before: that is not known with the sum.
            reads_teacher = first.head or not lse_is_known
            return ClassPasses(reads_teacher, not writes, False, True, looks(compute) if first.head else 0)
        # Reverse KL measures the teacher's logits by the student's sums; and without a gradient one pass is enough for
        # forward KL, which then needs the teacher's logits in it.
        known = lse_is_known and side != "student" and (writes or side is None)
        return ClassPasses(not known, side is None, not known and side is not None)
