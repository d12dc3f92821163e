"""Difficulty signals -> ranks -> reciprocal rank fusion -> kept and dropped -> subsets: a `CurriculumPlan`.

Reciprocal rank fusion: Cormack et al., SIGIR 2009; its use for distillation data: SRD, arXiv 2508.06135. The knee that
may decide how many are kept: Kneedle, Satopää et al., ICDCS workshops 2011. Samples are rows of columns throughout, so
that ten million of them are ranked and written in a minute and 4 GiB (`python -m benchmarks.curate`).
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from .errors import UserError, first_line
from .files import temporary_path
from .suggest import unknown_name

logger = logging.getLogger(__name__)

PLAN_FORMAT = "srd_fast.plan/1"
METHODS = ("srd", "random", "none")
KNEE = "knee"
# A difficulty curve that lies less than this below its diagonal has no knee.
MIN_BEND = 0.05
# `official` cuts as the authors' code does: int(N * keep / stages) samples a subset. SE-KD has no curriculum.
CURATION_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"keep": 0.75, "stages": 3, "rrf_k": 60},
    "official": {"keep": 0.75, "stages": 3, "rrf_k": 60, "floor_subsets": True},
    "SE-KD": {"method": "none", "stages": 1},
    "SE-KD3X": {"method": "none", "stages": 1},
}


@dataclass(frozen=True)
class Signal:
    """How a column of the scores ranks samples from easy to hard."""

    higher_is_easier: bool
    weight: float = 1.0


DEFAULT_SIGNALS = {"rouge_l": Signal(higher_is_easier=True), "cross_entropy": Signal(higher_is_easier=False)}


_TEXT = pa.large_string()
_REASONS = pa.schema({"sample_id": _TEXT, "reason": _TEXT})
_FUSED = pa.schema({"sample_id": _TEXT, "score": pa.float64()})
_SETTINGS = ("method", "keep", "keep_rule", "stages", "rrf_k", "signals")
_CHUNK = 1 << 16


class CurriculumPlan:
    """Which samples are trained on, in which subset, and which are not and why. Not to be changed.

    It holds Arrow columns; `subsets`, `dropped`, `unscored`, `fused` and `kept` make their Python objects when they are
    first asked for, `subset_columns` makes none.

    Args:
        subsets: sample ids, easiest subset first and easy to hard inside; later ones may be empty.
        dropped: {"sample_id", "reason"} from easier to harder.
        unscored: the same for samples that could not be ranked.
        fused: sample_id -> fused score, for every ranked sample; higher is easier.
        method, keep, stages, rrf_k, signals: what `curate` was asked for; `keep` the share that is kept.
        keep_rule: "ratio" if `keep` was given, "knee" if it was found.

    Raises:
        UserError: a row of `dropped` or `unscored` lacks its sample_id or reason.
    """

    def __init__(
        self,
        subsets: Sequence[Sequence[str] | pa.Array],
        dropped: Sequence[Mapping[str, str]] | pa.RecordBatch = (),
        unscored: Sequence[Mapping[str, str]] | pa.RecordBatch = (),
        fused: Mapping[str, float] | pa.RecordBatch | None = None,
        method: str = "srd",
        keep: float = 1.0,
        stages: int = 1,
        rrf_k: float = 60,
        signals: Mapping[str, Signal] | None = None,
        keep_rule: str = "ratio",
    ) -> None:
        self.subset_columns = [s.cast(_TEXT) if isinstance(s, pa.Array) else pa.array(s, _TEXT) for s in subsets]
        self._dropped, self._unscored = _reason_rows("dropped", dropped), _reason_rows("unscored", unscored)
        self._fused = _score_rows({} if fused is None else fused)
        self.method, self.keep, self.keep_rule = method, keep, keep_rule
        self.stages, self.rrf_k, self.signals = stages, rrf_k, dict(signals or {})

    @cached_property
    def subsets(self) -> list[list[str]]:
        """Sample ids, easiest subset first and easy to hard inside."""
        return [s.to_pylist() for s in self.subset_columns]

    @cached_property
    def dropped(self) -> list[dict[str, str]]:
        """{"sample_id", "reason"} of the samples beyond the kept ones, from easier to harder."""
        return self._dropped.to_pylist()

    @cached_property
    def unscored(self) -> list[dict[str, str]]:
        """{"sample_id", "reason"} of the samples that could not be ranked."""
        return self._unscored.to_pylist()

    @cached_property
    def fused(self) -> dict[str, float]:
        """sample_id -> fused score of every ranked sample, easy to hard; higher is easier."""
        return dict(zip(self._fused["sample_id"].to_pylist(), self._fused["score"].to_pylist()))

    @property
    def kept(self) -> list[str]:
        """All kept sample ids, easy to hard."""
        return self.stage_ids(len(self.subset_columns))

    def stage_ids(self, stage: int) -> list[str]:
        """Samples of stage `stage` (from 0): Baby Step, subsets 0 to `stage` together."""
        return [s for subset in self.subsets[: stage + 1] for s in subset]

    def with_subsets(
        self, subsets: Sequence[Sequence[str] | pa.Array], dropped: Sequence[Mapping[str, str]]
    ) -> "CurriculumPlan":
        """The same plan with other subsets and dropped samples."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return CurriculumPlan(subsets, dropped, self._unscored, self._fused, **settings)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CurriculumPlan):
            return NotImplemented
        return (
            all(getattr(self, name) == getattr(other, name) for name in _SETTINGS)
            and self.subset_columns == other.subset_columns
            and self._dropped.equals(other._dropped)
            and self._unscored.equals(other._unscored)
            and (self._fused.equals(other._fused) or self.fused == other.fused)
        )

    def __repr__(self) -> str:
        sizes = [len(s) for s in self.subset_columns]
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return (
            f"<CurriculumPlan of {sizes} + {len(self._dropped)} dropped + {len(self._unscored)} unscored: {settings}>"
        )

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically and in pieces. `CurriculumPlan.load` gives back an equal plan."""
        target = Path(path)
        settings = {"format": PLAN_FORMAT, **{name: getattr(self, name) for name in _SETTINGS}}
        settings["signals"] = {n: asdict(s) for n, s in self.signals.items()}
        ids = (_block("[]", _pieces(s, _json_items, 3), 3) for s in self.subset_columns)
        blocks = {
            "subsets": _block("[]", ids, 2),
            "dropped": _block("[]", _pieces(self._dropped, _json_reasons, 2), 2),
            "unscored": _block("[]", _pieces(self._unscored, _json_reasons, 2), 2),
            "fused": _block("{}", _pieces(self._fused, _json_scores, 2), 2),
        }
        with temporary_path(target).open("w", encoding="utf-8") as f:
            f.write(json.dumps(settings, indent=1, ensure_ascii=False).removesuffix("\n}"))
            for name, block in blocks.items():
                f.write(f',\n "{name}": ')
                f.writelines(block)
            f.write("\n}\n")
        os.replace(temporary_path(target), target)

    @classmethod
    def load(cls, path: str | Path) -> "CurriculumPlan":
        """Read a saved plan. Raises UserError if the file is missing or is not a plan."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != PLAN_FORMAT:
                raise ValueError(f"its format is not {PLAN_FORMAT!r}")
            _check_subsets(content["subsets"])
            content["signals"] = {n: Signal(**s) for n, s in content["signals"].items()}
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"plan {str(path)!r} cannot be read ({e}); make it again with `srd-fast curate`") from e


def _reason_rows(name: str, rows: Sequence[Mapping[str, str]] | pa.RecordBatch) -> pa.RecordBatch:
    if isinstance(rows, pa.RecordBatch):
        return rows
    batch = pa.RecordBatch.from_pylist(list(rows), schema=_REASONS)
    if any(column.null_count for column in batch.columns):
        raise UserError(f"each row of {name} must have a sample_id and a reason")
    return batch


def _score_rows(fused: Mapping[str, float] | pa.RecordBatch) -> pa.RecordBatch:
    if isinstance(fused, pa.RecordBatch):
        return fused
    columns = [pa.array(list(fused), _TEXT), pa.array(list(fused.values()), pa.float64())]
    if columns[1].null_count or pc.all(pc.is_finite(columns[1])).as_py() is False:
        raise UserError("fused scores must be finite numbers")
    return pa.RecordBatch.from_arrays(columns, schema=_FUSED)


def _block(brackets: str, pieces: Iterable[Iterable[str]], depth: int) -> Iterator[str]:
    """A list or object as `json.dumps(..., indent=1)` lays it out; a piece is the text of some of its items."""
    start = brackets[0]
    for piece in pieces:
        yield start + _line(depth)
        yield from piece
        start = ","
    yield brackets if start == brackets[0] else _line(depth - 1) + brackets[1]


def _pieces(rows: pa.Array | pa.RecordBatch, text: Callable[[Any, str], str], depth: int) -> Iterator[tuple[str]]:
    for start in range(0, len(rows), _CHUNK):
        yield (text(rows.slice(start, _CHUNK), "," + _line(depth)),)


def _line(depth: int) -> str:
    return "\n" + " " * depth


def _quoted(ids: pa.Array) -> Iterable[str]:
    return map(json.encoder.encode_basestring, ids.to_pylist())


def _json_items(ids: pa.Array, between: str) -> str:
    return between.join(_quoted(ids))


def _json_scores(rows: pa.RecordBatch, between: str) -> str:
    numbers = rows["score"].cast(_TEXT).to_pylist()  # the shortest that reads back equal, as repr has it, but faster
    return between.join(map(": ".join, zip(_quoted(rows["sample_id"]), numbers)))


def _json_reasons(rows: pa.RecordBatch, between: str) -> str:
    row = '{{\n   "sample_id": {},\n   "reason": {}\n  }}'.format
    return between.join(map(row, *map(_quoted, rows.columns)))


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
    order = np.argsort(-values if higher_is_easier else values)
    ordered = values[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(values)])
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = 1 + np.repeat(starts, np.diff(starts, append=len(values)))
    return ranks


def curate(
    scores: Dataset | Mapping[str, Sequence[Any]] | str | Path,
    *,
    keep: float | Literal["knee"] = 0.75,
    stages: int = 3,
    rrf_k: float = 60,
    signals: Mapping[str, Signal | Mapping[str, Any]] | None = None,
    method: str = "srd",
    seed: int = 0,
    floor_subsets: bool = False,
) -> CurriculumPlan:
    """Rank samples by fused difficulty, keep the easiest, cut them into subsets from easy to hard.

    Args:
        scores: columns `sample_id` and one a signal; optionally `reason` (text where a row could not be scored). Or the
            parquet file that holds them; only these columns are read.
        keep: share of the ranked samples to keep, in (0, 1]; the hardest are dropped. "knee": as many as come before
            the hard tail, see below; the plan's `keep` is the share that this makes.
        stages: number of subsets.
        rrf_k: k of 1 / (k + rank).
        signals: column -> Signal. Default: rouge_l (higher is easier) and cross_entropy (lower is easier).
        method: "srd"; "random" ranks at random, so keeps and stages the same numbers (control); "none" keeps every
            ranked sample in the first subset and leaves the others empty, so that every stage trains on all (control).
        seed: of the random ranking.
        floor_subsets: subsets of int(N * keep / stages) as in the authors' code, else of equal size up to 1.

    The order is total and does not depend on the order of rows: fused score descending, then cross-entropy ascending
    (if it is a column), then sample_id. Within a signal equal values share the better rank.

    The knee (Kneedle; Satopää et al. 2011): a sample's difficulty is the weighted sum of its signals' values, each
    scaled to 0 (easiest) .. 1 (hardest) between its 1st and 99th percentile and clipped; ranks would bend at the same
    place for all data. Kept is the number of samples up to the point where the sorted difficulties lie farthest below
    the line from the first to the last, at least `stages`. A curve that nowhere lies MIN_BEND of its height below that
    line (straight, or bent the other way) has no hard tail: all are kept, and a warning says so. Normally distributed
    difficulties bend at 87 %. "random" keeps the same number; "none" keeps all, whatever `keep` is.

    Raises:
        UserError naming the argument, when the file cannot be read, or when there are fewer usable samples than stages.
    """
    if method not in METHODS:
        raise UserError(unknown_name("curation method", method, METHODS))
    if keep != KNEE and (not isinstance(keep, (int, float)) or not 0 < keep <= 1):
        raise UserError(f"keep must be in (0, 1], got {keep!r}; or {KNEE!r}")
    if not isinstance(stages, int) or stages < 1:
        raise UserError(f"stages must be a whole number of at least 1, got {stages!r}")
    if not rrf_k > 0:
        raise UserError(f"rrf_k must be above 0, got {rrf_k!r}")
    chosen = {n: _signal(n, s) for n, s in (signals or DEFAULT_SIGNALS).items()}
    names, columns = _columns(scores, {"sample_id", *chosen, "cross_entropy", "reason"})
    for name in ("sample_id", *chosen):
        if name not in names:
            raise UserError(unknown_name("column", name, names) + "; the scores must have it")
    ids = _texts(columns["sample_id"])
    by_id, unique = _sorted_rows(ids)
    if ids.null_count or not unique:
        raise UserError("sample_id must be unique in the scores, and every row must have one")
    values = {n: _floats(n, columns[n]) for n in chosen}
    reasons = _reasons(_texts(columns["reason"]) if "reason" in names else pa.nulls(len(ids), _TEXT), values)
    rankable = reasons.is_null()
    bad = pc.invert(rankable)
    unscored = pa.RecordBatch.from_arrays([ids.filter(bad), reasons.filter(bad)], schema=_REASONS)
    # Rows in the order of their ids from here on: the sorts are stable, so this is their last tie-break.
    rows = by_id[rankable.to_numpy(zero_copy_only=False)[by_id]]
    count = len(rows)
    if count < stages:
        raise UserError(f"stages is {stages} but only {count} of {len(ids)} samples could be scored")

    values = {n: v[rows] for n, v in values.items()}
    fused = np.zeros(count)
    for name, signal in chosen.items():
        fused += signal.weight / (rrf_k + competition_ranks(values[name], signal.higher_is_easier))
    if method == "random":
        order = np.random.default_rng(seed).permutation(np.arange(count))
    elif "cross_entropy" in names:
        order = np.lexsort((_floats("cross_entropy", columns["cross_entropy"])[rows], -fused))
    else:
        order = np.argsort(-fused, kind="stable")
    ranked = ids.take(rows[order])

    share = 1.0
    if method == "none":
        borders = [0, *[count] * stages]
    else:
        exact = max(stages, _knee(values, chosen)) if isinstance(keep, str) else count * keep
        share = exact / count if isinstance(keep, str) else float(keep)
        borders = _borders(exact, stages, floor_subsets)
        if borders[1] < 1 or borders[-1] < stages:
            raise UserError(
                f"stages is {stages} but keep={share:g} of {count} samples leaves {borders[-1]}: lower stages or raise "
                "keep"
            )
    kept = borders[-1]
    texts = (f"{'drawn' if method == 'random' else 'fused rank'} ", f" of {count}, beyond the {kept} kept", "")
    before, after, joint = (pa.scalar(t, _TEXT) for t in texts)
    ranks = pa.array(np.arange(kept + 1, count + 1)).cast(_TEXT)
    dropped = [ranked[kept:], pc.binary_join_element_wise(before, ranks, after, joint)]
    return CurriculumPlan(
        subsets=[ranked[a:b] for a, b in pairwise(borders)],
        dropped=pa.RecordBatch.from_arrays(dropped, schema=_REASONS),
        unscored=unscored,
        fused=pa.RecordBatch.from_arrays([ranked, pa.array(fused[order])], schema=_FUSED),
        method=method,
        keep=share,
        keep_rule=KNEE if isinstance(keep, str) and method != "none" else "ratio",
        stages=stages,
        rrf_k=rrf_k,
        signals=chosen,
    )


def replan(plan: CurriculumPlan, stage: int, scores: Dataset) -> CurriculumPlan:
    """The plan with its subsets from `stage` (from 0) on filled anew by new scores.

    The subsets before stay, and so does the size of the others. All samples outside those that stay are ranked as in
    `curate` with the plan's signals: dropped ones may come in, kept ones may go.
    """
    stay = plan.subset_columns[:stage]
    before = pa.concat_arrays(stay)
    table = scores.with_format("arrow")[:]
    left = table.filter(pc.invert(pc.is_in(table["sample_id"], value_set=before.cast(table["sample_id"].type))))
    found = curate(Dataset(left), keep=1.0, stages=1, rrf_k=plan.rrf_k, signals=plan.signals)
    ranked, sizes = found.subset_columns[0], [len(s) for s in plan.subset_columns[stage:]]
    borders = [min(x, len(ranked)) for x in accumulate(sizes, initial=0)]
    rest = ranked[borders[-1] :].to_pylist()
    why = f"ranked beyond the {borders[-1]} kept at the border of stage {stage + 1}"
    return CurriculumPlan(
        subsets=[*stay, *(ranked[a:b] for a, b in pairwise(borders))],
        dropped=[{"sample_id": i, "reason": why} for i in rest],
        unscored=found.unscored,
        fused={**{i: plan.fused[i] for i in before.to_pylist() if i in plan.fused}, **found.fused},
        **{name: getattr(plan, name) for name in _SETTINGS},
    )


def _borders(exact: float, stages: int, floor_subsets: bool) -> list[int]:
    """Positions in the ranking where subsets begin and the last one ends; `exact`: how many to keep, unrounded."""
    if floor_subsets:
        size = int(exact / stages)
        return [size * s for s in range(stages + 1)]
    kept = math.floor(exact + 1e-9)
    return [round(kept * s / stages) for s in range(stages + 1)]


def _knee(values: Mapping[str, np.ndarray], signals: Mapping[str, Signal]) -> int:
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
    knee = int(np.argmax(below))
    if height > 0 and below[knee] >= MIN_BEND:
        return knee + 1
    logger.warning(
        "keep=knee: the difficulties do not bend (%.3f below the diagonal at most, %g is needed), so none is dropped",
        below[knee] if height > 0 else 0.0,
        MIN_BEND,
    )
    return count


def _signal(name: str, given: Signal | Mapping[str, Any]) -> Signal:
    if isinstance(given, Signal):
        return given
    try:
        return Signal(**given)
    except TypeError:
        raise UserError(
            f"signal {name!r} must have higher_is_easier (true or false) and optionally weight, got {dict(given)!r}"
        ) from None


def _columns(
    scores: Dataset | Mapping[str, Sequence[Any]] | str | Path, wanted: set[str]
) -> tuple[list[str], pa.Table | Mapping[str, Sequence[Any]]]:
    """Names of all columns, and at least those of the wanted ones that there are."""
    if isinstance(scores, (str, Path)):
        try:
            with pq.ParquetFile(scores) as file:
                names = file.schema_arrow.names
                return names, file.read(columns=[n for n in names if n in wanted])
        except (OSError, pa.ArrowException) as e:
            raise UserError(f"scores {str(scores)!r} cannot be read as parquet: {first_line(e)}") from e
    if isinstance(scores, Dataset):
        names = scores.column_names
        return names, scores.select_columns([n for n in names if n in wanted]).with_format("arrow")[:]
    return list(scores), scores


def _texts(column: pa.ChunkedArray | Sequence[Any]) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return column.cast(_TEXT).combine_chunks()
        column = column.to_pylist()
    return pa.array([None if x is None else str(x) for x in column], _TEXT)


def _sorted_rows(texts: pa.Array) -> tuple[np.ndarray, bool]:
    """Rows in the order of their texts (as UTF-8, so by code points), and whether no two are equal.

    Eight bytes at a time, as numbers, each time only of the rows that are equal so far: half the time of Arrow's sort.
    """
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets or b"\0" * 8, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = np.append(np.frombuffer(content or b"", np.uint8), np.zeros(8, np.uint8))
    words = np.ndarray(len(content) - 7, ">u8", content, strides=(1,))  # one from every byte on
    starts, lengths = ends[:-1], np.diff(ends)
    order, tied, group = np.arange(len(texts)), np.arange(len(texts)), np.zeros(len(texts), np.int64)
    for at in range(0, int(lengths.max(initial=0)) + 1, 8):
        rows = order[tied]
        spare = 8 * (8 - np.clip(lengths[rows] - at, 0, 8)).astype(np.uint64)
        word = words[np.minimum(starts[rows] + at, len(words) - 1)].astype(np.uint64)
        word = np.where(spare == 64, 0, word >> spare << spare)  # without what follows the text
        sort = np.lexsort((word, group))
        order[tied], word = rows[sort], word[sort]
        same = np.append(False, (word[1:] == word[:-1]) & (group[1:] == group[:-1]))[: len(word)]
        again = same | np.append(same[1:], False)[: len(word)]
        tied, group = tied[again], np.cumsum(~same)[again]
        if not len(tied):
            break
    return order, not len(tied)


def _floats(name: str, column: pa.ChunkedArray | Sequence[Any]) -> np.ndarray:
    try:
        if isinstance(column, pa.ChunkedArray):
            return column.cast(pa.float64(), safe=False).to_numpy()
        return np.asarray(column, dtype=np.float64)
    except (ValueError, TypeError, pa.ArrowException) as e:
        raise UserError(f"column {name!r} of the scores must hold numbers: {first_line(e)}") from None


def _reasons(given: pa.Array, values: Mapping[str, np.ndarray]) -> pa.Array:
    """Why each row cannot be ranked: the reason given, or its first value that is not finite; null if it can be."""
    none = pa.scalar(None, _TEXT)
    reasons = pc.if_else(pc.equal(given, ""), none, given)
    for name, value in values.items():
        for kind in (math.nan, math.inf, -math.inf):
            found = np.isnan(value) if math.isnan(kind) else value == kind
            if found.any():
                text = pa.scalar(f"{name} is {kind}, not a finite number", _TEXT)
                reasons = pc.coalesce(reasons, pc.if_else(pa.array(found), text, none))
    return reasons
