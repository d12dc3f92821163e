"""Mode offline_on_policy with answers_again: at each border the student, as it is then, answers the coming stage."""

import json
import random
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from test_controls import without_pictures
from test_kills import Command, finish, outcome

from srd_fast.curriculum import CurriculumPlan
from srd_fast.data import TOKENISED_FEATURES
from srd_fast.errors import FaultsError, UserError
from srd_fast.files import content_digest
from srd_fast.models import load_model, load_tokenizer
from srd_fast.reflection import Sampling, reflect
from srd_fast.run.config import RunConfig
from srd_fast.run.modes import fine_tuning
from srd_fast.run.pipeline import execute, steps_of
from srd_fast.run.steps import Run, cache, training
from srd_fast.run.steps import answers as steps_answers
from srd_fast.teacher import TeacherCache, build, opening
from srd_fast.training.trainer import SRDTrainer

LIMIT, STAGES, SEVERAL = 6, 3, 2


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path) -> dict[str, Any]:
    return {
        **tiny.tiny_run(tiny_teacher_folder),
        "mode": "offline_on_policy",
        "answers_again": True,
        "answers_per_prompt": SEVERAL,
        "reflect": {"engine": "transformers", "max_new_tokens": LIMIT, "batch_size": 8, "temperature": 1.0},
        "curate": {"stages": STAGES, "keep": 1.0},
        "distill": {
            "per_device_train_batch_size": 4, "epochs_per_stage": 1, "eval_strategy": "no", "save_steps": 2,
            "save_total_limit": 20, "learning_rate": 1e-2,
        },
    }  # fmt: skip


def run(settings: dict[str, Any], folder: Path, **changes: Any) -> list[str]:
    said: list[str] = []
    given = {**settings, "output_dir": str(folder), **changes}
    torch.manual_seed(0)
    execute(RunConfig(**given), say=said.append)
    return [line.partition("] ")[2] for line in said if not line.endswith("...")]


class Seen:
    """What trainers were given: samples and rows of the teacher, by step."""

    def __init__(self) -> None:
        self.samples: dict[int, list[dict[str, Any]]] = {}

    def watch(self, patched: pytest.MonkeyPatch) -> None:
        real, seen = SRDTrainer.training_step, self

        def step(trainer: Any, model: Any, inputs: dict[str, Any], items: Any = None) -> Any:
            at, size = trainer.state.global_step, trainer.curriculum.batch_size
            indices = list(trainer.curriculum.indices())[at * size : (at + 1) * size]
            seen.samples[at] = [trainer.train_dataset[i] for i in indices]
            return real(trainer, model, inputs, items)

        patched.setattr(SRDTrainer, "training_step", step)


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    folder, seen = tmp_path_factory.mktemp("again") / "run", Seen()
    with pytest.MonkeyPatch.context() as patched:
        seen.watch(patched)
        without_pictures(patched)
        run(settings, folder)
    return folder, seen


def stage_file(folder: Path, stage: int, suffix: str = "parquet") -> Path:
    return folder / "checkpoints" / f"answers-stage-{stage}.{suffix}"


@pytest.mark.slow
def test_a_stage_trains_on_the_answers_of_the_student_at_its_border(finished: tuple[Path, Seen]) -> None:
    folder, seen = finished
    plan = CurriculumPlan.load(folder / "answers" / "plan.json")
    tokenizer = load_tokenizer(str(folder / "start"))
    metrics = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    stage_of = {row["step"] - 1: row["stage"] for row in metrics if row["kind"] == "train"}
    assert set(stage_of) == set(seen.samples)
    data = {row["sample_id"]: row for row in pq.read_table(folder / "data" / "train.parquet").to_pylist()}
    for stage in range(2, STAGES + 1):
        border = min(step for step, k in stage_of.items() if k == stage)
        said = json.loads(stage_file(folder, stage, "json").read_text())
        rows = {row["sample_id"]: row for row in pq.read_table(stage_file(folder, stage)).to_pylist()}
        assert (said["stage"], said["step"], said["answers"]) == (stage, border, len(rows))
        # All answers of its prompts, and those alone: nothing is dropped, so every stage is as long as was planned.
        assert set(rows) == set(plan.stage_ids(stage - 1))
        names = [x for x in rows if "#" not in x]
        prompts = Dataset.from_list([data[x] for x in names], features=TOKENISED_FEATURES)
        for number in range(SEVERAL):
            sampling = Sampling(max_new_tokens=LIMIT, temperature=1.0, seed=(stage - 1) * 1000 + number)
            student = load_model(str(folder / "checkpoints" / f"checkpoint-{border}"))
            given = {"engine": "transformers", "sampling": sampling, "batch_size": 8, "keep_ids": True}
            expected = reflect(student, prompts, tokenizer, signals=["rouge_l"], progress=False, **given)[
                "generated_ids"
            ]
            for name, answer in zip(names, expected, strict=True):
                row = rows[name + f"#{number + 1}" * (number > 0)]
                prompt = data[name]["input_ids"][: data[name]["labels"].count(-100)]
                ended = [*answer, *([0] if len(answer) < LIMIT else [])]
                assert row["labels"] == [-100] * len(prompt) + ended
                assert row["input_ids"] == prompt + ended
        # And what the steps of the stage have seen is them.
        steps = [seen.samples[step] for step, k in stage_of.items() if k == stage]
        assert {s["sample_id"] for samples in steps for s in samples} == set(rows)
        for sample in (s for samples in steps for s in samples):
            assert sample["input_ids"] == rows[sample["sample_id"]]["input_ids"]
            assert sample["labels"] == rows[sample["sample_id"]]["labels"]
    answers = [
        {row["sample_id"]: row["input_ids"] for row in pq.read_table(file).to_pylist()}
        for file in (folder / "answers" / "train.parquet", stage_file(folder, 2), stage_file(folder, 3))
    ]
    assert set(answers[0]) < set(answers[1]) < set(answers[2])
    for before, after in pairwise(answers):
        assert any(after[name] != before[name] for name in before), "no answer changed: this test could not fail"


@pytest.mark.slow
def test_the_teachers_rows_of_them_are_those_of_a_forward_pass(
    settings: dict[str, Any], finished: tuple[Path, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While stage 2 trains its rows are in the cache; in the end the cache is as the step before left it."""
    folder, _ = finished
    assert not [name for name in run(settings, folder) if "skipped" not in name]
    teacher = load_model(settings["teacher"])
    rows = pq.read_table(stage_file(folder, 2)).to_pylist()
    shutil.copytree(folder, tmp_path / "run")
    given = Run(RunConfig(**{**settings, "output_dir": str(tmp_path / "run")}), tmp_path / "run", {}, {})
    before = content_digest(tmp_path / "run" / "teacher_cache")
    counts = []
    for stage in (1, 2, 1):
        opened = cache.open_cache(given, beside=steps_answers.stage_answers(given, stage))
        counts.append(len(opened))
    assert counts[0] == counts[2] < counts[1]
    for row in rows[:6]:
        start = row["labels"].count(-100)
        with torch.no_grad():
            states = teacher.base_model(torch.tensor([row["input_ids"]])).last_hidden_state[0, start - 1 : -1]
        found = opened.collate([row])["hidden"]
        assert found.shape == states.shape
        torch.testing.assert_close(found, states, rtol=0, atol=tiny.forward_rounding(teacher, len(row["input_ids"])))
    cache.drop_rows_beside(given)
    assert content_digest(tmp_path / "run" / "teacher_cache") == before
    with pytest.raises(UserError, match="does not hold sample"):
        TeacherCache(tmp_path / "run" / "teacher_cache").place(rows[-1])


@pytest.mark.slow
def test_summary_and_page_say_when_and_how_many(finished: tuple[Path, Seen]) -> None:
    folder, _ = finished
    said = json.loads((folder / "summary.json").read_text())
    assert [row["stage"] for row in said["stages"]] == [2, 3]
    for row in said["stages"]:
        assert row == json.loads(stage_file(folder, row["stage"], "json").read_text())
        assert row["seconds"] > 0
    page = (folder / "report.html").read_text()
    first = said["stages"][0]
    assert "answers before stage 2" in page
    assert f"{first['answers']} answers" in page
    assert f"at step {first['step']}, in " in page


def interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_interrupted_wherever_it_is_it_ends_with_the_same_bytes(
    settings: dict[str, Any], finished: tuple[Path, Seen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step, real_answer = SRDTrainer.training_step, steps_answers.reflect_together
    border = json.loads(stage_file(finished[0], 2, "json").read_text())["step"]

    def at_step(wanted: int) -> Any:
        def step(trainer: Any, *given: Any) -> Any:
            return interrupted() if trainer.state.global_step == wanted else real_step(trainer, *given)

        return step

    def in_round(*given: Any) -> Any:
        return interrupted() if given[-1] % 1000 == SEVERAL - 1 else real_answer(*given)

    places: list[tuple[Any, str, Any]] = [
        (SRDTrainer, "training_step", at_step(border - 1)),
        (steps_answers, "reflect_together", in_round),
        (steps_answers, "write_text", interrupted),  # there are answers, and nothing says so
        (build._Maker, "make", interrupted),
        (build, "add_to_index", interrupted),
        (SRDTrainer, "training_step", at_step(border)),
        (SRDTrainer, "training_step", at_step(border + 3)),
        (opening, "drop_from_index", interrupted),  # of the rows of stage 2, before those of stage 3
        (opening, "drop_orphans", interrupted),
        (training, "_keep_student", interrupted),
        (training, "drop_rows_beside", interrupted),
    ]
    for step in ("prepare", "reflect", "curate", "answers", "cache"):
        torch.manual_seed(0)
        execute(RunConfig(**{**settings, "output_dir": str(tmp_path)}), only=step, say=lambda text: None)
    for holder, name, stop in places:
        with monkeypatch.context() as patched:
            patched.setattr(holder, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run(settings, tmp_path)
    assert (tmp_path / "student").exists()
    assert not (tmp_path / "summary.json").exists()
    run(settings, tmp_path)
    for name in ("answers", "teacher_cache", "student"):
        assert content_digest(tmp_path / name) == content_digest(finished[0] / name), name
    for stage in range(2, STAGES + 1):
        assert stage_file(tmp_path, stage).read_bytes() == stage_file(finished[0], stage).read_bytes()


def distilled(settings: dict[str, Any], folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of a run with two stages and greedy answers, up to its step distill."""
    given = {**settings, "answers_per_prompt": 1, "curate": {"stages": 2}, "output_dir": str(folder)}
    given = {**given, "reflect": {**settings["reflect"], "temperature": 0.0}, **changes}
    for step in steps_of(RunConfig(**given)):
        if step.name not in ("init-student", "evaluate", "report"):
            execute(RunConfig(**given), only=step.name, say=lambda text: None)
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"cache": {"kind": "live"}},
        {"curate": {"method": "none", "stages": 2}},
        {"cache": {"log_sum_exp": True}},
        {"cache": {"kind": "topk", "k": 8}, "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}},
    ],
    ids=["live", "without a curriculum", "log-sum-exps", "adapters and top k"],
)
def test_it_goes_with(changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    metrics = distilled(settings, tmp_path, **changes)
    plan = CurriculumPlan.load(tmp_path / "answers" / "plan.json")
    said = json.loads(stage_file(tmp_path, 2, "json").read_text())
    rows = {row["sample_id"]: row for row in pq.read_table(stage_file(tmp_path, 2)).to_pylist()}
    assert set(rows) == set(plan.kept)
    assert all(row["loss"] > 0 for row in metrics if row["kind"] == "train")
    assert min(row["step"] for row in metrics if row["kind"] == "train" and row["stage"] == 2) == said["step"] + 1
    student = load_model(str(tmp_path / "checkpoints" / f"checkpoint-{said['step']}"))
    for row in list(rows.values())[:3]:
        ids = row["input_ids"][: row["labels"].count(-100)]
        for _ in range(LIMIT):
            with torch.no_grad():
                ids = [*ids, int(student(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == 0:
                break
        assert row["input_ids"] == ids
    assert (tmp_path / "teacher_cache").exists() == (changes.get("cache", {}).get("kind") != "live")
    assert content_digest(tmp_path / "student") is not None


@pytest.mark.slow
def test_a_training_that_ends_before_a_border_asks_for_no_answers(settings: dict[str, Any], tmp_path: Path) -> None:
    distilled(settings, tmp_path, distill={**settings["distill"], "max_steps": 1})
    assert not stage_file(tmp_path, 2).exists()
    assert (tmp_path / "student").is_dir()


@pytest.mark.slow
def test_a_student_that_says_nothing_is_trained_on_that(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token that ends an answer is all that an empty one has, and no stage gets shorter."""
    real = steps_answers.reflect_together

    def silent(*given: Any) -> Dataset:
        made = real(*given)
        return made.remove_columns("generated_ids").add_column("generated_ids", [[] for _ in made])

    monkeypatch.setattr(steps_answers, "reflect_together", silent)
    metrics = distilled(settings, tmp_path)
    rows = pq.read_table(stage_file(tmp_path, 2)).to_pylist()
    assert all([x for x in row["labels"] if x != -100] == [0] for row in rows)
    assert json.loads(stage_file(tmp_path, 2, "json").read_text())["empty"] == len(rows) == 12
    assert max(row["step"] for row in metrics) == 2 + 3  # 6 and 12 samples, 4 a step
    config = RunConfig(**{**settings, "output_dir": str(tmp_path)})
    counts = steps_answers.answer_counts(Run(config, tmp_path, {}, {}))
    first = pq.read_table(tmp_path / "answers" / "train.parquet")
    said = json.loads((tmp_path / "answers" / "counts.json").read_text())
    assert (counts["answers"], counts["empty_kept"]) == (len(first), said["empty"])
    assert "empty" not in counts


@pytest.mark.long
def test_two_processes_answer_together(settings: dict[str, Any], tmp_path: Path) -> None:
    alone = {**settings, "answers_per_prompt": 1, "curate": {"stages": 2}}
    content = {**alone, "output_dir": str(tmp_path / "run")}
    (tmp_path / "config.yaml").write_text(json.dumps(content))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "srd_fast"]
    done = subprocess.run(
        [*command, "run", str(tmp_path / "config.yaml")], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plan = CurriculumPlan.load(tmp_path / "run" / "answers" / "plan.json")
    assert set(pq.read_table(stage_file(tmp_path / "run", 2))["sample_id"].to_pylist()) == set(plan.kept)


def test_where_it_cannot_be_it_is_told_before_any_work(settings: dict[str, Any], tmp_path: Path) -> None:
    distill = settings["distill"]
    for changes, words in (
        ({"mode": "kd", "answers_per_prompt": 1}, "mode 'kd' does not train on answers that its student made"),
        ({"mode": "seqkd"}, "mode 'seqkd' does not train on answers that its student made beforehand; set it to false"),
        ({"mode": "on_policy", "answers_per_prompt": 1}, "on_policy answers anew in single steps"),
        ({"curate": {"stages": 1}}, r"answers_again is true, and curate\.stages is 1, so there is no border"),
        ({"distill": {**distill, "save_strategy": "no"}}, r"answers_again goes on from .*save_strategy is 'no'"),
        ({"distill": {**distill, "save_only_model": True}}, "save_only_model is true, which leaves out its optimizer"),
        ({"curate": {"stages": 3, "reflect_again": True}}, "changes which prompts are trained on"),
    ):
        with pytest.raises((UserError, FaultsError), match=words):
            execute(RunConfig(**{**settings, "output_dir": str(tmp_path), **changes}), say=lambda text: None)
    assert not list(tmp_path.iterdir())
    tuned = fine_tuning(RunConfig(**{**settings, "student": settings["teacher"]}), "teacher")
    assert not tuned.answers_again


@pytest.mark.long
def test_the_command_killed_at_any_moment_ends_as_an_undisturbed_one(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**settings, "distill": {**settings["distill"], "epochs_per_stage": 4}}))
    finish(path, tmp_path / "quiet", tmp_path / "quiet.log")
    lasts = json.loads((tmp_path / "quiet" / "steps.json").read_text())["distill"]["seconds"]
    draw, kills, folder = random.Random(0), 0, tmp_path / "run"
    for attempt in range(8):
        command = Command(path, folder, tmp_path / f"{attempt}.log")
        if command.reaches("distill") and command.runs_for(draw.uniform(0, 0.6 * lasts)):
            kills += 1
        command.kill()
    assert kills >= 3
    finish(path, folder, tmp_path / "end.log")
    assert outcome(folder) == outcome(tmp_path / "quiet")
    for stage in range(2, STAGES + 1):
        assert stage_file(folder, stage).read_bytes() == stage_file(tmp_path / "quiet", stage).read_bytes()
