"""The row loss in PyTorch, eager or compiled: a few passes over blocks of rows that fit in the CPU's caches.

Shape letters: C rows of a chunk, R rows of a block, V classes, S student, T teacher, K classes that both have, P pieces
of a row, B buckets of classes. `passes.py` has the V-wide functions; this file has the work between them.

One file, because the losses with a teacher's logits and with a compact teacher share blocks, pieces and their joining.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compact import SparseDivergence, compact_sums
from .compiler import layout
from .divergences import RowDivergence, RowFirst
from .eager_rows import eager_block
from .passes import (
    Headed,
    Normalisers,
    Settled,
    gradient,
    logits,
    mass_from,
    merge,
    reduction,
    row_sums,
    statistics,
    student_gradient,
    student_statistics,
    tempered_gradient,
    tempered_statistics,
)
from .pieces import Pieces, row_blocks
from .row_first import find_head
from .row_numbers import RowCoefficients, RowNumbers, RowValues


def distillation_rows(
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor | None,
    labels_C: Tensor,
    divergence: RowDivergence | None,
    coefficients: RowCoefficients,
    *,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_weights_C: Tensor | None = None,
    gradient_CV: Tensor | None = None,
    compiled: bool = False,
) -> RowValues:
    """Divergence, cross-entropy and entropy of each row, and the gradient on the student's logits.

    Args:
        student_logits_CV: [C, V_S] before the softcap, any float dtype.
        teacher_logits_CV: [C, V_T] before the softcap, or None for cross-entropy and entropy alone. If V_T != V_S
            (padded vocabularies) the divergence is over the first min(V_S, V_T) classes, renormalised.
        labels_C: [C] int64 class indices below V_S.
        divergence: D; None if and only if there is no teacher.
        coefficients: weights of cross-entropy and D, and the temperature.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c) first (Gemma 2). None: they stay.
        teacher_softcap: the same for the teacher's logits.
        row_weights_C: [C] factor on each row's gradient. The returned values are not weighted.
        gradient_CV: [C, V_S] of any float dtype, or `student_logits_CV` itself: receives row_weight * d(loss of the
            row)/d(student logits). None saves the work.
        compiled: run the passes through `torch.compile`. The divergence must then have a formula.

    Returns:
        The values of each row.
    """
    loss = _RowLoss(
        divergence, coefficients, student_softcap, teacher_softcap, student_logits_CV, teacher_logits_CV, compiled
    )

    of_block = loss.block if loss.pieces.compiled else functools.partial(eager_block, loss)

    def block(part: slice, *rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        teacher_RK = None if teacher_logits_CV is None else teacher_logits_CV[part]
        return of_block(student_logits_CV[part], teacher_RK, *rows)

    return loss.run_blocks(block, student_logits_CV, labels_C, row_weights_C, gradient_CV)


def compact_rows(
    student_logits_CV: Tensor,
    divergence: SparseDivergence,
    labels_C: Tensor,
    coefficients: RowCoefficients,
    *,
    student_softcap: float | None = None,
    row_weights_C: Tensor | None = None,
    gradient_CV: Tensor | None = None,
    compiled: bool = False,
) -> RowValues:
    """The values and gradient of `distillation_rows` with a teacher that is known at few classes.

    There are no teacher logits, and the student's are read twice instead of three times.

    Args:
        student_logits_CV: [C, V] before the softcap, any float dtype; overwritten where `divergence.apart`.
        divergence: D of the C rows. It runs in eager PyTorch on [C, K + 1] tensors, whatever `compiled` is.
        labels_C: [C] int64 class indices below V.
        coefficients: weights of cross-entropy and D, and the temperature.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c) first (Gemma 2). None: they stay.
        row_weights_C: [C] factor on each row's gradient. The returned values are not weighted.
        gradient_CV: [C, V] of any float dtype, or `student_logits_CV` itself: receives row_weight * d(loss of the
            row)/d(student logits). None saves the work.
        compiled: run the passes through `torch.compile`.

    Returns:
        The values of each row.
    """
    loss = _RowLoss(None, coefficients, student_softcap, None, student_logits_CV, None, compiled)

    def block(part: slice, *rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        return loss.compact_block(student_logits_CV[part], divergence.rows(part), *rows)

    return loss.run_blocks(block, student_logits_CV, labels_C, row_weights_C, gradient_CV)


class _RowLoss(RowNumbers):
    """What the blocks of one call have in common."""

    def __init__(
        self,
        divergence: RowDivergence | None,
        coefficients: RowCoefficients,
        student_softcap: float | None,
        teacher_softcap: float | None,
        student: Tensor,
        teacher: Tensor | None,
        compiled: bool,
    ) -> None:
        compute = torch.promote_types(student.dtype, torch.float32)
        super().__init__(divergence, coefficients, (student_softcap, teacher_softcap), compute, student.device)
        self.in_place = False
        classes = student.shape[1] if teacher is None else min(student.shape[1], teacher.shape[1])
        self.pieces = Pieces(student.shape[0], classes, compiled)
        self.run = self.pieces.run
        self.blocks = functools.partial(row_blocks, student, teacher, self.pieces.compiled)

    def run_blocks(
        self,
        block: Callable[..., tuple[Tensor, Tensor, Tensor]],
        student_CV: Tensor,
        labels_C: Tensor,
        weights_C: Tensor | None,
        out_CV: Tensor | None,
    ) -> RowValues:
        """Call `block(part, labels_R1, weights_R1, out_RV)` for all parts of the rows, and join the results."""
        self.in_place = out_CV is not None and out_CV.data_ptr() == student_CV.data_ptr()
        pieces = [
            block(
                part,
                labels_C[part, None],
                None if weights_C is None else weights_C[part, None],
                None if out_CV is None else out_CV[part],
            )
            for part in self.blocks()
        ]
        if not pieces:
            return RowValues(*(labels_C.new_empty(0, dtype=self.compute) for _ in range(3)))
        return RowValues(*(torch.cat(values).squeeze(1) for values in zip(*pieces)))

    def block(
        self,
        student_RV: Tensor,
        teacher_RV: Tensor | None,
        labels_R1: Tensor,
        weights_R1: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Divergence, cross-entropy and entropy of a block, each [R, 1], compiled. The gradient goes to `out`."""
        if teacher_RV is None or self.divergence is None:
            return self._student_block(student_RV, labels_R1, weights_R1, out)
        classes = min(student_RV.shape[1], teacher_RV.shape[1])
        student, teacher, tail = student_RV[:, :classes], teacher_RV[:, :classes], student_RV[:, classes:]
        target = None if self.in_place or out is None else out[:, :classes]
        key = (layout(student, teacher, target), *(c is None for c in self.caps), self.temperature_kind)
        max_RP, s_RP, a_RP, s_t_RP, max_T_RP, s_T_RP = self.pieces.reduce(
            key, statistics, (student, teacher), self.caps, self.inverse_t, self.temperature_kind
        )
        max_S, s_t = merge(max_RP, self.inverse_t, s_t_RP)
        max_T, s_T = merge(max_T_RP, self.inverse_t, s_T_RP)
        of_sides = Normalisers(max_S, s_t.log(), max_T, s_T.log())
        n: Normalisers | Settled = of_sides
        if tail.shape[1]:
            rest = student_statistics(tail[:, None], self.caps[0])
            max_RP, s_RP, a_RP = (torch.cat(both, 1) for both in zip((max_RP, s_RP, a_RP), rest))
        max_1, s, a = merge(max_RP, 1.0, s_RP, a_RP)
        log_sum_1 = s.log()
        label_S = student_RV.gather(1, labels_R1)
        cross_entropy = log_sum_1 - (logits(label_S, self.caps[0]) - max_1)
        entropy = log_sum_1 - a / s

        labels_K = labels_R1.clamp(max=classes - 1)
        assert self.divergence.formula is not None
        terms, first = self.divergence.formula.terms, self.divergence.formula.row_first
        if first is not None:
            n = self._settled(first, key, student, teacher, of_sides)
        parameters = (self.inverse_t, self.skew, self.beta)
        both_RP = self.pieces.reduce(
            (key, terms), reduction, (student, teacher), self.caps, *parameters, terms, of_rows=n
        )
        value, sum_w = (x.sum(1, keepdim=True) for x in both_RP)
        if out is None:
            return value, cross_entropy, entropy

        a_R1, b_R1 = self.factors(weights_R1, s)
        # log q_1 = (z - max_S) - log_sum
        log_sum = log_sum_1 + (max_1 - n.max_S)
        factors = (self.factor_of_power(a_R1, n.log_sum_S, log_sum), b_R1)
        shared = (self.caps, n, sum_w, log_sum, factors, self.inverse_t, self.skew, self.beta)
        at_label = torch.empty_like(s)
        gradient(label_S, teacher.gather(1, labels_K), *shared, terms, self.temperature_kind, at_label)
        if tail.shape[1]:
            in_tail = torch.empty_like(s)
            student_gradient(label_S, self.caps[0], max_1, log_sum_1, a_R1, in_tail)
            at_label = torch.where(labels_R1 < classes, at_label, in_tail)
            student_gradient(tail, self.caps[0], max_1, log_sum_1, a_R1, out[:, classes:])
        self.run((key, terms), gradient, student, teacher, *shared, terms, self.temperature_kind, target)
        self._write_label(out, labels_R1, label_S, at_label, a_R1)
        return value, cross_entropy, entropy

    def _settled(self, first: RowFirst, key: Any, student: Tensor, teacher: Tensor, n: Normalisers) -> Settled:
        """The numbers of the rows that a divergence needs before its terms."""
        reduce, head = self.pieces.reduce, torch.zeros_like(n.max_T)
        if first.head:

            def mass(begin: Tensor) -> Tensor:
                options = self.caps[1], self.inverse_t
                (of_pieces,) = reduce(key, mass_from, (teacher,), *options, of_rows=Headed(*n, begin))
                return of_pieces.sum(1, keepdim=True)

            head = find_head(-n.log_sum_T, mass)
        sums = reduce(
            (key, first.sums), row_sums, (student, teacher), self.caps, self.inverse_t, first.sums,
            of_rows=Headed(*n, head),
        )  # fmt: skip
        return Settled(*n, *first.settle(*(x.sum(1, keepdim=True) for x in sums)))

    def _student_block(
        self, student_RV: Tensor, labels_R1: Tensor, weights_R1: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        cap = self.caps[0]
        target = None if self.in_place else out
        key = (layout(student_RV, target), cap is None)
        maxima_RP, *sums_RP = self.pieces.reduce(key, student_statistics, (student_RV,), cap)
        max_1, s, a = merge(maxima_RP, 1.0, *sums_RP)
        log_sum_1 = s.log()
        label_S = student_RV.gather(1, labels_R1)
        values = torch.zeros_like(s), log_sum_1 - (logits(label_S, cap) - max_1), log_sum_1 - a / s
        if out is not None:
            a_R1, _ = self.factors(weights_R1, s)
            at_label = torch.empty_like(s)
            student_gradient(label_S, cap, max_1, log_sum_1, a_R1, at_label)
            self.run(key, student_gradient, student_RV, cap, max_1, log_sum_1, a_R1, target)
            self._write_label(out, labels_R1, label_S, at_label, a_R1)
        return values

    def compact_block(
        self,
        student_RV: Tensor,
        divergence: SparseDivergence,
        labels_R1: Tensor,
        weights_R1: Tensor | None,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`block` for `compact_rows`."""
        cap, ids_RK, apart = self.caps[0], divergence.ids_CK, divergence.apart
        target = None if self.in_place else out
        key = (layout(student_RV, target), cap is None, self.temperature_kind, apart)
        label_S = student_RV.gather(1, labels_R1)
        ids_S = label_S[:, :0] if ids_RK is None else student_RV.gather(1, ids_RK)
        if apart and ids_RK is not None:
            # So the rest's mass is a sum of its own: if it is small, 1 minus the others' mass would have no digits
            # left.
            student_RV.scatter_(1, ids_RK, -math.inf)
        options = (cap, self.inverse_t, self.temperature_kind)
        pieces_RP = self.pieces.reduce(key, tempered_statistics, (student_RV,), *options, apart)
        found = compact_sums(pieces_RP, ids_S, divergence, *options)
        cross_entropy = found.log_sum_1 - (logits(label_S, cap) - found.max_1)
        if out is None:
            return found.divergence, cross_entropy, found.entropy

        a_R1, b_R1 = self.factors(weights_R1, found.max_1)
        factor = self.factor_of_power(a_R1, found.log_sum_rest, found.log_sum_beside_rest)
        factors = (factor, b_R1 * found.gradient_RB[:, -1:])
        shared = (
            cap, found.max_rest, found.log_sum_rest, found.log_sum_beside_rest, factors, self.inverse_t,
            self.temperature_kind, apart,
        )  # fmt: skip
        at_label = torch.empty_like(found.max_1)
        tempered_gradient(label_S, *shared, at_label)
        self.run(key, tempered_gradient, student_RV, *shared, target)
        self._write_label(out, labels_R1, label_S, at_label, a_R1)
        if ids_RK is not None:
            # Written, not added: a class that occurs twice gets the same value twice, rounded once.
            out.scatter_(1, ids_RK, found.gradient_on_ids(ids_RK == labels_R1, a_R1, b_R1, cap).to(out.dtype))
        return found.divergence, cross_entropy, found.entropy

    def _write_label(self, out: Tensor, labels_R1: Tensor, label_S: Tensor, gradient_R1: Tensor, a_R1: Tensor) -> None:
        """Write the label's gradient: its gradient like that of any class, minus a for the one-hot label."""
        slope = self.slope(logits(label_S, self.caps[0]))
        rows = torch.arange(len(out), device=out.device)
        out[rows, labels_R1[:, 0]] = (gradient_R1 - a_R1 * slope)[:, 0].to(out.dtype)
