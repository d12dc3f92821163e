"""Differences between models on a page: their tables, and the picture of their intervals."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from srd_fast.report.canvas import DROPPED, LINE, MUTED, NARROW, WIDE, new_figure, picture
from srd_fast.report.comparison import Pair, change, interval
from srd_fast.report.plots import NICE
from srd_fast.report.sides import MEASURES


def pairs_view(pairs: Sequence[Pair]) -> list[tuple[Any, ...]]:
    """Pairs in the form that the macro `pairs` of `parts.html` takes."""
    return [
        (pair.first, pair.second, pair.basis,
         [(d.measure.title, d.measure.unit, change(d), interval(d), d.verdict) for d in pair.differences])
        for pair in pairs
    ]  # fmt: skip


def differences_view(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The picture of all differences with their intervals."""
    view: dict[str, Any] = {"missing": "", "picture": None, "caption": ""}
    if not any(not d.reason for pair in pairs for d in pair.differences):
        view["missing"] = "No difference could be measured."
        return view
    view["caption"] = (
        "Difference of the second model from the first, with its interval. Grey: the "
        "interval holds 0, so no difference is shown. The better side is to the left for KL and cross-entropy, to the "
        "right for ROUGE-L."
    )
    alt = "; ".join(
        f"{pair.second} against {pair.first}, {d.measure.title}: {change(d)} {interval(d)}, {d.verdict}"
        for pair in pairs
        for d in pair.differences
    )
    view["picture"] = picture(lambda narrow: _intervals(pairs, narrow), f"Differences with intervals. {alt}.")
    return view


def _intervals(pairs: Sequence[Pair], narrow: bool) -> Figure:
    height = 60 + 30 * len(pairs)
    figure = new_figure(NARROW, 3 * height) if narrow else new_figure(WIDE, height + 20)
    panels = figure.subplots(3, 1) if narrow else figure.subplots(1, 3, sharey=True)
    for axes, measure, number in zip(panels, MEASURES, range(3)):
        axes.set_title(f"{measure.title} ({measure.unit})")
        axes.axvline(0, color=MUTED, linewidth=0.9)
        for y, pair in enumerate(pairs):
            d = pair.differences[number]
            if d.reason:
                continue
            colour = DROPPED if d.holds_zero else LINE
            ends = [measure.scale * d.low, measure.scale * d.high]
            axes.plot(ends, [y, y], color=colour, linewidth=2.5)
            axes.plot(measure.scale * (d.second - d.first), y, "o", color=colour, markersize=6)
        axes.set_yticks(range(len(pairs)), [f"{i + 1}" for i in range(len(pairs))])
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=NICE))
    return figure
