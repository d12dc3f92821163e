"""The two tables of all rows: the training rows in the order of the plan, and each model's answers."""

import math
from typing import Any

import numpy as np

from srd_fast.report.answers import NAMES, texts_of
from srd_fast.report.figures import named_groups
from srd_fast.report.plots import spread_ties
from srd_fast.report.read import FloatArray, Run
from srd_fast.report.rows import Column, Table, Texts


def training_table(run: Run, frames: dict[str, Any] | None) -> Table | None:
    """Every training row with its scores and texts.

    Args:
        run: the run.
        frames: where the points of the difficulty map are.

    Returns:
        The table; None before there are scores.
    """
    reflections, plan = run.reflections, run.plan
    if reflections is None:
        return None
    groups = [(label, ids) for label, _, ids, _ in named_groups(reflections, plan)]
    if plan is not None:
        groups.append(("unscored", [row["sample_id"] for row in plan.unscored]))
    groups = [(label, ids) for label, ids in groups if ids]
    ids = [sample_id for _, some in groups for sample_id in some]
    place = np.repeat(np.arange(len(groups)), [len(some) for _, some in groups])
    rows = [reflections.index.get(sample_id) for sample_id in ids]

    def score(name: str) -> FloatArray:
        values = reflections.scores.get(name)
        if values is None:
            return np.full(len(ids), math.nan)
        return np.array([math.nan if i is None else values[i] for i in rows], dtype=np.float64)

    rouge, entropy = score("rouge_l"), score("cross_entropy")
    drawn = np.isfinite(rouge) & np.isfinite(entropy)
    height = 100 * rouge
    for number in range(len(groups)):
        some = drawn & (place == number)
        height[some] = spread_ties(rouge[some])
    answers = reflections.table["generation"].to_pylist()
    prompts, references = _texts(run, ids)
    columns = [
        # The height in the drawing, where 0 and 100 are strips; the script displays values beyond as 0 and 100.
        Column("ROUGE‑L", "points", height),
        Column("cross-entropy", "nats per token", entropy),
        *(Column(name, "", score(name)) for name in reflections.scores if name not in ("rouge_l", "cross_entropy")),
        Column("reference", "characters", np.array([len(x or "") or math.nan for x in references]), minor=True),
    ]
    texts = [
        Texts("prompt", prompts, whole=True),
        Texts("reference", references),
        Texts("student's answer", [None if i is None else answers[i] for i in rows]),
    ]
    extra: dict[str, Any] = {"clamped": 0}
    if frames is not None:
        extra["map"] = {"x": 1, "y": 0, **frames}
    return Table(ids, columns, texts, ([label for label, _ in groups], place), extra)


def _texts(run: Run, ids: list[str]) -> tuple[list[str | None], list[str | None]]:
    """Prompts and references of the rows; several references are put one below the other."""
    prompts, references = ({}, {}) if run.train is None else texts_of(run.train.table)
    return [prompts.get(x) for x in ids], [references.get(x) for x in ids]


def validation_table(run: Run) -> Table | None:
    """Every validation row with each model's answer.

    Args:
        run: the run.

    Returns:
        The table; None if the run has no measures of single rows.
    """
    answers = run.answers
    if answers is None:
        return None
    models = [(answers.models[name], name, label) for name, label in NAMES.items() if name in answers.models]
    first = models[0][0]
    ids = list(first.index)
    prompts, references = ({}, {}) if answers.table is None else texts_of(answers.table)
    columns, texts = [], []
    for model, name, label in models:
        at = [model.index.get(sample_id) for sample_id in ids]

        def of_rows(values: FloatArray, at: list[int | None] = at) -> FloatArray:
            return np.array([math.nan if i is None else values[i] for i in at], dtype=np.float64)

        minor = name != "student"
        short = {"teacher": "teacher", "start": "start", "student": "distilled"}[name]
        columns.append(Column(f"ROUGE‑L, {short}", "points", 100 * of_rows(model.rouge_l), minor))
        if name != "teacher":
            kl = of_rows(model.kl / np.maximum(model.num_tokens, 1))
            columns.append(Column(f"KL, {short}", "nats per token", kl, minor))
        texts.append(Texts(label, [None if i is None else model.generations[i] for i in at]))
    columns.sort(key=lambda column: column.title.startswith("KL"))
    texts = [
        Texts("prompt", [prompts.get(x) for x in ids], whole=True),
        Texts("reference", [references.get(x) for x in ids]),
        *texts,
    ]
    return Table(ids, columns, texts)
