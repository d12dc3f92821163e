"""Mode self: the starting student as the teacher, from the cache and at work, killed, and what it cannot do with."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from test_kills import Command, finish, outcome

from srd_fast.data import seen_by_teacher
from srd_fast.errors import FaultsError, UserError
from srd_fast.models import load_model
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.modes import fine_tuning, has_cache, shares_weights
from srd_fast.run.pipeline import execute, steps_of
from srd_fast.run.steps import Run, cache, training
from srd_fast.run.steps import answers as steps_answers

HINT = "{prompt}\nA reference answer: {response}"
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path) -> dict[str, Any]:
    return {
        "mode": "self",
        "teacher": str(tiny_teacher_folder),
        "student": str(tiny_teacher_folder),
        "privileged_template": HINT,
        "max_rows": 12,
        "validation": 4,
        "dtype": "float32",
        "reflect": {"engine": "transformers", "max_new_tokens": 4, "batch_size": 8},
        "curate": {"stages": 2},
        "evaluate": {"max_new_tokens": 2},
        "distill": {
            "per_device_train_batch_size": 4, "epochs_per_stage": 2, "eval_steps": 2, "save_steps": 2,
            "learning_rate": 1e-2, "backend": "eager",
        },
    }  # fmt: skip


def config(settings: dict[str, Any], folder: Path, distill: Any = None, **changes: Any) -> RunConfig:
    given = {**settings, "output_dir": str(folder), **changes}
    return RunConfig(**{**given, "distill": {**given["distill"], **(distill or {})}})


def run(made: RunConfig, until: str = "report") -> list[dict[str, Any]]:
    """The metrics of a run up to a step, with the random numbers of a process of its own."""
    torch.manual_seed(0)
    names = [step.name for step in steps_of(made)]
    for name in names[: names.index(until) + 1]:
        if name != "init-student":
            execute(made, only=name, say=lambda text: None)
    lines = (Path(made.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.mark.slow
def test_a_whole_run_from_the_cache(settings: dict[str, Any], tmp_path: Path) -> None:
    made = config(settings, tmp_path)
    metrics = run(made)
    assert (tmp_path / "teacher_cache" / "index.json").is_file()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["mode"], summary["divergence"]) == ("self", "jsd")
    found = summary["evaluation"]
    # Teacher and start are one model that reads two prompts.
    model = load_model(settings["teacher"])
    rows = pq.read_table(tmp_path / "data" / "validation.parquet").to_pylist()
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    for row in rows:
        start = row["labels"].count(-100)
        answer = torch.tensor(row["labels"][start:])
        seen = seen_by_teacher(row)["input_ids"].tolist()
        with torch.no_grad():
            p, q = (
                model(torch.tensor([ids])).logits[0, -1 - len(answer) : -1].double().log_softmax(-1)
                for ids in (seen, row["input_ids"])
            )
        of_labels = [x.gather(1, answer[:, None]).sum() for x in (p, q)]
        totals += torch.stack([(p.exp() * (p - q)).sum(), -of_labels[0], -of_labels[1]])
        count += len(answer)
    kl, of_teacher, of_start = (totals / count).tolist()
    assert found["start"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["teacher"]["cross_entropy"] == pytest.approx(of_teacher, rel=1e-5)
    assert found["start"]["cross_entropy"] == pytest.approx(of_start, rel=1e-5)
    first = next(row for row in metrics if row["kind"] == "eval")
    assert first["kl"] == pytest.approx(kl, rel=1e-4)
    assert all(row["sft_weight"] == 0 for row in metrics if row["kind"] == "train")
    assert "reads more" in (tmp_path / "report.html").read_text()
    # A live teacher gives the same losses, and other texts for it make the data anew.
    live = run(config(settings, tmp_path / "live", cache={"kind": "live"}))
    assert not (tmp_path / "live" / "teacher_cache").exists()
    ours, theirs = ([row["loss"] for row in x if row["kind"] == "train"] for x in (metrics, live))
    assert ours == pytest.approx(theirs, rel=1e-4)
    live_summary = json.loads((tmp_path / "live" / "summary.json").read_text())
    assert live_summary["evaluation"]["start"]["kl"] == pytest.approx(kl, rel=1e-4)
    said: list[str] = []
    changed = config(settings, tmp_path, privileged_template="Be {response}.")
    execute(changed, only="prepare", say=said.append)
    assert "done" in said[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": LORA, "distill": {"lmbda": 0.5, "max_new_tokens": 4}},
        {"cache": {"kind": "live"}, "distill": {"self_ema_decay": 0.9}},
    ],
    ids=["cache", "fresh answers beside adapters", "moving average"],
)
def test_killed_it_ends_with_the_same_bytes(
    changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run(config(settings, tmp_path / "whole", **changes), "distill")
    assert sum(row.get("own_answers", 0) for row in metrics) > 0 or "lmbda" not in changes.get("distill", {})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "_keep_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config(settings, tmp_path / "killed", **changes), "distill")
    checkpoints = (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")
    newest = max(checkpoints, key=lambda f: int(f.name[11:]))
    (newest / "trainer_state.json").unlink()
    run(config(settings, tmp_path / "killed", **changes), "distill")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_on_answers_that_the_student_gives_beforehand(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPSD from the cache: the teacher reads the data's answer before the student's, new at the border."""
    sampled = {**settings["reflect"], "temperature": 1.0}
    changes = {"own_answers": True, "answers_again": True, "answers_per_prompt": 2, "reflect": sampled}
    metrics = run(config(settings, tmp_path / "cached", **changes), "distill")
    live = run(config(settings, tmp_path / "live", **changes, cache={"kind": "live"}), "distill")
    # From the border on, a draw that rounding moves may give another answer.
    ours, theirs = ([x["loss"] for x in rows if x["kind"] == "train" and x["stage"] == 1] for rows in (metrics, live))
    assert len(ours) > 2
    assert ours == pytest.approx(theirs, rel=1e-4)
    data = {row["sample_id"]: row for row in pq.read_table(tmp_path / "cached/data/train.parquet").to_pylist()}
    files = [tmp_path / "cached" / x for x in ("answers/train.parquet", "checkpoints/answers-stage-2.parquet")]
    of_stages = [{row["sample_id"]: row for row in pq.read_table(file).to_pylist()} for file in files]
    for row in (row for rows in of_stages for row in rows.values()):
        source = data[row["sample_id"].partition("#")[0]]
        prompt = source["labels"].count(-100)
        assert row["privileged_ids"] == source["privileged_ids"]
        assert row["input_ids"][:prompt] == source["input_ids"][:prompt]
        assert len(row["labels"]) - prompt <= 4
    both = of_stages[0].keys() & of_stages[1].keys()
    assert any(of_stages[0][x]["labels"] != of_stages[1][x]["labels"] for x in both), "nothing was answered anew"

    # Teacher and student are one model, which reads two prompts before one answer.
    made = Run(config(settings, tmp_path / "cached", **changes), tmp_path / "cached", {}, {})
    opened = cache.open_cache(made)
    model, row = load_model(settings["teacher"]), next(iter(of_stages[0].values()))
    seen = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in seen_by_teacher(row).items()}
    with torch.no_grad():
        states = model.base_model(torch.tensor([seen["input_ids"]])).last_hidden_state[0]
    expected = states[seen["labels"].count(-100) - 1 : -1]
    atol = tiny.forward_rounding(model, len(seen["input_ids"]))
    torch.testing.assert_close(opened.collate([seen])["hidden"], expected, rtol=0, atol=atol)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(steps_answers, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config(settings, tmp_path / "killed", **changes), "answers")
    with monkeypatch.context() as patched:
        patched.setattr(training, "_keep_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config(settings, tmp_path / "killed", **changes), "distill")
    run(config(settings, tmp_path / "killed", **changes), "distill")
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "cached")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_where_its_teacher_comes_from(settings: dict[str, Any], tmp_path: Path) -> None:
    average = {"cache": {"kind": "live"}, "distill": {"self_ema_decay": 0.9}}
    for changes, cached, shared in (
        ({}, True, False),
        ({"lora": LORA}, True, False),
        ({"cache": {"kind": "live"}}, False, False),
        ({"cache": {"kind": "live"}, "lora": LORA}, False, True),
        ({"distill": {"lmbda": 0.5}}, False, False),
        ({"distill": {"lmbda": 0.5}, "lora": LORA}, False, True),
        ({"own_answers": True}, True, False),
        ({"own_answers": True, "cache": {"kind": "live"}, "lora": LORA}, False, True),
        (average, False, True),
    ):
        made = config(settings, tmp_path, **changes)  # type: ignore[arg-type]
        assert (has_cache(made), shares_weights(made)) == (cached, shared), changes


def test_what_it_cannot_do_with_is_told_together(settings: dict[str, Any], tmp_path: Path) -> None:
    other = {"teacher": "smollm2-135m-instruct"}
    for changes, words in (
        (other, r"mode 'self' has the starting student as its teacher, and teacher is 'smollm2-135m-instruct' and"),
        ({"student": "prune"}, r"and student 'prune': give both the same model, or use mode kd"),
        ({"distill": {"self_ema_decay": 1.0}}, "self_ema_decay must be from 0 to below 1, or null"),
        ({"distill": {"self_ema_decay": 0.9}}, r"changes at every step, and cache\.kind is 'hidden'; set it to 'live'"),
        ({"mode": "kd"}, r"privileged_template is .* in mode 'kd' the teacher reads what the student reads"),
        (
            {"mode": "kd", "privileged_template": None, "distill": {"self_ema_decay": 0.9}},
            r"self_ema_decay is 0\.9, and in mode 'kd' the teacher is not the student; leave it out",
        ),
        ({"privileged_template": "{answer}"}, r"config: privileged_template must be text that says more"),
        (
            {"lora": LORA, "distill": {"lmbda": 0.5, "teacher_offload": True}},
            r"distill\.teacher_offload is given, and the teacher, which shares the weights of the student",
        ),
        ({"reflect": {"engine": "transformers", "signals": ["gap"]}}, "has the student's start for one; leave it out"),
        ({"distill": {"lmbda": 1.5}}, "lmbda must be at least 0 and at most 1"),
        ({"own_answers": True, "distill": {"lmbda": 0.5}}, r"own_answers is true, and distill\.lmbda is 0\.5: the"),
        ({"own_answers": True, "distill": {"seq_kd": True}}, "mode 'self' trains on answers made beforehand"),
        ({"answers_again": True}, r"set it to false, or the mode to offline_on_policy \(self: own_answers to true\)"),
        ({"answers_per_prompt": 2}, "does not train on answers made beforehand"),
        (
            {"mode": "kd", "privileged_template": None, "own_answers": True},
            "own_answers is true, which is for mode self, and mode is 'kd'",
        ),
    ):
        with pytest.raises((UserError, ValueError), match=words):
            execute(config(settings, tmp_path, **changes), say=lambda text: None)  # type: ignore[arg-type]
    with pytest.raises(FaultsError) as told:
        execute(config(settings, tmp_path, {"self_ema_decay": 0.9}, mode="kd"), say=lambda text: None)
    assert len(told.value.faults) == 2
    assert not list(tmp_path.iterdir())
    # The rows are read before anything is computed.
    with pytest.raises(UserError, match=r"data: 12 rows have nothing that only the teacher could read: row 1, row 2,"):
        execute(config(settings, tmp_path, privileged_template=None), say=lambda text: None)
    assert not (tmp_path / "reflections.parquet").exists()


def test_other_modes_have_nothing_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    made = load_run_config(None, ["mode=self"])
    assert made.privileged_template is None
    tuned = fine_tuning(config(settings, tmp_path, {"self_ema_decay": 0.9, "lmbda": 0.5}), "teacher")
    assert (tuned.mode, tuned.privileged_template) == ("sft", None)
    assert not {"self_ema_decay", "lmbda"} & tuned.distill.keys()


@pytest.mark.long
def test_real_weights_take_in_a_system_prompt_and_a_killed_run_ends_the_same(
    data_folder: Path | None, tmp_path: Path
) -> None:
    """SmolLM2-135M-Instruct alone, on real text, by the real command, killed with SIGKILL while it trains."""
    if data_folder is None:
        pytest.skip("needs real text: SRD_FAST_TEST_DATA")
    content = {
        "mode": "self",
        "teacher": "smollm2-135m-instruct",
        "student": "smollm2-135m-instruct",
        "data": str(data_folder / "llms_from_scratch_train.jsonl"),
        "max_rows": 40,
        "validation": 8,
        "template": "chat",
        "privileged_template": "You are a pirate. Begin every answer with 'Arr, matey!', and speak as pirates do.",
        "curate": {"method": "none", "stages": 1},
        "reflect": {"engine": "transformers", "max_new_tokens": 1},
        "evaluate": {"max_new_tokens": 2},
        "distill": {
            "divergence": "forward_kl", "temperature": 1, "learning_rate": 1e-4, "epochs_per_stage": 1,
            "per_device_train_batch_size": 4, "save_steps": 3, "save_total_limit": 1, "eval_steps": 8,
        },
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    finish(path, tmp_path / "quiet", tmp_path / "quiet.log")
    command = Command(path, tmp_path / "run", tmp_path / "killed.log")
    assert command.reaches("distill")
    saved = tmp_path / "run" / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    while not saved.is_file():
        assert command.runs_for(0.05)
    command.kill()
    assert not (tmp_path / "run" / "student").exists()
    finish(path, tmp_path / "run", tmp_path / "run.log")
    wanted = outcome(tmp_path / "quiet")
    assert outcome(tmp_path / "run") == wanted
    summary: Any = wanted["summary"]
    assert summary["student"]["kl"] < 0.8 * summary["start"]["kl"]
