"""Models of one or more runs side by side on the validation rows that they share, with intervals of the differences.

Runs whose configs differ only in the seed form one side: its values are means over seeds. A difference is the second
side's value minus the first's, seed by seed and row by row if both have the same ones. Its interval is over resampled
rows and over seeds (see `intervals`). It has 95 % confidence for the three measures of a pair together, so each has
1 - 0.05 / 3. If the interval holds 0, the verdict is that there is no difference. With one seed on both sides, the
interval does not cover the effect of seeds. Two seeds hardly bound it: Student's t is then 38 standard errors wide, so
where only that hides a difference, the verdict is that there are too few seeds to tell. A run's seed also chooses its
validation rows: if two models share less than half of them, the rows of each are resampled separately, which makes the
interval wider.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from srd_fast.errors import UserError
from srd_fast.report.answers import NAMES
from srd_fast.report.intervals import FloatArray, Measured, difference_interval
from srd_fast.report.read import Metrics, read_metrics
from srd_fast.report.sides import (
    MEASURES,
    Given,
    Measure,
    Model,
    labels_of,
    mean_and_deviation,
    measured,
    read_models,
    sides_of,
)

LEVEL = 1 - 0.05 / 3
# With fewer rows, no interval is computed.
LEAST_ROWS = 10
# Models are compared on the rows that they share if these are at least this part of the rows of each.
_SHARED_PART = 0.5


@dataclass(frozen=True)
class Difference:
    """The difference of a measure between two models.

    Args:
        measure: the measure.
        first: the first model's value.
        second: the second's.
        low: the lower end of the interval of second - first.
        high: its upper end.
        reason: why it is not compared, else empty.
        few_seeds: whether the interval would not hold 0 if its part over seeds, of one degree of freedom, was left out.
    """

    measure: Measure
    first: float
    second: float
    low: float = math.nan
    high: float = math.nan
    reason: str = ""
    few_seeds: bool = False

    @property
    def holds_zero(self) -> bool:
        """Whether no difference is shown."""
        return self.low <= 0 <= self.high

    @property
    def verdict(self) -> str:
        """The verdict in words: "better", "worse" or "no difference"; or why there is none."""
        if self.reason:
            return self.reason
        if self.holds_zero:
            return "too few seeds to tell" if self.few_seeds else "no difference"
        return "better" if (self.low > 0) == self.measure.higher_is_better else "worse"


@dataclass(frozen=True)
class Pair:
    """The second of two models compared with the first.

    Args:
        first: the first model's label.
        second: the second model's label.
        num_rows: number of validation rows, for each seed, that both have; 0 if each is measured on its own rows.
        num_seeds: numbers of seeds of the first and of the second.
        paired: whether they are compared seed by seed, so that both have the same number.
        differences: one for each of `MEASURES`.
    """

    first: str
    second: str
    num_rows: int
    num_seeds: tuple[int, int]
    paired: bool
    differences: list[Difference]

    @property
    def basis(self) -> str:
        """The rows and seeds of the comparison, in words."""
        rows = f"{self.num_rows:,} rows" if self.num_rows else "each on validation rows of its own"
        if max(self.num_seeds) == 1:
            return rows
        first, second = self.num_seeds
        return f"{rows}, " + (f"{first} seeds in pairs" if self.paired else f"{second} against {first} seeds")


@dataclass(frozen=True)
class Comparison:
    """Every model with its values over the rows that all models have, and the pairs.

    Args:
        shared: the ids of those rows; empty if there are too few, so that each model's values are over its own rows.
        given: the models.
        pairs: the comparisons of two models.
        prompts: sample_id -> prompt, if the first run has them.
        references: sample_id -> references.
        metrics: what each run measured during training, by its label.
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
    def models(self) -> list[tuple[str, list[str]]]:
        """The label of each model, and its `MEASURES` over the shared rows as text; mean ± deviation over seeds."""
        return [(m.label, [_of_seeds(x, m.values(x, self.shared)) for x in MEASURES]) for m in self.given]


def _of_seeds(measure: Measure, values: Sequence[float]) -> str:
    mean, deviation = mean_and_deviation(values)
    return measure.text(mean) + ("" if math.isnan(deviation) else f" ± {measure.text(deviation)}")


def compare_runs(runs: Sequence[str]) -> Comparison:
    """Compare the distilled students of runs, each with its starting student, and all with the first.

    Runs whose configs differ only in the seed form one side. If all do, they are also compared with each other.

    Args:
        runs: run folders. FOLDER:start, FOLDER:student and FOLDER:teacher are one model of a run.

    Returns:
        The comparison.

    Raises:
        UserError: a folder is not a run folder, lacks measures of single rows, or only one model is given.
    """
    chosen = [read_models(given) for given in runs]
    of_given = [[(one.run.resolve(), one.name) for one in models] for models in chosen]
    for number, models in enumerate(of_given):
        if models in of_given[:number]:
            raise UserError(f"{runs[number]} is given twice; give each run once")
    labels = dict(zip(runs, labels_of([models[0].run for models in chosen])))
    of_run = {id(models): label for models, label in zip(chosen, labels.values())}
    sides = [_side(side, of_run[id(side[0])]) for side in sides_of(chosen)]
    if len(sides) == 1 and len(chosen) > 1:
        sides += [_side([models], of_run[id(models)]) for models in chosen]
        pairs = [(one[0], one[-1]) for one in sides if len(one) > 1]
        pairs += [(sides[1][-1], one[-1]) for one in sides[2:]]
    else:
        pairs = [(one[0], one[-1]) for one in sides if len(one) > 1]
        pairs += [(sides[0][-1], one[-1]) for one in sides[1:]]
    if not pairs:
        raise UserError(f"{runs[0]} is one model: give a run folder, or two models")
    everything = list(chain.from_iterable(sides))
    prompts, references = chosen[0][0].prompts, chosen[0][0].references
    found = {of_run[id(models)]: read_metrics(models[0].run / "metrics.jsonl") for models in chosen}
    metrics = {label: x for label, x in found.items() if x is not None}
    made = [compare_models(*pair) for pair in pairs]
    return Comparison(_shared(everything), everything, made, prompts, references, metrics)


def _side(runs: Sequence[Sequence[Given]], label: str) -> list[Model]:
    """The models of runs that differ only in their seed."""
    seeds = f" ({len(runs)} seeds)" if len(runs) > 1 else ""
    return [Model(f"{label}{seeds}, {NAMES[of_seeds[0].name]}", list(of_seeds)) for of_seeds in zip(*runs, strict=True)]


def _shared(models: Sequence[Model]) -> list[str]:
    """The rows that all models have; empty if these are too few although each model has enough.

    Rows of the same id whose references differ are not the same.
    """
    first, *others = [one for model in models for one in model.of_seeds]
    shared = [x for x in first.rows.index if all(one.has(x, first.references.get(x)) for one in others)]
    fewest = min(len(one.rows.index) for one in (first, *others))
    return [] if len(shared) < max(_SHARED_PART * fewest, min(LEAST_ROWS, fewest)) else shared


def compare_models(first: Model, second: Model) -> Pair:
    """Compare the second model with the first, in pairs of seeds and rows if both have the same ones.

    Args:
        first: a model.
        second: another, of runs with the same teacher if their KL is to be compared.
    """
    seeds = [one.seed for one in first.of_seeds], [one.seed for one in second.of_seeds]
    same = None not in seeds[0] and set(seeds[0]) == set(seeds[1])
    paired = same or len(seeds[0]) == len(seeds[1]) == 1
    if same:
        by_seed = {one.seed: one for one in second.of_seeds}
        second = Model(second.label, [by_seed[seed] for seed in seeds[0]])
    rows, num_rows = _rows_of_seeds(first, second, paired)
    counts = len(first.of_seeds), len(second.of_seeds)
    differences = []
    for measure in MEASURES:
        sides = [
            [measured(one.rows, measure, ids) for one, ids in zip(model.of_seeds, of_model)]
            for model, of_model in zip((first, second), rows)
        ]
        before, after = (mean_and_deviation([x.mean for x in side])[0] for side in sides)
        reason = ""
        if first.teacher != second.teacher and (measure.field == "kl" or (measure.of_tokens and not num_rows)):
            reason = "not comparable: other teachers"
        elif measure.of_tokens and _counted_otherwise(chain.from_iterable(sides)):
            reason = "not comparable: other tokens"
        elif not (measure.of_tokens or _answered_alike(first, second)):
            reason = "not comparable: answered or scored with other settings"
        elif math.isnan(before + after):
            reason = "not measured"
        elif math.isinf(before) or math.isinf(after):
            reason = "not finite"
        elif min(np.count_nonzero(x.weights) for side in sides for x in side) < LEAST_ROWS:
            reason = "too few rows to tell"
        if reason:
            differences.append(Difference(measure, before, after, reason=reason))
            continue
        low, high = difference_interval(sides[0], sides[1], LEVEL, paired)
        few = low <= 0 <= high and counts in ({(2, 2)} if paired else {(1, 2), (2, 1)})
        if few:
            of_rows = difference_interval(sides[0], sides[1], LEVEL, paired, seeds=False)
            few = not of_rows[0] <= 0 <= of_rows[1]
        differences.append(Difference(measure, before, after, low, high, few_seeds=few))
    return Pair(first.label, second.label, num_rows, counts, paired, differences)


def _rows_of_seeds(first: Model, second: Model, paired: bool) -> tuple[list[list[Sequence[str]]], int]:
    """For each seed of each model, the rows on which it is measured; and the lowest number that both models share."""
    shared = _shared([first, second])
    if shared:
        return [[shared] * len(model.of_seeds) for model in (first, second)], len(shared)
    own: list[list[Sequence[str]]] = [[list(x.rows.index) for x in model.of_seeds] for model in (first, second)]
    if not paired:
        return own, 0
    of_pairs = [_shared([Model("", [x]), Model("", [y])]) for x, y in zip(first.of_seeds, second.of_seeds)]
    if not all(of_pairs):
        return own, 0
    return [[*of_pairs], [*of_pairs]], min(map(len, of_pairs))


def _answered_alike(first: Model, second: Model) -> bool:
    """Whether all answers were made and scored with the same settings, as far as these are known."""
    return all(one.answers_like(other) for one in first.of_seeds for other in second.of_seeds)


def _counted_otherwise(given: Iterable[Measured]) -> bool:
    """Whether the same rows have different numbers of tokens."""
    of_rows: dict[tuple[str, ...], FloatArray] = {}
    return any(not np.array_equal(of_rows.setdefault(x.rows, x.weights), x.weights) for x in given)


def comparison_text(comparison: Comparison) -> str:
    """The comparison as lines for a terminal.

    Args:
        comparison: the result of `compare_runs`.

    Returns:
        Several lines.
    """
    titles = [f"{m.title} ({m.unit})" for m in MEASURES]
    table = [["", *titles], *([label, *values] for label, values in comparison.models)]
    of = f"{comparison.num_rows} validation rows that all have" if comparison.shared else "each on its validation rows"
    lines = [of, *_aligned(table)]
    for pair in comparison.pairs:
        lines += ["", *pair_lines(pair)]
    if any(max(pair.num_seeds) == 1 for pair in comparison.pairs):
        lines += ["", "With one seed, an interval does not hold what another seed of training would give."]
    return "\n".join(lines)


def pair_lines(pair: Pair) -> list[str]:
    """A pair as lines for a terminal."""
    rows = [[f"  {d.measure.title}", change(d), interval(d), d.verdict] for d in pair.differences]
    return [f"{pair.second} against {pair.first}, {pair.basis}", *_aligned(rows)]


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
