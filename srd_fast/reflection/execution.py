"""Execution feedback: the share of its tests that the Python code in an answer passes, each test in its own sandbox.

It needs Linux on x86_64 or aarch64 with seccomp and Landlock (5.13 or newer). On other systems code is never run
unprotected: an error is raised. `sandbox.py` lists what the code cannot do. It can use the processor for `seconds`,
`memory_mb` of memory and the disk below its folder; find out whether a path exists; and attack the kernel through the
allowed system calls. Code that searches its own interpreter for the proof of success will find it: the score is for
models that answer honestly.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from ..errors import UserError
from . import sandbox

_FENCED = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
EXECUTION = "execution"
_PYTHON = {"", "python", "python3", "py"}
_PROBE_SECONDS = 60.0


def extract_code(text: str) -> str:
    """The first block fenced by ```python or ``` (up to the end, if the answer was cut), else the whole text.

    Examples:
        >>> extract_code("Like this:\\n```python\\nx = 1\\n```\\nDone.")
        'x = 1\\n'
    """
    blocks = (body for info, body in _FENCED.findall(text) if info.strip().lower() in _PYTHON)
    return next((textwrap.dedent(body) for body in blocks), text)


def run_tests(code: str, tests: Sequence[str], *, seconds: float = 5.0, memory_mb: int = 512) -> list[bool]:
    """Run `code` and then one test, in a new interpreter for each test. A test passes if it runs to its end.

    The proof of passing is a random token that the process sends after the last line. Exit codes, output and exceptions
    are not used. The code does not run as `__main__`, and the test sees its names.

    Args:
        code: Python source.
        tests: Python source of each test, such as assert statements.
        seconds: wall-clock time limit of each test, including about 0.03 s to start the interpreter.
        memory_mb: limit on the address space of each test, in MiB.

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
        answers: the model's answers, in which `extract_code` finds the code.
        tests: the sources of each sample's tests, or None.
        seconds: wall-clock time limit of each test.
        memory_mb: limit on the address space of each test, in MiB. All workers together use up to workers * memory_mb.
        workers: how many samples are tested at once. Default: one for each core; with more, tests would wait for a core
            while their time runs.

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
    """The first output of a sandbox: the token, why it could not be set up, something that the code forged, or b""."""
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
            env={"OMP_NUM_THREADS": "1"},  # threads of numpy would use up the address space
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError), process.stdin as pipe:
                pipe.write(settings)
            # Read once: further output of a sandbox is ignored.
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
    """The paths that a process in a sandbox may read: Python, its packages and the system's libraries."""
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path("stdlib")]
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/urandom"]
    return [path for path in dict.fromkeys([*python, *system]) if os.path.exists(path)]


def _check_limits(seconds: float, memory_mb: int) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise UserError(f"seconds is {seconds}; it must be a positive number")
    _check_sandbox(memory_mb)


@functools.cache
def _check_sandbox(memory_mb: int) -> None:
    """Refuse to work if a protection is missing: try an empty program in a sandbox, once per process."""
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
