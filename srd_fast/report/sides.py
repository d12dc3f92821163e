"""The models that are compared: those of single runs, and of runs that differ by the seed alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from srd_fast.errors import UserError
from srd_fast.report.answers import NAMES, RowMeasures, read_answers
from srd_fast.report.files import read_json, read_text
from srd_fast.report.intervals import FloatArray, Measured

# Keys of a run's config that say nothing about what its students are worth.
_ASIDE = ("seed", "output_dir", "controls")


@dataclass(frozen=True)
class Measure:
    """What is compared. of_tokens: a sum over tokens, divided by their number; else a mean over rows."""

    field: str
    title: str
    unit: str
    scale: float
    digits: int
    of_tokens: bool
    higher_is_better: bool

    def text(self, value: float, sign: bool = False) -> str:
        """The value as it is shown; a dash if it was not measured."""
        return "–" if math.isnan(value) else format(self.scale * value, f"{'+' if sign else ''}.{self.digits}f")


MEASURES = (
    Measure("kl", "KL to the teacher", "nats per token", 1.0, 3, True, False),
    Measure("cross_entropy", "cross-entropy", "nats per token", 1.0, 3, True, False),
    Measure("rouge_l", "ROUGE-L", "points", 100.0, 1, False, True),
)


@dataclass(frozen=True)
class Given:
    """One model of one run.

    Args:
        run: the run folder.
        name: "teacher", "start" or "student".
        config: of the run; empty where it has none.
        teacher: its name.
        rows: measures on the run's validation rows.
        table: these rows, where the run has them.
    """

    run: Path
    name: str
    config: dict[str, Any]
    teacher: str
    rows: RowMeasures
    table: pa.Table | None

    @property
    def seed(self) -> int | None:
        """The run's; None where its config does not say it."""
        return self.config.get("seed")


@dataclass(frozen=True)
class Model:
    """A model, once for each seed.

    Args:
        label: what it is called.
        of_seeds: the models of single runs.
    """

    label: str
    of_seeds: list[Given]

    @property
    def teacher(self) -> str:
        """Its name; of several all names."""
        return ", ".join(dict.fromkeys(one.teacher for one in self.of_seeds))

    @property
    def rows(self) -> list[str]:
        """The ids of the rows that all of its seeds have."""
        first, *others = (one.rows.index for one in self.of_seeds)
        return [x for x in first if all(x in index for index in others)]

    def values(self, measure: Measure, rows: Sequence[str]) -> list[float]:
        """The measure of each seed over these rows; without any, over its own."""
        return [measured(one.rows, measure, rows).mean for one in self.of_seeds]

    def by_row(self, field: str, rows: Sequence[str]) -> FloatArray:
        """Of each row the mean over seeds of a field of its measures."""
        return np.mean([getattr(x.rows, field)[[x.rows.index[i] for i in rows]] for x in self.of_seeds], axis=0)


def measured(rows: RowMeasures, measure: Measure, ids: Sequence[str] = ()) -> Measured:
    """One measure of one model over some of its rows; without ids, over all."""
    chosen = tuple(ids or rows.index)
    at = [rows.index[x] for x in chosen]
    weights = rows.num_tokens[at] if measure.of_tokens else np.ones(len(at))
    return Measured(chosen, getattr(rows, measure.field)[at], weights)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Of a measure over seeds; the deviation is NaN with fewer than two."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def read_models(given: str) -> list[Given]:
    """Start and student of a run, or one model of it.

    Args:
        given: a run folder, or FOLDER:start, FOLDER:student, FOLDER:teacher.

    Returns:
        The models.

    Raises:
        UserError: the folder is not that of a run, or lacks measures of single rows.
    """
    folder, _, name = given.rpartition(":")
    if name not in NAMES or not folder:
        folder, name = given, ""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: there is no such run folder")
    wanted = [name] if name else ["start", "student"]
    answers = read_answers(path)
    lacking = [n for n in wanted if answers is None or n not in answers.models]
    if answers is None or lacking:
        done = (path / "evaluation.json").is_file()
        raise UserError(
            f"{path}: evaluation.json {'holds no measures of single rows' if done else 'is missing'} "
            f"({', '.join(NAMES[n] for n in lacking)}): srd-fast evaluate {path / 'config.yaml'}"
            f"{' --force' if done else ''} writes them"
        )
    summary = read_json(path / "summary.json")
    teacher = "" if summary is None else summary.text("teacher")
    config = _made_from(path)
    return [Given(path, n, config, teacher, answers.models[n], answers.table) for n in wanted]


def _made_from(path: Path) -> dict[str, Any]:
    """The config of a run; of a control with what its run's config has where the control's follows from the run's plan.

    The plans of two seeds keep other numbers of rows where a knee or a band decides.
    """
    own, above = _config(path / "config.yaml"), path.absolute().parent
    run = _config(above.parent / "config.yaml") if above.name == "controls" else {}
    if path.absolute().name not in (run.get("controls") or ()):
        return own
    epochs = "epochs_per_stage"
    distill = {name: value for name, value in (own.get("distill") or {}).items() if name != epochs}
    of_run = run.get("distill") or {}
    distill |= {epochs: of_run[epochs]} if epochs in of_run else {}
    return {**own, "curate": run.get("curate"), "distill": distill, "control": path.absolute().name}


def _config(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        content = {} if text is None else yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a config")
    return content


def sides_of(runs: Sequence[Sequence[Given]]) -> list[list[Sequence[Given]]]:
    """Runs that differ by the seed alone, together, in the order in which they are given.

    A seed that comes twice begins a side of its own, as does a run without a config.

    Args:
        runs: the chosen models of each.
    """
    sides: list[list[Sequence[Given]]] = []
    for models in runs:
        fits = (side for side in sides if _alike(side[0][0], models[0]) and _lacks(side, models[0].seed))
        side = next(fits, None)
        if side is None:
            sides.append([models])
        else:
            side.append(models)
    return sides


def _alike(one: Given, other: Given) -> bool:
    compared = (one.config.keys() | other.config.keys()) - {*_ASIDE}
    same = all(one.config.get(key) == other.config.get(key) for key in compared)
    return bool(one.config) and one.name == other.name and same


def _lacks(side: Sequence[Sequence[Given]], seed: int | None) -> bool:
    return seed is not None and all(models[0].seed != seed for models in side)


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-length:]).lstrip("/") for p in parts]
