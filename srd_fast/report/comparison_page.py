"""The page of `srd-fast compare`: values, differences with their intervals, curves, and every model's answers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from srd_fast.report.canvas import INK, NARROW, WIDE, new_figure, picture, sequence
from srd_fast.report.comparison import Comparison
from srd_fast.report.differences import differences_view, pairs_view
from srd_fast.report.numbers import rows as rows_in_words
from srd_fast.report.page import MOST_BYTES, ROOM_OF_SENTENCES, page_of, write_page
from srd_fast.report.plots import NICE
from srd_fast.report.read import FloatArray
from srd_fast.report.rows import Column, Table, Texts, fit
from srd_fast.report.sides import MEASURES


def render_comparison(comparison: Comparison) -> str:
    """The whole page as HTML, at most `MOST_BYTES` long."""
    views: dict[str, Any] = {
        "measures": MEASURES,
        "models": comparison.models,
        "num_rows": rows_in_words(comparison.num_rows) if comparison.shared else "",
        "pairs": pairs_view(comparison.pairs),
        "differences_view": differences_view(comparison.pairs),
        "curves": _curves_view(comparison),
    }
    room = MOST_BYTES - len(page_of("comparison.html", **views, answers=None).encode(errors="replace"))
    if not comparison.shared:
        return page_of("comparison.html", **views, answers=None)
    text, left_out = fit(_answers(comparison), room - ROOM_OF_SENTENCES)
    return page_of("comparison.html", **views, answers={"json": text, "left_out": left_out})


def _curves_view(comparison: Comparison) -> dict[str, Any]:
    curves = {
        label: metrics.validation for label, metrics in comparison.metrics.items() if len(metrics.validation["step"])
    }
    view: dict[str, Any] = {"missing": "", "picture": None, "caption": "Measured while training."}
    if not curves:
        view["missing"] = "No run's metrics.jsonl holds a validation row."
        return view
    colours = dict(zip(curves, sequence(max(len(curves), 2))))
    view["legend"] = [(label, colours[label], True, "") for label in curves]
    alt = "; ".join(f"{label}: KL {_last(x['kl'])} at step {x['step'][-1]:.0f}" for label, x in curves.items())

    def draw(narrow: bool) -> Figure:
        figure = new_figure(NARROW, 420) if narrow else new_figure(WIDE, 260)
        panels = figure.subplots(2, 1, sharex=True) if narrow else figure.subplots(1, 2)
        for axes, name, title in zip(panels, ("kl", "cross_entropy"), ("validation KL", "validation cross-entropy")):
            for label, columns in curves.items():
                seen = np.isfinite(columns[name])
                axes.plot(columns["step"][seen], columns[name][seen], color=colours[label], marker="o", markersize=3.5)
            axes.set_title(f"{title} (nats per token)", color=INK)
            axes.margins(x=0.02, y=0.1)
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=NICE, integer=True))
        for axes in panels[-1:] if narrow else panels:
            axes.set_xlabel("optimizer step")
        return figure

    view["picture"] = picture(draw, f"Validation curves. {alt}.")
    return view


def _last(values: FloatArray) -> str:
    seen = values[np.isfinite(values)]
    return f"{seen[-1]:.3f}" if len(seen) else "not measured"


def _answers(comparison: Comparison) -> Table:
    """Every shared row with each model's answer, ROUGE-L and KL; the numbers are means over seeds."""
    ids = comparison.shared
    columns, texts = [], []
    for i, model in enumerate(comparison.given, 1):
        rouge, sums, tokens = (model.by_row(field, ids) for field in ("rouge_l", "kl", "num_tokens"))
        columns.append(Column(f"ROUGE‑L, {i}", "points", 100 * rouge, i < len(comparison.given)))
        kl = sums / np.maximum(tokens, 1)
        if not all(map(math.isnan, kl)):
            columns.append(Column(f"KL, {i}", "nats per token", kl, i < len(comparison.given)))
        shown = model.of_seeds[0]
        which = f", seed {shown.seed}" if len(model.of_seeds) > 1 else ""
        answers = [shown.rows.generations[shown.rows.index[x]] for x in ids]
        texts.append(Texts(f"{i}: {model.label}{which}", answers))
    columns.sort(key=lambda column: column.title.startswith("KL"))
    prompts, references = comparison.prompts, comparison.references
    of_row = [
        Texts("prompt", [prompts.get(x) for x in ids], whole=True),
        Texts("reference", [references.get(x) for x in ids]),
    ]
    return Table(ids, columns, [*of_row, *texts])


def write_comparison(comparison: Comparison, target: Path) -> Path:
    """Write the page of a comparison.

    Args:
        comparison: the result of `compare_runs`.
        target: the file; an older one is replaced.

    Returns:
        The path of the page.

    Raises:
        UserError: the file cannot be written.
    """
    return write_page(target, render_comparison(comparison))
