"""README's picture: the difficulty map of a run, for light and for dark pages.

python -m benchmarks.picture RUN_FOLDER [--output docs/images]
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from srd_fast.report.canvas import EDGE, GRID, INK, MUTED, SHADE, STYLE, svg_of
from srd_fast.report.figures import groups_of, right_edge_of
from srd_fast.report.plots import Group, difficulty_map
from srd_fast.report.read import read_run

# Of what surrounds the data, on a dark page.
DARK = {INK: "#e6edf3", MUTED: "#9198a1", EDGE: "#484f58", GRID: "#30363d", SHADE: "#1c2128"}


def on_dark(groups: list[Group]) -> list[Group]:
    """The same rows in colours that are seen on a dark page: easy is bright blue, hard is yellow."""
    shades = matplotlib.colormaps["plasma"]
    kept = sum(group.kept for group in groups)
    seen = [to_hex(shades(0.45 + 0.47 * i / max(kept - 1, 1))) for i in range(kept)]
    return [replace(group, colour=seen[i] if group.kept else "#7d8590") for i, group in enumerate(groups)]


def draw(groups: list[Group], right_edge: float) -> str:
    """The map with its legend, as SVG."""
    with matplotlib.style.context(["default", STYLE]):
        figure = difficulty_map(groups, right_edge, narrow=False)
        signs = []
        for group in groups:
            label, marker = f"{group.label} ({len(group.rouge_l)})", "o" if group.kept else "x"
            signs.append(Line2D([], [], linestyle="", marker=marker, color=group.colour, label=label))
        legend = figure.axes[0].legend(handles=signs, loc="upper right", frameon=True, borderpad=0.8)
        legend.get_frame().set(facecolor=SHADE, edgecolor="none", alpha=1)
        return svg_of(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    args = parser.parse_args()
    run = read_run(args.run_folder)
    if run.reflections is None:
        parser.error(f"{args.run_folder} has no reflections.parquet")
    groups = [group for group in groups_of(run.reflections, run.plan)[0] if len(group.rouge_l)]
    right_edge, _ = right_edge_of(np.concatenate([group.cross_entropy for group in groups]))
    args.output.mkdir(parents=True, exist_ok=True)
    light, dark = draw(groups, right_edge), draw(on_dark(groups), right_edge)
    for before, after in DARK.items():
        dark = dark.replace(before, after)
    for name, svg in (("light", light), ("dark", dark)):
        (args.output / f"difficulty-{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
