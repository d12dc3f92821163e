"""From values of signals to ranks; how many of the ranked samples are kept, and where subsets begin."""

import logging
import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from .plan import Signal

logger = logging.getLogger(__name__)

# A difficulty curve that lies less than this below its diagonal has no knee.
MIN_BEND = 0.05


def competition_ranks(values: np.ndarray, higher_is_easier: bool) -> np.ndarray:
    """Rank of each value from 1 = easiest: one more than the number of strictly easier values. Ties share a rank."""
    order = np.argsort(-values if higher_is_easier else values)
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(values)])
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = 1 + np.repeat(starts, np.diff(starts, append=len(values)))
    return ranks


def places_of(kept: int, values: np.ndarray | None, higher_is_easier: bool, seed: int) -> np.ndarray:
    """The kept samples' places in the ranking, sorted by another order.

    Args:
        kept: how many samples are kept.
        values: [kept] values of the signal that orders them, in the ranking's order; None: they are shuffled.
        higher_is_easier: whether high values come first. Equal values keep the ranking's order.
        seed: seed of the shuffling.
    """
    if values is None:
        return np.random.default_rng([seed, kept]).permutation(kept)
    return np.argsort(-values if higher_is_easier else values, kind="stable")


def subset_borders(exact: float, stages: int, floor_subsets: bool) -> list[int]:
    """Positions in the ranking where subsets begin, and where the last one ends. exact: unrounded number to keep."""
    if floor_subsets:
        size = int(exact / stages)
        return [size * s for s in range(stages + 1)]
    kept = math.floor(exact + 1e-9)
    return [round(kept * s / stages) for s in range(stages + 1)]


def knee(values: Mapping[str, np.ndarray], signals: Mapping[str, Signal]) -> int:
    """Number of samples up to the knee of the sorted difficulties; all of them if the curve does not bend."""
    count = len(next(iter(values.values())))
    curve = np.zeros(count)
    for name, signal in signals.items():
        low, high = np.percentile(values[name], (1, 99))
        if low < high:
            scaled = np.clip((values[name] - low) / (high - low), 0, 1)
            curve += signal.weight * (1 - scaled if signal.higher_is_easier else scaled)
    curve.sort()
    height = curve[-1] - curve[0]
    below = np.linspace(0, 1, count) - (curve - curve[0]) / (height or 1)
    at = int(np.argmax(below))
    if height > 0 and below[at] >= MIN_BEND:
        return at + 1
    logger.warning(
        "keep=knee: the difficulties do not bend (%.3f below the diagonal at most, %g is needed), so none is dropped",
        below[at] if height > 0 else 0.0,
        MIN_BEND,
    )
    return count


def rows_by_text(texts: pa.Array) -> tuple[np.ndarray, bool]:
    """Sort rows by their texts in UTF-8, that is by code points.

    Eight bytes at a time are compared as one number, and only among rows that are still equal. That takes half the time
    of Arrow's sort.

    Returns:
        The rows in order, and whether all texts are distinct.
    """
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets or b"\0" * 8, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = np.append(np.frombuffer(content or b"", np.uint8), np.zeros(8, np.uint8))
    words = np.ndarray(len(content) - 7, ">u8", content, strides=(1,))  # a word starting at every byte
    starts, lengths = ends[:-1], np.diff(ends)
    order, tied, group = np.arange(len(texts)), np.arange(len(texts)), np.zeros(len(texts), np.int64)
    for at in range(0, int(lengths.max(initial=0)) + 1, 8):
        rows = order[tied]
        spare = 8 * (8 - np.clip(lengths[rows] - at, 0, 8)).astype(np.uint64)
        word = words[np.minimum(starts[rows] + at, len(words) - 1)].astype(np.uint64)
        word = np.where(spare == 64, 0, word >> spare << spare)  # without bytes after the end of the text
        sort = np.lexsort((word, group))
        order[tied], word = rows[sort], word[sort]
        same = np.append(False, (word[1:] == word[:-1]) & (group[1:] == group[:-1]))[: len(word)]
        again = same | np.append(same[1:], False)[: len(word)]
        tied, group = tied[again], np.cumsum(~same)[again]
        if not len(tied):
            break
    return order, not len(tied)
