"""Make the page: a small view for each section, rendered by ``template.html`` with all values escaped."""

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from srd_fast.curriculum import RANKED, SHUFFLED, CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.report.answers import NAMES
from srd_fast.report.controls import controls_view, read_controls
from srd_fast.report.figures import curves_view, difficulty_view, schedule_view, throughput_view
from srd_fast.report.idle import ranking_view
from srd_fast.report.numbers import TITLES, count, duration, missing, number, points, title_of, value_of
from srd_fast.report.read import Evaluation, Run, Summary
from srd_fast.report.rows import fit
from srd_fast.report.samples import examples_view, samples_view, selection_view, unscored_view
from srd_fast.report.tables import training_table, validation_table

MOST_BYTES = 5_000_000
# Bytes for the scores of a training row. Of the bytes that these and the figures leave, the validation rows get a
# share, and at least the last share of the whole page.
BYTES_OF_SCORES, SHARE_OF_VALIDATION, LEAST_OF_VALIDATION = 40, 0.3, 0.05
ROOM_OF_SENTENCES = 1000
STEPS = ("prepare", "init-student", "reflect", "curate", "answers", "cache", "distill", "evaluate", "controls")


def render(run: Run) -> str:
    """The whole page as HTML, at most `MOST_BYTES` long."""
    difficulty = difficulty_view(run)
    views: dict[str, Any] = {
        "title": _title(run),
        "result": _result(run),
        "facts": _facts(run),
        "scores": _scores(run),
        "controls": controls_view(read_controls(run.folder)),
        "examples": examples_view(run),
        "difficulty": difficulty,
        "ranking": ranking_view(run),
        "schedule": schedule_view(run),
        "curves": curves_view(run),
        "throughput": throughput_view(run),
        "samples": samples_view(run),
        "unscored": unscored_view(run),
        "selection": selection_view(run),
        "timings": _timings(run),
        "environment": _environment(run),
        "config": run.config,
        "config_missing": missing(run, "config.yaml"),
    }
    tables = {
        "validation_rows": validation_table(run),
        "training_rows": training_table(run, difficulty["frames"]),
    }
    room = MOST_BYTES - len(page_of("template.html", **views, **dict.fromkeys(tables)).encode(errors="replace"))
    blocks: dict[str, Any] = dict.fromkeys(tables)
    listed = tables["training_rows"]
    spare = room - (BYTES_OF_SCORES * len(listed.ids) if listed else 0)
    for name, table in tables.items():
        if table is not None and len(table.ids):
            share = room if name == "training_rows" else max(SHARE_OF_VALIDATION * spare, LEAST_OF_VALIDATION * room)
            text, left_out = fit(table, int(share) - ROOM_OF_SENTENCES)
            blocks[name] = {"json": text, "left_out": left_out}
            room -= len(text.encode(errors="replace"))
    return page_of("template.html", **views, **blocks)


def page_of(template: str, **views: Any) -> str:
    """Fill a template; its Content-Security-Policy names the script by its hash, so that no other can run."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=script, script_hash=f"sha256-{digest}", **views)


def write_page(target: Path, page: str) -> Path:
    """Write a page, replacing an older one in a single step, and return its path."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # JSON may carry a lone surrogate, which UTF-8 cannot.
        temporary.write_bytes(page.encode("utf-8", errors="replace"))
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _title(run: Run) -> list[str]:
    """The names of the two models; empty if they are not known."""
    if run.summary is None or not (run.summary.teacher and run.summary.student):
        return []
    return [_short(run.summary.teacher), _short(run.summary.student)]


def _short(name: str) -> str:
    """The last part of a local path; a hub name as it is."""
    return Path(name).name or name if name.startswith(("/", ".", "~")) else name


def _result(run: Run) -> str:
    """The outcome in one sentence."""
    absent = missing(run, "summary.json")
    if absent:
        return f"No result yet: {absent}"
    start, student, teacher = (_evaluation(run, name) for name in ("start", "student", "teacher"))
    parts = []
    for name, scale, unit, digits in (("rouge_l", 100, "points", 1), ("kl", 1, "nats per token", 3)):
        before, after = scale * getattr(start, name), scale * getattr(student, name)
        if math.isnan(before) or math.isnan(after):
            continue
        what = "ROUGE-L" if name == "rouge_l" else "the KL divergence to the teacher"
        part = f"{_change(what, f'{before:.{digits}f}', f'{after:.{digits}f}')} {unit}"
        if name == "rouge_l" and not math.isnan(teacher.rouge_l):
            part += f" (the teacher scores {points(teacher.rouge_l)})"
        parts.append(part)
    if not parts:
        return "summary.json holds no scores of both students."
    return f"Distillation {' and '.join(parts)}."


def _change(what: str, before: str, after: str) -> str:
    if before == after:
        return f"left {what} at {after}"
    return f"{'raised' if float(after) > float(before) else 'lowered'} {what} from {before} to {after}"


def _evaluation(run: Run, name: str) -> Evaluation:
    found = run.summary.evaluation.get(name) if run.summary else None
    return found or Evaluation()


# Counts of what the data lost or has twice, with their labels.
_COUNTED = {
    "prompts_cut": "prompts cut",
    "responses_cut": "responses cut",
    "turns_dropped": "turns dropped from long chats",
    "validation_in_training": "validation prompts trained on",
    "validation_near_training": "validation prompts almost trained on",
}


# Mode kd is not named, since all runs were like that before there were modes.
_MODES = {"": "–", "kd": "–", "sft": "sft (fine-tuning)", "seqkd": "seqkd (the teacher's answers)",
          "offline_on_policy": "offline on-policy (the starting student's answers)",
          "on_policy": "on-policy (fresh answers of the student)",
          "distillm": "distillm (fresh and replayed answers of the student)",
          "self": "self (the teacher is the starting student, and reads more)"}  # fmt: skip
_ANSWERS = {"answers": "answers trained on", "cut": "answers cut", "empty": "empty answers dropped",
            "empty_kept": "empty answers, trained on to end at once"}  # fmt: skip


def _facts(run: Run) -> list[tuple[str, str]]:
    """(label, value) about the run's rows, plan and training."""
    summary = run.summary
    data = summary.data if summary else {}
    training = summary.training if summary else {}
    answers = summary.answers if summary else {}
    first = ", first stage" if "empty_kept" in answers else ""
    train_rows = data.get("train", math.nan if run.train is None else len(run.train.table))
    validation_rows = data.get("validation", math.nan if run.num_validation is None else run.num_validation)
    facts = [
        ("training rows", count(train_rows)),
        ("validation rows", count(validation_rows)),
        ("rejected rows", count(data.get("rejected", math.nan))),
        *[(label, count(data[name])) for name, label in _COUNTED.items() if data.get(name)],
        ("mode", _MODES.get(summary.mode, summary.mode) if summary else "–"),
        *[(label + first, count(answers[name])) for name, label in _ANSWERS.items() if answers.get(name)],
        ("divergence", summary.divergence if summary and summary.divergence else "–"),
        ("optimizer steps", count(training.get("steps", math.nan))),
        ("student kept", _best_in_words(summary)),
        ("sample passes", count(training.get("sample_passes", math.nan))),
        ("tokens trained on", count(training.get("tokens", math.nan))),
        ("curriculum", _plan_in_words(run.plan)),
        ("ranked by", _signals_in_words(run.plan)),
        *_at_borders(run),
    ]
    return [(label, value) for label, value in facts if value != "–"]


def _best_in_words(summary: Summary | None) -> str:
    """Which step's student was kept, if it is not the last one's."""
    best = summary.best if summary else None
    if best is None:
        return "–"
    by = f"validation {title_of(best.metric)} ({value_of(best.metric, best.value)})"
    return f"that of step {count(best.step)}, the best by {by}"


def _at_borders(run: Run) -> list[tuple[str, str]]:
    """(label, value) for each stage border at which the student reflected, or answered, again."""
    found = []
    for row in run.summary.stages if run.summary else ():
        if "answers" in row:
            words = [f"{count(row[name])} {name}" for name in ("answers", "cut", "empty") if row.get(name)]
            words.append(f"at step {count(row.get('step', math.nan))}, in {duration(row.get('seconds', math.nan))}")
            found.append((f"answers before stage {count(row.get('stage', math.nan))}", ", ".join(words)))
            continue
        means = [f"{n} {x:.3f}" for n, x in row.items() if n not in ("stage", "exchanged") and not math.isnan(x)]
        words = [*means, f"{count(row.get('exchanged', math.nan))} samples exchanged"]
        found.append((f"reflection before stage {count(row.get('stage', math.nan))}", ", ".join(words)))
    return found


def _plan_in_words(plan: CurriculumPlan | None) -> str:
    if plan is None:
        return "–"
    how = {"srd": "selective reflection", "random": "random drop", "none": "no selection"}[plan.method]
    subsets = sum(1 for subset in plan.subsets if subset)
    kept = f"{sum(len(subset) for subset in plan.subsets):,} kept"
    if plan.keep_rule == "knee":
        kept += f" ({plan.keep:.0%}, up to the knee)"
    parts = [f"{kept} in {subsets} subsets" if subsets > 1 else kept]
    parts += [
        f"{len(some):,} {what}" for some, what in ((plan.dropped, "dropped"), (plan.unscored, "unscored")) if some
    ]
    if plan.order != RANKED and plan.method != "none":
        parts.append("subsets shuffled" if plan.order == SHUFFLED else f"subsets in the order of {plan.order}")
    parts += [f"{name} from {low:g} to {high:g}" for name, (low, high) in plan.band.items()]
    if plan.weight_by is not None:
        parts.append(f"weighed by p(1 - p) of {plan.weight_by}")
    return f"{how}: {', '.join(parts)}"


def _signals_in_words(plan: CurriculumPlan | None) -> str:
    """The signals of a ranking, each with its weight where that is not 1."""
    if plan is None or plan.method != "srd":
        return "–"
    weights = {name: plan.signals[name].weight for name in plan.ranked_by}
    return ", ".join(name if weight == 1 else f"{name} (weight {weight:g})" for name, weight in weights.items()) or "–"


def _scores(run: Run) -> dict[str, Any]:
    """The table of scores before and after. A cell is its text, and whether it is that of the better student."""
    absent = missing(run, "summary.json")
    if absent or run.summary is None:
        return {"missing": absent, "rows": [], "note": "", "metrics": []}
    evaluations = {name: _evaluation(run, name) for name in NAMES}
    rouge = {name: points(e.rouge_l) for name, e in evaluations.items()}
    entropy = {name: number(e.cross_entropy) for name, e in evaluations.items()}
    kl = {name: number(e.kl) for name, e in evaluations.items()}
    asked = dict.fromkeys(metric for e in evaluations.values() for metric in e.metrics)
    others = {
        metric: {name: value_of(metric, e.metrics.get(metric, math.nan)) for name, e in evaluations.items()}
        for metric in asked
    }
    # Of a metric of the user's own the page does not know which is better.
    best_others = [_best(texts, max) if metric in TITLES else None for metric, texts in others.items()]
    best = [_best(rouge, max), *best_others, _best(entropy, min), _best(kl, min)]
    rows = []
    for name, label in NAMES.items():
        spread = evaluations[name].rouge_l_std
        spread_text = "" if math.isnan(spread) else f" ± {100 * spread:.1f}"
        texts = (rouge[name] + spread_text, *(x[name] for x in others.values()), entropy[name], kl[name])
        rows.append((label.capitalize(), [(text, name == winner) for text, winner in zip(texts, best, strict=True)]))
    note = _scores_note(run, list(evaluations.values()))
    return {"missing": "", "rows": rows, "note": note, "metrics": [(title_of(m), m in TITLES) for m in others]}


def _best(texts: dict[str, str], pick: Any) -> str | None:
    """The better student by the displayed digits; None if they are equal or one was not measured."""
    students = {name: texts[name] for name in ("start", "student") if texts[name] != "–"}
    if len(set(students.values())) < 2:
        return None
    return str(pick(students, key=lambda name: float(students[name].replace(",", ""))))


def _scores_note(run: Run, evaluations: Sequence[Evaluation]) -> str:
    absent = [label for name, label in NAMES.items() if run.summary and name not in run.summary.evaluation]
    measured = next((e for e in evaluations if not math.isnan(e.num_samples)), None)
    note = ""
    if measured:
        note = f"Measured on {count(measured.num_samples)} validation rows"
        tokens = "" if math.isnan(measured.num_tokens) else f" with {count(measured.num_tokens)} response tokens"
        note += f"{tokens}. "
    if any(not math.isnan(e.rouge_l_std) for e in evaluations):
        note += "± is the standard deviation over sampling seeds. "
    if any(not math.isnan(e.rouge_l) for e in evaluations):
        note += "The better student is in bold. "
    if absent:
        note += f"summary.json holds no evaluation of the {' and the '.join(absent)}."
    return note.strip()


def _timings(run: Run) -> dict[str, Any]:
    """(step, duration, share of the longest in percent) in the order of the run."""
    absent = missing(run, "summary.json")
    if absent or run.summary is None:
        return {"missing": absent, "rows": [], "total": ""}
    timings = {name: value for name, value in run.summary.timings.items() if not math.isnan(value)}
    if not timings:
        return {"missing": "summary.json holds no timings.", "rows": [], "total": ""}
    names = [*(name for name in STEPS if name in timings), *(name for name in timings if name not in STEPS)]
    longest = max(*timings.values(), 1e-9)
    rows = [(name, duration(timings[name]), f"{100 * timings[name] / longest:.1f}") for name in names]
    return {"missing": "", "rows": rows, "total": duration(sum(timings.values()))}


def _environment(run: Run) -> dict[str, Any]:
    """(label, value) of the machine and the versions."""
    absent = missing(run, "summary.json")
    if absent or run.summary is None:
        return {"missing": absent, "rows": []}
    summary = run.summary
    training = summary.training
    rows = [
        ("teacher", summary.teacher),
        ("student", summary.student),
        ("srd-fast", summary.version),
        *summary.environment.items(),
        ("median training speed", _with_unit(training.get("tokens_per_second", math.nan), "tokens per second")),
        ("peak memory", _with_unit(training.get("peak_memory_mb", math.nan), "MB")),
    ]
    return {"missing": "", "rows": [(label, value) for label, value in rows if value]}


def _with_unit(value: float, unit: str) -> str:
    return "" if math.isnan(value) else f"{count(value)} {unit}"
