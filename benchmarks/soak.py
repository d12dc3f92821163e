"""Does anything grow? Training from the teacher's cache for half an hour, its memory and handles read meanwhile.

    python -m benchmarks.soak                                     # 30 minutes, the quickstart's pair and data
    python -m benchmarks.soak --minutes 5 --data TRAIN.jsonl
    MALLOC_MMAP_THRESHOLD_=131072 python -m benchmarks.soak       # what is freed goes back at once: what is live alone

The real command: `srd-fast cache`, then `srd-fast distill` with checkpoints and validation as in the quickstart, until
SIGTERM when the time is over (exit status 143, a checkpoint saved). Resident memory, file handles and threads come
from /proc, every two seconds; the first fifth of the time, in which buffers reach their size and the first checkpoints
are pruned, is not counted. Printed and written: medians of the first and of the last third of what is left, the slope
of a line through all of it, and the most handles.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from .command_line import command_line
from .rows import make_rows, set_threads, write

CONFIG = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
EVERY, WARM_UP = 2.0, 0.2


def command(verb: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """`srd-fast VERB` with epochs without end, in small batches for many steps."""
    given = {
        "output_dir": folder, "data": args.data, "max_rows": args.max_rows, "curate.method": "random",
        "distill.epochs_per_stage": 100_000, "distill.per_device_train_batch_size": 2, "dtype": args.dtype,
    }  # fmt: skip
    return [sys.executable, "-m", "srd_fast.cli", verb, str(CONFIG), *(f"{k}={v}" for k, v in given.items())]


def sample(pid: int) -> tuple[float, int, int]:
    """Resident MB, file handles and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) / 1000, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def watch(args: argparse.Namespace, folder: Path) -> tuple[list[tuple[float, float, int, int]], int]:
    """(seconds since training began, MB, handles, threads) until the time is over; steps done."""
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    with (folder / "soak.log").open("w") as log:
        process = subprocess.Popen(command("distill", folder, args), stdout=log, stderr=subprocess.STDOUT)
        while not metrics.is_file():
            if process.poll() is not None:
                raise SystemExit(f"training ended with {process.returncode}: {folder / 'soak.log'}")
            time.sleep(0.5)
        began, found = time.monotonic(), list[tuple[float, float, int, int]]()
        while (now := time.monotonic() - began) < 60 * args.minutes:
            if process.poll() is not None:
                raise SystemExit(f"training ended with {process.returncode}: {folder / 'soak.log'}")
            found.append((now, *sample(process.pid)))
            time.sleep(EVERY)
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status != 128 + signal.SIGTERM:
        raise SystemExit(f"training ended with {status} instead of {128 + signal.SIGTERM}: {folder / 'soak.log'}")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return found, max(line["step"] for line in lines if line["kind"] == "train")


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--data", default="quickstart")
    parser.add_argument("--max-rows", type=int, default=192)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    set_threads()
    shutil.rmtree(args.output_dir / "checkpoints", ignore_errors=True)
    for verb in ("prepare", "reflect", "curate", "cache"):  # done before: skipped
        subprocess.run(command(verb, args.output_dir, args), check=True)
    found, steps = watch(args, args.output_dir)
    seconds, memory, handles, threads = (np.array(x) for x in zip(*(f for f in found if f[0] > WARM_UP * found[-1][0])))
    third = len(seconds) // 3
    slope = float(np.polyfit(seconds / 3600, memory, 1)[0])
    figures = {
        "minutes": found[-1][0] / 60, "steps": steps,
        "first_mb": statistics.median(memory[:third]), "last_mb": statistics.median(memory[-third:]),
        "mb_per_hour": slope, "peak_mb": float(max(f[1] for f in found)),
        "first_handles": statistics.median(handles[:third]), "last_handles": statistics.median(handles[-third:]),
        "most_handles": int(handles.max()), "most_threads": int(threads.max()),
    }  # fmt: skip
    print(", ".join(f"{k} {v:,.1f}" for k, v in figures.items()))
    shape = f"{Path(args.data).stem}, {args.max_rows} rows"
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    case = f"{args.minutes:g} minutes" + (f", MALLOC_MMAP_THRESHOLD_={threshold}" if threshold else "")
    options = {"case": case, "shape": shape, "dtype": args.dtype}
    write(make_rows("soak", {"srd-fast": figures}, packages={"srd-fast": "srd-fast"}, **options), args.results)


if __name__ == "__main__":
    main()
