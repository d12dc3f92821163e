"""Time and memory of the distillation loss from hidden states, forward and backward, beside what it replaces.

    python benchmarks/loss.py                                # every shape, both dtypes, on the CPU
    python benchmarks/loss.py --device cuda                  # the same on a GPU, with CUDA events
    python benchmarks/loss.py --shapes smollm2 --dtypes bfloat16 --divergence jsd

Providers: `gemms`, the four matrix products that no exact method avoids, into buffers that exist already; `srd-fast`,
this library; `plain`, PyTorch on full logits with softmaxes in float32, as the published code of SRD and DistiLLM has
it; `liger`, the compiled chunked JSD of liger-kernel (JSD alone). All run in one process in turn, `--repeats` times
after a warm-up; a row of the table is the median, with the 20 % and 80 % quantiles. `srd-fast, 70 % ignored` has that
share of its labels ignored.

Memory is the peak beyond inputs, weights and their gradients, of one forward and backward in a process of its own.
Every figure is appended to a long-form CSV file.
"""

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SKEW, BETA, TEMPERATURE, SFT_WEIGHT, IGNORE = 0.1, 0.5, 2.0, 0.1, -100


@dataclass(frozen=True)
class Shape:
    """N rows, V classes, widths of student and teacher."""

    N: int
    V: int
    D_S: int
    D_T: int


SHAPES = {
    "smollm2": Shape(1024, 49152, 576, 960),
    "gemma3": Shape(1024, 262144, 576, 960),
    "gemma3-8k": Shape(8192, 262144, 576, 960),
    "qwen2.5": Shape(8192, 152064, 896, 3584),
    "gemma2": Shape(8192, 262144, 2048, 3584),
}
DEFAULT_SHAPES = {"cpu": ["smollm2", "gemma3"], "cuda": ["smollm2", "qwen2.5", "gemma2"]}


@dataclass
class Problem:
    """Inputs of a loss; the student's hidden states and weight want a gradient."""

    h_S: Tensor
    w_S: Tensor
    h_T: Tensor
    w_T: Tensor
    labels: Tensor
    divergence: str

    @staticmethod
    def make(shape: Shape, dtype: torch.dtype, device: str, divergence: str, ignored: float = 0.0) -> "Problem":
        """Random inputs with logits of the spread that language models have, about 3 nats."""
        torch.manual_seed(0)
        draw = partial(torch.randn, device=device, dtype=dtype)
        p = Problem(
            draw(shape.N, shape.D_S).requires_grad_(),
            draw(shape.V, shape.D_S).mul_(3 / shape.D_S**0.5).requires_grad_(),
            draw(shape.N, shape.D_T),
            draw(shape.V, shape.D_T).mul_(3 / shape.D_T**0.5),
            torch.randint(shape.V, (shape.N,), device=device),
            divergence,
        )
        p.labels[torch.rand(shape.N, device=device) < ignored] = IGNORE
        return p


Step = Callable[[], None]


def gemms(p: Problem) -> Step:
    """The floor: student's and teacher's logits, the gradients of hidden states and weight. No loss."""
    z_S, z_T = (torch.empty(len(p.h_S), len(w), dtype=w.dtype, device=w.device) for w in (p.w_S, p.w_T))
    d_h, d_w = torch.empty_like(p.h_S), torch.empty_like(p.w_S)

    @torch.no_grad()
    def step() -> None:
        torch.mm(p.h_S, p.w_S.t(), out=z_S)
        torch.mm(p.h_T, p.w_T.t(), out=z_T)
        torch.mm(z_S, p.w_S, out=d_h)
        torch.mm(z_S.t(), p.h_S, out=d_w)

    return step


def srd_fast(p: Problem) -> Step:
    """This library."""
    from srd_fast import DistillationLoss

    loss = DistillationLoss(
        divergence=p.divergence, temperature=TEMPERATURE, skew=SKEW, beta=BETA, sft_weight=SFT_WEIGHT
    )

    def step() -> None:
        loss(p.h_S, p.w_S, p.h_T, p.w_T, p.labels).loss.backward()

    return step


def _plain_divergence(name: str, z_S: Tensor, z_T: Tensor) -> Tensor:
    log_q = functional.log_softmax(z_S / TEMPERATURE, dim=-1, dtype=torch.float32)
    log_p = functional.log_softmax(z_T / TEMPERATURE, dim=-1, dtype=torch.float32)
    q, p = log_q.exp(), log_p.exp()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if name == "skew_forward_kl":
        return (p * (log_p - (SKEW * p + (1 - SKEW) * q).log())).sum(-1)
    if name == "skew_reverse_kl":
        return (q * (log_q - ((1 - SKEW) * p + SKEW * q).log())).sum(-1)
    if name == "jsd":
        log_m = (BETA * p + (1 - BETA) * q).log()
        return BETA * (p * (log_p - log_m)).sum(-1) + (1 - BETA) * (q * (log_q - log_m)).sum(-1)
    return 0.5 * (p - q).abs().sum(-1)


def plain(p: Problem) -> Step:
    """Full logits, softmaxes in float32, autograd."""

    def step() -> None:
        z_S = p.h_S @ p.w_S.t()
        with torch.no_grad():
            z_T = p.h_T @ p.w_T.t()
        kept = (p.labels != IGNORE).float()
        d = (_plain_divergence(p.divergence, z_S, z_T) * kept).sum() / kept.sum()
        ce = functional.cross_entropy(z_S.float(), p.labels, ignore_index=IGNORE)
        (SFT_WEIGHT * ce + (1 - SFT_WEIGHT) * TEMPERATURE**2 * d).backward()

    return step


def liger(p: Problem) -> Step:
    """liger-kernel's chunked JSD under torch.compile, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if p.divergence != "jsd":
        raise NotImplementedError("liger-kernel has the JSD alone")
    loss = LigerFusedLinearJSDLoss(SFT_WEIGHT, (1 - SFT_WEIGHT) * TEMPERATURE**2, BETA, temperature=TEMPERATURE)

    def step() -> None:
        loss(p.h_S, p.w_S, p.h_T, p.w_T, p.labels).backward()

    return step


PROVIDERS = {"gemms": gemms, "srd-fast": srd_fast, "plain": plain, "liger": liger}
PACKAGES = {"srd-fast": "srd-fast", "liger": "liger-kernel"}
IGNORED_SHARE = 0.7
IGNORED = f"srd-fast, {IGNORED_SHARE:.0%} ignored".replace("%", " %")


def _clear_gradients(p: Problem) -> None:
    p.h_S.grad = p.w_S.grad = None


def _timed(step: Step, p: Problem, device: str, flush: Tensor | None) -> float:
    """Seconds of one step."""
    _clear_gradients(p)
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    assert flush is not None
    flush.zero_()  # What the step before left in the L2 cache is gone.
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    step()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def time_providers(
    names: list[str], shape: Shape, dtype: torch.dtype, device: str, divergence: str, repeats: int
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, float]]:
    """Seconds of every repeat of every provider that runs, why the others do not, and how far each one's gradient of
    the hidden states is from plain PyTorch's (norm of the difference over norm)."""
    p = Problem.make(shape, dtype, device, divergence)
    few_labels = Problem.make(shape, dtype, device, divergence, IGNORED_SHARE)
    partly = replace(p, labels=few_labels.labels)
    del few_labels
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if device == "cuda" else None
    steps: dict[str, tuple[Step, Problem]] = {}
    missing, gradients = {}, {}
    for name in names:
        try:
            steps[name] = PROVIDERS[name](p), p
            _timed(steps[name][0], p, device, flush)
            if p.h_S.grad is not None:
                gradients[name] = p.h_S.grad.float()
        except (ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
            steps.pop(name, None)
            missing[name] = str(error).splitlines()[0]
    if "srd-fast" in steps:
        steps[IGNORED] = srd_fast(partly), partly
        _timed(*steps[IGNORED], device, flush)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, (step, problem) in steps.items():
            seconds[name].append(_timed(step, problem, device, flush))
    of_plain = gradients.pop("plain", None)
    apart = (
        {} if of_plain is None else {k: ((g - of_plain).norm() / of_plain.norm()).item() for k, g in gradients.items()}
    )
    return seconds, missing, apart


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_bytes(name: str, shape: Shape, dtype: torch.dtype, device: str, divergence: str) -> int:
    """Peak beyond inputs, weights and their gradients, of one step in this process; call it in a fresh one."""
    small = Problem.make(replace(shape, N=8, V=32768), dtype, device, divergence)
    PROVIDERS[name](small)()  # Imports, thread pools and compiled code are no part of the loss.
    if name == "srd-fast":
        from srd_fast.losses import free_workspace

        free_workspace()
    p = Problem.make(shape, dtype, device, divergence)
    gradients = sum(x.numel() * x.element_size() for x in (p.h_S, p.w_S))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        PROVIDERS[name](p)()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - gradients
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM, the most that was ever resident.
    PROVIDERS[name](p)()
    return _resident_bytes("VmHWM") - before - gradients


def peak_in_fresh_process(name: str, shape: Shape, dtype: str, device: str, divergence: str) -> int | None:
    """`peak_bytes`, or None where the provider does not run."""
    arguments = json.dumps([name, vars(shape), dtype, device, divergence])
    # Large blocks go back to the system when they are freed, so the peak is of what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, __file__, "--peak", arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.processor()


def _version(provider: str) -> str:
    return importlib.metadata.version(PACKAGES.get(provider.split(",")[0], "torch"))


def _quantiles(values: list[float]) -> Iterator[tuple[str, float]]:
    ordered = sorted(values)
    yield "seconds", statistics.median(values)
    for share in (0.2, 0.8):
        yield f"seconds_p{share * 100:.0f}", ordered[round(share * (len(ordered) - 1))]


def _print_table(case: str, seconds: dict[str, list[float]], memory: dict[str, int | None]) -> None:
    floor = statistics.median(seconds["gemms"]) if "gemms" in seconds else float("nan")
    ours = memory.get("srd-fast")
    print(
        f"\n{case}\n\n| | seconds | 20 % - 80 % | of the GEMMs | extra peak MB | of ours |\n|---|---|---|---|---|---|"
    )
    for name, values in seconds.items():
        middle, low, high = (x for _, x in _quantiles(values))
        peak = memory.get(name)
        megabytes = "" if peak is None else f"{peak / 2**20:.0f}"
        share = "" if peak is None or not ours or name in ("gemms", "srd-fast") else f"{peak / ours:.1f}x"
        times = f"{middle:.3f} | {low:.3f} - {high:.3f} | {middle / floor:.2f}x"
        print(f"| {name} | {times} | {megabytes} | {share} |", flush=True)


def main() -> None:
    """Measure, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--divergence", nargs="+", default=["skew_forward_kl", "jsd"])
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs in fresh processes")
    parser.add_argument("--no-time", action="store_true", help="leave out the timed runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loss.csv")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.peak:
        name, shape, dtype, device, divergence = json.loads(o.peak)
        print(peak_bytes(name, Shape(**shape), getattr(torch, dtype), device, divergence))
        return

    rows: list[dict[str, Any]] = []
    for shape_name in o.shapes or DEFAULT_SHAPES[o.device]:
        shape = SHAPES[shape_name]
        for dtype in o.dtypes:
            for divergence in o.divergence:
                case = f"{shape_name} {vars(shape)}, {dtype}, {divergence}, {_device_name(o.device)}"
                seconds: dict[str, list[float]] = {name: [] for name in o.providers}
                missing: dict[str, str] = {}
                apart: dict[str, float] = {}
                if not o.no_time:
                    arguments = shape, getattr(torch, dtype), o.device, divergence, o.repeats
                    seconds, missing, apart = time_providers(o.providers, *arguments)
                memory = {
                    name: peak_in_fresh_process(name, shape, dtype, o.device, divergence)
                    for name in seconds
                    if name in PROVIDERS and name != "gemms" and not o.no_memory
                }
                common = {
                    "shape": shape_name,
                    **vars(shape),
                    "dtype": dtype,
                    "divergence": divergence,
                    "device": _device_name(o.device),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "date": datetime.date.today().isoformat(),
                }
                for name, values in seconds.items():
                    measured = list(_quantiles(values)) if values else []
                    if memory.get(name) is not None:
                        measured.append(("extra_peak_bytes", memory[name]))
                    if name in apart:
                        measured.append(("gradient_apart_from_plain", apart[name]))
                    for metric, value in measured:
                        provider = {"provider": name, "version": _version(name)}
                        rows.append({**provider, **common, "metric": metric, "value": value})
                if o.no_time:
                    print(
                        case, {k: None if v is None else round(v / 2**20) for k, v in memory.items()}, "MB", flush=True
                    )
                else:
                    _print_table(case, seconds, memory)
                for name, value in apart.items():
                    print(f"{name}: gradient of the hidden states {value:.1e} from plain's")
                for name, reason in missing.items():
                    print(f"{name} left out: {reason}")

    o.output.parent.mkdir(parents=True, exist_ok=True)
    new = not o.output.exists()
    with o.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
