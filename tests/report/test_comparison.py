"""`srd-fast compare`: paired intervals that hold what they say, and a difference inside its interval is none."""

import json
import math
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_all_rows import HOSTILE, blocks
from test_report import Tags
from typer.testing import CliRunner

from srd_fast.cli import app
from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.files import content_digest
from srd_fast.report import compare_runs, comparison_text, write_comparison
from srd_fast.report.comparison import LEVEL
from srd_fast.report.intervals import Measured, difference_interval, quantiles_of_t
from srd_fast.run.config import RunConfig
from srd_fast.run.pipeline import execute
from srd_fast.run.steps import control_config, outcome

COUNT = 60


def write_run(
    folder: Path,
    kl: tuple[float, float],
    seed: int = 0,
    ids: range = range(COUNT),
    teacher: str = "t",
    changed: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> str:
    """A run whose models have a KL per token, start and student, beside noise of the rows that all runs share."""
    folder.mkdir()
    noise, own = np.random.default_rng(99).normal(0, 3, 500)[: len(ids)], np.random.default_rng(seed)
    (folder / "data").mkdir()
    table = {"sample_id": [f"v{i}" for i in ids], "prompt": [HOSTILE[i % 3] for i in ids]}
    references = pa.array([[HOSTILE[1]]] * len(ids))
    pq.write_table(pa.table(table | {"references": references}), folder / "data" / "validation.parquet")
    models: dict[str, Any] = {}
    for name, level in zip(("start", "student"), kl):
        rows = {
            "sample_id": table["sample_id"],
            "generation": [HOSTILE[i % 3] for i in ids],
            "rouge_l": own.uniform(0.2, 0.4, len(ids)).tolist(),
            "cross_entropy": (10 * (4 + noise) + own.normal(0, 1, len(ids))).tolist(),
            "kl": (10 * (level + 4 + noise) + own.normal(0, 1, len(ids))).tolist(),
            "num_tokens": [10] * len(ids),
        }
        models[name] = {"key": "", "rows": rows | (changed or {})}
    (folder / "evaluation.json").write_text(json.dumps(models))
    (folder / "summary.json").write_text(json.dumps({"teacher": teacher}))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({"output_dir": str(folder), **config}))
    return str(folder)


def verdicts(*runs: str) -> list[list[str]]:
    return [[d.verdict for d in pair.differences] for pair in compare_runs(runs).pairs]


def test_start_and_student_differ_and_two_seeds_do_not(tmp_path: Path) -> None:
    """Between rows KL varies by 3, between models by 0.1: pairs alone can tell."""
    one = write_run(tmp_path / "a", (2.0, 1.0), 5)
    other = write_run(tmp_path / "b", (2.0, 1.0), 2)
    near = write_run(tmp_path / "c", (2.0, 1.1), 4)
    none = "no difference"
    assert verdicts(one, other, near) == [
        *[["better", none, none]] * 3,
        [none] * 3,
        ["worse", none, none],
    ]
    assert verdicts(f"{one}:student", f"{one}:start") == [["worse", none, none]]
    text = comparison_text(compare_runs([one, other]))
    assert "60 validation rows that all have" in text
    assert re.search(
        r"a, distilled student against a, starting student, 60 rows\n  KL to the teacher +-1\.0\d\d +\[-1", text
    )
    assert text.count("better") == 2


def paired_interval(apart: np.ndarray, weights: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Of one seed, whose first model measures 0 everywhere."""
    rows = tuple(map(str, range(len(apart))))
    return difference_interval([Measured(rows, 0 * apart, weights)], [Measured(rows, apart, weights)], level, True)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random, inside = np.random.default_rng(1), 0
    for _ in range(150):
        weights = random.integers(5, 40, 50).astype(float)
        low, high = paired_interval(random.exponential(0.3 * weights), weights, level=0.9)
        inside += low <= 0.3 <= high
    assert 0.8 <= inside / 150 <= 0.97
    apart = random.normal(0, 1, 400)
    ends = paired_interval(apart, np.ones(400))
    # What theory gives for a mean at that level: 2.39 standard errors.
    assert ends == pytest.approx(apart.mean() + np.array([-2.39, 2.39]) * apart.std() / 20, abs=0.02)
    assert paired_interval(apart, np.ones(400)) == ends
    assert paired_interval(apart, np.ones(400), 0.5)[1] < ends[1]
    assert pytest.approx(0.9833, abs=1e-4) == LEVEL


@pytest.mark.parametrize("count", [10, 20, 64])
def test_intervals_over_few_rows_are_wide_enough(count: int) -> None:
    """Without widening, those of ten rows with weights hold 91 % where they say 98.3."""
    random, inside = np.random.default_rng(count), 0
    for _ in range(200):
        weights = np.ceil(random.lognormal(3, 0.7, count))
        low, high = paired_interval(random.normal(0.1, 0.5, count) * weights, weights)
        inside += low <= 0.1 <= high
    assert inside / 200 >= 0.945


def test_quantiles_of_t_are_the_textbooks() -> None:
    """Two-sided 95 % and 98.3 %, from tables."""
    for freedom, at_95 in ((1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (100, 1.98397)):
        low, middle, high = quantiles_of_t(freedom, np.array([0.025, 0.5, 0.975]))
        assert high == pytest.approx(at_95, rel=1e-5)
        assert [low, middle] == pytest.approx([-at_95, 0], rel=1e-5, abs=1e-9)
    assert quantiles_of_t(2, np.array([(1 + LEVEL) / 2]))[0] == pytest.approx(7.64880, rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_part_of_seeds_is_students_t(count: int) -> None:
    """Where rows do not matter, the interval is t standard errors to both sides."""
    rows, ones = tuple(map(str, range(40))), np.ones(40)
    values = np.random.default_rng(count).normal(0.5, 0.2, count)
    sides = [[Measured(rows, x * ones, ones) for x in side] for side in (0 * values, values)]
    low, high = difference_interval(*sides, LEVEL, True)
    t = quantiles_of_t(count - 1, np.array([(1 + LEVEL) / 2]))[0]
    half = t * values.std(ddof=1) / math.sqrt(count)
    assert [low, high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01 * half)


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_over_three_seeds_hold_the_truth_as_often_as_they_say(paired: bool) -> None:
    """A seed moves both sides alike by 1 and each by 0.1, rows by 0.5. Drawing three seeds anew would hold 75 %."""
    random, inside, widths = np.random.default_rng(2), 0, []
    rows, ones = tuple(map(str, range(40))), np.ones(40)
    for _ in range(100):
        both, own, of_rows = random.normal(0, 1, 3), random.normal(0, 0.1, (2, 3)), random.normal(0, 0.5, (2, 40))
        sides = [[Measured(rows, x + of_rows[k], ones) for x in both + own[k]] for k in (0, 1)]
        low, high = difference_interval(*sides, 0.9, paired)
        inside += low <= 0 <= high
        widths.append(high - low)
    assert 0.85 <= inside / 100 <= (0.97 if paired else 1)
    assert np.median(widths) < 1 if paired else np.median(widths) > 2


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", (2.0, 1.0))
    for name, changes, expected in (
        ("teacher", {"teacher": "another"}, ["not comparable: other teachers", "no difference", "no difference"]),
        ("tokens", {"changed": {"num_tokens": [11] * COUNT}}, [*["not comparable: other tokens"] * 2, "no difference"]),
        ("no-kl", {"changed": {"kl": None}}, ["not measured", "no difference", "no difference"]),
        ("few", {"ids": range(COUNT - 5, COUNT)}, ["too few rows to tell"] * 3),
    ):
        other = write_run(tmp_path / name, (2.0, 1.0), **changes)
        comparison = compare_runs([one, other])
        assert [d.verdict for d in comparison.pairs[-1].differences] == expected, name
        assert expected[0] in comparison_text(comparison)
    assert comparison.num_rows == comparison.pairs[-1].num_rows == 5
    assert comparison.pairs[0].num_rows == COUNT


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"evaluate": {"max_new_tokens": 64, "seeds": []}}, True),
        ({"evaluate": {"max_new_tokens": 128, "seeds": [1]}}, True),
        ({"reflect": {"rouge_tokenizer": "words"}}, True),
        ({"evaluate": {"max_new_tokens": 128, "seeds": [], "temperature": 0.5, "batch_size": 8}}, False),
        ({"evaluate": {"max_new_tokens": 128}, "distill": {"learning_rate": 1.0}}, False),
        ({"evaluate": None}, False),
    ],
)
def test_answers_made_or_scored_otherwise_are_not_compared(tmp_path: Path, own: dict[str, Any], reason: bool) -> None:
    """A longer answer, a sampled one or words counted otherwise have another ROUGE-L, whatever the student is worth."""
    given = {"evaluate": {"max_new_tokens": 128, "seeds": [], "temperature": 1.0, "batch_size": 32}}
    given["reflect"] = {"rouge_tokenizer": "auto"}
    one = write_run(tmp_path / "a", (2.0, 1.0), 5, config={"seed": 0, **given})
    other = write_run(tmp_path / "b", (2.0, 1.0), 2, config={"seed": 0, **given, **own})
    *_, scores = verdicts(f"{one}:student", f"{other}:student")[0]
    said = "not comparable: answered or scored with other settings"
    assert scores == (said if reason else "no difference")
    assert verdicts(one)[0][-1] == "no difference"


def test_runs_with_other_validation_rows_are_compared_apart(tmp_path: Path) -> None:
    """Then the rows' own spread, 3, is in the interval: 0.3 is no difference any more, and 5 is one."""
    one, *others = (
        write_run(tmp_path / str(i), (9.0, level), i, ids=range(100 * i, 100 * i + COUNT))
        for i, level in enumerate((1.0, 1.3, 6.0))
    )
    comparison = compare_runs([one, *others])
    assert [pair.differences[0].verdict for pair in comparison.pairs[3:]] == ["no difference", "worse"]
    assert [pair.num_rows for pair in comparison.pairs] == [COUNT] * 3 + [0] * 2
    apart = comparison.pairs[3].differences[0]
    assert apart.high - apart.low == pytest.approx(2 * 2.39 * 3 * math.sqrt(2 / COUNT), rel=0.3)
    assert "each on validation rows of its own" in comparison_text(comparison)
    page = write_comparison(comparison, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "those that all have are too few" in page
    assert not blocks(page)


def test_rows_that_are_not_the_same_are_not_paired(tmp_path: Path) -> None:
    """Rows of the same id with other references, and a few that two random draws have in common."""
    one, other = (write_run(tmp_path / str(i), (2.0, 1.0), i) for i in range(2))
    for at_least, references in ((1, COUNT // 2), (0, COUNT // 2 + 1)):
        path = Path(other) / "data" / "validation.parquet"
        table = {"sample_id": [f"v{i}" for i in range(COUNT)], "prompt": ["p"] * COUNT}
        texts = pa.array([["another"]] * references + [[HOSTILE[1]]] * (COUNT - references))
        pq.write_table(pa.table(table | {"references": texts}), path)
        assert compare_runs([one, other]).pairs[-1].num_rows == at_least * (COUNT - references)

    both = [
        write_run(tmp_path / f"few{i}", (2.0, 1.0), i, ids=range(45 * i, 45 * i + COUNT), config={"seed": i})
        for i in range(2)
    ]
    together, first, _, seeds = compare_runs(both).pairs
    assert [together.num_rows, first.num_rows, seeds.num_rows] == [COUNT, COUNT, 0]


def test_what_is_not_a_number_gets_no_verdict(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", (2.0, 1.0))
    for name, values in (("some", [math.inf] * 20 + [1.0] * 40), ("all", [math.inf] * COUNT)):
        other = write_run(tmp_path / name, (2.0, 1.0), changed={"kl": values})
        assert verdicts(one, other)[-1] == ["not finite", "no difference", "no difference"]
    empty = write_run(tmp_path / "empty", (2.0, 1.0), changed={"num_tokens": [0] * (COUNT - 5) + [10] * 5})
    assert verdicts(empty)[0] == ["too few rows to tell", "too few rows to tell", "no difference"]
    none = write_run(tmp_path / "none", (2.0, 1.0), changed={"num_tokens": [0] * COUNT})
    assert verdicts(none)[0] == ["not measured", "not measured", "no difference"]
    seeds = [
        write_run(tmp_path / f"seed{i}", (2.0, 1.0), i, changed={"kl": None} if i else {}, config={"seed": i})
        for i in range(3)
    ]
    together = compare_runs(seeds)
    assert together.models[0][1][0] == "–"
    assert together.pairs[0].differences[0].verdict == "not measured"
    assert "±" in together.models[0][1][1]


def test_a_run_that_was_changed_after_its_evaluation_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", (2.0, 1.0), config={"seed": 0})
    steps = {"evaluate": {"config": content_digest(Path(run) / "config.yaml")}}
    (Path(run) / "steps.json").write_text(json.dumps(steps))
    assert len(compare_runs([run]).pairs) == 1
    with (Path(run) / "config.yaml").open("a") as f:
        f.write("learning_rate: 1.0\n")
    with pytest.raises(UserError, match=r"a: its config has changed since it was evaluated.*srd-fast run .*a brings"):
        compare_runs([run])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    def damaged(file: str, content: Any) -> str:
        run = write_run(tmp_path / str(len(list(tmp_path.iterdir()))), (2.0, 1.0), config={"seed": 0})
        if isinstance(content, pa.Array):
            table = pq.read_table(Path(run) / file).drop_columns("references").append_column("references", content)
            pq.write_table(table, Path(run) / file)
        else:
            (Path(run) / file).write_text(content)
        return run

    ok = write_run(tmp_path / "ok", (2.0, 1.0))
    measures = json.loads((Path(ok) / "evaluation.json").read_text())
    for values in ([[1.0]] * COUNT, ["1.0"] * COUNT, [True] * COUNT):
        measures["student"]["rows"]["kl"] = values
        with pytest.raises(UserError, match=r"evaluation\.json: student\.rows\.kl must be a list of numbers"):
            compare_runs([damaged("evaluation.json", json.dumps(measures))])
    with pytest.raises(UserError, match=r"evaluation\.json: not readable JSON"):
        compare_runs([damaged("evaluation.json", '{"a":' * 100_000)])
    with pytest.raises(UserError, match=r"validation\.parquet: column 'references' must hold lists of strings"):
        compare_runs([damaged("data/validation.parquet", pa.array([[1]] * COUNT))])
    assert compare_runs([damaged("data/validation.parquet", pa.array([[None, "a"]] * COUNT))]).references["v0"] == "a"

    above = damaged("config.yaml", "controls: 5\n")
    (Path(above) / "controls").mkdir()
    assert (
        len(compare_runs([write_run(Path(above) / "controls" / "random", (2.0, 1.0), config={"seed": 0})]).pairs) == 1
    )


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", (2.0, 1.0))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "evaluation.json").write_text(json.dumps({"student": {"key": "", "kl": 1.0}}))
    (tmp_path / "new").mkdir()
    for runs, said in (
        ([one, str(tmp_path / "nowhere")], "nowhere: there is no such run folder"),
        (
            [one, str(tmp_path / "old")],
            r"old: evaluation\.json holds no measures of .*: srd-fast evaluate .*old --force writes them",
        ),
        ([one, str(tmp_path / "new")], r"new: evaluation\.json is missing .*: srd-fast evaluate .*new writes them"),
        ([f"{one}:teacher"], r"holds no measures of single rows \(teacher\)"),
        ([f"{one}:start"], "is one model: give a run folder, or two models"),
        ([one, one], "is given twice"),
        ([one, f"{one}/"], "is given twice"),
    ):
        with pytest.raises(UserError, match=said):
            compare_runs(runs)
    with pytest.raises(UserError, match="cannot be written"):
        write_comparison(compare_runs([one]), tmp_path / "no folder" / "page.html")


def test_the_page_has_values_intervals_curves_and_answers(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, (2.0, level), seed) for seed, (name, level) in enumerate([("a", 1.0), ("b", 1.2)])
    ]
    for run in runs:
        (Path(run) / "metrics.jsonl").write_text(
            '{"kind": "eval", "step": 0, "kl": 2.0}\n{"kind": "eval", "step": 9, "kl": 1}\n'
        )
    page = write_comparison(compare_runs(runs), tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('class="card"') == 2
    assert re.findall(r"<strong>(\w+)</strong>", page) == ["better", "better"]
    assert "3. b, distilled student against a, distilled student" in page
    data = blocks(page)["validation-rows"]
    assert [x["label"] for x in data["texts"][2:]][::3] == ["1: a, starting student", "4: b, distilled student"]
    assert data["texts"][0]["values"][:3] == list(HOSTILE[:3])
    assert [found.get("type") for tag, found in Tags(page).tags if tag == "script"] == ["application/json", None]
    assert "<script>alert" not in page


def test_runs_that_differ_by_the_seed_alone_are_one_side(tmp_path: Path) -> None:
    """Means over seeds, seed against seed; other keys make another side, a seed that comes twice too."""

    def runs(name: str, levels: list[float], **config: Any) -> list[str]:
        return [
            write_run(tmp_path / f"{name}{i}", (2.0, level), 10 * ord(name[0]) + i, config={"seed": i, **config})
            for i, level in enumerate(levels)
        ]

    srd = runs("srd", [1.01, 1.03, 1.02], curate={"method": "srd"})
    near = runs("near", [1.0, 1.06, 1.01], curate={"method": "random"})
    far = runs("far", [1.51, 1.53, 1.52], curate={"method": "none"}, controls=["random"])
    comparison = compare_runs([*srd, *near, *far])
    assert [label for label, _ in comparison.models][:2] == [
        "srd0 (3 seeds), starting student",
        "srd0 (3 seeds), distilled student",
    ]
    text = comparison_text(comparison)
    assert re.search(r"srd0 \(3 seeds\), distilled student +\d\.\d+ ± 0\.0\d+", text)
    assert (
        "far0 (3 seeds), distilled student against srd0 (3 seeds), distilled student, 60 rows, 3 seeds in pairs" in text
    )
    verdicts_of_kl = [pair.differences[0].verdict for pair in comparison.pairs]
    assert verdicts_of_kl == ["better"] * 3 + ["no difference", "worse"]
    of_far = comparison.pairs[-1].differences[0]
    assert of_far.second - of_far.first == pytest.approx(0.5, abs=0.05)
    of_near = comparison.pairs[-2].differences[0]
    assert of_near.low < -0.03 < 0.06 < of_near.high  # beyond what single seeds differ by
    page = write_comparison(comparison, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "1: srd0 (3 seeds), starting student, seed 0" in {
        x["label"] for x in blocks(page)["validation-rows"]["texts"]
    }

    again = runs("again", [1.02], curate={"method": "srd"})
    labels = [label for label, _ in compare_runs([*srd, *again]).models]
    assert labels[-1] == "again0, distilled student"
    # Of these, seed 2 is on both sides: all seeds are compared, not that one alone.
    some = write_run(tmp_path / "some2", (2.0, 1.2), 77, config={"seed": 2, "curate": {"method": "none"}, "x": 1})
    more = write_run(tmp_path / "some3", (2.0, 1.6), 78, config={"seed": 3, "curate": {"method": "none"}, "x": 1})
    overlapping = compare_runs([*srd, some, more]).pairs[-1]
    assert (overlapping.num_seeds, overlapping.paired) == ((3, 2), False)
    assert overlapping.differences[0].second == pytest.approx(
        1.4 + 4 + np.random.default_rng(99).normal(0, 3, 60).mean(), abs=0.1
    )
    [of_two] = compare_runs([f"{srd[0]}:student", f"{srd[1]}:student", f"{far[2]}:student"]).pairs
    assert (of_two.num_seeds, of_two.paired) == ((2, 1), False)
    assert "1 against 2 seeds" in of_two.basis


@pytest.mark.parametrize(
    "curate", [{"keep": "knee", "stages": 2}, {"band": {"rouge_l": [0.1, 0.9]}, "stages": 2}], ids=["knee", "band"]
)
def test_controls_of_seeds_are_one_side_where_a_plan_decides_how_many_rows_there_are(
    curate: dict[str, Any], tmp_path: Path
) -> None:
    """Their configs have the numbers of their run's plan, which is another for each seed; all else must be the same."""

    def runs(name: str, seeds: range, **changes: Any) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"": [], "random": [], "none": []}
        for seed in seeds:
            folder = tmp_path / f"{name}{seed}"
            given = {"curate": curate, "distill": {"epochs_per_stage": 2}, "controls": ["random", "none"], **changes}
            config = RunConfig(seed=seed, output_dir=str(folder), **given)
            found[""].append(write_run(folder, (2.0, 1.0), seed, config=config.model_dump()))
            (folder / "controls").mkdir()
            ids = [f"t{i}" for i in range(4 + seed)]
            dropped = [{"sample_id": f"d{i}", "reason": ""} for i in range(3)]
            plan = CurriculumPlan(
                [ids[:2], ids[2:]], dropped, fused=dict.fromkeys(ids, 1.0), keep=(4 + seed) / (7 + seed)
            )
            for control in config.controls:
                own = control_config(config, control, plan).model_dump()
                found[control].append(write_run(folder / "controls" / control, (2.0, 1.0), seed + 9, config=own))
        return found

    ours, others = runs("a", range(3)), runs("b", range(2), distill={"epochs_per_stage": 3})
    of_seeds = [yaml.safe_load((Path(x) / "config.yaml").read_text()) for x in ours["none"]]
    assert len({str(x["distill"]["epochs_per_stage"]) for x in of_seeds}) == 3, "this test could not fail"
    given = [*chain.from_iterable(ours.values()), *others["none"]]
    students = [label for label, _ in compare_runs([f"{x}:student" for x in given]).models]
    counts = [int(found[1]) if (found := re.search(r"\((\d) seeds\)", label)) else 1 for label in students]
    assert counts == [3, 3, 3, 2], students


def test_seeds_of_one_run_are_compared_with_each_other_too(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), (2.0, 1.0), 2 * i + 1, config={"seed": i}) for i in range(2)]
    comparison = compare_runs(runs)
    assert [(p.first.partition(",")[0], p.num_seeds) for p in comparison.pairs] == [
        ("0 (2 seeds)", (2, 2)),
        ("0", (1, 1)),
        ("1", (1, 1)),
        ("0", (1, 1)),
    ]
    assert [p.differences[0].verdict for p in comparison.pairs[1:]] == ["better", "better", "no difference"]


def test_two_seeds_that_are_too_few_say_so(tmp_path: Path) -> None:
    """Both seeds are better by 0.5 and 0.6, but Student's t of two is so wide that 0 is in it; of three it is not.

    Two seeds against one have one degree of freedom as well. Where rows alone show no difference, there is none.
    """
    runs = [write_run(tmp_path / f"{i}", (2.0, 1.5 - 0.1 * i), i, config={"seed": i}) for i in range(3)]
    of_two, *of_one = compare_runs(runs[:2]).pairs
    kl, cross_entropy, _ = of_two.differences
    assert kl.low < -1 < 0 < 0.1 < kl.high
    assert [kl.verdict, cross_entropy.verdict] == ["too few seeds to tell", "no difference"]
    assert [pair.differences[0].verdict for pair in of_one[:2]] == ["better", "better"]
    assert compare_runs(runs).pairs[0].differences[0].verdict == "better"

    other = write_run(tmp_path / "other", (2.0, 1.0), 7, config={"seed": 7, "x": 1})
    [against_one] = compare_runs([f"{runs[0]}:student", f"{runs[1]}:student", f"{other}:student"]).pairs
    assert (against_one.num_seeds, against_one.paired) == ((2, 1), False)
    assert against_one.differences[0].verdict == "too few seeds to tell"
    page = write_comparison(compare_runs(runs[:2]), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "too few seeds to tell" in page


def test_seeds_with_validation_rows_of_their_own_are_compared_in_pairs(tmp_path: Path) -> None:
    """Each seed's two runs share its rows, and no two seeds share any."""
    runs = [
        write_run(
            tmp_path / f"{name}{i}", (2.0, level), i, range(100 * i, 100 * i + COUNT), config={"seed": i, "x": name}
        )
        for name, level in (("a", 1.0), ("b", 2.0))
        for i in range(3)
    ]
    comparison = compare_runs(runs)
    assert not comparison.shared
    pair = comparison.pairs[-1]
    assert (pair.num_rows, pair.num_seeds, pair.paired) == (COUNT, (3, 3), True)
    assert pair.differences[0].verdict == "worse"


@pytest.mark.slow
def test_runs_of_tiny_models_with_two_seeds_do_not_differ(
    tiny_teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "write_report", lambda folder: (folder / "report.html").write_text(""))
    for seed in (0, 1):
        config = {
            "teacher": str(tiny_teacher_folder), "output_dir": str(tmp_path / f"seed-{seed}"), "seed": seed,
            "max_rows": 24, "validation": 24, "dtype": "float32",
            "init_student": {"layers": 2, "warmup_steps": 0},
            "reflect": {"engine": "transformers", "max_new_tokens": 4, "batch_size": 8},
            "evaluate": {"max_new_tokens": 4},
            "distill": {"per_device_train_batch_size": 4, "epochs_per_stage": 2, "learning_rate": 2e-3,
                        "eval_strategy": "no", "save_strategy": "no"},
        }  # fmt: skip
        execute(RunConfig(**config), say=lambda text: None)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compare", "seed-0", "seed-1"])
    assert done.exit_code == 0, done.output
    together, first, second, seeds, note = done.output.split("\n\n")[1:]
    assert "seed-0 (2 seeds), distilled student against seed-0 (2 seeds), starting student" in together
    for before_and_after in (first, second):
        assert re.search(r"KL to the teacher .* better", before_and_after), done.output
    assert seeds.count("no difference") == 3, done.output
    assert note.startswith("With one seed, an interval does not hold")
    assert (tmp_path / "comparison.html").stat().st_size > 50_000

    # Another config, whose run was stopped before it came to the evaluation: these measures are not its own.
    changed = RunConfig(**{**config, "distill": {**config["distill"], "learning_rate": 1e-3}})
    execute(changed, only="distill", say=lambda text: None)
    with pytest.raises(UserError, match="its config has changed since it was evaluated"):
        compare_runs(["seed-0", "seed-1"])
    execute(changed, say=lambda text: None)
    assert len(compare_runs(["seed-0", "seed-1"]).pairs) == 3
    # One that only skips: the measures are those of the new config too.
    execute(
        RunConfig(**{**changed.model_dump(), "reflect": {**config["reflect"], "batch_size": 4}}), say=lambda text: None
    )
    compare_runs(["seed-0", "seed-1"])
