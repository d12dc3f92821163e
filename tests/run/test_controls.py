"""Controls of a run: from its start and its cache, as many steps, on the page; stopped, they go on."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from datasets import Dataset

from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import FaultsError, UserError
from srd_fast.files import content_digest, remove
from srd_fast.report import compare_runs, page
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.modes import fine_tuning
from srd_fast.run.pipeline import begin_from, execute
from srd_fast.run.steps import control_config, outcome, selection
from srd_fast.teacher import build
from srd_fast.training.trainer import SRDTrainer

ROWS, HELD_OUT = 24, 12


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path) -> dict[str, Any]:
    return {
        **tiny.tiny_run(tiny_teacher_folder),
        "max_rows": ROWS,
        "validation": HELD_OUT,
        "controls": ["random", "none"],
        "reflect": {"engine": "transformers", "max_new_tokens": 2, "batch_size": 8},
        "curate": {"keep": 0.5, "stages": 2},
        "distill": {
            "per_device_train_batch_size": 4, "epochs_per_stage": [2, 3], "eval_strategy": "no", "save_steps": 3,
        },
    }  # fmt: skip


def run(settings: dict[str, Any], folder: Path, **changes: Any) -> list[Any]:
    said: list[Any] = []
    execute(RunConfig(**{**settings, "output_dir": str(folder), **changes}), say=said.append)
    return said


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


def without_pictures(patched: pytest.MonkeyPatch) -> None:
    for view in ("difficulty_view", "schedule_view", "curves_view", "throughput_view"):
        patched.setattr(page, view, lambda run: {"missing": "left out", "picture": None, "frames": None})


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str]]:
    """The run folder, and how much was done for run and controls together."""
    folder, seen = tmp_path_factory.mktemp("controls") / "run", Counter[str]()
    with pytest.MonkeyPatch.context() as patched:
        without_pictures(patched)
        make, reflect, evaluate = build._Maker.make, selection.reflect, outcome.evaluate

        def counted_rows(self: Any, group: Any) -> Any:
            seen["teacher's rows"] += len(group)
            return make(self, group)

        def counted_reflections(*given: Any, **options: Any) -> Dataset:
            seen["reflections"] += 1
            return reflect(*given, **options)

        def counted_evaluations(*given: Any, **options: Any) -> dict[str, Any]:
            seen["evaluations"] += 1
            return evaluate(*given, **options)

        patched.setattr(build._Maker, "make", counted_rows)
        patched.setattr(selection, "reflect", counted_reflections)
        patched.setattr(outcome, "evaluate", counted_evaluations)
        run(settings, folder)
    return folder, seen


def plan_of(folder: Path) -> CurriculumPlan:
    return CurriculumPlan.load(folder / "plan.json")


def steps_by_stage(folder: Path) -> Counter[int]:
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return Counter(r["stage"] for r in rows if r["kind"] == "train")


def test_start_reflection_and_cache_are_made_once(finished: tuple[Path, Counter[str]]) -> None:
    """Three students, of which each is evaluated, and one teacher and one start."""
    folder, seen = finished
    assert seen == {"teacher's rows": ROWS + HELD_OUT, "reflections": 1, "evaluations": 3 + 2}
    for name in ("random", "none"):
        for part in ("data", "start", "reflections.parquet", "teacher_cache"):
            assert (folder / "controls" / name / part).resolve() == (folder / part).resolve()


def test_controls_know_nothing_of_the_curriculum_and_train_as_long(finished: tuple[Path, Counter[str]]) -> None:
    folder, _ = finished
    ours, random, none = (plan_of(x) for x in (folder, folder / "controls/random", folder / "controls/none"))
    assert list(map(len, random.subsets)) == list(map(len, ours.subsets)) == [6, 6]
    assert set(random.kept) != set(ours.kept)
    assert list(map(len, none.subsets)) == [ROWS, 0]
    lengths = [steps_by_stage(x) for x in (folder, folder / "controls/random", folder / "controls/none")]
    assert lengths == [{1: 3, 2: 9}] * 3
    digests = {content_digest(x / "student") for x in (folder, folder / "controls/random", folder / "controls/none")}
    assert len(digests) == 3


def test_page_and_json_say_how_the_run_differs(finished: tuple[Path, Counter[str]]) -> None:
    folder, _ = finished
    content = json.loads((folder / "report.json").read_text())
    measured = json.loads((folder / "summary.json").read_text())["evaluation"]["student"]
    assert content["models"]["this run"] == pytest.approx({k: measured[k] for k in ("kl", "cross_entropy", "rouge_l")})
    comparison = compare_runs([f"{folder}/controls/random:student", f"{folder}:student"])
    expected = comparison.pairs[0].differences
    assert [x["low"] for x in content["differences"][:3]] == [d.low for d in expected]
    assert [x["difference"] for x in content["differences"][:3]] == [d.second - d.first for d in expected]
    assert content["differences"][0]["rows"] == HELD_OUT
    text = (folder / "report.html").read_text()
    assert re.search(r"Against random dropping, random stages: KL to the teacher: [a-z ]+ \([+-]\d\.\d{3}, \[", text)
    assert len(re.findall(r"<h3>\d\. this run against", text)) == 2
    assert "Beside the controls" not in (folder / "controls" / "random" / "report.html").read_text()


def test_what_is_done_is_skipped_and_controls_may_come_later(
    settings: dict[str, Any], finished: tuple[Path, Counter[str]], tmp_path: Path, no_pictures: None
) -> None:
    said = run(settings, finished[0])
    assert {news.state for news in said} == {"skipped"}
    plain = run(settings, tmp_path / "run", controls=[])
    assert "controls" not in {news.step for news in plain}
    assert not (tmp_path / "run" / "report.json").exists()
    later = run(settings, tmp_path / "run", controls=["none"])
    done = [news.step for news in later if news.state == "done"]
    # The cache of a run without controls lacks the dropped rows.
    assert done == [
        *(f"controls.none.{x}" for x in ("curate", "cache", "distill", "evaluate", "report")),
        "controls",
        "report",
    ]
    assert steps_by_stage(tmp_path / "run" / "controls" / "none") == {1: 3, 2: 9}
    assert {news.state for news in run(settings, tmp_path / "run", controls=["none"])} == {"skipped"}


def test_a_stopped_control_goes_on_to_the_same_weights(
    settings: dict[str, Any], finished: tuple[Path, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
) -> None:  # fmt: skip
    whole, trained = SRDTrainer.training_step, Counter[str]()

    def stops(self: Any, *given: Any) -> Any:
        name = Path(self.args.output_dir).parent.name
        trained[name] += 1
        if name == "random" and self.state.global_step == 7:
            raise KeyboardInterrupt
        return whole(self, *given)

    monkeypatch.setattr(SRDTrainer, "training_step", stops)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run")
    monkeypatch.setattr(SRDTrainer, "training_step", whole)
    said = run(settings, tmp_path / "run")
    assert next(news.step for news in said if news.state == "done") == "controls.random.distill"
    assert trained == {"run": 12, "random": 8}
    for name in ("random", "none"):
        for part in ("plan.json", "student"):
            ours, theirs = (content_digest(x / "controls" / name / part) for x in (tmp_path / "run", finished[0]))
            assert ours == theirs, (name, part)


def test_a_control_that_is_run_by_itself_leaves_the_runs_files_alone(
    settings: dict[str, Any], finished: tuple[Path, Counter[str]], tmp_path: Path, no_pictures: None
) -> None:
    config = RunConfig(**{**settings, "output_dir": str(tmp_path / "own"), "controls": []})
    begin_from(finished[0], config)
    before = {name: content_digest(finished[0] / name) for name in ("data", "start", "reflections.parquet")}
    assert execute(config, only="curate", say=lambda news: None) == tmp_path / "own"
    assert (tmp_path / "own" / "data").is_symlink()
    other = config.model_copy(update={"seed": 7})
    for step in ("prepare", "reflect"):
        execute(other, only=step, say=lambda news: None)
    assert not (tmp_path / "own" / "data").is_symlink()
    assert {name: content_digest(finished[0] / name) for name in before} == before
    remove(tmp_path / "own" / "teacher_cache")
    assert (finished[0] / "teacher_cache" / "index.json").is_file()


def test_what_is_wrong_with_controls_is_said_before_any_work(settings: dict[str, Any], tmp_path: Path) -> None:
    common = [f"teacher={settings['teacher']}", f"output_dir={tmp_path / 'x'}"]
    for changes, said in (
        (["controls=[random]", "curate.method=random"], r"controls is \['random'\], and curate.method is 'random'"),
        (["controls=[none]", "distill.sample_selection=topk_student_entropy"], "which trains on all samples"),
        (["controls=[srd]"], "controls.0: input should be 'random' or 'none', got 'srd'"),
        (["controls=[none, none]"], "controls is .*: name each control once"),
    ):
        with pytest.raises((FaultsError, UserError), match=said):
            execute(load_run_config(None, [*common, *changes]), say=lambda news: None)
    assert not (tmp_path / "x").exists()


def test_a_control_has_what_the_run_found_out(settings: dict[str, Any]) -> None:
    """The knee's share, and no order by a signal."""
    plan = CurriculumPlan([["a"], ["b", "c"]], dropped=[{"sample_id": "d", "reason": ""}], keep=0.75, keep_rule="knee")
    config = RunConfig(
        **{**settings, "curate": {"keep": "knee", "stages": 2, "order": "rouge_l", "reflect_again": True}}
    )
    random, none = (control_config(config, name, plan) for name in ("random", "none"))
    assert (random.curate.keep, random.curate.order, random.curate.reflect_again) == (0.75, "ranked", False)
    assert none.distill["epochs_per_stage"] == [2 * 1 / 4, 3 * 3 / 4]
    assert random.distill == config.distill


def test_a_control_of_fine_tuning_has_what_could_not_be_scored(settings: dict[str, Any]) -> None:
    """Mode sft does not let the control "none" reflect, so it trains on those rows too, for as many steps."""
    unscored = [{"sample_id": "e", "reason": ""}]
    plan = CurriculumPlan([["a"], ["b", "c"]], dropped=[{"sample_id": "d", "reason": ""}], unscored=unscored)
    none = control_config(RunConfig(**{**settings, "mode": "sft"}), "none", plan)
    assert none.distill["epochs_per_stage"] == [2 * 1 / 5, 3 * 3 / 5]
    assert fine_tuning(RunConfig(**settings), "teacher").controls == []


@pytest.mark.slow
def test_two_processes_train_controls_together(settings: dict[str, Any], tmp_path: Path) -> None:
    content = {**settings, "output_dir": str(tmp_path / "run"), "controls": ["random"]}
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "srd_fast",
        "run",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "config.yaml")], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "random: [6/8] distill: done" in done.stdout
    assert json.loads((tmp_path / "run" / "report.json").read_text())["differences"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [{"mode": "offline_on_policy"}, {"mode": "offline_on_policy", "answers_again": True}, {"mode": "seqkd"}],
    ids=["offline on-policy", "answers again", "seqkd"],
)  # fmt: skip
def test_controls_of_modes_with_answers_of_their_own(
    mode: dict[str, Any], settings: dict[str, Any], tmp_path: Path, no_pictures: None
) -> None:
    """Each answers the prompts of its own plan, and what is done stays done: nothing of the run's is written anew."""
    folder = tmp_path / "run"
    run(settings, folder, **mode)
    said = run(settings, folder, **mode)
    assert {news.state for news in said} == {"skipped"}, said
    runs = {name: folder / "controls" / name for name in settings["controls"]} | {"run": folder}
    for name, of_run in runs.items():
        answers = pq.read_table(of_run / "answers" / "train.parquet")["sample_id"].to_pylist()
        plan = CurriculumPlan.load(of_run / "answers" / "plan.json")
        assert set(plan.kept) <= set(plan_of(of_run).kept), name
        if "answers_again" in mode:
            assert set(answers) == set(plan.stage_ids(0))
            last = pq.read_table(of_run / "checkpoints" / "answers-stage-2.parquet")["sample_id"].to_pylist()
            assert set(last) == set(plan.kept)
            assert steps_by_stage(of_run) == {1: 3, 2: 9}, name
        else:
            assert set(answers) == set(plan.kept)
    if mode["mode"] != "seqkd":
        shared = (folder / "controls" / "none" / "teacher_cache").resolve() == (folder / "teacher_cache").resolve()
        assert shared == ("answers_again" not in mode)
    assert len(json.loads((folder / "report.json").read_text())["differences"]) >= 6
    # Stopped while a control trains, the run's own steps are not done again.
    remove(folder / "controls" / "none")
    said = run(settings, folder, **mode)
    assert {news.step for news in said if news.state == "done" and not news.step.startswith("controls")} <= {"report"}
