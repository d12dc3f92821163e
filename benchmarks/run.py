"""Every benchmark one after the other, then the tables and figures from their rows.

    python -m benchmarks.run --quick                            # small sizes, under a quarter of an hour on two cores
    python -m benchmarks.run --data FOLDER/TRAIN.jsonl                        # all there is; hours
    python -m benchmarks.run --quick --only loss rivals

Rows go to runs/benchmarks (`--results`), tables to tables.md beside them, figures to its folder `figures`. What fails
is named at the end, with exit status 1, and stops nothing else. vLLM takes part where it is installed.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from .tables import OTHER_TABLES, TABLES, all_rows, render

# Arguments of each benchmark: of a full run, and of a quick one. DATA and FOLDER stand for the rows and their folder.
FULL = {
    "rivals": [""],
    "loss": ["--shapes smollm2 qwen2.5 llama3 gemma3"],
    "orders": ["--rows 1024"],
    "limits": [""],
    "scale": [""],
    "rows_scale": [""],
    "rouge": ["--data FOLDER"],
    "curate": [""],
    "stores": ["--data DATA"],
    "reflect": [
        "--data DATA --batch-sizes --processes 2",
        "--data DATA --rows 128 --groups 1 --batch-sizes 64 128 --processes 2",
    ],
    "train": [
        "--data DATA --learning-rate 1e-4",
        "--data DATA --memory",
        "--data DATA --trl --steps 12",
        "--data DATA --trl --memory",
        "--data DATA --variant kernel --steps 13",
        "--data DATA --variant packing --steps 13",
        "--data DATA --teacher-ratio 20 --steps 8 --dtype bfloat16",
    ],
    "on_policy": ["--data DATA --steps 10"],
    "evidence": ["--data FOLDER --sets llms_from_scratch --layers 15 --equal passes --seeds 0 1 2"],
}
QUICK = {
    "rivals": [""],
    "loss": ["--shapes smollm2 --dtypes bfloat16 --rows 128 --repeats 2 --losses jsd 'skew_reverse_kl + CE'"],
    "orders": ["--shapes tiny --rows 512 --dtypes float32 --repeats 2"],
    "limits": ["--limits 4 --shapes smollm2 --most 512 --providers srd-fast plain"],
    "scale": ["--dtype bfloat16 --repeats 2 --no-memory --samples 50 100 200"],
    "rows_scale": ["--rows 2000 4000"],
    "rouge": ["--pairs 2000 --processes-up-to 0"],
    "curate": ["--rows 200000"],
    "stores": ["--rows 128"],
    "reflect": ["--rows 8 --new-tokens 16 --groups 1 --batch-sizes 8"],
    "train": ["--rows 64 --steps 2", "--rows 64 --steps 2 --memory", "--rows 64 --steps 2 --trl"],
    "on_policy": ["--rows 8 --steps 3 --batch 4 --new-tokens 8"],
    "evidence": [
        "--sets quickstart --layers 8 --teachers 'as it is' --equal passes --seeds 0 --cells 'full KD' SRD "
        "--rows 48 --validation-rows 12 --steps 6 --warmup-steps 2 --new-tokens 16 --sampling-seeds 10",
    ],
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, the quickstart's rows")
    parser.add_argument("--data", type=Path, help="training rows, json lines; needed without --quick")
    parser.add_argument("--only", nargs="+", choices=list(FULL), default=list(FULL))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    if not args.quick and not args.data:
        parser.error("give --data, or --quick")
    folder = args.results.resolve()
    stand_for = {"DATA": args.data, "FOLDER": args.data and args.data.parent}
    failed, began = [], time.monotonic()
    for name in args.only:
        for given in (QUICK if args.quick else FULL)[name]:
            options = [str(stand_for.get(x) or x) for x in shlex.split(given)]
            command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--results", str(folder)]
            print(f"\n[{time.monotonic() - began:.0f} s] python -m benchmarks.{name} {given}", flush=True)
            if subprocess.run(command, check=False).returncode:
                failed.append(f"{name} {given}")
    template = "\n".join(f"## {x}\n\n<!-- table: {x} -->\n<!-- end -->\n" for x in {**TABLES, **OTHER_TABLES})
    tables = folder / "tables.md"
    tables.write_text(render(template, all_rows(folder)), encoding="utf-8")
    figures = [sys.executable, "-m", "benchmarks.plot", "--results", str(folder), "--figures", str(folder / "figures")]
    subprocess.run(figures, check=True)
    print(f"\n{tables} and {folder / 'figures'}, {time.monotonic() - began:.0f} s")
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
