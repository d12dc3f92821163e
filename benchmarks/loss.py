"""Time, memory and error of the distillation loss from hidden states, forward and backward, beside its rivals.

    python -m benchmarks.loss                                # every shape and loss, float32 and bfloat16, on the CPU
    python -m benchmarks.loss --device cuda                  # the same on a GPU, with CUDA events
    python -m benchmarks.loss --shapes smollm2 --dtypes bfloat16 --losses 'jsd + CE'

`providers.py` says who takes part; who cannot has a row that says why. All run in one process in turn, `--repeats`
times after a first run that compiles; figures are medians with their 20 % and 80 % quantiles. `srd-fast, 70 % ignored`
has that share of its labels ignored.

Memory is the peak beyond inputs, weights and their gradients, of one forward and backward: on the CPU resident memory
of a process of its own, on a GPU what PyTorch's allocator has given out.
Errors are of the gradient of the hidden states of 64 rows against plain PyTorch in float64: norm of the difference over
norm.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .command_line import command_line
from .problem import GPU_ROWS, LOSSES, SHAPES, Loss, Problem, Shape, Step, plain_loss
from .providers import NOT_THE_LOSS, PACKAGES, PROVIDERS, try_step
from .rows import device_name, make_rows, set_threads, spread, write

IGNORED_SHARE = 0.7
IGNORED = "srd-fast, 70 % ignored"
SAMPLED_ROWS = 64


def timed(step: Step, p: Problem, flush: Tensor | None) -> float:
    """Seconds of one step. flush: something larger than the GPU's cache, or None on a CPU."""
    p.clear_gradients()
    if flush is None:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    flush.zero_()  # what the step before left in the L2 cache is gone
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    step()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def cache_flush(device: str) -> Tensor | None:
    """What `timed` takes as `flush`."""
    return torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None


def exact_gradient(p: Problem) -> Tensor:
    """[64, D_S] float64: gradient of the mean loss over all rows, of 64 of the hidden states. No label is ignored."""
    rows = torch.arange(0, len(p.h_S), max(1, len(p.h_S) // SAMPLED_ROWS), device=p.h_S.device)[:SAMPLED_ROWS]
    h_S, w_S, h_T, w_T = (x.detach().double() for x in (p.h_S[rows], p.w_S, p.h_T[rows], p.w_T))
    h_S.requires_grad_()
    plain_loss(p.loss, h_S @ w_S.t(), h_T @ w_T.t(), p.labels[rows]).backward()
    assert h_S.grad is not None
    return h_S.grad * len(rows) / len(p.h_S)


def gradient_error(p: Problem, exact: Tensor) -> float:
    """Of the gradient that a step has left, relative."""
    assert p.h_S.grad is not None
    found = p.h_S.grad[:: max(1, len(p.h_S) // SAMPLED_ROWS)][:SAMPLED_ROWS].double()
    return ((found - exact).norm() / exact.norm()).item()


def time_providers(
    names: list[str], p: Problem, repeats: int
) -> tuple[dict[str, dict[str, float]], dict[str, str], list[dict[str, float]]]:
    """Figures of every provider that runs; why the others do not; seconds of every provider in each repeat."""
    device = p.h_S.device.type
    flush = cache_flush(device)
    exact = exact_gradient(p)
    steps: dict[str, tuple[Step, Problem]] = {}
    figures: dict[str, dict[str, float]] = {}
    missing = {}
    for name in names:
        p.clear_gradients()
        step, reason = try_step(name, p)
        if step is None:
            missing[name] = reason
            continue
        steps[name] = step, p
        figures[name] = {} if name in NOT_THE_LOSS else {"gradient_error": gradient_error(p, exact)}
    if device == "cuda":  # its allocator says what is alive; elsewhere that takes a fresh process
        for name in steps.keys() - {"gemms"}:
            figures[name]["extra_peak_bytes"] = peak_on_gpu(steps[name][0], p)
    if "srd-fast" in steps:
        partly = p.with_ignored(IGNORED_SHARE)
        steps[IGNORED], figures[IGNORED] = (PROVIDERS["srd-fast"](partly), partly), {}
        timed(*steps[IGNORED], flush)
    turns: list[dict[str, float]] = []
    for _ in range(repeats):
        turns.append({name: timed(step, problem, flush) for name, (step, problem) in steps.items()})
    for name in steps:
        figures[name] |= spread("seconds", [turn[name] for turn in turns])
    return figures, missing, turns


def peak_on_gpu(step: Step, p: Problem) -> int:
    """Most bytes allocated during a step beyond inputs, weights and their gradients."""
    p.clear_gradients()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - gradient_bytes(p)


def gradient_bytes(p: Problem) -> int:
    """Of the two gradients that a step leaves."""
    return sum(x.numel() * x.element_size() for x in (p.h_S, p.w_S))


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_bytes(make: Callable[[Problem], Step], shape: Shape, dtype: torch.dtype, loss: Loss) -> int:
    """Peak beyond inputs, weights and their gradients, of a step on the CPU in this process; call it in a fresh one."""
    from srd_fast.losses import free_workspace

    small = Problem.make(replace(shape, N=64, V=min(shape.V, 32768)), dtype, "cpu", loss)
    make(small)()  # imports, thread pools and compiled code are no part of the loss
    free_workspace()
    p = Problem.make(shape, dtype, "cpu", loss)
    step = make(p)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the most that was ever resident
    step()
    return _resident_bytes("VmHWM") - before - gradient_bytes(p)


def peak_in_fresh_process(
    who: object, shape: Shape, dtype: str, loss: Loss, module: str = "benchmarks.loss"
) -> int | None:
    """`peak_bytes` of a provider, or None where it does not run. who: what the module's `--peak` takes, a name here."""
    arguments = json.dumps([who, vars(shape), dtype, vars(loss)])
    # Large blocks go back to the system when they are freed, so the peak is of what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-m", module, "--peak", arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def print_table(case: str, figures: dict[str, dict[str, float]], left_out: dict[str, str]) -> None:
    """One row a provider; left_out: why some have no figures."""
    floor = figures.get("gemms", {}).get("seconds", float("nan"))
    ours = figures.get("srd-fast", {}).get("extra_peak_bytes", float("nan"))
    print(f"\n{case}\n\n| | seconds | 20 % - 80 % | of the GEMMs | extra peak MB | of ours | error |\n|{'---|' * 7}")
    for name, f in figures.items():
        times = " | | "
        if "seconds" in f:
            times = f"{f['seconds']:.4g} | {f['seconds_p20']:.4g} - {f['seconds_p80']:.4g}"
            times += f" | {f['seconds'] / floor:.2f}x"
        peak = f.get("extra_peak_bytes")
        memory = " | " if peak is None else f"{peak / 2**20:.0f} | {peak / ours:.1f}x"
        error = f"{f['gradient_error']:.1e}" if "gradient_error" in f else ""
        print(f"| {name} | {times} | {memory} | {error} |", flush=True)
    for name, reason in left_out.items():
        print(f"| {name} | left out: {reason} |{' |' * 5}", flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", default=["smollm2", "llama3", "qwen2.5", "gemma3"], choices=list(SHAPES))
    parser.add_argument("--rows", type=int, help=f"N instead of the shape's; {GPU_ROWS} on a GPU")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs in fresh processes")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.peak:
        name, sizes, dtype, loss = json.loads(o.peak)
        print(peak_bytes(PROVIDERS[name], Shape(**sizes), getattr(torch, dtype), Loss(**loss)))
        return
    set_threads()
    rows = o.rows or (GPU_ROWS if o.device == "cuda" else None)
    for shape_name in o.shapes:
        shape = replace(SHAPES[shape_name], N=rows) if rows else SHAPES[shape_name]
        for dtype in o.dtypes:
            for loss_name in o.losses:
                loss = LOSSES[loss_name]
                p = Problem.make(shape, getattr(torch, dtype), o.device, loss)
                figures, missing, _ = time_providers(o.providers, p, o.repeats)
                del p
                for name in figures if o.device == "cpu" and not o.no_memory else ():
                    if name in PROVIDERS and name != "gemms":
                        peak = peak_in_fresh_process(name, shape, dtype, loss)
                        figures[name] |= {} if peak is None else {"extra_peak_bytes": peak}
                sizes = f"{shape_name} N={shape.N} V={shape.V} D={shape.D_S}/{shape.D_T}"
                print_table(f"{sizes}, {dtype}, {loss}, {device_name(o.device)}", figures, missing)
                options = {"case": str(loss), "shape": sizes, "dtype": dtype, "device": o.device}
                packages = {**PACKAGES, IGNORED: "srd-fast"}
                benchmark = "loss_gpu" if o.device == "cuda" else "loss"
                write(make_rows(benchmark, figures, packages=packages, left_out=missing, **options), o.results)


if __name__ == "__main__":
    main()
