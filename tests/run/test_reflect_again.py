"""Reflection at the borders of stages: what the student was not trained on yet is ranked anew by what it is then."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from srd_fast.curriculum import CurriculumPlan, curate, replan
from srd_fast.errors import UserError
from srd_fast.run.config import RunConfig
from srd_fast.run.group import Group
from srd_fast.run.pipeline import execute
from srd_fast.run.steps import Run, training

STAGES = 3


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path) -> dict[str, Any]:
    return {
        "teacher": str(tiny_teacher_folder),
        "max_rows": 24,
        "validation": 6,
        "dtype": "float32",
        "init_student": {"layers": 2, "warmup_steps": 2, "warmup_batch_size": 4},
        "reflect": {"engine": "transformers", "max_new_tokens": 4, "batch_size": 8},
        "curate": {"reflect_again": True, "stages": STAGES},
        "evaluate": {"max_new_tokens": 4},
        "distill": {
            "per_device_train_batch_size": 4, "epochs_per_stage": 2, "save_steps": 5, "eval_strategy": "no",
            "learning_rate": 1e-2,
        },
    }  # fmt: skip


def run(settings: dict[str, Any], folder: Path, **changes: Any) -> Path:
    return execute(RunConfig(**{**settings, "output_dir": str(folder), **changes}), say=lambda text: None)


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(settings, tmp_path_factory.mktemp("again") / "run")


@pytest.mark.slow
def test_later_subsets_are_filled_by_the_new_scores(finished: Path) -> None:
    plans = [CurriculumPlan.load(finished / "plan.json")]
    for stage in range(2, STAGES + 1):
        plan = CurriculumPlan.load(finished / "checkpoints" / f"plan-stage-{stage}.json")
        scores = pq.read_table(finished / "checkpoints" / f"reflections-stage-{stage}.parquet")
        before = plans[-1]
        assert plan.subsets[: stage - 1] == before.subsets[: stage - 1]
        assert list(map(len, plan.subsets)) == list(map(len, before.subsets))
        trained = set(before.stage_ids(stage - 2))
        left = {n: [x for i, x in zip(scores["sample_id"].to_pylist(), scores[n].to_pylist()) if i not in trained]
                for n in ("sample_id", "rouge_l", "cross_entropy")}  # fmt: skip
        expected = curate(left, keep=1.0, stages=1).kept
        assert [s for subset in plan.subsets[stage - 1 :] for s in subset] == expected[: len(plan.kept) - len(trained)]
        assert {d["sample_id"] for d in plan.dropped} == set(expected) - set(plan.kept)
        first = pq.read_table(finished / "reflections.parquet")
        assert scores["cross_entropy"].to_pylist() != first["cross_entropy"].to_pylist()
        plans.append(plan)
    assert plans[0].subsets != plans[-1].subsets, "nothing changed: this test could not fail"


def test_summary_and_page_say_it(finished: Path) -> None:
    stages = json.loads((finished / "summary.json").read_text())["stages"]
    assert [row["stage"] for row in stages] == [2, 3]
    assert all(row["cross_entropy"] > 0 and row["exchanged"] >= 0 for row in stages)
    page = (finished / "report.html").read_text()
    assert "reflection before stage 2" in page
    assert "samples exchanged" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "where",
    [pytest.param("reflection", marks=pytest.mark.slow), pytest.param("plan", marks=pytest.mark.slow), "training"],
)
def test_stopped_it_goes_on_to_the_same_weights(
    where: str, settings: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    trained, real = [], training._train

    def train_once(run: Any, plan: Any, until: int | None = None, answers: int = 0) -> Any:
        trained.append(until)
        return stop() if len(trained) == 2 else real(run, plan, until, answers)

    with monkeypatch.context() as patched:
        patched.setattr(training, *{
            "reflection": ("reflect_together", stop), "plan": ("replan", stop), "training": ("_train", train_once)
        }[where])  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path)
    assert not (tmp_path / "student").exists()
    run(settings, tmp_path)
    for name in ("plan-stage-2.json", "plan-stage-3.json"):
        assert (tmp_path / "checkpoints" / name).read_text() == (finished / "checkpoints" / name).read_text()
    ours, theirs = (load_file(f / "student" / "model.safetensors") for f in (tmp_path, finished))
    assert all(ours[n].equal(theirs[n]) for n in theirs)


@pytest.mark.slow
def test_without_it_the_plan_stays(settings: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    run(settings, tmp_path, curate={"stages": STAGES})
    assert not list((tmp_path / "checkpoints").glob("plan-stage-*"))
    ours, theirs = (load_file(f / "student" / "model.safetensors") for f in (tmp_path, finished))
    assert any(not ours[n].equal(theirs[n]) for n in theirs)
    assert json.loads((tmp_path / "summary.json").read_text())["stages"] == []


def test_a_border_is_found_between_two_trainings_of_a_group(
    settings: dict[str, Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There accelerate's state is gone, with which the settings knew how many train."""
    trained: list[int | None] = []
    run = Run(RunConfig(**{**settings, "output_dir": str(finished)}), finished, {}, {}, Group(world=2))
    assert run.args.world_size == 1
    monkeypatch.setattr(type(run.args), "world_size", property(lambda self: pytest.fail("asked how many train")))
    monkeypatch.setattr(training, "_train", lambda run, plan, until, answers: trained.append(until))
    monkeypatch.setattr(training, "reflect_together", interrupted)
    monkeypatch.setattr(training, "last_whole_checkpoint", lambda folder: None)
    (finished / "checkpoints" / "plan-stage-3.json").rename(finished / "kept.json")
    try:
        with pytest.raises(KeyboardInterrupt):
            training._plan_from(run, run.plan, 2)
    finally:
        (finished / "kept.json").rename(finished / "checkpoints" / "plan-stage-3.json")
    assert trained == [3 + 6]  # 6 and 12 of 18 samples, two epochs, 4 a step


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_random_plan_cannot_be_ranked_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reflect_again ranks by reflection, but curate\.method is 'random'"):
        run(settings, tmp_path, curate={"reflect_again": True, "method": "random"})
    with pytest.raises(UserError, match=r"distill\.save_strategy is 'no'; set it to 'steps'"):
        run(settings, tmp_path, distill={**settings["distill"], "save_strategy": "no"})


def test_too_few_scored_samples_leave_later_subsets_short() -> None:
    from datasets import Dataset

    ids = [f"s{i}" for i in range(6)]
    plan = CurriculumPlan([ids[:2], ids[2:4], ids[4:]], method="srd", signals=curate(
        {"sample_id": ids, "rouge_l": [0.1] * 6, "cross_entropy": [1.0] * 6}).signals)  # fmt: skip
    losses = [1.0, 2.0, float("nan"), 4.0, 5.0, 3.0]
    made = replan(plan, 1, Dataset.from_dict({"sample_id": ids, "rouge_l": [0.5] * 6, "cross_entropy": losses}))
    assert made.subsets == [["s0", "s1"], ["s5", "s3"], ["s4"]]
    assert [row["sample_id"] for row in made.unscored] == ["s2"]
