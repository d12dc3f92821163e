"""The real command, killed with SIGKILL in every step of a whole run, ends with the bytes of an undisturbed one.

SRD_FAST_KILLS says how often (default 12, a kill in each step and some more while training).
"""

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from srd_fast.files import content_digest
from srd_fast.run.pipeline import STEP_NAMES

KILLS = int(os.environ.get("SRD_FAST_KILLS", "12"))
# A training run is the longest, and where most is under way.
ORDER = (*STEP_NAMES[:6], "distill", "distill", "distill", "distill", *STEP_NAMES[6:])
OUTPUTS = ("data", "start", "reflections.parquet", "plan.json", "teacher_cache", "student")


@pytest.fixture(scope="module")
def config_file(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {
        "teacher": str(tiny_teacher_folder),
        "max_rows": 24,
        "validation": 6,
        "dtype": "float32",
        "max_prompt_length": 400,
        "max_response_length": 64,
        "init_student": {"layers": 2, "warmup_steps": 4, "warmup_batch_size": 4},
        "reflect": {"engine": "transformers", "max_new_tokens": 8, "batch_size": 4},
        "evaluate": {"max_new_tokens": 8},
        "distill": {
            "per_device_train_batch_size": 2,
            "epochs_per_stage": 4,
            "save_steps": 5,
            "eval_steps": 30,
            "learning_rate": 1e-3,
        },
    }
    path = tmp_path_factory.mktemp("kills") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Command:
    """`srd-fast run` as a process in a group of its own, its lines read as they come."""

    def __init__(self, config: Path, folder: Path, log: Path) -> None:
        command = [sys.executable, "-u", "-m", "srd_fast.cli", "run", str(config), f"output_dir={folder}"]
        self.errors = log.open("w")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.errors, text=True, start_new_session=True
        )

    def reaches(self, step: str) -> bool:
        """Wait until the step begins; False where the run ends before, or skips it."""
        assert self.process.stdout is not None
        return any(f"] {step} ..." in line for line in self.process.stdout)

    def runs_for(self, seconds: float) -> bool:
        """Let it run; whether it runs still."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            assert self.process.stdout is not None
            select.select([self.process.stdout], [], [], 0.01)
            time.sleep(0.001)
        return self.process.poll() is None

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        self.errors.close()


def finish(config: Path, folder: Path, log: Path) -> None:
    command = [sys.executable, "-m", "srd_fast.cli", "run", str(config), f"output_dir={folder}"]
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False, timeout=600)
    assert done.returncode == 0, log.read_text()[-2000:]


def outcome(folder: Path) -> dict[str, object]:
    """What must not depend on interruptions."""
    found: dict[str, object] = {name: content_digest(folder / name) for name in OUTPUTS}
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    # A run that goes on from a checkpoint logs the steps behind it once more: the last line of a step counts.
    found["losses"] = {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}
    found["evaluations"] = {r["step"]: r["kl"] for r in rows if r["kind"] == "eval"}
    found["summary"] = json.loads((folder / "summary.json").read_text())["evaluation"]
    found["left over"] = sorted(p.name for p in folder.rglob("*") if "partial" in p.name or "parts" in p.name)
    return found


@pytest.mark.slow
def test_a_run_killed_in_every_step_ends_as_an_undisturbed_one(config_file: Path, tmp_path: Path) -> None:
    quiet = tmp_path / "quiet"
    finish(config_file, quiet, tmp_path / "quiet.log")
    wanted, ledger = outcome(quiet), json.loads((quiet / "steps.json").read_text())
    draw, kills, folder = random.Random(0), Counter[str](), tmp_path / "run"
    attempt = 0
    while kills.total() < KILLS:
        for step in ORDER:
            if kills.total() == KILLS:
                break
            attempt += 1
            run = Command(config_file, folder, tmp_path / f"{attempt}.log")
            lasts = ledger[step]["seconds"] / (4 if step == "distill" else 1)
            if run.reaches(step) and run.runs_for(draw.uniform(0, 1.1 * lasts)):
                kills[step] += 1
            run.kill()
        else:
            finish(config_file, folder, tmp_path / "end.log")
            assert outcome(folder) == wanted
            shutil.rmtree(folder)
    if folder.exists():
        finish(config_file, folder, tmp_path / "end.log")
        assert outcome(folder) == wanted
    print(f"{kills.total()} kills: " + ", ".join(f"{step} {n}" for step, n in kills.items()))
    assert len(ORDER) > KILLS or len(kills) >= len(STEP_NAMES) - 2, kills
