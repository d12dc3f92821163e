"""Loss and gradient where each rank of a group has some of the classes, and joins its results with the other ranks'.

Shape letters: N rows of this rank, C rows of a chunk, of all ranks, D width, S student, T teacher, V_r this rank's
classes of the student, K_r this rank's classes that student and teacher both have.

    rows outside      a chunk of rows sees all classes of this rank. Its logits are computed once and kept for all
                      passes (read, weigh, write); the ranks join their results after each pass
    classes outside   as on one rank, in `class_order.py`; after each pass the ranks join the results of all rows at
    once
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import ClassBlocks, ClassPasses, RowValues
from .backends import chosen_backend, compact_backend
from .buffers import GradientSum, add_product, budget_of, class_slices, workspace
from .class_order import class_state, run_class_blocks
from .head import Head, VocabularyShard
from .joint import JointRows, Part
from .order import HeadWork, JointWork, LossPlan, LossWork, plan_loss
from .packed import Gradients, PackedRows
from .vocabulary import TeacherBlock, agree, check_ranges, refusing_together

Needs = tuple[bool, bool, bool]


def run_shard(
    hidden_ND: Tensor, head: Head, rows: PackedRows, weights_N: Tensor | None, needs: Needs = (False, False, False)
) -> tuple[RowValues, Gradients]:
    """Compute the values of this rank's rows, and the gradients of sum(weights * loss) over the rows of all ranks.

    All ranks of the group call it together.

    Args:
        hidden_ND: [N, D] the student's hidden states.
        head: the student's, a shard.
        rows: the labels, the teacher and the options.
        weights_N: [N] factor on each row in the gradients, or None for 1.
        needs: whether the gradients of hidden states, weight and bias are computed.

    Returns:
        Unweighted values of each row, and the gradients, None for those not in `needs`.

    Raises:
        UserError: the loss cannot run on one of the ranks. All ranks raise it.
    """
    shard, weight = head.shard, head.weight
    assert shard is not None
    assert weight is not None
    with refusing_together(shard, weight):
        backend = _backend(hidden_ND, head, rows)
    local = _Local.agreed(hidden_ND, head, rows, weights_N, needs, backend)
    return local.run(hidden_ND, weights_N, needs, backend)


def _backend(hidden_ND: Tensor, head: Head, rows: PackedRows) -> str:
    """Choose what runs the rows, and refuse what cannot be computed class by class."""
    if rows.student_NV is not None or (rows.teacher_head is not None and rows.teacher_head.weight is None):
        raise UserError("a vocabulary in shards needs hidden states and heads, but logits are given")
    if rows.divergence is not None and rows.divergence.formula is None:
        raise UserError(
            "a registered divergence sees whole rows, and no rank has these where the vocabulary is in shards: give "
            "weights that are whole (full_tensor()), or use a built-in divergence"
        )
    if rows.standardize:
        raise UserError(
            "standardize_logits sees whole rows, and no rank has these where the vocabulary is in shards: give weights "
            "that are whole (full_tensor()), or set it to False"
        )
    logits = rows.dtypes(hidden_ND, head)[1]
    classes = head.num_classes(hidden_ND)
    if rows.compact is not None:
        return compact_backend(rows.backend, hidden_ND.device, logits, classes)
    return chosen_backend(rows.backend, hidden_ND.device, logits, classes, rows.divergence)


def _what_is_the_same(hidden_ND: Tensor, head: Head, rows: PackedRows, weights_N: Tensor | None, needs: Needs) -> Any:
    """What must be equal on all ranks, because it decides what they send each other, or what the loss is."""
    assert head.shard is not None
    assert head.weight is not None
    formula = None if rows.divergence is None else rows.divergence.formula
    d, teacher, compact = rows.divergence, rows.teacher_head, rows.compact
    known = {} if compact is None else {name: x for name, x in vars(compact).items() if isinstance(x, Tensor)}
    of_teacher: Any = None
    if teacher is not None and rows.teacher_ND is not None and teacher.weight is not None:
        width, dtypes = teacher.weight.shape[1], rows.dtypes(rows.teacher_ND, teacher)
        of_teacher = teacher.num_classes(rows.teacher_ND), width, rows.teacher_ND.dtype, dtypes
    return {
        "number of classes": head.shard.classes,
        "rows of the VocabularyShard": head.shard.rows,
        "width and dtype of student_hidden": (head.weight.shape[1], hidden_ND.dtype),
        "dtypes of products and logits": rows.dtypes(hidden_ND, head),
        "student_softcap": head.softcap,
        "student_scale": head.scale,
        "divergence, skew and beta": None if d is None else (formula and formula.name, d.skew, d.beta),
        "temperature, sft_weight and temperature_scaling": tuple(rows.coefficients),
        "what requires a gradient": needs[:2],
        "order": rows.order,
        "whether rows have weights": weights_N is not None,
        "classes, width and dtype of the teacher": of_teacher,
        "teacher_softcap": None if teacher is None else teacher.softcap,
        "teacher_scale": None if teacher is None else teacher.scale,
        "whether teacher_weight is in shards": teacher is not None and teacher.shard is not None,
        "teacher_lse": rows.teacher_lse_N is not None,
        "kind of the teacher": type(compact),
        "columns of the teacher": {name: (x.shape[1:], x.dtype) for name, x in known.items()},
    }


@dataclass(frozen=True)
class _Local:
    """A loss on this rank's classes.

    head: the student's for these classes, without the shard; teacher: the same of the teacher, or None. rows: with
    class indices of the whole vocabulary. joint: how the ranks work together. plan: the same on all ranks.
    """

    head: Head
    shard: VocabularyShard
    teacher: Head | None
    rows: PackedRows
    joint: JointRows
    plan: LossPlan

    @staticmethod
    def agreed(
        hidden_ND: Tensor, head: Head, rows: PackedRows, weights_N: Tensor | None, needs: Needs, backend: str
    ) -> "_Local":
        """Make the plan from numbers that all ranks have told each other, so that it is the same on all."""
        shard, weight = head.shard, head.weight
        assert shard is not None
        assert weight is not None
        common, block = 0, None
        if rows.teacher_ND is not None and rows.teacher_head is not None:
            common = min(shard.classes, rows.teacher_head.num_classes(rows.teacher_ND))
            block = TeacherBlock(rows.teacher_head, _below(common, shard.first, len(weight)))
        of_teacher = (0, 0, 0) if block is None else block.numbers
        budget = budget_of(hidden_ND.device, rows.memory_budget)
        numbers = len(hidden_ND), shard.first, len(weight), budget, int(backend == "eager"), *of_teacher
        of_ranks = agree(shard, rows.labels_N, numbers, _what_is_the_same(hidden_ND, head, rows, weights_N, needs))

        classes = [range(first, first + n) for _, first, n, *_ in of_ranks]
        check_ranges(classes, shard.classes, "student")
        wanted = [_below(common, part.start, len(part)) for part in classes]
        teacher = None
        if block is not None and rows.teacher_head is not None and rows.teacher_ND is not None:
            if rows.teacher_head.shard is not None:
                have = [range(first, first + n) for *_, first, n, _ in of_ranks]
                check_ranges(have, rows.teacher_head.shard.classes, "teacher")
            teacher = block.of([(first, n, kept) for *_, first, n, kept in of_ranks], wanted)
        joint = JointRows(shard, classes, [n for n, *_ in of_ranks])

        sides = [_work(hidden_ND, head, rows, max(map(len, classes)))]
        if teacher is not None and rows.teacher_ND is not None:
            sides.append(_work(rows.teacher_ND, teacher, rows, max(map(len, wanted))))
        work = LossWork(
            joint.total,
            sides[0],
            sides[1] if len(sides) > 1 else None,
            hidden_ND.device,
            needs[0],
            needs[1],
            eager=any(numbers[4] for numbers in of_ranks),
            passes=ClassPasses.of(rows.divergence, rows.teacher_lse_N is not None, any(needs)),
            joint=JointWork(joint.ranks, shard.own_rows),
        )
        plan = plan_loss(work, min(numbers[3] for numbers in of_ranks), rows.order)
        return _Local(replace(head, shard=None), shard, teacher, rows, joint, plan)

    def run(
        self, hidden_ND: Tensor, weights_N: Tensor | None, needs: Needs, backend: str
    ) -> tuple[RowValues, Gradients]:
        """Run all parts in turn."""
        products = self.rows.dtypes(hidden_ND, self.head)[0]
        by_rows = self.plan.order == "rows"
        parts = list(self.joint.parts(self.plan.rows if by_rows else max(1, self.joint.total) * self.joint.ranks))
        d_hidden_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if needs[0] else None
        chunks = _Chunks(self, hidden_ND, needs, backend, len(parts) > 1) if by_rows else None
        wide = torch.promote_types(self.rows.dtypes(hidden_ND, self.head)[1], torch.float32)
        values = RowValues(*(hidden_ND.new_empty(len(hidden_ND), dtype=wide) for _ in range(3)))
        of_head: Sequence[Tensor | None] = (None, None)
        if not parts or not by_rows:
            of_head = [
                torch.zeros_like(x) if x is not None and needed else None
                for x, needed in zip((self.head.weight, self.head.bias), needs[1:])
            ]
        for part in parts:
            # Cast to the products' dtype before they are sent: fewer bytes.
            hidden_CD = self.joint.gather(hidden_ND.to(products) if self.shard.own_rows else hidden_ND, part)
            rows = self._rows_of(part, weights_N, by_rows)
            weights_C = rows.weights_N
            if chunks is not None:
                found, sum_CD = chunks.run(hidden_CD, rows, weights_C, last=part.last)
            else:
                size = self.plan.rows, self.plan.classes
                found, (sum_CD, *of_head) = run_class_blocks(
                    hidden_CD, self.head, rows, weights_C, size, backend, needs, self.joint
                )
            for whole, piece in zip(values, found):
                whole[part.own] = self.joint.of_own(piece, part)
            if d_hidden_ND is not None and sum_CD is not None:
                own_CD = self.joint.add_hidden(sum_CD, part)
                if self.rows.projection_ND is not None:
                    own_CD -= self.rows.missing(part.own, weights_N, own_CD.dtype)
                d_hidden_ND[part.own] = own_CD
        if chunks is not None and parts:
            of_head = [None if x is None else x.total for x in chunks.sums]
        return values, Gradients(d_hidden_ND, *of_head)

    def _rows_of(self, part: Part, weights_N: Tensor | None, by_rows: bool) -> PackedRows:
        """The part's rows, with class indices of this rank's head."""
        rows, joint, first = self.rows, self.joint, self.shard.first
        compact, teacher_CD = rows.compact, None
        # A chunk has all logits in memory, so the known sum would save nothing.
        lse_N = None if by_rows else rows.teacher_lse_N
        labels_C, weights_C, lse_C = joint.gather_numbers((rows.labels_N, weights_N, lse_N), part)
        assert labels_C is not None
        if compact is not None:
            known = {name: joint.gather(x, part) for name, x in vars(compact).items() if isinstance(x, Tensor)}
            if compact.ids_CK is not None:
                known["ids_CK"] = known["ids_CK"] - first
            compact = replace(compact, **known)
        if rows.teacher_ND is not None and self.teacher is not None:
            products = rows.dtypes(rows.teacher_ND, self.teacher)[0]
            teacher_CD = joint.gather(rows.teacher_ND.to(products) if self.shard.own_rows else rows.teacher_ND, part)
        return replace(
            rows,
            teacher_ND=teacher_CD,
            teacher_head=self.teacher,
            labels_N=labels_C - first,
            weights_N=weights_C,
            compact=compact,
            projection_ND=None,
            teacher_lse_N=lse_C,
            shard=None,
        )


def _below(common: int, first: int, classes: int) -> range:
    """Those of the `classes` classes from `first` on that are below K."""
    return range(min(first, common), min(first + classes, common))


def _work(hidden_ND: Tensor, head: Head, rows: PackedRows, classes: int) -> HeadWork:
    assert head.weight is not None
    dtypes = rows.dtypes(hidden_ND, head)
    return HeadWork(classes, head.weight.shape[1], hidden_ND.dtype, head.weight.dtype, *dtypes, head.scale != 1.0)


class _Chunks:
    """Rows outside: one chunk after the other, with the sums of the head's gradient."""

    def __init__(self, loss: _Local, hidden_ND: Tensor, needs: Needs, backend: str, several: bool) -> None:
        self.joint, self.needs, self.backend = loss.joint, needs, backend
        self.products, self.logits = loss.rows.dtypes(hidden_ND, loss.head)
        self.wide = torch.promote_types(self.logits, torch.float32)
        self.sum_dtype = torch.promote_types(hidden_ND.dtype, self.wide)
        self.head = loss.head.to(self.products)
        self.teacher, self.of_teacher = None, self.logits
        if loss.teacher is not None and loss.rows.teacher_ND is not None:
            products, self.of_teacher = loss.rows.dtypes(loss.rows.teacher_ND, loss.teacher)
            self.teacher = loss.teacher.to(products)
        self.sums = [
            GradientSum(torch.empty_like(x), name, self.products, several) if x is not None and needed else None
            for x, name, needed in (
                (loss.head.weight, "d_weight", needs[1]),
                (loss.head.bias, "d_bias", needs[2]),
            )
        ]
        self.first = True

    def run(
        self, hidden_CD: Tensor, rows: PackedRows, weights_C: Tensor | None, last: bool
    ) -> tuple[RowValues, Tensor | None]:
        """Values of a chunk, and the part of its hidden gradient that comes from this rank's classes."""
        student_CV = _logits("student", hidden_CD, self.head, self.logits)
        teacher_CK, common = None, 0
        if self.teacher is not None and rows.teacher_ND is not None:
            teacher_CK = _logits("teacher", rows.teacher_ND, self.teacher, self.of_teacher)
            common = teacher_CK.shape[1]
        count, classes = student_CV.shape
        everything, writes = slice(0, count), any(self.needs)
        loss = class_state(rows, self.head.softcap, weights_C, self.wide, self.backend, writes)
        blocks = [(0, common, teacher_CK), (common, classes, None)]
        blocks = [block for block in blocks if block[0] < block[1]]
        for begin, end, teacher in blocks:
            loss.read(everything, begin, student_CV[:, begin:end], teacher, end <= common)
        self.joint.has_read(loss)
        loss.normalise()
        common_CK = student_CV[:, :common]
        if loss.gathers:
            self._gather(loss, everything, common_CK, teacher_CK)
        if loss.weighs:
            if common and teacher_CK is not None:
                loss.weigh(everything, 0, common_CK, teacher_CK)
            self.joint.has_weighed(loss)
        if not writes:
            return loss.values(), None
        g_CV = student_CV
        if self.products != self.logits:
            g_CV = workspace.take("gradient", count, classes, self.products, g_CV.device)
        for begin, end, teacher in blocks:
            loss.write(everything, begin, student_CV[:, begin:end], teacher, g_CV[:, begin:end])
        if loss.values_on_writing:
            self.joint.has_weighed(loss)
        return loss.values(), self._products(g_CV, hidden_CD, last)

    def _gather(self, loss: ClassBlocks, rows: slice, student_CK: Tensor, teacher_CK: Tensor | None) -> None:
        """Compute the numbers of each row that the terms of the divergence need."""

        def look() -> None:
            if student_CK.shape[1] and teacher_CK is not None:
                loss.look(rows, teacher_CK)
            self.joint.has_looked(loss)

        loss.heads(look)
        if student_CK.shape[1] and teacher_CK is not None:
            loss.gather(rows, student_CK, teacher_CK)
        self.joint.has_gathered(loss)
        loss.settle()

    def _products(self, g_CV: Tensor, hidden_CD: Tensor, last: bool) -> Tensor | None:
        assert self.head.weight is not None
        sum_CD = None
        if self.needs[0]:
            # A rank without classes writes nothing, so its sum must start at 0.
            sum_CD = hidden_CD.new_zeros(hidden_CD.shape, dtype=self.sum_dtype)
            if g_CV.is_cuda or g_CV.dtype == self.sum_dtype:
                add_product(sum_CD, g_CV, self.head.weight, self.head.scale)
            else:
                # The ranks' parts may nearly cancel. A CPU would round this product, so slices are widened first.
                for part in class_slices(g_CV.shape[1]):
                    g, weight = g_CV[:, part].to(self.sum_dtype), self.head.weight[part].to(self.sum_dtype)
                    add_product(sum_CD, g, weight, self.head.scale)
        for total in self.sums:
            if total is not None:
                total.add(g_CV, hidden_CD, self.head.scale, first=self.first, last=last)
        self.first = False
        return sum_CD


def _logits(name: str, hidden_CD: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """[C, V_r] before the softcap, in the workspace."""
    classes = head.num_classes(hidden_CD)
    return head.project(hidden_CD, workspace.take(name, len(hidden_CD), classes, dtype, hidden_CD.device))
