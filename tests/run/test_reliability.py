"""What must not be lost: two runs in one folder, signals, full and read-only disks, training gone wrong, no memory.

The processes, signals and small disks here are real ones.
"""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from test_cli import Result, process, srd_fast
from test_losses import gradients, problem
from test_trainer import SAMPLES, Watched, config, make, three_stages
from tiny import assert_same
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from srd_fast import UserError
from srd_fast.files import disk_trouble, in_use
from srd_fast.losses import chunked, free_workspace
from srd_fast.losses.buffers import budget_of
from srd_fast.reflection.reflect import warn_of_answers_alike
from srd_fast.run.stopping import Stopped, stoppable, stopping_later
from srd_fast.training.health import DivergenceTrend, NotFiniteError

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")

STEPS = 108  # 12 rows in 3 subsets, 12 epochs a stage, batch 2
SAVE_STEPS = 40
PATIENCE = 120.0


@pytest.fixture(scope="module")
def config_file(
    tiny_teacher_folder: Path,
    make_tiny_model: Callable[[int], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The config of all runs here; `output_dir` is given on the command line."""
    folder = tmp_path_factory.mktemp("config")
    make_tiny_model(2).save_pretrained(folder / "student")
    tiny_tokenizer.save_pretrained(folder / "student")
    content = {
        "teacher": str(tiny_teacher_folder),
        "student": str(folder / "student"),
        "max_rows": 12,
        "validation": 4,
        "dtype": "float32",
        "max_prompt_length": 400,
        "max_response_length": 64,
        "reflect": {"engine": "transformers", "max_new_tokens": 4, "batch_size": 8},
        "evaluate": {"max_new_tokens": 4},
        "distill": {
            "per_device_train_batch_size": 2,
            "epochs_per_stage": 12,
            "save_steps": SAVE_STEPS,
            "eval_steps": 1000,
            "learning_rate": 1e-3,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run. Shared: work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = srd_fast("run", config_file, f"output_dir={folder}")
    assert result.status == 0, result
    return folder


@pytest.fixture
def untrained(finished: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run's folder as it was before the step distill."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("student", "checkpoints"):
        shutil.rmtree(folder / name)
    for name in ("metrics.jsonl", "summary.json", "report.html", "evaluation.json"):
        (folder / name).unlink()
    return folder


def student_bytes(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def train_steps(folder: Path) -> list[int]:
    """Steps that metrics.jsonl has so far; a last line may be in the writing."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [row["step"] for row in map(json.loads, lines) if row["kind"] == "train"]


def wait_for(condition: Callable[[], bool], command: "subprocess.Popen[str]") -> None:
    """Until the condition holds; the process must be running all the while."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextmanager
def running(*arguments: object) -> "Iterator[subprocess.Popen[str]]":
    """The command as a process that is gone at the end, whatever happens."""
    command = process(*arguments)
    try:
        yield command
    finally:
        command.kill()
        command.communicate()


# Two runs in one folder


def assert_in_use(result: Result, folder: Path, pid: int) -> None:
    assert f"output_dir {str(folder)!r} is in use by process {pid} on " in result.error()
    assert "wait for it or stop it, or choose another output_dir" in result.err


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_told_who_has_it(untrained: Path, config_file: Path) -> None:
    command = (config_file, f"output_dir={untrained}")
    before = (untrained / "config.yaml").read_bytes()
    with running("run", *command, "distill.epochs_per_stage=100000") as first:
        wait_for(lambda: len(train_steps(untrained)) > 0, first)
        written = (untrained / "config.yaml").read_bytes()
        assert written != before
        assert_in_use(srd_fast("run", *command), untrained, first.pid)
        assert_in_use(srd_fast("report", *command, "--force"), untrained, first.pid)
        assert (untrained / "config.yaml").read_bytes() == written, "the refused run has left its config"
        assert first.poll() is None
        first.kill()
        first.communicate()
        again = srd_fast("distill", *command, "distill.epochs_per_stage=0.1", "distill.save_strategy='no'")
    assert again.status == 0, again
    assert again.steps("done in") == ["distill"]


@pytest.mark.slow
def test_shards_run_beside_each_other_and_beside_nothing_else(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = (config_file, f"output_dir={folder}")
    assert srd_fast("prepare", *command).status == 0
    slow = ("reflect.max_new_tokens=400", "reflect.batch_size=1")
    with running("reflect", *command, *slow, "--shard", "1/2") as first:
        wait_for((folder / ".lock-1-of-2").is_file, first)
        wait_for(lambda: f"process {first.pid} " in (folder / ".lock-1-of-2").read_text(), first)
        other = srd_fast("reflect", *command, "--shard", "2/2")
        assert other.status == 0, other
        assert (folder / "reflections-00002-of-00002.parquet").is_file()
        assert_in_use(srd_fast("reflect", *command, "--shard", "1/2"), folder, first.pid)
        assert_in_use(srd_fast("reflect", *command, "--shard", " 01/2"), folder, first.pid)
        assert_in_use(srd_fast("run", *command), folder, first.pid)  # not the shard that began last, and has ended
        assert_in_use(srd_fast("reflect", *command), folder, first.pid)
        assert first.poll() is None
        first.kill()
        first.communicate()
    assert srd_fast("reflect", *command, "--shard", "1/2").status == 0
    joined = srd_fast("reflect", *command)
    assert (joined.status, joined.steps("done in")) == (0, ["reflect"])


def test_a_wrong_shard_is_named_and_leaves_no_lock(config_file: Path, tmp_path: Path) -> None:
    message = srd_fast("reflect", config_file, f"output_dir={tmp_path / 'run'}", "--shard", "3/2").error()
    assert "shard must be k/n with k from 1 to n" in message
    assert not list((tmp_path / "run").glob(".lock-*"))


def test_who_shares_a_lock_is_named_while_it_lives(tmp_path: Path) -> None:
    """Two processes share a lock and hold one each; the one that began last is killed."""
    hold = "import sys, time; from pathlib import Path; from srd_fast.files import in_use\n"
    hold += "folder, own = Path(sys.argv[1]), f'.lock-{sys.argv[2]}-of-2'\n"
    hold += "with in_use(folder, 'output_dir', shared=True), in_use(folder, 'output_dir', own):\n"
    hold += "    print('held', flush=True); time.sleep(600)"
    holders = []

    def refusal() -> str:
        with pytest.raises(UserError) as found, in_use(tmp_path, "output_dir"):
            pass
        return str(found.value)

    try:
        for number in (1, 2):
            command = [sys.executable, "-c", hold, str(tmp_path), str(number)]
            holders.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert holders[-1].stdout.readline() == "held\n"
        assert any(f"is in use by process {h.pid} on " in refusal() for h in holders)
        holders[1].kill()
        holders[1].wait()
        assert f"is in use by process {holders[0].pid} on " in refusal()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    with in_use(tmp_path, "output_dir"):
        pass


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    for shared in (False, True):
        with in_use(tmp_path, "folder", shared=shared):
            if shared:
                with in_use(tmp_path, "folder", shared=True):
                    pass
            owner = "another process" if shared else f"process {os.getpid()} "
            with pytest.raises(UserError, match=f"is in use by {owner}"), in_use(tmp_path, "folder"):
                pass
    with pytest.raises(ZeroDivisionError), in_use(tmp_path, "folder"):
        1 / 0  # noqa: B018
    with in_use(tmp_path, "folder"):
        pass


# Signals


def assert_stopped(command: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """It ended by the signal, with its status and one line about going on."""
    out, err = command.communicate(timeout=60)
    assert command.returncode == 128 + number, err
    assert "Traceback" not in out + err
    said = [line for line in re.split(r"[\r\n]", err) if "the same command goes on" in line]
    assert said == [f"stopped by {number.name}; the same command goes on from here"], err


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=lambda n: n.name
)
def test_a_signal_in_training_loses_no_step(
    number: signal.Signals, untrained: Path, finished: Path, config_file: Path
) -> None:
    with running("run", config_file, f"output_dir={untrained}") as command:
        wait_for(lambda: len(train_steps(untrained)) >= 3, command)
        command.send_signal(number)
        assert_stopped(command, number)
    reached = train_steps(untrained)
    assert 3 <= len(reached) < STEPS, "it was not stopped in the middle"
    assert reached == list(range(1, len(reached) + 1))
    kept = [int(p.parent.name.rpartition("-")[2]) for p in untrained.glob("checkpoints/*/trainer_state.json")]
    assert max(kept) == reached[-1]
    assert not (untrained / "student").exists()

    again = srd_fast("distill", config_file, f"output_dir={untrained}")
    assert again.status == 0, again
    assert train_steps(untrained) == list(range(1, STEPS + 1)), "a step was trained twice or not at all"
    assert student_bytes(untrained) == student_bytes(finished)


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_step(untrained: Path, config_file: Path) -> None:
    """One step takes minutes here."""
    long = ("distill.gradient_accumulation_steps=20000", "distill.epochs_per_stage=1")
    with running("run", config_file, f"output_dir={untrained}", *long) as command:
        wait_for((untrained / "metrics.jsonl").is_file, command)  # validation before the first step
        time.sleep(1.5)
        command.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert command.poll() is None, "the first signal did not wait for the step"
        began = time.monotonic()
        command.send_signal(signal.SIGTERM)
        assert_stopped(command, signal.SIGTERM)
    assert time.monotonic() - began < 10
    assert train_steps(untrained) == []
    assert not list(untrained.glob("checkpoints/checkpoint-*"))


@pytest.mark.slow
def test_a_signal_in_another_step_ends_it_at_once(config_file: Path, finished: Path, tmp_path: Path) -> None:
    """Reflection goes on from its finished parts to the same scores and plan."""
    settings = ("reflect.max_new_tokens=150", "reflect.batch_size=1")  # parts of 4 prompts
    whole, stopped = (f"output_dir={tmp_path / name}" for name in ("whole", "stopped"))
    for name in ("whole", "stopped"):
        shutil.copytree(finished, tmp_path / name)
    for verb in ("reflect", "curate"):
        assert srd_fast(verb, config_file, whole, *settings).status == 0
    parts = tmp_path / "stopped" / "reflections.parts"
    with running("run", config_file, stopped, *settings) as command:
        wait_for(lambda: parts.is_dir() and any(f.is_file() for f in parts.rglob("*")), command)
        command.send_signal(signal.SIGTERM)
        assert_stopped(command, signal.SIGTERM)
    assert parts.is_dir(), "it was not stopped in the middle"
    for verb in ("reflect", "curate"):
        assert srd_fast(verb, config_file, stopped, *settings).status == 0
    assert (tmp_path / "stopped" / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes()


def stopped(number: signal.Signals, times: int, deferred: bool) -> tuple[int | None, int]:
    """Exit status of what a block that is sent signals raises, and how many signals it went on after."""
    survived = 0
    try:
        with stoppable(), stopping_later() if deferred else nullcontext():
            for _ in range(times):
                os.kill(os.getpid(), number)
                survived += 1
    except Stopped as e:
        return e.status, survived
    return None, survived


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("times", "deferred", "survived"), [(1, False, 0), (1, True, 1), (2, True, 1)])
def test_only_the_first_signal_waits_and_only_in_training(
    number: signal.Signals, times: int, deferred: bool, survived: int
) -> None:
    before = signal.getsignal(number)
    assert stopped(number, times, deferred) == (128 + number, survived)
    assert signal.getsignal(number) == before
    assert stopped(number, 0, True) == (None, 0), "a signal of the block before was not forgotten"


def test_an_error_after_a_signal_is_the_error() -> None:
    def fails() -> None:
        with stoppable(), stopping_later():
            os.kill(os.getpid(), signal.SIGTERM)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fails()


def test_a_library_that_makes_an_error_of_its_own_of_the_signal() -> None:
    def fails() -> None:
        with stoppable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt:
                raise ValueError("could not determine the shape") from None

    with pytest.raises(Stopped, match="SIGTERM"):
        fails()


# Disks


def disk_size(folder: Path) -> int:
    """Bytes that the files take on a tmpfs."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(-(-p.stat().st_size // page) * page for p in folder.rglob("*") if p.is_file())


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of `size` bytes; skips the test where this process may not mount one."""
    folder.mkdir()
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("a small disk needs Linux and the command mount")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a small disk needs the right to mount a tmpfs (CAP_SYS_ADMIN): {made.stderr.strip()}")
    try:
        yield folder
    finally:
        # Data sets that are still open are mapped from it.
        subprocess.run(["umount", "-l", folder], check=True)


def no_space(result: Result, folder: Path) -> str:
    """The step that ended with one line on the full disk, the last of what the command says."""
    assert result.status == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith(("error", "Traceback"))]
    assert lines == result.err.splitlines()[-1:], result.err
    assert str(folder) in lines[0]
    if "GB are free" not in lines[0]:  # the cache looks before it writes
        assert re.search("no space left", lines[0], re.IGNORECASE), lines[0]
        assert "report.html" in lines[0] or lines[0].endswith("kept, and the same command goes on from there")
    return (re.findall(r"^\[\d/\d\] (\S+) \.\.\.$", result.out, re.MULTILINE) or ["none"])[-1]


@pytest.mark.parametrize(
    ("percent", "step"),
    [
        pytest.param(1, "prepare", marks=pytest.mark.long),
        pytest.param(5, "cache", marks=pytest.mark.long),
        pytest.param(10, "distill", marks=pytest.mark.long),
        pytest.param(30, "distill", marks=pytest.mark.long),
        pytest.param(60, "distill", marks=pytest.mark.slow),
        pytest.param(90, "distill", marks=pytest.mark.long),
    ],
)
def test_a_full_disk_is_one_line_and_goes_on_with_more_room(
    percent: int, step: str, finished: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others fill the disk: it had room enough when the run began."""
    monkeypatch.setattr("srd_fast.memory.room._check_disk", lambda run, student: None)
    with small_disk(tmp_path / "disk", disk_size(finished) * percent // 100) as folder:
        command = ("run", config_file, f"output_dir={folder}")
        result = srd_fast(*command)
        assert no_space(result, folder) == step
        done = result.steps("done in")
        mount("-o", f"remount,size={4 * disk_size(finished)}", folder)
        result = srd_fast(*command)
        assert result.status == 0, result
        assert result.steps("unchanged")[: len(done)] == done
        assert student_bytes(folder) == student_bytes(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "lost"),
    [
        ("report", ["report.html"]),
        pytest.param("evaluate", ["report.html", "summary.json", "evaluation.json"], marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_after_training_keeps_the_student(
    step: str, lost: list[str], finished: Path, config_file: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 2 * disk_size(finished)) as folder:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        for name in lost:
            (folder / name).unlink()
        page = os.sysconf("SC_PAGE_SIZE")
        mount("-o", f"remount,size={disk_size(folder) + page}", folder)
        command = ("run", config_file, f"output_dir={folder}")
        assert no_space(srd_fast(*command), folder) == step
        mount("-o", f"remount,size={disk_size(folder)}", folder)
        assert no_space(srd_fast(*command), folder) == "none"  # no room for the config
        mount("-o", f"remount,size={2 * disk_size(finished)}", folder)
        result = srd_fast(*command)
        assert result.status == 0, result
        assert "distill" in result.steps("unchanged, skipped")
        assert student_bytes(folder) == student_bytes(finished)


@pytest.mark.slow
def test_a_read_only_disk_is_one_line(finished: Path, config_file: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        shutil.copytree(finished, disk / "run")
        mount("-o", "remount,ro", disk)
        for name in ("run", "new"):
            result = srd_fast("run", config_file, f"output_dir={disk / name}")
            assert "Read-only file system" in result.error()
            assert str(disk / name) in result.err
            assert "Traceback" not in result.err


@pytest.mark.parametrize("size", [0, 1000])
def test_a_checkpoint_whose_last_file_was_cut_off_is_passed_over(
    size: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As a disk that fills while it is written leaves it."""

    def trainer() -> Watched:
        return make(tokenizer, args=config(output_dir=str(tmp_path), save_strategy="steps", save_steps=1))

    trainer().train()
    last, before = (tmp_path / f"checkpoint-{n}" / "trainer_state.json" for n in (4, 3))
    assert before.is_file()
    last.write_bytes(last.read_bytes()[:size])
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert len(again.rows) == 1


NO_SPACE = "No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, NO_SPACE),
        OSError(errno.ENOSPC, NO_SPACE, "/run/metrics.jsonl"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError(f"PytorchStreamWriter failed writing file data/1: {NO_SPACE}"),
        ValueError(f"Error while serializing: I/O error: {NO_SPACE} (os error 28)"),
        type("SafetensorError", (Exception,), {})(f"Error while serializing: I/O error: {NO_SPACE} (os error 28)"),
        OSError("IO error: os error 28"),
        OSError(f"Error writing bytes to file. Detail: [errno 28] {NO_SPACE}"),
    ],
    ids=lambda e: f"{type(e).__name__}: {e}"[:60],
)
def test_a_full_disk_is_known_whoever_says_so(error: Exception, tmp_path: Path) -> None:
    line = disk_trouble(error, tmp_path)
    assert line is not None
    assert line.startswith(f"no space left on the disk of {str(tmp_path)!r} (")
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        ValueError("nothing"),
        KeyError("device"),
        Exception(),
    ],
    ids=repr,
)
def test_other_errors_are_not_the_disks(error: Exception, tmp_path: Path) -> None:
    assert disk_trouble(error, tmp_path) is None


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system", "/run/x"), PermissionError(13, "no")])
def test_what_cannot_be_written_is_said(error: OSError, tmp_path: Path) -> None:
    assert disk_trouble(error, tmp_path) == f"{error}: the folder must be writable"


def test_what_may_not_be_read_is_not_called_the_folder(tmp_path: Path) -> None:
    for place, wanted in (("/weights/x", "it must be readable"), (f"{tmp_path}/x", "the folder must be writable")):
        error = PermissionError(errno.EACCES, "Permission denied", place)
        assert disk_trouble(error, tmp_path) == f"{error}: {wanted}"


# Training that goes wrong


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Warnings of the package; the command line keeps them from pytest."""
    monkeypatch.setattr(logging.getLogger("srd_fast"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="srd_fast")
    return caplog


BROKEN = 3  # steps that are done when it breaks


class _Breaks(TrainerCallback):
    """Breaks the student before a step (from 0): NaN in a weight, or infinity in a gradient."""

    def __init__(self, how: str, step: int = BROKEN) -> None:
        self.how, self.step, self.before = how, step, dict[str, Tensor]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.step:
            return
        named = dict(kwargs["model"].named_parameters())
        parameter = list(named.values())[3]
        if self.how == "weight":
            parameter.data.view(-1)[0] = torch.nan
        else:
            parameter.register_hook(lambda g: g * torch.inf)
        self.before = {n: p.detach().clone() for n, p in named.items()}


def ids_of(rows: list[list[int]]) -> list[str]:
    """Sample ids of what a step saw."""
    return [next(s["sample_id"] for s in SAMPLES if s["input_ids"] == row) for row in rows]


@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("how", ["weight", "gradient"])
def test_nan_stops_before_the_optimizer_moves(
    how: str, saves: bool, clipping: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1} if saves else {}
    fields |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": clipping}
    args = config(output_dir=str(tmp_path), optim="adamw_torch", weight_decay=0.1, **fields)
    breaks = _Breaks(how)
    trainer = make(tokenizer, plan=three_stages(), args=args, callbacks=[breaks])
    with pytest.raises(NotFiniteError) as found:
        trainer.train()
    message, curriculum = str(found.value), trainer.curriculum
    what = "the loss is nan" if how == "weight" else "the norm of the gradient is (inf|nan)"
    assert re.match(rf"step {BROKEN + 1}: {what} \(stage 2, temperature 1.5, learning rate ", message), message
    assert f"learning rate {curriculum.learning_rate(BROKEN):.3g})" in message
    assert len(trainer.rows[-1]) == 4
    assert f"The step's samples: {', '.join(ids_of(trainer.rows[-1]))}. " in message
    if saves:
        assert f"the last good checkpoint is {tmp_path / f'checkpoint-{BROKEN}'}." in message
        assert not (tmp_path / f"checkpoint-{BROKEN + 1}").exists()
    else:
        assert "there is no checkpoint yet" in message
    assert "\n" not in message
    assert trainer.state.global_step == BROKEN
    assert len(trainer.gradients) == BROKEN, "the optimizer was about to move"
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7.5), breaks.before[name].nan_to_num(7.5)), name


def test_many_samples_are_not_all_listed(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = tiny.tiny_samples(20)
    args = config(per_device_train_batch_size=20)
    trainer = make(tokenizer, samples=samples, args=args, callbacks=[_Breaks("weight", step=0)])
    with pytest.raises(NotFiniteError, match=r"step 1: the loss is nan .*, \.\.\.\. Look at them") as found:
        trainer.train()
    listed = re.findall(r"s\d\d", str(found.value))
    assert listed == [samples[i]["sample_id"] for i in trainer.curriculum.indices()][:16]


@pytest.mark.slow
def test_the_command_ends_with_the_sample_ids(untrained: Path, config_file: Path, tmp_path: Path) -> None:
    """A learning rate that no float32 survives; what was finished before is kept."""
    command = (config_file, f"output_dir={untrained}", "distill.learning_rate=1e30", "distill.optim=sgd")
    message = srd_fast("run", *command).error()
    assert re.search(r"error: step \d+: the (loss|norm of the gradient) is (nan|inf)", message)
    plan = json.loads((untrained / "plan.json").read_text())
    first_stage = {str(i) for i in plan["subsets"][0]}
    listed = message.partition("The step's samples: ")[2].partition(". Look")[0].split(", ")
    assert len(listed) == 2
    assert set(listed) <= first_stage
    again = srd_fast("distill", *command[:2], "distill.epochs_per_stage=0.1", "distill.save_strategy='no'")
    assert again.status == 0, again


def test_a_clean_run_raises_and_warns_nothing(
    tokenizer: PreTrainedTokenizerFast, warned: pytest.LogCaptureFixture
) -> None:
    args = config(epochs_per_stage=6, learning_rate=0.01)
    trainer = make(tokenizer, plan=three_stages(), args=args, teacher_tokenizer=tokenizer)
    trainer.train()
    assert trainer.state.global_step == trainer.curriculum.total_steps
    assert all(s.steps >= 8 for s in trainer.curriculum.stages), "too short to be judged"
    assert not warned.records


def test_checks_do_not_change_the_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    """The norm of the gradient is looked at, not scaled."""

    class Unwatched(Watched):
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            return grad_norm

    students = []
    for kind in (Watched, Unwatched):
        trainer = kind(
            model=tiny.tiny_model("llama"),
            teacher_model=tiny.tiny_model("llama_untied", seed=1, width=24),
            args=config(),
            train_dataset=list(SAMPLES),
            processing_class=tokenizer,
        )
        trainer.train()
        students.append(trainer.model.state_dict())
    assert all(torch.equal(students[0][n], students[1][n]) for n in students[0])


def trend(*stages: list[float]) -> None:
    watch = DivergenceTrend()
    for number, values in enumerate(stages, 1):
        for value in values:
            watch.add(number, value)
    watch.end()
    watch.end()


RISING = [1.0 + 0.1 * i for i in range(12)]
FALLING = RISING[::-1]


def test_a_rising_stage_is_warned_of_once(warned: pytest.LogCaptureFixture) -> None:
    trend(FALLING, RISING, FALLING)
    (record,) = warned.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        "stage 2: the divergence to the teacher rose from 1.1 to 2; check learning_rate"
    )


def test_the_last_stage_is_judged_too(warned: pytest.LogCaptureFixture) -> None:
    trend(RISING, RISING)
    assert [r.getMessage()[:8] for r in warned.records] == ["stage 1:", "stage 2:"]


@pytest.mark.parametrize(
    "stages",
    [
        [FALLING],
        [RISING[:7]],
        [[1.0] * 20],
        [[1.435 + 0.0001 * i for i in range(20)]],
        [],
        [RISING[:5], FALLING[:5]],
        [FALLING, [9.0] * 7],
    ],
)
def test_falling_flat_and_short_stages_are_not(stages: list[list[float]], warned: pytest.LogCaptureFixture) -> None:
    trend(*stages)
    assert not warned.records


def test_training_away_from_the_teacher_is_warned_of(
    tokenizer: PreTrainedTokenizerFast, warned: pytest.LogCaptureFixture
) -> None:
    args = config(epochs_per_stage=6, optim="adamw_torch", learning_rate=3.0, max_grad_norm=1.0, sft_weight=0.0)
    trainer = make(tokenizer, plan=three_stages(), args=args)
    trainer.train()
    messages = [r.getMessage() for r in warned.records if "the divergence to the teacher rose" in r.getMessage()]
    first = [log["divergence"] for log in trainer.logs if log["stage"] == 1]
    quarter = len(first) // 4
    rise = sum(first[:quarter]) / quarter, sum(first[-quarter:]) / quarter
    assert messages
    assert messages[0].startswith(f"stage 1: the divergence to the teacher rose from {rise[0]:.4g} to {rise[1]:.4g};")


# Out of memory

NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
)


@pytest.fixture(autouse=True)
def whole_budgets() -> Iterator[None]:
    """No test begins in what another has halved."""
    yield
    free_workspace()


class Failing:
    """`run_packed` that raises on the first calls; keeps the budgets that it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
        self.run, self.errors, self.budgets = chunked.run_packed, list(errors), list[int]()
        monkeypatch.setattr(chunked, "run_packed", self)

    def __call__(self, hidden_ND: Tensor, head: Any, rows: Any, *rest: Any, **options: Any) -> Any:
        self.budgets.append(budget_of(hidden_ND.device, rows.memory_budget))
        if self.errors:
            raise self.errors.pop(0)
        return self.run(hidden_ND, head, rows, *rest, **options)


@pytest.mark.parametrize("given", [None, 4096])
@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu"])
def test_a_chunk_without_memory_is_tried_in_half_of_it(
    error: Exception, given: int | None, monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture
) -> None:
    p = problem()
    whole = p.run(memory_budget=given)
    expected = gradients(p, whole.loss)
    failing = Failing(monkeypatch, error)
    halved = p.run(memory_budget=given)
    half = (given or 512 << 20) // 2
    assert failing.budgets == [2 * half, half]
    assert_same(halved.loss, whole.loss, 1e-12)
    for name, gradient in gradients(p, halved.loss).items():
        assert_same(gradient, expected[name], 1e-12, name)
    (record,) = warned.records
    assert f"out of memory in the loss: it goes on with memory_budget={half};" in record.getMessage()
    # Once is enough: what follows begins in the half.
    p.run(memory_budget=given)
    assert len(failing.budgets) == 3
    assert len(warned.records) == 1
    assert budget_of(torch.device("cpu"), given) == half
    free_workspace()
    assert budget_of(torch.device("cpu"), given) == 2 * half


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu"])
def test_in_the_backward_pass_too(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """One loss for each row: the chunks run once more in `backward`."""
    p = problem()
    weights_N = torch.rand(3, 7, dtype=torch.float64)
    kept = p.labels != tiny.IGNORE

    def loss() -> Tensor:
        rows = p.run(reduction="none").loss
        return (rows * (weights_N if rows.shape == weights_N.shape else weights_N[kept])).sum()

    expected, total = gradients(p, loss()), loss()
    failing = Failing(monkeypatch, error)
    found = gradients(p, total)
    assert failing.budgets == [512 << 20, 256 << 20]
    for name, gradient in found.items():
        assert_same(gradient, expected[name], 1e-12, name)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["cuda", "cpu"])
def test_twice_without_memory_is_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch, error, error)
    with pytest.raises(type(error), match=re.escape(str(error)[:30])):
        problem().run()
    assert len(failing.budgets) == 2


def test_another_error_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, warned: pytest.LogCaptureFixture) -> None:
    failing = Failing(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        problem().run()
    assert len(failing.budgets) == 1
    assert not warned.records


LIMITED = """
    import logging, resource, sys
    import torch
    from srd_fast import distillation_loss
    from srd_fast.losses import free_workspace
    torch.set_num_threads(1)
    N, V, D = 2000, 49152, 8
    g = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=g)
    hidden, weight = draw(N, D).requires_grad_(), draw(V, D).requires_grad_()
    teacher, teacher_weight, labels = draw(N, D), draw(V, D), torch.randint(V, (N,), generator=g)

    def run(n, budget):
        loss = distillation_loss(
            hidden[:n], weight, teacher[:n], teacher_weight, labels[:n], backend="eager", memory_budget=budget
        ).loss
        result = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
        free_workspace()
        return result

    small = run(N, 64 << 20)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (310 << 20), hard))
    limited = run(N, None)
    for a, b in zip(small, limited):
        print("difference", float((a - b).abs().max() / a.abs().max()))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as Linux has it")
def test_in_a_real_shortage_of_memory_the_loss_comes_out() -> None:
    """The address space is limited so that buffers of the default 512 MiB do not fit and those of half of it do."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED)],
        # Large tensors take their own size and no more, as each heap takes 64 MiB of addresses and may have holes.
        env={**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warnings = re.findall(r"WARNING out of memory in the loss: it goes on with memory_budget=(\d+)", done.stdout)
    assert warnings == [str(256 << 20)], done.stdout
    differences = [float(x) for x in re.findall(r"difference (\S+)", done.stdout)]
    assert len(differences) == 3
    assert max(differences) < 1e-5


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([""] * 9 + ["a"], "9 of 10 of the student's answers are empty. They rank nothing; check"),
        (["yes"] * 10, "10 of 10 of the student's answers are the same: 'yes'. They rank nothing"),
        ([""] * 8 + ["a", "b"], None),
        ([""] * 7, None),
        ([str(n) for n in range(20)], None),
    ],
)
def test_answers_that_are_all_alike_are_a_warning(
    answers: list[str], said: str | None, warned: pytest.LogCaptureFixture
) -> None:
    warn_of_answers_alike(answers)
    assert [said in r.getMessage() for r in warned.records] == ([True] if said else [])
