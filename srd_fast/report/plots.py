"""The figures of the page: the difficulty map, and what was measured at every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from srd_fast.report.canvas import INK, LINE, MUTED, NARROW, SHADE, WIDE, new_figure, shade_stages
from srd_fast.report.numbers import title_of
from srd_fast.report.read import VALIDATION_COLUMNS, FloatArray

Band = tuple[float, float, int]

# Rows at exactly 0 and 100 points of ROUGE-L are spread over a separate strip outside of the axis.
STRIP = (3.0, 11.0)
GOLDEN = 0.6180339887498949

# More points would hide one another, and make the page huge.
MOST_POINTS = 8_000

# A line over more steps is drawn as pixels.
LONGEST_LINE = 1000

NICE = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Group:
    """Rows with the same colour on the difficulty map: cross-entropy in nats per token, ROUGE-L in 0..1."""

    label: str
    colour: str
    cross_entropy: FloatArray
    rouge_l: FloatArray
    kept: bool = True


def stage_bands(steps: FloatArray, stages: FloatArray) -> list[Band]:
    """(first step, last step, stage) of every run of steps in one stage, without gaps between them."""
    if not len(steps):
        return []
    borders = np.flatnonzero(np.diff(stages)) + 1
    starts = [float(steps[0]), *((steps[borders - 1] + steps[borders]) / 2)]
    ends = [*starts[1:], float(steps[-1])]
    return [
        (float(start), float(end), int(stages[row]))
        for start, end, row in zip(starts, ends, [0, *borders], strict=True)
    ]


def smooth_by_stage(values: FloatArray, stages: FloatArray) -> FloatArray:
    """Centred moving mean over a fifteenth of the run, never across the border of two stages, whose losses differ."""
    half = max(2, len(values) // 30)
    known = np.isfinite(values)
    smooth = np.full(len(values), np.nan)
    for rows in _stages(stages):
        sums, counts = (
            np.concatenate([[0.0], np.cumsum(column[rows])]) for column in (np.where(known, values, 0), known)
        )
        place = np.arange(len(rows))
        first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(rows))
        count = counts[last] - counts[first]
        smooth[rows] = np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)
    return smooth


def _stages(stages: FloatArray) -> list[npt.NDArray[np.intp]]:
    """The rows of every run of one stage."""
    return np.split(np.arange(len(stages)), np.flatnonzero(np.diff(stages)) + 1)


def frame_of(figure: Figure) -> dict[str, float]:
    """The place of a finished figure's first axes, as shares of it from the upper left, and the ends of the axes."""
    axes = figure.axes[0]
    box = axes.get_position()
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    found = {"left": box.x0, "right": box.x1, "top": 1 - box.y1, "bottom": 1 - box.y0}
    found |= {"x0": x0, "x1": x1, "y0": y0, "y1": y1}
    return {name: round(float(value), 5) for name, value in found.items()}


def difficulty_map(groups: Sequence[Group], right_edge: float, narrow: bool) -> Figure:
    """ROUGE-L against cross-entropy, with a histogram on each axis; points beyond ``right_edge`` are drawn on it."""
    figure = new_figure(NARROW, 400) if narrow else new_figure(WIDE, 560)
    grid = figure.add_gridspec(
        2,
        2,
        width_ratios=(4 if narrow else 6, 1),
        height_ratios=(1, 5 if narrow else 5.5),
        wspace=0.02,
        hspace=0.02,
    )
    axes = figure.add_subplot(grid[1, 0])
    top = figure.add_subplot(grid[0, 0], sharex=axes)
    right = figure.add_subplot(grid[1, 1], sharey=axes)

    _scatter(axes, groups, right_edge, size=10 if narrow else 21)
    for edge in (-STRIP[1], 100 + STRIP[0]):
        axes.axhspan(edge, edge + STRIP[1] - STRIP[0], color=SHADE, linewidth=0, zorder=0)
    middle = sum(STRIP) / 2
    exactly = "=" if narrow else "exactly"
    axes.set_yticks([-middle, 20, 40, 60, 80, 100 + middle], [f"{exactly} 0", "20", "40", "60", "80", f"{exactly} 100"])
    axes.set_ylim(-STRIP[1] - 1.5, 100 + STRIP[1] + 1.5)
    axes.set_xlim(0, right_edge * 1.02)
    axes.set_xlabel("cross-entropy (nats per token)" + ("" if narrow else ", harder to the right"))
    axes.set_ylabel("ROUGE-L (points)" + ("" if narrow else ", harder downwards"))

    columns = np.linspace(0, right_edge, 25 if narrow else 49)
    counts = [np.histogram(np.minimum(g.cross_entropy, right_edge), columns)[0] for g in groups]
    floor = np.zeros(len(columns) - 1)
    for group, count in zip(groups, counts, strict=True):
        top.bar(columns[:-1], count, np.diff(columns) * 0.9, floor, align="edge", color=group.colour)
        floor += count
    _rouge_histogram(right, groups, fontsize=9.5 if narrow else 10.5)
    for margin in (top, right):
        margin.tick_params(labelbottom=False, labelleft=False, length=0)
        margin.grid(False)
        margin.spines[:].set_visible(False)
    top.set_ylabel("rows", color=MUTED, fontsize=10.5)
    right.set_xlabel("rows", color=MUTED, fontsize=10.5)
    return figure


def _scatter(axes: Axes, groups: Sequence[Group], right_edge: float, size: float) -> None:
    total = sum(len(group.rouge_l) for group in groups)
    alpha = float(np.clip(14 / np.sqrt(max(min(total, MOST_POINTS), 1)), 0.12, 0.75))
    for group in groups:
        if not group.kept:
            some = _evenly(len(group.rouge_l), total)
            x = np.minimum(group.cross_entropy, right_edge)[some]
            style: dict[str, Any] = {"marker": "x", "linewidths": 1, "alpha": min(1.0, alpha * 1.6)}
            axes.scatter(x, spread_ties(group.rouge_l)[some], s=size, c=group.colour, rasterized=True, **style)
    kept = [group for group in groups if group.kept]
    if kept:
        x = np.minimum(np.concatenate([group.cross_entropy for group in kept]), right_edge)
        y = np.concatenate([spread_ties(group.rouge_l) for group in kept])
        colours = np.repeat([group.colour for group in kept], [len(group.rouge_l) for group in kept])
        # Drawn in a shuffled order, so that no subset hides another.
        order = np.random.default_rng(0).permutation(len(x))
        order = order[_evenly(len(order), total)]
        axes.scatter(x[order], y[order], s=size, c=colours[order], alpha=alpha, linewidths=0, rasterized=True)


def _evenly(count: int, total: int) -> npt.NDArray[np.int64]:
    """Indices of the points to draw, spread evenly, if there are more than ``MOST_POINTS`` in all."""
    return np.linspace(0, count - 1, min(count, -(-count * MOST_POINTS // max(total, 1)))).astype(np.int64)


def spread_ties(rouge_l: FloatArray) -> FloatArray:
    """Points of ROUGE-L, with exact 0 and 100 spread evenly over their strips."""
    points = rouge_l * 100
    offset = STRIP[0] + 1 + (STRIP[1] - STRIP[0] - 2) * (np.arange(len(points)) * GOLDEN % 1)
    return np.where(rouge_l <= 0, -offset, np.where(rouge_l >= 1, 100 + offset, points))


def _rouge_histogram(axes: Axes, groups: Sequence[Group], fontsize: float) -> None:
    edges = np.arange(0, 101, 5.0)
    floor = np.zeros(len(edges) + 1)
    middle = sum(STRIP) / 2
    centres = np.array([-middle, *(edges[:-1] + 2.5), 100 + middle])
    heights = np.array([STRIP[1] - STRIP[0], *np.full(len(edges) - 1, 4.5), STRIP[1] - STRIP[0]])
    for group in groups:
        inside = group.rouge_l[(group.rouge_l > 0) & (group.rouge_l < 1)] * 100
        zero, one = np.sum(group.rouge_l <= 0), np.sum(group.rouge_l >= 1)
        count = np.array([zero, *np.histogram(inside, edges)[0], one])
        axes.barh(centres, count, heights, floor, color=group.colour)
        floor += count
    for y, value in ((centres[0], floor[0]), (centres[-1], floor[-1])):
        axes.annotate(f"{value:,.0f}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=fontsize)
    axes.set_xlim(0, max(float(floor.max()), 1) * (1.6 if len(f"{floor.max():.0f}") > 3 else 1.4))


def schedule(train: dict[str, FloatArray], bands: list[Band], narrow: bool) -> Figure:
    """Temperature, weight of the SFT loss and learning rate over the steps, one panel each."""
    panels = (
        ("temperature", "temperature T"),
        ("sft_weight", "SFT weight"),
        ("learning_rate", "learning rate"),
    )
    figure = new_figure(NARROW, 330) if narrow else new_figure(WIDE, 330)
    rows = figure.subplots(len(panels), 1, sharex=True)
    for i, (axes, (name, title)) in enumerate(zip(rows, panels, strict=True)):
        shade_stages(axes, bands, labels=i == 0)
        _by_stage(axes, train, train[name], color=LINE, linewidth=2)
        axes.set_title(title, pad=18 if i == 0 else 5)
        axes.yaxis.set_major_locator(MaxNLocator(3, steps=NICE))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.margins(x=0, y=0.18)
    _label_steps(rows[-1])
    return figure


def curves(train: dict[str, FloatArray], validation: dict[str, FloatArray], bands: list[Band], narrow: bool) -> Figure:
    """Training loss and divergence with a smoothed line, what was measured on the validation rows as points."""
    panels = [
        (train, "loss", "training loss"),
        (train, "divergence", "training divergence (nats per token)"),
        (validation, "kl", "validation KL to the teacher (nats per token)"),
        (validation, "cross_entropy", "validation cross-entropy (nats per token)"),
        *((validation, name, f"validation {title_of(name)}") for name in metrics_of_answers(validation)),
    ]
    columns = 1 if narrow else 2
    lines = -(-len(panels) // columns)
    figure = new_figure(NARROW, 190 * lines) if narrow else new_figure(WIDE, 240 * lines)
    grid = figure.subplots(lines, columns, sharex=True, squeeze=False).ravel()
    for spare in grid[len(panels) :]:
        spare.set_visible(False)
    for i, (axes, (source, name, title)) in enumerate(zip(grid, panels)):
        shade_stages(axes, bands, labels=i < (1 if narrow else 2))
        axes.set_title(title, pad=18 if i < (1 if narrow else 2) else 5)
        values = source[name]
        if source is train:
            _by_stage(axes, train, values, color=LINE, linewidth=0.9, alpha=0.35)
            smooth = smooth_by_stage(values, train["stage"])
            _by_stage(axes, train, smooth, color=LINE, linewidth=2)
        else:
            seen = np.isfinite(values)
            dot = "o" if seen.sum() <= 60 else None
            axes.plot(source["step"][seen], values[seen], color=INK, linewidth=1.2, marker=dot, markersize=4.5)
        if not np.isfinite(values).any():
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=MUTED)
            axes.tick_params(labelleft=False)
        axes.margins(x=0.01, y=0.1)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
    for axes in grid[: len(panels)][-columns:]:
        axes.tick_params(labelbottom=True)
        _label_steps(axes)
    return figure


def metrics_of_answers(validation: dict[str, FloatArray]) -> list[str]:
    """Names of the metrics of generated answers that were measured while training."""
    return [name for name in validation if name not in VALIDATION_COLUMNS]


def throughput(train: dict[str, FloatArray], bands: list[Band], narrow: bool) -> Figure:
    """Training speed and memory over the steps."""
    figure = new_figure(NARROW, 400) if narrow else new_figure(WIDE, 230)
    pair = figure.subplots(2, 1, sharex=True) if narrow else figure.subplots(1, 2)
    for i, (axes, name, title) in enumerate(
        zip(pair, ("tokens_per_second", "memory_mb"), ("tokens per second", "memory (MB)"), strict=True)
    ):
        shade_stages(axes, bands, labels=not (narrow and i))
        _by_stage(axes, train, train[name], color=LINE, linewidth=1.4)
        axes.set_title(title, pad=5 if narrow and i else 18)
        axes.margins(x=0.01)
        axes.set_ylim(0, max(1.0, float(np.nanmax(train[name], initial=0))) * 1.12)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=NICE))
    for axes in pair[-1:] if narrow else pair:
        _label_steps(axes)
    return figure


def _by_stage(axes: Axes, train: dict[str, FloatArray], values: FloatArray, **style: Any) -> None:
    """Draw one line for each stage. Nothing is interpolated across a border."""
    for rows in _stages(train["stage"]):
        # A stage with a single step is drawn as a point, because a line would not show it. Long lines become pixels.
        axes.plot(
            train["step"][rows],
            values[rows],
            marker="." if len(rows) == 1 else None,
            rasterized=len(values) > LONGEST_LINE,
            **style,
        )


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=NICE, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
