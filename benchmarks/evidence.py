"""Does a curriculum help? Whole runs of a grid of cells and seeds, each beside its controls.

    python -m benchmarks.evidence --data DIR --results OUT --seconds 10800     # call again: it goes on
    python -m benchmarks.evidence --data DIR --results OUT --seconds 840 --device cuda --parallel 6
    python -m benchmarks.evidence --data DIR --results OUT --cells 'full KD' SRD --seeds 0 1 2   # of these alone

DIR holds json lines named as in `evidence_grid.DATA`; what is missing is left out. SmolLM2-135M-Instruct, as it is or
fine-tuned on the task first, is distilled into 15 or 8 of its layers. The most telling cells come first, seed after
seed. Cells of one seed share data, start, reflections and the teacher's cache (`evidence_cell`).

A finished cell is a line of OUT/evidence.jsonl, with its measures on every validation row, and is not done again. One
that the end of the time cuts off goes on in the next call. Then come OUT/evidence.csv, the rows that tables and figures
are made from, OUT/evidence.md and OUT/evidence.svg. Equal passes are as many steps of 16 samples for all; equal seconds
are those of full KD's training, less the reflection for cells that hang on it.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from srd_fast.data.quickstart import make_quickstart_splits
from srd_fast.files import write_text

from . import evidence_table
from .child import Process, end, start
from .evidence_grid import (
    AS_IT_IS,
    CELLS,
    DATA,
    EQUAL,
    FULL,
    LAYERS,
    QUICKSTART_ROWS,
    REFLECTING,
    SECONDS,
    TEACHERS,
    Cell,
    Setting,
    cells,
)
from .evidence_table import MEASURES
from .gpu_session import importable
from .rows import device_name, set_threads, version_of

SMOLLM2 = "smollm2-135m-instruct"
# To save what is under way, to write tables and to leave.
LAST_SECONDS = 45.0
# Of three stages, in ratio 1 : 2 : 3.
LEAST_STEPS = 6
# No task begins with less left.
LEAST_SECONDS = 30.0
# Options of which figures depend, besides the number of steps.
OPTIONS = (
    "teacher",
    "rows",
    "validation_rows",
    "new_tokens",
    "warmup_steps",
    "learning_rate",
    "teacher_epochs",
    "best",
    "set",
)


class Running(NamedTuple):
    """A task under way."""

    name: str
    task: dict[str, Any]
    cell: Cell
    process: Process
    began: float


class Evidence:
    """The grid, and what is there of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.results.resolve()
        self.end = time.monotonic() + args.seconds - LAST_SECONDS
        self.out.mkdir(parents=True, exist_ok=True)
        self.lines = self.out / "evidence.jsonl"
        self.failed: set[str] = set()
        options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) not in (None, [])}
        self.here = {
            "device": device_name(args.device), "threads": set_threads(), "torch": torch.__version__,
            "version": version_of("srd-fast"), "steps": args.steps, "options": json.dumps(options),
        }  # fmt: skip
        self.done = self.known()
        self.files = {name: x for name in args.sets if (x := self.rows_of(name))}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def rows_of(self, name: str) -> list[str]:
        """The files of a data set, training rows first, made in OUT/data; none where one is not there."""
        given, folder = DATA[name], self.out / "data"
        names = [given.train, *given.validation]
        if not given.train:
            splits = make_quickstart_splits(self.args.rows or QUICKSTART_ROWS, given.held_out, 0)
            names = ["quickstart", "quickstart_held_out"]
        else:
            sources = [Path(self.args.data or "") / f"{x}.jsonl" for x in names]
            if missing := [x.name for x in sources if not x.is_file()]:
                print(f"{name}: left out, {self.args.data or 'no --data'} has no {', '.join(missing)}")
                return []
            splits = tuple([json.loads(x) for x in f.read_text("utf-8").splitlines()] for f in sources)
            if given.held_out:
                splits = splits[0][: -given.held_out], splits[0][-given.held_out :]
                names.append(f"{given.train}_held_out")
        train, *held_out = splits
        train = train[: self.args.rows]
        if given.wrong:
            train, names[0] = with_wrong_answers(train, given.wrong), f"{names[0]}_wrong"
        folder.mkdir(exist_ok=True)
        found = [folder / f"{x}.jsonl" for x in names]
        for file, rows in zip(found, [train, *(x[: self.args.validation_rows] for x in held_out)]):
            write_text(file, "".join(json.dumps(x) + "\n" for x in rows))
        return [str(file) for file in found]

    def key(self, cell: Cell) -> dict[str, Any]:
        """What identifies a line, besides its figures."""
        return {**cell.setting._asdict(), "cell": cell.name, "seed": cell.seed, "equal": cell.equal, **self.here}

    def known(self) -> dict[Cell, dict[str, Any]]:
        """The lines of this device and these options."""
        found = {}
        for line in evidence_table.read_lines(self.lines):
            if all(line.get(name) == value for name, value in self.here.items() if name not in ("torch", "version")):
                setting = Setting(line["data"], line["layers"], line["teacher"])
                found[Cell(setting, line["cell"], line["seed"], line["equal"])] = line
        return found

    def task(self, cell: Cell) -> tuple[str, dict[str, Any]] | None:
        """The name of what is to be done next for a cell, and the task; None where it waits for another's."""
        setting, args = cell.setting, self.args
        place = self.out / "runs" / "".join(c if c.isalnum() else "_" for c in "-".join(map(str, setting)))
        train, *validation = self.files[setting.data]
        common = {
            "data": train, "validation": validation, "seed": cell.seed, "layers": setting.layers, "overrides": args.set,
            "warmup_steps": args.warmup_steps, "new_tokens": args.new_tokens or DATA[setting.data].new_tokens,
            "learning_rate": args.learning_rate, "device": args.device, "teacher": args.teacher, "best": None,
            "metrics": DATA[setting.data].metrics,
        }  # fmt: skip
        if setting.teacher != AS_IT_IS:
            of_data = "".join(c if c.isalnum() else "_" for c in setting.data)
            folder = self.out / "runs" / f"teacher-{of_data}"
            if not (folder / "answer.json").is_file():
                own = {**common, "seed": 0, "folder": str(folder), "teacher_epochs": args.teacher_epochs}
                return folder.name, {"do": "teacher", **own}
            common["teacher"] = json.loads((folder / "answer.json").read_text("utf-8"))["teacher"]
        base = place / f"base-{cell.seed}"
        if not (base / "answer.json").is_file():
            return f"{place.name}/{base.name}", {"do": "base", **common, "folder": str(base)}
        steps = args.steps
        if cell.equal == SECONDS:
            own, full = (self.done.get(Cell(setting, name, cell.seed)) for name in (cell.name, FULL))
            if own is None or full is None:
                return None
            extra = own["reflect_seconds"] if cell.name in REFLECTING else 0.0
            steps = max(LEAST_STEPS, round((args.steps * full["step_seconds"] - extra) / own["step_seconds"]))
        own_task = {
            **common, "do": "cell", "folder": str(place / cell.slug), "base": str(base), "steps": steps,
            "overrides": [*CELLS[cell.name], *args.set], "sampling_seeds": args.sampling_seeds,
            "best": args.best, "alone": args.parallel == 1,
        }  # fmt: skip
        return f"{place.name}/{cell.slug}", own_task

    def begin(self, name: str, task: dict[str, Any], cell: Cell) -> "Running":
        """One task in a process of its own."""
        folder = Path(task["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "answer.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.evidence_cell", json.dumps(task), str(folder / "answer.json")]
        return Running(name, task, cell, start(command, folder / "log.txt"), time.monotonic())

    def finish(self, of: "Running") -> None:
        """Look at an ended process; a cell's figures become a line, and its models go."""
        folder, seconds = Path(of.task["folder"]), time.monotonic() - of.began
        if of.process.returncode:
            self.failed.add(of.name)
            log = folder / "log.txt"
            last = log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
            print(f"{of.name}: failed after {seconds:.0f} s, see {log}: {' '.join(last)[:300]}", flush=True)
            return
        if of.task["do"] != "cell":
            print(f"{of.name}: done in {seconds:.0f} s", flush=True)
            return
        found = json.loads((folder / "answer.json").read_text("utf-8"))
        line = {
            **self.key(of.cell), "trained_steps": of.task["steps"], "seconds": round(seconds, 1),
            "date": time.strftime("%Y-%m-%d"), **found,
        }  # fmt: skip
        with self.lines.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        self.done[of.cell] = line
        for heavy in ("student", "checkpoints"):
            shutil.rmtree(folder / heavy, ignore_errors=True)
        said = ", ".join(f"{m} {found[m]:.4g}" for m in (*MEASURES, "best_step") if m in found)
        print(f"{of.name}: {said}; {seconds:.0f} s", flush=True)

    def next(self, grid: list[Cell], busy: set[str]) -> tuple[str, dict[str, Any], Cell] | None:
        """The most telling task that can be done now."""
        for cell in grid:
            found = None if cell in self.done else self.task(cell)
            if found is not None and found[0] not in self.failed | busy:
                return *found, cell
        return None

    def run(self) -> None:
        """As many tasks side by side as wanted, the most telling first, until all are done or the time is up."""
        args, running = self.args, list[Running]()
        settings = [Setting(d, n, t) for t in args.teachers for n in args.layers for d in self.files]
        grid = cells(settings, args.cells, args.seeds, args.equal)
        try:
            while self.left > 0:
                while len(running) < args.parallel and self.left > LEAST_SECONDS:
                    found = self.next(grid, {x.name for x in running})
                    if found is None:
                        break
                    running.append(self.begin(*found))
                if not running:
                    break
                time.sleep(0.5)
                for ended in [x for x in running if x.process.poll() is not None]:
                    running.remove(ended)
                    self.finish(ended)
        finally:
            end([x.process for x in running], LAST_SECONDS - 10)
        for cut_off in running:
            print(f"{cut_off.name}: ended, its time was up; the next call goes on", flush=True)
        print(f"\n{len(self.done.keys() & {*grid})} of {len(grid)} cells, {len(self.failed)} tasks failed", flush=True)


def with_wrong_answers(rows: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """Rows of which a share, drawn by chance, have each other's answers."""
    made = list(rows)
    chosen = random.Random(0).sample(range(len(rows)), round(share * len(rows)))
    for i, j in zip(chosen, chosen[1:] + chosen[:1]):
        made[i] = {**rows[i], "output": rows[j]["output"]}
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of json lines")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="everything has ended by then")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parallel", type=int, default=1, help="cells side by side on one device")
    parser.add_argument("--sets", nargs="+", choices=list(DATA), default=[x for x in DATA if DATA[x].train])
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS), help="of the student")
    parser.add_argument("--teacher", default=SMOLLM2, help="a folder or hub id of another one")
    parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--equal", nargs="+", choices=EQUAL, default=list(EQUAL))
    parser.add_argument("--steps", type=int, default=160, help="of 16 samples")
    parser.add_argument("--rows", type=int, help="of the training rows")
    parser.add_argument("--validation-rows", type=int, help="of each validation file")
    parser.add_argument("--new-tokens", type=int, help="of an answer; default: as fits the data")
    parser.add_argument("--warmup-steps", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--teacher-epochs", type=float, default=3, help="of a teacher that is fine-tuned")
    parser.add_argument(
        "--sampling-seeds", nargs="*", type=int, default=[10, 20, 30, 40, 50], help="none: greedy alone"
    )
    parser.add_argument(
        "--best",
        choices=["rouge_l"],
        help="end with the best checkpoint by this, of answers sampled at T = 1, not the last",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="more of each run's configuration")
    parser.add_argument("--table", action="store_true", help="write the table and the figure again, and train nothing")
    args = parser.parse_args()
    if args.data is None and not args.table and any(DATA[x].train for x in args.sets):
        parser.error("give --data, or --sets quickstart")
    if args.steps < LEAST_STEPS:
        parser.error(
            f"--steps is {args.steps}, and three stages with steps in ratio 1 : 2 : 3 have {LEAST_STEPS} at least"
        )
    # Whoever ends this process ends what runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not args.table:
        with importable():
            Evidence(args).run()
    print(evidence_table.write_all(args.results.resolve()))


if __name__ == "__main__":
    main()
