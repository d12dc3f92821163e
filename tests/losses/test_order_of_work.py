"""Rows outside or classes outside: the same numbers, each within its budget, and the choice between them.

`test_everything_holds_with_the_classes_outside` runs the other files of this folder once more in that order.
"""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from test_losses import Problem, Watch, gradients, plain, problem
from tiny import DIVERGENCES, assert_same, rounding
from torch import Tensor

from srd_fast import UserError, distillation_loss, distillation_loss_from_logits, register_divergence
from srd_fast.kernels import FORMULAS, ClassPasses
from srd_fast.losses import LossOptions, chunked, class_order, free_workspace
from srd_fast.losses.buffers import budget_of
from srd_fast.losses.order import HeadWork, LossPlan, LossWork, plan_loss

MIB = 1 << 20
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# Measured on an H100: 8,192 rows, bfloat16, forward KL at T = 1, milliseconds of the four products of the loss, and of
# two passes over blocks of 4,096 classes with the teacher's log-sum-exp known and not.
MEASURED = {
    "smollm2": ((49152, 576, 960), 3.28, 5.63, 7.60),
    "llama3": ((128256, 2048, 4096), 30.6, 42.9, 56.2),
    "qwen2.5": ((151936, 896, 3584), 24.9, 32.5, 46.1),
    "gemma3": ((262144, 640, 1152), 21.3, 34.3, 42.5),
}


def work(
    rows: int,
    sizes: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    divergence: str = "forward_kl",
    known: bool = False,
    **options: Any,
) -> LossWork:
    """Both models in one dtype. sizes: V, D_S, D_T."""
    student, teacher = (HeadWork(sizes[0], width, dtype, dtype, dtype, dtype) for width in sizes[1:])
    passes = ClassPasses.of(LossOptions(divergence).row_divergence, known, True)
    return LossWork(rows, student, teacher, device, passes=passes, **options)


def teacher_lse(p: Problem, temperature: float) -> Tensor:
    """In the shape of the labels, over the common classes."""
    z = p.teacher_hidden.double() @ p.teacher_weight.double().T
    z = z if p.teacher_bias is None else z + p.teacher_bias.double()
    z = z * p.extra.get("teacher_scale", 1.0)
    cap = p.extra.get("teacher_softcap")
    z = z if cap is None else cap * torch.tanh(z / cap)
    return (z[..., : min(len(p.student_weight), len(p.teacher_weight))] / temperature).logsumexp(-1)


# The same numbers.


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("classes", "budget"), [((23, 23), None), ((29, 23), 9000), ((23, 29), 1)])
def test_both_orders_agree(divergence: str, classes: tuple[int, int], budget: int | None) -> None:
    heads = {"student_softcap": 7.0, "teacher_softcap": 6.0, "student_scale": 0.5, "teacher_scale": 0.7}
    for extra, temperature in (({}, 2.0), (heads, 1.0)):
        p = problem(classes=classes, widths=(5, 8), **extra)
        weights = torch.rand(p.labels.shape, dtype=torch.float64) + 0.5
        options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "token_weights": weights}
        lse = teacher_lse(p, temperature)
        for reduction in ("mean", "none"):
            wanted = p.run(order="rows", reduction=reduction, **options)
            of_wanted = gradients(p, wanted.loss.sum())
            for known in (None, lse):
                found = p.run(order="classes", reduction=reduction, memory_budget=budget, teacher_lse=known, **options)
                for name, value in vars(wanted).items():
                    assert_same(getattr(found, name), value, 1e-12, name)
                for name, value in gradients(p, found.loss.sum()).items():
                    assert_same(value, of_wanted[name], 1e-11, name)


@pytest.mark.parametrize("trained", [("student_hidden",), ("student_weight", "student_bias"), ()])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_frozen_parts_cost_no_product(trained: tuple[str, ...], divergence: str) -> None:
    p = problem(shape=(40,), widths=(6, 7), ignored=0.0)
    for name in ("student_hidden", "student_weight", "student_bias"):
        getattr(p, name).requires_grad_(name in trained)
    with Watch() as watch:
        out = p.run(order="classes", divergence=divergence)
        if trained:
            out.loss.backward()
    passes = 1 + (divergence == "jsd") + bool(trained)  # of both sides' logits
    assert watch.gemms == 2 * passes + ("student_hidden" in trained) + ("student_weight" in trained)
    assert_same(out.loss, plain(p, divergence=divergence).loss.mean(), 1e-10)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_reverse_kl"])
def test_a_known_sum_spares_a_product_of_the_teacher(divergence: str) -> None:
    p = problem(shape=(40,), widths=(6, 7), ignored=0.0, bias=False)
    counted = []
    for known in (None, teacher_lse(p, 2.0)):
        with Watch() as watch:
            p.run(order="classes", divergence=divergence, teacher_lse=known).loss.backward()
        counted.append(watch.gemms)
    assert counted[0] - counted[1] == (divergence != "reverse_kl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_reverse_kl"])
def test_no_further_from_float64_than_the_other_order(divergence: str, dtype: torch.dtype) -> None:
    """Each by the norm of its error, over several draws, because rounding falls either way."""
    errors: dict[str, dict[str, float]] = {"rows": {}, "classes": {}, "known": {}}
    for seed in range(3):
        exact = problem(shape=(64,), widths=(24, 40), classes=(300, 300), ignored=0.0, seed=seed)
        narrow = exact.to(dtype)
        exact = narrow.to(torch.float64)
        of_exact = gradients(exact, exact.run(divergence=divergence).loss)
        for name, known in (("rows", None), ("classes", None), ("known", teacher_lse(exact, 2.0).float())):
            order = "rows" if name == "rows" else "classes"
            out = narrow.run(divergence=divergence, order=order, teacher_lse=known, memory_budget=60_000)
            for leaf, g in gradients(narrow, out.loss).items():
                error = ((g.double() - of_exact[leaf]).norm() / of_exact[leaf].norm()).item()
                errors[name][leaf] = errors[name].get(leaf, 0.0) + error
    for leaf, error in errors["rows"].items():
        for name in ("classes", "known"):
            assert errors[name][leaf] <= 1.25 * error + 4e-6, (name, leaf, errors)


@pytest.mark.parametrize("budget", [None, 720_000])
def test_the_heads_gradient_is_rounded_once(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(shape=(96,), widths=(24, 40), classes=(600, 600), ignored=0.0, bias=False).to(torch.bfloat16)
    tiles: list[tuple[slice, slice, Tensor]] = []
    add = class_order._Sums.add

    def kept(self: Any, tile: Any, g_RB: Tensor, several: bool) -> None:
        tiles.append((tile.rows, tile.classes, g_RB.clone()))
        add(self, tile, g_RB, several)

    monkeypatch.setattr(class_order._Sums, "add", kept)
    p.run(order="classes", memory_budget=budget, reduction="sum").loss.backward()
    assert len(tiles) > (1 if budget else 0)
    exact = torch.zeros(p.student_weight.shape, dtype=torch.float64)
    for rows, classes, g in tiles:
        exact[classes] += g.double().T @ p.student_hidden.detach()[rows].double()
    assert p.student_weight.grad is not None
    half_a_digit = exact.abs() * 2.0**-8 * 1.01 + 96 * rounding(96) * exact.abs().max()
    assert ((p.student_weight.grad.double() - exact).abs() <= half_a_digit).all()


def test_second_backward_and_inference_mode() -> None:
    p = problem()
    out = p.run(order="classes")
    out.loss.backward(retain_graph=True)
    out.loss.backward()
    wanted = gradients(p, p.run(order="rows").loss)
    for name, leaf in p.leaves().items():
        assert_same(leaf.grad, 2 * wanted[name], 1e-12, name)
    with torch.inference_mode():
        assert_same(p.run(order="classes").loss, out.loss.detach(), 1e-12)


def test_no_row_and_no_label() -> None:
    for p in (problem(shape=(0,)), problem(shape=(4,), ignored=1.0)):
        out = p.run(order="classes")
        out.loss.backward()
        assert out.loss.item() == 0
        for leaf in p.leaves().values():
            assert leaf.grad is None or not leaf.grad.any()


@pytest.mark.slow
def test_everything_holds_with_the_classes_outside() -> None:
    here = Path(__file__).parent
    files = [str(file) for file in sorted(here.glob("test_*.py")) if file != Path(__file__)]
    not_of_it = "not test_no_tensor_is_larger_than_a_chunk_of_logits"  # it is about chunks
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "classes_outside", "-k", not_of_it, *files]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here.parent.parent, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


# What is refused, and what is not used.


@pytest.mark.usefixtures("own_registries")
def test_what_an_order_cannot_do() -> None:
    p = problem(shape=(6,))
    with pytest.raises(UserError, match=r"unknown order 'class'.*classes"):
        p.run(order="class")
    register_divergence(
        "for_orders", lambda log_p, log_q, *, skew, beta: (log_p - log_q).square().sum(-1), replace=True
    )
    with pytest.raises(UserError, match="order 'classes' cannot run: a registered divergence sees whole rows"):
        p.run(order="classes", divergence="for_orders")
    with pytest.raises(UserError, match="order 'classes' cannot run: logits are given"):
        p.run(order="classes", student_logits=torch.zeros(6, 23, dtype=torch.float64))
    assert p.run(divergence="for_orders", memory_budget=1).loss.isfinite()
    z = torch.randn(2, 9)
    assert distillation_loss_from_logits(z, z, torch.zeros(2, dtype=torch.long), memory_budget=1).loss.isfinite()


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x.half(), lambda x: x.to("meta"), lambda x: 3.0])
def test_a_sum_that_does_not_fit_the_labels(change: Any) -> None:
    p = problem(shape=(6,))
    with pytest.raises(UserError, match="teacher_lse must be"):
        p.run(teacher_lse=change(teacher_lse(p, 2.0)))


def test_a_sum_of_other_products_is_not_used() -> None:
    """Under autocast the logits are others, and the sum of the head's own would not be theirs."""
    p = problem(shape=(16,), widths=(24, 40), classes=(60, 60), ignored=0.0).to(torch.float32)
    wrong = torch.full(p.labels.shape, 3.0)
    plainly = p.run(order="classes", divergence="forward_kl", teacher_lse=wrong)
    assert not torch.allclose(plainly.divergence, p.run(divergence="forward_kl").divergence, rtol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        given, not_given = (p.run(order="classes", divergence="forward_kl", teacher_lse=x) for x in (wrong, None))
    assert torch.equal(given.divergence, not_given.divergence)


def test_a_certain_teacher_in_bfloat16_keeps_its_certainty() -> None:
    """A known sum holds for unrounded logits: rounding would move a probability of nearly 1 by some percent."""
    torch.manual_seed(0)
    h_T, w_T = torch.randn(64, 256).bfloat16(), torch.randn(50, 256).bfloat16() * 3
    h_S, w_S = h_T.clone().requires_grad_(), w_T.clone()
    labels = torch.randint(50, (64,))
    lse = (h_T.double() @ w_T.double().T).logsumexp(-1).float()
    options: dict[str, Any] = {"divergence": "forward_kl", "temperature": 1.0, "sft_weight": 0.0, "reduction": "sum"}
    out = distillation_loss(
        h_S, w_S, h_T, w_T, labels, teacher_lse=lse, order="classes", logits_dtype=torch.float32, **options
    )
    out.loss.backward()
    assert out.divergence.abs() / 64 < 1e-4
    assert h_S.grad is not None
    assert h_S.grad.abs().max() < 2e-2  # of gradients of tens where a sample is wrong


# The budget.


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GRID = [
    pytest.param(rows, classes, dtype, autocast, order, divergence, marks=pytest.mark.long if autocast else ())
    for (rows, classes), (dtype, autocast), order, divergence in product(
        ((100, 9000), (500, 2048)),
        (("float32", False), ("float32", True), ("bfloat16", False)),  # autocast changes nothing for bfloat16 models
        ("rows", "classes", "auto"),
        ("forward_kl", "jsd"),
    )
    if order != "auto" or divergence == "jsd"
]


@pytest.mark.parametrize(("rows", "classes", "dtype", "autocast", "order", "divergence"), GRID)
def test_the_budget_holds(rows: int, classes: int, dtype: str, order: str, divergence: str, autocast: bool) -> None:
    """Bytes of tensors alive at once beyond inputs and gradients, as the operations allocate them."""
    widths = (256, 64) if classes == 2048 else (64, 96)
    p = problem(shape=(rows,), widths=widths, classes=(classes, classes), bias=False, ignored=0.0)
    p = p.to(DTYPES[dtype])
    plans: list[LossPlan] = []
    asked = 4 * MIB if order != "rows" else 16 * MIB
    free_workspace()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        patch.setattr(chunked, "plan_loss", lambda *args: plans.append(plan_loss(*args)) or plans[-1])
        with Watch() as watch:
            options: dict[str, Any] = {"memory_budget": asked, "backend": "eager", "ignore_index": None}
            p.run(order=order, divergence=divergence, **options).loss.backward()
    free_workspace()
    gradients_bytes = sum(x.numel() * x.element_size() for x in (p.student_hidden, p.student_weight))
    small = 64 * rows * 8 + 100_000  # labels, weights, values and sums of each row
    assert watch.most_alive <= plans[0].bytes + gradients_bytes + small
    if plans[0].bytes > asked:  # the head in another dtype, or its sum, is larger than the budget
        assert order == "rows"


def test_a_budget_too_small_for_anything_takes_the_least() -> None:
    for order in ("rows", "classes", "auto"):
        plan = plan_loss(work(8192, (49152, 576, 960), CPU, torch.float32), 1, order)
        assert plan.bytes > 1
        assert plan.bytes == plan_loss(work(8192, (49152, 576, 960), CPU, torch.float32), plan.bytes, order).bytes


def test_the_default_grows_with_a_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from srd_fast.losses import buffers

    class Properties:
        total_memory = 24 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    for memory, budget in ((24 << 30, (24 << 30) // 20), (80 << 30, 4 << 30), (8 << 30, (8 << 30) // 20)):
        Properties.total_memory = memory
        buffers._default_budget.cache_clear()
        assert budget_of(CUDA, None) == budget
    assert (budget_of(CUDA, 5), budget_of(CPU, None)) == (5, 512 * MIB)
    buffers._default_budget.cache_clear()


# The choice.


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_those_of_a_gpu_that_was_measured(name: str) -> None:
    sizes, products, known, unknown = MEASURED[name]
    flops = 2.0 * 8192 * sizes[0] * (3 * sizes[1] + sizes[2])
    for lse, measured in ((True, known), (False, unknown)):
        plan = plan_loss(work(8192, sizes, CUDA, known=lse), 256 * MIB, "classes")
        assert plan.cost / flops == pytest.approx(measured / products, rel=0.2)
        assert plan.bytes <= 256 * MIB


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("known", [True, False])
def test_small_budgets_have_the_classes_outside_and_large_ones_the_rows(name: str, known: bool) -> None:
    sizes = MEASURED[name][0]
    assert plan_loss(work(8192, sizes, CUDA, known=known), 128 * MIB).order == "classes"
    assert plan_loss(work(8192, sizes, CUDA), 4096 * MIB).order == "rows"


def test_flops_are_those_of_the_products() -> None:
    """In units of N V: 6 D_S + 2 D_T for one pass; 8 D_S and 2 or 4 D_T for two; a pass of both more for sum(w)."""
    sizes = (49152, 576, 960)
    for order, divergence, known, of_student, of_teacher in (
        ("rows", "forward_kl", False, 6, 2),
        ("rows", "jsd", True, 6, 2),
        ("classes", "forward_kl", True, 8, 2),
        ("classes", "forward_kl", False, 8, 4),
        ("classes", "reverse_kl", True, 8, 4),
        ("classes", "jsd", True, 10, 4),
        ("classes", "jsd", False, 10, 6),
        ("classes", "csd", False, 10, 6),
        ("rows", "adaptive_kl", False, 6, 2),
        ("classes", "adaptive_kl", True, 10, 6 + 2 * 31),
    ):
        plan = plan_loss(work(4096, sizes, CUDA, divergence=divergence, known=known), 4096 * MIB, order)
        assert plan.flops == pytest.approx(4096 * 49152 * (of_student * 576 + of_teacher * 960), rel=1e-6)


def test_each_divergence_has_its_passes() -> None:
    for name, formula in FORMULAS.items():
        passes = ClassPasses.of(LossOptions(name).row_divergence, lse_is_known=True, writes=True)
        first = formula.row_first
        assert passes.weighs == (formula.one_read is None and first is None)
        assert passes.gathers == (first is not None)
        assert passes.looks == (31 if first is not None and first.head else 0)
        assert passes.reads_teacher == (name in ("reverse_kl", "adaptive_kl"))
        alone = ClassPasses.of(LossOptions(name).row_divergence, lse_is_known=True, writes=False)
        assert alone.weighs == (formula.one_read is None)
    without_gradient = ClassPasses.of(LossOptions("forward_kl").row_divergence, lse_is_known=True, writes=False)
    assert without_gradient == ClassPasses(reads_teacher=True, weighs=False, crosses=True)
