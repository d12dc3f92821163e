"""Bands and weights of a plan: what is dropped before the ranking, PACED's p(1 - p), and both in its file."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from srd_fast import CurriculumPlan, UserError, curate
from srd_fast.curriculum import replan

RATES = [0.0, 0.1, 0.25, 0.5, 0.5, 0.75, 0.9, 1.0]
IDS = [f"s{i}" for i in range(len(RATES))]
# Hardness goes the other way than the pass rate, so that an order by one is not that by the other.
SCORES: dict[str, Any] = {"sample_id": IDS, "pass_rate": RATES, "cross_entropy": [float(i) for i in range(8)]}
BY_ENTROPY: dict[str, Any] = {"signals": {"cross_entropy": 1.0}, "keep": 1.0, "stages": 2}


def test_what_is_outside_a_band_is_dropped_before_the_ranking() -> None:
    plan = curate(SCORES, **BY_ENTROPY, band={"pass_rate": [0.1, 0.9]})
    assert plan.subsets == [["s1", "s2", "s3"], ["s4", "s5", "s6"]]
    assert plan.dropped == [
        {"sample_id": "s0", "reason": "pass_rate is 0, outside the band 0.1 to 0.9"},
        {"sample_id": "s7", "reason": "pass_rate is 1, outside the band 0.1 to 0.9"},
    ]
    assert set(plan.fused) == set(IDS[1:7])
    assert plan.ranked_by == ["cross_entropy"]
    # The share to keep is one of those within.
    some = curate(SCORES, **{**BY_ENTROPY, "keep": 0.6}, band={"pass_rate": [0.1, 0.9], "cross_entropy": [2, 9]})
    assert some.kept == ["s2", "s3", "s4"]
    assert [row["sample_id"] for row in some.dropped] == ["s5", "s6", "s0", "s1", "s7"]
    assert some.dropped[3]["reason"] == "cross_entropy is 1, outside the band 2 to 9"


@pytest.mark.parametrize("method", ["random", "none"])
def test_a_control_has_the_same_band(method: str) -> None:
    plan = curate(SCORES, **BY_ENTROPY, method=method, band={"pass_rate": [0.5, 0.75]})
    assert sorted(plan.kept) == ["s3", "s4", "s5"]


def test_weights_are_those_of_paced() -> None:
    plan = curate(SCORES, **{**BY_ENTROPY, "keep": 0.67}, weight_by="pass_rate")
    assert plan.kept == ["s1", "s2", "s3", "s4"]
    assert plan.weights == pytest.approx({"s1": 0.09, "s2": 0.1875, "s3": 0.25, "s4": 0.25})
    reasons = {row["sample_id"]: row["reason"] for row in plan.dropped}
    assert reasons["s0"] == "pass_rate is 0, with which it weighs nothing"
    assert reasons["s7"] == "pass_rate is 1, with which it weighs nothing"
    assert "beyond the 4 kept" in reasons["s5"]
    assert curate(SCORES, **BY_ENTROPY).weights == {}


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    plan = curate(SCORES, **BY_ENTROPY, band={"pass_rate": [0.1, 0.9]}, weight_by="pass_rate")
    plan.save(tmp_path / "plan.json")
    again = CurriculumPlan.load(tmp_path / "plan.json")
    assert again == plan
    assert (again.band, again.weight_by, again.weights) == (plan.band, "pass_rate", plan.weights)
    assert plan != curate(SCORES, **BY_ENTROPY, band={"pass_rate": [0.1, 0.9]})
    others = plan.with_subsets([["s1#2", "s1"]], [], {"s1": 1.0, "s1#2": 1.0})
    assert (others.weights, others.band) == ({"s1": 1.0, "s1#2": 1.0}, plan.band)
    plain = curate(SCORES, **BY_ENTROPY)
    plain.save(tmp_path / "plain.json")
    assert not {"band", "weight_by", "weights"} & set(json.loads((tmp_path / "plain.json").read_text()))


def test_ranked_anew_it_keeps_band_and_weights() -> None:
    plan = curate(SCORES, **BY_ENTROPY, band={"pass_rate": [0.1, 0.9]}, weight_by="pass_rate")
    rates = [0.5, 0.6, 0.7, 0.8, 1.0, 0.5, 0.05, 0.5]
    new = replan(plan, 1, Dataset.from_dict({**SCORES, "pass_rate": rates}))
    assert new.subsets == [["s1", "s2", "s3"], ["s0", "s5", "s7"]]
    assert (new.band, new.weight_by) == (plan.band, "pass_rate")
    assert {i: new.weights[i] for i in new.kept} == pytest.approx(
        {"s1": 0.09, "s2": 0.1875, "s3": 0.25, "s0": 0.25, "s5": 0.25, "s7": 0.25}
    )
    assert {row["sample_id"] for row in new.dropped} == {"s4", "s6"}
    solved = Dataset.from_dict({**SCORES, "pass_rate": [1.0] * 8})
    assert replan(plan, 1, solved) == plan, "nothing is left to learn, and the stage goes on with what it had"


def test_what_is_no_band_or_weight_is_said() -> None:
    for options, words in (
        ({"band": {"pass_rate": [0.9, 0.1]}}, r"band of 'pass_rate' must be .* \[0.1, 0.9\], got \[0.9, 0.1\]"),
        ({"band": {"pass_rate": [0.5]}}, "band of 'pass_rate' must be its least and greatest value"),
        ({"band": {"passrate": [0, 1]}}, "unknown column 'passrate'; did you mean 'pass_rate'"),
        ({"band": {"pass_rate": [0.3, 0.4]}}, "only 8 of 8 samples could be scored, and 8 of those are outside"),
        (
            {"band": {"pass_rate": [0.3, 0.4]}},
            r"\('s.': pass_rate is .*, outside the band 0.3 to 0.4\); widen band",
        ),
        (
            {"weight_by": "cross_entropy"},
            "'cross_entropy', which must be from 0 to 1 in every row, found 2",
        ),
        ({"weight_by": "rate"}, "unknown column 'rate'"),
    ):
        with pytest.raises(UserError, match=words):
            curate(SCORES, **BY_ENTROPY, **options)
