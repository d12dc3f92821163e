"""Decide which steps train on the student's own answers, and whether these are fresh or earlier ones.

All of it depends only on a seed, the step's number and the log so far. So a training that was killed and resumed takes
the same decisions.

GKD (arXiv 2306.13649): a fixed share of the steps. DistiLLM (arXiv 2402.03898): a share phi that starts at 0 and grows
by 0.1 each time the validation loss is at least 0.1 above the previous one. Among these steps, a share that falls
linearly to 0 over the training generates fresh answers; the others use answers from a buffer, once it is full.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data import WEIGHT, read_columns

ADAPTIVE = "adaptive"
Kind = Literal["data", "fresh", "replayed"]
DATA: Kind = "data"
FRESH: Kind = "fresh"
REPLAYED: Kind = "replayed"
# The increase of the validation loss, in nats, from which on phi grows, and by how much phi grows.
TOLERANCE, RAISE = 0.1, 0.1
_DIGITS = 9
# The columns of a sample that a step reads, besides its weight.
_TOKENS = ("input_ids", "labels")


def place_seed(*place: int) -> int:
    """A seed from 0 to 2^63 for a place in a training, given by its seed, step, micro-batch and rank."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def adaptive_share(losses: Sequence[float]) -> float:
    """DistiLLM's phi.

    Args:
        losses: every validation loss so far, in nats, in their order.

    Returns:
        0 to 1: 0.1 for each loss that is at least 0.1 above the one before it.
    """
    raised = sum(later >= before + TOLERANCE for before, later in pairwise(losses))
    return min(1.0, round(raised * RAISE, _DIGITS))


def logged_losses(history: Iterable[Mapping[str, Any]], step: int, sets: Sequence[str] = ()) -> list[float]:
    """The validation losses in a Trainer's `log_history` up to a step, one for each step that was evaluated.

    Args:
        history: the log.
        step: the step.
        sets: names of the validation sets, if there are several. A step's loss is then the mean of theirs.
    """
    names = [f"eval_{of_set}_loss" for of_set in sets] or ["eval_loss"]
    found: dict[int, dict[str, float]] = {}
    for line in history:
        if line["step"] <= step:
            found.setdefault(line["step"], {}).update({x: float(line[x]) for x in names if x in line})
    return [fmean(found[at].values()) for at in sorted(found) if len(found[at]) == len(names)]


@dataclass(frozen=True)
class AnswerSchedule:
    """Which answers each step trains on.

    Args:
        share: share of the steps that train on the student's own answers, 0 to 1, or "adaptive" for DistiLLM's phi.
        capacity: number of answers in the buffer; 0: all own answers are fresh.
        total_steps: the training's number of steps.
        seed: seed of the draws.
    """

    share: float | str
    capacity: int
    total_steps: int
    seed: int

    def share_after(self, losses: Sequence[float]) -> float:
        """The share of own answers after these validation losses."""
        return adaptive_share(losses) if self.share == ADAPTIVE else float(self.share)

    def kind(self, step: int, losses: Sequence[float], held: int) -> Kind:
        """Decide what a step trains on.

        Args:
            step: the step's number, from 0.
            losses: the validation losses before the step.
            held: number of answers in the buffer.

        Returns:
            "data" for the rows' own answers, "fresh" or "replayed".
        """
        draw, share = place_seed(self.seed, step) / 2**63, self.share_after(losses)
        if draw >= share:
            return DATA
        anew = share * (1 - step / self.total_steps)
        return REPLAYED if self.capacity and held >= self.capacity and draw >= anew else FRESH


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    weight = {WEIGHT: float(sample[WEIGHT])} if WEIGHT in sample else {}
    return {**{name: list(map(int, sample[name])) for name in read_columns(list(sample))}, **weight}


class ReplayBuffer:
    """The last answers of a student, as tokenised samples.

    Args:
        capacity: how many it holds; the oldest go first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Keep samples, in their order."""
        self._kept += [_plain(s) for s in samples]
        del self._kept[: max(0, len(self._kept) - self.capacity)]

    def draw(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Draw samples, without repetition if there are enough.

        Args:
            count: how many.
            seed: seed of the draw.
        """
        chosen = np.random.default_rng(seed).choice(len(self._kept), count, replace=len(self._kept) < count)
        return [self._kept[i] for i in chosen]

    def save(self, file: Path) -> None:
        """Write the whole buffer."""
        kind = pa.list_(pa.int32())
        names = read_columns(list(self._kept[0]) if self._kept else _TOKENS)
        columns = {n: pa.array([s[n] for s in self._kept], kind) for n in names}
        if any(WEIGHT in s for s in self._kept):
            columns[WEIGHT] = pa.array([s[WEIGHT] for s in self._kept], pa.float64())
        pq.write_table(pa.table(columns), file)

    def load(self, file: Path) -> None:
        """Replace the buffer by the written one."""
        self._kept = pq.read_table(file).to_pylist()
