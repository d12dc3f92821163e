"""A run that ranks, bands and weighs by pass rates, and its attempts in a mode that trains on answers."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny

from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.reflection import TransformersEngine
from srd_fast.run.config import RunConfig
from srd_fast.run.pipeline import begin_from, execute, fingerprints
from srd_fast.run.steps import Run, check_inputs, control_config, curate_step, selection
from srd_fast.run.steps.settings import training_config

JUDGE = """
def even(reflected):
    return [1 - len(text) % 2 for text in reflected.generations]

even.higher_is_easier = True
"""


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(JUDGE)
    return {
        **tiny.tiny_run(tiny_teacher_folder),
        "max_rows": 20,
        "reflect": {
            "engine": "transformers", "max_new_tokens": 5, "batch_size": 1, "temperature": 1.0, "attempts": 3,
            "judge": f"{file}:even", "signals": ["rouge_l", "cross_entropy", "pass_rate"],
        },
        "curate": {"stages": 2, "keep": 1.0, "band": {"pass_rate": [0.3, 0.9]}, "weight_by": "pass_rate"},
        "distill": {"per_device_train_batch_size": 4, "epochs_per_stage": 1, "eval_steps": 100, "save_steps": 100},
    }  # fmt: skip


def run(settings: dict[str, Any], folder: Path, *steps: str | None) -> None:
    for step in steps:
        execute(RunConfig(**settings, output_dir=str(folder)), only=step, say=lambda text: None)


@pytest.fixture(scope="module")
def curated(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attempts") / "run"
    run(settings, folder, "prepare", "reflect", "curate")
    return folder


def test_the_plan_has_the_band_and_its_weights(curated: Path) -> None:
    table = pq.read_table(curated / "reflections.parquet")
    rates = dict(zip(table["sample_id"].to_pylist(), table["pass_rate"].to_pylist()))
    for texts, rate in zip(table["attempts"].to_pylist(), rates.values()):
        assert rate == sum(len(text) % 2 == 0 for text in texts) / 3
    assert table["generation"].to_pylist() == [texts[0] for texts in table["attempts"].to_pylist()]
    plan = CurriculumPlan.load(curated / "plan.json")
    within = {i for i, rate in rates.items() if 0.3 <= rate <= 0.9}
    assert set(plan.kept) == within
    assert 0 < len(within) < len(rates), "this test could not tell a band from none"
    assert plan.weights == pytest.approx({i: rates[i] * (1 - rates[i]) for i in plan.kept})


@pytest.mark.slow
def test_killed_reflections_end_in_the_same_bytes(
    settings: dict[str, Any], curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = TransformersEngine.generate

    def counted(self: Any, prompts: Any, sampling: Any) -> Any:
        made.append(sampling.seed)
        if len(made) == 6:
            raise KeyboardInterrupt
        return real(self, prompts, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path, "prepare", "reflect")
    run(settings, tmp_path, "reflect", "curate")
    assert made == [0] * 5 + [1] * 6 + [2] * 5, "parts that were there were made again"
    for name in ("reflections.parquet", "plan.json"):
        assert (tmp_path / name).read_bytes() == (curated / name).read_bytes(), name
    assert not (tmp_path / selection.PARTS).exists()


def test_answers_are_attempts_that_are_there(
    settings: dict[str, Any], curated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "reflect", lambda *_, **__: pytest.fail("the student answers again"))
    run({**settings, "mode": "offline_on_policy", "answers_per_prompt": 3}, curated, "answers")
    table = pq.read_table(curated / "reflections.parquet")
    attempts = dict(zip(table["sample_id"].to_pylist(), table["attempt_ids"].to_pylist()))
    plans = [CurriculumPlan.load(folder / "plan.json") for folder in (curated, curated / "answers")]
    rows = pq.read_table(curated / "answers" / "train.parquet").to_pylist()
    assert {row["sample_id"].partition("#")[2] for row in rows} == {"", "2", "3"}
    for row in rows:
        source, _, number = row["sample_id"].partition("#")
        ids = attempts[source][int(number or 1) - 1]
        assert [x for x in row["labels"] if x != -100] == ids + [0] * (len(ids) < 5)
        assert plans[1].weights[row["sample_id"]] == plans[0].weights[source]


@pytest.mark.parametrize("changes", [{"mode": "seqkd"}, {"mode": "offline_on_policy", "answers_per_prompt": 4}])
def test_answers_after_the_reflections_need_no_judge(
    settings: dict[str, Any], curated: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = RunConfig(**settings, **changes, output_dir=str(tmp_path))
    begin_from(curated, config)
    for step in ("curate", "answers"):
        execute(config, only=step, say=lambda text: None)
    kept = CurriculumPlan.load(tmp_path / "plan.json").kept
    names = pq.read_table(tmp_path / "answers" / "train.parquet")["sample_id"].to_pylist()
    empty = json.loads((tmp_path / "answers" / "counts.json").read_text())["empty"]
    assert len(names) == len(kept) * changes.get("answers_per_prompt", 1) - empty
    assert {x.partition("#")[0] for x in names} <= set(kept)


def test_controls_have_neither_bands_nor_weights(settings: dict[str, Any], curated: Path) -> None:
    """Each draws from all rows, as many as the run keeps, and the weight of every row is the same."""
    ours = CurriculumPlan.load(curated / "plan.json")
    config = RunConfig(**settings, output_dir=str(curated), controls=["random", "none"])
    sizes, rows = [len(x) for x in ours.subsets], settings["max_rows"]
    assert 0 < len(ours.dropped) == rows - sum(sizes)
    for name, expected in (("random", sizes), ("none", [rows, 0])):
        control = control_config(config, name, ours)
        begin_from(curated, control)
        execute(control, only="curate", say=lambda text: None)
        plan = CurriculumPlan.load(Path(control.output_dir) / "plan.json")
        assert ([len(x) for x in plan.subsets], plan.weights, plan.band) == (expected, {}, {})
        assert len(plan.dropped) == rows - sum(expected)
        epochs = training_config(control).of_stages(2).epochs
        passes = [epochs[k] * sum(expected[: k + 1]) for k in range(2)]
        assert passes == pytest.approx([sizes[0], sum(sizes)])


def test_a_signal_of_the_users_own_has_one_column_however_it_is_named(
    settings: dict[str, Any], tmp_path: Path, curated: Path
) -> None:
    given, plans = settings["reflect"]["judge"], []
    reflect = {**settings["reflect"], "attempts": 1, "judge": "exact_match", "signals": ["cross_entropy", given]}
    for name in (given, "even"):
        folder = tmp_path / f"run-{len(plans)}"
        curate = {"stages": 2, "signals": {name: 1.0}, "band": {name: [1, 1]}}
        config = RunConfig(**{**settings, "reflect": reflect, "curate": curate}, output_dir=str(folder))
        (folder / "data").mkdir(parents=True)
        check_inputs(config)
        table = pq.read_table(curated / "reflections.parquet")
        even = [float(len(text) % 2 == 0) for text in table["generation"].to_pylist()]
        pq.write_table(table.append_column("even", [even]), folder / "reflections.parquet")
        curate_step(Run(config, folder, {}, {}))
        plans.append(CurriculumPlan.load(folder / "plan.json"))
    assert plans[0] == plans[1]
    assert plans[0].band == {"even": (1.0, 1.0)}
    assert 0 < len([x for x in plans[0].dropped if "outside the band" in x["reason"]]) == even.count(0.0)


@pytest.mark.slow
def test_a_whole_run_says_what_it_did(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, tmp_path, None)
    page = (tmp_path / "report.html").read_text()
    assert "pass_rate from 0.3 to 0.9, weighed by p(1 - p) of pass_rate" in page
    assert "outside the band 0.3 to 0.9" in page
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any(row["kind"] == "train" and row["loss"] > 0 for row in rows)


def test_runs_from_before_attempts_stay_valid(settings: dict[str, Any], tmp_path: Path) -> None:
    plain = {**settings, "reflect": {"temperature": 1.0}, "curate": {"stages": 2}}
    given = selection.reflect_inputs(RunConfig(**plain))[0]
    assert not {"attempts", "judge"} & set(given)
    assert not {"band", "weight_by", "order"} & set(selection.curate_inputs(RunConfig(**plain))[0])
    config = RunConfig(**settings)
    file, before = Path(config.reflect.judge.rpartition(":")[0]), fingerprints(config)
    file.write_text(JUDGE + "# another version\n")
    after = fingerprints(config)
    file.write_text(JUDGE)
    assert before["prepare"] == after["prepare"]
    assert before["reflect"] != after["reflect"]


def test_what_does_not_go_together_is_said_first(settings: dict[str, Any], tmp_path: Path) -> None:
    for section, changes, words in (
        ("reflect", {"temperature": 0.0}, "config: reflect: attempts is 3, and temperature is 0"),
        ("reflect", {"attempts": 1}, "'pass_rate' is a share of several attempts, and attempts is 1"),
        ("reflect", {"attempts": 0}, r"reflect\.attempts"),
        ("reflect", {"judge": "gap"}, "config: reflect: judge 'gap' does not say"),
        ("reflect", {"judge": "numeric"}, "unknown difficulty signal 'numeric'; did you mean 'numeric_match'"),
        ("curate", {"band": {"exact_match": [0.1, 0.9]}}, r"config: curate\.band names 'exact_match', which reflect\."),
        ("curate", {"band": {"pass_rate": [0.9, 0.1]}}, "band of 'pass_rate' must be its least and greatest value"),
        ("curate", {"band": {"pass_rate": 0.5}}, r"curate\.band"),
        (
            "curate",
            {"weight_by": "exact_match"},
            "curate.weight_by names 'exact_match', which reflect.signals does",
        ),
    ):
        given = {**settings, section: {**settings[section], **changes}}
        with pytest.raises((UserError, ValueError), match=words):
            execute(RunConfig(**given, output_dir=str(tmp_path)), say=lambda text: None)
    assert not (tmp_path / "data").exists()
