"""The plan is what the method says: checked against a second, simpler implementation, and against every bad input."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from srd_fast.curriculum import (
    CURATION_PRESETS,
    DEFAULT_SIGNALS,
    METHODS,
    PLAN_FORMAT,
    CurriculumPlan,
    Signal,
    curate,
    curation,
    plan_file,
)
from srd_fast.curriculum.ranking import competition_ranks
from srd_fast.errors import UserError
from srd_fast.run.config import load_run_config

Scores = dict[str, list[Any]]


def random_scores(count: int, seed: int = 0, levels: int = 40) -> Scores:
    """Scores with many ties: ROUGE-L and cross-entropy take `levels` values each."""
    draw = random.Random(seed)
    return {
        "sample_id": [f"id{i:04d}" for i in draw.sample(range(10 * count), count)],
        "rouge_l": [draw.randrange(levels) / levels for _ in range(count)],
        "cross_entropy": [0.5 + draw.randrange(levels) / 8 for _ in range(count)],
    }


def plain_plan(scores: Mapping[str, Sequence[Any]], k: float = 60) -> tuple[list[str], dict[str, float]]:
    """Ids from easy to hard and their fused score, written down from the method as plainly as can be."""
    rouge, entropy = scores["rouge_l"], scores["cross_entropy"]
    fused = {
        name: 1 / (k + 1 + sum(o > r for o in rouge)) + 1 / (k + 1 + sum(o < c for o in entropy))
        for name, r, c in zip(scores["sample_id"], rouge, entropy)
    }
    of = dict(zip(scores["sample_id"], entropy))
    return sorted(fused, key=lambda name: (-fused[name], of[name], name)), fused


def permuted(scores: Scores, seed: int) -> Scores:
    order = random.Random(seed).sample(range(len(scores["sample_id"])), len(scores["sample_id"]))
    return {name: [column[i] for i in order] for name, column in scores.items()}


def test_a_thousand_rows_with_ties_agree_with_the_plain_method() -> None:
    scores = random_scores(1000)
    ranked, fused = plain_plan(scores)
    plan = curate(scores)
    assert [len(s) for s in plan.subsets] == [250, 250, 250]
    for stage, share in enumerate((250, 500, 750)):
        assert plan.stage_ids(stage) == ranked[:share]
    assert [d["sample_id"] for d in plan.dropped] == ranked[750:]
    assert plan.kept == ranked[:750]
    assert list(plan.fused) == ranked
    assert plan.fused == pytest.approx(fused, rel=1e-12)
    assert len(set(fused.values())) < 1000, "these scores have no ties: the test would prove less"


def test_ranks_start_at_one_and_ties_share_the_better_one() -> None:
    values = np.array([0.5, 0.9, 0.5, 0.1, 0.9])
    assert competition_ranks(values, higher_is_easier=True).tolist() == [3, 1, 3, 5, 1]
    assert competition_ranks(values, higher_is_easier=False).tolist() == [2, 4, 2, 1, 4]
    plan = curate({"sample_id": ["a"], "rouge_l": [0.5], "cross_entropy": [1.0]}, keep=1, stages=1)
    assert plan.fused == {"a": 1 / 61 + 1 / 61}


def test_the_order_is_fused_then_cross_entropy_then_id() -> None:
    scores = {
        "sample_id": ["d", "c", "b", "a", "e"],
        "rouge_l": [0.2, 0.9, 0.5, 0.5, 0.9],
        "cross_entropy": [1.0, 3.0, 2.0, 2.0, 1.0],
    }
    # e leads with both ranks 1; a and b tie in all but their id; c (ranks 1, 5) and d (ranks 5, 1) tie in the sum.
    assert curate(scores, keep=1, stages=1).kept == ["e", "d", "c", "a", "b"]


@pytest.mark.parametrize("method", ["srd", "random", "none"])
def test_the_order_of_rows_changes_nothing(method: str) -> None:
    scores = random_scores(200, levels=6)
    first = curate(scores, method=method, seed=3)
    for seed in range(3):
        other = curate(permuted(scores, seed), method=method, seed=3)
        assert other == first
        assert list(other.fused) == list(first.fused)


def test_a_dataset_gives_the_same_plan() -> None:
    scores = random_scores(50)
    assert curate(Dataset.from_dict(scores)) == curate(scores)


# Columns against rows


def slow_order(scores: Scores, k: float, signals: Mapping[str, Signal], method: str, seed: int) -> Any:
    """Ranked ids, their fused scores and the unscored rows, row by row; sums in the same order, so equal to the bit."""
    unscored, rows = [], []
    for i, name in enumerate(scores["sample_id"]):
        values = {n: math.nan if scores[n][i] is None else scores[n][i] for n in signals}
        reason = scores["reason"][i] or next(
            (f"{n} is {v}, not a finite number" for n, v in values.items() if not math.isfinite(v)), None
        )
        if reason:
            unscored.append({"sample_id": name, "reason": reason})
            continue
        tie = scores["cross_entropy"][i] if "cross_entropy" in scores else 0
        rows.append((name, values, (1, 0.0) if tie is None or math.isnan(tie) else (0, tie)))
    ranked = []
    for name, values, tie in rows:
        fused = 0.0
        for n, s in signals.items():
            easier = sum(v[n] > values[n] if s.higher_is_easier else v[n] < values[n] for _, v, _ in rows)
            fused += s.weight / (k + 1 + easier)
        ranked.append((-fused, tie, name))
    ranked.sort()
    names = [name for _, _, name in ranked]
    if method == "random":
        by_id = sorted(names)
        names = [by_id[i] for i in np.random.default_rng(seed).permutation(np.arange(len(by_id)))]
    fused_of = {name: -f for f, _, name in ranked}
    return names, {name: fused_of[name] for name in names}, unscored


def awkward_scores(draw: random.Random) -> Scores:
    """Ties in every column, ids that share long beginnings, values and reasons of every bad kind."""
    count, levels = draw.randrange(6, 120), draw.choice([1, 3, 40, 10**6])
    letters = draw.choice(["ab", 'aé中\U0001f600"\\\n', "0123456789abcdef"])
    start = draw.choice(["", "sample", "a beginning that is longer than sixteen bytes"])
    ids = {start + "".join(draw.choices(letters, k=draw.randrange(20))) for _ in range(count)}
    bad = [None, math.nan, math.inf, -math.inf]

    def column(of: float) -> list[Any]:
        return [draw.choice(bad) if draw.random() < 0.03 else draw.randrange(levels) / of for _ in ids]

    scores: Scores = {"sample_id": draw.sample(sorted(ids), len(ids)), "rouge_l": column(levels)}
    scores |= {"cross_entropy": column(-8), "length": column(1)}
    reasons = [draw.choice([None, "", 'a "reason"\n']) if draw.random() < 0.1 else None for _ in ids]
    return {**scores, "reason": reasons}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["lists", "dataset", "parquet"])
def test_columns_give_what_rows_give(method: str, form: str, tmp_path: Path) -> None:
    draw = random.Random(METHODS.index(method))
    for _ in range(20):
        scores, k = awkward_scores(draw), draw.choice([1, 60, 60.5])
        names = draw.sample(["rouge_l", "cross_entropy", "length"], draw.randrange(1, 4))
        signals = {n: Signal(n == "rouge_l", draw.choice([0.0, 1.0, 2.5])) for n in names}
        if "cross_entropy" not in signals and draw.random() < 0.7:
            del scores["cross_entropy"]
        given: Any = scores if form == "lists" else Dataset.from_dict(scores)
        if form == "parquet":
            given.to_parquet(str(tmp_path / "scores.parquet"))
            given = draw.choice([str, Path])(tmp_path / "scores.parquet")
        ranked, fused, unscored = slow_order(scores, k, signals, method, seed=7)
        if not ranked:
            continue
        plan = curate(given, keep=1, stages=1, rrf_k=k, signals=signals, method=method, seed=7)
        assert plan.subsets == [ranked]
        assert list(plan.fused.items()) == list(fused.items())
        assert plan.unscored == unscored


def test_of_a_file_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = random_scores(30)
    scores |= {"generation": ["x"] * 30, "reason": [None] * 30, "length": [1] * 30}
    Dataset.from_dict(scores).to_parquet(str(tmp_path / "scores.parquet"))
    read: list[str] = []

    class Spy(curation.pq.ParquetFile):
        def read(self, columns: Sequence[str]) -> pa.Table:
            read.extend(columns)
            return super().read(columns)

    monkeypatch.setattr(curation.pq, "ParquetFile", Spy)
    signals = {"rouge_l": Signal(higher_is_easier=True)}
    assert curate(tmp_path / "scores.parquet", signals=signals) == curate(scores, signals=signals)
    assert sorted(read) == ["cross_entropy", "reason", "rouge_l", "sample_id"]


def test_a_file_that_is_no_parquet_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("sample_id")
    for bad in (tmp_path / "text.parquet", str(tmp_path / "absent.parquet"), tmp_path):
        with pytest.raises(UserError, match=r"^scores '.*' cannot be read as parquet: [^\n]+$"):
            curate(bad)
    Dataset.from_dict({"sample_id": ["a"], "rougel": [1.0]}).to_parquet(str(tmp_path / "named.parquet"))
    with pytest.raises(UserError, match=r"unknown column 'rouge_l'; did you mean 'rougel'"):
        curate(tmp_path / "named.parquet")


# What cannot be ranked


def test_unscored_rows_are_listed_with_their_reason() -> None:
    scores = random_scores(12)
    scores["sample_id"] = [f"s{i}" for i in range(12)]
    scores["rouge_l"][1] = math.nan
    scores["cross_entropy"][3] = math.inf
    scores["cross_entropy"][5] = None
    scores["rouge_l"][7] = -math.inf
    scores["reason"] = [None] * 12
    scores["reason"][9] = "empty reference"
    plan = curate(scores, stages=2, keep=0.75)
    assert plan.unscored == [
        {"sample_id": "s1", "reason": "rouge_l is nan, not a finite number"},
        {"sample_id": "s3", "reason": "cross_entropy is inf, not a finite number"},
        {"sample_id": "s5", "reason": "cross_entropy is nan, not a finite number"},
        {"sample_id": "s7", "reason": "rouge_l is -inf, not a finite number"},
        {"sample_id": "s9", "reason": "empty reference"},
    ]
    ranked = {name: [v for i, v in enumerate(c) if i not in (1, 3, 5, 7, 9)] for name, c in scores.items()}
    rest = curate(ranked, stages=2, keep=0.75)
    assert (plan.subsets, plan.dropped, plan.fused) == (rest.subsets, rest.dropped, rest.fused)
    assert len(plan.kept) + len(plan.dropped) == 7


def test_dropped_rows_say_where_they_stood() -> None:
    plan = curate(random_scores(8), keep=0.5, stages=2)
    reasons = [d["reason"] for d in plan.dropped]
    assert reasons == [f"fused rank {rank} of 8, beyond the 4 kept" for rank in (5, 6, 7, 8)]
    assert "drawn 5 of 8" in curate(random_scores(8), keep=0.5, stages=2, method="random").dropped[0]["reason"]


# Sizes


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 1), st.integers(1, 9))
def test_sizes(count: int, keep: float, stages: int) -> None:
    scores = {"sample_id": [f"{i:03d}" for i in range(count)], "rouge_l": [0.0] * count}
    scores["cross_entropy"] = list(range(count))
    kept = math.floor(count * keep + 1e-9)
    if kept < stages:
        with pytest.raises(UserError, match="stages"):
            curate(scores, keep=keep, stages=stages)
        return
    plan = curate(scores, keep=keep, stages=stages)
    sizes = [len(s) for s in plan.subsets]
    assert sum(sizes) == kept
    assert len(sizes) == stages
    assert max(sizes) - min(sizes) <= 1
    assert plan.kept + [d["sample_id"] for d in plan.dropped] == scores["sample_id"]


@pytest.mark.parametrize(("count", "size"), [(1000, 250), (1003, 250), (11, 2), (4, 1)])
def test_official_sizes_are_whole_quarters(count: int, size: int) -> None:
    scores = random_scores(count)
    plan = curate(scores, **CURATION_PRESETS["official"])
    assert [len(s) for s in plan.subsets] == [size] * 3
    assert size == int(count / 4)
    assert plan.kept == plain_plan(scores)[0][: 3 * size]
    assert len(plan.dropped) == count - 3 * size


@pytest.mark.parametrize(("count", "sizes"), [(4, [1] * 4), (1000, [250] * 4), (1003, [251, 251, 250, 251])])
def test_pocl_has_cumulative_quarters_of_all(count: int, sizes: list[int]) -> None:
    scores = random_scores(count)
    plan = curate(scores, **CURATION_PRESETS["POCL"])
    assert [len(s) for s in plan.subsets] == sizes
    assert plan.dropped == []
    assert plan.kept == plain_plan(scores)[0]


def test_paper_keeps_three_quarters_to_the_row() -> None:
    plan = curate(random_scores(1003), **CURATION_PRESETS["paper"])
    assert [len(s) for s in plan.subsets] == [251, 250, 251]
    assert (plan.keep, plan.stages, plan.rrf_k) == (0.75, 3, 60)


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, math.nan, "0.5", None])
def test_keep_is_a_share(keep: Any) -> None:
    with pytest.raises(UserError, match=r"keep must be in \(0, 1\], got"):
        curate(random_scores(9), keep=keep)


@pytest.mark.parametrize("stages", [0, -1, 1.5, "3", None])
def test_stages_is_a_number_of_subsets(stages: Any) -> None:
    with pytest.raises(UserError, match="stages must be a whole number of at least 1, got"):
        curate(random_scores(9), stages=stages)


@pytest.mark.parametrize("options", [{}, {"floor_subsets": True}, {"method": "random"}])
def test_more_stages_than_kept_samples_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"stages is 5 but keep=0.5 of 9 samples leaves"):
        curate(random_scores(9), keep=0.5, stages=5, **options)
    unscored = {"sample_id": ["a", "b"], "rouge_l": [float("nan")] * 2, "cross_entropy": [1.0, 2.0]}
    said = r"only 0 of 2 samples could be scored \('a': rouge_l is nan, not a finite number\); leave out the signal"
    with pytest.raises(UserError, match=said):
        curate(unscored, stages=1)
    with pytest.raises(UserError, match="stages is 10 but only 9 of 9 samples could be scored; lower stages"):
        curate(random_scores(9), keep=1, stages=10, **options)
    assert [len(s) for s in curate(random_scores(9), keep=1, stages=9, **options).subsets] == [1] * 9


@pytest.mark.parametrize("rrf_k", [0, -60, math.nan])
def test_rrf_k_is_positive(rrf_k: float) -> None:
    with pytest.raises(UserError, match="rrf_k must be above 0, got"):
        curate(random_scores(9), rrf_k=rrf_k)


def test_rrf_k_counts() -> None:
    scores = random_scores(100)
    for k in (1, 60, 1000):
        assert curate(scores, rrf_k=k, keep=1).kept == plain_plan(scores, k)[0]
    assert plain_plan(scores, 1)[0] != plain_plan(scores, 1000)[0]


# Signals


def test_more_signals_with_weights() -> None:
    scores = random_scores(60)
    scores["length"] = [random.Random(i).randrange(30) for i in range(60)]
    signals = {**DEFAULT_SIGNALS, "length": Signal(higher_is_easier=False, weight=2.5)}
    plan = curate(scores, signals=signals, keep=1)
    _, of_two = plain_plan(scores)
    shorter = [sum(o < v for o in scores["length"]) for v in scores["length"]]
    expected = {n: of_two[n] + 2.5 / (61 + s) for n, s in zip(scores["sample_id"], shorter)}
    assert plan.fused == pytest.approx(expected, rel=1e-12)
    assert plan.kept == sorted(expected, key=lambda n: (-expected[n], *tie_break(scores, n)))
    assert plan.signals == signals


def tie_break(scores: Scores, name: str) -> tuple[float, str]:
    return scores["cross_entropy"][scores["sample_id"].index(name)], name


def test_signals_may_be_plain_dicts_and_need_no_cross_entropy() -> None:
    scores = {"sample_id": ["a", "b", "c"], "length": [3, 1, 3]}
    plan = curate(scores, signals={"length": {"higher_is_easier": False}}, keep=1, stages=1)
    assert plan.kept == ["b", "a", "c"]
    assert plan.signals == {"length": Signal(higher_is_easier=False, weight=1.0)}


def test_a_weight_of_zero_leaves_a_signal_out() -> None:
    scores = random_scores(50)
    signals = {"rouge_l": Signal(True, 0.0), "cross_entropy": Signal(False)}
    plan = curate(scores, signals=signals, keep=1, stages=1)
    assert plan.kept == [n for _, n in sorted(zip(scores["cross_entropy"], scores["sample_id"]))]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rouge_l": None}, r"unknown column 'rouge_l'"),
        ({"sample_id": None}, r"unknown column 'sample_id'"),
        ({"sample_id": ["a"] * 9}, r"sample_id must be unique"),
        ({"sample_id": ["an id of more than eight bytes", *"abcdefg", "an id of more than eight bytes"]}, "be unique"),
        ({"sample_id": [*"abcdefgh", None]}, r"every row must have one"),
        ({"rouge_l": ["high"] * 9}, r"rouge_l"),
    ],
)
def test_scores_are_checked(change: Scores, complaint: str) -> None:
    scores = {n: c for n, c in {**random_scores(9), **change}.items() if c is not None}
    with pytest.raises(UserError, match=complaint):
        curate(scores)


@pytest.mark.parametrize("signals", [{"rouge_l": {"higher_is_easier": True, "weigth": 1}}, {"rouge_l": {}}])
def test_a_misspelt_signal_is_a_user_error(signals: Any) -> None:
    with pytest.raises(UserError):
        curate(random_scores(9), signals=signals)


# Controls


def test_random_keeps_and_stages_as_many() -> None:
    scores = random_scores(101)
    srd, drawn = curate(scores), curate(scores, method="random", seed=1)
    assert [len(s) for s in drawn.subsets] == [len(s) for s in srd.subsets]
    assert len(drawn.dropped) == len(srd.dropped)
    assert sorted(drawn.kept + [d["sample_id"] for d in drawn.dropped]) == sorted(scores["sample_id"])
    assert drawn.kept != srd.kept
    assert drawn == curate(scores, method="random", seed=1)
    assert drawn.kept != curate(scores, method="random", seed=2).kept
    assert drawn.fused == srd.fused


def test_random_takes_no_notice_of_difficulty() -> None:
    scores = random_scores(1000, levels=1000)
    ranked = plain_plan(scores)[0]
    easier_half = set(ranked[:500])
    first = curate(scores, method="random", seed=0).subsets[0]
    assert 95 < len(easier_half.intersection(first)) < 155


def test_none_trains_on_every_scored_sample_in_every_stage() -> None:
    scores = random_scores(40)
    scores["rouge_l"][4] = math.nan
    plan = curate(scores, method="none", keep=0.5)
    assert [len(s) for s in plan.subsets] == [39, 0, 0]
    assert plan.dropped == []
    assert plan.unscored[0]["sample_id"] == scores["sample_id"][4]
    assert plan.keep == 1.0
    for stage in range(3):
        assert sorted(plan.stage_ids(stage)) == sorted(set(scores["sample_id"]) - {scores["sample_id"][4]})


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown curation method 'randm'; did you mean 'random'\? Known: none"):
        curate(random_scores(9), method="randm")


# The knee


def bimodal_scores(easy: int, hard: int) -> Scores:
    """Easy samples of little spread and far harder ones, in both signals and in any order."""
    draw = np.random.default_rng(0)
    scores: Scores = {"sample_id": [f"{'easy' if i < easy else 'hard'}{i}" for i in range(easy + hard)]}
    scores["rouge_l"] = [*draw.normal(0.8, 0.03, easy), *draw.normal(0.2, 0.05, hard)]
    scores["cross_entropy"] = [*draw.normal(1.0, 0.1, easy), *draw.normal(5.0, 0.5, hard)]
    return permuted(scores, 0)


@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
def test_the_knee_is_where_the_hard_tail_begins(share: float, caplog: pytest.LogCaptureFixture) -> None:
    scores = bimodal_scores(easy := round(2000 * share), 2000 - easy)
    plan = curate(scores, keep="knee")
    assert plan.keep == pytest.approx(share, abs=0.03)
    assert plan.keep_rule == "knee"
    assert len(plan.kept) == round(plan.keep * 2000)
    assert plan.kept == curate(scores, keep=1).kept[: len(plan.kept)]
    wrong = sum(i.startswith("hard") for i in plan.kept) + sum(d["sample_id"].startswith("easy") for d in plan.dropped)
    assert wrong <= 0.03 * 2000
    assert not caplog.records


def test_the_knee_is_that_of_values_and_takes_weights() -> None:
    scores = bimodal_scores(800, 200)
    scores["noise"] = list(np.random.default_rng(1).random(1000))  # does not bend
    signals = {n: Signal(n == "rouge_l", float(n != "noise")) for n in ("rouge_l", "cross_entropy", "noise")}
    assert curate(scores, keep="knee", signals=signals).keep == curate(scores, keep="knee").keep
    x = np.linspace(0, 1, 500)
    straight, bent = ({"sample_id": [f"{i:03d}" for i in range(500)], "loss": v} for v in (x, np.maximum(x, 5 * x - 3)))
    of_loss = {"loss": Signal(higher_is_easier=False)}
    assert curate(straight, keep=0.5, signals=of_loss) == curate(bent, keep=0.5, signals=of_loss), "ranks are the same"
    assert curate(straight, keep="knee", signals=of_loss).keep == 1.0
    assert curate(bent, keep="knee", signals=of_loss).keep == pytest.approx(0.75, abs=0.005)


def test_normal_difficulties_bend_where_the_docstring_says() -> None:
    values = np.random.default_rng(0).normal(size=200_000)
    scores = {"sample_id": [str(i) for i in range(len(values))], "cross_entropy": values}
    plan = curate(scores, keep="knee", signals={"cross_entropy": Signal(higher_is_easier=False)})
    assert plan.keep == pytest.approx(0.87, abs=0.01)


@pytest.mark.parametrize("shape", ["straight", "concave", "flat"])
def test_without_a_bend_everything_is_kept(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    x = np.linspace(0, 1, 500)
    scores = {"sample_id": [f"{i:03d}" for i in range(500)], "rouge_l": [0.5] * 500}
    scores["cross_entropy"] = list({"straight": x, "concave": np.sqrt(x), "flat": 0 * x}[shape])
    plan = curate(scores, keep="knee")
    assert (plan.keep, plan.keep_rule, len(plan.kept)) == (1.0, "knee", 500)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "keep=knee: the difficulties do not bend" in caplog.text


def test_the_knee_leaves_a_sample_for_every_stage() -> None:
    scores = {"sample_id": [*"abcdef"], "cross_entropy": [0.0, 0.0, 8.0, 9.0, 10.0, 80.0]}
    signals = {"cross_entropy": Signal(higher_is_easier=False)}
    assert len(curate(scores, keep="knee", stages=1, signals=signals).kept) == 5
    for floor in (False, True):
        plan = curate(scores, keep="knee", stages=6, signals=signals, floor_subsets=floor)
        assert [len(s) for s in plan.subsets] == [1] * 6
        assert plan.keep == 1.0


def test_controls_of_a_knee() -> None:
    scores = bimodal_scores(800, 200)
    srd, drawn, none = (curate(scores, keep="knee", method=method) for method in METHODS)
    assert [len(s) for s in drawn.subsets] == [len(s) for s in srd.subsets]
    assert (drawn.keep, drawn.keep_rule) == (srd.keep, "knee")
    assert drawn.kept != srd.kept
    assert none == curate(scores, method="none")


def test_the_config_takes_a_knee() -> None:
    assert load_run_config(None, ["curate.keep=knee"]).curate.keep == "knee"
    with pytest.raises(UserError, match=r"^config: curate.keep: must be in \(0, 1\], or 'knee', got 'kne'$"):
        load_run_config(None, ["curate.keep=kne"])


# The plan


def test_a_plan_of_lists_is_a_plan_of_columns() -> None:
    found = curate(random_scores(50), keep=0.5)
    given: dict[str, Any] = {n: getattr(found, n) for n in ("subsets", "dropped", "unscored", "fused", "signals")}
    given |= {n: getattr(found, n) for n in ("method", "keep", "keep_rule", "stages", "rrf_k")}
    assert CurriculumPlan(**given) == found
    assert CurriculumPlan(**{**given, "fused": dict(reversed(found.fused.items()))}) == found, "as dicts compare"
    assert repr(found).startswith("<CurriculumPlan of [8, 9, 8] + 25 dropped + 0 unscored: method='srd', keep=0.5")
    changes: dict[str, Any] = {
        "subsets": found.subsets[:2], "dropped": found.dropped[1:], "unscored": found.dropped[:1], "stages": 2,
        "fused": {**found.fused, "x": 0.5}, "keep": 0.6, "keep_rule": "knee", "rrf_k": 61, "signals": {},
        "order": "shuffled",
    }  # fmt: skip
    for name, change in changes.items():
        assert CurriculumPlan(**{**given, name: change}) != found, name
    assert found != given


def test_a_plan_makes_python_objects_only_when_asked(tmp_path: Path) -> None:
    plan = curate(random_scores(50))
    plan.save(tmp_path / "plan.json")
    assert plan == curate(random_scores(50))
    assert not {"subsets", "dropped", "unscored", "fused"} & set(vars(plan))
    assert plan.fused is plan.fused
    assert [c.to_pylist() for c in plan.subset_columns] == plan.subsets


@pytest.mark.parametrize(
    "rows", [{"dropped": [{"sample_id": "a"}]}, {"unscored": [{"reason": "a"}]}, {"fused": {"a": math.nan}}]
)
def test_a_plan_refuses_half_rows(rows: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(rows))):
        CurriculumPlan(subsets=[["b"]], **rows)


# Files


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_pieces_are_laid_out_as_json_lays_them_out(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "_CHUNK", chunk)
    scores = random_scores(40)
    scores["rouge_l"][3:6] = [math.nan] * 3
    scores["sample_id"][1:3] = ['"quoted\\"', "ünïcode 中\n\u2028\x00"]
    for i, method in enumerate(METHODS):
        plan = curate(scores, method=method)
        plan.save(tmp_path / f"{i}.json")
        text = (tmp_path / f"{i}.json").read_text(encoding="utf-8")
        content = json.loads(text)
        assert text == json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        names = ["format", "method", "keep", "keep_rule", "stages", "rrf_k", "signals", "order"]
        assert list(content) == [*names, "subsets", "dropped", "unscored", "fused"]
        for name in ("subsets", "dropped", "unscored", "fused"):
            assert content[name] == getattr(plan, name)


def test_scores_of_any_size_come_back_to_the_bit(tmp_path: Path) -> None:
    values = [1 / 3, 1e-5, 2.2249249665128724e-07, 5e-324, 1.7976931348623157e308, 3.0, 0.0, 1e22]
    plan = CurriculumPlan([["a"]], fused={str(i): v for i, v in enumerate(values)})
    plan.save(tmp_path / "plan.json")
    assert list(CurriculumPlan.load(tmp_path / "plan.json").fused.values()) == values


def test_a_plan_from_before_the_knee_and_orders_is_read(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(_broken_plans()["whole"])
    plan = CurriculumPlan.load(tmp_path / "plan.json")
    assert (plan.keep_rule, plan.order) == ("ratio", "ranked")


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "random"}, {"method": "none"}, {"floor_subsets": True}, {"order": "cross_entropy"}],
)
def test_a_saved_plan_comes_back_equal(options: dict[str, Any], tmp_path: Path) -> None:
    scores = random_scores(101)
    scores["rouge_l"][0] = math.nan
    scores["sample_id"][1] = "id with ünïcode 中\u2028"
    plan = curate(scores, rrf_k=60.5, signals={**DEFAULT_SIGNALS, "rouge_l": Signal(True, 1 / 3)}, **options)
    plan.save(tmp_path / "plan.json")
    loaded = CurriculumPlan.load(str(tmp_path / "plan.json"))
    assert loaded == plan
    assert list(loaded.fused.items()) == list(plan.fused.items())
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["format"] == PLAN_FORMAT


def _broken_plans() -> dict[str, str]:
    whole = {
        "format": PLAN_FORMAT, "method": "srd", "keep": 0.75, "stages": 1, "rrf_k": 60,
        "signals": {"rouge_l": {"higher_is_easier": True, "weight": 1.0}},
        "subsets": [["a", "b"]], "dropped": [], "unscored": [], "fused": {"a": 0.03},
    }  # fmt: skip
    changed = {
        "whole": {},
        "other format": {"format": "srd_fast.plan/0"},
        "unknown key": {"colour": 1},
        "wrong signal": {"signals": {"rouge_l": {"weight": 1.0}}},
        "signals a list": {"signals": []},
        "subsets a number": {"subsets": 5},
        "subsets of texts": {"subsets": ["ab", "cd"]},
        "subsets of numbers": {"subsets": [[1, 2]]},
        "no subsets": {"subsets": []},
        "empty first subset": {"subsets": [[], ["a"]]},
        "a sample twice": {"subsets": [["a"], ["a"]]},
        "no reason": {"dropped": [{"sample_id": "c"}]},
        "fused a text": {"fused": {"a": "high"}},
    }
    plans = {name: json.dumps({**whole, **change}) for name, change in changed.items()}
    plans |= {
        f"without {name}": json.dumps({k: v for k, v in whole.items() if k != name}) for name in ("format", "subsets")
    }
    return plans | {"cut off": json.dumps(whole)[:-20], "empty": "", "list": "[]", "null": "null", "bytes": "\x00\x01"}


@pytest.mark.parametrize("kind", sorted(_broken_plans().keys() - {"whole"}))
def test_a_damaged_plan_is_a_user_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(_broken_plans()[kind])
    with pytest.raises(UserError, match=r"plan\.json"):
        CurriculumPlan.load(path)


def test_a_missing_plan_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make it again with `srd-fast curate`"):
        CurriculumPlan.load(tmp_path / "plan.json")
