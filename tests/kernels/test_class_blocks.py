"""Blocks of classes: how they are cut does not matter, nor what is known of the teacher, nor the logits' dtypes.

`test_kernels.py` has their accuracy. Under TRITON_INTERPRET=1 they are the kernels.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_cases import (
    BETA,
    BY_CLASSES,
    INTERPRETED,
    SKEW,
    Result,
    Rows,
    by_backend,
    coefficients,
    make_rows,
    textbook,
)
from tiny import DIVERGENCES, assert_same

from srd_fast.kernels import RowCoefficients, RowDivergence, distillation_rows
from srd_fast.kernels.class_blocks import ClassBlocks

BACKEND = ("triton" if INTERPRETED else "eager") + BY_CLASSES
COUNT = 2 if INTERPRETED else 7
# Interpreted, what takes a moment in PyTorch takes seconds: most of it is marked long there.
SLOW = pytest.mark.long if INTERPRETED else ()
BY_DEFAULT = ("forward_kl", "jsd")
FEW = [pytest.param(d, marks=() if d in BY_DEFAULT else SLOW, id=f"{BACKEND}-{d}") for d in DIVERGENCES]


def blocks(*args: Any, **options: Any) -> ClassBlocks:
    if INTERPRETED:
        from srd_fast.kernels.triton_class_blocks import TritonClassBlocks

        return TritonClassBlocks(*args, **options)
    return ClassBlocks(*args, **options)


def assert_equal(found: Result, expected: Result, tolerance: float, but: tuple[str, ...] = ()) -> None:
    for name, x, y in zip(Result._fields, found, expected):
        if name not in but:
            assert_same(x, y, tolerance, name)


@pytest.mark.parametrize("classes", [pytest.param((97, 97), marks=SLOW), (97, 80), pytest.param((80, 97), marks=SLOW)])
@pytest.mark.parametrize("divergence", FEW)
def test_the_width_of_blocks_does_not_matter(divergence: str, classes: tuple[int, int]) -> None:
    """One block or two, several uneven ones, a last one of a single class."""
    sample = make_rows("random", 1 if INTERPRETED else COUNT, classes)
    expected = by_backend(BACKEND, sample, divergence, 2.0, width=1000)
    for width in (40, max(classes) - 1, *(() if INTERPRETED else (7,))):
        assert_equal(by_backend(BACKEND, sample, divergence, 2.0, width=width), expected, 3e-6)


@pytest.mark.parametrize("divergence", FEW)
def test_the_rows_of_a_part_do_not_matter(divergence: str) -> None:
    sample = make_rows("random", COUNT, (97, 80))
    expected = by_backend(BACKEND, sample, divergence, 4.0, parts=1)
    assert_equal(by_backend(BACKEND, sample, divergence, 4.0, parts=COUNT), expected, 1e-6)


@pytest.mark.parametrize("softcap", [6.0, pytest.param(None, marks=SLOW)])
@pytest.mark.parametrize("divergence", FEW)
def test_a_known_sum_of_the_teacher_gives_the_same(divergence: str, softcap: float | None) -> None:
    for classes in ((97, 80),) if INTERPRETED else ((97, 97), (97, 80)):
        sample = make_rows("random", 1 if INTERPRETED else COUNT, classes, softcap=softcap)
        expected = by_backend(BACKEND, sample, divergence, 2.0)
        assert_equal(by_backend(BACKEND, sample, divergence, 2.0, teacher_lse=True), expected, 3e-6)


@pytest.mark.parametrize("known", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize("divergence", FEW)
def test_values_without_a_gradient_are_the_same(divergence: str, known: bool) -> None:
    sample = make_rows("random", 1 if INTERPRETED else COUNT, (97, 80))
    expected = by_backend(BACKEND, sample, divergence, 2.0)
    found = by_backend(BACKEND, sample, divergence, 2.0, writes=False, teacher_lse=known)
    assert torch.equal(found.gradient, sample.student_CV)  # nothing was written
    assert_equal(found, expected, 3e-6 if known else 0.0, but=("gradient",))


@pytest.mark.parametrize(
    ("divergence", "known", "writes", "reads_teacher", "weighs"),
    [
        ("forward_kl", False, False, True, False),
        ("forward_kl", True, False, True, False),
        ("forward_kl", False, True, True, False),
        ("forward_kl", True, True, False, False),
        ("reverse_kl", True, True, True, False),
        ("reverse_kl", True, False, True, False),
        ("jsd", False, True, True, True),
        ("jsd", True, True, False, True),
        ("jsd", True, False, False, True),
        ("tvd", False, False, True, True),
    ],
)
def test_which_passes_need_the_teacher(
    divergence: str, known: bool, writes: bool, reads_teacher: bool, weighs: bool
) -> None:
    """One pass for the values of one-read divergences; the first leaves the teacher out where its sum is enough."""
    d, labels = RowDivergence.of(divergence), torch.zeros(3, dtype=torch.long)
    loss = blocks(labels, d, coefficients(2.0), teacher_lse_N=torch.zeros(3) if known else None, writes=writes)
    assert (loss.reads_teacher, loss.weighs) == (reads_teacher, weighs)


@pytest.mark.parametrize("gradient", [None, torch.float32], ids=["over the logits", "beside them"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.bfloat16, torch.float32),
        pytest.param(torch.float32, torch.bfloat16, marks=SLOW),
        pytest.param(torch.float16, torch.bfloat16, marks=SLOW),
    ],
)
def test_sides_may_differ_in_dtype(student: torch.dtype, teacher: torch.dtype, gradient: torch.dtype | None) -> None:
    sample = make_rows("random", COUNT, (97, 90), student)
    sample.teacher_CV = make_rows("random", COUNT, (97, 90), teacher).teacher_CV
    # Under autograd in float64; the teacher's logits are what they are in its own dtype.
    exact = textbook(sample, "reverse_kl", 2.0, torch.float64)
    found = by_backend(BACKEND, sample, "reverse_kl", 2.0, gradient_dtype=gradient)
    assert_equal(found, exact, 1e-5, but=("gradient",))
    assert found.gradient.dtype == (gradient or student)
    assert_same(found.gradient, exact.gradient, max(1e-5, torch.finfo(found.gradient.dtype).eps))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cross_entropy_alone(softcap: float | None) -> None:
    sample = make_rows("random", COUNT, (97, 97))
    k = RowCoefficients(0.7, 0.0, 1.0)
    expected_gradient = torch.empty_like(sample.student_CV)
    expected = distillation_rows(
        sample.student_CV, None, sample.labels_C, None, k,
        student_softcap=softcap, row_weights_C=sample.weights_C, gradient_CV=expected_gradient,
    )  # fmt: skip
    loss = blocks(sample.labels_C, None, k, student_softcap=softcap, row_weights_N=sample.weights_C)
    z, rows, cuts = sample.student_CV.clone(), slice(0, COUNT), (0, 40, 97)
    for a, b in pairwise(cuts):
        loss.read(rows, a, z[:, a:b], None, common=False)
    loss.normalise()
    for a, b in pairwise(cuts):
        loss.write(rows, a, z[:, a:b], None, z[:, a:b])
    values = loss.values()
    assert not values.divergence.any()
    for x, y in zip((*values[1:], z), (*expected[1:], expected_gradient)):
        assert_same(x, y, 2e-6)


def test_rows_that_others_own_are_left_alone() -> None:
    """The passes of some rows touch neither the state nor the gradient of the others."""
    sample = make_rows("random", 3, (97, 97))
    loss = blocks(sample.labels_C, RowDivergence.of("jsd", SKEW, BETA), coefficients(2.0))
    before = {name: x.clone() for name, x in loss.state.items()}
    z_S, z_T, part = sample.student_CV.clone(), sample.teacher_CV, slice(1, 2)
    loss.read(part, 0, z_S[part], z_T[part], common=True)
    loss.weigh(part, 0, z_S[part], z_T[part])
    loss.write(part, 0, z_S[part], z_T[part], z_S[part])
    for name, x in loss.state.items():
        assert torch.equal(x[[0, 2]], before[name][[0, 2]]), name
    assert torch.equal(z_S[[0, 2]], sample.student_CV[[0, 2]])
    assert not torch.equal(z_S[1], sample.student_CV[1])


def test_a_row_without_any_class_in_a_block_is_as_good_as_others() -> None:
    """The first block, or the last, is ruled out by both sides: sums begin, or end, with nothing."""
    for a, b in ((0, 40), (80, 97)):
        sample = make_rows("random", 1 if INTERPRETED else COUNT, (97, 97))
        sample.labels_C.clamp_(40, 79)
        sample.student_CV[:, a:b] = sample.teacher_CV[:, a:b] = -math.inf
        rest = [i for i in range(97) if not a <= i < b]
        labels = sample.labels_C - (b if a == 0 else 0)
        fewer = Rows(sample.student_CV[:, rest], sample.teacher_CV[:, rest], labels, sample.weights_C)
        expected = by_backend(BACKEND, fewer, "reverse_kl", 2.0)
        found = by_backend(BACKEND, sample, "reverse_kl", 2.0, width=40)
        assert_same(found.gradient[:, rest], expected.gradient, 3e-6)
        assert not found.gradient[:, a:b].any()
        assert_equal(found, expected, 3e-6, but=("gradient",))
