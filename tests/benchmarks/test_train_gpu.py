"""`benchmarks.train_gpu`: cells through real processes on a CPU, and what is measured, when, and for how long."""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the installed package
from benchmarks import child, gpu_session, pairs, plan, rows, sides, step_trace, train_cell, train_gpu  # noqa: E402
from benchmarks.plan import CACHE, GKD, LARGE, PLAIN, SMALL, TINY, Cell  # noqa: E402
from benchmarks.training import srd_steps  # noqa: E402

sys.path.remove(str(ROOT))

FULL_SIDE = "mine, out of memory"
OUT_OF_MEMORY = f"""
import torch
from benchmarks.sides import Side, register

def train(setup, watch):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

register(Side({FULL_SIDE!r}, "torch", train))
"""


def figures_of(folder: Path) -> dict[Cell, dict[str, float]]:
    """Of the rows in a folder."""
    found: dict[Cell, dict[str, float]] = {}
    for r in rows.read(folder / "train_gpu.csv"):
        cell = plan.cell_of(r)
        assert cell is not None
        found.setdefault(cell, {})[r.metric] = r.value
    return found


@pytest.mark.long
def test_cells_through_real_processes(tmp_path: Path) -> None:
    mine, results = tmp_path / "mine.py", tmp_path / "results"
    mine.write_text(OUT_OF_MEMORY, encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--device", "cpu", "--pairs", TINY, "--no-largest"]
    command += ["--warmup", "1", "--steps", "3", "--import", str(mine), "--results", str(results)]
    command += ["--sides", CACHE, FULL_SIDE, "--batches", "2"]

    def told(*more: str) -> str:
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = told()
    assert f"{FULL_SIDE}: out of memory" in first
    found = figures_of(results)
    ours, full = found[Cell(TINY, 2, CACHE)], found[Cell(TINY, 2, FULL_SIDE)]
    assert full.keys() == {"fits", "cell_seconds"}
    assert full["fits"] == 0
    assert ours["fits"] == 1
    assert 0 < ours["step_seconds_p20"] <= ours["step_seconds"] <= ours["step_seconds_p80"] < 60
    # The prompt is a quarter of each sample, rounded down.
    assert ours["loss_tokens_per_second"] / ours["tokens_per_second"] == pytest.approx(0.75, abs=1e-3)
    assert ours["fill_seconds"] > 0
    assert all(0 < ours[f"loss@{n}"] < 1 for n in (1, 2, 3))
    assert plan.OPTIMIZER in next(results.rglob("*srd-fast-cache.txt")).read_text("utf-8")
    # What the cell takes is known now, and is more than there is: the done cells are skipped, the other is not begun.
    path = results / "train_gpu.csv"
    slow = [r if r.metric != "cell_seconds" else replace(r, value=1e4) for r in rows.read(path)]
    rows.write_providers(slow, results)
    second = told("--batches", "2", "3", "--seconds", "1000")
    assert second.splitlines() == [f"no time for 2 cells, the first: {Cell(TINY, 3, CACHE)}; call again for the rest"]


# Everything below answers tasks itself.

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


class Machine:
    """In the place of `run_task`: keeps the tasks, answers them, and takes as long as it is told to."""

    def __init__(self, answer: Answer, monkeypatch: pytest.MonkeyPatch, seconds: float = 10.0) -> None:
        self.answer, self.seconds, self.tasks, self.now = answer, seconds, [], 0.0
        monkeypatch.setattr(train_gpu, "run_task", self.run_task)
        monkeypatch.setattr(train_gpu.time, "monotonic", lambda: self.now)

    def run_task(self, task: Mapping[str, Any], folder: Path, most: float, deadline: float) -> dict[str, Any]:
        """As `child.run_task`."""
        if task["do"] == "about":
            known = {"reason": None, "version": "1"}
            named = {name: {"cached": name.startswith(CACHE), **known} for name in plan.SIDES}
            return {"device": "some GPU", "threads": 1, "torch": "2", "sides": named}
        self.now += self.seconds
        if self.now > deadline:
            raise child.OutOfTimeError
        self.tasks.append(dict(task))
        figures = self.answer(task) if task["do"] == "measure" else {}
        return figures if "reason" in figures else {"figures": figures, "notes": ""}

    def measured(self) -> list[Cell]:
        """Cells in turn, those of a search too."""
        return [Cell(t["pair"], t["batch"], t["side"]) for t in self.tasks if t["do"] == "measure"]


def fine(task: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a cell that ran."""
    return {"fits": 1, "tokens_per_second": 1.0, **rows.spread("step_seconds", [1.0])}


def call(monkeypatch: pytest.MonkeyPatch, results: Path, *options: str) -> None:
    """`python -m benchmarks.train_gpu` in this process."""
    monkeypatch.setattr(sys, "argv", ["train_gpu", "--results", str(results), *options])
    train_gpu.main()


def test_the_most_telling_cells_come_first_and_none_twice() -> None:
    named = [SMALL, LARGE, plan.GEMMA]
    every = list(plan.order(named, [*plan.BATCHES, 0], plan.SIDES))
    assert every[: len(plan.FIRST)] == list(plan.FIRST)
    assert sorted(every, key=str) == sorted(
        {Cell(p, b, s) for p in named for b in (*plan.BATCHES, 0) for s in plan.SIDES}, key=str
    )
    assert len(set(every)) == len(every)
    some = list(plan.order([LARGE, TINY], [8, 3], ["mine", CACHE]))
    assert some == [Cell(LARGE, 8, CACHE), Cell(LARGE, 8, "mine"), *(Cell(TINY, 8, s) for s in (CACHE, "mine"))] + [
        Cell(p, 3, s) for p in (LARGE, TINY) for s in (CACHE, "mine")
    ]


def test_a_second_call_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Machine(fine, monkeypatch), None
    call(monkeypatch, tmp_path, "--no-largest", "--seconds", "100", "--cell-seconds", "1e9")
    assert first.now <= 100
    second = Machine(fine, monkeypatch)
    call(monkeypatch, tmp_path, "--no-largest")
    every = list(plan.order([SMALL, LARGE, plan.GEMMA], plan.BATCHES, plan.SIDES))
    # A cell whose like took 20 s, with the cache filled, is not begun where 10 s are left, one of 10 s is.
    assert first.measured()[:2] == every[:2]
    assert 5 < len(first.measured()) < 10
    assert second.measured() == [c for c in every if c not in first.measured()]


def test_another_torch_measures_again_and_again_does_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--no-largest", "--pairs", SMALL, "--batches", "8", "--sides", CACHE, GKD)
    call_of = [Machine(fine, monkeypatch)]
    call(monkeypatch, tmp_path, *options)
    for r in (written := rows.read(tmp_path / "train_gpu.csv")):
        assert r.torch == "2"
    rows.write_providers([replace(r, torch="1") for r in written], tmp_path)
    for more in ((), (), ("--again",)):
        call_of.append(Machine(fine, monkeypatch))
        call(monkeypatch, tmp_path, *options, *more)
    assert [len(m.measured()) for m in call_of] == [2, 2, 0, 2]


def test_rows_of_other_threads_are_another_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--no-largest", "--pairs", SMALL, "--batches", "8", "--sides", CACHE)
    Machine(fine, monkeypatch)
    call(monkeypatch, tmp_path, *options)
    written = rows.read(tmp_path / "train_gpu.csv")
    for threads, again in ((1, 0), (4, 1)):
        folder = tmp_path / str(threads)
        rows.write_providers([replace(r, threads=threads) for r in written], folder)
        machine = Machine(fine, monkeypatch)
        call(monkeypatch, folder, *options)
        assert len(machine.measured()) == again
    assert {r.threads for r in rows.read(folder / "train_gpu.csv")} == {1, 4}


def test_a_cell_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(task: Mapping[str, Any]) -> dict[str, float]:
        if task["side"] == GKD:
            raise child.Failed("exit status 1\n\nValueError: no such thing")
        return fine(task)

    options = ("--no-largest", "--pairs", SMALL, "--batches", "8", "--sides", CACHE, GKD, PLAIN)
    machines = []
    for more in ((), ("--again", "failed")):
        machines.append(Machine(answer, monkeypatch))
        call(monkeypatch, tmp_path, *options, *more)
    found = figures_of(tmp_path)
    assert found[Cell(SMALL, 8, GKD)].keys() == {"failed", "cell_seconds"}
    assert all(found[Cell(SMALL, 8, side)]["fits"] for side in (CACHE, PLAIN))
    assert "ValueError: no such thing" in next(tmp_path.rglob("*gkdtrainer.txt")).read_text("utf-8")
    assert [t["side"] for t in machines[1].tasks] == [GKD]


def test_a_side_that_cannot_is_asked_once_and_has_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(task: Mapping[str, Any]) -> dict[str, Any]:
        return {"reason": "too old"} if task["side"] == plan.LIVE else fine(task)

    machine = Machine(answer, monkeypatch)
    call(monkeypatch, tmp_path, "--pairs", SMALL, "--batches", "4", "8", "--sides", plan.LIVE, GKD, "--no-largest")
    assert [c.side for c in machine.measured()].count(plan.LIVE) == 1
    assert {c.side for c in figures_of(tmp_path)} == {GKD}
    assert f"{plan.LIVE} left out: too old" in capsys.readouterr().out


def test_a_field_that_the_config_lacks_is_the_reason() -> None:
    with pytest.raises(NotImplementedError, match="SRDConfig has no field no_such_field"):
        srd_steps(None, None, torch_compile=True, no_such_field=1)


def test_the_cache_is_filled_before_and_only_as_far_as_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(fine, monkeypatch)
    sides_of = [CACHE, plan.CACHE_COMPILED, plan.LIVE]
    call(monkeypatch, tmp_path, "--no-largest", "--pairs", SMALL, "--batches", "16", "8", "--sides", *sides_of)
    done = [(t["do"], t.get("count", t.get("batch")), t["pair"]) for t in machine.tasks]
    assert done[:3] == [("fill", 16 * 14, SMALL), ("measure", 16, SMALL), ("measure", 16, SMALL)]
    assert [what for what, *_ in done].count("fill") == 1


def test_a_search_ends_within_an_eighth_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(task: Mapping[str, Any]) -> dict[str, float]:
        return {"fits": float(task["batch"] <= 37)}

    options = ("--largest", "--pairs", SMALL, "--sides", GKD)
    first = Machine(answer, monkeypatch)
    call(monkeypatch, tmp_path, *options, "--seconds", "100")
    second = Machine(answer, monkeypatch)
    call(monkeypatch, tmp_path, *options)
    tried = [[c.batch for c in m.measured()] for m in (first, second)]
    assert tried[0][:3] == [4, 8, 16]
    assert not set(tried[0]) & set(tried[1])
    found = figures_of(tmp_path)[Cell(SMALL, 0, GKD)]
    assert found["largest_batch"] == 36
    assert {int(m[5:]): bool(x) for m, x in found.items() if m.startswith("fits@")} == {
        n: n <= 37 for n in (*tried[0], *tried[1])
    }
    third = Machine(answer, monkeypatch)
    call(monkeypatch, tmp_path, *options)
    assert not third.measured()


@pytest.mark.parametrize("most", [0, 1, 3, 4, 5, 37, 100, 512, 1000])
def test_searches_end_at_the_largest_batch(most: int) -> None:
    fits: dict[int, bool] = {}
    while (batch := plan.next_batch(fits, 512)) is not None:
        assert batch not in fits
        assert 1 <= batch <= 512
        fits[batch] = batch <= most
    largest = max((n for n, fine in fits.items() if fine), default=0)
    assert min(most, 512) - max(1, largest // 8) < largest <= most
    assert len(fits) <= 12


def event(cat: str, name: str, begin: float, length: float) -> dict[str, Any]:
    """Of a trace, in microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length}


def test_a_trace_in_short() -> None:
    events = [
        {"ph": "M", "name": "process_name"},
        event("cuda_runtime", "cudaDeviceSynchronize", 0, 5),  # the profiler's
        event("cuda_runtime", "cudaLaunchKernel", 10, 2),
        event("kernel", "gemm", 20, 100),
        event("cuda_driver", "cuLaunchKernelEx", 30, 2),
        event("kernel", "softmax", 60, 100),  # beside the first, in another stream
        event("kernel", "gemm", 300, 40),
        event("gpu_memcpy", "Memcpy DtoH", 345, 10),
        event("cuda_runtime", "cudaMemcpyAsync", 40, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 42, 320),
        event("cuda_runtime", "cudaDeviceSynchronize", 45, 1),
        event("cuda_runtime", "cudaFree", 46, 1),
        event("cuda_runtime", "cudaLaunchKernel", 380, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 390, 2),
        event("cuda_runtime", "cudaDeviceSynchronize", 400, 9),  # the profiler's
        event("cpu_op", "aten::mm", 0, 1000),
    ]
    found = step_trace.summarise(events, 2)
    assert found.busy_seconds == pytest.approx((140 + 40) * 1e-6 / 2)
    assert found.kernels == 1.5
    assert found.waits == {"cudaStreamSynchronize": 1.0, "cudaDeviceSynchronize": 0.5}
    assert found.synchronisations == 1.5
    assert found.allocations == 0.5
    assert found.most_expensive == [("gemm", pytest.approx(70e-6), 1.0), ("softmax", pytest.approx(50e-6), 0.5)]
    assert "gemm" in step_trace.as_text(found)
    assert step_trace.summarise([], 1).synchronisations == 0


def test_the_union_of_spans_is_what_a_line_of_points_says() -> None:
    draw = random.Random(0)
    for _ in range(50):
        spans = [(a := draw.randrange(60), a + draw.randrange(20)) for _ in range(draw.randrange(12))]
        covered = {x for begin, end in spans for x in range(begin, end)}
        assert step_trace.union_length(spans) == len(covered)


# Of the published models; Gemma 3 4B without its images.
PARAMETERS = {
    SMALL: (1_543_714_304, 494_032_768),
    LARGE: (7_615_616_512, 1_543_714_304),
    plan.GEMMA: (3_880_263_168, 999_885_952),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_pairs_have_the_published_sizes(name: str) -> None:
    pair = pairs.PAIRS[name]
    models = [pairs.random_model(config, torch.bfloat16, "meta") for config in (pair.teacher, pair.student)]
    assert tuple(sum(p.numel() for p in m.parameters()) for m in models) == PARAMETERS[name]


def test_more_samples_begin_with_the_same_ones() -> None:
    few, many = pairs.samples(500, 3), pairs.samples(500, 5)
    assert few[:] == many[:3]
    assert all(plan.LENGTHS[0] <= len(ids) <= plan.LENGTHS[1] for ids in many["input_ids"])
    assert all(max(ids) < 500 for ids in many["input_ids"])


def test_a_cut_head_gives_the_first_classes() -> None:
    model = pairs.random_model(pairs.PAIRS[TINY].teacher, torch.float32, "cpu").eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        whole = model(ids).logits
        pairs.cut_head(model, 512)
        cut = model(ids).logits
    assert (whole.shape[-1], cut.shape[-1]) == (520, 512)
    torch.testing.assert_close(cut, whole[..., :512])


def test_memory_that_lacks_is_known_by_any_name() -> None:
    assert train_cell.out_of_memory(torch.OutOfMemoryError("x"))
    assert train_cell.out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert train_cell.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"))
    assert not train_cell.out_of_memory(ValueError("x"))


def test_sides_of_the_plan_are_those_that_there_are() -> None:
    assert set(sides.SIDES) == set(plan.SIDES)
    assert set(pairs.PAIRS) == set(plan.PAIRS)


def test_a_process_out_of_time_ends_with_what_it_started(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    code += f"open({str(told)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    began = time.monotonic()
    assert child.run_limited([sys.executable, "-c", code], 3.0) is None
    assert time.monotonic() - began < 20
    state, last = Path(f"/proc/{told.read_text()}/stat"), time.monotonic() + 20
    while (runs := state.exists() and state.read_text().split()[2] != "Z") and time.monotonic() < last:
        time.sleep(0.1)  # it was told, and may still be at its end
    assert not runs
    assert child.run_limited([sys.executable, "-c", "raise SystemExit(3)"], math.inf) == 3


class Parts(gpu_session.Session):
    """Says what it would run."""

    def __init__(self, results: Path, seconds: float) -> None:
        arguments = {"results": results, "seconds": seconds, "device": "cuda", "shapes": None, "most": 64, "tests": 1.0}
        super().__init__(gpu_session.argparse.Namespace(**arguments), ["--batches", "8"])
        self.calls: list[tuple[str, ...]] = []

    def run(self, module: str, *options: str, **limits: Any) -> None:
        """Keeps the call."""
        self.calls.append((module, *options))

    def rows(self, benchmark: str) -> list[rows.Row]:
        """Those that are there."""
        group = ("bfloat16", "some GPU", 1)
        loss = [("loss", x, "gemma3 N=8 V=9 D=1/2", *group) for x in gpu_session.LOSSES]
        found = loss if benchmark == "loss" else [("limits", "4 GiB", "gemma3 V=9 D=1/2, jsd", *group)]
        return [rows.Row(*g, "srd-fast", "1", "seconds", 1.0, "2", "2026-01-01") for g in found]


def test_a_session_runs_what_is_missing_and_nothing_beyond_its_end(tmp_path: Path) -> None:
    parts = Parts(tmp_path, 1000.0)
    parts.loss()
    every = [(s, d, x) for d in gpu_session.DTYPES for s in gpu_session.SHAPES for x in gpu_session.LOSSES]
    there = [("gemma3", "bfloat16", x) for x in gpu_session.LOSSES]
    assert [(c[2], c[4], c[6]) for c in parts.calls] == [x for x in every if x not in there]
    parts.calls.clear()
    parts.limits()
    assert [c[2 : c.index("--most")] for c in parts.calls] == [
        ("gemma3-4b", "--limits", "4", "6", "8"),
        ("gemma3", "--limits", "6"),
        ("smollm2", "--limits", "4", "6"),
    ]
    parts.orders()
    assert parts.calls[-1][0] == "benchmarks.orders"
    assert 900 < float(parts.calls[-1][2]) < 1000
    parts.steps()
    assert parts.calls[-1][-2:] == ("--batches", "8")
    assert 900 < float(parts.calls[-1][2]) < 1000
    late = Parts(tmp_path, 60.0)
    late.loss()
    assert not late.calls


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())

    def no_version(name: str) -> str:
        raise gpu_session.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_session.importlib.metadata, "version", no_version)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    with gpu_session.importable():
        code = "import importlib.metadata as m, json; print(json.dumps(m.version('srd-fast')))"
        # Without the installed one.
        found = subprocess.run(
            [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        assert json.loads(found.stdout).count(".") == 2
        assert os.environ["PYTHONPATH"].endswith("elsewhere")
    assert os.environ["PYTHONPATH"] == "elsewhere"
