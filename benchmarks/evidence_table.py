"""The lines of `benchmarks.evidence` as rows of the house, its table and its figure.

Differences are seed by seed and row by row, from full KD and from random dropping; their intervals are those of
`srd-fast compare`, over rows drawn anew and over seeds, 95 % for KL, cross-entropy and ROUGE-L together.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srd_fast.report.comparison import LEVEL
from srd_fast.report.intervals import Measured, difference_interval

from .evidence_grid import AS_IT_IS, CELLS, REFERENCES
from .rows import Row, write

MEASURES = ("kl", "cross_entropy", "rouge_l", "numeric_match")
# Of measures over tokens, which are sums in a line's rows.
_OF_TOKENS = ("kl", "cross_entropy")
COSTS = (
    "step_seconds",
    "train_seconds",
    "reflect_seconds",
    "cache_seconds",
    "peak_memory_mb",
    "cache_bytes",
    "joules",
    "seconds",
)

Line = dict[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, without a last one that a kill cut off; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines(keepends=True) if x.endswith("\n")]


def rows_of(lines: Iterable[Line]) -> list[Row]:
    """Every cell's means and deviations over seeds, and its differences from the references."""
    groups: dict[tuple[Any, ...], dict[str, dict[int, Line]]] = {}
    names = ("data", "layers", "teacher", "equal", "steps", "options", "device", "threads")
    for line in lines:
        key = tuple(line[name] for name in names)
        groups.setdefault(key, {}).setdefault(line["cell"], {})[line["seed"]] = line
    found = []
    for key, of_cells in groups.items():
        # Cells of equal seconds stand beside full KD and random dropping of equal passes: theirs are the same.
        passes = groups.get(tuple("passes" if n == "equal" else x for n, x in zip(names, key)), {})
        for name in sorted(of_cells, key=[*CELLS, *of_cells].index):
            figures = _figures(list(of_cells[name].values()))
            for reference, short in REFERENCES.items():
                theirs = of_cells.get(reference) or passes.get(reference)
                if theirs and reference != name:
                    figures |= _differences(theirs, of_cells[name], short)
            found += _rows(key, name, figures, next(iter(of_cells[name].values())))
    return found


def _rows(key: Sequence[Any], name: str, figures: dict[str, float], line: Line) -> list[Row]:
    data, layers, teacher, equal, steps, options, device, threads = key
    case = f"{steps} steps, equal {equal}" + ("" if teacher == AS_IT_IS else f", teacher {teacher}")
    if best := json.loads(options).get("best"):
        case += f", best checkpoint by {best}"
    who = ("evidence", case, f"{data}, {layers} layers", "", device, threads, name, line["version"])
    return [Row(*who, metric, value, line["torch"], line["date"]) for metric, value in figures.items()]


def _figures(lines: Sequence[Line]) -> dict[str, float]:
    sampled = [name for name in lines[0] if name.startswith("sampled_rouge_l@")]
    found: dict[str, float] = {"seeds": len(lines)}
    for name in (*MEASURES, *sampled, "start_kl", "start_rouge_l", "teacher_rouge_l", "best_step"):
        values = [line[name] for line in lines if name in line]
        if values:
            found[name] = statistics.fmean(values)
        if len(values) > 1:
            found[f"{name}_sd"] = statistics.stdev(values)
    for name in COSTS:
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            found[name] = statistics.median(values)
    return found


def _differences(theirs: dict[int, Line], ours: dict[int, Line], short: str) -> dict[str, float]:
    """A cell's figures minus a reference's, with the ends of the interval."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return {}
    found: dict[str, float] = {f"seeds_vs_{short}": len(seeds)}
    sampled = [name for name in ours[seeds[0]] if name.startswith("sampled_rouge_l@")]
    for name in (*MEASURES, *sampled):
        if not all(name in side[seed] for side in (theirs, ours) for seed in seeds):
            continue
        first, second = ([_measured(side[seed], name) for seed in seeds] for side in (theirs, ours))
        apart = statistics.fmean(m.mean for m in second) - statistics.fmean(m.mean for m in first)
        low, high = difference_interval(first, second, LEVEL, paired=True)
        # One seed alone says nothing where there are several, and of sampled answers single rows are not known.
        if len(seeds) == 1 and (name in sampled or len(theirs) + len(ours) > 2):
            low = high = math.nan
        found |= {f"{name}_vs_{short}": apart, f"{name}_vs_{short}_low": low, f"{name}_vs_{short}_high": high}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _measured(line: Line, name: str) -> Measured:
    """A measure on each row; of answers that were sampled their mean alone."""
    values = line["rows"].get(name)
    if values is None:
        return Measured(("all",), np.array([line[name]]), np.ones(1))
    # Of some rows a metric may have nothing to say: they have no weight.
    weights = line["rows"]["num_tokens"] if name in _OF_TOKENS else [x is not None for x in values]
    values = [x or 0.0 for x in values]
    # The rows of a data set and setting are the same in every seed: validation is a file.
    return Measured(tuple(map(str, range(len(values)))), np.array(values, float), np.array(weights, float))


def write_all(folder: Path) -> str:
    """Write evidence.csv, evidence.md and evidence.svg beside the lines; the table."""
    from . import plot, tables

    rows = rows_of(read_lines(folder / "evidence.jsonl"))
    if not rows:
        return "no cell is there yet"
    write(rows, folder)
    text = f"{tables.evidence(rows)}\n{tables.evidence_differences(rows)}"
    (folder / "evidence.md").write_text(text, encoding="utf-8")
    plot.draw(folder, folder, only=["evidence"])
    return text
