"""The page says when a ranking is a length count, when its signals say nothing, and what kinds of rows it dropped."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srd_fast.curriculum import curate
from srd_fast.report.idle import explained, ranking_view, spearman
from srd_fast.report.read import FloatArray, read_run

COUNT = 400
RANDOM = np.random.default_rng(0)
LENGTH = RANDOM.integers(8, 200, COUNT)


def said(
    folder: Path,
    rouge_l: FloatArray,
    cross_entropy: FloatArray,
    references: list[str] | None = None,
    method: str = "srd",
    keep: float = 0.75,
    stages: int = 3,
    **more: FloatArray,
) -> tuple[str, dict[str, float], dict[str, tuple[str, str]]]:
    """Sentences, correlations and kinds of a run with these scores."""
    ids = [f"row-{i}" for i in range(COUNT)]
    references = references or ["x" * n for n in LENGTH]
    (folder / "data").mkdir()
    prompts = [f"prompt {i}" for i in range(COUNT)]
    train = pa.table({"sample_id": ids, "prompt": prompts, "references": [[x] for x in references]})
    pq.write_table(train, folder / "data" / "train.parquet")
    scores = {"sample_id": ids, "generation": ["a"] * COUNT, "rouge_l": rouge_l, "cross_entropy": cross_entropy}
    pq.write_table(pa.table({**scores, **more}), folder / "reflections.parquet")
    curate(folder / "reflections.parquet", method=method, keep=keep, stages=stages).save(folder / "plan.json")
    view = ranking_view(read_run(folder))
    assert view is not None
    return " ".join(view["sentences"]), dict(view["correlations"]), {name: x for name, *x in view["kinds"]}


def test_a_ranking_by_length_is_called_that(tmp_path: Path) -> None:
    noise = RANDOM.normal(0, 3, COUNT)
    text, found, _ = said(tmp_path, 1 / LENGTH, LENGTH + noise)
    assert int(re.findall(r"explains (\d+)% of the ranking", text)[0]) > 90
    assert "sorting by length would give nearly this curriculum" in text
    assert re.search(r"the longest rows instead would have dropped 9\d% of the same rows; chance alone gives 25%", text)
    assert found["length of the reference"] > 0.95
    assert re.search(r"ROUGE-L and cross-entropy have a rank correlation of -(0\.9\d|1\.00): they say the same", text)


def test_a_ranking_that_has_nothing_to_do_with_length_is_not(tmp_path: Path) -> None:
    rouge, entropy, teacher = (RANDOM.uniform(0, 1, COUNT) for _ in range(3))
    text, found, _ = said(tmp_path, rouge, entropy, teacher_cross_entropy=entropy + 0.01 * teacher)
    assert int(re.findall(r"explains (\d+)% of the ranking", text)[0]) < 10
    assert "sorting by length" not in text
    assert "next to nothing in common" in text
    assert found["the teacher's own cross-entropy"] == pytest.approx(found["cross-entropy"], abs=0.02)
    assert found["ROUGE-L"] < -0.5


def test_a_length_that_is_hard_at_both_ends_explains_too() -> None:
    """A rank correlation alone would say that length has no part in it."""
    hardness = np.abs(LENGTH - np.median(LENGTH))
    assert abs(spearman(hardness, LENGTH.astype(float))) < 0.2
    assert explained(hardness, LENGTH.astype(float)) > 0.85
    assert explained(RANDOM.normal(size=COUNT), LENGTH.astype(float)) < 0.1
    assert explained(hardness, np.ones(COUNT)) == 0
    assert np.isnan(explained(np.ones(COUNT), LENGTH.astype(float)))


def test_rank_correlation_is_the_textbooks() -> None:
    first, second = np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 7])
    assert spearman(first, second) == pytest.approx(0.8207826816681233)
    assert spearman(first, -first) == pytest.approx(-1)
    assert spearman(np.append(first, np.nan), np.append(second, 3)) == pytest.approx(0.8207826816681233)
    assert np.isnan(spearman(first, np.ones(5)))


def test_among_references_of_one_length_chance_decides(tmp_path: Path) -> None:
    """Not the order in which the plan lists the rows, kept ones first."""
    rouge, entropy = RANDOM.uniform(0, 1, COUNT), RANDOM.uniform(0, 1, COUNT)
    for name, references in (
        ("one", ["A"] * COUNT),
        ("two", ["yes" if x < 0.5 else "no" for x in RANDOM.random(COUNT)]),
    ):
        (tmp_path / name).mkdir()
        text, *_ = said(tmp_path / name, rouge, entropy, references)
        share = re.findall(r"rows instead would have dropped (\d+)% of the same rows; chance alone gives 25%", text)[0]
        assert 24 <= int(share) <= (25 if name == "one" else 31)


def test_rows_without_a_score_are_not_trained_on(tmp_path: Path) -> None:
    rouge, entropy = RANDOM.uniform(0, 1, COUNT), np.where(np.arange(COUNT) < 100, np.nan, RANDOM.uniform(0, 1, COUNT))
    text, *_ = said(tmp_path, rouge, entropy, keep=1.0, stages=1)
    assert "idle" not in text


def test_ties_and_plans_that_do_nothing_are_said(tmp_path: Path) -> None:
    rouge, entropy = np.where(np.arange(COUNT) < 300, 0.0, 0.5), RANDOM.uniform(0, 1, COUNT)
    cases = (
        ("ties", {}, "75% of the rows have the same ROUGE-L (0): it cannot tell these apart."),
        ("idle", {"keep": 1.0, "stages": 1}, "The curriculum is idle: all rows are kept, in one subset."),
        ("random", {"method": "random"}, "this run is a control"),
        ("none", {"method": "none", "keep": 1.0, "stages": 1}, "The curriculum is idle"),
    )
    for name, options, expected in cases:
        (tmp_path / name).mkdir()
        text, found, _ = said(tmp_path / name, rouge, entropy, **options)  # type: ignore[arg-type]
        assert expected in text
        assert bool(found) == (name in ("ties", "idle"))


def test_kinds_of_rows_are_counted_among_dropped_and_kept(tmp_path: Path) -> None:
    """The hundred hardest rows are dropped: ten short, twenty long, thirty Greek, forty as the others."""
    kinds = (
        ["ab"] * 10
        + ["word " * 200] * 20
        + ["λόγος και άλλα " * 4] * 30
        + ["plain words, of a usual length " * 2] * 340
    )
    hard = np.arange(COUNT, 0, -1.0)
    _, _, found = said(tmp_path, 1 / hard, hard, references=kinds)
    assert {name.split(",")[0].split(":")[0]: shares for name, shares in found.items()} == {
        "very short reference": ["10.0%", "0.0%"],
        "very long reference": ["20.0%", "0.0%"],
        "mostly of another script than the Latin one": ["30.0%", "0.0%"],
        "duplicate": ["0.0%", "0.0%"],
    }
    table = pq.read_table(tmp_path / "data" / "train.parquet")
    prompts = pa.array(
        ["Same  Prompt" if i in (390, 395) else "same prompt" if i == 399 else str(i) for i in range(COUNT)]
    )
    pq.write_table(table.set_column(1, "prompt", prompts), tmp_path / "data" / "train.parquet")
    view = ranking_view(read_run(tmp_path))
    assert view is not None
    assert view["kinds"][-1][1:] == ("0.0%", "1.0%")
