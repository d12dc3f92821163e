"""Pictures of README and docs, for light and dark, wide and narrow pages: a run's difficulty map, Baby Step's schedule.

python -m benchmarks.picture RUN_FOLDER [--output docs/images]      # without a run folder: the schedule alone
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from srd_fast import SRDConfig, curate
from srd_fast.report.canvas import EDGE, GRID, INK, MUTED, NARROW, SHADE, STYLE, WIDE, new_figure, sequence, svg_of
from srd_fast.report.figures import groups_of, right_edge_of
from srd_fast.report.plots import Group, difficulty_map
from srd_fast.report.read import read_run

# Of what surrounds the data, on a dark page.
DARK = {INK: "#e6edf3", MUTED: "#9198a1", EDGE: "#484f58", GRID: "#30363d", SHADE: "#1c2128"}


def sequence_on_dark(count: int) -> list[str]:
    """Colours from easy (purple) to hard (yellow) that are seen on a dark page."""
    shades = matplotlib.colormaps["plasma"]
    return [to_hex(shades(0.45 + 0.47 * i / max(count - 1, 1))) for i in range(count)]


def on_dark(groups: list[Group]) -> list[Group]:
    """The same rows in colours that are seen on a dark page."""
    seen = sequence_on_dark(sum(group.kept for group in groups))
    return [replace(group, colour=seen[i] if group.kept else "#7d8590") for i, group in enumerate(groups)]


def draw(groups: list[Group], right_edge: float, narrow: bool) -> str:
    """The map with its legend, as SVG."""
    with matplotlib.style.context(["default", STYLE]):
        figure = difficulty_map(groups, right_edge, narrow)
        signs = []
        for group in groups:
            label, marker = f"{group.label} ({len(group.rouge_l)})", "o" if group.kept else "x"
            signs.append(Line2D([], [], linestyle="", marker=marker, color=group.colour, label=label))
        small = {"fontsize": 9.5, "handlelength": 1, "handletextpad": 0.3} if narrow else {}
        legend = figure.axes[0].legend(handles=signs, loc="upper right", frameon=True, borderpad=0.8, **small)
        legend.get_frame().set(facecolor=SHADE, edgecolor="none", alpha=1)
        return svg_of(figure)


def draw_schedule(preset: str, sequence: Callable[[int], list[str]], narrow: bool) -> str:
    """Which subsets are trained on when, in passes over all rows, with what weight and at what temperature."""
    count = 1200
    scores = {"sample_id": [str(i) for i in range(count)], "rouge_l": [1.0 - i / count for i in range(count)]}
    plan = curate({**scores, "cross_entropy": [i / count for i in range(count)]}, keep=0.75, stages=3)
    shares = [len(subset) / count for subset in plan.subsets]
    stages = SRDConfig.from_preset(preset, output_dir="unused", report_to="none").of_stages(len(shares))
    passes = [epochs * sum(shares[: k + 1]) for k, epochs in enumerate(stages.epochs)]
    starts = [sum(passes[:k]) for k in range(len(passes))]
    with matplotlib.style.context(["default", STYLE]):
        figure = new_figure(NARROW, 300) if narrow else new_figure(WIDE, 300)
        axes = figure.subplots()
        colours = sequence(len(shares))
        between, margin, top = ("\n", 1.34, 1.26) if narrow else (", ", 1.11, 1.2)
        for k, (start, width) in enumerate(zip(starts, passes, strict=True)):
            bottom = 0.0
            for subset in range(k + 1):
                axes.bar(start, shares[subset], width, bottom, align="edge", color=colours[subset], alpha=0.85)
                bottom += shares[subset]
            axes.bar(
                start,
                1 - sum(shares),
                width,
                sum(shares),
                align="edge",
                fill=False,
                hatch="///",
                edgecolor=EDGE,
                linewidth=0,
            )
            axes.text(
                start + width / 2,
                1.04,
                f"stage {k + 1}\nT {stages.temperatures[k]:g}{between}CE {stages.sft_weights[k]:g}",
                ha="center",
                fontsize=10.5,
            )
        bottom = 0.0
        for share, name in zip([*shares, 1 - sum(shares)], ["easiest", "", "hardest kept", "dropped"], strict=True):
            if name:
                axes.text(sum(passes) * 1.01, bottom + share / 2, name, va="center", fontsize=10.5)
            bottom += share
        axes.set(xlim=(0, sum(passes) * margin), ylim=(0, top), ylabel="share of the rows, easy to hard")
        axes.set_xlabel("passes over all rows")
        axes.set_xticks([*starts, sum(passes)])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.grid(False)
        return svg_of(figure)


def save(folder: Path, name: str, light: str, dark: str, narrow: bool) -> None:
    """Write a picture for light pages and one for dark pages, of wide screens or of narrow ones."""
    name += "-narrow" if narrow else ""
    folder.mkdir(parents=True, exist_ok=True)
    for before, after in DARK.items():
        dark = dark.replace(before, after)
    for page, svg in (("light", light), ("dark", dark)):
        (folder / f"{name}-{page}.svg").write_text(svg, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    args = parser.parse_args()
    for narrow in (False, True):
        light, dark = (draw_schedule("paper", colours, narrow) for colours in (sequence, sequence_on_dark))
        save(args.output, "schedule", light, dark, narrow)
    if args.run_folder is None:
        return
    run = read_run(args.run_folder)
    if run.reflections is None:
        parser.error(f"{args.run_folder} has no reflections.parquet")
    groups = [group for group in groups_of(run.reflections, run.plan)[0] if len(group.rouge_l)]
    right_edge, _ = right_edge_of(np.concatenate([group.cross_entropy for group in groups]))
    for narrow in (False, True):
        light, dark = (draw(some, right_edge, narrow) for some in (groups, on_dark(groups)))
        save(args.output, "difficulty", light, dark, narrow)


if __name__ == "__main__":
    main()
