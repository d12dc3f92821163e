"""The row functions against float64 and against each other, and the loss through each of them.

In an ordinary process the backends are eager PyTorch and `torch.compile`. Triton needs TRITON_INTERPRET=1 before it is
imported: test_interpreted.py runs this file once more, with Triton as backend.
Each row function has whole rows or, by the name "... classes", blocks of classes: `test_class_blocks.py` has the rest
of these.
"""

import gc
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    BETA,
    BY_CLASSES,
    INTERPRETED,
    KINDS,
    SKEW,
    TEMPERATURES,
    Rows,
    assert_accurate,
    by_backend,
    coefficients,
    make_rows,
    textbook,
)
from spies import Wide
from test_losses import Problem, gradients, problem
from tiny import DIVERGENCES, ROW_FIRST, assert_same, rounding
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef

from srd_fast import UserError, distillation_loss, distillation_loss_from_logits, register_divergence
from srd_fast.kernels import RowCoefficients, RowDivergence, distillation_rows, pieces
from srd_fast.losses import free_workspace
from srd_fast.losses.buffers import workspace

BACKENDS = ("triton",) if INTERPRETED else ("eager", "compile")
ROW_FUNCTIONS = (*BACKENDS, *(b + BY_CLASSES for b in BACKENDS))
DTYPES = (torch.float32, torch.bfloat16)
COMPILED, INTERPRETED_BLOCKS = "compile" + BY_CLASSES, "triton" + BY_CLASSES
SMALL = ((97, 97), (151, 128), (128, 151))
LARGE = ((32000, 32000), (49152, 49152), (151936, 152064), (152064, 151936), (262144, 262144))
# One dtype alone for the backends that are slow to compile or to interpret.
EACH = [(b, d) for b, d in product(BACKENDS, DTYPES) if b == "eager" or d == torch.float32]
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="runs in the ordinary process")


def by_default(divergence: str, dtype: torch.dtype, classes: tuple[int, int], temperature: float, backend: str) -> bool:
    """A few of what takes seconds to compile or to interpret: everything once, not everything with everything."""
    usual = (torch.float32, (97, 97), 2.0)
    if divergence in ROW_FIRST and (backend != "eager" or temperature != 2.0 or classes == (128, 151)):
        # `tests/losses/test_row_first.py` has each of these in every way once.
        return backend == "triton" and (dtype, classes, temperature) == usual and divergence == "csd_us"
    others = sum(a != b for a, b in zip((dtype, classes, temperature), usual))
    if backend == "compile":
        return others == 0 or (others == 1 and divergence == "reverse_kl" and classes == (151, 128))
    if backend == "triton":
        return others == 0 or (others == 1 and divergence == ("jsd" if temperature == 2.0 else "reverse_kl"))
    if backend == COMPILED:
        return others == 0 and divergence == "reverse_kl"
    if backend == INTERPRETED_BLOCKS:
        return others == 0 and divergence in ("forward_kl", "reverse_kl", "jsd")
    return backend == "eager" or others <= 1


def functions(dtypes: tuple[torch.dtype, ...]) -> Iterator[Any]:
    """(divergence, backend, dtype), one dtype alone for what takes long; no blocks of classes compiled."""
    for divergence, backend, dtype in product((*DIVERGENCES, *ROW_FIRST), ROW_FUNCTIONS, dtypes):
        if backend != COMPILED and (backend.startswith("eager") or dtype == torch.float32):
            # The interpreter takes seconds for each.
            usual = ("reverse_kl",) if backend == INTERPRETED_BLOCKS else ("forward_kl", "skew_reverse_kl")
            long = (INTERPRETED and divergence not in usual) or (divergence in ROW_FIRST and backend != "eager")
            yield pytest.param(divergence, backend, dtype, marks=pytest.mark.long if long else ())


def accuracy_table() -> Iterator[Any]:
    """(divergence, dtype, classes, temperature, backend); what takes minutes is marked long."""
    vocabularies = (*SMALL, (2049, 2049)) if INTERPRETED else SMALL + LARGE
    for entry in product((*DIVERGENCES, *ROW_FIRST), DTYPES, vocabularies, TEMPERATURES, ROW_FUNCTIONS):
        divergence, dtype, classes, temperature, backend = entry
        if backend.startswith("compile") and classes[0] != classes[1] and temperature != 2.0:
            continue  # minutes of compiling
        default = classes not in LARGE and by_default(*entry)
        # One large vocabulary by default, where nothing is left to compile.
        usual = (classes, dtype, temperature) == ((49152, 49152), torch.float32, 2.0)
        default |= usual and backend in BACKENDS and divergence not in ROW_FIRST
        name = f"{backend}-{divergence}-{str(dtype)[6:]}-{classes[0]}-{classes[1]}-T{temperature}"
        yield pytest.param(*entry, marks=() if default else pytest.mark.long, id=name)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes few classes at a time, so that a small vocabulary has several blocks, the last of them short."""
    if INTERPRETED:
        from srd_fast.kernels import triton_class_blocks, triton_rows

        for launcher in (triton_rows, triton_class_blocks):
            usual = launcher.launch_options

            def small(v: int, usual: Any = usual, **options: Any) -> dict[str, Any]:
                return {**usual(v, **options), "BLOCK": 32 if v < 64 else 64 if v < 1000 else 1024}

            monkeypatch.setattr(launcher, "launch_options", small)


# Accuracy.


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("divergence", "dtype", "classes", "temperature", "backend"), accuracy_table())
def test_no_further_from_float64_than_plain_torch(
    divergence: str, dtype: torch.dtype, classes: tuple[int, int], temperature: float, backend: str
) -> None:
    large = classes[0] > 1000
    count = 3 if classes[0] > 100_000 else 12 if large else 64
    for kind in KINDS:
        if (divergence, kind) == ("tvd", "identical"):
            continue  # a kink: test_total_variation_of_equal_rows_has_no_gradient
        tried = 3 if large else None if not INTERPRETED else 2 if backend == "triton" else 1
        assert_accurate(backend, divergence, temperature, kind, count, tried, classes=classes, dtype=dtype)


# `test_loss_and_gradients_of_each_backend` has it compiled.
SOFTCAPPED = [
    (b, d, c)
    for b, d, c in product(ROW_FUNCTIONS, ("reverse_kl", "jsd"), SMALL)
    if not b.startswith("compile") and (b, d) != (INTERPRETED_BLOCKS, "jsd")
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("backend", "divergence", "classes"), SOFTCAPPED)
def test_softcaps_are_as_accurate(backend: str, divergence: str, classes: tuple[int, int]) -> None:
    for kind in ("random", "peaked", "masked"):
        tried = None if not INTERPRETED else 3 if backend == "triton" else 1
        assert_accurate(backend, divergence, 2.0, kind, 16, tried, classes=classes, softcap=8.0)


EQUAL_ROWS = [(b, d) for b, d in product(ROW_FUNCTIONS, DTYPES) if b != COMPILED]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("backend", "dtype"), EQUAL_ROWS)
def test_kl_of_identical_rows_is_zero(backend: str, dtype: torch.dtype) -> None:
    shapes = {"compile": ((97, 97),), INTERPRETED_BLOCKS: ((100, 90),)}
    for classes in shapes.get(backend, ((97, 97), (100, 90))):
        sample = make_rows("identical", 1 if backend == INTERPRETED_BLOCKS else 2 if INTERPRETED else 9, classes, dtype)
        for temperature in TEMPERATURES if backend.startswith("eager") else (2.0,):
            for divergence in ("forward_kl", "reverse_kl"):
                # Vectorised loops may sum the same exponentials in another order on either side.
                allowed = 0.0 if backend.startswith("eager") else rounding(max(classes))
                found = by_backend(backend, sample, divergence, temperature).divergence
                assert (found.abs() <= allowed).all()


@pytest.mark.parametrize(("backend", "dtype"), EQUAL_ROWS)
def test_total_variation_of_equal_rows_has_no_gradient(backend: str, dtype: torch.dtype) -> None:
    sample = make_rows("identical", 1 if backend == INTERPRETED_BLOCKS else 2 if INTERPRETED else 9, (97, 97), dtype)
    sample.weights_C = torch.ones_like(sample.weights_C)
    found, alone = (by_backend(backend, sample, name, 2.0) for name in ("tvd", "forward_kl"))
    assert (found.divergence.abs() < rounding(97)).all()
    # What rounding leaves of a float32 sum may move a narrower gradient to the next number.
    assert_same(found.gradient, alone.gradient, rounding(97) if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("divergence", "backend", "dtype"), functions(DTYPES))
def test_nothing_is_ever_nan(divergence: str, backend: str, dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    changes: dict[str, Callable[[Rows], Any]] = {
        "nothing": lambda r: None,
        "certain": lambda r: (r.student_CV[:, 5].fill_(1e4), r.teacher_CV[:, 3].fill_(1e9)),
        "one class left": lambda r: (r.student_CV[:, 1:].fill_(-math.inf), r.teacher_CV[:, :-1].fill_(-math.inf)),
        "no class left": lambda r: (r.student_CV.fill_(-math.inf), r.teacher_CV.fill_(-math.inf)),
        "lowest numbers": lambda r: (r.student_CV[:, 9:].fill_(lowest), r.teacher_CV[:, 5:].fill_(lowest)),
        "label ruled out": lambda r: r.student_CV.scatter_(1, r.labels_C[:, None], -math.inf),
        "all equal": lambda r: (r.student_CV.fill_(3.0), r.teacher_CV.fill_(-7.0)),
    }
    for name, kind in [*[(n, "random") for n in changes], ("ruled out by one side", "masked_apart")]:
        sample = make_rows(kind, 1 if backend == INTERPRETED_BLOCKS else 2, (97, 97), dtype)
        changes.get(name, changes["nothing"])(sample)
        for temperature in (2.0,) if backend in ("compile", INTERPRETED_BLOCKS) else (0.5, 2.0):
            found = by_backend(backend, sample, divergence, temperature)
            for field, x in found._asdict().items():
                assert not x.isnan().any(), f"{name}, T {temperature}: {field} has NaN"
            assert found.gradient.any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("divergence", "backend", "dtype"), functions((torch.float32,)))
def test_nan_in_the_logits_is_not_hidden(divergence: str, backend: str, dtype: torch.dtype) -> None:
    """Of either side, in the first, a middle and the last class: the row's values are NaN, those of others are not."""
    count = 2 if backend == INTERPRETED_BLOCKS else 4
    others = [i for i in range(count) if i != 1]
    clean = by_backend(backend, make_rows("random", count, (97, 97), dtype), divergence, 2.0)
    for side, column in product(("student", "teacher"), (40,) if backend == INTERPRETED_BLOCKS else (0, 40, 96)):
        sample = make_rows("random", count, (97, 97), dtype)
        getattr(sample, f"{side}_CV")[1, column] = math.nan
        found = by_backend(backend, sample, divergence, 2.0)
        assert found.divergence[1].isnan()
        assert found.loss[1].isnan()
        # The sign of NaN is 0 in PyTorch: of a broken teacher, the gradient of the total variation says nothing.
        assert found.gradient[1].isnan().any() or (divergence, side) == ("tvd", "teacher")
        assert side == "teacher" or (found.cross_entropy[1].isnan() and found.entropy[1].isnan())
        for x, y in zip(found, clean):
            assert torch.equal(x[others], y[others])


# Shapes and strides.


def strided(x: Tensor, layout: str) -> Tensor:
    """The same numbers, laid out otherwise, with NaN in between."""
    rows_, columns = x.shape
    if layout == "wide":
        room = x.new_full((rows_, columns + 5), math.nan)
        return room[:, 2 : 2 + columns].copy_(x)
    if layout == "columns apart":
        return x.new_full((rows_, 2 * columns), math.nan)[:, ::2].copy_(x)
    if layout == "rows apart":
        return x.new_full((2 * rows_, columns), math.nan)[::2].copy_(x)
    if layout == "transposed":
        return x.t().contiguous().t()
    return x


@settings(max_examples=25 if INTERPRETED else 150, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data: st.DataObject) -> None:
    draw = data.draw
    backend = draw(st.sampled_from([b for b in ROW_FUNCTIONS if not b.startswith("compile")]), "backend")
    layouts = ["packed", "wide", "rows apart"] + ([] if INTERPRETED else ["columns apart", "transposed"])
    v_S, v_T = draw(st.integers(9, 70), "V_S"), draw(st.integers(9, 70), "V_T")
    kind, seed = draw(st.sampled_from(KINDS), "kind"), draw(st.integers(0, 2**31), "seed")
    sample = make_rows(kind, draw(st.integers(0, 4), "rows"), (v_S, v_T), seed=seed)
    sample.softcap = draw(st.sampled_from([None, 6.0]), "softcap")
    divergence, temperature = draw(st.sampled_from(DIVERGENCES), "D"), draw(st.sampled_from(TEMPERATURES), "T")
    truth = textbook(sample, divergence, temperature, torch.float64)
    sample.student_CV = strided(sample.student_CV, draw(st.sampled_from(layouts), "student"))
    sample.teacher_CV = strided(sample.teacher_CV, draw(st.sampled_from(layouts), "teacher"))
    for name, x, exact in zip(truth._fields, by_backend(backend, sample, divergence, temperature), truth):
        assert x.shape == exact.shape
        if name == "gradient" and (divergence, kind) == ("tvd", "identical"):
            continue
        # D in nats, at most some hundreds: what it loses, its gradient loses too.
        assert (x - exact).abs().le(1e-4 * (1 + exact.abs())).all(), name


@not_interpreted
@pytest.mark.parametrize("layout", ["wide", pytest.param("transposed", marks=pytest.mark.long)])
def test_compiled_rows_may_lie_anyhow(layout: str) -> None:
    sample = make_rows("random", 5, (97, 97))
    expected = by_backend("eager", sample, "tvd", 4.0)
    sample.student_CV, sample.teacher_CV = strided(sample.student_CV, layout), strided(sample.teacher_CV, layout)
    for x, y in zip(by_backend("compile", sample, "tvd", 4.0), expected):
        assert_same(x, y, 2e-6)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("backend", [b for b in ROW_FUNCTIONS if b != COMPILED])
def test_no_row_one_row_and_two(backend: str, count: int) -> None:
    sample = make_rows("random", 4, (97, 97))
    few = by_backend(backend, sample.first(count), "jsd", 2.0)
    for x, y in zip(few, textbook(sample, "jsd", 2.0, torch.float64)):
        assert x.shape == y[:count].shape
        assert (x - y[:count]).abs().le(1e-5).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_blocks_of_rows_are_independent(backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    sample = make_rows("random", 9, (97, 97))
    whole = by_backend("eager", sample, "jsd", 4.0)
    monkeypatch.setitem(pieces._BLOCK_BYTES, "cpu", 97 * 4 * (40 if backend == "eager" else 8))
    for x, y in zip(by_backend(backend, sample, "jsd", 4.0), whole):
        assert_same(x, y, 2e-6)


def eager_passes(divergence: str | None, classes: tuple[int, int], temperature: float, softcap: float | None) -> Wide:
    """What a block of three rows does with its logits, the gradient included."""
    of_student, of_teacher = classes
    student, out, labels = torch.randn(3, of_student), torch.empty(3, of_student), torch.tensor([0, 1, of_student - 1])
    teacher = None if divergence is None else torch.randn(3, of_teacher)
    with Wide(3 * min(classes)) as wide:
        distillation_rows(
            student,
            teacher,
            labels,
            None if divergence is None else RowDivergence.of(divergence),
            RowCoefficients(0.5, 0.5, temperature),
            gradient_CV=out,
            student_softcap=softcap,
            teacher_softcap=softcap,
        )
    return wide


@not_interpreted
@pytest.mark.parametrize(
    ("divergence", "temperature", "most"), [(None, 1.0, 13), ("forward_kl", 1.0, 27), ("forward_kl", 2.0, 33)]
)
def test_eager_rows_compute_each_softmax_once(divergence: str | None, temperature: float, most: int) -> None:
    """A softmax has 7 passes, its logarithm included; the gradient, 5 of them, does not begin anew."""
    assert 5 < eager_passes(divergence, (999, 999), temperature, None).passes <= most


@not_interpreted
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ROW_FIRST])
def test_eager_rows_hold_no_more_tensors_than_the_budget_counts(divergence: str) -> None:
    most = [
        eager_passes(divergence, classes, temperature, softcap).most_alive
        for classes, temperature, softcap in product(((999, 999), (999, 990)), (1.0, 1.5, 2.0), (None, 30.0))
    ]
    assert 5 < max(most) <= pieces.EAGER_BUFFERS


if INTERPRETED:

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter cuts bfloat16 off
    @pytest.mark.parametrize("shape", [(1,), (97, 50), (4096,), (3, 4097)])
    def test_a_factor_is_one_product_in_float32_triton(shape: tuple[int, ...], dtype: torch.dtype) -> None:
        from srd_fast.kernels.triton_scale import scalable, scale_in_place_triton

        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for factor in (torch.tensor(0.37), torch.tensor(1.0)):
            scaled = x.clone()
            scale_in_place_triton(scaled, factor)
            assert torch.equal(scaled, (x.float() * factor).to(dtype))
        if x.dim() == 2:
            columns = x.clone().t()
            assert scalable(columns)
            scale_in_place_triton(columns, torch.tensor(0.5))
            assert torch.equal(columns.t(), (x.float() * 0.5).to(dtype))
            assert not scalable(x[:, ::2])
        assert not scalable(x.double())

    @pytest.mark.parametrize("classes", [(97, 97), (151, 128), (128, 151), (96, 96), (2049, 2049)])
    @pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
    def test_scratch_behind_the_rows_does_not_matter_triton(divergence: str, classes: tuple[int, int]) -> None:
        """Rows as the loss makes them, padded to 16 classes: with anything in the padding, the same to the bit."""
        sample = make_rows("random", 3, classes)
        expected = by_backend("triton", sample, divergence, 2.0)
        for filler in (math.nan, math.inf, 1e30):
            for side in ("student_CV", "teacher_CV"):
                x = getattr(make_rows("random", 3, classes), side)
                room = x.new_full((3, -(-x.shape[1] // 16) * 16), filler)
                setattr(sample, side, room[:, : x.shape[1]].copy_(x))
            for x, y in zip(by_backend("triton", sample, divergence, 2.0, padding_is_scratch=True), expected):
                assert torch.equal(x, y)

    def test_nothing_behind_the_rows_is_written_unless_it_is_scratch_triton() -> None:
        sample = make_rows("random", 3, (97, 97))
        room = torch.full((3, 112), math.nan)
        gradient = room[:, :97]
        from srd_fast.kernels.triton_rows import distillation_rows_triton

        arguments = (sample.student_CV, sample.teacher_CV, sample.labels_C, RowDivergence.of("jsd"), coefficients(2.0))
        distillation_rows_triton(*arguments, gradient_CV=gradient)
        assert room[:, 97:].isnan().all()
        assert not gradient.isnan().any()

    def test_bfloat16_gradients_are_those_of_float32_to_a_digit_triton() -> None:
        sample = make_rows("random", 3, (97, 97), torch.bfloat16)
        rounded = by_backend("triton", sample, "jsd", 2.0).gradient
        written = sample.student_CV.clone()
        from srd_fast.kernels.triton_rows import distillation_rows_triton

        divergence = RowDivergence.of("jsd", SKEW, BETA)
        distillation_rows_triton(
            written,
            sample.teacher_CV,
            sample.labels_C,
            divergence,
            coefficients(2.0),
            row_weights_C=sample.weights_C,
            gradient_CV=written,
        )
        assert (written.float() - rounded.float()).abs().le(rounded.float().abs() * 2**-7).all()

    def test_cross_entropy_alone_triton() -> None:
        sample = make_rows("random", 3, (97, 97))
        from srd_fast.kernels.triton_rows import distillation_rows_triton

        found = []
        for function in (distillation_rows_triton, distillation_rows):
            gradient = torch.empty_like(sample.student_CV)
            arguments = (sample.student_CV, None, sample.labels_C, None, RowCoefficients(1.0, 0.0, 1.0))
            values = function(*arguments, gradient_CV=gradient)
            found.append((values.cross_entropy, values.entropy, gradient))
        for x, y in zip(*found):
            assert_same(x, y, 1e-6)


# The loss through each backend.

FAST = "triton" if INTERPRETED else "compile"
LOSS_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "chunks": {"memory_budget": 5 * 2 * 97 * 4},
    "one row at a time": {"memory_budget": 1},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "memory_budget": 5 * 2 * 97 * 4},
    "softcap": {"student_softcap": 5.0, "teacher_softcap": 4.0},
    "scale": {"student_scale": 0.5, "teacher_scale": 2.0, "memory_budget": 5 * 2 * 97 * 4},
    "student padded": {"classes": (113, 97)},
    "teacher padded": {"classes": (97, 113)},
    "cross-entropy alone": {"sft_weight": 1.0},
    "divergence alone": {"sft_weight": 0.0},
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", LOSS_CASES)
def test_loss_and_gradients_of_each_backend(case: str) -> None:
    """Those of float64 in eager mode: for triton, or compile."""
    options = dict(LOSS_CASES[case])
    made = {k: options.pop(k) for k in ("classes", "bias") if k in options}
    exact = problem(shape=(2, 11), **{"classes": (97, 97), **made})
    if made.get("classes") == (113, 97):
        exact.labels[0, :3] = torch.tensor([112, 97, 96])  # rows with loss whose label the teacher does not have
    token_weights = torch.rand(2, 11, generator=torch.Generator().manual_seed(2)) + 0.1
    quick = exact.to(torch.float32)
    options["divergence"] = "jsd"
    out = quick.run(backend=FAST, token_weights=token_weights, **options)
    expected = exact.run(backend="eager", token_weights=token_weights, **options)
    for name in ("loss", "divergence", "cross_entropy", "entropy"):
        assert_same(getattr(out, name), getattr(expected, name), 3e-6, name)
    above = torch.linspace(-1, 2, out.loss.numel()).view(out.loss.shape)
    found, wanted = gradients(quick, out.loss, above), gradients(exact, expected.loss, above.double())
    assert set(found) == set(wanted)
    for name in wanted:
        assert_same(found[name], wanted[name], 1e-5, name)


@not_interpreted
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_loss_of_many_blocks_in_a_large_vocabulary(backend: str) -> None:
    """As a user on a CPU gets it, by default: compiled, several blocks of rows in a chunk."""
    exact = problem(shape=(200,), widths=(4, 4), classes=(20000, 20000), bias=False, ignored=0.0)
    quick = exact.to(torch.float32)
    assert pieces.block_bytes(torch.device("cpu")) < 200 * 20000 * 8
    out, expected = (p.run(backend=b, divergence="jsd") for p, b in ((quick, backend), (exact, "eager")))
    tolerance = rounding(pieces._PIECE)  # no sum over classes is longer
    assert_same(out.loss, expected.loss, tolerance)
    found, wanted = gradients(quick, out.loss), gradients(exact, expected.loss)
    for name in wanted:
        assert_same(found[name], wanted[name], tolerance, name)


def test_non_contiguous_tensors_give_the_same_in_triton_and_compile() -> None:
    p = problem(shape=(3, 7), classes=(97, 97)).to(torch.float32)
    expected = p.run(backend=FAST, divergence="jsd")
    far = Problem(
        torch.stack([p.student_hidden.detach()] * 2, -1)[..., 0].requires_grad_(),
        p.student_weight.detach().T.contiguous().T.requires_grad_(),
        p.teacher_hidden.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([p.teacher_weight] * 2, 1)[:, :8],
        torch.cat([p.labels, p.labels], 1)[:, :7],
        torch.stack([p.student_bias.detach()] * 2, -1)[:, 1].requires_grad_(),
        p.teacher_bias,
    )
    assert not any(x.is_contiguous() for x in (far.student_hidden, far.student_weight, far.teacher_weight, far.labels))
    out = far.run(backend=FAST, divergence="jsd")
    assert_same(out.loss, expected.loss, 1e-6)
    wanted = gradients(p, expected.loss)
    for name, g in gradients(far, out.loss).items():
        assert_same(g, wanted[name], 3e-6, name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_with_loss_gives_zero(backend: str, reduction: str) -> None:
    p = problem(classes=(97, 97), ignored=1.1).to(torch.float32)
    out = p.run(backend=backend, divergence="jsd", reduction=reduction)
    assert (out.loss == 0).all()
    found = gradients(p, out.loss.sum())
    assert len(found) == 3
    assert all((g == 0).all() for g in found.values())


@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_every_further_backward_adds_the_gradient(backend: str, dtype: torch.dtype) -> None:
    p = problem(classes=(97, 97), **({"shape": (6,)} if INTERPRETED else {})).to(dtype)
    loss = p.run(backend=backend, divergence="jsd", memory_budget=4 * 2 * 97 * 4).loss
    loss.backward(retain_graph=True)
    once = {name: x.grad.clone() for name, x in p.leaves().items()}
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    for name, x in p.leaves().items():
        assert_same(x.grad, 5 * once[name], 1e-6 if dtype == torch.float32 else 2**-7, name)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend: str, reduction: str) -> None:
    p = problem(classes=(97, 97)).to(torch.float32)
    loss = p.run(backend=backend, divergence="jsd", reduction=reduction).loss.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, p.student_hidden, create_graph=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_after_inference_can_write_its_buffers(backend: str, context: type) -> None:
    p = problem(classes=(97, 97)).to(torch.float32)
    expected = p.run(backend="eager", divergence="jsd")
    free_workspace()
    with context():
        assert_same(p.run(backend=backend, divergence="jsd").loss, expected.loss, 2e-6)
    out = p.run(backend=backend, divergence="jsd")
    found, wanted = gradients(p, out.loss), gradients(p, expected.loss)
    for name in wanted:
        assert_same(found[name], wanted[name], 1e-5, name)
    with context():
        assert_same(p.run(backend=backend, divergence="jsd").loss, expected.loss, 2e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("backend", "dtype"), EACH)
def test_two_losses_before_either_backward(backend: str, dtype: torch.dtype, reduction: str) -> None:
    options = {"backend": backend, "divergence": "jsd", "reduction": reduction, "memory_budget": 4 * 2 * 97 * 4}
    shape = {"shape": (6,)} if INTERPRETED else {}
    both = [problem(classes=(97, 97), seed=seed, **shape).to(dtype) for seed in (1, 2)]
    alone = [gradients(p, p.run(**options).loss.mean()) for p in both]
    losses = [p.run(**options).loss.mean() for p in both]
    together = [gradients(p, loss) for p, loss in zip(both, losses)]
    for found, wanted in zip(together, alone):
        for name in wanted:
            assert_same(found[name], wanted[name], 0.0, name)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])  # the interpreter knows one thread
def test_threads_have_buffers_of_their_own(backend: str) -> None:
    options = {"backend": backend, "divergence": "jsd", "memory_budget": 5 * 2 * 97 * 4}
    problems = [problem(shape=(30,), classes=(97, 97), seed=seed).to(torch.float32) for seed in range(4)]
    wanted = [gradients(p, p.run(**options).loss) for p in problems]
    found: list[dict[str, Tensor]] = [{}] * 4
    start = threading.Barrier(4)

    def work(i: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        for _ in range(10):
            found[i] = gradients(problems[i], problems[i].run(**options).loss)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for name in wanted[i]:
            assert_same(found[i][name], wanted[i][name], 1e-6, name)


def largest_allocation(run: Callable[[], Any]) -> int:
    """Bytes of the largest tensor that is made meanwhile, in compiled functions too."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_call_makes_no_tensor_of_the_size_of_a_chunk(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 6 if backend == "triton" else 60
    p = problem(shape=(count,), widths=(2, 2), classes=(97, 97), ignored=0.0).to(torch.float32)
    chunk = count * 112 * 4
    monkeypatch.setitem(pieces._BLOCK_BYTES, "cpu", 2 * 97 * 4 * 10)  # so that eager mode's temporaries are smaller

    def train() -> None:
        p.run(backend=backend, divergence="jsd").loss.backward()

    train()  # compiles
    free_workspace()
    assert largest_allocation(train) == chunk
    assert largest_allocation(train) < chunk // 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_free_workspace_frees_what_a_loss_keeps(backend: str) -> None:
    count = 8 if INTERPRETED else 50
    p = problem(shape=(count,), widths=(2, 2), classes=(97, 97), ignored=0.0).to(torch.float32)
    p.run(backend=backend, divergence="jsd").loss.backward()
    storages = [x.untyped_storage() for x in workspace.buffers.values()]
    kept, sizes = [StorageWeakRef(x) for x in storages], [x.nbytes() for x in storages]
    del storages
    assert sum(sizes) >= 2 * count * 97 * 4
    assert not any(x.expired() for x in kept)
    free_workspace()
    gc.collect()  # the interpreter's frames hold on to each other
    assert all(x.expired() for x in kept)


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "eager"])  # the interpreter does not round
def test_logits_in_float32_make_the_hidden_gradient_more_exact(backend: str) -> None:
    p = problem(shape=(64,), widths=(32, 32), classes=(97, 97), ignored=0.0).to(torch.bfloat16).to(torch.float64)
    wanted = gradients(p, p.run(divergence="reverse_kl").loss)["student_hidden"]
    errors = []
    for logits_dtype in (None, torch.float32):
        q = p.to(torch.bfloat16)
        out = q.run(backend=backend, divergence="reverse_kl", logits_dtype=logits_dtype)
        errors.append(error(gradients(q, out.loss)["student_hidden"], wanted))
    assert errors[1] * 3 < errors[0]


@pytest.mark.parametrize("case", ["mean", "none"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "compile"])
def test_head_gradient_over_many_chunks_is_as_exact_as_over_one(backend: str, case: str) -> None:
    rows_ = 8 if backend == "triton" else 600
    p = problem(shape=(rows_,), widths=(4, 4), classes=(23, 23), ignored=0.0).to(torch.bfloat16).to(torch.float64)
    wanted = gradients(p, p.run(divergence="forward_kl").loss)
    found = []
    for budget in (None, 3 * 2 * 23 * 2 if backend == "triton" else 3 * 23 * 4 * 11):
        q = p.to(torch.bfloat16)
        options: dict[str, Any] = {"reduction": case, "memory_budget": budget, "divergence": "forward_kl"}
        found.append(gradients(q, q.run(backend=backend, **options).loss.mean()))
    for name in ("student_weight", "student_bias"):
        one, many = (error(x[name], wanted[name]) for x in found)
        assert many <= 1.1 * one + 1e-4, name


# Which backend runs, and what there is to say where one cannot.


def tensors() -> tuple[Tensor, ...]:
    p = problem(bias=False).to(torch.float32)
    return p.student_hidden, p.student_weight, p.teacher_hidden, p.teacher_weight, p.labels


@not_interpreted
def test_triton_on_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'triton' cannot run.*cpu.*TRITON_INTERPRET=1.*backend='auto'"):
        distillation_loss(*tensors(), backend="triton")


def test_triton_in_float64_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'triton' cannot run"):
        problem().run(backend="triton")


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.usefixtures("own_registries")
def test_a_registered_divergence_is_refused_by_name(backend: str) -> None:
    def squared(log_p: Tensor, log_q: Tensor, *, skew: float, beta: float) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1)

    register_divergence("squared for the backends", squared)
    with pytest.raises(UserError, match=rf"'{backend}' cannot run.*registered divergence"):
        distillation_loss(*tensors(), backend=backend, divergence="squared for the backends")
    assert distillation_loss(*tensors(), divergence="squared for the backends").loss.isfinite()


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown backend 'cuda'.*triton"):
        distillation_loss(*tensors(), backend="cuda")


@not_interpreted
def test_auto_compiles_on_a_cpu_from_16384_classes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    from srd_fast.losses import backends

    def spy(*args: Any, compiled: bool, **options: Any) -> Any:
        taken.append(compiled)
        return distillation_rows(*args, **options)

    monkeypatch.setattr(backends, "distillation_rows", spy)
    for classes in (16383, 16384):
        logits = torch.randn(2, 3, classes)
        distillation_loss_from_logits(logits[0], logits[1], torch.zeros(3, dtype=torch.long))
    assert taken == [False, True]


# torch.compile: how often, and without a compiler.


@not_interpreted
def test_other_sizes_compile_nothing_more() -> None:
    torch._dynamo.reset()  # another test of this process may have compiled the same

    def run(count: int, classes: int, budget: int | None = None) -> None:
        p = problem(shape=(count,), classes=(classes, classes), ignored=0.0).to(torch.float32)
        p.run(backend="compile", divergence="skew_forward_kl", memory_budget=budget).loss.backward()

    before = counters["stats"]["unique_graphs"]
    for classes in (97, 96):  # rows padded to a multiple of 16, and rows that are one already
        run(8, classes)
    once = counters["stats"]["unique_graphs"]
    assert 3 <= once - before <= 12
    for count, classes in [(9, 97), (2, 97), (1, 97), (33, 97), (97, 97), (8, 101), (5, 1009), (8, 112), (3, 2048)]:
        run(count, classes)
    run(20, 97, budget=7 * 2 * 97 * 4)
    assert counters["stats"]["unique_graphs"] == once


@pytest.mark.slow
@not_interpreted
def test_any_mix_of_layouts_runs_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Dynamo compiles again for: rows packed, padded, of two lengths, in blocks; gradients apart or in place."""
    usual = torch.compile
    monkeypatch.setattr(pieces, "_compile", pieces.Compiler())
    monkeypatch.setattr(torch, "compile", lambda function, **options: usual(function, **options, backend="eager"))
    monkeypatch.setitem(pieces._BLOCK_BYTES, "cpu", 4 * 300 * 8)
    for dtype, count, (v_S, v_T) in product(DTYPES, (3, 20), ((300, 300), (304, 304), (300, 307), (304, 320))):
        p = problem(shape=(count,), classes=(v_S, v_T), bias=False, ignored=0.0).to(dtype)
        options: dict[str, Any] = {"backend": "compile", "divergence": "forward_kl"}
        p.run(logits_dtype=torch.float32, **options).loss.backward()
        logits = torch.randn(count, v_S, requires_grad=True), torch.randn(count, v_T)
        distillation_loss_from_logits(*logits, p.labels, **options).loss.backward()


WITHOUT_COMPILER = """
import json, sys, warnings
import torch
from srd_fast import distillation_loss

torch.manual_seed(0)
h_S, w_S, h_T, w_T = torch.randn(7, 8), torch.randn(97, 8), torch.randn(7, 5), torch.randn(97, 5)
labels = torch.arange(7)
same = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for divergence in ("jsd", "jsd", "tvd"):
        results = []
        for backend in ("compile", "eager"):
            leaf = h_S.clone().requires_grad_()
            loss = distillation_loss(leaf, w_S, h_T, w_T, labels, divergence=divergence, backend=backend).loss
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        same.append(all(torch.allclose(x, y, 1e-5, 1e-8) for x, y in zip(*results)))
print(json.dumps({"same": same, "said": [str(w.message) for w in caught]}))
"""


@pytest.mark.slow
@not_interpreted
def test_without_a_compiler_there_is_one_warning_and_eager_mode(tmp_path: Path) -> None:
    missing = {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(run, env=os.environ | missing, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == [True] * 3
    said = [line for line in found["said"] if "using eager" in line]
    assert len(said) == 1
    assert said[0].startswith("torch.compile does not work here")


# Triton on a CPU: see test_interpreted.py.
