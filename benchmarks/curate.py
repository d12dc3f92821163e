"""Seconds and peak resident memory of `curate` and `plan.save` on a parquet file of synthetic scores.

    python -m benchmarks.curate [--rows 10000000] [--keep 0.75] [--method srd]

The rows have 16 hexadecimal characters as sample_id, a ROUGE-L of few values (ties), a cross-entropy, and in 1 of 200 a
reason. Each size runs in a process of its own that starts with nothing; its seconds leave out imports, its memory does
not; CPU seconds are those of all its threads. A tenth of the rows shows how they grow. Linux (VmHWM).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PART = 1_000_000


def write_scores(path: Path, rows: int) -> None:
    """A parquet file in the layout of reflections.parquet, without generations."""
    columns = {"sample_id": pa.string(), "rouge_l": pa.float64(), "cross_entropy": pa.float64(), "reason": pa.string()}
    schema, draw = pa.schema(columns), np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, PART):
            n = min(PART, rows - start)
            offsets = pa.py_buffer(np.arange(0, 16 * n + 1, 16, dtype=np.int32))
            ids = pa.StringArray.from_buffers(n, offsets, pa.py_buffer(draw.bytes(8 * n).hex().encode()))
            words = draw.integers(5, 60, n)
            rouge_l = draw.binomial(words, draw.beta(2, 3, n)) / words
            reason = pa.array(np.where(draw.random(n) < 0.005, "empty reference", None), pa.string())
            arrays = [ids, pa.array(rouge_l), pa.array(draw.gamma(4, 0.5, n)), reason]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def measure(scores: Path, keep: str, method: str) -> None:
    """Curate, save, and print what it took as JSON."""
    from srd_fast.curriculum import curate

    start, start_cpu = time.perf_counter(), time.process_time()
    plan = curate(scores, keep="knee" if keep == "knee" else float(keep), method=method)
    curated = time.perf_counter()
    plan.save(scores.with_name("plan.json"))
    end, cpu = time.perf_counter(), time.process_time() - start_cpu
    status = Path("/proc/self/status").read_text()
    figures = {
        "curate_seconds": curated - start,
        "save_seconds": end - curated,
        "seconds": end - start,
        "cpu_seconds": cpu,
        "peak_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024,
        "plan_bytes": scores.with_name("plan.json").stat().st_size,
    }
    print(json.dumps({"kept": plan.keep, "figures": figures}))


def report(rows: int, method: str, keep: str, kept: float, figures: dict[str, float], results: Path | None) -> None:
    """Print a line of the table; write its rows."""
    from .rows import make_rows, set_threads, write  # with torch, which is no part of the measured process

    set_threads()
    seconds = "{curate_seconds:.1f} + {save_seconds:.1f} = {seconds:.1f} | {cpu_seconds:.1f}".format(**figures)
    sizes = f"{figures['peak_bytes'] / 2**20:.0f} | {figures['plan_bytes'] / 2**20:.0f}"
    print(f"| {rows:,} | {seconds} | {sizes} | {kept:.3f} |", flush=True)
    options = {"case": f"{method}, keep {keep}", "shape": f"{rows} rows", "dtype": ""}
    write(make_rows("curate", {"srd-fast": figures}, packages={"srd-fast": "srd-fast"}, **options), results)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keep", default="0.75", help='a share, or "knee"')
    parser.add_argument("--method", default="srd")
    parser.add_argument("--results", type=Path, help="folder; default: benchmarks/results")
    parser.add_argument("--scores", type=Path, help=argparse.SUPPRESS)  # of the measured process
    args = parser.parse_args()
    if args.scores:
        measure(args.scores, args.keep, args.method)
        return
    print("| rows | seconds: curate + save | CPU seconds | peak resident MiB | plan.json MiB | kept |")
    print("|---|---|---|---|---|---|", flush=True)
    for rows in (args.rows // 10, args.rows):
        with tempfile.TemporaryDirectory() as folder:
            scores = Path(folder, "scores.parquet")
            write_scores(scores, rows)
            options = ["--scores", str(scores), "--keep", args.keep, "--method", args.method]
            command = [sys.executable, "-m", "benchmarks.curate", *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        report(rows, args.method, args.keep, found["kept"], found["figures"], args.results)


if __name__ == "__main__":
    main()
