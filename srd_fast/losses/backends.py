"""Which row function computes a loss: Triton on a GPU, `torch.compile` on a CPU, eager PyTorch everywhere."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..errors import UserError
from ..kernels import ClassBlocks, RowDivergence, distillation_rows
from ..kernels.row_numbers import RowBackend
from ..suggest import unknown_name

BACKENDS = ("auto", "triton", "compile", "eager")
# Below this many classes a compiled function does not earn back the seconds that its compilation takes.
_COMPILE_FROM_CLASSES = 16384
# The same for the logits of a whole process, for each of its threads. For each student's logit, its teacher's and its
# gradient, eager mode costs 12 ns of one thread more. Compilation costs a process 10 to 45 s, however many threads.
_COMPILE_FROM_LOGITS = 1 << 31
_logits_to_come: ContextVar[float] = ContextVar("logits_to_come", default=math.inf)


@contextmanager
def expect_logits(number: float) -> Iterator[None]:
    """Tell backend "auto" how many student logits the losses in this block will compute, so that it can judge.

    It compiles only where the logits are many enough to repay the compilation. Outside of such a block it assumes so.

    Args:
        number: rows times classes, summed over all losses of the block.
    """
    token = _logits_to_come.set(number)
    try:
        yield
    finally:
        _logits_to_come.reset(token)


def check_backend(name: Any) -> None:
    """Refuse a name that is not in `BACKENDS`."""
    if name not in BACKENDS:
        raise UserError(unknown_name("backend", name, BACKENDS))


def _why_not_triton(device: torch.device, dtype: torch.dtype, divergence: RowDivergence | None) -> str | None:
    try:
        from ..kernels import triton_sums
    except ImportError:
        return "the package triton is not installed"
    if device.type != "cuda" and not triton_sums.INTERPRETED:
        return f"the tensors are on {device}, and Triton needs a GPU (or the environment variable TRITON_INTERPRET=1)"
    if dtype == torch.float64:
        return "the Triton kernel has no float64"
    return _why_no_formula(divergence)


def _why_no_formula(divergence: RowDivergence | None) -> str | None:
    if divergence is not None and divergence.formula is None:
        return "a registered divergence runs in eager PyTorch"
    return None


def chosen_backend(
    name: str, device: torch.device, dtype: torch.dtype, num_classes: int, divergence: RowDivergence | None
) -> str:
    """Choose what runs the row function: `name`, or what "auto" means here.

    Args:
        name: one of `BACKENDS`.
        device: where the logits are.
        dtype: of the logits.
        num_classes: V.
        divergence: D, or None without a teacher's logits.

    Raises:
        UserError: the named backend cannot run here.
    """
    why_not_triton = _why_not_triton(device, dtype, divergence)
    why_not_compile = _why_no_formula(divergence)
    if name == "auto":
        enough = num_classes >= _COMPILE_FROM_CLASSES
        enough = enough and _logits_to_come.get() >= _COMPILE_FROM_LOGITS * torch.get_num_threads()
        compile_pays = device.type == "cpu" and enough and why_not_compile is None
        name = "triton" if device.type == "cuda" and why_not_triton is None else "compile" if compile_pays else "eager"
    if name == "triton" and why_not_triton is not None:
        raise UserError(f"backend 'triton' cannot run: {why_not_triton}; use backend='auto'")
    if name == "compile" and why_not_compile is not None:
        raise UserError(f"backend 'compile' cannot run: {why_not_compile}; use backend='auto' or 'eager'")
    return name


def row_backend(name: str, padding_is_scratch: bool) -> RowBackend:
    """The row function of a chosen backend.

    Args:
        name: what `chosen_backend` gave.
        padding_is_scratch: whether a row's stride beyond its classes may be read and written.
    """
    if name == "triton":
        from ..kernels.triton_rows import distillation_rows_triton

        return functools.partial(distillation_rows_triton, padding_is_scratch=padding_is_scratch)
    return functools.partial(distillation_rows, compiled=name == "compile")


def class_backend(name: str) -> Callable[..., ClassBlocks]:
    """The `ClassBlocks` class of a chosen backend, for the same loss over blocks of classes."""
    if name == "triton":
        from ..kernels.triton_class_blocks import TritonClassBlocks

        return TritonClassBlocks
    return functools.partial(ClassBlocks, compiled=name == "compile")


def compact_backend(name: str, device: torch.device, dtype: torch.dtype, num_classes: int) -> str:
    """What runs the student's rows of a compact teacher: "compile" or "eager"."""
    if name == "triton":
        raise UserError("backend 'triton' cannot run: it has no kernel for compact teachers; use backend='auto'")
    if name == "auto" and device.type != "cpu":
        return "eager"
    return chosen_backend(name, device, dtype, num_classes, None)
