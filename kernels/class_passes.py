"""Which passes over blocks of classes a divergence needs; `class_blocks.py` says what they do."""

from typing import NamedTuple

import torch

from .divergences import RowDivergence
from .row_first import looks


class ClassPasses(NamedTuple):
    """The passes that rows go through.

    Attributes:
        reads_teacher: whether `read` takes the teacher's logits.
        weighs: whether there is a pass for D and sum(w).
        crosses: whether `read` computes D.
        gathers: whether there is a pass for sums that the terms of D need.
        looks: number of passes over only the teacher before that one.
        of_both: number of passes over both sides between `read` and `write`.
    """

    reads_teacher: bool
    weighs: bool
    crosses: bool
    gathers: bool = False
    looks: int = 0

    @property
    def of_both(self) -> int:
        """Count the passes over both sides between `read` and `write`.

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
            lse_is_known: whether the teacher's log-sum-exp is known.
            writes: whether a gradient is written in the end.
            compute: dtype of the sums.

        Returns:
            The passes.
        """
        if divergence is None or divergence.formula is None:
            return ClassPasses(False, False, False)
        side, first = divergence.formula.one_read, divergence.formula.row_first
        if first is not None:
            # dD/dx needs no sum(w), so D may be computed as late as the gradient. The search for a head needs the
            # largest logit, which is not known together with the sum.
            reads_teacher = first.head or not lse_is_known
            return ClassPasses(reads_teacher, not writes, False, True, looks(compute) if first.head else 0)
        # Reverse KL combines the teacher's logits with the student's sums, in `read`. Without a gradient, one pass is
        # enough for forward KL, if it reads the teacher's logits.
        known = lse_is_known and side != "student" and (writes or side is None)
        return ClassPasses(not known, side is None, not known and side is not None)
