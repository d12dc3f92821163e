"""Execution feedback: what share of its tests the Python code in an answer passes, each test in a sandbox of its own.

It needs Linux on x86_64 or aarch64 with seccomp and Landlock (5.13 or newer). Anything else is refused, never run
unprotected. `sandbox.py` says what the code cannot do. It can use the processor for `seconds`, `memory_mb` of memory
and the disk below its folder; see whether a path exists; and attack the kernel through the calls that are left. Code
that searches its own interpreter for the proof of success finds it: the score is for models that answer, not for models
that cheat.
"""

import functools
import marshal
import math
import os
import re
import secrets
import select
import site
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ..errors import UserError
from . import sandbox

_FENCED = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
EXECUTION = "execution"
_PYTHON = {"", "python", "python3", "py"}
_PROBE_SECONDS = 60.0


def extract_code(text: str) -> str:
    """The first block fenced by ```python or ``` (to the end of an answer that was cut off), else the whole text.

    Examples:
        >>> extract_code("Like this:\\n```python\\nx = 1\\n```\\nDone.")
        'x = 1\\n'
    """
    blocks = (body for info, body in _FENCED.findall(text) if info.strip().lower() in _PYTHON)
    return next((textwrap.dedent(body) for body in blocks), text)


def check_tests(asked: Iterable[str], tests: Iterable[Sequence[str] | None], what: str) -> None:
    """Refuse to execute answers to rows of which none has tests, before anything is answered.

    Args:
        asked: names of signals or metrics.
        tests: of each row.
        what: the rows that are looked at, for the message.

    Raises:
        UserError: with the way out.
    """
    if EXECUTION in asked and not any(tests):
        raise UserError(
            f"{EXECUTION!r} runs the tests of a row, and none of {what} has any in a column tests; leave it out, or "
            "give the rows tests"
        )


def run_tests(code: str, tests: Sequence[str], *, seconds: float = 5.0, memory_mb: int = 512) -> list[bool]:
    """Run `code` and then one test, in a new interpreter for each test. A test passes if it runs to its end.

    The proof of passing is a random token that the process sends after the last line. Exit codes, output and exceptions
    prove nothing. The code is not `__main__`, and the test sees its names.

    Args:
        code: Python source.
        tests: Python source each, such as assert statements.
        seconds: wall-clock time for each test, with about 0.03 to start the interpreter.
        memory_mb: address space of each test, in MiB.

    Returns:
        Whether each test passed.

    Raises:
        UserError: the system lacks a protection, which is named, or the limits leave no room to run.
    """
    _check_limits(seconds, memory_mb)
    return [_passes(code, test, seconds, memory_mb) for test in tests]


def pass_rates(
    answers: Sequence[str],
    tests: Sequence[Sequence[str] | None],
    *,
    seconds: float = 5.0,
    memory_mb: int = 512,
    workers: int | None = None,
) -> list[float]:
    """Share of its tests that the code in each answer passes, 0 to 1; NaN for a sample without tests.

    Args:
        answers: of the model; `extract_code` finds the code.
        tests: the sources of each sample's tests, or None.
        seconds: wall-clock time for each test.
        memory_mb: address space of each test, in MiB. All workers together take up to workers * memory_mb.
        workers: samples at a time. Default: one for each core, because the clock of a waiting test runs on.

    Returns:
        The share of each sample.

    Raises:
        UserError: answers and tests differ in number, the system lacks a protection, or the limits leave no room to
            run.
    """
    if len(answers) != len(tests):
        raise UserError(f"{len(answers)} answers but tests of {len(tests)} samples; give tests (or None) for each")
    workers = workers if workers is not None else len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    if any(tests):
        _check_limits(seconds, memory_mb)

    def rate(answer: str, of_sample: Sequence[str] | None) -> float:
        if not of_sample:
            return math.nan
        return sum(run_tests(extract_code(answer), of_sample, seconds=seconds, memory_mb=memory_mb)) / len(of_sample)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(rate, answers, tests))


def _passes(code: str, test: str, seconds: float, memory_mb: int) -> bool:
    token = secrets.token_bytes(16)
    return _said(code, test, token, seconds, memory_mb) == token


def _said(code: str, test: str, token: bytes, seconds: float, memory_mb: int) -> bytes:
    """What a sandbox says first: the token, why it could not be set up, something that the code forged, or nothing."""
    content = {"code": code, "test": test, "token": token, "seconds": seconds, "memory_mb": memory_mb}
    settings = marshal.dumps({**_constant_settings(), **content, "parent": os.getpid()})
    command = [sys.executable, "-I", "-S", "-B", sandbox.__file__]
    with (
        tempfile.TemporaryDirectory(prefix="srd-fast-answer-") as folder,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1"},  # numpy's threads would take the address space
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(settings)
            # Read once: a sandbox that goes on talking is not listened to.
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN)
            return os.read(process.stdout.fileno(), 4096) if poll.poll(math.ceil(seconds * 1000)) else b""
        finally:
            process.kill()  # it cannot have children


@functools.cache
def _constant_settings() -> dict[str, bytes | list[str]]:
    return {
        "filter": sandbox.filter_program(os.uname().machine),
        "readable": _readable_paths(),
        "packages": site.getsitepackages(),
    }


def _readable_paths() -> list[str]:
    """What a process in a sandbox may read: Python's files, its packages', the system's libraries."""
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path("stdlib")]
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom"]
    return [path for path in dict.fromkeys([*python, *system]) if os.path.exists(path)]


def _check_limits(seconds: float, memory_mb: int) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"seconds is {seconds}; it must be a positive number")
    _check_sandbox(memory_mb)


@functools.cache
def _check_sandbox(memory_mb: int) -> None:
    """Refuse to work where a protection is missing: try it on an empty program, once in a process."""
    way_out = (
        "run it on Linux 5.13 or newer with Landlock (lsm=landlock,...) and seccomp, or without execution feedback"
    )
    if sys.platform != "linux" or os.uname().machine not in sandbox.MACHINES:
        where = sys.platform if sys.platform != "linux" else os.uname().machine
        raise UserError(f"answers cannot be executed safely: there is no sandbox for {where}; {way_out}")
    token = secrets.token_bytes(16)
    said = _said("", "", token, _PROBE_SECONDS, memory_mb)
    if not said:
        raise UserError(f"an empty program does not run within memory_mb={memory_mb}; give it more")
    if said != token:
        raise UserError(f"answers cannot be executed safely: {said.decode()}; {way_out}")
