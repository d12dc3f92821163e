"""A process for one task, ended with all that it started when its time is up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Process = subprocess.Popen[bytes]


class Failed(Exception):  # noqa: N818
    """A process ended without an answer; what it said last."""


class OutOfTimeError(Exception):
    """The time of the whole session was up."""


def run_limited(command: list[str], seconds: float, log: Path | None = None) -> int | None:
    """Exit status of a command in the checkout's root; None where it took longer and was ended.

    log: a file for what it prints. It gets a group of its own, and its group is ended whatever happens here.
    """
    process = start(command, log)
    try:
        return process.wait(None if seconds == float("inf") else max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end([process], 10)


def start(command: list[str], log: Path | None = None) -> Process:
    """Begin a command in the checkout's root, in a group of its own; what it prints goes to the log, if given."""
    out: Any = log.open("wb") if log else None
    try:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out and subprocess.STDOUT, start_new_session=True)
    finally:
        if out:
            out.close()


def end(processes: Iterable[Process], grace: float) -> None:
    """End the groups of processes that still run; they have so many seconds to do it themselves."""
    running = [p for p in processes if p.poll() is None]
    for process in running:
        # It may have processes in groups of their own, which it ends on SIGTERM.
        os.killpg(process.pid, signal.SIGTERM)
    last = time.monotonic() + grace
    for process in running:
        try:
            process.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_task(task: Mapping[str, Any], folder: Path, most: float, deadline: float) -> dict[str, Any]:
    """The answer of `benchmarks.train_cell` to a task.

    Raises:
        Failed where it had an error or took more than `most` seconds.
        OutOfTimeError where it was not done at the deadline (of `time.monotonic`).
    """
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    left = deadline - time.monotonic()
    command = [sys.executable, "-m", "benchmarks.train_cell", json.dumps(task), str(answer)]
    status = run_limited(command, min(most, left), log)
    if status is None and left <= most:
        raise OutOfTimeError("the time is up")
    if status is None:
        raise Failed(f"it took longer than {most:g} s\n\n{_end_of(log)}")
    if status or not answer.exists():
        raise Failed(f"exit status {status}\n\n{_end_of(log)}")
    return json.loads(answer.read_text(encoding="utf-8"))


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-60:])
