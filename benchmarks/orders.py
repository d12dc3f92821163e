"""The loss in both orders of its work, in how much memory, beside the bare products of its own order.

    python -m benchmarks.orders                                   # on the CPU: 1,024 and 8,192 rows, two vocabularies
    python -m benchmarks.orders --device cuda --seconds 200       # what can be done by then; a second call goes on
    python -m benchmarks.orders --shapes tiny --rows 64 --repeats 2 --results OUT

Rows outside: a chunk of rows sees all classes. Classes outside: a block of classes sees all rows, once for the rows'
maxima and sums and once for the gradient. The teacher's log-sum-exp is known where the teacher was run before.

One run compares all contestants of one loss, shape and dtype: they and the products take turns, figures are medians.
Seconds of the products are of as many products as the order needs, each timed by itself at 2,048 rows or a GiB of
logits at a time, whichever is less: the student's and the teacher's logits, as often as they are made, and one
product each for the gradients of hidden states and head. Products of an order are so the floor of that order's time;
those of rows, the fewest, are the floor of all.

`extra_peak_bytes` is what a step takes beyond inputs, weights and gradients: on a GPU by PyTorch's allocator, on the
CPU resident memory of a process of its own. Errors are those of `benchmarks.loss`. Rows are written after each run, the
most telling runs first; those that this machine has with this version of torch are not made again without `--again`.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from srd_fast.kernels import FORMULAS
from srd_fast.losses import free_workspace

from .command_line import command_line
from .loss import cache_flush, exact_gradient, gradient_error, peak_bytes, peak_in_fresh_process, peak_on_gpu, timed
from .problem import GPU_ROWS, LOSSES, SHAPES, Loss, Problem, Shape, Step
from .providers import srd_fast_in_order, why_not
from .rows import PRODUCTS, Row, device_name, make_rows, read, set_threads, spread, write

MIB = 2**20
# Of the products alone: rows at a time, and bytes of their logits.
PRODUCT_ROWS, PRODUCT_BYTES = 2048, 2**30
LEAST_REPEATS = 3


@dataclass(frozen=True)
class Contestant:
    """One way to compute the loss. budget: `memory_budget` in MiB, None for the default. lse: whether the teacher's
    log-sum-exp is known."""

    order: str
    budget: int | None
    lse: bool

    def __str__(self) -> str:
        budget = "default" if self.budget is None else f"{self.budget:,} MiB"
        return f"{self.order}, {budget}" + ", lse known" * self.lse

    def make(self, p: Problem) -> Step:
        """Its step."""
        budget = None if self.budget is None else self.budget * MIB
        return srd_fast_in_order(p, self.order, budget, p.teacher_lse() if self.lse else None)

    def products(self, loss: Loss) -> dict[str, int]:
        """How often it needs each of `Products`."""
        one_read = FORMULAS[loss.divergence].one_read
        student = teacher = 1
        if self.order == "classes":
            student = 2 if one_read else 3  # one more where sum(w) must be known before the gradient
            # The sum of terms under the student's probabilities needs the teacher's logits whatever is known.
            teacher = student - (self.lse and one_read != "student")
        return {"student_logits": student, "teacher_logits": teacher, "hidden_gradient": 1, "head_gradient": 1}


CONTESTANTS = {
    "cpu": [
        Contestant(order, budget, lse) for order, budget in (("classes", 96), ("rows", None)) for lse in (True, False)
    ],
    "cuda": [
        Contestant(order, budget, lse)
        for budget in (128, None, 512, 1024, 4096)
        for order in ("classes", "rows")
        for lse in (True, False)
    ],
}


@dataclass(frozen=True)
class Run:
    """What one interleaved run compares."""

    name: str
    shape: Shape
    dtype: str
    loss: Loss

    @property
    def sizes(self) -> str:
        """Of its rows."""
        s = self.shape
        return f"{self.name} N={s.N} V={s.V} D={s.D_S}/{s.D_T}"

    @property
    def flops(self) -> float:
        """Of a step's four products, to tell how long a run takes from another."""
        s = self.shape
        return 2.0 * s.N * s.V * (3 * s.D_S + s.D_T)

    def __str__(self) -> str:
        return f"{self.sizes}, {self.dtype}, {self.loss}"


class Products:
    """The bare products, into buffers that exist already; each of the steps is all rows."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        rows = max(1, min(PRODUCT_ROWS, PRODUCT_BYTES // (len(p.w_S) * p.w_S.element_size())))
        self.chunks = [slice(i, i + rows) for i in range(0, len(p.h_S), rows)]
        new = partial(torch.empty, dtype=p.w_S.dtype, device=p.w_S.device)
        self.z_S, self.z_T = (new(min(rows, len(p.h_S)), len(w)) for w in (p.w_S, p.w_T))
        self.d_h, self.d_w = torch.empty_like(p.h_S), torch.empty_like(p.w_S)
        self.steps: dict[str, Step] = {
            "student_logits": lambda: self._logits(p.h_S, p.w_S, self.z_S),
            "teacher_logits": lambda: self._logits(p.h_T, p.w_T, self.z_T),
            "hidden_gradient": self._hidden_gradient,
            "head_gradient": self._head_gradient,
        }

    @torch.no_grad()
    def _logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        for rows in self.chunks:
            h = hidden[rows]
            torch.mm(h, weight.t(), out=out[: len(h)])

    @torch.no_grad()
    def _hidden_gradient(self) -> None:
        for rows in self.chunks:
            d_h = self.d_h[rows]
            torch.mm(self.z_S[: len(d_h)], self.p.w_S, out=d_h)

    @torch.no_grad()
    def _head_gradient(self) -> None:
        for rows in self.chunks:
            h = self.p.h_S[rows]
            torch.mm(self.z_S[: len(h)].t(), h, out=self.d_w)


def seconds_of_products(contestant: Contestant, loss: Loss, turn: Mapping[str, float]) -> float:
    """Of as many as the contestant needs. turn: seconds of each."""
    return sum(count * turn[name] for name, count in contestant.products(loss).items())


def compare(
    run: Run, device: str, contestants: Sequence[Contestant], repeats: int, memory: bool, deadline: float
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Figures of contestants and products; why others have none. Turns end at the deadline, three are always made."""
    p = Problem.make(run.shape, getattr(torch, run.dtype), device, run.loss)
    flush, exact, products = cache_flush(device), exact_gradient(p), Products(p)
    steps: dict[str, Step] = {}
    figures: dict[str, dict[str, float]] = {}
    left_out = {}
    for contestant in contestants:
        p.clear_gradients()
        try:
            step = contestant.make(p)
            step()
            figures[str(contestant)] = {"gradient_error": gradient_error(p, exact)}
            if device == "cuda":
                figures[str(contestant)]["extra_peak_bytes"] = peak_on_gpu(step, p)
            steps[str(contestant)] = step
        except Exception as error:  # out of memory, or an order that this version has not
            left_out[str(contestant)] = why_not(error)
            figures.pop(str(contestant), None)
            free_workspace()
    for step in products.steps.values():
        step()
    turns: list[dict[str, float]] = []
    while len(turns) < repeats and (len(turns) < LEAST_REPEATS or time.monotonic() < deadline):
        turns.append({name: timed(step, p, flush) for name, step in {**products.steps, **steps}.items()})
    for contestant in contestants:
        if str(contestant) in steps:
            own = [seconds_of_products(contestant, run.loss, turn) for turn in turns]
            f = figures[str(contestant)]
            f |= spread("seconds", [turn[str(contestant)] for turn in turns]) | spread("own_products_seconds", own)
    rows = Contestant("rows", None, False)
    figures[PRODUCTS] = spread("seconds", [seconds_of_products(rows, run.loss, turn) for turn in turns])
    for name in products.steps:
        figures[PRODUCTS] |= spread(f"{name}_seconds", [turn[name] for turn in turns])
    del p, products, steps
    free_workspace()
    for contestant in contestants if device == "cpu" and memory else ():
        if str(contestant) in figures:
            peak = peak_in_fresh_process(asdict(contestant), run.shape, run.dtype, run.loss, "benchmarks.orders")
            figures[str(contestant)] |= {} if peak is None else {"extra_peak_bytes": peak}
    return figures, left_out


def runs(names: Sequence[str], rows: Sequence[int], dtypes: Sequence[str], losses: Sequence[str]) -> Iterator[Run]:
    """The most telling first: the first of each list."""
    for N in rows:
        for loss in losses:
            for dtype in dtypes:
                for name in names:
                    yield Run(name, replace(SHAPES[name], N=N), dtype, LOSSES[loss])


def default_dtypes(device: str) -> list[str]:
    """In which the loss is run: bfloat16 where the machine has it."""
    if device == "cuda":
        return ["bfloat16"]
    cpuinfo = Path("/proc/cpuinfo")
    fast = cpuinfo.is_file() and "avx512_bf16" in cpuinfo.read_text("utf-8")
    return ["float32", "bfloat16"] if fast else ["float32"]


def missing(every: Sequence[Run], known: Sequence[Row], contestants: Sequence[Contestant]) -> list[Run]:
    """Runs without a figure of each contestant: first those that were never tried. known: rows of this machine."""
    tried, timed_ones = set(), set()
    for r in known:
        tried.add((r.shape, r.dtype, r.case))
        if r.metric == "seconds":
            timed_ones.add((r.shape, r.dtype, r.case, r.provider))
    names = [str(c) for c in contestants]
    keys = {run: (run.sizes, run.dtype, str(run.loss)) for run in every}
    open_ones = [run for run in every if not all((*keys[run], name) in timed_ones for name in names)]
    return sorted(open_ones, key=lambda run: keys[run] in tried)


def print_table(run: Run, device: str, figures: Mapping[str, Mapping[str, float]], left_out: Mapping[str, str]) -> None:
    """One row a contestant."""
    floor = figures[PRODUCTS]["seconds"]
    print(f"\n{run}, {device_name(device)}; its four products: {floor:.4g} s\n")
    print(f"| | seconds | of its own products | of the four | extra peak MB | error |\n|{'---|' * 6}")
    for name, f in figures.items():
        if name != PRODUCTS:
            own, peak = f["own_products_seconds"], f.get("extra_peak_bytes")
            memory = "" if peak is None else f"{peak / MIB:.0f}"
            times = f"{f['seconds']:.4g} | {f['seconds'] / own:.2f}x | {f['seconds'] / floor:.2f}x"
            print(f"| {name} | {times} | {memory} | {f['gradient_error']:.1e} |", flush=True)
    for name, reason in left_out.items():
        print(f"| {name} | left out: {reason} |{' |' * 4}", flush=True)


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="all but the smallest; fewer on the CPU")
    parser.add_argument("--rows", nargs="+", type=int, help=f"N: 1024 and 8192; {GPU_ROWS} on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], help="bfloat16 where the CPU has it")
    parser.add_argument(
        "--losses", nargs="+", choices=list(LOSSES), default=["forward_kl, T = 1", "skew_reverse_kl + CE"]
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end by then")
    parser.add_argument("--again", action="store_true", help="measure also what there is")
    parser.add_argument("--no-memory", action="store_true", help="leave out the runs in fresh processes on the CPU")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    o = parser.parse_args()
    deadline = time.monotonic() + o.seconds
    threads = set_threads()
    if o.peak:
        who, sizes, dtype, loss = json.loads(o.peak)
        print(peak_bytes(Contestant(**who).make, Shape(**sizes), getattr(torch, dtype), Loss(**loss)))
        return
    gpu = o.device == "cuda"
    benchmark, contestants = "orders_gpu" if gpu else "orders", CONTESTANTS[o.device]
    names = o.shapes or (["qwen2.5", "llama3", "gemma3", "smollm2"] if gpu else ["gemma3", "smollm2"])
    every = list(
        runs(names, o.rows or ([GPU_ROWS] if gpu else [1024, 8192]), o.dtypes or default_dtypes(o.device), o.losses)
    )
    here = device_name(o.device), threads, torch.__version__
    known = [r for r in read(o.results / f"{benchmark}.csv") if (r.device, r.threads, r.torch) == here]
    left = every if o.again else missing(every, known, contestants)
    pace = 0.0  # seconds a flop, of the run before: the first one compiles
    for i, run in enumerate(left):
        began = time.monotonic()
        if began + pace * run.flops > deadline:
            print(f"no time for {len(left) - i} runs, the first: {run}; call again for the rest", flush=True)
            return
        figures, left_out = compare(run, o.device, contestants, o.repeats, not o.no_memory, deadline)
        pace = (time.monotonic() - began) / run.flops
        print_table(run, o.device, figures, left_out)
        packages = {str(c): "srd-fast" for c in contestants}
        options = {"case": str(run.loss), "shape": run.sizes, "dtype": run.dtype, "device": o.device}
        write(make_rows(benchmark, figures, packages=packages, left_out=left_out, **options), o.results)


if __name__ == "__main__":
    main()
