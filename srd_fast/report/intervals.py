"""Intervals of a difference between two models, over validation rows and over seeds of training.

Rows are drawn anew, with replacement, the same ones for all that was measured on them: what another set of such rows
would give. Seeds are few, and of three a bootstrap's 95 % hold 75 %. So what another seed would give comes from
Student's t: to each draw of rows the standard error over seeds is added, times a draw of t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 4000
_DRAWS_OF_T = 8  # for each of them: its ends are rare
_ENTRIES = 2_000_000  # drawn at a time


@dataclass(frozen=True)
class Measured:
    """One measure of one model of one seed: the quotient of two sums over rows.

    Args:
        rows: which rows these are. Where two have the same, both get the same draws of them.
        values: [rows] the measure.
        weights: [rows] what its sum is divided by: tokens, or ones for a mean over rows.
    """

    rows: tuple[str, ...]
    values: FloatArray
    weights: FloatArray

    @property
    def mean(self) -> float:
        """The quotient."""
        return float(self.values.sum() / self.weights.sum())


def difference_interval(
    first: Sequence[Measured], second: Sequence[Measured], level: float, paired: bool
) -> tuple[float, float]:
    """The interval of the second side's mean over seeds minus the first side's.

    Args:
        first: a measure of one side, once for each seed. With one seed on both sides the interval is over rows alone.
        second: the same of the other side.
        level: between 0 and 1.
        paired: whether the i-th of both belong to one seed, so that what a seed does to both cancels.

    Returns:
        Its two ends; the same for the same input.
    """
    streams = {rows: number for number, rows in enumerate(dict.fromkeys(m.rows for m in (*first, *second)))}
    centre = np.zeros(RESAMPLES)
    for sign, side in ((-1, first), (1, second)):
        for one in side:
            centre += sign / len(side) * _drawn_anew(one, np.random.default_rng([0, streams[one.rows]]))
    error, freedom = _over_seeds([m.mean for m in first], [m.mean for m in second], paired)
    if freedom:
        drawn = np.random.default_rng([1]).standard_t(freedom, RESAMPLES * _DRAWS_OF_T)
        centre = np.tile(centre, _DRAWS_OF_T) + error * drawn
    low, high = np.quantile(centre, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _over_seeds(first: Sequence[float], second: Sequence[float], paired: bool) -> tuple[float, int]:
    """The standard error of the difference over seeds, and its degrees of freedom; 0 where nothing tells of seeds."""
    if paired:
        apart = np.subtract(second, first)
        return (float(apart.std(ddof=1)) / math.sqrt(len(apart)), len(apart) - 1) if len(apart) > 1 else (0.0, 0)
    freedom = len(first) + len(second) - 2
    if not freedom:
        return 0.0, 0
    # Both sides are taken to spread alike: one of them may have a single seed.
    squares = sum(len(side) * float(np.var(side)) for side in (first, second))
    return math.sqrt(squares / freedom * (1 / len(first) + 1 / len(second))), freedom


def _drawn_anew(measured: Measured, random: np.random.Generator) -> FloatArray:
    """The quotient over each of `RESAMPLES` sets of as many rows."""
    count, found = len(measured.values), []
    step = max(1, _ENTRIES // count)
    for start in range(0, RESAMPLES, step):
        drawn = random.integers(0, count, (min(step, RESAMPLES - start), count))
        found.append(measured.values[drawn].sum(1) / measured.weights[drawn].sum(1))
    return np.concatenate(found)
