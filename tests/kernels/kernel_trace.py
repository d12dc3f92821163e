"""Run the Triton row kernel in Triton's interpreter and print, for each case, the bytes it loads and stores a logit.

A program of its own, because TRITON_INTERPRET must be set before the kernel is imported.
"""

import itertools
import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from srd_fast.kernels import FORMULAS, RowCoefficients, RowDivergence
from srd_fast.kernels.triton_rows import distillation_rows_triton

# Three blocks of a program, the last of them short. Rows are as long as the loss makes them: a multiple of 16.
ROWS, CLASSES, STRIDE = 2, 4500, 4512


def count_bytes() -> dict[str, int]:
    """From now on, bytes of global memory that unmasked lanes move."""
    counts = {"loads": 0, "stores": 0}
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def counted(kind: str, pointers: Any, mask: Any) -> None:
        counts[kind] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: Any, pointers: Any, mask: Any, *others: Any, **named: Any) -> Any:
        counted("loads", pointers, mask)
        return load(self, pointers, mask, *others, **named)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        counted("stores", pointers, mask)
        return store(self, pointers, value, mask, *others)

    interpreter.InterpreterBuilder.create_masked_load = counting_load
    interpreter.InterpreterBuilder.create_masked_store = counting_store
    return counts


def main() -> None:
    counts = count_bytes()
    results = {}
    for divergence, gradient in itertools.product([*FORMULAS, None], (True, False)):
        student, teacher = (torch.randn(ROWS, STRIDE).bfloat16()[:, :CLASSES] for _ in range(2))
        counts.update(loads=0, stores=0)
        distillation_rows_triton(
            student,
            None if divergence is None else teacher,
            torch.tensor([3, CLASSES - 1]),
            None if divergence is None else RowDivergence.of(divergence),
            RowCoefficients(0.1, 0.9, 2.0),
            gradient_CV=student if gradient else None,
            padding_is_scratch=True,
        )
        name = f"{divergence or 'cross_entropy'} {'gradient' if gradient else 'values'}"
        results[name] = {kind: count / (ROWS * CLASSES) for kind, count in counts.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
