"""The order in which the kept samples are cut into subsets, apart from which samples are dropped."""

import math
import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from srd_fast.curriculum import (
    CURATION_PRESETS,
    HIGHER_IS_EASIER,
    METHODS,
    CurriculumPlan,
    Signal,
    curate,
    replan,
)
from srd_fast.errors import UserError
from srd_fast.reflection.signals import _BUILT_IN

ORDERS = ("ranked", "shuffled", "gap", "cross_entropy", "teacher_cross_entropy")


def scores(count: int = 41, seed: int = 0) -> dict[str, list[Any]]:
    """Signals that do not agree; few values of ROUGE-L, so that there are ties."""
    draw = random.Random(seed)
    ours, theirs = ([draw.uniform(1, 5) for _ in range(count)] for _ in range(2))
    return {
        "sample_id": [f"s{i:03d}" for i in range(count)],
        "rouge_l": [draw.randrange(4) / 4 for _ in range(count)],
        "cross_entropy": ours,
        "teacher_cross_entropy": theirs,
        "gap": [a - b for a, b in zip(ours, theirs)],
    }


def of(column: str, given: dict[str, list[Any]], ids: list[str]) -> list[float]:
    by_id = dict(zip(given["sample_id"], given[column]))
    return [by_id[i] for i in ids]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_dropped_does_not_depend_on_the_order(order: str, method: str) -> None:
    ranked, other = (curate(scores(), keep=0.6, method=method, order=o) for o in ("ranked", order))
    assert other.dropped == ranked.dropped
    assert other.fused == pytest.approx(ranked.fused, abs=0)
    assert set(other.kept) == set(ranked.kept)
    assert [*map(len, other.subsets)] == [*map(len, ranked.subsets)]
    assert (other.kept == ranked.kept) == (order == "ranked")
    assert other.order == order


@pytest.mark.parametrize(
    ("order", "reverse"), [("gap", True), ("rouge_l", True), ("cross_entropy", False), ("teacher_cross_entropy", False)]
)
def test_by_a_signal_its_easy_end_comes_first_and_of_the_gap_the_large_one(order: str, reverse: bool) -> None:
    given = scores()
    plan = curate(given, keep=0.7, order=order)
    values = of(order, given, plan.kept)
    assert values == sorted(values, reverse=reverse)
    ranked = curate(given, keep=0.7).kept
    place = {sample_id: n for n, sample_id in enumerate(ranked)}
    for a, b in zip(plan.kept, plan.kept[1:]):  # equals keep the ranking's order
        assert dict(zip(plan.kept, values))[a] != dict(zip(plan.kept, values))[b] or place[a] < place[b]


def test_learnable_keeps_the_largest_gaps_and_shuffles_them() -> None:
    given = scores(40)
    plan = curate(given, **CURATION_PRESETS["learnable"], seed=3)
    largest = sorted(given["sample_id"], key=lambda i: -of("gap", given, [i])[0])
    assert set(plan.kept) == set(largest[:30])
    assert [row["sample_id"] for row in plan.dropped] == largest[30:]
    assert [*map(len, plan.subsets)] == [10, 10, 10]
    assert plan.signals == {"gap": Signal(higher_is_easier=True, weight=1.0)}
    assert plan.kept == curate(given, **CURATION_PRESETS["learnable"], seed=3).kept
    others = [curate(given, **CURATION_PRESETS["learnable"], seed=s).kept for s in (4, 5)]
    assert len({*map(tuple, [plan.kept, *others, largest[:30]])}) == 4
    firsts = [curate(given, **CURATION_PRESETS["learnable"], seed=s).subsets[0] for s in range(40)]
    share = sum(i in largest[:10] for i in chain(*firsts)) / 400
    assert 0.23 < share < 0.43  # a third, by chance


def test_all_are_kept_and_two_are_shuffled_either_way() -> None:
    pairs = {
        tuple(curate(scores(2), keep=1.0, stages=1, method="random", order="shuffled", seed=s).kept) for s in range(20)
    }
    assert len(pairs) == 2


def test_the_plan_file_says_the_order(tmp_path: Path) -> None:
    plan = curate(scores(), order="gap")
    plan.save(tmp_path / "plan.json")
    assert '"order": "gap"' in (tmp_path / "plan.json").read_text()
    assert CurriculumPlan.load(tmp_path / "plan.json") == plan
    assert plan.signals["gap"] == Signal(higher_is_easier=True, weight=0.0)
    assert plan.with_subsets(plan.subsets, plan.dropped).order == "gap"


def test_weights_alone_stand_for_reflects_own_signals() -> None:
    named = {"gap": Signal(True, 2.0), "rouge_l": Signal(True, 0.5)}
    assert curate(scores(), signals={"gap": 2, "rouge_l": 0.5}) == curate(scores(), signals=named)
    assert {signal.name: signal.higher_is_easier for signal in _BUILT_IN} == HIGHER_IS_EASIER


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "shufled"}, r"unknown order 'shufled'; did you mean 'shuffled'\?"),
        ({"order": "length"}, "put that column among the signals"),
        ({"order": "chrf"}, "unknown column 'chrf'"),
        ({"signals": {"length": 1.0}}, "signal 'length' must have higher_is_easier"),
        ({"signals": {"gap": math.nan}}, "signal 'gap': weight must be a finite number, got nan"),
        ({"signals": {"gap": Signal(True, math.inf)}}, "signal 'gap': weight must be a finite number, got inf"),
        ({"signals": {"gap": {"higher_is_easier": True, "weight": "1"}}}, "weight must be a finite number, got '1'"),
    ],
)
def test_an_order_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        curate(scores(), **options)


@pytest.mark.parametrize("order", ["shuffled", "gap"])
def test_a_plan_that_is_filled_anew_keeps_its_order(order: str) -> None:
    plan = curate(scores(), keep=0.5, order=order, signals={"cross_entropy": 1.0})
    new = scores(seed=1)
    made = replan(plan, 1, Dataset.from_dict(new), seed=2)
    assert made.subsets[0] == plan.subsets[0]
    rest = list(chain(*made.subsets[1:]))
    ranked = replan(curate(scores(), keep=0.5, order=order, signals={"cross_entropy": 1.0}), 1, Dataset.from_dict(new))
    left = sorted(set(new["sample_id"]) - set(plan.subsets[0]), key=lambda i: of("cross_entropy", new, [i])[0])
    assert set(rest) == set(left[: len(rest)]) == set(chain(*ranked.subsets[1:]))
    assert rest != left[: len(rest)]
    if order == "gap":
        assert of("gap", new, rest) == sorted(of("gap", new, rest), reverse=True)
