"""The row loss with the logits of both sides standardised before the temperature, for any row function.

Shape letters: C rows of a chunk, R rows of a block, V classes, K classes that student and teacher both have.

Only in D, logits z become y = (z - mean) / deviation, over the classes of the row whose logit is not -inf (Sun et al.,
arXiv 2403.01427). The row function gives D and G = dD/dy; with K classes

    dD/dz = (G - mean(G) - y mean(G y)) / deviation

Cross-entropy and entropy stay those of the logits as they are.
"""

import torch
from torch import Tensor

from .divergences import RowDivergence
from .passes import LOGIT_FLOOR, logits
from .pieces import EAGER_BUFFERS, block_bytes
from .row_numbers import RowBackend, RowCoefficients, RowValues

# The lowest deviation to divide by: in a row with a lower one, all classes are equal up to rounding.
_LEAST = 1e-7
STANDARDISING = 2
"""How many times `EAGER_BUFFERS` are alive at once, those of the row function among them."""


class _Standardised:
    """Some rows of one side, standardised: y is `LOGIT_FLOOR` for a logit of -inf."""

    def __init__(self, stored: Tensor, softcap: float | None) -> None:
        cap = None if softcap is None else torch.full((), softcap, device=stored.device)
        z = logits(stored, cap)
        self.there = stored > LOGIT_FLOOR
        self.count = self.there.sum(1, keepdim=True).clamp(min=1)
        self.mean = self._of(z)
        apart = torch.where(self.there, z - self.mean, 0)
        self.deviation = self._of(apart.square()).sqrt().clamp(min=_LEAST)
        self.y = torch.where(self.there, apart / self.deviation, LOGIT_FLOOR)

    def _of(self, x: Tensor) -> Tensor:
        return torch.where(self.there, x, 0).sum(1, keepdim=True) / self.count

    def on_logits(self, g: Tensor, softcap: float | None) -> Tensor:
        """Convert a gradient on y to one on the stored logits."""
        y = torch.where(self.there, self.y, 0)
        g = torch.where(self.there, g - self._of(g) - y * self._of(g * y), 0) / self.deviation
        return g if softcap is None else g * (1 - ((y * self.deviation + self.mean) / softcap).square())


def standardised_rows(
    function: RowBackend,
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor,
    labels_C: Tensor,
    divergence: RowDivergence,
    coefficients: RowCoefficients,
    *,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_weights_C: Tensor | None = None,
    gradient_CV: Tensor | None = None,
) -> RowValues:
    """Compute what `distillation_rows` does, with standardised logits in D.

    Args:
        function: the row function that does the work.
        student_logits_CV: [C, V] before the softcap, any float dtype.
        teacher_logits_CV: [C, V_T] before the softcap, any float dtype.
        labels_C: [C] int64 class indices below V.
        divergence: D.
        coefficients: weights of cross-entropy and D, and the temperature.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c) first. None: they stay.
        teacher_softcap: the same for the teacher's logits.
        row_weights_C: [C] factor on each row's gradient, or None for 1.
        gradient_CV: [C, V] of any float dtype, or `student_logits_CV` itself: receives the gradient. None saves the
            work.

    Returns:
        The values of each row.
    """
    count, classes = student_logits_CV.shape
    common = min(classes, teacher_logits_CV.shape[1])
    compute = torch.promote_types(student_logits_CV.dtype, torch.float32)
    row_bytes = STANDARDISING * EAGER_BUFFERS * max(1, classes) * compute.itemsize
    size = max(1, block_bytes(student_logits_CV.device) // row_bytes)
    of_d = RowCoefficients(0.0, coefficients.divergence, coefficients.temperature)
    of_labels = RowCoefficients(coefficients.cross_entropy, 0.0, 1.0)
    blocks = []
    for begin in range(0, count, size):
        part = slice(begin, begin + size)
        student_RV, labels_R = student_logits_CV[part], labels_C[part]
        weights_R = None if row_weights_C is None else row_weights_C[part]
        student = _Standardised(student_RV[:, :common], student_softcap)
        teacher = _Standardised(teacher_logits_CV[part, :common], teacher_softcap)
        g_RK = g_RV = None
        if gradient_CV is not None:
            g_RK, g_RV = (
                torch.empty_like(student.y),
                torch.empty(student_RV.shape, dtype=compute, device=labels_C.device),
            )
        d = function(
            student.y, teacher.y, labels_R.clamp(max=common - 1), divergence, of_d,
            row_weights_C=weights_R, gradient_CV=g_RK,
        )  # fmt: skip
        values = function(
            student_RV, None, labels_R, None, of_labels,
            student_softcap=student_softcap, row_weights_C=weights_R, gradient_CV=g_RV,
        )  # fmt: skip
        blocks.append(values._replace(divergence=d.divergence))
        if gradient_CV is not None and g_RV is not None and g_RK is not None:
            g_RV[:, :common] += student.on_logits(g_RK, student_softcap)
            gradient_CV[part].copy_(g_RV)
    if not blocks:
        return RowValues(*(labels_C.new_empty(0, dtype=compute) for _ in range(3)))
    return RowValues(*map(torch.cat, zip(*blocks)))
