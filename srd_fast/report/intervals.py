"""Intervals of a difference between two models, over validation rows and over seeds of training.

For the effect of another set of rows, rows are resampled with replacement, the same ones for everything measured on
them. For the effect of other seeds this would not work: there are few, and with three seeds a bootstrap interval of 95
% covers only 75 %. So Student's t is used: to each resampling of rows, the standard error over seeds times a draw of t
is added.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 4000
_DRAWS_OF_T = 8  # for each resampling, because extreme values of t are rare
_ENTRIES = 2_000_000  # numbers drawn at a time


@dataclass(frozen=True)
class Measured:
    """One measure of one model with one seed: the quotient of two sums over rows.

    Args:
        rows: the ids of the rows. Two measures with the same rows get the same resamplings.
        values: [rows] the measure.
        weights: [rows] the denominator's terms: numbers of tokens, or ones for a mean over rows.
    """

    rows: tuple[str, ...]
    values: FloatArray
    weights: FloatArray

    @property
    def mean(self) -> float:
        """The quotient."""
        return float(self.values.sum() / self.weights.sum())


def difference_interval(
    first: Sequence[Measured], second: Sequence[Measured], level: float, paired: bool, seeds: bool = True
) -> tuple[float, float]:
    """The interval of the second side's mean over seeds minus the first side's.

    Args:
        first: a measure of one side, once for each seed. With one seed on both sides the interval is only over rows.
        second: the same measure of the other side.
        level: confidence level, between 0 and 1.
        paired: whether the i-th of both have the same seed, so that a seed's effect on both cancels.
        seeds: whether the interval holds the effect of other seeds too, where there are several.

    Returns:
        The two ends. The same input always gives the same interval.
    """
    streams = {rows: number for number, rows in enumerate(dict.fromkeys(m.rows for m in (*first, *second)))}
    centre = np.zeros(RESAMPLES)
    for sign, side in ((-1, first), (1, second)):
        for one in side:
            centre += sign / len(side) * _drawn_anew(one, np.random.default_rng([0, streams[one.rows]]))
    error, freedom = _over_seeds([m.mean for m in first], [m.mean for m in second], paired)
    if seeds and freedom:
        drawn = np.random.default_rng([1]).standard_t(freedom, RESAMPLES * _DRAWS_OF_T)
        centre = np.tile(centre, _DRAWS_OF_T) + error * drawn
    low, high = np.quantile(centre, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _over_seeds(first: Sequence[float], second: Sequence[float], paired: bool) -> tuple[float, int]:
    """The standard error of the difference over seeds, and its degrees of freedom; 0 if there is only one seed."""
    if paired:
        apart = np.subtract(second, first)
        return (float(apart.std(ddof=1)) / math.sqrt(len(apart)), len(apart) - 1) if len(apart) > 1 else (0.0, 0)
    freedom = len(first) + len(second) - 2
    if not freedom:
        return 0.0, 0
    # Both sides are assumed to have the same variance, because one of them may have a single seed.
    squares = sum(len(side) * float(np.var(side)) for side in (first, second))
    return math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second))), freedom


def _drawn_anew(measured: Measured, random: np.random.Generator) -> FloatArray:
    """The quotient over each of `RESAMPLES` resamplings of the rows."""
    count, found = len(measured.values), []
    step = max(1, _ENTRIES // count)
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(0, count, (min(step, RESAMPLES - start), count))
        found.append(measured.values[drawn].sum(1) / measured.weights[drawn].sum(1))
    return np.concatenate(found)
