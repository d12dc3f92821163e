"""From scores to a `CurriculumPlan`: signals are ranked, ranks are fused, the easiest are kept and cut into subsets.

Reciprocal rank fusion: Cormack et al., SIGIR 2009; its use for distillation data: SRD, arXiv 2508.06135. The knee,
which may decide how many are kept: Kneedle, Satopää et al., ICDCS workshops 2011. Samples are rows of Arrow columns
everywhere, so that ten million are ranked and written in a minute and 4 GiB (`python -m benchmarks.curate`).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from ..errors import UserError, first_line
from ..suggest import unknown_name
from .plan import FUSED, METHODS, RANKED, REASONS, SETTINGS, SHUFFLED, WEIGHTS, CurriculumPlan, Signal
from .plan_file import TEXT
from .ranking import competition_ranks, knee, places_of, rows_by_text, subset_borders

logger = logging.getLogger(__name__)

KNEE = "knee"
# `official` makes subsets as the authors' code does: of int(N * keep / stages) samples. POCL drops no sample. SE-KD has
# no curriculum. `learnable` drops samples that the student knows as well as its teacher.
CURATION_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"keep": 0.75, "stages": 3, "rrf_k": 60},
    "official": {"keep": 0.75, "stages": 3, "rrf_k": 60, "floor_subsets": True},
    "learnable": {"keep": 0.75, "stages": 3, "signals": {"gap": 1.0}, "order": SHUFFLED},
    "POCL": {"keep": 1.0, "stages": 4, "rrf_k": 60},
    "SE-KD": {"method": "none", "stages": 1},
    "SE-KD3X": {"method": "none", "stages": 1},
}
DEFAULT_SIGNALS = {"rouge_l": Signal(higher_is_easier=True), "cross_entropy": Signal(higher_is_easier=False)}
# Directions of `reflect`'s own signals. A sample with a large gap is not easy: it is kept, and comes first.
HIGHER_IS_EASIER = {
    "rouge_l": True, "cross_entropy": False, "teacher_cross_entropy": False, "gap": True,
    "exact_match": True, "numeric_match": True, "chrf": True, "bleu": True, "execution": True,
    "pass_rate": True,
}  # fmt: skip


def curate(
    scores: Dataset | Mapping[str, Sequence[Any]] | str | Path,
    *,
    keep: float | Literal["knee"] = 0.75,
    stages: int = 3,
    rrf_k: float = 60,
    signals: Mapping[str, Signal | Mapping[str, Any] | float] | None = None,
    method: str = "srd",
    seed: int = 0,
    floor_subsets: bool = False,
    order: str = RANKED,
    band: Mapping[str, Sequence[float]] | None = None,
    weight_by: str | None = None,
) -> CurriculumPlan:
    """Rank samples by fused difficulty, keep the easiest, and cut them into subsets from easy to hard.

    The ranking is total and does not depend on the order of rows: first by fused score (high first), then by
    cross-entropy (low first, if it is a column), then by sample_id. Within a signal, equal values share the better
    rank.

    The knee (Kneedle; Satopää et al. 2011) is where sorted difficulties begin to rise steeply. The difficulty of a
    sample is the weighted sum of its signals' values, each scaled to 0 (easiest) .. 1 (hardest) between its 1st and
    99th percentile and clipped. Ranks cannot be used for this: their curve has the same shape for all data. Samples are
    kept up to the point where the curve is farthest below the straight line from its first to its last point, but at
    least `stages`. If it is nowhere 5 % of its height below that line, there is no hard tail: all are kept, with a
    warning. For normally distributed difficulties, 87 % are kept.

    Args:
        scores: columns `sample_id` and one for each signal, optionally `reason` (text where a row could not be scored);
            or a parquet file that holds them, of which only these columns are read.
        keep: share of the ranked samples to keep, in (0, 1]; the hardest are dropped. "knee": keep the samples before
            the hard tail; the plan's `keep` is then the resulting share.
        stages: number of subsets, at least 1.
        rrf_k: k above 0 of the score 1 / (k + rank) that a signal gives to a sample.
        signals: column -> Signal, or the weight of one of `reflect`'s own. Default: rouge_l (higher is easier) and
            cross_entropy (lower is easier).
        method: "srd" ranks by difficulty. Two others are controls: "random" ranks at random and keeps the same number;
            "none" keeps every ranked sample, whatever `keep` is, in the first subset, so every stage trains on all.
        seed: seed of the random ranking, and of the order "shuffled".
        floor_subsets: make subsets of int(N * keep / stages) samples, as the authors' code does. Otherwise sizes differ
            by at most 1.
        order: the order of the kept samples before they are divided into subsets; it does not affect which are dropped,
            but a sample without a value for it cannot be ranked. "ranked": that of the ranking; "shuffled"; or a
            signal, its easy end first (for "gap" the large values). It must be one of `signals` (with weight 0 it does
            not rank) or one of `reflect`'s own.
        band: column -> lowest and highest value. With any method, samples outside are dropped before the ranking, so
            `keep` is a share of those inside: {"pass_rate": [0.1, 0.9]} drops samples that the student never or always
            solves.
        weight_by: a column with p from 0 to 1, such as "pass_rate". A sample's weight in the loss is p(1 - p), divided
            by the mean over the kept ones (PACED, arXiv 2603.11178); samples with weight 0 are dropped like those
            outside a band.

    Returns:
        The plan.

    Raises:
        UserError: an argument is wrong, the file cannot be read, or fewer samples could be ranked than there are
            stages. The message names the argument or file.
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
    if order not in (RANKED, SHUFFLED, *chosen):
        if order not in HIGHER_IS_EASIER:
            known = [RANKED, SHUFFLED, *chosen]
            raise UserError(unknown_name("order", str(order), known) + "; or put that column among the signals")
        chosen[order] = Signal(HIGHER_IS_EASIER[order], 0.0)
    limits = {name: check_band(name, given) for name, given in (band or {}).items()}
    looked_at = dict.fromkeys([*chosen, *limits, *([] if weight_by is None else [weight_by])])
    names, columns = _columns(scores, {"sample_id", *looked_at, "cross_entropy", "reason"})
    for name in ("sample_id", *looked_at):
        if name not in names:
            raise UserError(unknown_name("column", name, names) + "; the scores must have it")
    ids = _texts(columns["sample_id"])
    by_id, unique = rows_by_text(ids)
    if ids.null_count or not unique:
        raise UserError("sample_id must be unique in the scores, and every row must have one")
    values = {n: _floats(n, columns[n]) for n in looked_at}
    reasons = _reasons(_texts(columns["reason"]) if "reason" in names else pa.nulls(len(ids), TEXT), values)
    rankable = reasons.is_null()
    bad = pc.invert(rankable)
    unscored = pa.RecordBatch.from_arrays([ids.filter(bad), reasons.filter(bad)], schema=REASONS)
    # From here on, rows are in the order of their ids, which is the last tie-break, because all sorts are stable.
    rows = by_id[rankable.to_numpy(zero_copy_only=False)[by_id]]
    within, outside = _in_band({n: values[n][rows] for n in looked_at}, limits, weight_by)
    outside = pa.RecordBatch.from_arrays([ids.take(rows[~within]), outside], schema=REASONS)
    rows = rows[within]
    count = len(rows)
    if count < stages:
        raise UserError(f"stages is {stages} but only " + _why_few(len(ids), unscored, outside))

    values = {n: v[rows] for n, v in values.items()}
    fused = np.zeros(count)
    for name, signal in chosen.items():
        fused += signal.weight / (rrf_k + competition_ranks(values[name], signal.higher_is_easier))
    if method == "random":
        ranking = np.random.default_rng(seed).permutation(np.arange(count))
    elif "cross_entropy" in names:
        ranking = np.lexsort((_floats("cross_entropy", columns["cross_entropy"])[rows], -fused))
    else:
        ranking = np.argsort(-fused, kind="stable")
    ranked = ids.take(rows[ranking])

    share = 1.0
    if method == "none":
        borders = [0, *[count] * stages]
    else:
        exact = max(stages, knee(values, chosen)) if isinstance(keep, str) else count * keep
        share = exact / count if isinstance(keep, str) else float(keep)
        borders = subset_borders(exact, stages, floor_subsets)
        if borders[1] < 1 or borders[-1] < stages:
            raise UserError(
                f"stages is {stages} but keep={share:g} of {count} samples leaves {borders[-1]}: lower stages or raise "
                "keep"
            )
    kept = borders[-1]
    ordered = ranked
    if order != RANKED:
        by = values[order][ranking[:kept]] if order in chosen else None
        ordered = ranked.take(places_of(kept, by, by is not None and chosen[order].higher_is_easier, seed))
    texts = (f"{'drawn' if method == 'random' else 'fused rank'} ", f" of {count}, beyond the {kept} kept", "")
    before, after, joint = (pa.scalar(t, TEXT) for t in texts)
    ranks = pa.array(np.arange(kept + 1, count + 1)).cast(TEXT)
    hardest = [ranked[kept:], pc.binary_join_element_wise(before, ranks, after, joint)]
    dropped = [pa.RecordBatch.from_arrays(hardest, schema=REASONS), outside]
    return CurriculumPlan(
        subsets=[ordered[a:b] for a, b in pairwise(borders)],
        dropped=pa.Table.from_batches(dropped).combine_chunks().to_batches()[0] if len(outside) else dropped[0],
        unscored=unscored,
        fused=pa.RecordBatch.from_arrays([ranked, pa.array(fused[ranking])], schema=FUSED),
        method=method,
        keep=share,
        keep_rule=KNEE if isinstance(keep, str) and method != "none" else "ratio",
        stages=stages,
        rrf_k=rrf_k,
        signals=chosen,
        order=order,
        band=limits,
        weight_by=weight_by,
        weights=None if weight_by is None else _weights(ranked[:kept], values[weight_by][ranking[:kept]]),
    )


def replan(plan: CurriculumPlan, stage: int, scores: Dataset, seed: int = 0) -> CurriculumPlan:
    """Fill a plan's subsets from `stage` on again, with new scores.

    Earlier subsets stay, and later ones keep their sizes. All samples outside the earlier subsets are ranked again, as
    `curate` does with the plan's signals: dropped samples may return, and kept ones may be dropped. The kept ones are
    in the plan's order. If the plan has a band and no sample is inside it, the plan does not change.

    Args:
        plan: the old plan.
        stage: the first subset to fill again, from 0.
        scores: columns as in `curate`.
        seed: seed of the order "shuffled".

    Returns:
        The new plan.
    """
    stay = plan.subset_columns[:stage]
    before = pa.concat_arrays(stay)
    table = scores.with_format("arrow")[:]
    left = table.filter(pc.invert(pc.is_in(table["sample_id"], value_set=before.cast(table["sample_id"].type))))
    if not _any_within(left, plan):
        logger.warning("at the border of stage %d no sample is within the plan's band; it stays as it is", stage + 1)
        return plan
    kept_by: dict[str, Any] = {"band": plan.band, "weight_by": plan.weight_by}
    found = curate(Dataset(left), keep=1.0, stages=1, rrf_k=plan.rrf_k, signals=plan.signals, **kept_by)
    ranked, sizes = found.subset_columns[0], [len(s) for s in plan.subset_columns[stage:]]
    borders = [min(x, len(ranked)) for x in accumulate(sizes, initial=0)]
    kept, rest = ranked[: borders[-1]], ranked[borders[-1] :].to_pylist()
    if plan.order != RANKED and len(kept):
        again = Dataset(left.filter(pc.is_in(left["sample_id"], value_set=kept.cast(left["sample_id"].type))))
        rules: dict[str, Any] = {"rrf_k": plan.rrf_k, "signals": plan.signals, "order": plan.order, "seed": seed}
        kept = curate(again, keep=1.0, stages=1, **rules).subset_columns[0]
    why = f"ranked beyond the {borders[-1]} kept at the border of stage {stage + 1}"
    return CurriculumPlan(
        subsets=[*stay, *(kept[a:b] for a, b in pairwise(borders))],
        dropped=[*({"sample_id": i, "reason": why} for i in rest), *found.dropped],
        unscored=found.unscored,
        fused={**{i: plan.fused[i] for i in before.to_pylist() if i in plan.fused}, **found.fused},
        weights={**{i: plan.weights[i] for i in before.to_pylist() if i in plan.weights}, **found.weights},
        **{name: getattr(plan, name) for name in SETTINGS},
    )


def check_band(name: str, given: Any) -> tuple[float, float]:
    """Check and return the limits of a signal's band.

    Args:
        name: the signal's name.
        given: its lowest and highest value.

    Raises:
        UserError: they are not two numbers in order.
    """
    fine = isinstance(given, (list, tuple)) and len(given) == 2 and all(isinstance(x, (int, float)) for x in given)
    if not fine or not given[0] <= given[1]:
        raise UserError(f"band of {name!r} must be its least and greatest value, such as [0.1, 0.9], got {given!r}")
    return float(given[0]), float(given[1])


def _in_band(
    values: Mapping[str, np.ndarray], limits: Mapping[str, tuple[float, float]], weight_by: str | None
) -> tuple[np.ndarray, pa.Array]:
    """Which rows are inside all bands and have a weight above 0, and the reason for each of the others."""
    count = len(next(iter(values.values())))
    within, reasons = np.ones(count, dtype=bool), np.full(count, None, dtype=object)

    def leave_out(rows: np.ndarray, name: str, why: str) -> None:
        new = rows & within
        reasons[new] = [f"{name} is {x:g}, {why}" for x in values[name][new]]
        within[new] = False

    for name, (low, high) in limits.items():
        leave_out((values[name] < low) | (values[name] > high), name, f"outside the band {low:g} to {high:g}")
    if weight_by is not None:
        p = values[weight_by]
        if ((p < 0) | (p > 1)).any():
            worst = p[(p < 0) | (p > 1)][0]
            raise UserError(f"weight_by is {weight_by!r}, which must be from 0 to 1 in every row, found {worst:g}")
        leave_out((p == 0) | (p == 1), weight_by, "with which it weighs nothing")
    return within, pa.array(reasons[~within], TEXT)


def _why_few(total: int, unscored: pa.RecordBatch, outside: pa.RecordBatch) -> str:
    """How many of all samples can be ranked, why the others cannot, and the ways out."""
    said, ways = f"{total - len(unscored)} of {total} samples could be scored", list[str]()
    if len(unscored):
        said += f" ({_first_reason(unscored)})"
        ways.append("leave out the signal that says nothing of them, or mend these rows")
    if len(outside):
        said += f", and {len(outside)} of those are outside the band or weigh nothing ({_first_reason(outside)})"
        ways.append("widen band, leave weight_by out, or let the student make more or other attempts")
    return "; ".join([said, *ways, "lower stages"] if total - len(unscored) - len(outside) else [said, *ways])


def _first_reason(rows: pa.RecordBatch) -> str:
    first = rows.slice(0, 1).to_pylist()[0]
    return f"{first['sample_id']!r}: {first['reason']}"


def _any_within(scores: pa.Table, plan: CurriculumPlan) -> bool:
    looked_at = [*plan.band, *([] if plan.weight_by is None else [plan.weight_by])]
    if not looked_at:
        return True
    values = {name: _floats(name, scores[name]) for name in looked_at}
    scored = np.all([np.isfinite(x) for x in values.values()], axis=0)
    return bool(_in_band({n: x[scored] for n, x in values.items()}, plan.band, plan.weight_by)[0].any())


def _weights(ids: pa.Array, p: np.ndarray) -> pa.RecordBatch:
    """The weights of PACED, p(1 - p)."""
    return pa.RecordBatch.from_arrays([ids, pa.array(p * (1 - p))], schema=WEIGHTS)


def _signal(name: str, given: Signal | Mapping[str, Any] | float) -> Signal:
    if isinstance(given, Signal):
        found = given
    elif isinstance(given, (int, float)) and name in HIGHER_IS_EASIER:
        found = Signal(HIGHER_IS_EASIER[name], float(given))
    else:
        try:
            found = Signal(**given)  # type: ignore[arg-type]
        except TypeError:
            raise UserError(
                f"signal {name!r} must have higher_is_easier (true or false) and optionally weight, got {given!r}"
            ) from None
    if not isinstance(found.weight, (int, float)) or not math.isfinite(found.weight):
        raise UserError(f"signal {name!r}: weight must be a finite number, got {found.weight!r}")
    return found


def _columns(
    scores: Dataset | Mapping[str, Sequence[Any]] | str | Path, wanted: set[str]
) -> tuple[list[str], pa.Table | Mapping[str, Sequence[Any]]]:
    """The names of all columns, and the columns themselves: at least those of the wanted ones that exist."""
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
            return column.cast(TEXT).combine_chunks()
        column = column.to_pylist()
    return pa.array([None if x is None else str(x) for x in column], TEXT)


def _floats(name: str, column: pa.ChunkedArray | Sequence[Any]) -> np.ndarray:
    try:
        if isinstance(column, pa.ChunkedArray):
            return column.cast(pa.float64(), safe=False).to_numpy()
        return np.asarray(column, dtype=np.float64)
    except (ValueError, TypeError, pa.ArrowException) as e:
        raise UserError(f"column {name!r} of the scores must hold numbers: {first_line(e)}") from None


def _reasons(given: pa.Array, values: Mapping[str, np.ndarray]) -> pa.Array:
    """Why each row cannot be ranked: the given reason, or its first value that is not finite; else null."""
    none = pa.scalar(None, TEXT)
    reasons = pc.if_else(pc.equal(given, ""), none, given)
    for name, value in values.items():
        for kind in (math.nan, math.inf, -math.inf):
            found = np.isnan(value) if math.isnan(kind) else value == kind
            if found.any():
                text = pa.scalar(f"{name} is {kind}, not a finite number", TEXT)
                reasons = pc.coalesce(reasons, pc.if_else(pa.array(found), text, none))
    return reasons
