"""What every table is made from: the figures of groups of rows, and lines that say where they were measured."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .rows import LEFT_OUT, Row

# provider -> metric -> value
Figures = dict[str, dict[str, float]]
# Machine -> cells.
Line = tuple[str, Sequence[str]]


class Group(NamedTuple):
    """What one run has compared, of a benchmark."""

    case: str
    shape: str
    dtype: str
    machine: str


def groups(rows: Iterable[Row], benchmark: str, **wanted: str) -> dict[Group, Figures]:
    """Figures of each group of a benchmark where the wanted fields are as given."""
    found: dict[Group, Figures] = {}
    for r in rows:
        if r.benchmark == benchmark and all(getattr(r, k) == v for k, v in wanted.items()):
            group = Group(r.case, r.shape, r.dtype, r.machine)
            found.setdefault(group, {}).setdefault(r.provider, {})[r.metric] = r.value
    return found


def reasons(rows: Iterable[Row], benchmark: str) -> dict[tuple[Group, str], str]:
    """Why a provider has no figures in a group, as short as a cell must be."""
    return {
        (Group(r.case, r.shape, r.dtype, r.machine), r.provider): textwrap.shorten(r.note.replace("|", "/"), 80)
        for r in rows
        if (r.benchmark, r.metric) == (benchmark, LEFT_OUT)
    }


def table(head: Sequence[str], body: Iterable[Line]) -> str:
    """Markdown. The machine is a column where there are several."""
    body = list(body)
    several = len({machine for machine, _ in body}) > 1
    lines = [[*([machine] if several else []), *cells] for machine, cells in body]
    head = [*(["machine"] if several else []), *head]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"
