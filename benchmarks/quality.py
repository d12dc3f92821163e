"""What the student is worth: plain distillation, SE-KD, SE-KD3X, SRD, both, and controls, at as many optimizer steps.

    python -m benchmarks.quality --data TRAIN.jsonl --validation DEV.jsonl --output-dir runs/quality

SmolLM2-135M-Instruct to 15 of its layers, warmed up, forward KL, each seed with its own warm-up, reflections and order.
Every training is `srd-fast distill` in a process of its own, and within a seed they follow one another. A seed's run
folders start as copies of one, so that all begin from the same student; stopped, the same command goes on, and seeds
run side by side before (`--seeds 1 & ... --seeds 2`) are only read.

Printed and written for each method, means over seeds and their standard deviations: on held-out rows KL to the teacher,
cross-entropy (nats per token) and ROUGE-L. Of the first seed, which must have run alone: seconds of a training step
(median), of all of them and of filling the cache (which `learnable` fills while it scores); peak resident memory of the
training process; bytes of the teacher's cache.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from .rows import RESULTS, make_rows, set_threads, write

BATCH = 16
# What is averaged over seeds; the rest is cost.
WORTH = ("kl", "cross_entropy", "rouge_l", "start_kl", "start_rouge_l")
# Overrides of the run's configuration; "passes" is how many sample passes one epoch of each stage comes to, of N rows.
METHODS: dict[str, list[str]] = {
    "full KD": ["preset=SE-KD", "distill.position_selection=all"],
    "SE-KD": ["preset=SE-KD"],
    "SE-KD3X": ["preset=SE-KD3X"],
    "SE-KD3X, 64 draws stored": ["preset=SE-KD3X", "distill.class_sampling=0", "cache.kind=sampled", "cache.k=64"],
    "SRD": ["preset=paper"],
    "SRD + SE-KD": ["preset=paper", "distill.position_selection=topk_student_entropy", "distill.position_ratio=0.2"],
    "random 75 %, random stages": ["preset=paper", "curate.method=random"],
    "learnable": ["preset=learnable"],
}


def common(args: argparse.Namespace, seed: int, folder: Path) -> list[str]:
    """What all methods share."""
    given = {
        "teacher": args.teacher, "student": "prune", "data": args.data, "validation": args.validation,
        "output_dir": folder, "seed": seed, "max_rows": args.max_rows, "dtype": args.dtype,
        "init_student.layers": args.layers,
        "init_student.warmup_steps": args.warmup_steps,
        "reflect.max_new_tokens": 64, "evaluate.max_new_tokens": 64, "distill.divergence": "forward_kl",
        "distill.learning_rate": 4e-4, "distill.save_strategy": "no", "distill.eval_strategy": "no",
        "distill.per_device_train_batch_size": BATCH, "distill.max_steps": args.steps,
    }  # fmt: skip
    return [*(f"{key}={value}" for key, value in given.items() if value is not None), *args.set]


def srd_fast(verb: str, config: Path, overrides: list[str]) -> None:
    """One command of the library, in its own process."""
    command = [sys.executable, "-m", "srd_fast.cli", verb, str(config), *overrides]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}")


def epochs(args: argparse.Namespace, folder: Path) -> list[str]:
    """Passes over each stage's samples that come to the number of steps."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    sizes = [len(subset) for subset in plan["subsets"]]
    passes = sum(sum(sizes[: k + 1]) for k in range(len(sizes)))
    # A little more than the steps need: stages end on whole batches, and max_steps has the last word.
    return [f"distill.epochs_per_stage={(args.steps + 1) * BATCH / passes:.6f}"]


def measure(args: argparse.Namespace, method: str, seed: int, base: Path, config: Path) -> dict[str, float]:
    """Train one student and read its figures from the run folder."""
    name = "".join(c if c.isalnum() else "_" for c in method)
    folder = args.output_dir / f"{name}-{seed}"
    overrides = [*common(args, seed, folder), *METHODS[method]]
    if not (folder / "summary.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        for verb in ("reflect", "curate"):  # reflections are the base's, but for signals of the method's own
            srd_fast(verb, config, overrides)
        more = epochs(args, folder)
        for verb in ("cache", "distill", "evaluate"):
            srd_fast(verb, config, [*overrides, *more])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.copy(folder / "evaluation.json", base)  # teacher and start are evaluated once a seed
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = summary["evaluation"]["student"]
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [x for x in lines if x["kind"] == "train"]
    assert len(steps) == args.steps, f"{folder}: {len(steps)} steps instead of {args.steps}"
    cache = sum(p.stat().st_size for p in (folder / "teacher_cache").rglob("*") if p.is_file())
    head = sum(p.stat().st_size for p in (folder / "teacher_cache").rglob("head*") if p.is_file())
    return {
        "kl": found["kl"],
        "cross_entropy": found["cross_entropy"],
        "rouge_l": found["rouge_l"],
        "training_seconds": steps[-1]["seconds"] - steps[0]["seconds"],
        "step_seconds": statistics.median(b["seconds"] - a["seconds"] for a, b in pairwise(steps)),
        "cache_seconds": summary["timings"]["cache"],
        "peak_memory_mb": summary["training"]["peak_memory_mb"],
        "cache_bytes": cache - head,
        "head_bytes": head,
        "start_kl": summary["evaluation"]["start"]["kl"],
        "start_rouge_l": summary["evaluation"]["start"]["rouge_l"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="quickstart", help="training rows; default: the quickstart's")
    parser.add_argument("--validation", default="64", help="held-out rows: a file, or how many")
    parser.add_argument("--max-rows", type=int, help="of the training rows")
    parser.add_argument("--teacher", default="smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--warmup-steps", type=int, default=25)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="more of the run's configuration")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    set_threads()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    config = args.output_dir / "empty.yaml"
    config.write_text("{}\n", encoding="utf-8")
    found: dict[str, list[dict[str, float]]] = {m: [] for m in args.methods}
    for seed in args.seeds:
        base = args.output_dir / f"base-{seed}"
        for verb in ("prepare", "reflect"):
            srd_fast(verb, config, common(args, seed, base))
        for method in args.methods:
            found[method].append(measure(args, method, seed, base, config))
            last = found[method][-1]
            print(f"seed {seed}, {method}: " + ", ".join(f"{k} {v:.4g}" for k, v in last.items()), flush=True)
    figures: dict[str, dict[str, float]] = {}
    for method, runs in found.items():
        mean = {k: statistics.fmean(r[k] for r in runs) for k in WORTH}
        sd = {f"{k}_sd": statistics.stdev(r[k] for r in runs) for k in WORTH} if len(runs) > 1 else {}
        figures[method] = runs[0] | mean | sd
    case = f"{args.steps} steps, {len(args.seeds)} seeds"
    shape = f"{Path(args.data).stem}, {args.layers} layers"
    packages = dict.fromkeys(figures, "srd-fast")
    write(make_rows("quality", figures, case=case, shape=shape, dtype=args.dtype, packages=packages), args.results)


if __name__ == "__main__":
    main()
