"""The row functions and the loss on a GPU: as exact as plain PyTorch there, within the budget, without waiting.

Everything takes the device from `DEVICE`, so that the helpers, if not the GPU, can be tried on a CPU.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from kernel_cases import KINDS, TEMPERATURES, TOLERANCE, assert_accurate, by_backend, make_rows
from test_losses import Problem, gradients, problem
from tiny import DIVERGENCES, ROW_FIRST, assert_same
from torch import Tensor

from srd_fast.kernels import RowCoefficients, RowDivergence
from srd_fast.losses import Head
from srd_fast.losses.chunked import PackedRows, run_packed

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"),
]

BACKENDS = ("triton", "eager", "triton classes")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLASSES = (
    (97, 97),
    (151, 128),
    (128, 151),
    (32000, 32000),
    (49152, 49152),
    (151936, 152064),
    (152064, 151936),
    (262144, 262144),
)


def table() -> Iterator[Any]:
    """(backend, dtype, classes, divergence); compiled, a few alone: `auto` never compiles on a GPU."""
    few = ((97, 97), (151, 128), (49152, 49152), (152064, 151936))
    for entry in product(BACKENDS, DTYPES, CLASSES, DIVERGENCES):
        if entry[0] in BACKENDS[:2] or entry[2] in few:
            yield entry
    yield from product(("triton", "triton classes"), DTYPES[:2], few, ROW_FIRST)
    yield from product(("compile",), DTYPES[:2], ((97, 97), (151936, 152064)), ("reverse_kl", "jsd"))


def on_device(p: Problem, dtype: torch.dtype) -> Problem:
    """The problem on the device, its leaves made anew."""
    moved = {k: v.detach().to(DEVICE) for k, v in vars(p).items() if isinstance(v, Tensor)}
    for name, x in moved.items():
        moved[name] = x if name == "labels" else x.to(dtype).requires_grad_(getattr(p, name).requires_grad)
    return Problem(**moved)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("backend", "dtype", "classes", "divergence"), table())
def test_no_further_from_float64_than_plain_torch(
    backend: str, dtype: torch.dtype, classes: tuple[int, int], divergence: str, temperature: float
) -> None:
    for kind in KINDS:
        if (divergence, kind) != ("tvd", "identical"):  # a kink
            assert_accurate(backend, divergence, temperature, kind, 64, 32, classes=classes, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [(97, 97), (151, 128), (49152, 49152)])
def test_softcaps_are_as_accurate(classes: tuple[int, int], divergence: str, dtype: torch.dtype) -> None:
    for kind in ("random", "peaked", "masked"):
        options = {"classes": classes, "dtype": dtype, "device": DEVICE, "softcap": 8.0}
        for backend in ("triton", "triton classes"):
            assert_accurate(backend, divergence, 2.0, kind, 32, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ROW_FIRST])
@pytest.mark.parametrize("kind", ["masked_apart", "one_hot", "peaked"])
def test_nothing_is_ever_nan(kind: str, divergence: str, dtype: torch.dtype) -> None:
    for temperature in TEMPERATURES:
        for backend in ("triton", "triton classes"):
            found = by_backend(backend, make_rows(kind, 8, (4999, 4999), dtype, DEVICE), divergence, temperature)
            for name, x in found._asdict().items():
                assert not x.isnan().any(), f"{backend}: {name}"
            assert found.gradient.any()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, *ROW_FIRST])
def test_nan_in_the_logits_is_not_hidden(divergence: str, side: str) -> None:
    for column in (0, 2500, 4998):
        sample = make_rows("random", 3, (4999, 4999), device=DEVICE)
        getattr(sample, f"{side}_CV")[1, column] = float("nan")
        for backend in ("triton", "triton classes"):
            assert by_backend(backend, sample, divergence, 2.0).loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("classes", [(4999, 4999), (5000, 4999), (4999, 5000), (4992, 4992)])
def test_scratch_behind_the_rows_does_not_matter(classes: tuple[int, int], divergence: str) -> None:
    sample = make_rows("random", 5, classes, torch.bfloat16, DEVICE)
    expected = by_backend("triton", sample, divergence, 2.0)
    for side in ("student_CV", "teacher_CV"):
        x = getattr(sample, side)
        room = x.new_full((5, -(-x.shape[1] // 16) * 16), float("nan"))
        setattr(sample, side, room[:, : x.shape[1]].copy_(x))
    for x, y in zip(by_backend("triton", sample, divergence, 2.0, padding_is_scratch=True), expected):
        assert_same(x, y, 1e-6 if x.dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_are_those_of_float64(divergence: str, dtype: torch.dtype) -> None:
    """Through `backend="auto"`, which is Triton here, in several chunks."""
    p = problem(shape=(300,), widths=(32, 32), classes=(997, 997), ignored=0.3).to(dtype).to(torch.float64)
    exact, quick = on_device(p, torch.float64), on_device(p, dtype)
    expected = exact.run(divergence=divergence, backend="eager")
    out = quick.run(divergence=divergence, memory_budget=1 << 19)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert_same(out.loss, expected.loss, tolerance)
    found, wanted = gradients(quick, out.loss), gradients(exact, expected.loss)
    for name in wanted:
        if divergence == "tvd":  # its gradient jumps where rounding makes the smaller of two probabilities the larger
            assert (found[name].double() - wanted[name]).norm() <= tolerance * wanted[name].norm(), name
        else:
            assert_same(found[name], wanted[name], tolerance, name)


def packed(dtype: torch.dtype, rows: int, classes: int, budget: int | None = None) -> tuple[Tensor, Head, PackedRows]:
    """Rows of a loss that are packed already: what `run_packed` takes."""
    g = torch.Generator(DEVICE).manual_seed(0)
    h_S, w_S, h_T, w_T = (
        torch.randn(n, 64, generator=g, device=DEVICE).mul_(0.3).to(dtype) for n in (rows, classes, rows, classes)
    )
    labels = torch.randint(classes, (rows,), generator=g, device=DEVICE)
    k = RowCoefficients(0.1, 0.9, 2.0)
    return h_S, Head(w_S), PackedRows(h_T, Head(w_T), labels, None, RowDivergence.of("jsd"), k, memory_budget=budget)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_never_wait_for_the_gpu(dtype: torch.dtype, backend: str) -> None:
    hidden, head, rows = packed(dtype, 700, 4999, 1 << 22)
    rows = PackedRows(**{**vars(rows), "backend": backend})
    needs = (True, True, False)
    run_packed(hidden, head, rows, None, needs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, grads = run_packed(hidden, head, rows, None, needs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.divergence.isfinite().all()
    assert grads[0].isfinite().all()
    assert grads[1].any()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_blocks_of_classes_never_wait_for_the_gpu(divergence: str, known: bool) -> None:
    sample = make_rows("random", 8, (5000, 4992), torch.bfloat16, DEVICE)
    expected = by_backend("triton classes", sample, divergence, 2.0, teacher_lse=known)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = by_backend("triton classes", sample, divergence, 2.0, teacher_lse=known)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for x, y in zip(found, expected):
        assert torch.equal(x, y)


def test_backward_never_waits_for_the_gpu() -> None:
    p = on_device(problem(shape=(300,), widths=(32, 32), classes=(997, 997)), torch.bfloat16)
    p.run().loss.backward()
    loss = p.run().loss
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert p.student_hidden.grad.isfinite().all()


@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_on_the_loss_is_one_on_the_gradients(dtype: torch.dtype, factor: float) -> None:
    """In `backward`; several chunks, so that the weight's gradient was summed in float32."""
    p = on_device(problem(shape=(300,), widths=(32, 32), classes=(997, 997)), dtype)
    plain = gradients(p, p.run(memory_budget=1 << 19).loss)
    scaled = gradients(p, p.run(memory_budget=1 << 19).loss * factor)
    for name, g in plain.items():
        wanted = (g.float() * torch.tensor(factor, device=DEVICE)).to(dtype)
        if dtype == torch.float16:  # `g` has been multiplied once already, by 1 / num_items, and rounded
            assert_same(scaled[name], wanted, 2**-10, name)
        else:
            assert torch.equal(scaled[name], wanted), name


@pytest.mark.parametrize("budget", [64 << 20, 256 << 20, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_stays_within_the_budget(dtype: torch.dtype, budget: int | None) -> None:
    hidden, head, rows = packed(dtype, 4096, 151936, budget)
    run_packed(hidden[:256], head, rows_of(rows, 256), None, (True, True, False))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values, grads = run_packed(hidden, head, rows, None, (True, True, False))
    torch.cuda.synchronize()
    # Beside the chunk: the gradients, the sum of the weight's in float32, values of each row, and cuBLAS.
    fixed = 2 * head.weight.numel() * 4 + hidden.numel() * 4 + 4096 * 64 + (64 << 20)
    assert torch.cuda.max_memory_allocated() - before <= (budget or 1 << 30) + fixed
    assert values.divergence.isfinite().all()
    assert grads[1].isfinite().all()


def rows_of(rows: PackedRows, count: int) -> PackedRows:
    """The first of them."""
    return PackedRows(**{**vars(rows), "teacher_ND": rows.teacher_ND[:count], "labels_N": rows.labels_N[:count]})


def test_logits_in_float32_make_the_hidden_gradient_more_exact() -> None:
    p = problem(shape=(256,), widths=(64, 64), classes=(997, 997), ignored=0.0).to(torch.bfloat16).to(torch.float64)
    exact = on_device(p, torch.float64)
    wanted = gradients(exact, exact.run(divergence="reverse_kl", backend="eager").loss)["student_hidden"]
    errors = []
    for logits_dtype in (None, torch.float32):
        q = on_device(p, torch.bfloat16)
        g = gradients(q, q.run(divergence="reverse_kl", logits_dtype=logits_dtype).loss)["student_hidden"]
        errors.append(((g.double() - wanted).norm() / wanted.norm()).item())
    assert errors[1] * 3 < errors[0]
    assert errors[1] < 5 * TOLERANCE[torch.bfloat16]
