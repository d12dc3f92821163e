"""The sections with text: sample rows from both ends of the plan, held-out examples, unscored rows."""

import math
from typing import Any

from srd_fast.curriculum import CurriculumPlan
from srd_fast.report.numbers import missing, number, points
from srd_fast.report.read import Run

SHOWN, NEAREST = 5, 3
UNSCORED_SHOWN = 20
# A longer text is cut, so that a few huge rows do not make a huge page.
MAX_CHARACTERS = 6000


def samples_view(run: Run) -> dict[str, Any]:
    """The easiest and hardest kept rows and the hardest dropped ones, each with its texts and scores."""
    absent = missing(run, "plan.json", "data/train.parquet", "reflections.parquet")
    view: dict[str, Any] = {"missing": absent, "note": "", "groups": []}
    plan = run.plan
    if plan is None or (run.train is None and run.reflections is None):
        return view
    subset_of = {sample_id: i for i, ids in enumerate(plan.subsets, start=1) for sample_id in ids}
    kept = sorted(subset_of, key=lambda sample_id: _difficulty(run, plan, sample_id))
    dropped = sorted((row["sample_id"] for row in plan.dropped), key=lambda s: _difficulty(run, plan, s))
    reasons = {row["sample_id"]: row["reason"] for row in plan.dropped}
    order = "fused rank, as in the plan" if plan.fused else "ROUGE-L, then cross-entropy"
    view["note"] = f"Ordered by {order}. The answer is the starting student's."
    hardest = [sample_id for sample_id in kept[::-1][:SHOWN] if sample_id not in kept[:SHOWN]]
    for title, ids in (
        *zip(_titles(plan), (kept[:SHOWN], hardest, dropped[::-1][:SHOWN])),
        # A reader can judge the border by the rows on its two sides.
        ("Nearest to the border: the last kept", kept[::-1][:NEAREST] if dropped else []),
        ("Nearest to the border: the first dropped", dropped[:NEAREST]),
    ):
        if title.startswith("Nearest") and not ids:
            continue
        cards = [_card(run, plan, sample_id, subset_of, reasons) for sample_id in ids]
        view["groups"].append((title, cards))
    return view


def _titles(plan: CurriculumPlan) -> tuple[str, str, str]:
    """Titles for the first and the last kept rows of the ranking, and for its last rows, by what the ranking means."""
    if plan.ranked_by == ["gap"]:
        return "Kept rows with the most to learn", "Kept rows with the least to learn", "Dropped rows with the least"
    return "Easiest kept rows", "Hardest kept rows", "Hardest dropped rows"


def selection_view(run: Run) -> dict[str, Any] | None:
    """The tokens that the loss saw: by entropy, (range, count, percent of the widest bar, share seen), and samples."""
    found = run.selection
    if found is None:
        return None
    bins = [
        (f"{low:.1f} to {high:.1f}", candidates, chosen)
        for low, high, candidates, chosen in zip(found.edges, found.edges[1:], found.candidates, found.chosen)
    ]
    used = [i for i, (_, candidates, _) in enumerate(bins) if candidates]
    bins = bins[: used[-1] + 1] if used else []
    most = max((candidates for _, candidates, _ in bins), default=1)
    total, chosen = sum(found.candidates), sum(found.chosen)
    note = f"Policy {found.policy}, ratio {found.ratio:g}."
    if total:
        note += (
            f" Over the run the loss saw {chosen:,} of {total:,} positions ({chosen / total:.1%}): the rest cost the "
            "student's forward pass, but no teacher's logits and no gradient of the head."
        )
    if math.isfinite(found.saved_head_work):
        note += f" {found.saved_head_work:.1%} of the heads' products were saved, those for choosing counted."
    rows = [(name, f"{n:,.0f}", f"{100 * n / most:.1f}", f"{c / n:.0%}" if n else "–") for name, n, c in bins]
    samples = [(s.sample_id, s.prompt[:MAX_CHARACTERS], s.tokens) for s in found.samples]
    return {"note": note, "rows": rows, "samples": samples}


def _difficulty(run: Run, plan: CurriculumPlan, sample_id: str) -> tuple[float, float, float, str]:
    """A sort key, easiest first; a row without a score counts as hardest."""
    rouge, entropy = math.nan, math.nan
    if run.reflections is not None:
        rouge = run.reflections.score("rouge_l", sample_id)
        entropy = run.reflections.score("cross_entropy", sample_id)
    keys = (-plan.fused.get(sample_id, math.nan), -rouge, entropy)
    fused, rouge, entropy = (math.inf if math.isnan(key) else key for key in keys)
    return fused, rouge, entropy, sample_id


def _card(
    run: Run, plan: CurriculumPlan, sample_id: str, subset_of: dict[str, int], reasons: dict[str, str]
) -> dict[str, Any]:
    scores = []
    if run.reflections is not None:
        scores.append(("ROUGE-L", points(run.reflections.score("rouge_l", sample_id)), "points"))
        scores.append(("cross-entropy", number(run.reflections.score("cross_entropy", sample_id)), "nats per token"))
        for signal in plan.signals:
            if signal not in ("rouge_l", "cross_entropy"):
                scores.append((signal, f"{run.reflections.score(signal, sample_id):.4g}", ""))
    if sample_id in plan.fused:
        scores.append(("fused", f"{plan.fused[sample_id]:.4f}", ""))
    references = run.train.references(sample_id) if run.train else []
    answer = run.reflections.generation(sample_id) if run.reflections else None
    prompt = run.train.prompt(sample_id) if run.train else None
    return {
        "sample_id": sample_id,
        "place": f"subset {subset_of[sample_id]}" if sample_id in subset_of else reasons.get(sample_id, ""),
        "scores": scores,
        "prompt": None if prompt is None else _cut(prompt),
        "references": [_cut(reference) for reference in references],
        "answer": None if answer is None else _cut(answer),
    }


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} […{len(text) - MAX_CHARACTERS:,} more characters]"


def examples_view(run: Run) -> list[dict[str, Any]]:
    """Held-out prompts with the reference and every model's answer."""
    if run.summary is None:
        return []
    examples: dict[str, dict[str, Any]] = {}
    for name, label in (
        ("teacher", "teacher"),
        ("start", "starting student"),
        ("student", "distilled student"),
    ):
        evaluation = run.summary.evaluation.get(name)
        for example in evaluation.examples if evaluation else []:
            entry = examples.setdefault(
                example.sample_id,
                {
                    "sample_id": example.sample_id,
                    "prompt": _cut(example.prompt),
                    "reference": _cut(example.reference),
                    "answers": [],
                },
            )
            entry["answers"].append((label, _cut(example.generation)))
    return list(examples.values())[:SHOWN]


def unscored_view(run: Run) -> dict[str, Any]:
    """The first unscored rows with their reasons, and how many there are."""
    if run.plan is not None:
        found = [(row["sample_id"], row["reason"]) for row in run.plan.unscored]
    elif run.reflections is not None:
        found = run.reflections.unscored()
    else:
        return {"missing": missing(run, "plan.json"), "rows": [], "total": 0}
    return {"missing": "", "rows": found[:UNSCORED_SHOWN], "total": len(found)}
