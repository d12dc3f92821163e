"""Models of one or more runs side by side on the validation rows that they share, with intervals of the differences.

A difference is the second model's minus the first's on the same rows. Its interval comes from rows drawn anew, with
replacement, in pairs: what another set of such rows would give. It holds 95 % for the three measures of a pair
together, each at 1 - 0.05 / 3. What lies inside its interval with 0 is said to be none. What another seed of training
would give is another question: it takes runs with other seeds. A run's seed also draws its validation rows: where two
models share too few, the rows of each are drawn apart, which the wider interval pays for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from srd_fast.errors import UserError
from srd_fast.report.answers import NAMES, RowMeasures, ValidationAnswers, read_answers, texts_of
from srd_fast.report.files import read_json
from srd_fast.report.read import FloatArray, Metrics, read_metrics

LEVEL = 1 - 0.05 / 3
RESAMPLES = 4000
# Fewer rows say too little for an interval.
LEAST_ROWS = 10


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
class Model:
    """One model of a run, and its measures on the run's validation rows."""

    label: str
    run: Path
    teacher: str
    rows: RowMeasures

    def value(self, measure: Measure, places: Sequence[int]) -> float:
        """The measure over some of its rows."""
        values = getattr(self.rows, measure.field)[places]
        return float(values.sum() / self.rows.num_tokens[places].sum() if measure.of_tokens else values.mean())


@dataclass(frozen=True)
class Difference:
    """How a measure differs between two models. reason: why it is not compared, else empty."""

    measure: Measure
    first: float
    second: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""

    @property
    def verdict(self) -> str:
        """In one or two words: "better", "worse" or "no difference"; why there is none, if so."""
        if self.reason:
            return self.reason
        if self.low <= 0 <= self.high:
            return "no difference"
        return "better" if (self.low > 0) == self.measure.higher_is_better else "worse"


@dataclass(frozen=True)
class Pair:
    """The second of two models against the first, on the rows that both have; not paired: each on its own."""

    first: str
    second: str
    num_rows: int
    differences: list[Difference]
    paired: bool = True

    @property
    def rows(self) -> str:
        """Which rows it rests on, in words."""
        return f"{self.num_rows:,} rows" if self.paired else "each on validation rows of its own"


@dataclass(frozen=True)
class Comparison:
    """Every model with its values over the rows that all models have, and the pairs.

    Args:
        shared: the ids of those rows; empty if there are too few, and each model's values are over its own rows.
        given: the models.
        pairs: of them.
        prompts: sample_id -> prompt, where the first run has them.
        references: sample_id -> references.
        metrics: what each run measured while training, by its label.
    """

    shared: list[str]
    given: list[Model]
    pairs: list[Pair]
    prompts: dict[str, str]
    references: dict[str, str]
    metrics: dict[str, Metrics]

    @property
    def num_rows(self) -> int:
        """How many rows all models have."""
        return len(self.shared)

    @property
    def models(self) -> list[tuple[str, list[float]]]:
        """The label of each model, and its `MEASURES` over the shared rows."""
        at = [[model.rows.index[x] for x in self.shared or model.rows.index] for model in self.given]
        return [(m.label, [m.value(x, places) for x in MEASURES]) for m, places in zip(self.given, at)]


def compare_runs(runs: Sequence[str]) -> Comparison:
    """Compare the distilled students of runs, each with its starting student, and all with the first.

    Args:
        runs: run folders. FOLDER:start, FOLDER:student and FOLDER:teacher are one model of a run.

    Returns:
        The comparison.

    Raises:
        UserError: a folder is not that of a run, lacks measures of single rows, or only one model is given.
    """
    chosen = [_models(given) for given in _distinct(runs)]
    labels = _labels([models[-1][0] for models in chosen])
    named = [
        [Model(f"{label}, {NAMES[name]}", folder, teacher, rows) for folder, name, teacher, rows, _ in models]
        for label, models in zip(labels, chosen)
    ]
    pairs = [(models[0], models[-1]) for models in named if len(models) > 1]
    pairs += [(named[0][-1], models[-1]) for models in named[1:]]
    if not pairs:
        raise UserError(f"{runs[0]} is one model: give a run folder, or two models")
    everything = list(chain.from_iterable(named))
    shared = _shared(everything)
    table = chosen[0][0][4].table
    prompts, references = ({}, {}) if table is None else texts_of(table)
    found = {label: read_metrics(models[0][0] / "metrics.jsonl") for label, models in zip(labels, chosen)}
    metrics = {label: x for label, x in found.items() if x is not None}
    return Comparison(shared, everything, [_pair(*pair) for pair in pairs], prompts, references, metrics)


def _distinct(runs: Sequence[str]) -> list[str]:
    if len(set(runs)) < len(runs):
        twice = next(x for i, x in enumerate(runs) if x in runs[:i])
        raise UserError(f"{twice} is given twice; give each run once")
    return list(runs)


def _models(given: str) -> list[tuple[Path, str, str, RowMeasures, ValidationAnswers]]:
    """(folder, model's name, teacher, its measures, the run's) of start and student of a run, or of one model."""
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
    return [(path, n, teacher, answers.models[n], answers) for n in wanted]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(set(parts)))
    return ["/".join(p[-length:]).lstrip("/") for p in parts]


def _shared(models: Sequence[Model]) -> list[str]:
    """The rows that all have. Empty if they are too few, although each model has enough."""
    shared = [x for x in models[0].rows.index if all(x in model.rows.index for model in models)]
    apart = len(shared) < LEAST_ROWS <= min(len(model.rows.index) for model in models)
    return [] if apart else shared


def _pair(first: Model, second: Model) -> Pair:
    shared = _shared([first, second])
    at = [[model.rows.index[x] for x in shared or model.rows.index] for model in (first, second)]
    tokens = [model.rows.num_tokens[places] for model, places in zip((first, second), at)]
    differences = []
    for measure in MEASURES:
        before, after = (model.value(measure, places) for model, places in zip((first, second), at))
        reason = ""
        if first.teacher != second.teacher and (measure.field == "kl" or (measure.of_tokens and not shared)):
            reason = "not comparable: other teachers"
        elif measure.of_tokens and shared and not np.array_equal(tokens[0], tokens[1]):
            reason = "not comparable: other tokens"
        elif math.isnan(before + after):
            reason = "not measured"
        elif min(map(len, at)) < LEAST_ROWS:
            reason = "too few rows to tell"
        low = high = math.nan
        if not reason:
            values = [getattr(model.rows, measure.field)[places] for model, places in zip((first, second), at)]
            weights = tokens if measure.of_tokens else [np.ones(len(places)) for places in at]
            if shared:
                low, high = paired_interval(values[1] - values[0], weights[0])
            else:
                low, high = unpaired_interval(values, weights)
        differences.append(Difference(measure, before, after, low, high, reason))
    return Pair(first.label, second.label, len(shared), differences, bool(shared))


def paired_interval(differences: FloatArray, weights: FloatArray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile bootstrap interval of sum(differences) / sum(weights) over rows drawn anew.

    Args:
        differences: [rows] second minus first on the same row.
        weights: [rows] what the sum is divided by: tokens, or ones.
        level: between 0 and 1.

    Returns:
        Its two ends; the same for the same input.
    """
    return _ends(_drawn_anew(differences, weights, np.random.default_rng(0)), level)


def unpaired_interval(
    values: Sequence[FloatArray], weights: Sequence[FloatArray], level: float = LEVEL
) -> tuple[float, float]:
    """The interval of the difference of two such quotients, each over rows of its own.

    Args:
        values: [rows] of the first and of the second.
        weights: [rows] likewise.
        level: between 0 and 1.

    Returns:
        Its two ends; the same for the same input.
    """
    random = np.random.default_rng(0)
    first, second = (_drawn_anew(x, w, random) for x, w in zip(values, weights))
    return _ends(second - first, level)


def _drawn_anew(values: FloatArray, weights: FloatArray, random: np.random.Generator) -> FloatArray:
    """The quotient of the sums of `RESAMPLES` sets of as many rows."""
    count, found = len(values), []
    step = max(1, 2_000_000 // count)
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(0, count, (min(step, RESAMPLES - start), count))
        found.append(values[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(found)


def _ends(found: FloatArray, level: float) -> tuple[float, float]:
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def comparison_text(comparison: Comparison) -> str:
    """The comparison as lines for a terminal.

    Args:
        comparison: what `compare_runs` gave.

    Returns:
        Several lines.
    """
    titles = [f"{m.title} ({m.unit})" for m in MEASURES]
    table = [["", *titles]]
    table += [[label, *(m.text(x) for m, x in zip(MEASURES, values))] for label, values in comparison.models]
    of = f"{comparison.num_rows} validation rows that all have" if comparison.shared else "each on its validation rows"
    lines = [of, *_aligned(table)]
    for pair in comparison.pairs:
        lines += ["", f"{pair.second} against {pair.first}, {pair.rows}"]
        lines += _aligned([[f"  {d.measure.title}", change(d), interval(d), d.verdict] for d in pair.differences])
    return "\n".join(lines)


def change(difference: Difference) -> str:
    """The difference with its sign; a dash if it is not compared."""
    apart = math.nan if difference.reason else difference.second - difference.first
    return difference.measure.text(apart, sign=True)


def interval(difference: Difference) -> str:
    """The interval of the difference; empty if there is none."""
    ends = [difference.measure.text(x, sign=True) for x in (difference.low, difference.high)]
    return "" if math.isnan(difference.low) else f"[{ends[0]}, {ends[1]}]"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        "  ".join(x.ljust(w) if i == 0 or i == 3 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))).rstrip()
        for row in table
    ]
