"""One task of `benchmarks.evidence` in a process of its own, through the library's own steps of a run.

    python -m benchmarks.evidence_cell '{"do": "cell", ...}' ANSWER.json

teacher fine-tunes the teacher (`srd-fast sft`). base makes what cells share: data, start, reflections and the whole of
the teacher's cache. cell begins from a base (links to its files) and does the rest of `srd-fast run`. Stopped or
killed, the same task goes on.
"""

import argparse
import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from srd_fast import evaluate
from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.files import write_text
from srd_fast.models import load_model
from srd_fast.reflection import Sampling
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.ledger import Ledger
from srd_fast.run.modes import answers_anew, fine_tuning, mode_of
from srd_fast.run.pipeline import begin_from, execute, fingerprints, steps_of
from srd_fast.run.steps import Run, adopt_evaluations
from srd_fast.run.stopping import Stopped, stoppable

from .rows import set_threads

BATCH = 16
MEASURES = ("kl", "cross_entropy", "rouge_l")
# Where the best checkpoint is kept: how often students are looked at, and on how many validation rows they answer.
EVALUATIONS, ANSWERED = 8, 64


def config_of(task: dict[str, Any], *more: str) -> RunConfig:
    """The config of a task's run."""
    given = {
        "teacher": task["teacher"], "student": "prune", "data": task["data"], "validation": task["validation"][0],
        "output_dir": task["folder"], "seed": task["seed"], "device": task["device"], "dtype": "bfloat16",
        "init_student.layers": task["layers"], "init_student.warmup_steps": task["warmup_steps"],
        "reflect.max_new_tokens": task["new_tokens"], "evaluate.max_new_tokens": task["new_tokens"],
        "reflect.engine": "transformers", "reflect.batch_size": 64, "evaluate.batch_size": 64,
        "distill.learning_rate": task["learning_rate"],
        "distill.per_device_train_batch_size": BATCH, "distill.save_strategy": "no", "distill.eval_strategy": "no",
        "distill.save_steps": 100_000, "evaluate.metrics": task["metrics"],
    }  # fmt: skip
    if not any(o.startswith("mode=") for o in task["overrides"]):  # a mode has its own
        given["distill.divergence"] = "forward_kl"
    if task["best"]:
        given |= best_checkpoint(task)
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    config = load_run_config(None, [*overrides, *task["overrides"], *more])
    if answers_anew(config):
        more = (*more, f"distill.max_new_tokens={task['new_tokens']}")
        config = load_run_config(None, [*overrides, *task["overrides"], *more])
    return config


def best_checkpoint(task: dict[str, Any]) -> dict[str, Any]:
    """Settings by which a training ends with its best student as the paper picks it: by answers sampled at T = 1.

    Weights alone are saved, of a new best; a training that is stopped saves all that it needs to go on.
    """
    every = max(1, task["steps"] // EVALUATIONS)
    settings = {
        "eval_strategy": "steps", "eval_steps": every, "eval_generate": True, "eval_metrics": [task["best"]],
        "eval_temperature": 1.0, "eval_max_new_tokens": task["new_tokens"], "eval_generate_rows": ANSWERED,
        "per_device_eval_batch_size": ANSWERED, "load_best_model_at_end": True, "metric_for_best_model": task["best"],
        "save_strategy": "steps", "save_steps": 1000 * every, "save_total_limit": 1, "save_only_model": True,
    }  # fmt: skip
    return {f"distill.{key}": value for key, value in settings.items()}


def epochs_of(plan: CurriculumPlan, steps: int) -> list[float]:
    """Passes over each stage's samples that come to its share of the steps: stage k of n has k of 1 + ... + n parts."""
    count = len(plan.subset_columns)
    borders = [round(steps * k * (k + 1) / (count * (count + 1))) for k in range(count + 1)]
    sizes = [sum(map(len, plan.subset_columns[: k + 1])) for k in range(count)]
    return [(b - a) * BATCH / size for (a, b), size in zip(pairwise(borders), sizes)]


def make_teacher(task: dict[str, Any]) -> dict[str, Any]:
    """A teacher fine-tuned on the task."""
    config = config_of(task, f"distill.epochs_per_stage={task['teacher_epochs']}", "distill.learning_rate=1e-4")
    folder = execute(fine_tuning(config, "teacher", task["folder"]))
    return {"teacher": str(folder / "student")}


def make_base(task: dict[str, Any]) -> dict[str, Any]:
    """Data, start, reflections and the teacher's cache of all rows."""
    config = config_of(task, "curate.method=none", "curate.stages=1")
    for step in ("prepare", "reflect", "curate", "cache"):
        execute(config, only=step)
    return {"base": task["folder"]}


def make_cell(task: dict[str, Any]) -> dict[str, Any]:
    """A student, and its figures."""
    config = config_of(task)
    begin_from(Path(task["base"]), config)
    folder = Path(task["folder"])
    if Ledger(folder).entries.get("init-student", {}).get("fingerprint") != fingerprints(config)["init-student"]:
        raise UserError(f"{task['base']} was made with other settings than this cell has: move it away, or give them")
    answers = mode_of(config).makes_answers
    cache = folder / "teacher_cache"
    if answers and cache.is_symlink():  # the base's, without rows of these answers, and not for other cells to carry
        cache.unlink()
    linked = (folder / "reflections.parquet").is_symlink()
    for step in [x.name for x in steps_of(config) if x.name in ("reflect", "curate", "answers")]:
        if step != "reflect" or not linked:
            execute(config, only=step)
    plan = folder / "answers" / "plan.json" if answers else folder / "plan.json"
    passes = epochs_of(CurriculumPlan.load(plan), task["steps"])
    config = config_of(task, f"distill.epochs_per_stage={json.dumps(passes)}")
    energy = _joules(task["device"]) if task["alone"] else None
    execute(config)
    adopt_evaluations(folder, Path(task["base"]))  # of teacher and start, for the cells to come
    spent = None if energy is None else (_joules(task["device"]) or energy) - energy
    return {**_figures(folder, task), **_sampled(config, task), **({} if spent is None else {"joules": spent})}


def _figures(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = list({x["step"]: x for x in lines if x["kind"] == "train"}.values())
    assert len(steps) == task["steps"], f"{folder}: {len(steps)} steps instead of {task['steps']}"
    ledger = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    of_base = json.loads((Path(task["base"]) / "steps.json").read_text(encoding="utf-8"))
    cache, cached = folder / "teacher_cache", dict[str, float]()
    if cache.is_dir():
        files = [p for p in cache.resolve().rglob("*") if p.is_file() and "head" not in p.name]
        of = of_base if cache.is_symlink() else ledger
        cached = {"cache_seconds": of["cache"]["seconds"], "cache_bytes": sum(p.stat().st_size for p in files)}
    rows, measures = evaluation["student"]["rows"], (*MEASURES, *task["metrics"])
    apart = [b["seconds"] - a["seconds"] for a, b in pairwise(steps) if b["seconds"] > a["seconds"]]
    return {
        **{m: evaluation["student"][m] for m in measures},
        **{f"start_{m}": evaluation["start"][m] for m in measures},
        **{f"teacher_{m}": evaluation["teacher"][m] for m in measures if m != "kl"},
        **({"best_step": summary["best"]["step"]} if task["best"] else {}),
        "step_seconds": statistics.median(apart),
        "train_seconds": sum(ledger[name]["seconds"] for name in ("answers", "distill") if name in ledger),
        **({"reflect_seconds": ledger["reflect"]["seconds"]} if "reflect" in ledger else {}),
        **cached,
        "peak_memory_mb": summary["training"]["peak_memory_mb"],
        "rows": {name: [x if x is None else _short(x) for x in rows[name]] for name in (*measures, "num_tokens")},
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _sampled(config: RunConfig, task: dict[str, Any]) -> dict[str, Any]:
    """ROUGE-L of answers sampled at temperature 1, mean over seeds, as the paper has it, on every validation set."""
    folder, found = Path(task["folder"]), dict[str, float]()
    run = Run(config, folder, {}, {})
    for file in task["validation"] if task["sampling_seeds"] else ():
        result = evaluate(
            load_model(str(folder / "student"), run.dtype, run.device),
            [json.loads(x) for x in Path(file).read_text(encoding="utf-8").splitlines()],
            run.tokenizer,
            sampling=Sampling(max_new_tokens=task["new_tokens"], temperature=1.0),
            seeds=task["sampling_seeds"],
            batch_size=64,
            progress=False,
        )
        found[f"sampled_rouge_l@{Path(file).stem}"] = _short(result["rouge_l"])
    return found


def _joules(device: str) -> float | None:
    """What the GPU has used since its driver was loaded; None where nothing says it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 if device == "cuda" else None
    except Exception:  # the package, the driver or the sensor is missing, each with an error of its own
        return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=json.loads, metavar="TASK", help="JSON, as benchmarks.evidence makes it")
    parser.add_argument("answer", type=Path, metavar="ANSWER", help="file for what was made")
    args = parser.parse_args()
    task = args.task
    set_threads()
    try:
        with stoppable():
            made = {"teacher": make_teacher, "base": make_base, "cell": make_cell}[task["do"]](task)
    except Stopped as e:
        sys.exit(e.status)
    except UserError as e:
        sys.exit(str(e))
    write_text(args.answer, json.dumps(made))


if __name__ == "__main__":
    main()
