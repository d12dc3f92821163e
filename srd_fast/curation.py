"""Difficulty signals -> ranks -> reciprocal rank fusion -> kept and dropped -> subsets: a `CurriculumPlan`.

Reciprocal rank fusion: Cormack et al., SIGIR 2009; its use for distillation data: SRD, arXiv 2508.06135.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .errors import UserError
from .files import write_text
from .suggest import unknown_name

PLAN_FORMAT = "srd_fast.plan/1"
METHODS = ("srd", "random", "none")
# `official` cuts as the authors' code does: int(N * keep / stages) samples a subset.
CURATION_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"keep": 0.75, "stages": 3, "rrf_k": 60},
    "official": {"keep": 0.75, "stages": 3, "rrf_k": 60, "floor_subsets": True},
}


@dataclass(frozen=True)
class Signal:
    """How a column of the scores ranks samples from easy to hard."""

    higher_is_easier: bool
    weight: float = 1.0


DEFAULT_SIGNALS = {"rouge_l": Signal(higher_is_easier=True), "cross_entropy": Signal(higher_is_easier=False)}


@dataclass(frozen=True)
class CurriculumPlan:
    """Which samples are trained on, in which subset, and which are not and why.

    subsets: sample ids, easiest subset first and easy to hard inside; later ones may be empty.
    dropped: {"sample_id", "reason"} from easier to harder. unscored: the same for samples that could not be ranked.
    fused: sample_id -> fused score, for every ranked sample; higher is easier.
    """

    subsets: list[list[str]]
    dropped: list[dict[str, str]] = field(default_factory=list)
    unscored: list[dict[str, str]] = field(default_factory=list)
    fused: dict[str, float] = field(default_factory=dict)
    method: str = "srd"
    keep: float = 1.0
    stages: int = 1
    rrf_k: float = 60
    signals: dict[str, Signal] = field(default_factory=dict)

    @property
    def kept(self) -> list[str]:
        """All kept sample ids, easy to hard."""
        return [s for subset in self.subsets for s in subset]

    def stage_ids(self, stage: int) -> list[str]:
        """Samples of stage `stage` (from 0): Baby Step, subsets 0 to `stage` together."""
        return [s for subset in self.subsets[: stage + 1] for s in subset]

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically. `CurriculumPlan.load` gives back an equal plan."""
        target = Path(path)
        content = {
            "format": PLAN_FORMAT,
            "method": self.method,
            "keep": self.keep,
            "stages": self.stages,
            "rrf_k": self.rrf_k,
            "signals": {n: asdict(s) for n, s in self.signals.items()},
            "subsets": self.subsets,
            "dropped": self.dropped,
            "unscored": self.unscored,
            "fused": self.fused,
        }
        write_text(target, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "CurriculumPlan":
        """Read a saved plan. Raises UserError if the file is missing or is not a plan."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != PLAN_FORMAT:
                raise ValueError(f"its format is not {PLAN_FORMAT!r}")
            content["signals"] = {n: Signal(**s) for n, s in content["signals"].items()}
            plan = cls(**content)
            _check_subsets(plan.subsets)
            return plan
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"plan {str(path)!r} cannot be read ({e}); make it again with `srd-fast curate`") from e


def _check_subsets(subsets: Any) -> None:
    if not isinstance(subsets, list) or not all(isinstance(s, list) for s in subsets):
        raise ValueError("its subsets are not lists")
    ids = [i for subset in subsets for i in subset]
    if not all(isinstance(i, str) for i in ids) or len(set(ids)) != len(ids):
        raise ValueError("its subsets do not hold each sample_id once")
    if not subsets or not subsets[0]:
        raise ValueError("its first subset is empty")


def competition_ranks(values: np.ndarray, higher_is_easier: bool) -> np.ndarray:
    """Rank of each value from 1 = easiest: one more than the number of strictly easier values, so ties share a rank."""
    keys = -values if higher_is_easier else values
    return 1 + np.searchsorted(np.sort(keys), keys, side="left")


def curate(
    scores: Dataset | Mapping[str, Sequence[Any]],
    *,
    keep: float = 0.75,
    stages: int = 3,
    rrf_k: float = 60,
    signals: Mapping[str, Signal | Mapping[str, Any]] | None = None,
    method: str = "srd",
    seed: int = 0,
    floor_subsets: bool = False,
) -> CurriculumPlan:
    """Rank samples by fused difficulty, keep the easiest, cut them into subsets from easy to hard.

    Args:
        scores: columns `sample_id` and one a signal; optionally `reason` (text where a row could not be scored).
        keep: share of the ranked samples to keep, in (0, 1]; the hardest are dropped.
        stages: number of subsets.
        rrf_k: k of 1 / (k + rank).
        signals: column -> Signal. Default: rouge_l (higher is easier) and cross_entropy (lower is easier).
        method: "srd"; "random" ranks at random, so keeps and stages the same numbers (control); "none" keeps every
            ranked sample in the first subset and leaves the others empty, so that every stage trains on all (control).
        seed: of the random ranking.
        floor_subsets: subsets of int(N * keep / stages) as in the authors' code, else of equal size up to 1.

    The order is total and does not depend on the order of rows: fused score descending, then cross-entropy ascending
    (if it is a column), then sample_id. Within a signal equal values share the better rank.

    Raises:
        UserError naming the argument, or when there are fewer usable samples than stages.
    """
    if method not in METHODS:
        raise UserError(unknown_name("curation method", method, METHODS))
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise UserError(f"keep must be in (0, 1], got {keep!r}")
    if not isinstance(stages, int) or stages < 1:
        raise UserError(f"stages must be a whole number of at least 1, got {stages!r}")
    if not rrf_k > 0:
        raise UserError(f"rrf_k must be above 0, got {rrf_k!r}")
    chosen = {n: _signal(n, s) for n, s in (signals or DEFAULT_SIGNALS).items()}
    columns = set(scores.column_names if isinstance(scores, Dataset) else scores)
    for name in ("sample_id", *chosen):
        if name not in columns:
            raise UserError(unknown_name("column", name, columns) + "; the scores must have it")
    ids = [str(i) for i in scores["sample_id"]]
    if len(set(ids)) != len(ids):
        raise UserError("sample_id must be unique in the scores")
    values = {n: _floats(n, scores[n]) for n in chosen}
    given = scores["reason"] if "reason" in columns else [None] * len(ids)
    reasons = [r or _not_finite(values, i) for i, r in enumerate(given)]
    unscored = [{"sample_id": i, "reason": r} for i, r in zip(ids, reasons) if r]
    usable = np.array([i for i, r in enumerate(reasons) if not r], dtype=np.int64)
    if len(usable) < stages:
        raise UserError(f"stages is {stages} but only {len(usable)} of {len(ids)} samples could be scored")

    names = np.array(ids)[usable]
    fused = np.zeros(len(usable))
    for name, signal in chosen.items():
        fused += signal.weight / (rrf_k + competition_ranks(values[name][usable], signal.higher_is_easier))
    tie_break = (
        _floats("cross_entropy", scores["cross_entropy"])[usable]
        if "cross_entropy" in columns
        else np.zeros(len(usable))
    )
    if method == "random":
        order = np.random.default_rng(seed).permutation(np.argsort(names))
    else:
        order = np.lexsort((names, tie_break, -fused))
    ranked = names[order].tolist()

    if method == "none":
        subsets, dropped = [ranked, *([] for _ in range(stages - 1))], []
        keep = 1.0
    else:
        borders = _borders(len(ranked), keep, stages, floor_subsets)
        subsets = [ranked[a:b] for a, b in pairwise(borders)]
        what = "drawn" if method == "random" else "fused rank"
        dropped = [
            {"sample_id": s, "reason": f"{what} {r} of {len(ranked)}, beyond the {borders[-1]} kept"}
            for r, s in enumerate(ranked[borders[-1] :], borders[-1] + 1)
        ]
    return CurriculumPlan(
        subsets=subsets,
        dropped=dropped,
        unscored=unscored,
        fused=dict(zip(ranked, fused[order].tolist())),
        method=method,
        keep=float(keep),
        stages=stages,
        rrf_k=rrf_k,
        signals=chosen,
    )


def _borders(count: int, keep: float, stages: int, floor_subsets: bool) -> list[int]:
    """Positions in the ranking where subsets begin and the last one ends."""
    if floor_subsets:
        size = int(count * keep / stages)
        borders = [size * s for s in range(stages + 1)]
    else:
        kept = math.floor(count * keep + 1e-9)
        borders = [round(kept * s / stages) for s in range(stages + 1)]
    if borders[1] < 1 or borders[-1] < stages:
        raise UserError(
            f"stages is {stages} but keep={keep:g} of {count} samples leaves {borders[-1]}: lower stages or raise keep"
        )
    return borders


def _signal(name: str, given: Signal | Mapping[str, Any]) -> Signal:
    if isinstance(given, Signal):
        return given
    try:
        return Signal(**given)
    except TypeError:
        raise UserError(
            f"signal {name!r} must have higher_is_easier (true or false) and optionally weight, got {dict(given)!r}"
        ) from None


def _floats(name: str, column: Sequence[Any]) -> np.ndarray:
    try:
        return np.array([math.nan if x is None else x for x in column], dtype=np.float64)
    except (ValueError, TypeError) as e:
        raise UserError(f"column {name!r} of the scores must hold numbers: {e}") from None


def _not_finite(values: Mapping[str, np.ndarray], row: int) -> str | None:
    return next((f"{n} is {v[row]}, not a finite number" for n, v in values.items() if not np.isfinite(v[row])), None)
