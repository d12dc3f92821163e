"""What reading and tokenising rows costs: rows a second of one core, and memory as rows grow.

    python -m benchmarks.rows_scale
    python -m benchmarks.rows_scale --rows 100000 200000 1000000

Each size runs in a process of its own, with one thread, on a json-lines file of that many different rows of about 250
tokens, made of the quickstart's words. The ceiling is what the tokenizer alone does with the same prompts and answers,
without Python lists of its ids: both are measured in turn, and the ratio is the median of their ratios. Memory is that
of the process beyond what it had before the first row: its own, and with the pages of the mapped file, which the
system takes back when it needs them.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .command_line import command_line
from .rows import make_rows, write


def write_rows(path: Path, count: int) -> None:
    """A file of different rows of about 250 tokens with the Alpaca template."""
    from srd_fast.data.quickstart import make_quickstart_rows

    made = make_quickstart_rows(2000, seed=0)
    words = " ".join(f"{row['instruction']} {row['input']} {row['output']}" for row in made).split()
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as f:
        for _ in range(count):
            start = generator.randrange(len(words) - 130)
            some = words[start : start + 130]
            row = {"instruction": " ".join(some[:50]), "input": "", "output": " ".join(some[50:])}
            f.write(json.dumps(row) + "\n")


def memory(what: str) -> int:
    """Bytes of this process: VmRSS, VmHWM, RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def measure(path: Path, count: int, repeats: int) -> dict[str, float]:
    """Figures of one size, in this process; the time is that of the best of `repeats`."""
    from srd_fast.data import Tokenisation, prepare_dataset, read_source
    from srd_fast.models import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    tokenisation = Tokenisation(tokenizer, "alpaca", 512, 512)
    prepare_dataset([{"instruction": "a", "output": "b"}], tokenisation)
    own, before = memory("RssAnon"), memory("VmHWM")
    ours, alone, texts = [], [], None
    for _ in range(repeats):
        wall, began = time.perf_counter(), time.process_time()
        samples = prepare_dataset(read_source(path), tokenisation).dataset
        ours.append(time.process_time() - began)
        wall = time.perf_counter() - wall
        if texts is None:
            taken, peak = memory("RssAnon") - own, memory("VmHWM")
            some = samples.select(range(min(count, 5000)))
            texts = [text for row in some.to_list() for text in (row["prompt"], row["references"][0])]
        began = time.process_time()
        for start in range(0, len(texts), 2000):
            tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 2000], add_special_tokens=False)
        alone.append((time.process_time() - began) / len(some) * count)
    return {
        "rows_per_second": count / min(ours),
        "rows_per_second_of_the_tokenizer_alone": count / min(alone),
        "ratio": statistics.median(a / b for a, b in zip(ours, alone)),
        "wall_seconds": wall,
        "own_bytes": taken,
        "peak_bytes": peak - before,
        "peak_bytes_of_the_process": peak,
        "tokens": sum(map(len, some["input_ids"])) / len(some),
    }


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 20_000, 40_000])
    parser.add_argument("--repeats", type=int, default=3, help="times that each size is measured")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.rows[0], args.repeats)))
        return
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, count)
            command = [sys.executable, "-m", "benchmarks.rows_scale", "--one", str(path), "--rows", str(count)]
            command += ["--repeats", str(args.repeats)]
            environment = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"{count} rows: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
        packages = {"srd-fast": "srd-fast"}
        rows = make_rows("rows_scale", {"srd-fast": found}, case=f"{count} rows", shape="alpaca, json lines",
                         dtype="int32", packages=packages)  # fmt: skip
        write(rows, args.results)


if __name__ == "__main__":
    main()
