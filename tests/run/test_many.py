"""One command in several processes: what it makes is what one process makes, whoever fails, is stopped or is killed.

This file is also the program of two such processes (gloo, on the CPU): `python test_many.py FOLDER` with RANK,
WORLD_SIZE and MASTER_ADDR set, as torchrun sets them. One pair of processes carries out all commands of `COMMANDS`.
"""

import gc
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from ranks import Ranks, free_ports
from safetensors.torch import load_file
from test_cli import Result, srd_fast

from srd_fast.errors import UserError
from srd_fast.files import content_digest, in_use
from srd_fast.run.config import RunConfig
from srd_fast.run.group import Group
from srd_fast.run.pipeline import STEP_NAMES, execute
from srd_fast.run.steps import check_group
from srd_fast.run.steps.settings import share_of_batch

ROOT = Path(__file__).resolve().parents[2]
SAME = ("data", "start", "reflections.parquet", "plan.json", "teacher_cache")
STEPS, SAVE_STEPS = 11, 3
SIGNALS = ["rouge_l", "cross_entropy", "gap"]


def config(teacher: Path) -> dict[str, Any]:
    """Of all runs here: 4 and 7 steps of 4 samples, two at a time."""
    return {
        "teacher": str(teacher),
        "max_rows": 24,
        "validation": 6,
        "dtype": "float32",
        "max_prompt_length": 400,
        "max_response_length": 64,
        "init_student": {"layers": 2, "warmup_steps": 3, "warmup_batch_size": 4},
        "reflect": {"engine": "transformers", "max_new_tokens": 6, "batch_size": 2, "signals": SIGNALS},
        "evaluate": {"max_new_tokens": 6, "batch_size": 2, "seeds": [1, 2]},
        "curate": {"reflect_again": True, "stages": 2},
        "distill": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "epochs_per_stage": 1.5,
            "save_steps": SAVE_STEPS,
            "eval_steps": 6,
            "learning_rate": 3e-4,
            "position_selection": "topk_student_entropy",
            "position_ratio": 0.5,
        },
    }


# The program of the two processes


def at_step(number: int, do: Callable[[], None]) -> Any:
    """In the block, something happens in the first micro-batch of an optimizer step (from 1)."""
    from srd_fast import SRDTrainer

    whole = SRDTrainer.training_step

    def training_step(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == number - 1:
            do()
        return whole(self, *arguments)

    return mock.patch.object(SRDTrainer, "training_step", training_step)


def no_disk(*arguments: Any, **options: Any) -> None:
    raise UserError("the disk of this machine is full")


def broken(*arguments: Any, **options: Any) -> None:
    raise LookupError("a fault of the library")


def held(folder: Path, stack: ExitStack) -> None:
    stack.enter_context(in_use(folder, "output_dir"))


def reflecting(do: Callable[..., None]) -> Callable[[Path, ExitStack], None]:
    return lambda folder, stack: stack.enter_context(mock.patch("srd_fast.run.steps.selection.reflect", do))


def signalled(number: int, step: int) -> Callable[[Path, ExitStack], None]:
    return lambda folder, stack: stack.enter_context(at_step(step, lambda: os.kill(os.getpid(), number)))


# Name -> words of the command, in which process something is different, and what.
Commands = dict[str, tuple[list[str], int, Callable[[Path, ExitStack], None] | None]]
COMMANDS: Commands = {
    "whole": (["run"], 0, None),
    "again": (["run"], 0, None),
    "in use": (["run"], 0, held),
    "memory": (["memory"], 0, None),
    "a mistake of one": (["reflect", "--force"], 1, reflecting(no_disk)),
    "a fault in one": (["reflect", "--force"], 1, reflecting(broken)),
    "stopped": (["distill", "--force"], 1, signalled(signal.SIGTERM, 5)),
    "killed": (["distill"], 1, signalled(signal.SIGKILL, 8)),
}


def worker(folder: Path) -> None:
    """All commands in this process; after each, its result in FOLDER/COMMAND-RANK.pickle."""
    torch.set_num_threads(1)
    gc.freeze()
    rank, run = int(os.environ["RANK"]), folder / "run"
    for port, (name, (words, where, different)) in zip(os.environ["PORTS"].split(), COMMANDS.items()):
        os.environ["MASTER_PORT"] = port
        with ExitStack() as stack:
            if rank == where and different is not None:
                different(run, stack)
            result = srd_fast(words[0], folder / "config.yaml", f"output_dir={run}", *words[1:])
        if name == "again" and rank == 0:
            shutil.copytree(run, folder / "kept")
        (folder / f"{name}-{rank}.pickle").write_bytes(pickle.dumps(result))


# What one process makes, and what two made


class Pair:
    """What the two processes left, and the run of one process."""

    def __init__(self, folder: Path, alone: Path, statuses: list[int]) -> None:
        self.folder, self.alone, self.statuses = folder, alone, statuses

    def results(self, name: str) -> list[Result]:
        """How a command ended in both."""
        return [pickle.loads((self.folder / f"{name}-{rank}.pickle").read_bytes()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def pair(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("many")
    content = config(tiny_teacher_folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    with Ranks(__file__, folder, 2, PORTS=" ".join(free_ports(len(COMMANDS)))) as ranks:
        alone = execute(RunConfig(**{**content, "output_dir": str(folder / "alone")}), say=lambda text: None)
        statuses = ranks.statuses()
    assert (folder / "stopped-0.pickle").is_file(), ranks.said()
    return Pair(folder, alone, statuses)


def apart(one: Path, other: Path) -> float:
    """The largest difference of two runs' students."""
    ours, theirs = (load_file(f / "student" / "model.safetensors") for f in (one, other))
    assert set(ours) == set(theirs)
    return max(float((ours[n] - theirs[n]).abs().max()) for n in theirs)


def trained(folder: Path) -> dict[int, dict[str, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if row["kind"] == "train"}


@pytest.mark.slow
def test_two_processes_make_what_one_makes(pair: Pair) -> None:
    kept = pair.folder / "kept"
    for name in SAME:
        assert content_digest(kept / name) == content_digest(pair.alone / name), name
    again = "checkpoints/plan-stage-2.json"
    assert (kept / again).read_text() == (pair.alone / again).read_text()
    assert apart(kept, pair.alone) < 1e-5 < apart_from_start(kept) / 100


def apart_from_start(folder: Path) -> float:
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("student", "start"))
    return max(float((ours[n] - theirs[n]).abs().max()) for n in theirs)


@pytest.mark.slow
def test_they_log_and_evaluate_the_same(pair: Pair) -> None:
    kept = pair.folder / "kept"
    ours, theirs = trained(kept), trained(pair.alone)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for step, row in theirs.items():
        for name in ("loss", "divergence", "grad_norm", "learning_rate", "stage"):
            assert ours[step][name] == pytest.approx(row[name], rel=1e-3), (step, name)
    found, wanted = (json.loads((f / "summary.json").read_text()) for f in (kept, pair.alone))
    for model in ("teacher", "start"):
        assert found["evaluation"][model] == wanted["evaluation"][model]
    assert found["evaluation"]["student"]["kl"] == pytest.approx(wanted["evaluation"]["student"]["kl"], rel=1e-4)
    assert found["training"]["sample_passes"] == wanted["training"]["sample_passes"] == STEPS * 4
    chosen = [json.loads((f / "selection.json").read_text()) for f in (kept, pair.alone)]
    assert sum(chosen[0]["histogram"]["candidates"]) == sum(chosen[1]["histogram"]["candidates"]) > 0
    assert chosen[0]["samples"][0]["chosen"] == chosen[1]["samples"][0]["chosen"]


@pytest.mark.slow
def test_the_first_alone_speaks_and_a_second_command_does_nothing(pair: Pair) -> None:
    first, second = pair.results("whole")
    assert (first.status, second.status) == (0, 0), first
    assert first.steps("done in") == list(STEP_NAMES)
    assert "generate" in first.err
    assert (second.out, second.err) == ("", "")
    first, second = pair.results("again")
    assert (first.status, second.status) == (0, 0)
    assert first.steps("unchanged") == list(STEP_NAMES)


@pytest.mark.slow
def test_a_folder_in_use_is_refused_once(pair: Pair) -> None:
    first, second = pair.results("in use")
    assert f"output_dir {str(pair.folder / 'run')!r} is in use by process " in first.error()
    assert (second.status, second.err) == (2, "")
    first, second = pair.results("memory")
    assert (
        first.error() == "error: srd-fast memory is for one process: start it without torchrun or accelerate launch\n"
    )
    assert (second.status, second.err) == (2, "")


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_and_is_said_once(pair: Pair) -> None:
    first, second = pair.results("a mistake of one")
    assert (first.status, second.status) == (2, 2)
    assert [x for x in first.err.splitlines() if x.startswith("error")] == [
        "error: process 1 of 2: the disk of this machine is full"
    ]
    assert "error" not in second.err
    first, second = pair.results("a fault in one")
    assert (first.status, second.status) == (1, 1)
    assert "error: process 1 of 2: LookupError: a fault of the library" in first.err
    assert "Traceback" in second.err
    assert "Traceback" not in first.err


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_step(pair: Pair) -> None:
    first, second = pair.results("stopped")
    assert (first.status, second.status) == (128 + signal.SIGTERM,) * 2
    assert first.err.splitlines()[-1] == "stopped by SIGTERM; the same command goes on from here"
    assert "stopped" not in second.err


@pytest.mark.slow
def test_killed_it_ends_the_other_and_one_process_goes_on(pair: Pair) -> None:
    """From the checkpoint of the signal's step, then past the kill, and with another number of processes to the end."""
    assert pair.statuses == [0, -signal.SIGKILL]
    first = pickle.loads((pair.folder / "killed-0.pickle").read_bytes())
    assert first.status == 1
    assert (
        "error: process 1 of 2 is gone (killed?); what is finished is kept, and the same command goes on" in first.err
    )
    run = pair.folder / "run"
    steps = sorted(int(p.name.rpartition("-")[2]) for p in (run / "checkpoints").glob("checkpoint-*"))
    assert steps[-1] == 6, "it did not go on from step 5, or not to step 7"
    assert sorted(trained(run)) == list(range(1, 8))
    execute(RunConfig(**{**yaml.safe_load((pair.folder / "config.yaml").read_text()), "output_dir": str(run)}),
            say=lambda text: None)  # fmt: skip
    assert apart(run, pair.alone) < 1e-5


@pytest.mark.parametrize(
    ("size", "steps", "processes", "wanted"),
    [(16, 1, 8, (2, 1)), (2, 8, 4, (2, 2)), (2, 6, 4, (1, 3)), (6, 1, 3, (2, 1)), (4, 2, 8, (1, 1)), (3, 4, 4, (3, 1))],
)
def test_the_samples_of_a_step_are_divided(size: int, steps: int, processes: int, wanted: tuple[int, int]) -> None:
    found = share_of_batch(size, steps, processes)
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == wanted
    assert wanted[0] * wanted[1] * processes == size * steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distill": {"per_device_train_batch_size": 10}},
            r"distill\.per_device_train_batch_size is 10 .* cannot be divided among 4 processes; set it to 8 or 12, or",
        ),
        ({"distill": {"per_device_train_batch_size": 3}}, r"set it to 4, or start another number of processes"),
        (
            {"device": "cuda:2"},
            r"device is 'cuda:2', and each of 4 processes needs one .* or set it to 'cuda'",
        ),
        (
            {"teacher_device_map": "auto"},
            r"teacher_device_map is 'auto', and each of 4 processes would .*: set it to null, or start one process",
        ),
    ],
)
def test_what_processes_cannot_do_together_is_refused(changes: dict[str, Any], message: str) -> None:
    check_group(RunConfig(**changes), Group())
    with pytest.raises(UserError, match=message):
        check_group(RunConfig(**changes), Group(world=4))


def test_shards_are_for_machines_that_do_not_know_of_each_other() -> None:
    with pytest.raises(UserError, match=r"--shard 1/2 is for machines that work separately, .* leave it out"):
        check_group(RunConfig(), Group(world=2), "1/2")


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
