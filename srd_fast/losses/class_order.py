"""Loss and gradient with the classes outside: all rows see one block of classes at a time, so no memory grows with V.

Shape letters: N packed rows, R rows and B classes of a block, D width, V classes, K classes that student and teacher
both have, S student, T teacher.

The head's gradient is written block by block in its own dtype, rounded once; that of the hidden states is summed over
the blocks in at least float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import ClassBlocks, CompactClassBlocks, RowValues
from .backends import class_backend
from .buffers import GradientSum, add_product, workspace
from .head import Head
from .packed import Gradients, PackedRows

_ROWS_AT_ONCE = 1024


class Joined(Protocol):
    """Joins the state of this rank's classes with the states of ranks that have other classes of the same rows."""

    def has_read(self, loss: ClassBlocks) -> None:
        """Join after all blocks were read."""

    def has_looked(self, loss: ClassBlocks) -> None:
        """Join after `look` saw all blocks once."""

    def has_gathered(self, loss: ClassBlocks) -> None:
        """Join after `gather` saw all blocks."""

    def has_weighed(self, loss: ClassBlocks) -> None:
        """Join after `weigh` saw all blocks, or after `write` where that one computes D."""


class _Side:
    """The rows of one model in the dtype of the products, and its head, one block of classes at a time."""

    def __init__(self, name: str, hidden_ND: Tensor, head: Head, products: torch.dtype, logits: torch.dtype) -> None:
        assert head.weight is not None
        self.name, self.head, self.products, self.dtype = name, head, products, logits
        self.hidden_ND = hidden_ND.to(products)
        self.classes = len(head.weight)

    def of(self, classes: slice) -> Head:
        """The head of a block of classes, [B, D], in the dtype of the products."""
        assert self.head.weight is not None
        bias = None if self.head.bias is None else self.head.bias[classes]
        return Head(self.head.weight[classes], bias, None, self.head.scale).to(self.products)

    def logits(self, rows: slice, head: Head) -> Tensor:
        """[R, B] before the softcap, in the workspace."""
        hidden_RD = self.hidden_ND[rows]
        classes = head.num_classes(hidden_RD)
        out = workspace.take(self.name, len(hidden_RD), classes, self.dtype, hidden_RD.device)
        return head.project(hidden_RD, out)


def run_class_blocks(
    hidden_ND: Tensor,
    head: Head,
    rows: PackedRows,
    weights_N: Tensor | None,
    size: tuple[int, int],
    backend: str,
    needs: tuple[bool, bool, bool] = (False, False, False),
    joined: Joined | None = None,
) -> tuple[RowValues, Gradients]:
    """Compute the values of all rows, and the gradients of sum(weights * loss).

    Args:
        hidden_ND: [N, D] the student's hidden states.
        head: the student's, with a weight.
        rows: the labels, the teacher and the options. A teacher must have a head with a weight.
        weights_N: [N] factor on each row in the gradients, or None for 1.
        size: R and B, each at least 1.
        backend: what runs the row function: "triton", "compile" or "eager".
        needs: whether the gradients of hidden states, weight and bias are computed.
        joined: joins the ranks after each pass, if other ranks have other classes of the rows.

    Returns:
        Unweighted values of each row, and the gradients, None for those not in `needs`.
    """
    assert head.weight is not None
    n, device, writes = len(hidden_ND), hidden_ND.device, any(needs)
    products, logits = rows.dtypes(hidden_ND, head)
    student = _Side("student", hidden_ND, head, products, logits)
    wide = torch.promote_types(student.dtype, torch.float32)
    loss = class_state(rows, head.softcap, weights_N, wide, backend, writes)
    teacher = None
    if rows.teacher_ND is not None and rows.teacher_head is not None:
        of_teacher, logits = rows.dtypes(rows.teacher_ND, rows.teacher_head)
        if not loss.reads_teacher:
            # The known sum is of unrounded logits. Beside it, rounded ones would move a probability near 1 by percents.
            logits = torch.promote_types(logits, torch.float32)
        teacher = _Side("teacher", rows.teacher_ND, rows.teacher_head, of_teacher, logits)
    tiles = _Tiles(student, teacher, n, size)
    for tile in tiles.walk(teacher_is_read=loss.reads_teacher):
        loss.read(tile.rows, tile.classes.start, tile.student_RB, tile.teacher_RB, tile.common)
    if joined is not None:
        joined.has_read(loss)
    loss.normalise()
    if loss.gathers:
        _gather(loss, tiles, joined)
    for tile in tiles.walk() if loss.weighs else []:
        if tile.teacher_RB is not None:
            loss.weigh(tile.rows, tile.classes.start, tile.student_RB, tile.teacher_RB)
    if joined is not None and loss.weighs:
        joined.has_weighed(loss)
    if not writes:
        return loss.values(), Gradients(None, None, None)
    gradients = _Sums(hidden_ND, student, needs, wide)
    for tile in tiles.walk():
        g_RB = tile.student_RB
        if student.dtype != products:
            g_RB = workspace.take("gradient", len(g_RB), g_RB.shape[1], products, device)
        loss.write(tile.rows, tile.classes.start, tile.student_RB, tile.teacher_RB, g_RB)
        gradients.add(tile, g_RB, several=size[0] < n)
    if joined is not None and loss.values_on_writing:
        joined.has_weighed(loss)
    return loss.values(), gradients.finish(rows, weights_N, joined)


def _gather(loss: ClassBlocks, tiles: "_Tiles", joined: Joined | None) -> None:
    """Compute the numbers of each row that the terms of the divergence need."""

    def look() -> None:
        for rows, teacher_RB in tiles.teachers():
            loss.look(rows, teacher_RB)
        if joined is not None:
            joined.has_looked(loss)

    loss.heads(look)
    for tile in tiles.walk():
        if tile.teacher_RB is not None:
            loss.gather(tile.rows, tile.student_RB, tile.teacher_RB)
    if joined is not None:
        joined.has_gathered(loss)
    loss.settle()


def class_state(
    rows: PackedRows,
    softcap: float | None,
    weights_N: Tensor | None,
    compute: torch.dtype,
    backend: str,
    writes: bool,
) -> ClassBlocks:
    """Make the state of rows whose classes come in blocks.

    Args:
        rows: the labels, the teacher and the options.
        softcap: softcap of the student's logits, or None.
        weights_N: [N] factor on each row in the gradients, or None for 1.
        compute: dtype of the sums.
        backend: what runs the row function: "triton", "compile" or "eager".
        writes: whether a gradient is written in the end.
    """
    options: dict[str, Any] = {"compute": compute, "student_softcap": softcap, "row_weights_N": weights_N}
    if rows.compact is not None:
        options["compiled"] = backend == "compile"
        return CompactClassBlocks(rows.labels_N, rows.compact, rows.coefficients, **options)
    options["teacher_softcap"] = None if rows.teacher_head is None else rows.teacher_head.softcap
    options |= {"teacher_lse_N": rows.teacher_lse_N, "writes": writes}
    return class_backend(backend)(rows.labels_N, rows.divergence, rows.coefficients, **options)


@dataclass
class _Tile:
    """The logits of some rows and classes.

    head: the student's, of these classes. teacher_RB: None without a teacher, for classes from K on, and in passes that
    do not read the teacher. common: whether the classes are below K. last: whether the rows are the last.
    """

    rows: slice
    classes: slice
    head: Head
    student_RB: Tensor
    teacher_RB: Tensor | None
    common: bool
    last: bool


class _Tiles:
    """All rows and classes, in tiles of R rows and B classes (`size`): the outer loop is over the classes."""

    def __init__(self, student: _Side, teacher: _Side | None, num_rows: int, size: tuple[int, int]) -> None:
        self.student, self.teacher = student, teacher
        self.parts = [slice(i, min(i + size[0], num_rows)) for i in range(0, num_rows, size[0])]
        self.common = 0 if teacher is None else min(student.classes, teacher.classes)
        # No block has classes on both sides of K.
        ends = (0, self.common), (self.common, student.classes)
        self.blocks = [slice(i, min(i + size[1], end)) for begin, end in ends for i in range(begin, end, size[1])]

    def walk(self, teacher_is_read: bool = True) -> Iterator[_Tile]:
        """Yield each tile in turn; the next one overwrites its logits."""
        for block in self.blocks:
            common = block.start < self.common
            teacher = self.teacher if teacher_is_read and common else None
            head_S, head_T = self.student.of(block), None if teacher is None else teacher.of(block)
            for part in self.parts:
                teacher_RB = None if teacher is None or head_T is None else teacher.logits(part, head_T)
                student_RB = self.student.logits(part, head_S)
                yield _Tile(part, block, head_S, student_RB, teacher_RB, common, part is self.parts[-1])

    def teachers(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows and the teacher's logits of each tile; the next ones overwrite them."""
        for block in self.blocks:
            if self.teacher is not None and block.start < self.common:
                head = self.teacher.of(block)
                for part in self.parts:
                    yield part, self.teacher.logits(part, head)


class _Sums:
    """The gradients, summed block by block."""

    def __init__(self, hidden_ND: Tensor, student: _Side, needs: tuple[bool, bool, bool], wide: torch.dtype) -> None:
        weight, bias = student.head.weight, student.head.bias
        assert weight is not None
        self.student, self.hidden_ND = student, hidden_ND
        self.sum_ND: Tensor | None = None
        if needs[0]:
            dtype = torch.promote_types(hidden_ND.dtype, wide)
            self.sum_ND = torch.zeros(hidden_ND.shape, dtype=dtype, device=hidden_ND.device)
        fresh = torch.empty_like if len(hidden_ND) else torch.zeros_like
        self.weight_VD = fresh(weight) if needs[1] else None
        self.bias_V = fresh(bias) if bias is not None and needs[2] else None

    def add(self, tile: _Tile, g_RB: Tensor, several: bool) -> None:
        """Add the gradients of a tile. several: whether the rows are divided into several parts."""
        weight = tile.head.weight
        assert weight is not None
        if self.sum_ND is not None:
            add_product(self.sum_ND[tile.rows], g_RB, weight)
        for x, name in ((self.weight_VD, "d_weight"), (self.bias_V, "d_bias")):
            if x is not None:
                of_block = GradientSum(x[tile.classes], name, g_RB.dtype, several)
                hidden_RD = self.student.hidden_ND[tile.rows]
                of_block.add(g_RB, hidden_RD, tile.head.scale, first=tile.rows.start == 0, last=tile.last)

    def finish(self, rows: PackedRows, weights_N: Tensor | None, joined: Joined | None) -> Gradients:
        """The gradients, after all blocks. With `joined`, that of the hidden states stays an unrounded sum."""
        d_hidden_ND = self.sum_ND
        if d_hidden_ND is not None:
            if self.student.head.scale != 1.0:
                d_hidden_ND *= self.student.head.scale
            if joined is not None:
                return Gradients(d_hidden_ND, self.weight_VD, self.bias_V)
            if rows.projection_ND is not None:
                for i in range(0, len(d_hidden_ND), _ROWS_AT_ONCE):
                    part = slice(i, i + _ROWS_AT_ONCE)
                    d_hidden_ND[part] -= rows.missing(part, weights_N, d_hidden_ND.dtype)
            d_hidden_ND = d_hidden_ND.to(self.hidden_ND.dtype)
        return Gradients(d_hidden_ND, self.weight_VD, self.bias_V)
