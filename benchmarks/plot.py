"""Figures of the committed rows, one SVG file each; nothing is measured here.

    python -m benchmarks.plot                       # benchmarks/results -> docs/figures
    python -m benchmarks.plot --results FOLDER --figures FOLDER

The same rows give the same bytes. A figure whose rows are not there is left out, with a printed line that says why.
"""

import re
import textwrap
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from .command_line import command_line
from .drawing import WIDTH, bar_figure, draw_line, house_style, save, set_title
from .panels import Panel, by_four, metric_panels, rows_of, shape_panels, spans, split, title_of
from .plan import STEP
from .rows import Row

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
MIB = 2.0**20


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
    most: dict[str, int] = {}
    for r in found:
        most[r.machine] = max(most.get(r.machine, 0), sizes.get(r.shape, 0))
    found = [r for r in found if sizes.get(r.shape) == most[r.machine]]

    def panel(title: str, part: list[Row]) -> Panel:
        return Panel(title, "tokens per second", spans(part, "tokens_per_second"), "{:.1f}")

    title = "Speed of the reflection's generation: SRD-Fast's engines beside the script"
    return bar_figure(title, found, shape_panels(found, panel))


def evidence(folder: Path) -> Figure:
    """What students are worth, and by how much they differ from full KD and from random dropping."""
    labels = {
        "kl": "KL to the teacher\n(nats per token)\nlower is better",
        "rouge_l": "ROUGE-L\n(0 to 1)\nhigher is better",
        "kl_vs_full": "KL minus\nthat of full KD\n(nats per token)\nleft of 0 is better",
        "kl_vs_random": "KL minus that of\nrandom dropping\n(nats per token)\nleft of 0 is better",
    }
    found = rows_of(folder, "evidence", *labels)

    def panels(part: list[Row]) -> list[Panel]:
        marks = {m: 0.0 if "_vs_" in m else None for m in labels}
        return [Panel("", labels[m], spans(part, m), "{:.3f}", dots=True, mark=marks[m]) for m in labels]

    title = "Students on held-out rows: means and standard deviations over seeds; differences with their intervals"
    return bar_figure(title, found, metric_panels(found, panels))


GROWING = {"N": "N (rows)", "V": "V (classes)", "D": "D (width)", "samples": "samples (number)"}


def scale(folder: Path) -> Figure:
    """Seconds and memory against the size that grows."""
    found = rows_of(folder, "scale", "seconds@", "extra_peak_bytes@", "r_squared")
    parts = split(found, lambda r: (r.machine, r.dtype, str([*GROWING, r.case].index(r.case)), r.case, r.shape))
    blocks = by_four(parts)
    columns = max(map(len, blocks))
    figure = Figure(figsize=(WIDTH, 1.0 + 4.6 * len(blocks)), layout="constrained")
    set_title(figure, "Time and peak memory as one size grows, with least-squares lines", found)
    cells = figure.add_gridspec(2 * len(blocks), columns)
    for i, block in enumerate(blocks):
        for j, part in enumerate(block):
            upper, lower = (figure.add_subplot(cells[2 * i + k, j]) for k in range(2))
            size = GROWING.get(part[0].case, part[0].case)
            draw_line(upper, part, "seconds", (size, "time (seconds)"), 1.0)
            draw_line(lower, part, "extra_peak_bytes", (size, "peak memory (MiB)"), MIB)
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
    "evidence": evidence,
}


def draw(results: Path, figures: Path, only: Collection[str] = tuple(DRAWINGS)) -> None:
    """Every figure whose rows are there, or some of them."""
    figures.mkdir(parents=True, exist_ok=True)
    with house_style():
        for name in only:
            drawing, path = DRAWINGS[name], figures / f"{name}.svg"
            try:
                figure = drawing(results)
            except LookupError as reason:
                print(f"{path.name} left out: {reason}")
                continue
            save(figure, path)
            print(f"{path} drawn")


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    o = parser.parse_args()
    draw(o.results, o.figures)


if __name__ == "__main__":
    main()
