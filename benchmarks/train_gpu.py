"""Training steps at the sizes of real pairs, on a GPU: `SRDTrainer` beside the plain loop and TRL's trainers.

    python -m benchmarks.train_gpu                                   # all that is missing, the most telling first
    python -m benchmarks.train_gpu --seconds 600                     # what can be done by then; a second call goes on
    python -m benchmarks.train_gpu --pairs qwen2.5-7b-1.5b --batches 8 --sides 'srd-fast, cache' --again
    python -m benchmarks.train_gpu --largest                         # only the largest batches that fit

Weights and tokens are random: neither changes what a step costs. Students in float32 under autocast to bfloat16,
teachers in bfloat16; samples of 256 to 1,024 tokens, the first quarter a prompt; forward KL at temperature 1, fused
AdamW on all sides, LoRA of rank 16 in all products of the layers. Every side runs in a process of its own that does
nothing else. The teacher's cache is filled by a process before; `fill_seconds` says how long that takes, and no step
has it.

A step is timed by marks in the GPU's queue, so that the clock makes nobody wait; seven steps after four of warm-up.
`peak_bytes` is what PyTorch's allocator gave out at most. Three further steps are profiled: `gpu_busy_seconds` is how
long some kernel was running, scaled by the tokens to those of the timed steps, and its share is of the time without
profiler; `kernels` and `synchronisations` (calls in which the host waits for the device) are of a step. The ten most
expensive kernels are in a text file in the folder `train_gpu` beside the rows, and so is why a cell failed.

Rows are written after each cell. `fits` is 0 where memory ran out, `failed` is 1 where anything else went wrong.
Batches are doubled while they fit, then bisected to an eighth; `fits@N` says how batch N went.
"""

import argparse
import datetime
import math
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import plan
from .child import Failed, OutOfTimeError, run_task
from .command_line import command_line
from .plan import Cell
from .rows import Row, read, write_providers

BENCHMARK = "train_gpu"
# Of a cell before any was measured: to import, to make two models, and the steps.
FIRST_SECONDS = 75.0
PROBE_STEPS = (2, 0, 0)


class Session:
    """Measures cells one after the other until the time is up."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.deadline = time.monotonic() + args.seconds
        self.imports = [str(path.resolve()) for path in args.imports]
        self.about = self.ask({"do": "about"})
        self.filled: dict[str, int] = {}
        self.seconds: dict[Cell, float] = {}
        for cell, figures in self.known().items():
            if "cell_seconds" in figures:
                self.seconds[cell] = figures["cell_seconds"]

    def ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of a process of its own."""
        whole = {"device": self.args.device, "imports": self.imports, **task}
        return run_task(whole, self.work, self.args.cell_seconds, self.deadline)

    def known(self) -> dict[Cell, dict[str, float]]:
        """Figures of the cells that this machine has with this version of torch, from the file of results."""
        found: dict[Cell, dict[str, float]] = {}
        for r in read(self.args.results / f"{BENCHMARK}.csv"):
            if (r.device, r.threads, r.torch) != tuple(self.about[x] for x in ("device", "threads", "torch")):
                continue
            if cell := plan.cell_of(r):
                found.setdefault(cell, {})[r.metric] = r.value
        return found

    def expected_seconds(self, cell: Cell) -> float:
        """By the cells that are most like it."""
        compiled = "compiled" in cell.side
        alike = (
            [s for c, s in self.seconds.items() if (c.pair, c.side) == (cell.pair, cell.side)],
            [s for c, s in self.seconds.items() if c.pair == cell.pair and ("compiled" in c.side) == compiled],
            [s for c, s in self.seconds.items() if ("compiled" in c.side) == compiled],
            [*self.seconds.values()],
        )
        # A machine's first process of a kind reads and compiles what later ones find there, so the least is what to
        # expect. A cell that does take longer is ended in time.
        return min(next((seconds for seconds in alike if seconds), [FIRST_SECONDS]))

    def has_time(self, cell: Cell) -> bool:
        """Whether the cell will probably end in time."""
        return time.monotonic() + self.expected_seconds(cell) < self.deadline

    def measure(self, cell: Cell, steps: tuple[int, int, int]) -> dict[str, Any]:
        """Figures and notes of a cell, its teacher cache filled before."""
        folder = self.work / cell.pair
        if self.about["sides"][cell.side]["cached"] and self.filled.get(cell.pair, 0) < cell.batch * sum(steps):
            folder.mkdir(exist_ok=True)
            self.filled[cell.pair] = cell.batch * sum(steps)
            self.ask({"do": "fill", "pair": cell.pair, "count": self.filled[cell.pair], "folder": str(folder)})
        who = {"pair": cell.pair, "batch": cell.batch, "side": cell.side, "folder": str(folder)}
        return self.ask({"do": "measure", **who, "steps": steps})

    def step(self, cell: Cell) -> dict[str, float]:
        """Measure a cell and write its rows. Raises LookupError where the side cannot."""
        began = time.monotonic()
        a = self.args
        try:
            answer = self.measure(cell, (a.warmup, a.steps, a.profiled if a.device == "cuda" else 0))
        except Failed as error:
            answer = {"figures": {"failed": 1}, "notes": str(error)}
        if "reason" in answer:
            raise LookupError(answer["reason"])
        self.seconds[cell] = time.monotonic() - began
        figures = {**answer["figures"], "cell_seconds": self.seconds[cell]}
        self.write(cell, figures, answer["notes"])
        return figures

    def largest(self, cell: Cell) -> dict[str, float]:
        """Search the largest batch of a pair and side. Raises as `step`, and OutOfTimeError: what was tried is kept."""
        known = self.known()
        figures = {} if self.args.again == "all" else dict(known.get(cell, {}))
        figures.pop("failed", None)
        fits = {int(name.split("@")[1]): bool(x) for name, x in figures.items() if name.startswith("fits@")}
        fits |= {
            c.batch: bool(f["fits"])
            for c, f in known.items()
            if c.batch and (c.pair, c.side) == (cell.pair, cell.side) and "fits" in f
        }
        while (batch := plan.next_batch(fits, self.args.most)) is not None:
            probe = Cell(cell.pair, batch, cell.side)
            if not self.has_time(probe):
                raise OutOfTimeError
            began = time.monotonic()
            try:
                answer = self.measure(probe, PROBE_STEPS)
            except Failed as error:
                self.write(cell, {**figures, "failed": 1}, str(error))
                return {"failed": 1}
            if "reason" in answer:
                raise LookupError(answer["reason"])
            self.seconds.setdefault(probe, time.monotonic() - began)
            fits[batch] = bool(answer["figures"]["fits"])
            figures[f"fits@{batch}"] = answer["figures"]["fits"]
            self.write(cell, figures, "")
        figures["largest_batch"] = max((n for n, fine in fits.items() if fine), default=0)
        figures["searched_to"] = self.args.most
        self.write(cell, figures, "")
        return figures

    def write(self, cell: Cell, figures: Mapping[str, float], notes: str) -> None:
        """Rows of a cell, and its text file."""
        about = self.about
        version, today = about["sides"][cell.side]["version"], datetime.date.today().isoformat()
        who = (BENCHMARK, cell.case, cell.shape, "bfloat16", about["device"], about["threads"], cell.side, version)
        rows = [Row(*who, metric, float(x), about["torch"], today) for metric, x in figures.items()]
        write_providers(rows, self.args.results)
        if notes:
            path = self.args.results / BENCHMARK / slug(about["device"]) / f"{slug(str(cell))}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{cell}\n{about['device']}, torch {about['torch']}, {today}\n\n{notes}\n", "utf-8")

    def run(self, cells: Iterable[Cell]) -> None:
        """All that are missing and will end in time."""
        late: list[Cell] = []
        known = self.known()
        for name, side in self.about["sides"].items():
            if side["reason"] and name in self.args.sides:
                print(f"{name} left out: {side['reason']}", flush=True)
        for cell in cells:
            if self.about["sides"][cell.side]["reason"] or is_done(cell, known.get(cell, {}), self.args.again):
                continue
            if not self.has_time(cell):
                late.append(cell)
                continue
            try:
                figures = self.step(cell) if cell.batch else self.largest(cell)
            except OutOfTimeError:
                late.append(cell)
                continue
            except LookupError as reason:
                print(f"{cell.side} left out: {reason}", flush=True)
                self.about["sides"][cell.side]["reason"] = str(reason)
                continue
            print(f"{cell}: {told(figures)}", flush=True)
        if late:
            print(f"no time for {len(late)} cells, the first: {late[0]}; call again for the rest", flush=True)


def is_done(cell: Cell, figures: Mapping[str, float], again: str | None) -> bool:
    """Whether there is nothing to do. again: None, "failed" or "all"."""
    if again == "all" or (again == "failed" and "failed" in figures):
        return False
    return any(name in figures for name in (("fits", "failed") if cell.batch else ("largest_batch", "failed")))


def told(f: Mapping[str, float]) -> str:
    """A line for a reader."""
    if "failed" in f:
        return "failed; its text file says why"
    if "largest_batch" in f:
        return f"{f['largest_batch']:.0f}{' or more' if f['largest_batch'] >= f['searched_to'] else ''}"
    if not f["fits"]:
        return "out of memory"
    parts = [f"a step {1e3 * f['step_seconds']:.1f} ms"]
    parts[0] += f" ({1e3 * f['step_seconds_p20']:.1f} to {1e3 * f['step_seconds_p80']:.1f})"
    if "gpu_busy_share" in f:
        parts.append(f"GPU busy {100 * f['gpu_busy_share']:.0f} %")
        parts.append(f"{f['kernels']:.0f} kernels, {f['synchronisations']:.1f} synchronisations")
    if "peak_bytes" in f:
        parts.append(f"peak {f['peak_bytes'] / 2**30:.2f} GiB")
    parts.append(f"{f['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def slug(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--pairs", nargs="+", choices=plan.PAIRS, default=[p for p in plan.PAIRS if p != plan.TINY])
    parser.add_argument("--batches", nargs="+", type=int, default=list(plan.BATCHES))
    parser.add_argument("--sides", nargs="+", help="default: all")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--largest", action="store_true", help="only the largest batches that fit")
    kind.add_argument("--no-largest", action="store_true", help="only steps")
    parser.add_argument("--most", type=int, default=512, help="batch at which the search ends")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end by then")
    parser.add_argument("--cell-seconds", type=float, default=300.0, help="a process that takes longer has failed")
    parser.add_argument("--again", nargs="?", choices=["failed", "all"], const="all", help="measure these once more")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=7, help="that are timed")
    parser.add_argument("--profiled", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--import", nargs="+", type=Path, default=[], dest="imports", help="files with sides of yours")
    args = parser.parse_args()
    # The process of a cell is in a group of its own: leaving by an exception ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as work:
        try:
            session = Session(args, Path(work))
        except (Failed, OutOfTimeError) as error:
            raise SystemExit(f"nothing can be measured: {error}") from None
        args.sides = args.sides or list(session.about["sides"])
        if unknown := set(args.sides) - set(session.about["sides"]):
            parser.error(f"no such side: {', '.join(unknown)}; there are: {'; '.join(session.about['sides'])}")
        batches = [] if args.largest else args.batches
        batches = batches if args.no_largest else [*batches, 0]
        session.run(plan.order(args.pairs, batches, args.sides))


if __name__ == "__main__":
    main()
