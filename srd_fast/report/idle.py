"""Whether the ranking says more than the length of texts, and what was dropped, in words that a reader can judge."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from srd_fast.curriculum import CurriculumPlan
from srd_fast.report.read import FloatArray, Run

# Shares from which on the page says that the ranking follows the length; that two signals are equal, or unrelated
# (below this); that a signal has the same value in most rows.
BY_LENGTH, SAME, UNRELATED, TIED = 0.5, 0.9, 0.1, 0.5
BINS, LEAST_OF_BIN, LEAST_ROWS = 20, 10, 20
NAMES = {
    "rouge_l": "ROUGE-L",
    "cross_entropy": "cross-entropy",
    "teacher_cross_entropy": "the teacher's own cross-entropy",
    "gap": "the gap to the teacher",
}
_LETTER, _LATIN = regex.compile(r"\p{L}"), regex.compile(r"\p{Latin}")


def ranking_view(run: Run) -> dict[str, Any] | None:
    """The section about the ranking: its rank correlations, sentences, and kinds of rows among kept and dropped ones.

    Args:
        run: the run.

    Returns:
        The view; None unless there are a plan, scores and the rows.
    """
    plan, train, reflections = run.plan, run.train, run.reflections
    if plan is None or train is None or reflections is None:
        return None
    kept = plan.kept
    dropped = [row["sample_id"] for row in plan.dropped]
    ids = [x for x in [*kept, *dropped] if x in train.index]
    if len(ids) < LEAST_ROWS:
        return None
    texts = ["\n".join(train.references(x)[:1]) for x in ids]
    prompts = [train.prompt(x) or "" for x in ids]
    length = np.array([len(x) for x in texts], dtype=np.float64)
    is_dropped = np.isin(np.array(ids), np.array(dropped, dtype=str)) if dropped else np.zeros(len(ids), dtype=bool)
    view: dict[str, Any] = {"correlations": [], "sentences": [], "kinds": _kinds(texts, prompts, length, is_dropped)}
    view["num_kept"], view["num_dropped"] = int((~is_dropped).sum()), int(is_dropped.sum())
    if plan.method == "srd":
        scores = {
            name: np.array([reflections.score(name, x) for x in ids]) for name in reflections.scores if name != "fused"
        }
        hardness = _hardness(plan, ids)
        measured = {
            "length of the reference": length,
            "length of the prompt": np.array([float(len(x)) for x in prompts]),
        }
        measured |= {NAMES.get(name, name): values for name, values in scores.items()}
        view["correlations"] = [(name, spearman(hardness, values)) for name, values in measured.items()]
        ranked_by = [n for n in plan.ranked_by if n in scores]
        view["sentences"] = [
            *_by_length(hardness, length, is_dropped),
            *_between(scores, ranked_by),
            *_ties(scores, ranked_by),
        ]
    view["sentences"] = [*_nothing_done(plan), *view["sentences"]]
    return view


def spearman(first: FloatArray, second: FloatArray) -> float:
    """The rank correlation of two columns over the rows that have both, ties at their mean rank; NaN if undefined."""
    both = np.isfinite(first) & np.isfinite(second)
    one, other = (_ranks(x[both]) for x in (first, second))
    if len(one) < 3 or not one.std() or not other.std():
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def explained(hardness: FloatArray, length: FloatArray) -> float:
    """The share of the variance of the ranks that a function of the length can explain at most, 0 to 1.

    Rows are divided by length into bins of equal size. The share is that of the bins' means, corrected for the number
    of bins. NaN if there are too few rows, or all are equally hard.
    """
    ranks, bins = _ranks(hardness), min(BINS, len(hardness) // LEAST_OF_BIN)
    if bins < 2 or not ranks.std():
        return float("nan")
    bin_of = np.minimum(((_ranks(length) - 1) * bins / len(length)).astype(np.int64), bins - 1)
    used = np.unique(bin_of)
    within = sum(float(((ranks[bin_of == b] - ranks[bin_of == b].mean()) ** 2).sum()) for b in used)
    total = float(((ranks - ranks.mean()) ** 2).sum())
    return max(0.0, 1 - (within / (len(ranks) - len(used))) / (total / (len(ranks) - 1)))


def _hardness(plan: CurriculumPlan, ids: Sequence[str]) -> FloatArray:
    """0 for the easiest row; rows with the same fused score are equally hard."""
    if plan.fused:
        return np.array([-plan.fused.get(x, np.nan) for x in ids])
    return np.arange(len(ids), dtype=np.float64)


def _nothing_done(plan: CurriculumPlan) -> list[str]:
    if plan.method == "random":
        return ["Rows were dropped and ordered at random: this run is a control."]
    if not plan.dropped and not plan.unscored and sum(1 for subset in plan.subsets if subset) < 2:
        return ["The curriculum is idle: all rows are kept, in one subset."]
    return []


def _by_length(hardness: FloatArray, length: FloatArray, dropped: npt.NDArray[np.bool_]) -> list[str]:
    known = np.isfinite(hardness)
    share = explained(hardness[known], length[known])
    found = []
    if np.isfinite(share):
        found.append(f"The length of the reference alone explains {share:.0%} of the ranking.")
        if share >= BY_LENGTH:
            found[-1] += " The signals do little more than count: sorting by length would give nearly this curriculum."
    count = int(dropped.sum())
    if 0 < count < len(dropped):
        ends = {"shortest": _dropped_among(length, dropped), "longest": _dropped_among(-length, dropped)}
        which, same = max(ends.items(), key=lambda pair: pair[1])
        found.append(
            f"Dropping as many of the {which} rows instead would have dropped {same:.0%} of the same rows; chance "
            f"alone gives {count / len(dropped):.0%}."
        )
    return found


def _dropped_among(values: FloatArray, dropped: npt.NDArray[np.bool_]) -> float:
    """The share of dropped rows among as many with the lowest values; among rows of equal value, as chance gives."""
    count = int(dropped.sum())
    border = np.sort(values)[count - 1]
    below, at = values < border, values == border
    return float(dropped[below].sum() + (count - below.sum()) * dropped[at].mean()) / count


def _between(scores: dict[str, FloatArray], signals: Sequence[str]) -> list[str]:
    found = []
    for i, first in enumerate(signals):
        for second in signals[i + 1 :]:
            r = spearman(scores[first], scores[second])
            if not np.isfinite(r):
                continue
            text = f"{NAMES.get(first, first)} and {NAMES.get(second, second)} have a rank correlation of {r:+.2f}"
            if abs(r) >= SAME:
                text += ": they say the same, and one of them would do"
            elif abs(r) <= UNRELATED:
                text += ": they have next to nothing in common"
            found.append(f"{text}.")
    return found


def _ties(scores: dict[str, FloatArray], signals: Sequence[str]) -> list[str]:
    found = []
    for name in signals:
        values = scores[name][np.isfinite(scores[name])]
        kinds, counts = np.unique(values, return_counts=True)
        if len(values) and counts.max() >= TIED * len(values):
            found.append(
                f"{counts.max() / len(values):.0%} of the rows have the same {NAMES.get(name, name)} "
                f"({kinds[counts.argmax()]:.4g}): it cannot tell these apart."
            )
    return found


def _kinds(
    texts: Sequence[str], prompts: Sequence[str], length: FloatArray, dropped: npt.NDArray[np.bool_]
) -> list[tuple[str, str, str]]:
    """(kind of row, share of the dropped rows, share of the kept ones)."""
    middle = float(np.median(length))
    normal = [" ".join(f"{p}\n{t}".casefold().split()) for p, t in zip(prompts, texts)]
    _, inverse, counts = np.unique(np.array(normal, dtype=object), return_inverse=True, return_counts=True)
    kinds = {
        f"very short reference, under {middle / 4:,.0f} characters": length < middle / 4,
        f"very long reference, over {middle * 4:,.0f} characters": length > middle * 4,
        "mostly of another script than the Latin one": np.array([_is_non_latin(x) for x in texts]),
        "duplicate: prompt and reference are another row's too": counts[inverse] > 1,
    }
    return [(name, _share(x[dropped]), _share(x[~dropped])) for name, x in kinds.items()]


def _share(values: npt.NDArray[np.bool_]) -> str:
    return f"{values.mean():.1%}" if len(values) else "–"


def _is_non_latin(text: str) -> bool:
    if text.isascii():
        return False
    letters = _LETTER.findall(text)
    return 2 * sum(1 for x in letters if _LATIN.match(x)) < len(letters)
