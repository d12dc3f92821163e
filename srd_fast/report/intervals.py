"""Intervals of a difference between two models, over validation rows and over seeds of training.

For the effect of another set of rows, rows are resampled with replacement, the same ones for everything measured on
them. A bootstrap of n rows is too narrow by about sqrt((n - 1) / n) times the quotient of the normal quantile and that
of Student's t (Hesterberg, What teachers should know about the bootstrap, 2015, section 4), so each resampling's
distance from the mean is divided by it. For the effect of other seeds resampling would not work at all: with three
seeds a bootstrap interval of 95 % covers only 75 %. So Student's t is used: to each resampling of rows, the standard
error over seeds times a value of t is added.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 4000
_VALUES_OF_T = 8  # for each resampling, because extreme values of t are rare
_ANGLES = 200_001  # at which the distribution of t is tabulated
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
        """The quotient; NaN if all weights are 0."""
        total = self.weights.sum()
        return float(self.values.sum() / total) if total else math.nan


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
            mean, wider = one.mean, _widening(int(np.count_nonzero(one.weights)), level)
            drawn = _drawn_anew(one, np.random.default_rng([0, streams[one.rows]]))
            centre += sign / len(side) * (mean + wider * (drawn - mean))
    error, freedom = _over_seeds([m.mean for m in first], [m.mean for m in second], paired)
    if seeds and freedom:
        # Not drawn, because the same few extreme draws would be in every interval.
        number = RESAMPLES * _VALUES_OF_T
        values = quantiles_of_t(freedom, (np.arange(number) + 0.5) / number)
        centre = np.tile(centre, _VALUES_OF_T) + error * np.random.default_rng([1]).permutation(values)
    low, high = np.quantile(centre, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def quantiles_of_t(freedom: int, shares: FloatArray) -> FloatArray:
    """Quantiles of Student's t.

    Args:
        freedom: degrees of freedom, at least 1.
        shares: between 0 and 1.

    Returns:
        The value of t below which each share lies, exact to about 1e-6 of it.
    """
    # With t = sqrt(freedom) tan(x), the density of x is proportional to cos(x)^(freedom - 1), which is bounded.
    angles = np.linspace(-math.pi / 2, math.pi / 2, _ANGLES)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * np.tan(np.interp(shares, below / below[-1], angles))


@functools.cache
def _widening(rows: int, level: float) -> float:
    """By how much the interval of a mean of so many rows is wider than that of its bootstrap."""
    if rows < 2:
        return 1.0
    share = (1 + level) / 2
    of_t = float(quantiles_of_t(rows - 1, np.array([share]))[0])
    return math.sqrt(rows / (rows - 1)) * of_t / statistics.NormalDist().inv_cdf(share)


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
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(measured.values[drawn].sum(1) / measured.weights[drawn].sum(1))
    return np.concatenate(found)
