"""The results of a run: evaluate, report."""

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from transformers import PreTrainedModel

from ...curriculum import CurriculumPlan
from ...data import DistillationCollator, teachers_samples
from ...files import content_digest, write_text
from ...models import decoder_start, load_model
from ...reflection import Sampling
from ...reflection.signals import signal_files
from ...report import controls_json, write_report
from ...teacher import LiveTeacher, PrivilegedTeacher, TeacherCache, TeacherSource
from ...training.evaluation import evaluate
from ..config import RunConfig
from ..modes import mode_of
from .answers import answer_counts, answered_again
from .cache import validation_cache
from .data import COUNTS
from .run import PRUNE, Run, json_text


def evaluate_inputs(config: RunConfig) -> Any:
    """What an evaluation depends on, besides the model: its settings, those of ROUGE, and the dtype."""
    settings = config.evaluate.model_dump()
    if not settings["metrics"]:  # so that evaluations from before this field stay valid
        del settings["metrics"]
    own = [content_digest(file) for file in signal_files(config.evaluate.metrics)]
    return [settings, config.reflect.rouge_tokenizer, config.dtype, *own]


def evaluate_step(run: Run) -> None:
    """Compare teacher, starting student and distilled student, and write the run's figures to summary.json."""
    config = run.config
    rejected = json.loads((run.folder / "data" / "rejected.json").read_text(encoding="utf-8"))
    file = run.folder / "data" / COUNTS  # runs of older versions have none
    counts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    summary = {
        "srd_fast_version": importlib.metadata.version("srd-fast"),
        "teacher": config.teacher,
        "student": config.student if config.student != PRUNE else f"{config.teacher}, pruned",
        "mode": config.mode,
        "divergence": run.args.divergence if mode_of(config).teacher else "none: cross-entropy",
        "data": {
            "train": len(run.data("train")),
            "validation": len(run.data("validation")),
            "rejected": len(rejected),
            **{name: count for name, count in counts.items() if count},
        },
        **({"answers": answers} if (answers := answer_counts(run)) else {}),
        "evaluation": _evaluations(run),
        "timings": {name: entry["seconds"] for name, entry in run.ledger.items() if "seconds" in entry},
        "training": _training_figures(run),
        **({"best": best} if (best := _best_step(run)) else {}),
        "stages": _stages(run) or answered_again(run),
        "environment": {
            "device": str(run.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(run.dtype).removeprefix("torch."),
        },
    }
    write_text(run.folder / "summary.json", json_text(summary))


def _evaluations(run: Run) -> dict[str, Any]:
    """Results by model. evaluation.json has a key of what each depends on, so that only changed ones are made again."""
    path = run.folder / "evaluation.json"
    try:
        kept: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError):
        kept = {}
    models = {
        "teacher": ("prepare", run.config.teacher),
        "start": ("init-student", run.start),
        "student": ("distill", str(run.folder / "student")),
    }
    settings = [*evaluate_inputs(run.config), *run.rouge_stamp]
    todo: dict[str, tuple[str, str]] = {}
    for name, (made_by, source) in models.items():
        key = json.dumps([run.fingerprints[made_by], run.fingerprints["prepare"], settings])
        if kept.get(name, {}).get("key") != key:
            todo[name] = key, source
    if todo:
        run.group.everywhere(_evaluate, run, todo, kept)
    return {name: {k: v for k, v in kept[name].items() if k not in ("key", "rows")} for name in models}


def _evaluate(run: Run, todo: Mapping[str, tuple[str, str]], kept: dict[str, Any]) -> None:
    """Evaluate models, and add each one's results to evaluation.json.

    Args:
        run: the run.
        todo: the name of each model in the summary -> its key, and its folder or hub id.
        kept: the content of evaluation.json. The results are added to it.
    """
    path, c = run.folder / "evaluation.json", run.config.evaluate
    cache, validation = validation_cache(run), run.data("validation")
    for name, (key, source) in todo.items():
        is_teacher = name == "teacher"
        of_teacher: dict[str, Any] = {"states": cache} if is_teacher else {"teacher": _teacher(run, cache)}
        result = evaluate(
            run.teacher if is_teacher else load_model(source, run.dtype, run.device),
            teachers_samples(validation) if is_teacher else validation,
            run.tokenizer,
            **of_teacher,
            sampling=Sampling(max_new_tokens=c.max_new_tokens, temperature=c.temperature if c.seeds else 0.0),
            seeds=c.seeds,
            batch_size=c.batch_size,
            rouge_tokenizer=run.rouge_tokenizer,
            metrics=c.metrics,
            per_row=True,
            sharing=run.group,
            progress=run.group.rank == 0,
        )
        if run.group.rank == 0:
            kept[name] = {"key": key, **result}
            write_text(path, json_text(kept))


def _metric_rows(run: Run) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _best_step(run: Run) -> dict[str, Any]:
    """The step whose student was kept, if it is not the last: step, metric and value."""
    found = [row for row in _metric_rows(run) if row["kind"] == "best"]
    return {name: value for name, value in found[-1].items() if name != "kind"} if found else {}


def _teacher(run: Run, cache: TeacherCache | None) -> PreTrainedModel | TeacherSource:
    """The source of the teacher's rows of the validation samples."""
    if not mode_of(run.config).itself:
        return run.teacher if cache is None else cache
    if cache is not None:
        return PrivilegedTeacher(cache, DistillationCollator())
    collate = DistillationCollator(decoder_start=decoder_start(run.teacher))
    return PrivilegedTeacher(LiveTeacher(run.teacher, freeze=False), collate)


def _training_figures(run: Run) -> dict[str, Any]:
    rows = _metric_rows(run)
    train = {r["step"]: r for r in rows if r["kind"] == "train"}
    steps = max(train)
    spent = sorted(r["tokens_per_second"] for r in train.values())
    return {
        "steps": steps,
        "sample_passes": steps * run.args.per_device_train_batch_size * run.args.gradient_accumulation_steps,
        "tokens_per_second": spent[len(spent) // 2],
        "peak_memory_mb": max(r["memory_mb"] for r in train.values()),
    }


def _stages(run: Run) -> list[dict[str, Any]]:
    """For each reflection before a later stage (counted from 1): its means, and how many samples it exchanged."""
    found, before = [], CurriculumPlan.load(run.folder / "plan.json")
    for stage in range(2, len(before.subset_columns) + 1):
        path = run.folder / "checkpoints" / f"plan-stage-{stage}.json"
        if not path.is_file():
            continue
        plan = CurriculumPlan.load(path)
        scores = pq.read_table(path.with_name(f"reflections-stage-{stage}.parquet"))
        signals = [n for n in run.config.reflect.signals if n in scores.column_names]
        means = {n: float(np.nanmean(scores[n].to_numpy())) for n in signals}
        found.append({"stage": stage, "exchanged": len(set(plan.kept) - set(before.kept)), **means})
        before = plan
    return found


def report(run: Run) -> None:
    """Write report.html, and with controls also report.json, which says how the run differs from them."""
    write_report(run.folder)
    if run.config.controls:
        write_text(run.folder / "report.json", json_text(controls_json(run.folder)))
