"""How a block of rows is processed: in blocks of rows that fit in the CPU's caches, and in pieces for compiled sums.

Shape letters: R rows of a block, V classes, P pieces of a row, W classes of a piece.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .compiler import Compiler, eager, layout
from .passes import Headed, Normalisers, Origins, Settled

# Bytes of V-wide tensors that a block of rows may hold: logits alone where compiled, temporaries too in eager mode.
_BLOCK_BYTES = {"cpu": 24 << 20}
_BLOCK_BYTES_ELSEWHERE = 256 << 20
EAGER_BUFFERS = 12
"""V-wide tensors of the compute dtype that are alive at once in eager mode."""
# The most classes that compiled code may add up one after the other.
_PIECE = 2048
ALIGNMENT = 16
"""Rows whose stride is a multiple of this many elements can be read and written 128 bits at a time."""

_compile = Compiler()


def block_bytes(device: torch.device) -> int:
    """Bytes that the V-wide tensors of a block of rows may take.

    Args:
        device: where the rows are.

    Returns:
        24 MiB on a CPU, 256 MiB elsewhere.
    """
    return _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE)


def row_blocks(student_CV: Tensor, teacher_CV: Tensor | None, compiled: bool) -> Iterator[slice]:
    """Slices of nearly equal length that cover the rows. None has a single row, unless there is only one."""
    rows, classes = student_CV.shape
    stored = student_CV.element_size() + (0 if teacher_CV is None else teacher_CV.element_size())
    compute = torch.promote_types(student_CV.dtype, torch.float32)
    row_bytes = classes * (stored if compiled else EAGER_BUFFERS * compute.itemsize)
    fitting = max(2, block_bytes(student_CV.device) // max(1, row_bytes))
    count = min(-(-rows // fitting), max(1, rows // 2))
    bounds = [rows * i // count for i in range(count + 1)] if rows else []
    return map(slice, bounds[:-1], bounds[1:])


class Pieces:
    """Runs functions of a block of rows, eager or compiled; reductions run on pieces of each row.

    compiled: whether it compiles. run: calls a function with a key that says on what compiled code relies.

    Args:
        rows: number of rows of a chunk. A single row is not compiled: sizes 0 and 1 are never symbolic.
        classes: number of classes of each row.
        compiled: whether it may compile.
    """

    def __init__(self, rows: int, classes: int, compiled: bool) -> None:
        self.compiled = compiled and rows > 1 and classes > 3
        self.run: Callable[..., Any] = _compile if self.compiled else eager
        # The number of pieces, of a few thousand classes each, that leaves the fewest classes over.
        numbers = range(max(2, classes // (2 * _PIECE)), max(3, classes // _PIECE))
        self.number = min(numbers, key=lambda n: (classes % n, classes // n % ALIGNMENT)) if self.compiled else 1

    def _of(self, x: Tensor) -> Iterator[Tensor]:
        """[R, V] as [R, P, W], then the classes that are left over."""
        whole = x.shape[1] - x.shape[1] % self.number
        yield x[:, :whole].unflatten(1, (self.number, -1))
        if whole < x.shape[1]:
            yield x[:, None, whole:]

    def reduce(
        self,
        key: Any,
        function: Callable[..., Any],
        sides: tuple[Tensor, ...],
        *args: Any,
        of_rows: Normalisers | Settled | Headed | Origins | None = None,
    ) -> list[Tensor]:
        """Reduce all pieces with `function`; each result is [R, P]. of_rows: tensors [R, 1], its next argument."""
        main, *left = zip(*map(self._of, sides))
        rest = (of_rows, *args) if of_rows else args
        parts = [function(*x, *rest) for x in left]
        if of_rows:
            rest = (type(of_rows)(*(x.repeat(1, self.number) for x in of_rows)), *args)
        parts.append(self.run((key, layout(*main)), function, *main, *rest))
        return [torch.cat(x, 1) for x in zip(*parts)]
