"""The sections with figures: each one's picture, caption and description in words."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from srd_fast.curriculum import CurriculumPlan
from srd_fast.report.canvas import COARSE_DPI, DROPPED, RASTER_DPI, picture, sequence
from srd_fast.report.numbers import missing, number, rows, title_of
from srd_fast.report.plots import (
    MOST_POINTS,
    Group,
    curves,
    difficulty_map,
    frame_of,
    metrics_of_answers,
    schedule,
    stage_bands,
    throughput,
)
from srd_fast.report.read import FloatArray, Reflections, Run


def difficulty_view(run: Run) -> dict[str, Any]:
    """The difficulty map with its legend; without a plan, every scored row in one colour."""
    absent = missing(run, "reflections.parquet", "plan.json")
    view: dict[str, Any] = {"missing": absent, "picture": None, "frames": None}
    reflections = run.reflections
    if reflections is None:
        return view
    listed, undrawn = groups_of(reflections, run.plan)
    groups = [group for group in listed if len(group.rouge_l)]
    if not groups:
        view["missing"] = view["missing"] or "No row has both a ROUGE-L and a cross-entropy score."
        return view
    entropy = np.concatenate([group.cross_entropy for group in groups])
    rouge = np.concatenate([group.rouge_l for group in groups])
    right_edge, beyond = right_edge_of(entropy)
    zero, one = int(np.sum(rouge <= 0)), int(np.sum(rouge >= 1))
    legend = [(group.label, group.colour, group.kept, rows(len(group.rouge_l))) for group in groups]
    view["legend"] = legend
    view["caption"] = (
        f"Every point is a training row: how well the starting student's answer matches the reference "
        f"(ROUGE-L) against how surprising it finds the reference (cross-entropy). {rows(zero)} at exactly 0 "
        f"and {rows(one)} at exactly 100 are spread over the shaded strips. Bars count rows."
    )
    if len(rouge) > MOST_POINTS:
        view["caption"] += f" {MOST_POINTS:,} of them are drawn, taken evenly; the bars count all."
    if beyond:
        view["caption"] += (
            f" {rows(beyond)} above {right_edge:.1f} nats per token {_are(beyond)} drawn at the right edge."
        )
    if undrawn:
        view["caption"] += f" {rows(undrawn)} of the plan {_are(undrawn)} not drawn for want of a score."
    alt = (
        f"Scatter plot of {rows(len(rouge))}, ROUGE-L from 0 to 100 points against cross-entropy from "
        f"{number(float(entropy.min()))} to {number(float(entropy.max()))} nats per token, with a histogram "
        f"on each axis. " + "; ".join(f"{label}: {size}" for label, _, _, size in legend) + "."
    )
    figures: dict[bool, Figure] = {}

    def draw(narrow: bool) -> Figure:
        figures[narrow] = difficulty_map(groups, right_edge, narrow)
        return figures[narrow]

    view["picture"] = picture(draw, alt, COARSE_DPI if len(rouge) > MOST_POINTS else RASTER_DPI)
    view["frames"] = {"edge": right_edge, "wide": frame_of(figures[False]), "narrow": frame_of(figures[True])}
    return view


def named_groups(reflections: Reflections, plan: CurriculumPlan | None) -> list[tuple[str, str, list[str], bool]]:
    """(label, colour, sample ids, are they kept?): the subsets in their order, then the dropped rows."""
    if plan is None:
        return [("scored, no plan yet", sequence(2)[0], list(reflections.index), True)]
    subsets = [subset for subset in plan.subsets if subset]
    labels = [f"subset {i}" for i in range(1, len(subsets) + 1)]
    if len(subsets) == 1:
        labels = ["kept"]
    elif subsets and plan.is_by_ease:
        labels[0] += ", easiest"
        labels[-1] += ", hardest"
    colours = sequence(max(len(subsets), 2))
    named = [(label, colours[i], subsets[i], True) for i, label in enumerate(labels)]
    return [*named, ("dropped", DROPPED, [row["sample_id"] for row in plan.dropped], False)]


def groups_of(reflections: Reflections, plan: CurriculumPlan | None) -> tuple[list[Group], int]:
    """The groups with the scores of their rows; and how many rows of the plan cannot be drawn."""
    groups, undrawn = [], 0
    for label, colour, ids, kept in named_groups(reflections, plan):
        entropy = np.array([reflections.score("cross_entropy", sample_id) for sample_id in ids], dtype=np.float64)
        rouge = np.array([reflections.score("rouge_l", sample_id) for sample_id in ids], dtype=np.float64)
        drawn = np.isfinite(entropy) & np.isfinite(rouge)
        undrawn += int(np.sum(~drawn)) if plan is not None else 0
        groups.append(Group(label, colour, entropy[drawn], rouge[drawn], kept))
    return groups, undrawn


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def right_edge_of(entropy: FloatArray) -> tuple[float, int]:
    """Where the cross-entropy axis ends, and how many rows lie beyond.

    A few outliers must not squeeze the other rows together.
    """
    most = float(np.quantile(entropy, 0.99))
    edge = float(entropy.max())
    if edge > 1.6 * most > 0:
        edge = 1.2 * most
    return max(edge, 1e-3), int(np.sum(entropy > edge))


def _steps(run: Run) -> dict[str, Any]:
    """The common start of the views over the steps: what is missing, and no picture yet."""
    absent = missing(run, "metrics.jsonl")
    if run.metrics is not None and not len(run.metrics.train["step"]):
        absent = "metrics.jsonl holds no training step yet; `srd-fast distill` writes them."
    return {"missing": absent, "picture": None, "caption": ""}


def schedule_view(run: Run) -> dict[str, Any]:
    """Temperature, SFT weight and learning rate over the stages."""
    view = _steps(run)
    if view["missing"] or run.metrics is None:
        return view
    train = run.metrics.train
    bands = stage_bands(train["step"], train["stage"])
    view["caption"] = (
        "Stage k trains on subsets 1 to k together. The loss is the SFT weight times the cross-entropy, plus "
        "the rest times the divergence at temperature T."
    )
    alt = "; ".join(
        f"stage {stage}: steps {start:.0f} to {end:.0f}, temperature {_span(train, 'temperature', stage)}, "
        f"SFT weight {_span(train, 'sft_weight', stage)}, "
        f"learning rate {_span(train, 'learning_rate', stage)}"
        for start, end, stage in bands
    )
    view["picture"] = picture(lambda narrow: schedule(train, bands, narrow), f"Three line plots. {alt}.")
    return view


def _span(train: dict[str, FloatArray], name: str, stage: int) -> str:
    values = train[name][(train["stage"] == stage) & np.isfinite(train[name])]
    if not len(values):
        return "unknown"
    first, last = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return first if first == last else f"{first} to {last}"


def curves_view(run: Run) -> dict[str, Any]:
    """Loss and divergence while training, KL and cross-entropy on the validation rows."""
    view = _steps(run)
    if view["missing"] or run.metrics is None:
        return view
    train, validation = run.metrics.train, run.metrics.validation
    bands = stage_bands(train["step"], train["stage"])
    view["caption"] = (
        "Light: every logged step; strong: its moving mean within a stage. Training values jump at a stage "
        "border because data, temperature and weights change there; validation values compare across stages."
    )
    if not len(validation["step"]):
        view["caption"] += " metrics.jsonl holds no validation row."
    if run.summary is not None and run.summary.best is not None:
        view["caption"] += f" The student that was kept is that of step {run.summary.best.step:,.0f}."
    alt = "Line plots over the steps: " + ", ".join(
        f"{label} {_first_to_last(values)}"
        for label, values in (
            ("training loss", train["loss"]),
            ("training divergence", train["divergence"]),
            ("validation KL", validation["kl"]),
            ("validation cross-entropy", validation["cross_entropy"]),
            *((f"validation {title_of(name)}", validation[name]) for name in metrics_of_answers(validation)),
        )
    )
    view["picture"] = picture(lambda narrow: curves(train, validation, bands, narrow), f"{alt}.")
    return view


def _first_to_last(values: FloatArray) -> str:
    seen = values[np.isfinite(values)]
    return f"from {number(float(seen[0]))} to {number(float(seen[-1]))}" if len(seen) else "not measured"


def throughput_view(run: Run) -> dict[str, Any]:
    """Tokens per second and memory."""
    view = _steps(run)
    if view["missing"] or run.metrics is None:
        return view
    train = run.metrics.train
    bands = stage_bands(train["step"], train["stage"])
    speed, memory = (_median(train[name]) for name in ("tokens_per_second", "memory_mb"))
    view["caption"] = f"Median {speed} tokens per second, {memory} MB."
    view["picture"] = picture(
        lambda narrow: throughput(train, bands, narrow),
        f"Two line plots over the steps: tokens per second, median {speed}, and memory, median {memory} MB.",
    )
    return view


def _median(values: FloatArray) -> str:
    seen = values[np.isfinite(values)]
    return f"{np.median(seen):,.0f}" if len(seen) else "unknown"
