"""The models that are compared: those of single runs, and of runs that differ only in the seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from srd_fast.errors import UserError
from srd_fast.files import content_digest
from srd_fast.report.answers import NAMES, RowMeasures, read_answers, texts_of
from srd_fast.report.files import read_json, read_text
from srd_fast.report.intervals import FloatArray, Measured

# Keys of a run's config that do not matter for the comparison of students.
_ASIDE = ("seed", "output_dir", "controls")
# Keys on which the score of an answer depends, by section.
_ANSWERING = {"evaluate": ("max_new_tokens", "seeds", "temperature"), "reflect": ("rouge_tokenizer",)}


@dataclass(frozen=True)
class Measure:
    """A measure that is compared. of_tokens: whether it is a mean over tokens; otherwise it is a mean over rows."""

    field: str
    title: str
    unit: str
    scale: float
    digits: int
    of_tokens: bool
    higher_is_better: bool

    def text(self, value: float, sign: bool = False) -> str:
        """The displayed value; a dash if it was not measured."""
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
        config: the run's config; empty if it has none.
        teacher: the teacher's name.
        rows: measures on the run's validation rows.
        prompts: sample_id -> prompt of these rows; empty if the run does not have them.
        references: the same of their references.
    """

    run: Path
    name: str
    config: dict[str, Any]
    teacher: str
    rows: RowMeasures
    prompts: dict[str, str]
    references: dict[str, str]

    def has(self, sample_id: str, references: str | None) -> bool:
        """Whether it has a row of this id, with these references if both are known."""
        known = self.references.get(sample_id)
        return sample_id in self.rows.index and (known is None or references is None or known == references)

    @property
    def seed(self) -> int | None:
        """The run's seed; None if its config does not have it."""
        return self.config.get("seed")

    @property
    def answering(self) -> dict[str, Any]:
        """The settings on which the score of an answer depends besides the model, as far as they are known."""
        known: dict[str, Any] = {}
        for key, names in _ANSWERING.items():
            section = self.config.get(key)
            if isinstance(section, dict):
                known |= {name: section[name] for name in names if name in section}
        if not known.get("seeds"):  # greedy
            known.pop("temperature", None)
        return known

    def answers_like(self, other: "Given") -> bool:
        """Whether no setting of the answers is known to be another one than the other's."""
        mine, theirs = self.answering, other.answering
        return all(mine[x] == theirs[x] for x in mine.keys() & theirs.keys())


@dataclass(frozen=True)
class Model:
    """A model, trained once with each seed.

    Args:
        label: its label.
        of_seeds: the models of single runs.
    """

    label: str
    of_seeds: list[Given]

    @property
    def teacher(self) -> str:
        """The teacher's name; if there are several, all names."""
        return ", ".join(dict.fromkeys(one.teacher for one in self.of_seeds))

    def values(self, measure: Measure, rows: Sequence[str]) -> list[float]:
        """The measure of each seed over these rows; over its own rows if there are none."""
        return [measured(one.rows, measure, rows).mean for one in self.of_seeds]

    def by_row(self, field: str, rows: Sequence[str]) -> FloatArray:
        """For each row, the mean over seeds of a field of its measures."""
        return np.mean([getattr(x.rows, field)[[x.rows.index[i] for i in rows]] for x in self.of_seeds], axis=0)


def measured(rows: RowMeasures, measure: Measure, ids: Sequence[str] = ()) -> Measured:
    """One measure of one model over some of its rows; without ids, over all."""
    chosen = tuple(ids or rows.index)
    at = [rows.index[x] for x in chosen]
    weights = rows.num_tokens[at] if measure.of_tokens else np.ones(len(at))
    return Measured(chosen, getattr(rows, measure.field)[at], weights)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a measure over seeds; the deviation is NaN with fewer than two.

    Both are NaN if a seed was not measured.
    """
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else float(np.sum(values))
    known = len(values) > 1 and math.isfinite(mean)
    return mean, statistics.stdev(values) if known else math.nan


def read_models(given: str) -> list[Given]:
    """Read the starting student and the student of a run, or one model of it.

    Args:
        given: a run folder, or FOLDER:start, FOLDER:student, FOLDER:teacher.

    Returns:
        The models.

    Raises:
        UserError: the folder is not a run folder, or lacks measures of single rows.
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
            f"({', '.join(NAMES[n] for n in lacking)}): srd-fast evaluate {path}"
            f"{' --force' if done else ''} writes them"
        )
    summary = read_json(path / "summary.json")
    teacher = "" if summary is None else summary.text("teacher")
    config = _made_from(path)
    _check_config(path)
    texts = ({}, {}) if answers.table is None else texts_of(answers.table)
    return [Given(path, n, config, teacher, answers.models[n], *texts) for n in wanted]


def _check_config(path: Path) -> None:
    """Refuse a run whose config has changed since its models were evaluated: the measures are of other models."""
    steps = read_json(path / "steps.json")
    then = "" if steps is None else steps.child("evaluate").text("config")
    if then and then != content_digest(path / "config.yaml"):
        raise UserError(
            f"{path}: its config has changed since it was evaluated, so the measures are not those of this config; "
            f"srd-fast run {path} brings it to its end"
        )


def _made_from(path: Path) -> dict[str, Any]:
    """The config of a run. For a control, values that follow from its run's plan are replaced by those of its run.

    Otherwise controls of two seeds would differ: with a knee or a band, their plans keep different numbers of rows.
    """
    own, above = _config(path / "config.yaml"), path.absolute().parent
    run = _config(above.parent / "config.yaml") if above.name == "controls" else {}
    controls = run.get("controls")
    if not isinstance(controls, list) or path.absolute().name not in controls:
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
    """Group runs that differ only in the seed, in the order in which they are given.

    A repeated seed, or a run without a config, begins a separate side.

    Args:
        runs: the chosen models of each run.
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
    """The shortest ends of the paths by which the folders can be distinguished."""
    parts = [folder.absolute().parts for folder in folders]
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-length:]).lstrip("/") for p in parts]
