"""Modes of a run: whose answers are trained on, by which loss, with which steps; and what a mode cannot do with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.modes import MODES, fine_tuning, has_cache
from srd_fast.run.pipeline import STEP_NAMES, execute, fingerprints, steps_of
from srd_fast.run.steps import Run, answer_step, answers, selection, training
from srd_fast.training import replay

LIMIT = 6  # tokens of an answer


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path) -> dict[str, Any]:
    return {
        **tiny.tiny_run(tiny_teacher_folder),
        "reflect": {"engine": "transformers", "max_new_tokens": LIMIT, "batch_size": 8, "temperature": 1.0},
        "curate": {"stages": 2},
        "distill": {
            "per_device_train_batch_size": 4, "epochs_per_stage": 1, "eval_steps": 100, "save_steps": 3,
            "learning_rate": 1e-2,
        },
    }  # fmt: skip


def run(settings: dict[str, Any], folder: Path, only: str | None = None, **changes: Any) -> list[str]:
    said: list[str] = []
    execute(RunConfig(**{**settings, "output_dir": str(folder), **changes}), only=only, say=said.append)
    return [line.partition("] ")[2] for line in said if not line.endswith("...")]


def distilled(settings: dict[str, Any], folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The metrics of a run up to its step distill."""
    names = [step.name for step in steps_of(RunConfig(**{**settings, **changes}))]
    for step in names[: names.index("distill") + 1]:
        if step != "init-student":
            run(settings, folder, step, **changes)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def reflected(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of mode offline_on_policy up to its answers, of which there are three a prompt."""
    folder = tmp_path_factory.mktemp("modes") / "run"
    for step in ("prepare", "reflect", "curate", "answers"):
        run(settings, folder, step, mode="offline_on_policy", answers_per_prompt=3)
    return folder


def test_the_students_answers_stand_in_place_of_the_datas(
    reflected: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = {row["sample_id"]: row for row in pq.read_table(reflected / "data" / "train.parquet").to_pylist()}
    scores = pq.read_table(reflected / "reflections.parquet").to_pylist()
    reflections = {row["sample_id"]: row["generated_ids"] for row in scores}
    rows = pq.read_table(reflected / "answers" / "train.parquet").to_pylist()
    plans = [CurriculumPlan.load(folder / "plan.json") for folder in (reflected, reflected / "answers")]
    by_prompt: dict[str, list[list[int]]] = {}
    for row in rows:
        source = row["sample_id"].partition("#")[0]
        prompt = row["labels"].count(-100)
        assert row["input_ids"][:prompt] == data[source]["input_ids"][: data[source]["labels"].count(-100)]
        assert row["labels"][prompt:] == row["input_ids"][prompt:]
        answer = row["labels"][prompt:]
        ended = answer[-1] == tiny_tokenizer.eos_token_id
        assert ended == (len(answer) - ended < LIMIT), "a cut answer has no end, any other has one"
        if row["sample_id"] == source:
            assert answer[: len(answer) - ended] == reflections[source]
        by_prompt.setdefault(source, []).append(answer)
    # Every answer of a kept prompt is in the subset of its prompt, and empty ones alone are not there.
    counts = json.loads((reflected / "answers" / "counts.json").read_text())
    assert counts["answers"] + counts["empty"] == 3 * len(plans[0].kept)
    assert counts["cut"] == sum(len(a) == LIMIT and a[-1] != 0 for answers in by_prompt.values() for a in answers)
    for before, after in zip(plans[0].subsets, plans[1].subsets, strict=True):
        assert {x.partition("#")[0] for x in after} <= set(before)
        assert len(after) == sum(len(by_prompt.get(x, [])) for x in before)
    assert any(len(set(map(tuple, answers))) > 1 for answers in by_prompt.values()), "every answer is the same"


def test_answers_leave_the_stages_as_they_are(
    settings: dict[str, Any], reflected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage without rows of its own trains on those before it; the first one always has some."""
    shutil.copytree(reflected, tmp_path / "run")
    of_mode = {"mode": "offline_on_policy", "curate": {"stages": 3, "method": "none"}}
    for step in ("curate", "answers"):
        run(settings, tmp_path / "run", step, **of_mode)
    plan = CurriculumPlan.load(tmp_path / "run" / "answers" / "plan.json")
    assert [len(x) for x in plan.subsets] == [len(plan.kept), 0, 0]
    of_mode["curate"] = {"stages": 3}
    run(settings, tmp_path / "run", "curate", **of_mode)
    before = CurriculumPlan.load(tmp_path / "run" / "plan.json")
    silent = set(before.subsets[0])
    monkeypatch.setattr(
        answers, "_rounds", lambda run, rows: iter([[[] if x in silent else [70, 71] for x in rows["sample_id"]]])
    )
    run(settings, tmp_path / "run", "answers", **of_mode)
    after = CurriculumPlan.load(tmp_path / "run" / "answers" / "plan.json")
    assert after.subsets == [before.subsets[1], [], before.subsets[2]]


def test_offline_on_policy_goes_on_with_reflections_that_are_there(
    settings: dict[str, Any], reflected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the student answers again")

    said = []
    with monkeypatch.context() as patched:
        patched.setattr(selection, "reflect", never)
        for step in ("answers", "cache", "distill"):
            said += run(settings, reflected, step, mode="offline_on_policy", answers_per_prompt=1)
    assert [line.partition(" done in")[0] for line in said] == ["answers:", "cache:", "distill:"]
    train = [json.loads(line) for line in (reflected / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sft_weight"] == 0 and row["loss"] > 0 for row in train if row["kind"] == "train")
    assert len(pq.read_table(reflected / "answers" / "train.parquet")) <= 12
    assert (reflected / "teacher_cache" / "index.json").is_file()


def test_reflections_from_before_their_ids_were_kept_are_tokenised(
    settings: dict[str, Any], reflected: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reflected, folder)
    table = pq.read_table(folder / "reflections.parquet").drop_columns(["generated_ids"])
    texts = ["Red.", "", "A word and one more, and then so many that no limit is wide enough for them."]
    table = table.set_column(
        table.column_names.index("generation"), "generation", pa.array((texts * len(table))[: len(table)])
    )
    pq.write_table(table, folder / "reflections.parquet")
    config = RunConfig(**{**settings, "output_dir": str(folder), "mode": "offline_on_policy"})
    answer_step(Run(config, folder, fingerprints(config), {}))
    given = dict(zip(table["sample_id"].to_pylist(), table["generation"].to_pylist()))
    rows = pq.read_table(folder / "answers" / "train.parquet").to_pylist()
    assert {given[row["sample_id"]] for row in rows} == {texts[0], texts[2]}
    for row in rows:
        ids = tiny_tokenizer.encode(given[row["sample_id"]], add_special_tokens=False)
        labels = [x for x in row["labels"] if x != -100]
        assert labels == (ids if len(ids) >= LIMIT else [*ids, 0])


@pytest.mark.slow
def test_a_whole_run_has_the_steps_of_its_mode_and_says_it(settings: dict[str, Any], tmp_path: Path) -> None:
    lines = run(settings, tmp_path, mode="offline_on_policy")
    assert [line.partition(":")[0] for line in lines] == [*STEP_NAMES[:4], "answers", *STEP_NAMES[4:]]
    assert all("skipped" in line for line in run(settings, tmp_path, mode="offline_on_policy"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["mode"], summary["divergence"]) == ("offline_on_policy", "reverse_kl")
    assert summary["answers"]["answers"] == pq.read_table(tmp_path / "answers" / "train.parquet").num_rows
    page = (tmp_path / "report.html").read_text()
    assert "offline on-policy" in page
    assert "answers trained on" in page


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["distillm"])
def test_killed_a_run_with_fresh_answers_ends_the_same(
    mode: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "TOLERANCE", -100.0)  # phi grows with each evaluation
    own = {"max_new_tokens": LIMIT, "eval_steps": 1, **({"replay_buffer": 4} if mode == "distillm" else {})}
    changes = {"mode": mode, "distill": {**settings["distill"], **own}}
    metrics = distilled(settings, tmp_path / "whole", **changes)
    assert sum(row.get("own_answers", 0) for row in metrics) > 0
    with monkeypatch.context() as patched:
        patched.setattr(training, "_keep_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distilled(settings, tmp_path / "killed", **changes)
    newest = max((tmp_path / "killed" / "checkpoints").glob("checkpoint-*"), key=lambda f: int(f.name[11:]))
    (newest / "trainer_state.json").unlink()
    run(settings, tmp_path / "killed", "distill", **changes)
    ours, theirs = (load_file(tmp_path / f / "student" / "model.safetensors") for f in ("killed", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_seqkd_trains_on_the_teachers_answers_by_cross_entropy(
    settings: dict[str, Any], tmp_path: Path, tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from srd_fast.models import load_model
    from srd_fast.reflection import Sampling, TransformersEngine

    greedy = {**settings["reflect"], "temperature": 0.0}
    metrics = distilled(settings, tmp_path, mode="seqkd", reflect=greedy)
    assert not (tmp_path / "teacher_cache").exists()
    rows = pq.read_table(tmp_path / "answers" / "train.parquet").to_pylist()
    engine = TransformersEngine(load_model(str(tiny_teacher_folder)), tiny_tokenizer)
    for row in rows[:4]:
        prompt = row["input_ids"][: row["labels"].count(-100)]
        ((_, expected),) = engine.generate([prompt], Sampling(max_new_tokens=LIMIT))
        answer = [x for x in row["labels"] if x != -100]
        assert answer == expected + [0] * (len(expected) < LIMIT)
    assert {row["kind"] for row in metrics} == {"train", "eval"}
    assert all(row["kind"] == "eval" or row["loss"] == row["cross_entropy"] for row in metrics)
    assert not any("kl" in row or "divergence" in row for row in metrics)


@pytest.mark.slow
def test_sft_needs_no_teacher_and_a_killed_one_ends_the_same(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilled(settings, tmp_path / "whole", mode="sft")
    names = [step.name for step in steps_of(RunConfig(**settings, mode="sft"))]
    assert names == [name for name in STEP_NAMES if name != "cache"]
    with monkeypatch.context() as patched:
        patched.setattr(training, "_keep_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distilled(settings, tmp_path / "killed", mode="sft")
    for checkpoint in sorted((tmp_path / "killed" / "checkpoints").glob("checkpoint-*"))[1:]:
        (checkpoint / "trainer_state.json").unlink()
    run(settings, tmp_path / "killed", "distill", mode="sft")
    ours, theirs = (load_file(tmp_path / f / "student" / "model.safetensors") for f in ("killed", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_teacher_is_fine_tuned_first(settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**{**settings, "output_dir": str(tmp_path / "run"), "mode": "on_policy"})
    made = fine_tuning(config, "teacher")
    assert (made.teacher, made.student, made.output_dir) == (settings["teacher"],) * 2 + (
        f"{tmp_path}/run-teacher-sft",
    )
    execute(made, say=lambda text: None)
    found = json.loads((Path(made.output_dir) / "summary.json").read_text())["evaluation"]
    assert not (Path(made.output_dir) / "reflections.parquet").exists()
    assert found["student"]["cross_entropy"] < found["start"]["cross_entropy"] == found["teacher"]["cross_entropy"]


@pytest.mark.parametrize("mode", ["kd", "on_policy", "offline_on_policy"])
def test_the_config_of_a_fine_tuning_reads_back_equal(mode: str, tmp_path: Path) -> None:
    made = fine_tuning(load_run_config(None, [f"mode={mode}", "preset=paper"]), "teacher")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(made.model_dump()))
    again = load_run_config(tmp_path)
    assert again == made
    assert fingerprints(again) == fingerprints(made)


def test_a_run_of_mode_kd_is_what_a_run_was(settings: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**settings, output_dir=str(tmp_path))
    assert [step.name for step in steps_of(config)] == list(STEP_NAMES)
    assert "answers" not in STEP_NAMES
    by_name = {step.name: step for step in steps_of(config)}
    assert by_name["cache"].after == ("curate",)
    prints = {mode: fingerprints(config.model_copy(update={"mode": mode})) for mode in ("kd", "sft", "seqkd")}
    assert len({of_mode["distill"] for of_mode in prints.values()}) == 3
    assert len({of_mode["curate"] for of_mode in prints.values()}) == 1


def test_a_mode_without_what_it_needs_says_so_first(settings: dict[str, Any], tmp_path: Path) -> None:
    distill = settings["distill"]
    for changes, words in {
        ("mode", "sdt"): "unknown mode 'sdt'; did you mean 'sft'",
        ("mode", "slef"): "unknown mode 'slef'; did you mean 'self'",
        ("answers_per_prompt", 2): "mode 'kd' does not train on answers made beforehand; set it to 1",
        ("mode", "sft", "distill", "sft_weight", 0.5): r"mode 'sft' trains only on the cross-entropy.*is 0\.5;",
        ("mode", "seqkd", "distill", "sft_weight_end", 0.5): "mode 'seqkd' trains only on the cross-entropy",
        ("distill", "lmbda", 0.5): r"distill\.lmbda is 0\.5 in mode 'kd'; use mode on_policy",
        ("mode", "on_policy", "distill", "lmbda", 0): r"distill\.lmbda is 0 in mode 'on_policy'; set it above 0",
        ("mode", "on_policy", "distill", "lmbda", 1.5): "lmbda must be at least 0 and at most 1, got 1.5",
        ("mode", "on_policy", "distill", "lmbda", "often"): "lmbda must be from 0 to 1, or 'adaptive', got 'often'",
        ("mode", "sft", "distill", "metric_for_best_model", "kl"): "unknown metric_for_best_model 'kl'",
        ("mode", "seqkd", "distill", "metric_for_best_model", "eval_kl"): "unknown metric_for_best_model 'eval_kl'",
        ("mode", "distillm", "distill", "eval_strategy", "no"): "set eval_strategy to 'steps'",
        ("mode", "on_policy", "distill", "generation_engine", "vlm"): "unknown engine 'vlm'; did you mean 'vllm'",
        ("mode", "on_policy", "distill", "sync_every", 0): "sync_every must be a whole number, at least 1",
        ("mode", "offline_on_policy", "answers_per_prompt", 2, "temperature"): r"reflect\.temperature is 0",
        ("mode", "offline_on_policy", "curate", "reflect_again", True): "changes which prompts are trained on",
    }.items():
        given: dict[str, Any] = {**settings, "output_dir": str(tmp_path)}
        todo = list(changes)
        while todo:
            key = todo.pop(0)
            if key == "temperature":
                given["reflect"] = {**given["reflect"], "temperature": 0.0}
            elif key in ("distill", "curate"):
                given[key] = {**given[key], todo.pop(0): todo.pop(0)}
            else:
                given[key] = todo.pop(0)
        with pytest.raises((UserError, ValueError), match=words):
            execute(RunConfig(**given), say=lambda text: None)
    assert not list(tmp_path.glob("data"))
    assert distill is settings["distill"]
    with pytest.raises(UserError, match="cut it with srd-fast init-student"):
        fine_tuning(RunConfig(**settings), "student")
    with pytest.raises(UserError, match="unknown model 'teacer'; did you mean 'teacher'"):
        fine_tuning(RunConfig(**settings), "teacer")


def test_a_mode_wins_over_a_preset_and_the_config_over_both() -> None:
    made = load_run_config(None, ["mode=sft", "preset=paper"]).distill
    assert made["sft_weight"] == 1.0
    made = load_run_config(None, ["mode=on_policy", "preset=official", "distill.lmbda=0.25"]).distill
    assert (made["lmbda"], made["divergence"], made["sft_weight"]) == (0.25, "jsd", 0.0)
    assert load_run_config(None, ["preset=paper"]).distill == load_run_config(None, ["preset=paper", "mode=kd"]).distill
    assert not has_cache(load_run_config(None, ["mode=on_policy", "distill.lmbda=1"]))
    assert not has_cache(load_run_config(None, ["mode=on_policy", "distill.seq_kd=true"]))
    assert has_cache(load_run_config(None, ["mode=distillm"]))
    assert set(MODES.names()) == {"kd", "sft", "seqkd", "offline_on_policy", "on_policy", "distillm", "self"}
