"""The command line: a whole run and all the ways to break, stop and repeat it; a mistake is one line and status 2."""

import contextlib
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from srd_fast.cli import main
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.files import content_digest
from srd_fast.losses import chunked
from srd_fast.run.config import load_run_config
from srd_fast.run.pipeline import STEP_NAMES, fingerprints
from srd_fast.run.steps import Run
from srd_fast.teacher import LiveTeacher, TeacherCache, build

CONTRACT = (
    "config.yaml", "reflections.parquet", "plan.json", "teacher_cache", "checkpoints", "student", "metrics.jsonl",
    "summary.json", "report.html",
)  # fmt: skip
STEPS_OF_DISTILL = 72  # 18 of 24 rows in 3 subsets, 4 epochs a stage, batch 2
SAVE_STEPS = 8
QUICK = ("distill.epochs_per_stage=0.1", "distill.eval_strategy='no'", "distill.save_strategy='no'")


@dataclass
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str

    def steps(self, what: str) -> list[str]:
        """Steps that were `what`: "done in" or "unchanged"."""
        return re.findall(rf"^\[\d/\d\] (\S+): {what}", self.out, re.MULTILINE)

    def error(self) -> str:
        """The one line of a mistake."""
        assert self.status == 2, self
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("error: ")
        return self.err


def srd_fast(*arguments: object) -> Result:
    """Run the command inside this process, and leave the process as it was."""
    out, err, logger = io.StringIO(), io.StringIO(), logging.getLogger("srd_fast")
    kept = logger.handlers[:], logger.propagate, logger.level
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["srd-fast", *map(str, arguments)]))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stop = stack.enter_context(pytest.raises(SystemExit))
        try:
            main()
        finally:
            logger.handlers[:], logger.propagate, logger.level = kept
    return Result(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def process(*arguments: object) -> "subprocess.Popen[str]":
    """The command as a process of its own, which Ctrl-C reaches even if this one ignores it."""
    return subprocess.Popen(
        [sys.executable, "-m", "srd_fast.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="module")
def config_file(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of all runs here; `output_dir` is given on the command line."""
    content = {
        "teacher": str(tiny_teacher_folder),
        "student": "prune",
        "max_rows": 24,
        "validation": 6,
        "dtype": "float32",
        "max_prompt_length": 400,
        "max_response_length": 64,
        "init_student": {"layers": 2, "warmup_steps": 2, "warmup_batch_size": 4},
        "reflect": {"engine": "transformers", "max_new_tokens": 4, "batch_size": 8},
        "evaluate": {"max_new_tokens": 4},
        "distill": {
            "per_device_train_batch_size": 2,
            "epochs_per_stage": 4,
            "save_steps": SAVE_STEPS,
            "eval_steps": 36,
            "learning_rate": 1e-3,
        },
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run. Shared: work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = srd_fast("run", config_file, f"output_dir={folder}")
    assert result.status == 0, result
    assert result.steps("done in") == list(STEP_NAMES)
    assert f"report: {folder / 'report.html'}\nstudent: {folder / 'student'}\n" in result.out
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run's folder."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train_steps(folder: Path) -> list[int]:
    return [row["step"] for row in metrics(folder) if row["kind"] == "train"]


# A whole run


def test_a_run_makes_every_file_of_the_contract(finished: Path) -> None:
    assert [name for name in CONTRACT if not (finished / name).exists()] == []
    assert not [p for p in finished.rglob("*") if "partial" in p.name or "parts" in p.name]
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["evaluation"]) == {"teacher", "start", "student"}
    assert summary["evaluation"]["student"]["kl"] < summary["evaluation"]["start"]["kl"]
    assert summary["data"] == {"train": 24, "validation": 6, "rejected": 0}
    assert summary["training"]["steps"] == STEPS_OF_DISTILL
    assert train_steps(finished) == list(range(1, STEPS_OF_DISTILL + 1))
    assert [row["step"] for row in metrics(finished) if row["kind"] == "eval"] == [0, 36, 72]
    plan = json.loads((finished / "plan.json").read_text())
    assert [len(s) for s in plan["subsets"]] == [6, 6, 6]
    assert "<html" in (finished / "report.html").read_text()


def test_the_student_loads_and_speaks(finished: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    student = AutoModelForCausalLM.from_pretrained(finished / "student")
    assert student.config.num_hidden_layers == 2
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    assert tokenizer("Say hi.").input_ids == tiny_tokenizer("Say hi.").input_ids
    ids = tokenizer("Say hi.", return_tensors="pt").input_ids
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns if p.name != "config.yaml" else 0) for p in files}


def test_a_second_run_does_nothing(finished: Path, config_file: Path) -> None:
    before = state(finished)
    result = srd_fast("run", config_file, f"output_dir={finished}")
    assert result.status == 0
    assert result.steps("unchanged, skipped") == list(STEP_NAMES)
    assert state(finished) == before


def test_another_share_redoes_what_follows_from_it(copy: Path, config_file: Path) -> None:
    result = srd_fast("run", config_file, f"output_dir={copy}", "curate.keep=0.25", "distill.epochs_per_stage=1")
    assert result.steps("unchanged, skipped") == ["prepare", "init-student", "reflect"]
    assert result.steps("done in") == ["curate", "cache", "distill", "evaluate", "report"]
    assert train_steps(copy) == [1, *range(2, 7)]
    assert json.loads((copy / "summary.json").read_text())["training"]["steps"] == 6
    assert yaml.safe_load((copy / "config.yaml").read_text())["curate"]["keep"] == 0.25


def test_a_lost_plan_is_made_again(copy: Path, finished: Path, config_file: Path) -> None:
    (copy / "plan.json").unlink()
    result = srd_fast("run", config_file, f"output_dir={copy}")
    assert "curate" in result.steps("done in")
    assert result.steps("unchanged, skipped")[:3] == ["prepare", "init-student", "reflect"]
    assert (copy / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def _truncate_weights(folder: Path) -> None:
    path = folder / "student" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _lose_student(folder: Path) -> None:
    shutil.rmtree(folder / "student")


def _tear_a_line(folder: Path) -> None:
    _lose_student(folder)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"kind": "train", "st')


def _tear_a_checkpoint(folder: Path) -> None:
    _lose_student(folder)
    (folder / "checkpoints" / f"checkpoint-{STEPS_OF_DISTILL}" / "trainer_state.json").unlink()


def _tear_all_checkpoints(folder: Path) -> None:
    _lose_student(folder)
    for state_file in folder.glob("checkpoints/*/trainer_state.json"):
        state_file.unlink()


DAMAGE = [_truncate_weights, _lose_student, _tear_a_line, _tear_a_checkpoint, _tear_all_checkpoints]


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=pytest.mark.slow if d in DAMAGE[1:4] else (), id=d.__name__.strip("_")) for d in DAMAGE],
)
def test_a_damaged_student_is_distilled_again(
    damage: Callable[[Path], None], copy: Path, finished: Path, config_file: Path
) -> None:
    damage(copy)
    result = srd_fast("run", config_file, f"output_dir={copy}")
    assert result.status == 0, result
    assert "distill" in result.steps("done in")
    assert result.steps("unchanged, skipped")[:4] == ["prepare", "init-student", "reflect", "curate"]
    assert same_weights(copy, finished)
    assert set(train_steps(copy)) == set(range(1, STEPS_OF_DISTILL + 1))
    assert srd_fast("run", config_file, f"output_dir={copy}").steps("unchanged, skipped") == list(STEP_NAMES)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"reflect": 3}', '{"reflect": {}}'])
def test_a_damaged_ledger_means_doing_it_again(content: str, copy: Path, config_file: Path) -> None:
    (copy / "steps.json").write_text(content)
    result = srd_fast("prepare", config_file, f"output_dir={copy}")
    assert result.status == 0
    assert result.steps("done in") == ["prepare"]


# What depends on what


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=1", "prepare"),
        ("max_rows=20", "prepare"),
        ("template=chat", "prepare"),
        ("max_response_length=32", "prepare"),
        ("validation=7", "prepare"),
        ("init_student.layers=3", "init-student"),
        ("reflect.max_new_tokens=5", "reflect"),
        ("reflect.rouge_tokenizer=unicode", "reflect"),
        ("curate.stages=2", "curate"),
        ("curate.signals={rouge_l: 2}", "curate"),
        ("cache.kind=topk", "cache"),
        ("cache.kind=live", "cache"),
        ("cache.k=32", None),  # of hidden states there is no choice
        ("cache.log_sum_exp=false", None),
        ("cache.log_sum_exp=true", "cache"),
        ("distill.skew=0.2", "distill"),
        ("evaluate.max_new_tokens=5", "evaluate"),
        ("output_dir=elsewhere", None),
        ("device=cpu", None),
    ],
)
def test_a_setting_changes_its_step_and_those_after(override: str, first: str | None, config_file: Path) -> None:
    before, after = (fingerprints(load_run_config(config_file, o)) for o in ([], [override]))
    changed = [name for name in STEP_NAMES if before[name] != after[name]]
    assert changed == ([] if first is None else list(STEP_NAMES[STEP_NAMES.index(first) :]))


@pytest.mark.parametrize(("key", "first"), [("teacher", "prepare"), ("student", "init-student"), ("data", "prepare")])
def test_other_content_behind_the_same_name_counts(
    key: str, first: str, config_file: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_teacher_folder, tmp_path / "model"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    config = load_run_config(config_file, [f"{key}={rows if key == 'data' else model}"])
    before = fingerprints(config)
    if key == "data":
        rows.write_text('{"prompt": "a", "completion": "c"}\n')
    else:
        changed_weights = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(changed_weights[:-1] + bytes([changed_weights[-1] ^ 1]))
    after = fingerprints(config)
    assert [name for name in STEP_NAMES if before[name] != after[name]] == list(STEP_NAMES[STEP_NAMES.index(first) :])


# One step at a time


def test_a_verb_needs_the_steps_before_it(config_file: Path, tmp_path: Path) -> None:
    for verb in ("reflect", "curate", "cache", "distill", "evaluate", "report"):
        message = srd_fast(verb, config_file, f"output_dir={tmp_path / 'run'}").error()
        assert f"step '{verb}' needs 'prepare' done first" in message


@pytest.mark.parametrize("student", ["prune", "given"])
def test_the_commands_that_errors_name_lead_on(
    student: str, config_file: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    name = "prune" if student == "prune" else tiny_teacher_folder
    config = (config_file, f"output_dir={tmp_path / 'run'}", f"student={name}", *QUICK)
    for _ in STEP_NAMES:
        result = srd_fast("curate", *config)
        if result.status == 0:
            break
        verb = re.findall(r"srd-fast (\S+) CONFIG", result.error())[0]
        assert srd_fast(verb, *config).status == 0, f"the error names `srd-fast {verb} CONFIG`, which fails"
    assert (tmp_path / "run" / "plan.json").is_file()


def test_a_verb_does_its_own_step(copy: Path, config_file: Path) -> None:
    (copy / "plan.json").unlink()
    (copy / "report.html").unlink()
    result = srd_fast("curate", config_file, f"output_dir={copy}")
    assert (result.status, result.steps("done in")) == (0, ["curate"])
    assert not (copy / "report.html").exists()
    assert srd_fast("curate", config_file, f"output_dir={copy}").steps("unchanged, skipped") == ["curate"]
    assert srd_fast("curate", config_file, f"output_dir={copy}", "--force").steps("done in") == ["curate"]


def test_force_trains_again(copy: Path, finished: Path, config_file: Path) -> None:
    result = srd_fast("distill", config_file, f"output_dir={copy}", "--force")
    assert result.steps("done in") == ["distill"]
    again, before = ([r["seconds"] for r in metrics(f) if r["kind"] == "train"] for f in (copy, finished))
    assert len(again) == STEPS_OF_DISTILL
    assert all(a != b for a, b in zip(again, before)), "the figures are those of the first training"
    assert same_weights(copy, finished)


def forge_evaluation(folder: Path) -> None:
    """Give the teacher an impossible score, as if left by an evaluation with other settings."""
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    content["teacher"]["rouge_l"] = 7.0
    path.write_text(json.dumps(content))


def teacher_score(folder: Path) -> float:
    return json.loads((folder / "summary.json").read_text())["evaluation"]["teacher"]["rouge_l"]


def test_force_evaluates_again(copy: Path, config_file: Path) -> None:
    forge_evaluation(copy)
    assert srd_fast("evaluate", config_file, f"output_dir={copy}", "--force").steps("done in") == ["evaluate"]
    assert teacher_score(copy) <= 1


@pytest.mark.slow
def test_another_rouge_tokenizer_scores_every_model_again(copy: Path, config_file: Path) -> None:
    forge_evaluation(copy)
    result = srd_fast("run", config_file, f"output_dir={copy}", "reflect.rouge_tokenizer=unicode", *QUICK)
    assert result.status == 0
    assert teacher_score(copy) <= 1


# The teacher's cache


def cached(folder: Path) -> dict[str, bytes]:
    """The files of a run's cache, hidden ones included."""
    return {p.name: p.read_bytes() for p in (folder / "teacher_cache").iterdir()}


def rows_file(folder: Path) -> Path:
    (found,) = (folder / "teacher_cache").glob("rows-*.safetensors")
    return found


def test_the_cache_holds_the_kept_and_the_validation_samples(finished: Path) -> None:
    assert len(load_file(rows_file(finished))["keys"]) == 18 + 6
    assert sorted(cached(finished)) == ["head.safetensors", "index.json", "meta.json", rows_file(finished).name]
    meta = json.loads((finished / "teacher_cache" / "meta.json").read_text())
    assert (meta["kind"], meta["dtype"], meta["template"]) == ("hidden", "float32", "alpaca")


@pytest.mark.slow
def test_the_teacher_sees_each_sample_once(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In warm-up, distillation and evaluation together, with the results of a teacher beside the student."""
    every = ("init_student.warmup_steps=6", "distill.epochs_per_stage=1", "distill.eval_steps=6")
    live = tmp_path / "live"
    assert srd_fast("run", config_file, f"output_dir={live}", *every, "cache.kind=live").status == 0
    seen: list[bytes] = []
    make = build._Maker.make

    def counted(self: Any, group: Any) -> Any:
        seen.extend(request.key for request in group)
        return make(self, group)

    def beside(self: Any, batch: Any, temperature: float) -> Any:
        raise AssertionError("the teacher runs beside the student")

    monkeypatch.setattr(build._Maker, "make", counted)
    monkeypatch.setattr(LiveTeacher, "rows", beside)
    once = tmp_path / "once"
    result = srd_fast("run", config_file, f"output_dir={once}", *every)
    assert (result.status, len(seen), len(set(seen))) == (0, 24 + 6, 24 + 6), result
    started, expected = (load_file(f / "start" / "model.safetensors") for f in (once, live))
    for name, weight in expected.items():
        tiny.assert_same(started[name], weight, 1e-2, name)
    ours, theirs = (json.loads((f / "summary.json").read_text())["evaluation"] for f in (once, live))
    for model, values in theirs.items():
        assert ours[model]["kl"] == (None if model == "teacher" else pytest.approx(values["kl"], rel=1e-3))
        assert ours[model]["cross_entropy"] == pytest.approx(values["cross_entropy"], rel=1e-3), model


@pytest.mark.slow
def test_how_many_logits_a_run_will_see(
    config_file: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guess, but of the right size: whether compilation pays hangs on it."""
    seen, run_chunks = [0], chunked.run_packed

    def counted(hidden_ND: Any, head: Any, *args: Any, **options: Any) -> Any:
        seen[0] += hidden_ND.shape[0] * head.num_classes(hidden_ND)
        return run_chunks(hidden_ND, head, *args, **options)

    monkeypatch.setattr(chunked, "run_packed", counted)
    assert srd_fast("run", config_file, f"output_dir={tmp_path / 'run'}").status == 0
    config = load_run_config(str(config_file), [f"output_dir={finished}"])
    assert 0.5 < Run(config, finished, {}, {}).expected_logits() / seen[0] < 2
    assert Run(config, tmp_path / "nothing yet", {}, {}).expected_logits() == 0


def test_cache_is_a_verb(copy: Path, finished: Path, config_file: Path) -> None:
    config = (config_file, f"output_dir={copy}")
    assert srd_fast("cache", *config).steps("unchanged, skipped") == ["cache"]
    shutil.rmtree(copy / "teacher_cache")
    assert srd_fast("cache", *config).steps("done in") == ["cache"]
    assert cached(copy) == cached(finished)
    before = rows_file(copy).stat().st_mtime_ns
    assert srd_fast("cache", *config, "--force").steps("done in") == ["cache"]
    assert rows_file(copy).stat().st_mtime_ns > before
    assert cached(copy) == cached(finished)
    assert srd_fast("run", *config).steps("unchanged, skipped") == list(STEP_NAMES)


def test_more_samples_leave_the_teachers_rows_of_the_others(copy: Path, config_file: Path) -> None:
    before = rows_file(copy)
    stamp = before.stat().st_mtime_ns
    config = (config_file, f"output_dir={copy}", "curate.keep=1")
    assert srd_fast("curate", *config).status == 0
    assert srd_fast("cache", *config).steps("done in") == ["cache"]
    assert before.stat().st_mtime_ns == stamp
    (new,) = set((copy / "teacher_cache").glob("rows-*")) - {before}
    assert len(load_file(new)["keys"]) == 24 - 18


def test_a_damaged_cache_is_named_and_made_again(copy: Path, finished: Path, config_file: Path) -> None:
    path = rows_file(copy)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.rmtree(copy / "student")
    result = srd_fast("run", config_file, f"output_dir={copy}")
    assert result.status == 0
    assert re.search(rf"{path.name} is damaged: its checksum is .*; making it again", result.err)
    assert result.steps("done in")[:1] == ["distill"]
    assert cached(copy) == cached(finished)
    assert same_weights(copy, finished)


@pytest.mark.parametrize("name", ["index.json", "meta.json", "head.safetensors"])
def test_any_damaged_file_of_the_cache_is_made_again(name: str, copy: Path, finished: Path, config_file: Path) -> None:
    path = copy / "teacher_cache" / name
    path.write_bytes(path.read_bytes()[:-1])
    result = srd_fast("cache", config_file, f"output_dir={copy}")
    if name == "index.json":
        assert result.steps("done in") == ["cache"]
    else:  # the step looks at the index alone
        assert result.steps("unchanged, skipped") == ["cache"]
        result = srd_fast("distill", config_file, f"output_dir={copy}", *QUICK)
    assert result.status == 0
    assert re.search(rf"{name} is damaged: .*; making it again", result.err)
    assert cached(copy) == cached(finished)


def test_a_cache_of_something_else_is_replaced(copy: Path, config_file: Path) -> None:
    """What was made before the cache is kept: only the step's own inputs have changed."""
    entries = json.loads((copy / "steps.json").read_text())
    meta = json.loads((copy / "teacher_cache" / "meta.json").read_text())
    shutil.rmtree(copy / "teacher_cache")
    config = (config_file, f"output_dir={copy}", "cache.kind=topk", "cache.k=8")
    assert srd_fast("cache", *config).steps("done in") == ["cache"]
    result = srd_fast("cache", *config[:2])
    assert (result.status, result.steps("done in")) == (0, ["cache"])
    assert re.search(r"was made with another kind: 'topk' there, 'hidden' here: making it again\n", result.err)
    assert json.loads((copy / "teacher_cache" / "meta.json").read_text()) == meta
    assert json.loads((copy / "steps.json").read_text())["cache"]["outputs"] == entries["cache"]["outputs"]


def test_log_sum_exps_are_added_to_a_cache_that_is_there(
    copy: Path, finished: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without running the teacher, and they are there for every loss. Then nothing is left to do; and off again."""
    config = (config_file, f"output_dir={copy}", *QUICK)
    keeping = (*config, "cache.log_sum_exp=true")
    before = cached(copy)
    monkeypatch.setattr(LiveTeacher, "hidden_states", lambda *args: pytest.fail("the teacher ran"))
    assert srd_fast("cache", *keeping).steps("done in") == ["cache"]
    assert srd_fast("cache", *keeping).steps("unchanged, skipped") == ["cache"]
    after = cached(copy)
    assert {n: x for n, x in after.items() if not n.startswith("lse-")}.keys() == before.keys()
    assert {n for n in before if after[n] != before[n]} == {"index.json"}
    (kept,) = (load_file(p) for p in (copy / "teacher_cache").glob("lse-*.safetensors"))
    assert sorted(kept) == ["classes", "lse@1.0", "lse@1.5", "lse@2.0", "rows"]
    seen, get = list[tuple[float, bool]](), TeacherCache.rows

    def watched(self: TeacherCache, batch: Any, temperature: float) -> Any:
        rows = get(self, batch, temperature)
        seen.append((temperature, rows.lse_N is not None))  # type: ignore[union-attr]
        return rows

    monkeypatch.setattr(TeacherCache, "rows", watched)
    assert srd_fast("distill", *keeping, "distill.eval_strategy=epoch").steps("done in") == ["distill"]
    assert set(seen) == {(1.0, True), (1.5, True), (2.0, True)}
    seen.clear()
    assert srd_fast("evaluate", *keeping, "distill.eval_strategy=epoch").steps("done in") == ["evaluate"]
    assert (1.0, True) in seen
    assert srd_fast("cache", *config).steps("done in") == ["cache"]
    assert cached(copy) == after


@pytest.mark.parametrize("student", ["prune", "given"])
def test_log_sum_exps_are_kept_from_the_start(
    student: str, config_file: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    """A given student's classes are counted without its weights; the warm-up of a pruned one fills the cache."""
    name = "prune" if student == "prune" else tiny_teacher_folder
    extra = ("curate.method=random", "init_student.warmup_steps=20", "cache.log_sum_exp=true", f"student={name}")
    config = (config_file, f"output_dir={tmp_path / 'run'}", *QUICK, *extra)
    for verb in ("prepare", "reflect", "curate", "cache"):
        assert srd_fast(verb, *config).status == 0
    folder = tmp_path / "run" / "teacher_cache"
    assert len([*folder.glob("lse-*")]) == len([*folder.glob("rows-*")]) > 0
    assert {int(load_file(p)["classes"]) for p in folder.glob("lse-*")} == {400}


@pytest.mark.slow
def test_a_live_teacher_leaves_no_cache(copy: Path, finished: Path, config_file: Path) -> None:
    shutil.rmtree(copy / "teacher_cache")
    config = (config_file, f"output_dir={copy}", "cache.kind=live")
    result = srd_fast("run", *config)
    assert (result.status, result.steps("done in")[:2]) == (0, ["cache", "distill"])
    assert not (copy / "teacher_cache").exists()
    assert srd_fast("run", *config).steps("unchanged, skipped") == list(STEP_NAMES)
    live, hidden = weights(copy), weights(finished)
    for name, weight in hidden.items():
        tiny.assert_same(live[name], weight, 1e-2, name)
    losses = [[row["loss"] for row in metrics(f) if row["kind"] == "train"] for f in (copy, finished)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("cache.kind=topk", "cache.k=16"),
        ("cache.kind=sampled", "cache.k=16", "distill.divergence=forward_kl"),
        ("cache.kind=projected", "distill.divergence=forward_kl", "lora={target_modules: [q_proj]}"),
    ],
)
def test_every_kind_of_cache_trains(overrides: tuple[str, ...], copy: Path, config_file: Path) -> None:
    if "projected" in overrides[0]:
        pytest.importorskip("peft")
    shutil.rmtree(copy / "teacher_cache")
    config = (config_file, f"output_dir={copy}", *QUICK, *overrides)
    assert srd_fast("cache", *config).steps("done in") == ["cache"]
    assert not (copy / "teacher_cache" / "head.safetensors").exists()
    result = srd_fast("distill", *config)
    assert (result.status, result.steps("done in")) == (0, ["distill"])
    assert all(math.isfinite(row["loss"]) for row in metrics(copy))


def test_a_projection_needs_adapters(config_file: Path, tmp_path: Path) -> None:
    overrides = ("cache.kind=projected", "distill.divergence=forward_kl")
    message = srd_fast("run", config_file, f"output_dir={tmp_path / 'run'}", *overrides).error()
    assert "cache.kind 'projected' needs a student whose head is frozen: set lora, or use hidden" in message


# init-student


def test_init_student_cuts_a_student(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    result = srd_fast(
        "init-student", "--teacher", tiny_teacher_folder, "--layers", "0,2,3", "--output", tmp_path / "deep" / "student"
    )
    assert (result.status, result.out) == (0, f"student: {tmp_path / 'deep' / 'student'}\n")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "student")
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher_folder)
    assert student.config.num_hidden_layers == 3
    for ours, theirs in ((0, 0), (1, 2), (2, 3)):
        own = student.model.layers[ours].self_attn.q_proj.weight
        assert torch.equal(own, teacher.model.layers[theirs].self_attn.q_proj.weight)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["student"]
    AutoTokenizer.from_pretrained(tmp_path / "deep" / "student")


def test_init_student_warms_up(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_quickstart_rows(8, seed=0)))
    common = ("init-student", "--teacher", tiny_teacher_folder, "--layers", 2, "--output")
    assert srd_fast(*common, tmp_path / "cold").status == 0
    warm = srd_fast(*common, tmp_path / "warm", "--data", rows, "--warmup-steps", 2, "--batch-size", 4)
    assert warm.status == 0, warm
    teacher_weights = load_file(tiny_teacher_folder / "model.safetensors")
    cold_weights, warm_weights = (load_file(tmp_path / n / "model.safetensors") for n in ("cold", "warm"))
    for ours, theirs in ((0, 0), (1, 3)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(cold_weights[name.format(ours)], teacher_weights[name.format(theirs)])
    assert {n: w.shape for n, w in cold_weights.items()} == {n: w.shape for n, w in warm_weights.items()}
    assert any(not torch.equal(cold_weights[n], warm_weights[n]) for n in cold_weights)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "warm").config.num_hidden_layers == 2


def test_init_student_replaces_nothing(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    common = ("init-student", "--teacher", tiny_teacher_folder, "--layers", 2, "--output")
    (tmp_path / "mine").mkdir()
    assert srd_fast(*common, tmp_path / "mine").status == 0  # an empty folder is no loss
    before = content_digest(tmp_path / "mine")
    assert "is there already; delete it, or give another folder" in srd_fast(*common, tmp_path / "mine").error()
    assert content_digest(tmp_path / "mine") == before


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layers", "few"], "layers must be a number or a list of numbers, got 'few'"),
        (["--layers", "5"], "layers must be from 1 to the teacher's 4, got 5"),
        (["--layers", "0"], "layers must be from 1 to the teacher's 4, got 0"),
        (["--layers", "0,4"], "layers must be different indices from 0 to 3, got [0, 4]"),
        (["--layers", "1,1"], "layers must be different indices"),
        (["--layers", "2", "--warmup-steps", "3"], "--data and --warmup-steps go together"),
        (["--layers", "2", "--data", "x.jsonl"], "--data and --warmup-steps go together"),
        (["--layers", "2", "--data", "x.jsonl", "--warmup-steps", "3"], "'x.jsonl' does not exist"),
    ],
)
def test_init_student_tells_what_is_wrong(
    arguments: list[str], complaint: str, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    result = srd_fast("init-student", "--teacher", tiny_teacher_folder, "--output", tmp_path / "s", *arguments)
    assert complaint in result.error()
    assert not (tmp_path / "s").exists()


# Mistakes

GOOD_ROW = '{"instruction": "a", "output": "b"}\n'
MANY_ROWS = "".join(f'{{"instruction": "a{i}", "output": "b"}}\n' for i in range(12))


def broken_model(teacher: Path, folder: Path, name: str, content: bytes | None) -> str:
    """A copy of the teacher with one file replaced, or without it and its kind."""
    shutil.copytree(teacher, folder)
    if content is None:
        for path in folder.glob(name):
            path.unlink()
    else:
        (folder / name).write_bytes(content)
    return str(folder)


MISTAKES: dict[str, tuple[str, str]] = {
    # name: (override, part of the message); {d} is a folder, {name.ext} one of FILES in it
    "missing column": ("data={d}/no_output.jsonl", "missing ['output'] for instruction/output rows"),
    "empty file": ("data={d}/empty.jsonl", "empty.jsonl' is empty"),
    "broken json line": ("data={d}/broken.jsonl", "1 of 5 rows rejected, more than max_bad_rows=0.1; mend them"),
    "no usable row": ("data={d}/wrong_type.jsonl", "none of 2 rows is usable; first: line 1"),
    "data file missing": ("data={d}/nowhere.jsonl", "nowhere.jsonl' does not exist"),
    "data file missing, odd name": ("data={d}/nowhere", "nowhere' does not exist"),
    "validation file missing": ("validation={d}/nowhere.jsonl", "nowhere.jsonl' does not exist"),
    "data not on the hub": ("data=nobody/nothing", "data 'nobody/nothing' is not a local file, and as a hub name"),
    "damaged gzip": ("data={d}/damaged.jsonl.gz", "damaged.jsonl.gz' cannot be read"),
    "too few rows to hold out": ("data={d}/one.jsonl", "validation is 6 but the data has 1 usable rows"),
    "negative validation": ("validation=-5", "validation"),
    "more quickstart rows than there are": ("max_rows=5000", "2600"),
    "unknown divergence": (
        "distill.divergence=foward_kl",
        "unknown divergence 'foward_kl'; did you mean 'forward_kl'? Known: adaptive_kl, csd, csd_ts, "
        "csd_us, csd_uu, forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl, tvd",
    ),
    "keep of nothing": ("curate.keep=0", "curate.keep"),
    "keep of more than all": ("curate.keep=1.5", "curate.keep"),
    "temperature 0": ("distill.temperature=0", "temperature must be at least 1e-06 and at most 1e+06, got 0"),
    "temperature 0 at the end": ("distill.temperature_end=0", "temperature_end must be at least 1e-06 and"),
    "weight above 1": ("distill.sft_weight=[0.1,0.2,1.5]", "sft_weight must be at least 0 and at most 1, got 1.5"),
    "batch of none": ("distill.per_device_train_batch_size=0", "per_device_train_batch_size"),
    "no accumulation": ("distill.gradient_accumulation_steps=0", "gradient_accumulation_steps"),
    "a best model by what is not measured": (
        "distill.metric_for_best_model=rouge_l",
        "unknown metric_for_best_model 'rouge_l'; did you mean 'kl'? Known: cross_entropy, kl, loss",
    ),
    "adapters on layers that are not there": (
        "lora={target_modules: [nowhere]}",
        "config: lora: peft_config does not fit LlamaForCausalLM: Target modules {'nowhere'} not found",
    ),
    "misspelt key": ("curate.stagse=3", "unknown key in curate 'stagse'; did you mean 'stages'?"),
    "misspelt key of distill": ("distill.leraning_rate=1", "did you mean 'learning_rate'?"),
    "misspelt section": ("distil.skew=1", "unknown key 'distil'; did you mean 'distill'?"),
    "unknown template": ("template=alpca", "template must be 'alpaca', 'chat' or text with {instruction}"),
    "template too long": ("max_prompt_length=9", "the prompt template alone is"),
    "unknown kind of cache": ("cache.kind=top_k", "config: cache.kind: input should be 'hidden', 'topk'"),
    "cache that keeps nothing": ("cache.k=0", "config: cache.k: "),
    **{
        f"log-sum-exps beside {kind}": (
            f"cache={{kind: {kind}, log_sum_exp: true}}",
            f"config: cache.log_sum_exp is true, and cache.kind is '{kind}': only hidden keeps it; set it to false",
        )
        for kind in ("topk", "live")
    },
    "drawn classes and another divergence": (
        "cache.kind=sampled",
        "cache.kind 'sampled' gives only forward_kl, and distill.divergence is 'skew_reverse_kl'; use hidden or topk",
    ),
    "projection and another divergence": (
        "cache.kind=projected",
        "cache.kind 'projected' gives only forward_kl, and distill.divergence is 'skew_reverse_kl'",
    ),
    "cache set under distill": ("distill.teacher_cache=there", "teacher_cache is set at the top level of the config"),
    "unknown engine": ("reflect.engine=transformer", "unknown engine 'transformer'; did you mean 'transformers'?"),
    "engine option of its own": ("reflect.engine_options={batch_size: 4}", "engine_options holds 'batch_size'"),
    "unknown signal": ("reflect.signals=[rouge]", "unknown difficulty signal 'rouge'; did you mean 'rouge_l'?"),
    "no signals": ("reflect.signals=[]", "signal"),
    "signal that is not made": ("curate.signals={entropy: 1}", "entropy"),
    "negative seed": ("seed=-1", "seed"),
    "seed too large": ("seed=99999999999999", "seed"),
    "unknown device": ("device=nonsense", "device"),
    "teacher missing": ("teacher={d}/nowhere", "nowhere' does not exist"),
    "teacher without config": ("teacher={d}", "has no config.json"),
    "teacher without tokenizer": ("teacher={d}/bare", "bare' has no tokenizer"),
    "teacher with a damaged tokenizer": ("teacher={d}/scribbled", "no tokenizer can be loaded from"),
    "teacher with damaged weights": ("teacher={d}/torn", "torn' cannot be loaded"),
    "student with another tokenizer": ("student={d}/stranger", "student and teacher have different tokenizers"),
    "student without tokenizer": ("student={d}/bare", "bare' has no tokenizer"),
    "more layers than there are": ("init_student.layers=9", "layers must be from 1 to the teacher's 4, got 9"),
    "message of several lines": (
        "distill={load_best_model_at_end: true, eval_strategy: steps, save_strategy: epoch}",
        "load_best_model_at_end",
    ),
    "not an assignment": ("keep", "override 'keep' is not of the form key=value"),
    "output is a file": ("output_dir={d}/one.jsonl", "one.jsonl' cannot be made"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_inputs(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files and models that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "no_output.jsonl").write_text('{"instruction": "a"}\n' * 9)
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(GOOD_ROW * 3 + '{"instruction": \n' + GOOD_ROW)
    (folder / "wrong_type.jsonl").write_text('{"instruction": 1, "output": "b"}\n' * 2)
    (folder / "one.jsonl").write_text(GOOD_ROW)
    (folder / "damaged.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 40)
    weights = (tiny_teacher_folder / "model.safetensors").read_bytes()
    broken_model(tiny_teacher_folder, folder / "bare", "tokenizer*", None)
    broken_model(tiny_teacher_folder, folder / "scribbled", "tokenizer.json", b"{")
    broken_model(tiny_teacher_folder, folder / "torn", "model.safetensors", weights[:1000])
    broken_model(tiny_teacher_folder, folder / "stranger", "tokenizer.json", b"")
    tiny.tiny_tokenizer().save_pretrained(folder / "stranger")
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name: str, bad_inputs: Path, config_file: Path, tmp_path: Path) -> None:
    override, complaint = MISTAKES[name]
    result = srd_fast("run", config_file, f"output_dir={tmp_path}", override.replace("{d}", str(bad_inputs)))
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    if name == "projection and another divergence":
        assert "needs a student whose head is frozen: set lora" in lines.pop()
    elif name != "teacher with damaged weights":  # found after some work
        assert result.error() == f"{lines[0]}\n"
    assert result.status == 2
    assert len(lines) == 1
    assert complaint in lines[0]


def test_more_stages_than_samples(copy: Path, config_file: Path) -> None:
    message = srd_fast("run", config_file, f"output_dir={copy}", "curate.stages=25").error()
    assert "stages is 25 but only 24 of 24 samples could be scored" in message
    message = srd_fast("run", config_file, f"output_dir={copy}", "curate.stages=20").error()
    assert "stages is 20 but keep=0.75 of 24 samples leaves 18: lower stages or raise keep" in message


def test_more_stages_than_rows_is_told_before_reflection(config_file: Path, tmp_path: Path) -> None:
    message = srd_fast("run", config_file, f"output_dir={tmp_path}", "curate.stages=1000").error()
    assert "curate.stages is 1000 but the data has" in message
    assert not (tmp_path / "reflections.parquet").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(config_file: Path, tmp_path: Path) -> None:
    result = srd_fast("run", config_file, f"output_dir={tmp_path}", "device=cuda")
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith("error: ")


def test_a_value_that_fits_no_stage_is_told_before_any_work(config_file: Path, tmp_path: Path) -> None:
    message = srd_fast("run", config_file, f"output_dir={tmp_path}", "distill.temperature=[1,2]").error()
    assert "temperature has 2 values for 3 stages" in message
    assert not (tmp_path / "reflections.parquet").exists()


@pytest.mark.parametrize("arguments", [["sing"], ["run"], ["run", "--colour"], ["init-student", "--layers", "2"]])
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    result = srd_fast(*arguments)
    assert result.status == 2
    assert "Error: " in result.err
    assert "Traceback" not in result.err


def test_rejected_rows_are_listed(config_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(MANY_ROWS + '{"instruction": 1, "output": "b"}\n' + '{"instruction": "a"}\n')
    result = srd_fast(
        "prepare", config_file, f"output_dir={tmp_path / 'run'}", f"data={rows}", "max_rows=null", "max_bad_rows=2"
    )
    assert result.status == 0
    assert "data: 2 of 14 rows rejected; first: line 13" in result.err
    listed = json.loads((tmp_path / "run" / "data" / "rejected.json").read_text())
    assert [(r["where"].split(" (")[0], r["reason"]) for r in listed] == [
        ("line 13", "instruction must be text, got int"),
        ("line 14", "no value in output"),
    ]


# A real process


@pytest.mark.slow
def test_stopped_in_the_middle_it_goes_on_to_the_same_weights(copy: Path, finished: Path, config_file: Path) -> None:
    for name in ("student", "checkpoints"):
        shutil.rmtree(copy / name)
    for name in ("metrics.jsonl", "summary.json", "report.html", "evaluation.json"):
        (copy / name).unlink()
    command = process("run", config_file, f"output_dir={copy}")
    deadline = time.monotonic() + 120
    while not (copy / "metrics.jsonl").is_file() or len(train_lines(copy)) < 3 * SAVE_STEPS + 2:
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    assert "Traceback" not in err
    assert "distill: done" not in out
    assert not (copy / "student").exists()
    reached = train_steps(copy)
    assert 3 * SAVE_STEPS < max(reached) < STEPS_OF_DISTILL, "it was not stopped in the middle"

    again = srd_fast("run", config_file, f"output_dir={copy}")
    assert again.status == 0, again
    assert again.steps("done in") == ["distill", "evaluate", "report"]
    rest = train_steps(copy)[len(reached) :]
    assert rest == list(range(rest[0], STEPS_OF_DISTILL + 1))
    assert rest[0] == max(reached) + 1
    assert same_weights(copy, finished)
    assert content_digest(copy / "plan.json") == content_digest(finished / "plan.json")
    assert "stopped by SIGINT; the same command goes on from here" in err


def train_lines(folder: Path) -> list[str]:
    return [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
