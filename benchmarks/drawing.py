"""How figures look: colours and style, bars and dots of panels, lines of what grows, and the file."""

import math
import re
import textwrap
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from .panels import Panel
from .providers import CE_ONLY, LIGER_CE, LIGER_CUTE, QUACK
from .rows import Row, natural

WIDTH, PITCH = 9.0, 0.145  # inches: of a figure, of one bar with its name
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind text, so that no line crosses it
INK, MUTED = "#1f2328", "#57606a"
# In the order in which bars stand. Strong for this library, grey for what everyone writes first.
COLOURS = {
    "gemms": "#30363d",
    "srd-fast": "#d55e00",
    "srd-fast, 128 MiB": "#a34700",
    "srd-fast, classes, 128 MiB": "#7a3e9d",
    "srd-fast, classes, 128 MiB, lse known": "#a875c6",
    "srd-fast, 70 % ignored": "#eb9c63",
    "se-kd": "#e6a700",
    "plain": "#8b939c",
    "plain, compiled": "#b9bfc6",
    "plain loop": "#8b939c",
    "script": "#8b939c",
    "liger-kernel": "#7aa6c8",
    "liger-kernel fused": "#4d7fa8",
    "liger-kernel fused, CuTe": "#2f5f86",
    "liger-kernel fused KL": "#9dbfd9",
    "trl chunked": "#4f9a8a",
    "trl gkd": "#9fcfc0",
    "torchtune": "#b08cc0",
    CE_ONLY: "#cdbf6d",
    QUACK: "#a89a4c",
    LIGER_CE: "#8fa8c8",
    LIGER_CUTE: "#5f7896",
    "transformers": "#eb9c63",
    "vllm": "#d55e00",
    "full KD": "#8b939c",
    "SE-KD": "#e6a700",
    "SE-KD3X": "#7aa6c8",
    "SRD": "#d55e00",
    "SRD + SE-KD": "#a34700",
    "random 75 %": "#b9bfc6",
}
OTHER_COLOURS = ("#6f8fb3", "#a58fb5", "#8fae8b", "#b5a27e", "#b58a94", "#7fa8a5")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#c4c9cf",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": "white",
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.color": "#e6e8eb",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "srd-fast",
    "text.color": INK,
    "xtick.color": "#c4c9cf",
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.color": "#c4c9cf",
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
}


def house_style() -> AbstractContextManager[None]:
    """In which figures are drawn and saved. The default style first: a user's own matplotlibrc changes nothing."""
    return matplotlib.style.context(["default", STYLE])


def save(figure: Figure, path: Path) -> None:
    """Without a date: the same rows give the same bytes."""
    figure.savefig(path, metadata={"Date": None})


def colour(provider: str) -> str:
    """The provider's own in every figure; a variant after a comma has that of what it varies."""
    other = OTHER_COLOURS[zlib.crc32(provider.encode()) % len(OTHER_COLOURS)]
    return COLOURS.get(provider) or COLOURS.get(provider.split(",")[0], other)


def place(provider: str) -> tuple[int, str]:
    """A sort key."""
    known = list(COLOURS)
    name = provider if provider in COLOURS else provider.split(",")[0]
    return (known.index(name) if name in COLOURS else len(known)), natural(provider)


def set_title(figure: Figure, title: str, found: list[Row]) -> None:
    """What is measured, and where and when."""
    where = "; ".join(dict.fromkeys(r.machine for r in found))
    days = sorted({r.date for r in found})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    figure.suptitle(textwrap.fill(title, 105) + f"\n{where}; {when}", x=0.01, ha="left", linespacing=1.4)


def slots(panels: Iterable[Panel]) -> list[tuple[str, str]]:
    """From top to bottom: each case, as (case, ""), and then its providers."""
    keys = {key for panel in panels for key in panel.spans}
    headings = {(case, "") for case, _ in keys if case}
    return sorted(keys | headings, key=lambda k: (natural(k[0]), k[1] != "", place(k[1])))


def slot_heights(order: list[tuple[str, str]]) -> list[float]:
    """Where each slot is, from the top: 1 apart, with a gap before the next case."""
    gaps = [0.0] + [1.4 if provider == "" else 1.0 for _, provider in order[1:]]
    return list(np.cumsum(gaps))


def limits(panels: list[Panel], room: float) -> tuple[float, float]:
    """Ends of an axis that panels share. room: for the values beside the bars, relative to the longest."""
    points = [x for panel in panels for span in panel.spans.values() for x in span if math.isfinite(x)] or [1.0]
    if panels[0].log:
        points = [x for x in points if x > 0] or [1.0]
        left = 10.0 ** math.floor(math.log10(min(points) / 1.5))
        return left, max(points) * (max(points) / left) ** room
    if not panels[0].dots:
        return min(0.0, *points), max(points) * (1 + room)
    reach = (max(points) - min(points)) or abs(max(points)) or 1.0
    return min(points) - 0.12 * reach, max(points) + room * reach


def tick(x: float) -> str:
    """A short number."""
    return f"{x:g}" if x == 0 or 0.01 <= abs(x) < 1e5 else re.sub(r"e([+-])0*", r"e\1", f"{x:.0e}").replace("+", "")


def draw_panel(axes: Axes, panel: Panel, order: list[tuple[str, str]], ends: tuple[float, float]) -> None:
    """Bars or dots of one panel, each beside its value. A value that a log axis cannot show is written alone."""
    axes.set_xscale("log" if panel.log else "linear")
    heights = slot_heights(order)
    axes.set(xlim=ends, ylim=(heights[-1] + 0.6, heights[0] - 0.6), xlabel=panel.label)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(LogLocator(numticks=4) if panel.log else MaxNLocator(4))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: tick(x))
    if panel.mark is not None:
        axes.axvline(panel.mark, color=COLOURS["gemms"], linewidth=1)
    for y, key in zip(heights, order):
        if key in panel.spans:
            draw_mark(axes, panel, key, y, ends[0] if panel.log else 0.0)


def draw_mark(axes: Axes, panel: Panel, key: tuple[str, str], y: float, start: float) -> None:
    """One bar or dot with its error bar and value."""
    (value, low, high), own = panel.spans[key], colour(key[1])
    shown = math.isfinite(value) and (value > 0 or not panel.log)
    if shown and panel.dots:
        axes.plot(value, y, "o", color=own, markersize=6)
    elif shown:
        axes.barh(y, value - start, left=start, height=0.72, color=own)
    if shown and high > low:
        axes.plot([low, high], [y, y], color=INK, linewidth=1)
    end, gap = (max(value, high) if shown else start), (7 if panel.dots else 4)
    text = "≥ " * (key in panel.at_least) + panel.text.format(value)
    axes.annotate(text, (end, y), (gap, 0), textcoords="offset points", va="center_baseline", bbox=PAPER)


def name_slots(axes: Axes, order: list[tuple[str, str]], visible: bool) -> None:
    """Providers at the bars; cases in bold from the figure's left edge, as far as they reach."""
    heights = slot_heights(order)
    axes.set_yticks(heights, [provider for _, provider in order])
    axes.tick_params(axis="y", length=0, labelleft=visible)
    for y, (case, provider) in zip(heights, order):
        if visible and not provider:
            text = axes.annotate(case, (0.01, y), xycoords=("figure fraction", "data"), annotation_clip=False)
            text.set(va="center_baseline", fontweight="bold", bbox=PAPER, in_layout=False)


def bar_figure(title: str, found: list[Row], grid: list[list[Panel]]) -> Figure:
    """Rows of panels. In a row all have the same bars at the same height, so that only the first names them."""
    grid = [kept for panels in grid if (kept := [p for p in panels if p.spans])]
    if not grid:
        raise LookupError("nothing to compare with")
    columns, orders = max(map(len, grid)), [slots(panels) for panels in grid]
    names = max(len(provider) for order in orders for _, provider in order)
    letters = int((WIDTH * 72 / 5.6 - names) / columns) - 2  # that fit above a panel
    heights = [PITCH * (slot_heights(order)[-1] + 1.2) for order in orders]
    figure = Figure(figsize=(WIDTH, 0.6 + sum(heights) + 1.15 * len(grid)), layout="constrained")
    cells = figure.add_gridspec(len(grid), columns, height_ratios=heights)
    set_title(figure, title, found)
    for i, (panels, order) in enumerate(zip(grid, orders)):
        for j, panel in enumerate(panels):
            axes = figure.add_subplot(cells[i, j])
            alike = [p for others in grid for p in others if p.label == panel.label]
            draw_panel(axes, panel, order, limits(alike, 0.05 + 0.11 * columns))
            axes.set_title("\n".join(textwrap.wrap(panel.title, letters, break_long_words=False)))
            name_slots(axes, order, j == 0)
    return figure


def draw_line(axes: Axes, part: list[Row], metric: str, labels: tuple[str, str], unit: float) -> None:
    """Points of each provider and their line. labels: of what grows and of the metric."""
    points: dict[str, list[tuple[float, float]]] = {}
    for r in part:
        if r.metric.startswith(f"{metric}@") and math.isfinite(r.value):
            points.setdefault(r.provider, []).append((float(r.metric.split("@")[1]), r.value / unit))
    for provider in sorted(points, key=place):
        x, y = np.array(sorted(points[provider])).T
        axes.plot(x, y, "o", color=colour(provider), markersize=5, label=provider)
        if len(x) > 1:
            axes.plot(x, np.polyval(np.polyfit(x, y, 1), x), color=colour(provider), linewidth=1.2)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_visible(bool(points))
