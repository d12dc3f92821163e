"""Figures of the committed rows, one SVG file each; nothing is measured here.

    python -m benchmarks.plot                       # benchmarks/results -> benchmarks/figures
    python -m benchmarks.plot --results FOLDER --figures FOLDER

The same rows give the same bytes. A figure whose rows are not there is left out, with a printed line that says why.
"""

import argparse
import math
import re
import textwrap
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from .plan import STEP
from .providers import CE_ONLY
from .rows import RESULTS, Row, read

FIGURES = Path(__file__).parent / "figures"
WIDTH, PITCH = 9.0, 0.145  # inches: of a figure, of one bar with its name
MIB = 2.0**20
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind text, so that no line crosses it
INK, MUTED = "#1f2328", "#57606a"
# In the order in which bars stand. Strong for this library, grey for what everyone writes first.
COLOURS = {
    "gemms": "#30363d",
    "srd-fast": "#d55e00",
    "srd-fast, 128 MiB": "#a34700",
    "srd-fast, 70 % ignored": "#eb9c63",
    "se-kd": "#e6a700",
    "plain": "#8b939c",
    "plain, compiled": "#b9bfc6",
    "plain loop": "#8b939c",
    "script": "#8b939c",
    "liger-kernel": "#7aa6c8",
    "liger-kernel fused": "#4d7fa8",
    "trl chunked": "#4f9a8a",
    "trl gkd": "#9fcfc0",
    "torchtune": "#b08cc0",
    CE_ONLY: "#cdbf6d",
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

Spans = dict[tuple[str, str], tuple[float, float, float]]
"""By case and provider: a value and both ends of its error bar."""


@dataclass(frozen=True)
class Panel:
    """Horizontal bars, or dots where the axis need not start at 0. label: of the axis. text: how a value is written.
    mark: where a line stands. at_least: whose values are where the search ended."""

    title: str
    label: str
    spans: Spans
    text: str = "{:.2f}"
    log: bool = False
    dots: bool = False
    mark: float | None = None
    at_least: frozenset[tuple[str, str]] = frozenset()


# Rows


def rows_of(folder: Path, benchmark: str, *metrics: str) -> list[Row]:
    """Of a benchmark's file, LookupError where none has one of the metrics (given by how they begin)."""
    path = folder / f"{benchmark}.csv"
    found = read(path)
    if not found:
        raise LookupError(f"no rows in {path.name}")
    if not any(r.metric.startswith(metrics) for r in found):
        raise LookupError(f"no {' or '.join(metrics)} in {path.name}")
    return [r for r in found if r.metric.startswith(metrics)]


def natural(text: str) -> str:
    """A sort key: numbers by size, shapes by their vocabulary."""
    return re.sub(r"\d+", lambda m: m[0].zfill(12), re.sub(r".*(?=V=\d)", "", text))


def machine(row: Row) -> str:
    """Where it was measured."""
    return f"{row.device}, {row.threads} thread{'s' * (row.threads != 1)}"


def split(found: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> list[list[Row]]:
    """Rows by a key, in its natural order."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for r in found:
        parts.setdefault(key(r), []).append(r)
    return [parts[k] for k in sorted(parts, key=lambda k: tuple(map(natural, k)))]


def by_dtype(found: Iterable[Row]) -> list[list[Row]]:
    """Rows of one machine and dtype: a row of panels."""
    return split(found, lambda r: (machine(r), r.dtype))


def by_shape(found: Iterable[Row]) -> list[list[Row]]:
    """Rows of one shape: a panel."""
    return split(found, lambda r: (r.shape,))


def spans(found: Iterable[Row], metric: str, *, unit: float = 1.0, base: str | None = None) -> Spans:
    """Of one panel, in units, or as multiples of what the provider `base` has in the same case."""
    values = {(r.case, r.provider, r.metric): r.value for r in found}
    drawn: Spans = {}
    for (case, provider, name), middle in values.items():
        if name != metric:
            continue
        one = values.get((case, base, metric)) if base else unit
        if one is None:
            print(f"{metric} of {provider} in {case!r} not drawn: no {base} to compare with")
            continue
        sd = values.get((case, provider, f"{metric}_sd"), 0.0)
        low = values.get((case, provider, f"{metric}_p20"), middle - sd)
        high = values.get((case, provider, f"{metric}_p80"), middle + sd)
        drawn[case, provider] = middle / one, low / one, high / one
    return drawn


# Drawing


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
    where = "; ".join(dict.fromkeys(machine(r) for r in found))
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
            axes.set_title("\n".join(textwrap.wrap(panel.title, letters)))
            name_slots(axes, order, j == 0)
    return figure


def by_four(parts: list[list[Row]]) -> list[list[list[Row]]]:
    """At most four panels stand side by side."""
    return [parts[i : i + 4] for i in range(0, len(parts), 4)]


def title_of(part: list[Row], found: list[Row]) -> str:
    """What a panel's rows have in common, the machine where it is not in the figure's title alone."""
    several = len({machine(r) for r in found}) > 1
    return ", ".join([part[0].shape, part[0].dtype] + [machine(part[0])] * several)


def shape_panels(found: list[Row], panel: Callable[[str, list[Row]], Panel]) -> list[list[Panel]]:
    """A panel for each machine, dtype and shape, made from its title and rows."""
    grid = [parts for same in by_dtype(found) for parts in by_four(by_shape(same))]
    return [[panel(title_of(part, found), part) for part in parts] for parts in grid]


def metric_panels(found: list[Row], panels: Callable[[list[Row]], list[Panel]]) -> list[list[Panel]]:
    """A row of panels, one a metric, for each machine, dtype and shape; the first has the title."""
    parts = [part for same in by_dtype(found) for part in by_shape(same)]
    grid = [[p for p in panels(part) if p.spans] for part in parts]
    return [[replace(p, title=title_of(part, found)) for p in made[:1]] + made[1:] for made, part in zip(grid, parts)]


# Figures


def loss_time(folder: Path, benchmark: str = "loss") -> Figure:
    """Seconds of the loss relative to the four products."""
    found = rows_of(folder, benchmark, "seconds")

    def panel(title: str, part: list[Row]) -> Panel:
        return Panel(title, "time / time of gemms", spans(part, "seconds", base="gemms"), mark=1.0)

    title = "Time of the loss, forward and backward, relative to the matrix products alone (gemms = 1)"
    return bar_figure(f"{title}; 20 % to 80 %", found, shape_panels(found, panel))


def loss_memory(folder: Path, benchmark: str = "loss") -> Figure:
    """Peak memory of the loss."""
    found = rows_of(folder, benchmark, "extra_peak_bytes")

    def panel(title: str, part: list[Row]) -> Panel:
        return Panel(title, "peak (MiB)", spans(part, "extra_peak_bytes", unit=MIB), "{:,.0f}", log=True)

    title = "Peak memory of the loss, forward and backward, beyond inputs, weights and gradients"
    return bar_figure(title, found, shape_panels(found, panel))


def loss_error(folder: Path, benchmark: str = "loss") -> Figure:
    """Error of the gradient."""
    found = rows_of(folder, benchmark, "gradient_error")

    def panel(title: str, part: list[Row]) -> Panel:
        return Panel(title, "relative error (no unit)", spans(part, "gradient_error"), "{:.1e}", log=True)

    title = "Error of the gradient of the hidden states against plain PyTorch in float64"
    return bar_figure(title, found, shape_panels(found, panel))


def largest_rows(folder: Path, benchmark: str = "limits") -> Figure:
    """How many rows fit under a limit of memory."""
    found = rows_of(folder, benchmark, "largest_rows", "searched_to")

    def panel(title: str, part: list[Row]) -> Panel:
        most, ends = spans(part, "largest_rows"), spans(part, "searched_to")
        at_least = frozenset(key for key in most if most[key] == ends.get(key))
        return Panel(title, "largest N (rows)", most, "{:,.0f}", log=True, at_least=at_least)

    title = "Largest N whose loss, forward and backward, fits in so much memory (≥: the search ended there)"
    return bar_figure(title, found, shape_panels(found, panel))


def train(folder: Path, benchmark: str = "train") -> Figure:
    """Time and memory of training steps relative to the plain loop."""
    labels = {"step_seconds": "time / time of plain loop", "peak_bytes": "peak memory / peak memory of plain loop"}
    found = rows_of(folder, benchmark, *labels)

    def panels(part: list[Row]) -> list[Panel]:
        return [Panel("", label, spans(part, m, base="plain loop"), mark=1.0) for m, label in labels.items()]

    title = "Time of a training step and peak memory of its process, relative to the plain loop (= 1)"
    return bar_figure(title, found, metric_panels(found, panels))


def train_gpu(folder: Path) -> Figure:
    """Training steps on a GPU, each side in a process of its own; in turn where there are no such rows."""
    labels = {"step_seconds": ("a step (ms)", 1e-3), "gpu_busy_share": ("GPU busy (%)", 1e-2)}
    labels["peak_bytes"] = ("peak (GiB)", 2.0**30)
    found = [replace(r, case="") for r in rows_of(folder, "train_gpu", *labels) if r.case == STEP]
    if not found:
        return train(folder, "train_gpu")

    def panels(part: list[Row]) -> list[Panel]:
        return [Panel("", label, spans(part, m, unit=unit), "{:,.0f}") for m, (label, unit) in labels.items()]

    title = "A training step on a GPU: its time with 20 % to 80 %, how much of it some kernel runs, and peak memory"
    return bar_figure(title, found, metric_panels(found, panels))


def reflect(folder: Path) -> Figure:
    """Speed of the generation on the most rows."""
    found = rows_of(folder, "reflect", "tokens_per_second")
    sizes = {r.shape: int(m[1]) for r in found if (m := re.search(r"(\d+) rows", r.shape))}
    most = max(sizes.values(), default=None)
    found = [r for r in found if sizes.get(r.shape) == most]

    def panel(title: str, part: list[Row]) -> Panel:
        return Panel(title, "tokens per second", spans(part, "tokens_per_second"), "{:.1f}")

    title = "Speed of the reflection's generation: SRD-Fast's engines beside the script"
    return bar_figure(title, found, shape_panels(found, panel))


def quality(folder: Path) -> Figure:
    """What students are worth and what their training takes."""
    labels = {
        "kl": "KL to the teacher\n(nats per token)\nlower is better",
        "cross_entropy": "cross-entropy\n(nats per token)\nlower is better",
        "rouge_l": "ROUGE-L\n(0 to 1)\nhigher is better",
        "step_seconds": "a training step\n(seconds)\nlower is better",
    }
    found = rows_of(folder, "quality", *labels)

    def panels(part: list[Row]) -> list[Panel]:
        *worth, seconds = labels
        dots = [Panel("", labels[m], spans(part, m), "{:.3f}", dots=True) for m in worth]
        return [*dots, Panel("", labels[seconds], spans(part, seconds), "{:,.2f}")]

    title = "Students on held-out rows, means and standard deviations over seeds, and the time of a training step"
    return bar_figure(title, found, metric_panels(found, panels))


GROWING = {"N": "N (rows)", "V": "V (classes)", "D": "D (width)", "samples": "samples (number)"}


def scale(folder: Path) -> Figure:
    """Seconds and memory against the size that grows."""
    found = rows_of(folder, "scale", "seconds@", "extra_peak_bytes@", "r_squared")
    parts = split(found, lambda r: (machine(r), r.dtype, str([*GROWING, r.case].index(r.case)), r.case, r.shape))
    blocks = by_four(parts)
    columns = max(map(len, blocks))
    figure = Figure(figsize=(WIDTH, 1.0 + 4.6 * len(blocks)), layout="constrained")
    set_title(figure, "Time and peak memory as one size grows, with least-squares lines", found)
    cells = figure.add_gridspec(2 * len(blocks), columns)
    for i, block in enumerate(blocks):
        for j, part in enumerate(block):
            upper, lower = (figure.add_subplot(cells[2 * i + k, j]) for k in range(2))
            draw_line(upper, part, "seconds", "time (seconds)", 1.0)
            draw_line(lower, part, "extra_peak_bytes", "peak memory (MiB)", MIB)
            upper.set_title(scale_title(part, found, int(WIDTH * 72 / 5.6 / columns) - 5))
    dots = {
        str(line.get_label()): line for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "o"
    }
    figure.legend(list(dots.values()), list(dots), loc="outside lower center", ncols=4)
    return figure


def scale_title(part: list[Row], found: list[Row], letters: int) -> str:
    """What grows, what is fixed, how straight the line is."""
    fits = [f"R² {r.value:.4f} ({r.provider})" for r in part if r.metric == "r_squared"]
    lines = [f"{part[0].case} grow{'s' * (part[0].case != 'samples')}", title_of(part, found), *fits]
    return "\n".join(x for line in lines for x in textwrap.wrap(line, letters, break_on_hyphens=False))


def draw_line(axes: Axes, part: list[Row], metric: str, label: str, unit: float) -> None:
    """Points of each provider and their line."""
    points: dict[str, list[tuple[float, float]]] = {}
    for r in part:
        if r.metric.startswith(f"{metric}@") and math.isfinite(r.value):
            points.setdefault(r.provider, []).append((float(r.metric.split("@")[1]), r.value / unit))
    for provider in sorted(points, key=place):
        x, y = np.array(sorted(points[provider])).T
        axes.plot(x, y, "o", color=colour(provider), markersize=5, label=provider)
        if len(x) > 1:
            axes.plot(x, np.polyval(np.polyfit(x, y, 1), x), color=colour(provider), linewidth=1.2)
    axes.set(xlabel=GROWING.get(part[0].case, part[0].case), ylabel=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_visible(bool(points))


DRAWINGS: dict[str, Callable[[Path], Figure]] = {
    "loss_time": loss_time,
    "loss_memory": loss_memory,
    "loss_error": loss_error,
    "limits": largest_rows,
    "loss_gpu_time": partial(loss_time, benchmark="loss_gpu"),
    "loss_gpu_memory": partial(loss_memory, benchmark="loss_gpu"),
    "loss_gpu_error": partial(loss_error, benchmark="loss_gpu"),
    "limits_gpu": partial(largest_rows, benchmark="limits_gpu"),
    "train_gpu": train_gpu,
    "scale": scale,
    "train": train,
    "reflect": reflect,
    "quality": quality,
}


def draw(results: Path, figures: Path) -> None:
    """Every figure whose rows are there."""
    figures.mkdir(parents=True, exist_ok=True)
    # The default style first: a user's own matplotlibrc changes nothing.
    with matplotlib.style.context(["default", STYLE]):
        for name, drawing in DRAWINGS.items():
            path = figures / f"{name}.svg"
            try:
                figure = drawing(results)
            except LookupError as reason:
                print(f"{path.name} left out: {reason}")
                continue
            figure.savefig(path, metadata={"Date": None})
            print(f"{path} drawn")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    o = parser.parse_args()
    draw(o.results, o.figures)


if __name__ == "__main__":
    main()
