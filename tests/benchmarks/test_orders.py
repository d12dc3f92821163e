"""Both orders of the loss beside their own products, and who says why it is left out."""

import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import srd_fast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import limits, orders, problem, providers, rivals, rows, tables
from benchmarks.orders import Contestant, Run
from benchmarks.problem import LOSSES, Loss, Problem, Shape

SHAPE = Shape(12, 40, 8, 10)
KNOWN, UNKNOWN, ROWS = (
    Contestant("classes", 96, True),
    Contestant("classes", 96, False),
    Contestant("rows", None, False),
)
FORWARD = LOSSES["forward_kl, T = 1"]


def make(loss: Loss = FORWARD, shape: Shape = SHAPE, dtype: torch.dtype = torch.float32) -> Problem:
    """Random inputs on the CPU."""
    return Problem.make(shape, dtype, "cpu", loss)


@pytest.fixture
def with_orders(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Tensor | None]]:
    """A library that takes `order` and `teacher_lse`; what it was given: order, budget, teacher_lse."""
    given: list[tuple[Any, Any, Tensor | None]] = []
    whole = srd_fast.DistillationLoss

    def fast(order: str = "auto", **options: Any) -> Callable[..., Any]:
        loss = whole(**options)

        def call(*inputs: Tensor, teacher_lse: Tensor | None = None) -> Any:
            given.append((order, options["memory_budget"], teacher_lse))
            return loss(*inputs)

        return call

    monkeypatch.setattr(srd_fast, "DistillationLoss", fast)
    monkeypatch.setattr(srd_fast, "distillation_loss", lambda order="auto", teacher_lse=None: None)
    return given


@pytest.fixture
def without_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that knows of no order."""
    monkeypatch.setattr(srd_fast, "distillation_loss", lambda memory_budget=None: None)


@pytest.mark.parametrize(
    ("divergence", "contestant", "student", "teacher"),
    [
        ("forward_kl", ROWS, 6, 2),
        ("skew_reverse_kl", replace(ROWS, lse=True), 6, 2),
        ("forward_kl", KNOWN, 8, 2),
        ("forward_kl", UNKNOWN, 8, 4),
        ("skew_reverse_kl", KNOWN, 10, 4),
        ("jsd", UNKNOWN, 10, 6),
        ("reverse_kl", KNOWN, 8, 4),
        ("tvd", KNOWN, 10, 4),
    ],
)
def test_an_order_has_its_own_products(divergence: str, contestant: Contestant, student: int, teacher: int) -> None:
    needs = contestant.products(Loss(divergence))
    # Operations in units of N * V * D_S and of N * V * D_T.
    assert 2 * (needs["student_logits"] + needs["hidden_gradient"] + needs["head_gradient"]) == student
    assert 2 * needs["teacher_logits"] == teacher
    turn = {"student_logits": 1.0, "teacher_logits": 10.0, "hidden_gradient": 100.0, "head_gradient": 1000.0}
    expected = (student / 2 - 2) * 1.0 + teacher / 2 * 10.0 + 1100.0
    assert orders.seconds_of_products(contestant, Loss(divergence), turn) == expected


@pytest.mark.parametrize("rows_at_once", [12, 5, 1])
def test_products_are_those_of_all_rows(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "PRODUCT_ROWS", rows_at_once)
    p = make()
    products = orders.Products(p)
    assert sum(len(p.h_S[chunk]) for chunk in products.chunks) == len(p.h_S)
    for step in products.steps.values():
        step()
    last = len(p.h_S[products.chunks[-1]])
    z_S, z_T = p.logits()
    torch.testing.assert_close(products.z_S[:last], z_S[-last:].detach())
    torch.testing.assert_close(products.z_T[:last], z_T[-last:])
    if rows_at_once == 12:
        torch.testing.assert_close(products.d_h, (z_S @ p.w_S).detach())
        torch.testing.assert_close(products.d_w, (z_S.t() @ p.h_S).detach())


def test_products_of_wide_logits_are_a_gib_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "PRODUCT_BYTES", 4 * 40 * 3)
    assert [len(range(12)[chunk]) for chunk in orders.Products(make()).chunks] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("loss", "dtype", "student_classes"),
    [
        (FORWARD, torch.float32, 40),
        (LOSSES["jsd"], torch.float32, 33),
        (LOSSES["forward_kl"], torch.bfloat16, 40),
        (Loss("tvd", 0.5, 0.3), torch.bfloat16, 7),
    ],
)
@pytest.mark.parametrize("at_once", [(1024, 4096), (5, 9)])
def test_the_teachers_log_sum_exp(
    loss: Loss, dtype: torch.dtype, student_classes: int, at_once: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "_ROWS_AT_ONCE", at_once[0])
    monkeypatch.setattr(problem, "_CLASSES_AT_ONCE", at_once[1])
    p = make(loss, dtype=dtype)
    p = replace(p, w_S=p.w_S.detach()[:student_classes].requires_grad_())
    exact = (p.h_T.double() @ p.w_T[:student_classes].double().t() / loss.temperature).logsumexp(-1)
    found = p.teacher_lse()
    assert (found.dtype, found.shape, found.requires_grad) == (torch.float32, p.labels.shape, False)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


def test_contestants_are_what_the_library_is_asked_for(with_orders: list[tuple[Any, Any, Tensor | None]]) -> None:
    p = make()
    for contestant in (KNOWN, UNKNOWN, ROWS):
        contestant.make(p)()
        assert p.w_S.grad is not None
        p.clear_gradients()
    assert [(order, budget, lse is not None) for order, budget, lse in with_orders] == [
        ("classes", 96 << 20, True),
        ("classes", 96 << 20, False),
        ("rows", None, False),
    ]
    assert with_orders[0][2] is not None
    torch.testing.assert_close(with_orders[0][2], p.teacher_lse())
    names = [str(c) for device in orders.CONTESTANTS.values() for c in device]
    assert len(set(names)) == len(names) - 2  # rows in the default budget, with and without, are on both devices
    assert "classes, 4,096 MiB, lse known" in names


@pytest.mark.usefixtures("without_orders")
def test_without_orders_only_todays_rows_run() -> None:
    for contestant in (KNOWN, UNKNOWN, replace(ROWS, lse=True)):
        with pytest.raises(NotImplementedError, match="no order of the work"):
            contestant.make(make())
    ROWS.make(p := make())()
    assert p.h_S.grad is not None
    step, reason = providers.try_step("srd-fast, classes, 128 MiB", make())
    assert (step, "no order of the work" in reason) == (None, True)


def call(results: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """`python -m benchmarks.orders` on a tiny shape in this process, its memory not measured."""
    common = ["--shapes", "tiny", "--dtypes", "float32", "--repeats", "2", "--no-memory", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["orders", *common, *options])
    monkeypatch.setattr(orders, "set_threads", torch.get_num_threads)
    orders.main()


@pytest.mark.usefixtures("with_orders")
def test_a_run_compares_all_with_their_own_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(tmp_path, monkeypatch, "--rows", "24", "--losses", "forward_kl, T = 1")
    found: dict[str, dict[str, float]] = {}
    for r in rows.read(tmp_path / "orders.csv"):
        assert (r.case, r.shape, r.dtype) == ("forward_kl, T = 1", "tiny N=24 V=4096 D=64/64", "float32")
        found.setdefault(r.provider, {})[r.metric] = r.value
    parts = found.pop("products")
    assert set(found) == {str(c) for c in orders.CONTESTANTS["cpu"]}
    assert parts["seconds"] > 0
    for name, f in found.items():
        assert f["seconds"] > 0
        assert f["gradient_error"] < 1e-5, name
    # Of two turns a median is a mean, and a mean of sums the sum of means.
    both = parts["student_logits_seconds"], parts["teacher_logits_seconds"]
    assert found["rows, default"]["own_products_seconds"] == pytest.approx(parts["seconds"])
    assert found["classes, 96 MiB, lse known"]["own_products_seconds"] == pytest.approx(parts["seconds"] + both[0])
    assert found["classes, 96 MiB"]["own_products_seconds"] == pytest.approx(parts["seconds"] + sum(both))


def test_a_second_call_goes_on_and_asks_again_who_was_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[Run] = []
    refused = {"forward_kl, T = 1"}

    def compare(run: Run, device: str, contestants: Sequence[Contestant], *_: object) -> tuple[Mapping[str, Any], Any]:
        compared.append(run)
        figures = {"seconds": 2.0, "own_products_seconds": 1.0, "gradient_error": 0.0}
        left_out = {str(KNOWN): "no | such order"} if str(run.loss) in refused else {}
        names = [str(c) for c in contestants if str(c) not in left_out]
        return {**dict.fromkeys(names, figures), "products": {"seconds": 0.5}}, left_out

    monkeypatch.setattr(orders, "compare", compare)
    call(tmp_path, monkeypatch, "--rows", "4")
    assert [str(run.loss) for run in compared] == ["forward_kl, T = 1", "skew_reverse_kl + CE"]
    assert "| classes, 96 MiB, lse known | left out: no | such order |" in capsys.readouterr().out
    left = [r for r in rows.read(tmp_path / "orders.csv") if r.metric == rows.LEFT_OUT]
    assert [(r.provider, r.note, r.case) for r in left] == [(str(KNOWN), "no | such order", "forward_kl, T = 1")]

    lines = [line.split(" | ")[3:] for line in tables.orders(rows.read(tmp_path / "orders.csv")).splitlines()[2:]]
    assert lines[1][:3] == ["0.50", str(KNOWN), "no / such order"]
    assert lines[0][:5] == ["0.50", str(UNKNOWN), "2.00", "2.00x", "4.00x"]

    refused.clear()
    compared.clear()
    call(tmp_path, monkeypatch, "--rows", "4", "8")  # first what was never tried
    assert [(run.shape.N, str(run.loss)) for run in compared] == [
        (8, "forward_kl, T = 1"),
        (8, "skew_reverse_kl + CE"),
        (4, "forward_kl, T = 1"),
    ]
    compared.clear()
    call(tmp_path, monkeypatch, "--rows", "4", "8")
    assert not compared
    call(tmp_path, monkeypatch, "--rows", "4", "--again")
    assert len(compared) == 2
    compared.clear()
    known = [replace(r, threads=77) for r in rows.read(tmp_path / "orders.csv")]
    rows.write(known, tmp_path / "other")
    call(tmp_path / "other", monkeypatch, "--rows", "4")
    assert len(compared) == 2


def test_no_run_is_begun_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]

    def compare(run: Run, *_: object) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        now[0] += run.shape.N  # a second a row
        return {"products": {"seconds": 1.0}}, {}

    monkeypatch.setattr(orders, "compare", compare)
    monkeypatch.setattr(orders, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    call(tmp_path, monkeypatch, "--rows", "10", "100", "--seconds", "60")
    assert now[0] == 20
    assert "no time for 2 runs, the first: tiny N=100" in capsys.readouterr().out


def test_rows_of_two_machines_are_divided_by_their_own_products() -> None:
    def of(device: str, provider: str, **figures: float) -> list[rows.Row]:
        who = ("orders_gpu", "jsd", "gemma3 N=8192 V=262144 D=640/1152", "bfloat16", device, 16, provider, "1")
        return [rows.Row(*who, metric, x, "2.11", "2026-01-01") for metric, x in figures.items()]

    given = []
    for device, seconds in (("H100", 0.020), ("H200", 0.010)):
        given += of(device, "products", seconds=seconds)
        ours = {"seconds": 0.040, "own_products_seconds": 2 * seconds, "extra_peak_bytes": 96 << 20}
        given += of(device, "classes, 128 MiB", **ours)
    made = tables.orders(given, benchmark="orders_gpu", unit="ms").splitlines()
    assert [line.split(" | ")[4:] for line in made[2:]] == [
        ["20.00", "classes, 128 MiB", "40.00", "1.00x", "2.00x", "96 |"],
        ["10.00", "classes, 128 MiB", "40.00", "2.00x", "4.00x", "96 |"],
    ]
    assert [line.split(" | ")[0] for line in made[2:]] == ["| H100, 16 threads", "| H200, 16 threads"]


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("liger-kernel fused", "jsd", "its kernels need a GPU"),
        ("liger-kernel fused, CuTe", "jsd", "its kernels need a GPU"),
        ("liger-kernel fused KL", "forward_kl", "its kernels need a GPU"),
        (providers.QUACK, "jsd + CE", "its kernels need a GPU"),
        (providers.LIGER_CE, "jsd + CE", "its kernels need a GPU"),
        (providers.LIGER_CUTE, "jsd + CE", "its kernels need a GPU"),
    ],
)
def test_who_needs_a_gpu_says_so(name: str, case: str, reason: str) -> None:
    step, said = providers.try_step(name, make(LOSSES[case]))
    assert (step, said) == (None, reason)


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("liger-kernel fused", "jsd + CE", "its loss has no cross-entropy"),
        ("liger-kernel fused KL", "jsd", "it has the forward KL alone, not jsd"),
        (providers.QUACK, "jsd", "it has the cross-entropy alone"),
        (providers.LIGER_CE, "jsd + CE", "its kernel is for bfloat16 on sm_90, not torch.float32 on sm_90"),
        (providers.LIGER_CUTE, "forward_kl", "it has the cross-entropy alone"),
    ],
)
def test_who_lacks_a_loss_says_which_on_a_gpu(
    name: str, case: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    step, said = providers.try_step(name, replace(make(LOSSES[case]), h_S=on_gpu))  # type: ignore[arg-type]
    assert (step, said) == (None, reason)


def test_a_package_that_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtune", None)
    step, said = providers.try_step("torchtune", make())
    assert step is None
    assert "torchtune" in said
    made = rows.make_rows("loss", {}, left_out={"torchtune": said}, packages={"torchtune": "no-such-package"})
    assert [(r.metric, r.value, r.version, r.note) for r in made] == [(rows.LEFT_OUT, 1.0, "", said)]


def test_limits_and_gradients_say_why_somebody_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(name: str, shape: Shape, dtype: str, device: str, loss: Loss, limit: int) -> bool:
        if name == "trl gkd":
            raise LookupError("no such package")
        return shape.N * len(name) <= limit >> 22  # who has a longer name takes more

    common = ["--results", str(tmp_path)]
    options = ["--shapes", "gemma3-4b", "--limits", "4", "8", "--providers", "plain", "trl gkd", "srd-fast", *common]
    monkeypatch.setattr(limits, "fits", fits)
    monkeypatch.setattr(limits, "set_threads", torch.get_num_threads)
    monkeypatch.setattr(sys, "argv", ["limits", *options])
    limits.main()
    found = {(r.case, r.provider, r.metric): (r.value, r.note) for r in rows.read(tmp_path / "limits.csv")}
    most = {key[:2]: value for key, (value, _) in found.items() if key[2] == "largest_rows"}
    assert most == {
        ("4 GiB", "plain"): 128,
        ("4 GiB", "srd-fast"): 128,
        ("8 GiB", "plain"): 256,
        ("8 GiB", "srd-fast"): 256,
    }
    for gib in (4, 8):
        assert found[f"{gib} GiB", "trl gkd", rows.LEFT_OUT] == (1.0, "no such package")
    assert "| no such package |" in tables.limits(rows.read(tmp_path / "limits.csv"))

    monkeypatch.setitem(sys.modules, "torchtune", None)
    options = ["--losses", "forward_kl, T = 1", "--providers", "plain", "torchtune", *common]
    monkeypatch.setattr(sys, "argv", ["rivals", *options])
    rivals.main()
    left = [r for r in rows.read(tmp_path / "rivals.csv") if r.metric == rows.LEFT_OUT]
    assert [r.provider for r in left] == ["torchtune"]
    lines = tables.rivals(rows.read(tmp_path / "rivals.csv")).splitlines()
    assert lines[0].endswith("| plain | torchtune |")
    assert len(lines) == 2 + len(rivals.EXAMPLES)
    assert all("torchtune" in line for line in lines[2:])


def test_only_this_library_may_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(p: Problem) -> problem.Step:
        raise RuntimeError("what is\n wrong")

    monkeypatch.setitem(providers.PROVIDERS, "plain", broken)
    monkeypatch.setitem(providers.PROVIDERS, "srd-fast", broken)
    assert providers.try_step("plain", make()) == (None, "RuntimeError: what is wrong")
    with pytest.raises(RuntimeError, match="what is"):
        providers.try_step("srd-fast", make())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is Linux's to tell")
def test_a_peak_is_of_what_a_step_holds() -> None:
    def of(mib: int) -> Callable[[Problem], problem.Step]:
        def maker(p: Problem) -> problem.Step:
            def step() -> None:
                (p.h_S.sum() + p.w_S.sum() + 0 * torch.ones(mib << 18).sum()).backward()

            return step

        return maker

    found = [orders.peak_bytes(of(mib), Shape(64, 4096, 64, 64), torch.float32, FORWARD) for mib in (64, 256)]
    assert found[1] - found[0] == pytest.approx(192 << 20, rel=0.1)


def test_a_contestant_is_handed_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def run(command: list[str], **_: object) -> types.SimpleNamespace:
        made.append(command)
        return types.SimpleNamespace(returncode=0, stdout="some words\n123\n")

    monkeypatch.setattr("benchmarks.loss.subprocess.run", run)
    who = orders.asdict(KNOWN)
    assert orders.peak_in_fresh_process(who, SHAPE, "float32", FORWARD, "benchmarks.orders") == 123
    name, sizes, dtype, loss = json.loads(made[0][-1])
    assert made[0][1:4] == ["-m", "benchmarks.orders", "--peak"]
    assert (Contestant(**name), Shape(**sizes), dtype, Loss(**loss)) == (KNOWN, SHAPE, "float32", FORWARD)
