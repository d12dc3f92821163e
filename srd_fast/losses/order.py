"""The order in which a loss works, the size of its chunks or blocks, and their memory: a pure function of the sizes.

Shape letters: N rows, C rows of a chunk, R rows and B classes of a block, D width, V classes, S student, T teacher.

    rows outside      the outer loop is over chunks of rows, each of which sees all classes: two products for the
                      logits, two for the gradients. Each chunk reads both heads again, and adds to the head's gradient
                      in float32
    classes outside   the outer loop is over blocks of classes, each of which all rows see, in passes: sums first, then
                      (for the divergences that need sum(w)) D, then the gradients. The logits are computed again in
                      each pass, but the gradient of the head is the only tensor of its size

The first is faster with large chunks, the second where only small chunks fit. A product is predicted to take the time
of its operations or of its memory traffic, whichever is longer. A device is described by the ratio of the two speeds.
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
# Floating-point operations of matrix products in the time in which a device moves one byte: a GPU with dtypes of 2 and
# of 4 bytes, and a CPU. An H100 was measured at 650e12 operations a second with 2 bytes, and 2.6e12 bytes a second.
_FLOPS_PER_BYTE = {("cuda", 2): 250.0, ("cuda", 4): 25.0}
_FLOPS_PER_BYTE_ELSEWHERE = 7.0
# Bytes that a device moves while one more kernel starts; on a CPU, during the small operations beside those of a block,
# and while its threads wake: 1,024 rows took 1.5 times their products in blocks of 512 classes, 1.2 times in 2,048.
_BYTES_PER_LAUNCH = {"cuda": 12 << 20}
_BYTES_PER_LAUNCH_ELSEWHERE = 8 << 20
_BLOCKS_OF_CLASSES = tuple(1 << i for i in range(7, 15))
# Joining a chunk's results over the ranks takes as long as starting so many kernels: about six calls, each of several.
_JOINING = 40
# Bytes of a row: the numbers that each rank sends of it, and the results of joining them.
_JOINED_BYTES = 3 * 11 * 4
# Bytes of a row: its state, and temporaries of the work between two passes.
_STATE_BYTES = 32 * 4
# Predictions this close count as equal: then rows go outside, and the smaller block is taken.
_AS_GOOD = 1.02


@dataclass(frozen=True)
class HeadWork:
    """The sizes and dtypes of one model's head in a loss.

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
        """Bytes of a row's logits in the workspace."""
        return 0 if self.given else -(-self.classes // ALIGNMENT) * ALIGNMENT * self.logits.itemsize

    @property
    def cast_bytes(self) -> int:
        """Bytes of the head's copy in the dtype of the products; 0 if it has that dtype."""
        return self.classes * self.width * self.products.itemsize if self.products != self.weight else 0

    def hidden_bytes(self, rows: int) -> int:
        """Bytes of some rows' hidden states in the dtype of the products; 0 if they have that dtype."""
        return rows * self.width * self.products.itemsize if self.scaled or self.hidden != self.products else 0


@dataclass(frozen=True)
class JointWork:
    """The additional work of a loss where each rank has some of the classes. All other sizes are those of this rank.

    ranks: number of ranks in the group. own: whether each rank has rows of its own, which are gathered; N then counts
    the rows of all ranks.
    """

    ranks: int
    own: bool

    def row_bytes(self, work: "LossWork", summed: bool) -> int:
        """Bytes of a row beside its logits. summed: whether rows come in chunks, each with its own state and sum."""
        gathered = sum(side.width * max(side.products.itemsize, side.hidden.itemsize) for side in work.sides)
        sum_bytes = max(4, work.student.hidden.itemsize) * work.student.width if work.hidden_gradient else 0
        kept = summed * _STATE_BYTES + self.ranks * _JOINED_BYTES + (summed or self.own) * sum_bytes
        return kept + (gathered + sum_bytes // self.ranks if self.own else 0)


@dataclass(frozen=True)
class LossWork:
    """What a loss has to do.

    Args:
        rows: N.
        student: the student's head.
        teacher: the teacher's head; None without a teacher's logits.
        device: where the loss runs.
        hidden_gradient: whether the hidden states need a gradient.
        weight_gradient: whether the student's head needs a gradient.
        eager: whether the row function makes temporaries.
        passes: the passes with classes outside. If `read` leaves the teacher out, its logits are unrounded.
        rows_only: whether only the order with rows outside can do it.
        standardised: whether the logits are standardised first, in temporaries.
        joint: the additional work if each rank has some of the classes.
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
        """Whether anything needs a gradient."""
        return self.hidden_gradient or self.weight_gradient

    @property
    def separate(self) -> bool:
        """Whether the gradient has its own buffer: it overwrites the logits unless they have a wider dtype."""
        return self.gradients and self.student.logits != self.student.products


@dataclass(frozen=True)
class LossPlan:
    """The order and sizes in which a loss works, and what they cost.

    Attributes:
        order: "rows" or "classes", whichever the outer loop is over.
        rows: C, or R.
        classes: B; V where rows are outside.
        bytes: what the loss allocates beyond its inputs and their gradients.
        workspace: the part of `bytes` that a CPU keeps from call to call.
        flops: floating-point operations of all matrix products.
        cost: the predicted time, as the number of floating-point operations that the device could do in it.
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
        """Add [m, k] @ [k, n]. out_bytes: bytes read and written for each number of the result."""
        flops = 2.0 * m * n * k
        moved = float(m * k + k * n) * itemsize + float(m * n) * out_bytes
        self.flops += times * flops
        self.time += times * (self.launch + max(flops, self.flops_per_byte * moved))

    def logits(self, rows: int, classes: int, side: HeadWork, times: float, reads: int = 1) -> None:
        """Add the logits of one side in a chunk or block, which the row function then reads `reads` times."""
        if side.width and not side.given:
            self.product(rows, classes, side.width, side.products.itemsize, side.logits.itemsize, times)
        self.time += times * reads * self.flops_per_byte * rows * classes * side.logits.itemsize

    def gradients(self, rows: int, classes: int, hidden_bytes: float, weight_bytes: float, times: float) -> None:
        """Add the row function's write and the gradients' products. *_bytes: bytes moved for each number of a sum."""
        student, work = self.work.student, self.work
        itemsize = student.products.itemsize
        self.time += times * self.flops_per_byte * rows * classes * itemsize
        if work.hidden_gradient and student.width:
            self.product(rows, student.width, classes, itemsize, hidden_bytes, times)
        if work.weight_gradient:
            self.product(classes, student.width, rows, itemsize, weight_bytes, times)

    def joining(self, times: float) -> None:
        """Add the calls that join the ranks' results. The bytes sent are left out: both orders send the same."""
        if self.work.joint is not None:
            self.time += times * _JOINING * self.launch


def _slice_bytes(work: LossWork, classes: int, summed: bool) -> int:
    """Bytes of the slices through which a product is added to a sum of another dtype; see `buffers.add_product`."""
    student = work.student
    into = max(4, student.weight.itemsize) if summed else student.weight.itemsize
    direct = into == student.products.itemsize or (work.device.type == "cuda" and into == 4)
    if not work.weight_gradient or direct:
        return 0
    return min(classes, CLASSES_AT_ONCE) * student.width * (student.products.itemsize + max(4, into))


def _plan_rows(work: LossWork, budget: int) -> LossPlan:
    """Plan with rows outside: the largest chunk that fits beside the tensors of the size of a head."""
    student, itemsize = work.student, work.student.products.itemsize
    most_classes = max(side.classes for side in work.sides)
    buffers = STANDARDISING * EAGER_BUFFERS if work.standardised else EAGER_BUFFERS if work.eager else 0
    temporary = buffers * most_classes * max(4, student.logits.itemsize)
    kept = sum(side.row_bytes for side in work.sides) + work.separate * student.classes * itemsize
    row = kept + sum(side.hidden_bytes(1) for side in work.sides)
    if work.hidden_gradient and student.width and student.hidden != student.products:
        row += student.width * itemsize  # the product, before it is cast to the dtype of the gradient
    if work.joint is not None:
        row += work.joint.row_bytes(work, summed=True)
    rows, fixed, sums = work.rows, 0, 0
    # A sum over chunks takes the size of the head, unless the gradient itself can hold that sum.
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
    """Plan with classes outside, in blocks of `block` classes, and as many rows at once as fit."""
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
        # Each part's product would be rounded before it reaches the sum: only if nothing else fits.
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
        The work, completed for that backend, and the backend's name.

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
    """Choose the order, and the size of chunks or blocks, that are predicted to take the least time within a budget.

    Args:
        work: what there is to do.
        budget: bytes that the loss may allocate beyond its inputs and their gradients.
        order: "rows" or "classes", whichever the outer loop is over, or "auto" for the faster of the two.

    Returns:
        The plan. If nothing fits, the one with the fewest bytes.
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
