"""The row loss with the vocabulary outside and the rows inside: blocks of classes, each seen for all rows in turn.

Shape letters: N rows, R some of them, B classes of a block, V classes, K classes that student and teacher both have, S
student, T teacher, P pieces of a row.

Between blocks, only a few numbers of each row are kept, so the logits of a block can be discarded after use. The
passes:

    read    every block once: running maxima and sums of exponentials, and what one-read divergences need
    look    every block with a teacher, many times: the border between head and tail, for a divergence that has them
    gather  every block with a teacher: the sums over a row that a divergence needs before its terms
    weigh   every block with a teacher: D and sum(w), for divergences that need sum(w) before a gradient
    write   every block: the gradient

`read` may leave out the teacher if the logarithm of its sum is known already. Blocks come in the order of their
classes, and none has classes on both sides of K. The sums are those of `triton_rows.py`; one-read divergences measure
logits from class 0.

One file, because all passes read and write one common state.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .class_passes import ClassPasses
from .compiler import layout
from .divergences import RowDivergence
from .passes import (
    LOGIT_FLOOR,
    Headed,
    Normalisers,
    Origins,
    Settled,
    crossed_statistics,
    gradient,
    logits,
    mass_from,
    merge,
    reduction,
    row_sums,
    statistics,
    student_gradient,
    student_statistics,
    tempered_statistics,
)
from .pieces import Pieces, row_blocks
from .row_first import HeadSearch
from .row_numbers import RowCoefficients, RowNumbers, RowValues


class ClassBlocks(RowNumbers):
    """The state of N rows, and the passes in PyTorch. `triton_class_blocks.py` has the same passes as kernels.

    state: [N] numbers for each of `FIELDS`. After `normalise` the sums are their logarithms, `product_S` is the
    student's entropy and `cross` a mean.

    Args:
        labels_N: [N] int64 class indices below V.
        divergence: D, one with a formula; None for cross-entropy and entropy alone.
        coefficients: weights of cross-entropy and D, and the temperature.
        compute: dtype of the sums: float32, or float64.
        student_softcap: c above 0: the student's logits z become c * tanh(z / c) first. None: they stay.
        teacher_softcap: the same for the teacher's logits.
        row_weights_N: [N] factor on each row's gradient, or None for 1.
        teacher_lse_N: [N] logarithm of the teacher's sum of e^(z/T) over K classes, where it is known.
        writes: whether a gradient is written in the end.
        compiled: run the passes through `torch.compile`.
    """

    FIELDS: ClassVar = (
        "label", "origin_S", "origin_T", "max_S", "sum_S", "product_S", "max_K", "sum_K", "max_T", "sum_T", "cross",
        "divergence", "weight", "a", "b", "c", "head", "mass",
    )  # fmt: skip

    def __init__(
        self,
        labels_N: Tensor,
        divergence: RowDivergence | None,
        coefficients: RowCoefficients,
        *,
        compute: torch.dtype = torch.float32,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        row_weights_N: Tensor | None = None,
        teacher_lse_N: Tensor | None = None,
        writes: bool = True,
        compiled: bool = False,
    ) -> None:
        self.softcaps = (student_softcap, teacher_softcap)
        super().__init__(divergence, coefficients, self.softcaps, compute, labels_N.device)
        self.labels_N, self.compiled = labels_N, compiled
        self.row_weights_N = None if row_weights_N is None else row_weights_N.to(compute)
        formula = None if divergence is None else divergence.formula
        self.side = None if formula is None else formula.one_read
        self.row_first = None if formula is None else formula.row_first
        passes = ClassPasses.of(divergence, teacher_lse_N is not None, writes, compute)
        self.reads_teacher, self.weighs, self.crosses, self.gathers, self.looks = passes
        self.search: HeadSearch | None = None
        # Forward KL's sum(w) is always -1, so its D may be computed as late as the gradient.
        self.values_on_writing = divergence is not None and not self.crosses and not self.weighs
        # Separate tensors, because compiled code accepts no two arguments that share memory.
        self.state = {x: torch.zeros(len(labels_N), dtype=compute, device=labels_N.device) for x in self.FIELDS}
        for name in ("max_S", "max_K", "max_T"):
            self.of(name).fill_(LOGIT_FLOOR)
        if self.side == "teacher":
            self.of("weight").fill_(-1)
        if divergence is not None and not self.reads_teacher:
            assert teacher_lse_N is not None
            self.of("max_T").copy_(teacher_lse_N.to(compute)[:, None] * coefficients.temperature)
            self.of("sum_T").fill_(1)

    def of(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Look up a field of some rows.

        Args:
            name: one of `FIELDS`.
            rows: which.

        Returns:
            [R, 1], a view of the state.
        """
        return self.state[name][rows, None]

    @property
    def read_sums(self) -> dict[str, str]:
        """The fields that `read` adds up, each with the maximum to which it is relative."""
        found = {"sum_S": "max_S", "product_S": "max_S"}
        if self.divergence is not None:
            found["sum_K"] = "max_K"
        if self.reads_teacher:
            found["sum_T"] = "max_T"
        if self.crosses:
            found["cross"] = "max_T" if self.side == "teacher" else "max_K"
        return found

    @property
    def kept_logits(self) -> Tensor:
        """[K, N] logits that `read` keeps besides the label's: a view, 0 if their class was in no block."""
        return self.state["label"].new_empty(0, len(self.labels_N))

    def values(self) -> RowValues:
        """The values of all rows, after all blocks.

        Returns:
            The values; the divergence is 0 without a teacher.
        """
        cross_entropy = self.of("sum_S") - (self.of("label") - self.of("max_S"))
        return RowValues(*(x[:, 0] for x in (self.of("divergence"), cross_entropy, self.of("product_S"))))

    def normalise(self) -> None:
        """After all blocks were read, take logarithms of the sums, and compute entropies and one-read divergences."""
        sum_S, product_S, max_K, max_T = map(self.of, ("sum_S", "product_S", "max_K", "max_T"))
        entropy = sum_S.log() - product_S / sum_S
        if self.crosses:
            mean = self.of("cross") / self.of("sum_T" if self.side == "teacher" else "sum_K")
            self.of("cross").copy_(mean)
        for name in ("sum_S", "sum_K", "sum_T"):
            self.of(name).log_()
        product_S.copy_(entropy)
        if self.crosses:
            apart = (max_K - self.of("origin_S")) - (max_T - self.of("origin_T"))
            sign = 1 if self.side == "teacher" else -1
            logs = self.of("sum_K") - self.of("sum_T")
            self.of("divergence").copy_(sign * ((apart - mean) * self.inverse_t + logs))
        if self.side == "student":
            self.of("weight").copy_(self.of("divergence"))

    def read(self, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor | None, common: bool) -> None:
        """Add a block of classes to the sums of some rows.

        Args:
            rows: which.
            first: the block's first class.
            student_RB: [R, B] logits before the softcap.
            teacher_RB: [R, B] the teacher's; None where `reads_teacher` is false, and from K on.
            common: whether the classes are below K.
        """
        for part, of_block in self._row_blocks(rows, student_RB, teacher_RB):
            teacher = None if teacher_RB is None else teacher_RB[part]
            self._read_block(of_block, first, student_RB[part], teacher, common)

    def _read_block(self, rows: slice, first: int, student: Tensor, teacher: Tensor | None, common: bool) -> None:
        self._read_label(rows, first, student)
        reduce = functools.partial(self._pieces(student).reduce, self._key(student, teacher))
        options = (self.inverse_t, self.temperature_kind)
        known: list[Tensor]
        if not common:
            known = reduce(student_statistics, (student,), self.caps[0])
        elif teacher is None:
            known = reduce(tempered_statistics, (student,), self.caps[0], *options, False)
        elif not self.crosses:
            known = reduce(statistics, (student, teacher), self.caps, *options)
        else:
            origins = self._origins(rows, first, student, teacher)
            known = reduce(
                crossed_statistics, (student, teacher), self.caps, *options, self.side == "teacher", of_rows=origins
            )
        found = dict(zip(("max_S", "sum_S", "product_S", "sum_K", "max_T", "sum_T", "cross"), known))
        cross = found.get("cross")
        self._join(rows, "max_S", found["max_S"], 1.0, sum_S=found["sum_S"], product_S=found["product_S"])
        if common:
            of_student = {"sum_K": found["sum_K"], **self._side_of("student", cross)}
            self._join(rows, "max_K", found["max_S"], self.inverse_t, **of_student)
        if teacher is not None:
            of_teacher = {"sum_T": found["sum_T"], **self._side_of("teacher", cross)}
            self._join(rows, "max_T", found["max_T"], self.inverse_t, **of_teacher)

    def _origins(self, rows: slice, first: int, student: Tensor, teacher: Tensor) -> Origins:
        origins = Origins(self.of("origin_S", rows), self.of("origin_T", rows))
        if first == 0:
            at = [logits(x[:, :1], cap) for x, cap in zip((student, teacher), self.caps)]
            finite = (at[0] > LOGIT_FLOOR) & (at[1] > LOGIT_FLOOR)
            for origin, z in zip(origins, at):
                origin.copy_(torch.where(finite, z, 0.0))
        return origins

    def _join(self, rows: slice, of_maximum: str, maxima_RP: Tensor, scale: Tensor | float, **pieces: Tensor) -> None:
        """Join the pieces of a block, [R, P] each, with the sums so far. `product_S` belongs to the sum before it."""
        maximum = self.of(of_maximum, rows)
        both = {name: torch.cat((self.of(name, rows), x), 1) for name, x in pieces.items()}
        maxima_RP = torch.cat((maximum, maxima_RP), 1)
        products_RP = both.pop("product_S", None)
        for name, x in both.items():
            new_maximum, total, *product = merge(maxima_RP, scale, x, products_RP)
            self.of(name, rows).copy_(total)
            for p in product:
                self.of("product_S", rows).copy_(p)
        maximum.copy_(new_maximum)

    def _side_of(self, side: str, cross_RP: Tensor | None) -> dict[str, Tensor]:
        """`cross` as one of the sums of the side whose exponentials it contains; empty for the other side."""
        return {} if cross_RP is None or self.side != side else {"cross": cross_RP}

    def _read_label(self, rows: slice, first: int, student: Tensor) -> None:
        at, inside = self._label_in(rows, first, student.shape[1])
        label = self.of("label", rows)
        label.copy_(torch.where(inside, logits(student.gather(1, at), self.caps[0]), label))

    def _label_in(self, rows: slice, first: int, classes: int) -> tuple[Tensor, Tensor]:
        """The label's place among the block's classes, [R, 1], and whether it is one of them."""
        at = self.labels_N[rows, None] - first
        return at.clamp(0, classes - 1), (at >= 0) & (at < classes)

    def _pieces(self, student: Tensor) -> Pieces:
        return Pieces(student.shape[0], student.shape[1], self.compiled)

    def _key(self, *tensors: Tensor | None) -> Any:
        return layout(*tensors), *(c is None for c in self.caps), self.temperature_kind, self.side

    def _normalisers(self, rows: slice) -> Normalisers | Settled:
        names = ("max_K", "sum_K", "max_T", "sum_T")
        if self.row_first is not None:
            return Settled(*(self.of(name, rows) for name in (*names, *"abc")))
        return Normalisers(*(self.of(name, rows) for name in names))

    def _headed(self, rows: slice) -> Headed:
        return Headed(*(self.of(name, rows) for name in ("max_K", "sum_K", "max_T", "sum_T", "head")))

    def heads(self, look: Callable[[], None]) -> None:
        """Find the head of each row, after `normalise`.

        Args:
            look: calls `look` for every block of common classes and all rows, and joins `mass` with other ranks'.
        """
        if self.looks:
            # The likeliest class is the maximum itself, so its log p is minus the logarithm of the sum.
            self.search = HeadSearch(-self.of("sum_T"))
        for _ in range(self.looks):
            assert self.search is not None
            self.of("head").copy_(self.search.begin)
            self.of("mass").zero_()
            look()
            self.search.narrow(self.of("mass"))
        if self.search is not None:
            self.of("head").copy_(self.search.head)

    def look(self, rows: slice, teacher_RB: Tensor) -> None:
        """Add a block of common classes to the probability of all classes that are at least as likely as `search` asks.

        Args:
            rows: which.
            teacher_RB: [R, B] logits before the softcap.
        """
        for part, of_block in self._row_blocks(rows, teacher_RB, None):
            teacher = teacher_RB[part]
            (mass_RP,) = self._pieces(teacher).reduce(
                self._key(teacher), mass_from, (teacher,), self.caps[1], self.inverse_t, of_rows=self._headed(of_block)
            )
            self.of("mass", of_block).add_(mass_RP.sum(1, keepdim=True))

    def gather(self, rows: slice, student_RB: Tensor, teacher_RB: Tensor) -> None:
        """Add a block of common classes to the sums that the terms of D need.

        Args:
            rows: which.
            student_RB: [R, B] logits before the softcap.
            teacher_RB: [R, B] the teacher's.
        """
        assert self.row_first is not None
        sums = self.row_first.sums
        for part, of_block in self._row_blocks(rows, student_RB, teacher_RB):
            student, teacher = student_RB[part], teacher_RB[part]
            found = self._pieces(student).reduce(
                (self._key(student, teacher), sums), row_sums, (student, teacher), self.caps, self.inverse_t, sums,
                of_rows=self._headed(of_block),
            )  # fmt: skip
            for name, x in zip("abc", found):
                self.of(name, of_block).add_(x.sum(1, keepdim=True))

    def settle(self) -> None:
        """After all blocks were gathered, compute the numbers that the terms need from the sums."""
        assert self.row_first is not None
        for name, x in zip("abc", self.row_first.settle(*(self.of(name).clone() for name in "abc"))):
            self.of(name).copy_(x)

    def weigh(self, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor) -> None:
        """Add a block of common classes to D and sum(w) of some rows. Arguments as in `read`.

        Args:
            rows: which.
            first: the block's first class.
            student_RB: [R, B] logits before the softcap.
            teacher_RB: [R, B] the teacher's.
        """
        for part, of_block in self._row_blocks(rows, student_RB, teacher_RB):
            value, weight = self._terms(of_block, student_RB[part], teacher_RB[part])
            self.of("divergence", of_block).add_(value)
            if self.row_first is None:
                self.of("weight", of_block).add_(weight)

    def _terms(self, rows: slice, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """What a block adds to D and sum(w), each [R, 1]."""
        assert self.divergence is not None
        assert self.divergence.formula is not None
        terms = self.divergence.formula.terms
        parameters = (self.inverse_t, self.skew, self.beta, terms)
        both_RP = self._pieces(student).reduce(
            (self._key(student, teacher), terms), reduction, (student, teacher), self.caps, *parameters,
            of_rows=self._normalisers(rows),
        )  # fmt: skip
        value, weight = (x.sum(1, keepdim=True) for x in both_RP)
        return value, weight

    def write(
        self, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor | None, gradient_RB: Tensor
    ) -> None:
        """Write row_weight * d(loss of the row)/d(student logits) of a block of classes for some rows.

        Args:
            rows: which.
            first: the block's first class.
            student_RB: [R, B] logits before the softcap.
            teacher_RB: [R, B] the teacher's; None from K on, and where there is no teacher.
            gradient_RB: [R, B] of any float dtype, or `student_RB` itself: receives the gradient.
        """
        in_place = gradient_RB.data_ptr() == student_RB.data_ptr()
        for part, of_block in self._row_blocks(rows, student_RB, teacher_RB):
            teacher = None if teacher_RB is None else teacher_RB[part]
            self._write_block(of_block, first, student_RB[part], teacher, gradient_RB[part], in_place)

    def _write_block(
        self, rows: slice, first: int, student: Tensor, teacher: Tensor | None, out: Tensor, in_place: bool
    ) -> None:
        target = None if in_place else out
        at, inside = self._label_in(rows, first, student.shape[1])
        label_S = student.gather(1, at)
        at_label = torch.empty_like(label_S, dtype=self.compute)
        max_S, log_sum_S = self.of("max_S", rows), self.of("sum_S", rows)
        a_R1, b_R1 = self._factors_of(rows, max_S)
        run = self._pieces(student).run
        if teacher is None:
            shared = (self.caps[0], max_S, log_sum_S, a_R1)
            student_gradient(label_S, *shared, at_label)
            run(self._key(student, target), student_gradient, student, *shared, target)
        else:
            assert self.divergence is not None
            assert self.divergence.formula is not None
            if self.values_on_writing:
                self.of("divergence", rows).add_(self._terms(rows, student, teacher)[0])
            n, terms = self._normalisers(rows), self.divergence.formula.terms
            log_sum = log_sum_S + (max_S - n.max_S)
            factors = (self.factor_of_power(a_R1, n.log_sum_S, log_sum), b_R1)
            of_both = (
                self.caps, n, self.of("weight", rows), log_sum, factors, self.inverse_t, self.skew, self.beta,
                terms, self.temperature_kind,
            )  # fmt: skip
            gradient(label_S, teacher.gather(1, at), *of_both, at_label)
            run((self._key(student, teacher, target), terms), gradient, student, teacher, *of_both, target)
        self._write_label(out, at, inside, label_S, at_label, a_R1)

    def _factors_of(self, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.factors(None if self.row_weights_N is None else self.row_weights_N[rows, None], like)

    def _write_label(
        self, out: Tensor, at: Tensor, inside: Tensor, label_S: Tensor, gradient_R1: Tensor, a_R1: Tensor
    ) -> None:
        """Write the label's gradient: its gradient like that of any class, minus a for the one-hot label."""
        slope = self.slope(logits(label_S, self.caps[0]))
        # A row whose label is in another block writes back the value that was there.
        with_label = (gradient_R1 - a_R1 * slope).to(out.dtype)
        out.scatter_(1, at, torch.where(inside, with_label, out.gather(1, at)))

    def _row_blocks(self, rows: slice, student_RB: Tensor, teacher_RB: Tensor | None) -> Iterator[tuple[slice, slice]]:
        """Blocks of some rows, as slices of these rows and as slices of all rows."""
        for part in row_blocks(student_RB, teacher_RB, self.compiled):
            yield part, slice(rows.start + part.start, rows.start + part.stop)
