"""Blocks of classes for a teacher that is known at few classes of each row: two passes over the student's logits.

Shape letters: N rows, R some of them, B classes of a block, K classes that a row's teacher is known at, V classes.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .class_blocks import ClassBlocks
from .compact import CompactSums, SparseDivergence, compact_sums
from .passes import tempered_gradient, tempered_statistics
from .row_numbers import RowCoefficients, RowValues

# Number of rows whose K classes are processed at once.
_ROWS_AT_ONCE = 1024


class _Places(NamedTuple):
    """The places of each row's K classes in a block.

    at: [R, K] the classes' places. A class outside of the block has the place of one that is inside, or, if the row has
    none inside, place 0. inside: [R, K] whether a class is in the block. one: [R, 1] one of the K that is inside. some:
    [R, 1] whether any is.
    """

    at: Tensor
    inside: Tensor
    one: Tensor
    some: Tensor


class CompactClassBlocks(ClassBlocks):
    """`ClassBlocks` of `compact_rows`: `read` and `write` without a teacher, all classes common.

    Args:
        labels_N: [N] int64 class indices below V.
        sparse: D of the N rows.
        coefficients: weights of cross-entropy and D, and the temperature.
        compute: dtype of the sums: float32, or float64.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c) first. None: they stay.
        row_weights_N: [N] factor on each row's gradient, or None for 1.
        compiled: run the passes through `torch.compile`.
    """

    def __init__(
        self,
        labels_N: Tensor,
        sparse: SparseDivergence,
        coefficients: RowCoefficients,
        *,
        compute: torch.dtype = torch.float32,
        student_softcap: float | None = None,
        row_weights_N: Tensor | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__(
            labels_N, None, coefficients,
            compute=compute, student_softcap=student_softcap, row_weights_N=row_weights_N, compiled=compiled,
        )  # fmt: skip
        self.sparse = sparse
        classes = 0 if sparse.ids_CK is None else sparse.ids_CK.shape[1]
        self.ids_NK = torch.zeros(len(labels_N), classes, dtype=compute, device=labels_N.device)
        self.sums: list[tuple[slice, CompactSums]] = []

    @property
    def read_sums(self) -> dict[str, str]:
        """As in `ClassBlocks`."""
        return {"sum_S": "max_S", "product_S": "max_S", "sum_K": "max_S"}

    @property
    def kept_logits(self) -> Tensor:
        """As in `ClassBlocks`."""
        return self.ids_NK.t()

    def _ids_in(self, rows: slice, first: int, block: Tensor) -> _Places | None:
        if self.sparse.ids_CK is None:
            return None
        at = self.sparse.ids_CK[rows] - first
        inside = (at >= 0) & (at < block.shape[1])
        one, some = inside.to(torch.uint8).argmax(1, keepdim=True), inside.any(1, keepdim=True)
        return _Places(torch.where(inside, at, torch.where(some, at.gather(1, one), 0)), inside, one, some)

    def _leave_out(self, places: _Places | None, student: Tensor) -> None:
        """Give the K classes the logit -inf, if the divergence sees them apart."""
        if self.sparse.apart and places is not None:
            # In a row with such a class in the block, all places are those of such classes. In other rows, the logit at
            # place 0 does not change.
            value = torch.where(places.some, -math.inf, student.gather(1, places.at))
            student.scatter_(1, places.at, value)

    def _read_block(self, rows: slice, first: int, student: Tensor, teacher: Tensor | None, common: bool) -> None:
        self._read_label(rows, first, student)
        ids = self._ids_in(rows, first, student)
        if ids is not None:
            of_ids = student.gather(1, ids.at).to(self.compute)
            self.ids_NK[rows] = torch.where(ids.inside, of_ids, self.ids_NK[rows])
        self._leave_out(ids, student)
        reduce = functools.partial(self._pieces(student).reduce, (self._key(student), self.sparse.apart))
        maxima, s, a, s_t = reduce(
            tempered_statistics, (student,), self.caps[0], self.inverse_t, self.temperature_kind, self.sparse.apart
        )
        self._join(rows, "max_S", maxima, 1.0, sum_S=s, product_S=a)
        self._join(rows, "max_K", maxima, self.inverse_t, sum_K=s_t)

    def normalise(self) -> None:
        """Compute D and its gradient on the K classes, once all blocks were read."""
        names = ("max_S", "sum_S", "product_S", "sum_K")
        for i in range(0, len(self.labels_N), _ROWS_AT_ONCE):
            part = slice(i, i + _ROWS_AT_ONCE)
            pieces = [self.of(name, part) for name in names]
            found = compact_sums(
                pieces, self.ids_NK[part], self.sparse.rows(part), self.caps[0], self.inverse_t, self.temperature_kind
            )
            self.sums.append((part, found))

    def values(self) -> RowValues:
        """The values of all rows, once every block was read.

        Returns:
            The values.
        """
        found = [x for _, x in self.sums]
        if not found:
            return RowValues(*(self.state["label"] for _ in range(3)))
        log_sum, maximum = (torch.cat(x) for x in zip(*((x.log_sum_1, x.max_1) for x in found)))
        divergence, entropy = (torch.cat(x)[:, 0] for x in zip(*((x.divergence, x.entropy) for x in found)))
        return RowValues(divergence, (log_sum - (self.of("label") - maximum))[:, 0], entropy)

    def write(
        self, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor | None, gradient_RB: Tensor
    ) -> None:
        """Write row_weight * d(loss of the row)/d(student logits) of a block of classes for some rows.

        Args:
            rows: which.
            first: the block's first class.
            student_RB: [R, B] logits before the softcap; overwritten where the divergence sees classes apart.
            teacher_RB: None.
            gradient_RB: [R, B] of any float dtype, or `student_RB` itself: receives the gradient.
        """
        in_place = gradient_RB.data_ptr() == student_RB.data_ptr()
        for of_sums, found in self.sums:
            begin, end = max(rows.start, of_sums.start), min(rows.stop, of_sums.stop)
            if begin < end:
                part = slice(begin - rows.start, end - rows.start)
                here = slice(begin - of_sums.start, end - of_sums.start)
                some = CompactSums(*(x[here] for x in vars(found).values()))
                self._write_rows(slice(begin, end), first, student_RB[part], gradient_RB[part], some, in_place)

    def _write_rows(
        self, rows: slice, first: int, student: Tensor, out: Tensor, found: CompactSums, in_place: bool
    ) -> None:
        at, inside = self._label_in(rows, first, student.shape[1])
        label_S = student.gather(1, at)
        ids = self._ids_in(rows, first, student)
        self._leave_out(ids, student)
        a_R1, b_R1 = self._factors_of(rows, found.max_1)
        factor = self.factor_of_power(a_R1, found.log_sum_rest, found.log_sum_beside_rest)
        shared = (
            self.caps[0], found.max_rest, found.log_sum_rest, found.log_sum_beside_rest,
            (factor, b_R1 * found.gradient_RB[:, -1:]), self.inverse_t, self.temperature_kind, self.sparse.apart,
        )  # fmt: skip
        at_label = torch.empty_like(found.max_1)
        tempered_gradient(label_S, *shared, at_label)
        target = None if in_place else out
        key = (self._key(student, target), self.sparse.apart)
        self._pieces(student).run(key, tempered_gradient, student, *shared, target)
        self._write_label(out, at, inside, label_S, at_label, a_R1)
        if ids is not None and self.sparse.ids_CK is not None:
            is_label = self.sparse.ids_CK[rows] == self.labels_N[rows, None]
            g_RK = found.gradient_on_ids(is_label, a_R1, b_R1, self.caps[0]).to(out.dtype)
            # A class outside of the block writes to another class's place: the same value as that class, or the old
            # one.
            otherwise = torch.where(ids.some, g_RK.gather(1, ids.one), out[:, :1]).expand_as(g_RK)
            out.scatter_(1, ids.at, torch.where(ids.inside, g_RK, otherwise))
