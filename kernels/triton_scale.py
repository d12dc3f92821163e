"""Multiplication by a number that only the GPU knows. Where that number is 1, nothing is read or written.

`backward` gets its factor as a tensor: reading it would make the host wait, and it is nearly always 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit
def scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x[:size] *= factor in float32, rounded once."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < size).to(tl.float32)
        tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < size)


def scale_in_place_triton(x: Tensor, factor: Tensor) -> None:
    """x *= factor, for float32, bfloat16 and float16 without gaps in memory; the factor has one element."""
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=WARPS)


def scalable(x: Tensor) -> bool:
    """Whether `scale_in_place_triton` can take the tensor."""
    whole = x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous())
    return whole and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
