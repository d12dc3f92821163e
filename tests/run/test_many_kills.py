"""The real command under torchrun and accelerate launch, whichever of its processes is killed, ends as one does.

SRD_FAST_KILLS says how often (default 10), SRD_FAST_KILLS_SEED which and when. Minutes; CONTRIBUTING has the command.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from test_many import ROOT, SAME, config

from srd_fast.files import content_digest

KILLS = int(os.environ.get("SRD_FAST_KILLS", "10"))
SEED = int(os.environ.get("SRD_FAST_KILLS_SEED", "0"))
PROCESSES = 4
# Seconds in which all are gone after one is killed. torchrun itself waits half a minute for one that does not end.
PATIENCE = 60


class Group:
    """The command in four processes, which torchrun starts."""

    def __init__(self, config_file: Path, folder: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES), "--standalone"]
        command += ["-m", "srd_fast", "run", str(config_file), f"output_dir={folder}"]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
        self.began = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def joined(self) -> bool:
        """Wait until the processes are there and at work; whether they came so far."""
        while self.process.poll() is None and "] prepare" not in self.log.read_text():
            time.sleep(0.05)
        return self.process.poll() is None

    def kill(self, rank: int) -> None:
        """Kill one process. All others end by themselves, and one of them says why."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if child.environ().get("RANK") == str(rank) and "srd_fast" in child.cmdline():
                    child.send_signal(signal.SIGKILL)
                    break
            except psutil.Error:
                continue
        else:
            return
        self.process.wait(PATIENCE)
        said = self.log.read_text()
        assert self.process.returncode != 0
        assert f"process {rank} of {PROCESSES} is gone (killed?)" in said or "is gone" not in said, said[-2000:]

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def distance(one: Path, other: Path) -> float:
    """Of two students: the norm of the difference of all weights, in norms of the weights.

    A single weight may be further apart: Adam turns a gradient that is nothing but rounding into a step.
    """
    ours, theirs = (load_file(f / "student" / "model.safetensors") for f in (one, other))
    assert set(ours) == set(theirs)
    squares = [((ours[n].double() - w).square().sum(), w.double().square().sum()) for n, w in theirs.items()]
    return float((sum(d for d, _ in squares) / sum(w for _, w in squares)) ** 0.5)


def same(folder: Path, alone: Path) -> float:
    for name in SAME:
        assert content_digest(folder / name) == content_digest(alone / name), name
    return distance(folder, alone)


def alone_and_config(folder: Path, teacher: Path | None) -> tuple[Path, Path, float]:
    """The run of one process with its config and seconds: of a tiny teacher, or the quickstart's."""
    config_file, alone = folder / "config.yaml", folder / "alone"
    quickstart = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    # dtype: the same numbers in a batch and in its parts need float32.
    whole = {**(quickstart if teacher is None else config(teacher)), "dtype": "float32"}
    config_file.write_text(yaml.safe_dump(whole))
    one = [sys.executable, "-m", "srd_fast", "run", str(config_file), f"output_dir={alone}"]
    began = time.monotonic()
    subprocess.run(one, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return alone, config_file, time.monotonic() - began


@pytest.mark.long
def test_accelerate_launch_ends_as_one_process_does(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    alone, config_file, _ = alone_and_config(tmp_path, tiny_teacher_folder)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    command += ["srd_fast", "run", str(config_file), f"output_dir={tmp_path / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert same(tmp_path / "run", alone) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("pair", ["tiny", "quickstart"])
def test_killed_at_random_it_ends_as_one_process_does(pair: str, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    alone, config_file, lasts = alone_and_config(tmp_path, tiny_teacher_folder if pair == "tiny" else None)
    draw, kills, attempt = random.Random(SEED), 0, 0
    while kills < KILLS or not (folder / "report.html").exists():
        group = Group(config_file, folder, tmp_path / f"{attempt}.log")
        attempt += 1
        try:
            if kills < KILLS and group.joined():
                wait = draw.uniform(0, lasts / 4)
                rank = draw.randrange(PROCESSES)
                while group.process.poll() is None and wait > 0:
                    time.sleep(0.05)
                    wait -= 0.05
                if group.process.poll() is None:
                    group.kill(rank)
                    kills += 1
                    continue
            group.process.wait(1800)
            assert group.process.returncode == 0, group.log.read_text()[-3000:]
        finally:
            group.end()
        difference = same(folder, alone)
        print(f"{pair}: {kills} kills so far, the student {difference:.1e} from that of one process")
        assert difference < 1e-5
        if kills < KILLS:
            shutil.rmtree(folder)
    difference = same(folder, alone)
    assert difference < 1e-5
