"""Memory of the chunked loss: buffers kept from call to call, the number of rows of a chunk, and sums over chunks.

Shape letters: C rows of a chunk, D width, V classes.
"""

import functools
import threading

import torch
from torch import Tensor

from ..kernels import ALIGNMENT, block_bytes

# The default budget: a GPU's memory divided by the first number, but at most the second, in bytes; the third on a CPU.
_SHARE_OF_GPU, _MOST_ON_GPU = 20, 4 << 30
_DEFAULT_ELSEWHERE = 512 << 20
# A GPU computes a matrix product in tiles of this many rows.
_GPU_TILE = 128
CLASSES_AT_ONCE = 8192


class Workspace(threading.local):
    """The buffers of a chunk, kept between calls: fresh memory is slow, because the operating system zeroes it."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a [rows, columns] buffer with undefined content.

        Its rows are aligned for accesses of 128 bits. The gaps between rows may be overwritten.
        """
        stride = -(-columns // ALIGNMENT) * ALIGNMENT
        key = name, device, dtype
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < rows * stride:
            # Free the old one before the new one is allocated. Inference mode is off, because a tensor that is made in
            # it cannot be written outside of it.
            self.buffers.pop(key, None)
            with torch.inference_mode(False):
                buffer = torch.empty(rows * stride, dtype=dtype, device=device)
            # On a GPU the caching allocator keeps freed memory, so that others can use it between calls.
            if device.type == "cpu":
                self.buffers[key] = buffer
        return buffer[: rows * stride].view(rows, stride)[:, :columns]


workspace = Workspace()


# Kind of device -> the budget in bytes that remained after its memory ran out.
_most: dict[str, int] = {}


def free_workspace() -> None:
    """Free the CPU buffers, at most `memory_budget` bytes, that the losses of this thread keep between calls.

    Budgets that were halved because memory ran out get their full size back.
    """
    workspace.buffers.clear()
    _most.clear()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch's allocator on the CPU has no exception type for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def halve_budget(device: torch.device, budget: int | None) -> int:
    """Limit all later losses on this kind of device to half of this budget, and return that half in bytes."""
    _most[device.type] = budget_of(device, budget) // 2
    workspace.buffers.clear()
    return _most[device.type]


def class_slices(num_classes: int) -> list[slice]:
    """Slices of a few thousand classes each, for products whose result is written to a tensor of another dtype."""
    return [slice(v, min(v + CLASSES_AT_ONCE, num_classes)) for v in range(0, num_classes, CLASSES_AT_ONCE)]


@functools.cache
def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return _DEFAULT_ELSEWHERE
    if not torch.cuda.is_available():  # a plan for a machine with one
        return 1 << 30
    return min(_MOST_ON_GPU, torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_GPU)


def budget_of(device: torch.device, budget: int | None) -> int:
    """Bytes that a loss may allocate beyond its inputs and gradients.

    That is less than `budget` if memory ran out before. None means a twentieth of a GPU's memory, at most 4 GiB, and
    512 MiB elsewhere.
    """
    wanted = budget or _default_budget(device)
    return min(wanted, _most.get(device.type, wanted))


def chunk_rows(num_rows: int, logits_bytes: int, temporary_bytes: int, device: torch.device, budget: int) -> int:
    """Rows of a chunk, at least 1: as many as fit in the budget, then spread evenly over the chunks.

    Args:
        num_rows: rows in all.
        logits_bytes: bytes that a row keeps in buffers for the whole chunk.
        temporary_bytes: further bytes that a row needs while its block of rows is worked on.
        device: where the loss runs.
        budget: bytes.

    Returns:
        The number of rows.
    """
    block = block_bytes(device) if temporary_bytes else 0
    fitting = (budget - block) // logits_bytes if budget >= 2 * block else budget // (logits_bytes + temporary_bytes)
    if device.type == "cuda" and fitting > _GPU_TILE:
        fitting -= fitting % _GPU_TILE
    chunks = max(1, -(-num_rows // max(1, fitting)))
    rows = -(-num_rows // chunks)
    if device.type == "cuda" and rows > _GPU_TILE:
        rows += -rows % _GPU_TILE
    return max(1, rows)


def _reaches(total: Tensor, factors: torch.dtype) -> bool:
    """Whether a product of matrices of dtype `factors` can be added to `total` without being rounded first."""
    return total.dtype == factors or (total.is_cuda and factors.itemsize == 2 and total.dtype == torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, first: bool = False) -> None:
    """Add scale * a @ b to `total`, or overwrite `total` with it if `first`.

    Where the device can add a product directly, it is rounded only once, to the dtype of `total`.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, alpha=scale, out=total)
    elif _reaches(total, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, alpha=scale, out=total)
    else:
        for part in class_slices(len(total)):
            _add(total[part], torch.mm(a[part], b), scale, first, total[part])


def _add(total: Tensor, product: Tensor, scale: float, first: bool, target: Tensor) -> None:
    """Write total + scale * product to `target`."""
    if scale != 1.0:
        product *= scale
    # Widen first: adding two dtypes takes three times as long.
    if not first:
        product = product.to(total.dtype).add_(total)
    target.copy_(product)


class GradientSum:
    """The gradient of a weight [V, D] or bias [V], summed over chunks of rows in at least float32 and rounded once.

    Args:
        total: receives the gradient, in its dtype.
        name: name of the buffer that holds the sum where the dtype of `total` is too narrow.
        gemm_dtype: dtype of the matrix products.
        several: whether there is more than one chunk.
    """

    def __init__(self, total: Tensor, name: str, gemm_dtype: torch.dtype, several: bool) -> None:
        self.total = self.partial = total
        wide = torch.promote_types(total.dtype, torch.float32)
        if several and wide != total.dtype:
            self.partial = workspace.take(name, 1, total.numel(), wide, total.device).view(total.shape)
        self.direct = total.dim() == 2 and _reaches(self.partial, gemm_dtype)

    def add(self, g_CV: Tensor, hidden_CD: Tensor, scale: float, first: bool, last: bool) -> None:
        """Add scale * g.T @ hidden; for a bias, scale times the sum of g over its rows."""
        hidden_CD = hidden_CD.to(g_CV.dtype)
        if self.direct:
            add_product(self.partial, g_CV.t(), hidden_CD, scale, first)
            if last and self.partial is not self.total:
                self.total.copy_(self.partial)
            return
        target = self.total if last else self.partial
        for part in class_slices(g_CV.shape[1]):
            if self.total.dim() == 2:
                product = torch.mm(g_CV[:, part].t(), hidden_CD)
            else:
                product = g_CV[:, part].sum(0, dtype=self.partial.dtype)
            _add(self.partial[part], product, scale, first, target[part])


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """Multiply in place by a scalar tensor. A product in bfloat16 would round the factor to 8 bits first."""
    if factor.device.type == "cpu" and factor.tolist() == 1:
        return
    if x.is_cuda and _scale_on_gpu(x, factor):
        return
    if x.element_size() >= factor.element_size():
        x.mul_(factor)
        return
    for part in class_slices(x.shape[0]):
        x[part] = x[part].to(factor.dtype) * factor


def _scale_on_gpu(x: Tensor, factor: Tensor) -> bool:
    """Scale in Triton if possible, and return whether it was: it reads and writes nothing where the factor is 1."""
    try:
        from ..kernels.triton_scale import scalable, scale_in_place_triton
    except ImportError:
        return False
    if not scalable(x) or factor.numel() != 1 or factor.device != x.device:
        return False
    scale_in_place_triton(x, factor)
    return True
