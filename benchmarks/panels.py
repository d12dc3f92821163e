"""Rows to panels: which rows a figure is of, how they share panels, and what each panel shows."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .rows import Row, natural, read

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


def rows_of(folder: Path, benchmark: str, *metrics: str) -> list[Row]:
    """Of a benchmark's file, LookupError where none has one of the metrics (given by how they begin)."""
    path = folder / f"{benchmark}.csv"
    found = read(path)
    if not found:
        raise LookupError(f"no rows in {path.name}")
    if not any(r.metric.startswith(metrics) for r in found):
        raise LookupError(f"no {' or '.join(metrics)} in {path.name}")
    return [r for r in found if r.metric.startswith(metrics)]


def split(found: Iterable[Row], key: Callable[[Row], tuple[str, ...]]) -> list[list[Row]]:
    """Rows by a key, in its natural order."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for r in found:
        parts.setdefault(key(r), []).append(r)
    return [parts[k] for k in sorted(parts, key=lambda k: tuple(map(natural, k)))]


def by_dtype(found: Iterable[Row]) -> list[list[Row]]:
    """Rows of one machine and dtype: a row of panels."""
    return split(found, lambda r: (r.machine, r.dtype))


def by_shape(found: Iterable[Row]) -> list[list[Row]]:
    """Rows of one shape: a panel."""
    return split(found, lambda r: (r.shape,))


def by_four(parts: list[list[Row]]) -> list[list[list[Row]]]:
    """At most four panels stand side by side."""
    return [parts[i : i + 4] for i in range(0, len(parts), 4)]


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
        low = values.get((case, provider, f"{metric}_p20"), values.get((case, provider, f"{metric}_low"), middle - sd))
        high = values.get(
            (case, provider, f"{metric}_p80"), values.get((case, provider, f"{metric}_high"), middle + sd)
        )
        drawn[case, provider] = middle / one, low / one, high / one
    return drawn


def title_of(part: list[Row], found: list[Row]) -> str:
    """What a panel's rows have in common, the machine where it is not in the figure's title alone."""
    several = len({r.machine for r in found}) > 1
    return ", ".join([part[0].shape, part[0].dtype] + [part[0].machine] * several)


def shape_panels(found: list[Row], panel: Callable[[str, list[Row]], Panel]) -> list[list[Panel]]:
    """A panel for each machine, dtype and shape, made from its title and rows."""
    grid = [parts for same in by_dtype(found) for parts in by_four(by_shape(same))]
    return [[panel(title_of(part, found), part) for part in parts] for parts in grid]


def metric_panels(found: list[Row], panels: Callable[[list[Row]], list[Panel]]) -> list[list[Panel]]:
    """A row of panels, one a metric, for each machine, dtype and shape; the first has the title."""
    parts = [part for same in by_dtype(found) for part in by_shape(same)]
    grid = [[p for p in panels(part) if p.spans] for part in parts]
    return [[replace(p, title=title_of(part, found)) for p in made[:1]] + made[1:] for made, part in zip(grid, parts)]
