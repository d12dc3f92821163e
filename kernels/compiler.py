"""`torch.compile` for functions that are called with many different sizes."""

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Compiler:
    """`torch.compile`, once for each function and kind of argument. If it fails, eager mode after one warning.

    Row counts and class counts are symbolic, so a step with another number of rows compiles nothing. Each entry is a
    copy of the function's code, because the limit on recompilations counts per code object. No two arguments may share
    memory: compiled code would read the second one where it was in the first call.
    """

    def __init__(self) -> None:
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._failed = False

    def __call__(self, key: Any, function: Callable[..., Any], *args: Any) -> Any:
        if self._failed:
            return function(*args)
        key = (function, key, torch.is_inference_mode_enabled(), torch.get_num_threads())
        compiled = self._functions.get(key)
        if compiled is not None:
            return compiled(*args)
        code, name = function.__code__.replace(), function.__name__
        compiled = torch.compile(types.FunctionType(code, function.__globals__, name), dynamic=True)
        try:
            result = compiled(*args)
        except Exception as error:  # The error of a missing or broken compiler differs between releases.
            self._failed = True
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warnings.warn(f"torch.compile does not work here, using eager PyTorch: {reason}", stacklevel=2)
            return function(*args)
        self._functions[key] = compiled
        return result


def layout(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The properties on which compiled code relies: dtypes, packed rows, and which sizes and strides are equal."""
    sizes = [n for x in tensors if x is not None for n in (x[0].numel(), *x.shape[1:], *x.stride())]
    return tuple(None if x is None else x.dtype for x in tensors), tuple(sizes.index(n) for n in sizes)


def eager(key: Any, function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
