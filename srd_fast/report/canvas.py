"""Turns matplotlib figures into small, crisp, reproducible SVG pictures in a wide and a narrow layout."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

INK = "#1f2328"
MUTED = "#656d76"
DROPPED = "#868d95"
LINE = "#3b528b"

# Colours of what surrounds the data.
EDGE, GRID, SHADE = "#c4c9cf", "#e6e8eb", "#f1f2f4"

# One unit of a figure is one CSS pixel, so that text has the same size in the plots as on the page.
WIDE, NARROW = 920, 352
# Resolution of what is drawn as pixels; the coarse one is for so many points that the page would become huge.
RASTER_DPI, COARSE_DPI = 180, 110

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": EDGE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 11.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 11.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.solid_capstyle": "round",
    # Text stays text: small files, the page's own font, sharp at every zoom.
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": EDGE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 11,
    "ytick.color": EDGE,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 11,
}
_FONT = re.compile(r"'DejaVu Sans'[^\";]*sans-serif")
_PAGE_FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
_ATTRIBUTE = re.compile(r'"[^"]*"')
_LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")


@dataclass(frozen=True)
class Picture:
    """One figure as two ``data:`` URIs, for wide and for narrow screens, and its description in words."""

    wide: str
    narrow: str
    alt: str


def picture(draw: Callable[[bool], Figure], alt: str, dpi: int = RASTER_DPI) -> Picture:
    """Call ``draw(narrow)`` for both layouts under the page's style and encode what it draws."""
    # The default style first: a user's own matplotlibrc must not change the page.
    with matplotlib.style.context(["default", STYLE]):
        return Picture(_encode(draw(False), dpi), _encode(draw(True), dpi), alt)


def _encode(figure: Figure, dpi: int) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg_of(figure, dpi).encode()).decode()


def svg_of(figure: Figure, dpi: int = RASTER_DPI) -> str:
    """The figure as SVG; its bytes depend only on the figure."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "srd-fast"}):
        figure.savefig(buffer, format="svg", dpi=dpi, metadata=metadata)
    svg = _FONT.sub(_PAGE_FONT, buffer.getvalue())
    # Nobody sees a hundredth of a pixel. Labels are between the tags, not in attributes, so they stay exact.
    return _ATTRIBUTE.sub(lambda match: _LONG_NUMBER.sub(r"\1", match[0]), svg)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure. width, height: its size in CSS pixels."""
    return Figure(figsize=(width / 72, height / 72), layout="constrained")


def sequence(count: int) -> list[str]:
    """Colours from easy (dark blue) to hard (orange). Their lightness rises too, for readers who are colour-blind."""
    colormap = matplotlib.colormaps["plasma"]
    return [to_hex(colormap(0.04 + 0.7 * i / max(count - 1, 1))) for i in range(count)]


def shade_stages(axes: Axes, bands: list[tuple[float, float, int]], labels: bool) -> None:
    """Tint the span of every stage and mark its border; ``labels`` writes the stage above the axes."""
    if not bands:
        return
    colours = sequence(max(stage for *_, stage in bands))
    span = bands[-1][1] - bands[0][0]
    for i, (start, end, stage) in enumerate(bands):
        colour = colours[stage - 1]
        axes.axvspan(start, end, color=colour, alpha=0.09, linewidth=0)
        if i:
            axes.axvline(start, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
        if labels:
            wide = (end - start) / span > 0.16
            axes.annotate(
                f"stage {stage}" if wide else f"{stage}",
                ((start + end) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=MUTED,
                fontsize=10.5,
            )
