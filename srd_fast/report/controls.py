"""A run compared with its controls: the page's section about them, and report.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srd_fast.report.answers import read_answers
from srd_fast.report.comparison import Pair, change, compare_models, interval
from srd_fast.report.differences import differences_view, pairs_view
from srd_fast.report.sides import MEASURES, Model, read_models

# Labels of the controls, by their names in a config.
_LABELS = {"random": "random dropping, random stages", "none": "all rows in every stage"}


@dataclass(frozen=True)
class Controlled:
    """The distilled students of a run and of its controls, and the run compared with each control."""

    models: list[Model]
    pairs: list[Pair]


def read_controls(folder: Path) -> Controlled | None:
    """Read the controls of a run.

    Args:
        folder: the run folder.

    Returns:
        The controls that were evaluated; None if there are none, or if the run itself was not evaluated.

    Raises:
        UserError: a file is damaged.
    """
    folders = {name: folder / "controls" / name for name in _LABELS}
    if not any((path / "summary.json").is_file() for path in folders.values()) or read_answers(folder) is None:
        return None
    ours = Model("this run", read_models(f"{folder}:student"))
    wanted = ours.of_seeds[0].config.get("controls") or ()
    controls = [
        Model(_LABELS[name], read_models(f"{path}:student"))
        for name, path in folders.items()
        if name in wanted and (path / "summary.json").is_file()
    ]
    return Controlled([ours, *controls], [compare_models(x, ours) for x in controls]) if controls else None


def controls_view(controlled: Controlled | None) -> dict[str, Any] | None:
    """The section of the page; None if there are no controls."""
    if controlled is None:
        return None
    values = [(m.label, [x.text(m.values(x, ())[0]) for x in MEASURES]) for m in controlled.models]
    return {
        "sentences": [_sentence(pair) for pair in controlled.pairs],
        "measures": MEASURES,
        "models": values,
        "pairs": pairs_view(controlled.pairs),
        "plot": differences_view(controlled.pairs),
    }


def _sentence(pair: Pair) -> str:
    said = [f"{d.measure.title}: {d.verdict} ({change(d)}, {interval(d) or 'no interval'})" for d in pair.differences]
    return f"Against {pair.first}: {'; '.join(said)}."


def controls_json(folder: Path) -> dict[str, Any]:
    """The content of report.json: values of the run and of its controls, and the differences with their intervals.

    Args:
        folder: the run folder.

    Returns:
        models: label -> measure -> value; differences: for each control and measure the run's value minus the
        control's, both ends of the interval, and the verdict. Units are those of evaluation.json; None: not measured.
    """
    controlled = read_controls(folder)
    if controlled is None:
        return {"models": {}, "differences": []}
    models = {m.label: {x.field: _number(m.values(x, ())[0]) for x in MEASURES} for m in controlled.models}
    differences = [
        {
            "control": pair.first,
            "measure": d.measure.field,
            "difference": _number(d.second - d.first),
            "low": _number(d.low),
            "high": _number(d.high),
            "verdict": d.verdict,
            "rows": pair.num_rows,
        }
        for pair in controlled.pairs
        for d in pair.differences
    ]
    return {"models": models, "differences": differences}


def _number(value: float) -> float | None:
    return value if value == value else None
