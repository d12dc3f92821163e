"""In which order a loss works, in chunks or blocks of what size, and what that takes: a pure function of the sizes.

Shape letters: N rows, C rows of a chunk, R rows and B classes of a block, D width, V classes, S student, T teacher.

    rows outside      a chunk of rows sees all classes: two products for the logits, two for the gradients. Each chunk
                      reads both heads again, and adds to the head's gradient in float32
    classes outside   a block of classes is seen for all rows, in passes: sums first, then (for the divergences that
                      need sum(w)) D, then the gradients. The logits are computed again in each pass, but nothing of
                      the size of a head is ever made beside its gradient

Large chunks make the first faster; where only small ones fit, the second. A product takes the time of its additions or
that of the memory that it moves, whichever is longer, and a device is known by the ratio of the two.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch

from ..kernels import ALIGNMENT, EAGER_BUFFERS, ClassPasses, RowDivergence, block_bytes
from ..kernels.standardised import STANDARDISING
from .backends import chosen_backend, compact_backend
from .buffers import CLASSES_AT_ONCE, chunk_rows

ORDERS = ("auto", "rows", "classes")
# Floating-point operations of products that a device does in the time in which it moves a byte: of a GPU with matrices
# of 16 bits and of 32 bits, and of a CPU. An H100 did some 650e12 of the first in a second, and moved 2.6e12 bytes.
_FLOPS_PER_BYTE = {("cuda", 2): 250.0, ("cuda", 4): 25.0}
_FLOPS_PER_BYTE_ELSEWHERE = 7.0
# Bytes that it moves while one more kernel starts; on a CPU the small operations beside a block's take as long.
_BYTES_PER_LAUNCH = {"cuda": 12 << 20}
_BYTES_PER_LAUNCH_ELSEWHERE = 1 << 20
_BLOCKS_OF_CLASSES = tuple(1 << i for i in range(7, 15))
# Kernels that could start while the ranks join a chunk: some six calls, each of which takes as long as several.
_JOINING = 40
# Of a row: what each rank tells the others of it, and what is made of that.
_JOINED_BYTES = 3 * 11 * 4
# Of the state and of what is made of it between two passes.
_STATE_BYTES = 32 * 4
# Predictions this near to each other are the same: then rows go outside, and a block is no larger than it need be.
_AS_GOOD = 1.02


@dataclass(frozen=True)
class HeadWork:
    """One model's part of a loss.

    classes: V. width: D; 0 where the logits are given. hidden, weight: dtypes of the hidden states and the head as they
    are stored. products: dtype of the matrix products. logits: dtype of the logits. scaled: whether the head has a
    scale. given: whether the logits are there already.
    """

    classes: int
    width: int
    hidden: torch.dtype
    weight: torch.dtype
    products: torch.dtype
    logits: torch.dtype
    scaled: bool = False
    given: bool = False

    @property
    def row_bytes(self) -> int:
        """Of the logits of a row, in the workspace."""
        return 0 if self.given else -(-self.classes // ALIGNMENT) * ALIGNMENT * self.logits.itemsize

    @property
    def cast_bytes(self) -> int:
        """Of the head in the dtype of the products, where that is another."""
        return self.classes * self.width * self.products.itemsize if self.products != self.weight else 0

    def hidden_bytes(self, rows: int) -> int:
        """Of some rows' hidden states as the product takes them, where they are not stored so."""
        return rows * self.width * self.products.itemsize if self.scaled or self.hidden != self.products else 0


@dataclass(frozen=True)
class JointWork:
    """What a loss does besides where each rank has some of the classes. Everything else is this rank's.

    ranks: of the group. own: whether each has rows of its own, which are gathered; N is then that of all.
    """

    ranks: int
    own: bool

    def row_bytes(self, work: "LossWork", summed: bool) -> int:
        """Of a row, beside its logits. summed: whether rows come in chunks, each with a state and a sum of its own."""
        gathered = sum(side.width * max(side.products.itemsize, side.hidden.itemsize) for side in work.sides)
        sum_bytes = max(4, work.student.hidden.itemsize) * work.student.width if work.hidden_gradient else 0
        kept = summed * _STATE_BYTES + self.ranks * _JOINED_BYTES + (summed or self.own) * sum_bytes
        return kept + (gathered + sum_bytes // self.ranks if self.own else 0)


@dataclass(frozen=True)
class LossWork:
    """What a loss has to do.

    Args:
        rows: N.
        student: its head.
        teacher: its head; None where there is none.
        device: where the loss runs.
        hidden_gradient: whether the hidden states want one.
        weight_gradient: whether the student's head wants one.
        eager: whether the row function makes temporaries.
        passes: with classes outside. A teacher that `read` does not take has unrounded logits.
        rows_only: whether the other order cannot do it.
        standardised: whether the logits are standardised first, in temporaries.
        joint: where each rank has some of the classes.
    """

    rows: int
    student: HeadWork
    teacher: HeadWork | None
    device: torch.device
    hidden_gradient: bool = True
    weight_gradient: bool = True
    eager: bool = False
    passes: ClassPasses = ClassPasses(False, False, False)
    rows_only: bool = False
    standardised: bool = False
    joint: JointWork | None = None

    @property
    def sides(self) -> list[HeadWork]:
        """The models whose logits are computed."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    @property
    def gradients(self) -> bool:
        """Whether anything wants a gradient."""
        return self.hidden_gradient or self.weight_gradient

    @property
    def separate(self) -> bool:
        """Whether the gradient has a buffer of its own, because the logits, which it would overwrite, are wider."""
        return self.gradients and self.student.logits != self.student.products


@dataclass(frozen=True)
class LossPlan:
    """How a loss is worked through.

    Attributes:
        order: "rows" or "classes", whichever is outside.
        rows: C, or R.
        classes: B; V where rows are outside.
        bytes: what the loss allocates beyond its inputs and their gradients.
        workspace: the part of it that a CPU keeps from call to call.
        flops: floating-point operations of all matrix products.
        cost: the predicted time, as the operations that could be done in it.
    """

    order: str
    rows: int
    classes: int
    bytes: int
    workspace: int
    flops: float
    cost: float


class _Costs:
    """Adds up the products and row functions of a loss."""

    def __init__(self, work: LossWork) -> None:
        kind = work.device.type, work.student.products.itemsize
        self.flops_per_byte = _FLOPS_PER_BYTE.get(kind, _FLOPS_PER_BYTE_ELSEWHERE)
        self.launch = self.flops_per_byte * _BYTES_PER_LAUNCH.get(kind[0], _BYTES_PER_LAUNCH_ELSEWHERE)
        self.work = work
        self.flops = self.time = 0.0

    def product(self, m: int, n: int, k: int, itemsize: int, out_bytes: float, times: float = 1) -> None:
        """[m, k] @ [k, n]. out_bytes: read and written of each number of the result."""
        flops = 2.0 * m * n * k
        moved = float(m * k + k * n) * itemsize + float(m * n) * out_bytes
        self.flops += times * flops
        self.time += times * (self.launch + max(flops, self.flops_per_byte * moved))

    def logits(self, rows: int, classes: int, side: HeadWork, times: float, reads: int = 1) -> None:
        """One side's logits of a chunk or block, and how often the row function then reads them."""
        if side.width and not side.given:
            self.product(rows, classes, side.width, side.products.itemsize, side.logits.itemsize, times)
        self.time += times * reads * self.flops_per_byte * rows * classes * side.logits.itemsize

    def gradients(self, rows: int, classes: int, hidden_bytes: float, weight_bytes: float, times: float) -> None:
        """The row function's write, and the products. *_bytes: moved of each number of a sum."""
        student, work = self.work.student, self.work
        itemsize = student.products.itemsize
        self.time += times * self.flops_per_byte * rows * classes * itemsize
        if work.hidden_gradient and student.width:
            self.product(rows, student.width, classes, itemsize, hidden_bytes, times)
        if work.weight_gradient:
            self.product(classes, student.width, rows, itemsize, weight_bytes, times)

    def joining(self, times: float) -> None:
        """The calls with which ranks join what their classes give. What travels does not depend on the order."""
        if self.work.joint is not None:
            self.time += times * _JOINING * self.launch


def _slice_bytes(work: LossWork, classes: int, summed: bool) -> int:
    """Of the slices in which a product reaches a sum of another dtype; see `buffers.add_product`."""
    student = work.student
    into = max(4, student.weight.itemsize) if summed else student.weight.itemsize
    direct = into == student.products.itemsize or (work.device.type == "cuda" and into == 4)
    if not work.weight_gradient or direct:
        return 0
    return min(classes, CLASSES_AT_ONCE) * student.width * (student.products.itemsize + max(4, into))


def _plan_rows(work: LossWork, budget: int) -> LossPlan:
    """With rows outside: the largest chunk that fits beside what is of the size of a head."""
    student, itemsize = work.student, work.student.products.itemsize
    most_classes = max(side.classes for side in work.sides)
    buffers = STANDARDISING * EAGER_BUFFERS if work.standardised else EAGER_BUFFERS if work.eager else 0
    temporary = buffers * most_classes * max(4, student.logits.itemsize)
    kept = sum(side.row_bytes for side in work.sides) + work.separate * student.classes * itemsize
    row = kept + sum(side.hidden_bytes(1) for side in work.sides)
    if work.hidden_gradient and student.width and student.hidden != student.products:
        row += student.width * itemsize  # the product, before it has the dtype of the gradient
    if work.joint is not None:
        row += work.joint.row_bytes(work, summed=True)
    rows, fixed, sums = work.rows, 0, 0
    # A sum over chunks is of the size of the head, unless the gradient itself can be that sum.
    for summed in (False, work.weight_gradient and student.weight.itemsize < 4):
        fixed = sum(side.cast_bytes for side in work.sides) + _slice_bytes(work, student.classes, summed)
        sums = summed * 4 * student.classes * student.width
        fixed += sums
        rows = chunk_rows(work.rows, max(1, row), temporary, work.device, max(1, budget - fixed))
        if rows >= work.rows:
            break
    size = fixed + rows * row + (min(rows * temporary, block_bytes(work.device)) if temporary else 0)
    costs, chunks = _Costs(work), -(-work.rows // max(1, rows))
    for side in work.sides:
        looks = work.passes.looks if side is not student else 0
        reads = 1 + looks + work.passes.of_both + work.gradients
        costs.logits(rows, side.classes, side, chunks, reads)
    if work.gradients:
        costs.gradients(rows, student.classes, itemsize, 8 if chunks > 1 else student.weight.itemsize, chunks)
    costs.joining(chunks)
    return LossPlan("rows", rows, student.classes, size, rows * kept + sums, costs.flops, costs.time)


def _plan_classes(work: LossWork, budget: int, block: int) -> LossPlan:
    """With blocks of so many classes outside, and as many rows at once as fit."""
    student, itemsize, n = work.student, work.student.products.itemsize, work.rows
    teacher = work.teacher
    if teacher is not None and not work.passes.reads_teacher:
        teacher = replace(teacher, logits=torch.promote_types(teacher.products, torch.float32))
    sides = [student] if teacher is None else [student, teacher]
    block = min(block, max(side.classes for side in sides))
    fixed = _STATE_BYTES * n + sum(side.hidden_bytes(n) for side in sides)
    fixed += sum(block * side.width * side.products.itemsize for side in sides if side.cast_bytes)
    fixed += _slice_bytes(work, block, True)
    own_rows = work.joint is not None and work.joint.own
    sums_hidden = work.hidden_gradient and student.hidden.itemsize < 4 and not own_rows
    fixed += sums_hidden * 4 * n * student.width
    if work.joint is not None:
        fixed += n * work.joint.row_bytes(work, summed=False)
    row = kept = block * (sum(side.logits.itemsize for side in sides) + work.separate * itemsize)
    if work.hidden_gradient and work.device.type != "cuda" and itemsize < 4:
        row += student.width * (itemsize + 4)  # the product before it is added to the sum
    temporary = EAGER_BUFFERS * block * max(4, student.logits.itemsize) if work.eager else 0
    narrow = work.weight_gradient and student.weight.itemsize < 4
    rows, sums = chunk_rows(n, row, temporary, work.device, max(1, budget - fixed)), 0
    if narrow and rows < n:
        sums = 4 * block * student.width
        fixed += sums
        rows = chunk_rows(n, row, temporary, work.device, max(1, budget - fixed))
    size = fixed + rows * row + (min(rows * temporary, block_bytes(work.device)) if temporary else 0)
    costs, parts = _Costs(work), -(-n // max(1, rows))
    for side in sides:
        reads = work.passes.reads_teacher + work.passes.looks if side is teacher else 1
        reads += work.passes.of_both + work.gradients
        costs.logits(rows, block, side, parts * side.classes / block * reads)
    if work.gradients:
        tiles = parts * student.classes / block
        costs.gradients(rows, block, 8, 8 if parts > 1 else student.weight.itemsize, tiles)
    costs.joining(1)
    if narrow and rows < n and work.device.type != "cuda":
        # There a part's product is rounded before it reaches the sum, so this is for what fits in no other way.
        costs.time = math.inf
    return LossPlan("classes", rows, block, size, rows * kept + sums, costs.flops, costs.time)


def with_backend(work: LossWork, name: str, divergence: RowDivergence | None, compact: bool) -> tuple[LossWork, str]:
    """Choose the backend of a loss's rows.

    Args:
        work: what there is to do.
        name: of the backend, or "auto".
        divergence: D; None without a teacher's logits.
        compact: whether the teacher is known at few classes.

    Returns:
        The work as that backend does it, and its name.

    Raises:
        UserError: the backend cannot run.
    """
    logits = work.student.logits
    if compact:
        backend = compact_backend(name, work.device, logits, work.student.classes)
    else:
        backend = chosen_backend(name, work.device, logits, max(side.classes for side in work.sides), divergence)
    return replace(work, eager=backend == "eager"), backend


@functools.lru_cache(maxsize=256)
def plan_loss(work: LossWork, budget: int, order: str = "auto") -> LossPlan:
    """Choose the order of the work, and the chunk or block, that is predicted to take least time within a budget.

    Args:
        work: what there is to do.
        budget: bytes that the loss may allocate beyond its inputs and their gradients.
        order: "rows" or "classes" to have that outside, "auto" for the faster of the two.

    Returns:
        The plan. Where nothing fits, that with the fewest bytes.
    """
    plans = [] if order == "classes" else [_plan_rows(work, budget)]
    if order == "classes" or not (work.rows_only or order == "rows"):
        plans += [_plan_classes(work, budget, block) for block in _BLOCKS_OF_CLASSES]
    fitting = [plan for plan in plans if plan.bytes <= budget]
    if not fitting:
        return min(plans, key=lambda plan: plan.bytes)
    best = min(fitting, key=lambda plan: plan.cost * (1 if plan.order == "rows" else _AS_GOOD))
    as_good = [plan for plan in fitting if plan.order == best.order and plan.cost <= best.cost * _AS_GOOD]
    return min(as_good, key=lambda plan: plan.bytes)
