"""`triton.jit` and `triton.language` where Triton may be missing, and constants of the functions that it compiles."""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or None without Triton."""
    return None if triton is None else triton.jit(function)


def constexpr(value: float) -> Any:
    """A module's number that functions of `jit` may use; without Triton, the number itself."""
    return value if triton is None else tl.constexpr(value)


LN2 = constexpr(0.6931471805599453)
LOG2E = constexpr(1.4426950408889634)
