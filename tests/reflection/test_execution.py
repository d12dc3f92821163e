"""Answers that are run against tests: right ones pass, and nothing that they do reaches anyone else."""

import errno
import math
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from srd_fast.errors import UserError
from srd_fast.reflection import execution, sandbox
from srd_fast.reflection.execution import extract_code, pass_rates, run_tests


@pytest.fixture(autouse=True)
def _sandbox(request: pytest.FixtureRequest) -> None:
    if "unsandboxed" in request.fixturenames:
        return
    try:
        run_tests("", [])
    except UserError as e:
        pytest.skip(str(e))


@pytest.fixture
def unsandboxed() -> None:
    """For tests that need no sandbox."""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sandboxes have their folders, so that what they leave behind is seen."""
    place = tmp_path / "sandboxes"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def left_behind(folders: Path) -> list[str]:
    """Files below `folders`, and processes that work there."""
    links = [os.path.join("/proc", pid, "cwd") for pid in os.listdir("/proc") if pid.isdigit()]
    found = []
    for link in links:
        try:
            found += [link] if os.readlink(link).startswith(str(folders)) else []
        except OSError:
            continue
    return found + os.listdir(folders)


def run_plainly(code: str) -> None:
    """Run code without a sandbox: what a test says is refused must work here, or the test would prove nothing."""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def passes(code: str, test: str = "pass", **limits: float) -> bool:
    (passed,) = run_tests(code, [test], **limits)  # type: ignore[arg-type]
    return passed


# Code in answers


@pytest.mark.usefixtures("unsandboxed")
@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nand\n```python\ny = 2\n```", "x = 1\n"),
        ("So:\n```\nx = 1\n```", "x = 1\n"),
        ("```Python3\r\nx = 1\n```", "x = 1\n"),
        ("```bash\npip install x\n```\nthen\n```py\nx = 1\n```", "x = 1\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```python\nx = 1\ny =", "x = 1\ny ="),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("```text\nx\n```", "```text\nx\n```"),
        ("", ""),
    ],
)
def test_the_first_block_of_python_is_the_code(text: str, code: str) -> None:
    assert extract_code(text) == code


# Right and wrong


def test_each_test_counts_for_itself() -> None:
    code = "seen = []\ndef double(x):\n    seen.append(x)\n    return 2 * x"
    tests = ["assert double(1) == 2", "assert double(1) == 3", "assert seen == []", "assert double('a') == 'aa'"]
    assert run_tests(code, tests) == [True, False, True, True]


WRITE = "import os\nfor i in {}:\n    try: os.write(i, {})\n    except OSError: pass"
WRONG = {
    "syntax": "def f(:\n    return 1",
    "null byte": "x = '\0'",
    "too deep": "(" * 500 + ")" * 500,
    "exception": "1 / 0",
    "no such name": "f()",
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit()",
    "exit in the test's function": "def f():\n    raise SystemExit(0)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "printing": "print('passed', '1', 'True', flush=True)\nraise ValueError",
    "writing to every file": WRITE.format("range(64)", "b'x' * 16"),
    "closing every file": "import os\nos.closerange(0, 64)",
    "patched exit": "import os, builtins\nos._exit = builtins.exit = lambda *a: None\nraise KeyboardInterrupt",
    "patched exceptions": "import builtins\nbuiltins.AssertionError = builtins.BaseException = int\nf = lambda: 2",
    "patched exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\nf = lambda: 2",
    "own helper": "def check(x): pass\ndef f(): return 2",
}


@pytest.mark.parametrize("code", WRONG.values(), ids=WRONG)
def test_nothing_but_the_end_of_the_test_is_a_pass(code: str) -> None:
    assert not passes(code, "def check(x):\n    assert x == 1\ncheck(f())")
    assert passes("def f(): return 1", "def check(x):\n    assert x == 1\ncheck(f())")


def test_patched_functions_do_not_spoil_a_pass() -> None:
    assert passes("import os\nos.write = os._exit = print = lambda *a: 1 / 0")
    assert not passes("f = 1", "import sys\nassert f == 1\nsys.exit(0)")


def test_what_answers_usually_need_works() -> None:
    code = """
from __future__ import annotations
import asyncio, collections, dataclasses, datetime, json, math, re, tempfile, threading
from concurrent.futures import ThreadPoolExecutor

@dataclasses.dataclass
class Point:
    x: int = 1

async def later():
    await asyncio.sleep(0.001)
    return 3

with open("notes.txt", "w") as f:
    f.write("a")
if __name__ == "__main__":
    raise ValueError
"""
    tests = [
        "assert Point() == Point(1)",
        "assert asyncio.run(later()) == 3",
        "assert list(ThreadPoolExecutor(4).map(abs, [-1, 2])) == [1, 2]",
        "import os\nassert open('notes.txt').read() == 'a'\nos.rename('notes.txt', 'b')\nos.remove('b')",
        "with tempfile.NamedTemporaryFile('w+') as f:\n    f.write('x')",
        "import numpy\nassert numpy.ones((9, 9)).dot(numpy.ones(9)).sum() == 81",
        "import subprocess, multiprocessing, socket, ssl, sqlite3, urllib.request",
    ]
    assert run_tests(code, tests, seconds=60, memory_mb=1024) == [True] * len(tests)


# Limits


@pytest.mark.parametrize("code", ["while True:\n    pass", "import time\ntime.sleep(60)"])
def test_what_does_not_end_is_cut(code: str, folders: Path) -> None:
    start = time.monotonic()
    assert not passes(code, seconds=1)
    assert 1 <= time.monotonic() - start < 4
    assert left_behind(folders) == []


def test_memory_is_limited() -> None:
    caught = "try:\n    x = [0] * (10 * 2**30 // 8)\nexcept MemoryError:\n    caught = True"
    assert passes(caught, "assert caught")
    assert not passes("x = [0] * (10 * 2**30 // 8)")
    assert not passes("x = []\nwhile True:\n    x.append(bytearray(2**20))", seconds=30)
    assert passes("x = bytearray(64 * 2**20)")
    assert not passes("x = bytearray(64 * 2**20)", memory_mb=60)


def test_limits_cannot_be_lifted() -> None:
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "CORE"):
        lift = f"import resource\nresource.setrlimit(resource.RLIMIT_{name}, (2**40, 2**40))"
        assert not passes(lift)
        assert passes(
            f"import resource\nlimits = resource.getrlimit(resource.RLIMIT_{name})", "assert -1 not in limits"
        )


def test_no_process_and_no_program_is_started(folders: Path) -> None:
    forks = """
import os, time
made = 0
for _ in range(50):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
    except OSError:
        pass
"""
    assert run_tests(forks, ["assert made == 0", "assert made == 50"]) == [True, False]
    for start in (
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.system('true') and f()",
    ):
        run_plainly(f"import os\n{start}")
        assert not passes(f"import os\n{start}")
    assert not passes("import subprocess\nsubprocess.run(['true'])")
    assert left_behind(folders) == []


def test_giant_output_does_no_harm() -> None:
    lines = "line = 'x' * 2**20\nfor _ in range(500):\n    print(line)"
    assert passes(lines, seconds=30)
    everywhere = WRITE.format("list(range(9)) * 10**6", "b'x' * 2**20")
    assert not passes(everywhere, seconds=2)
    assert not passes("with open('big', 'wb') as f:\n    for _ in range(64):\n        f.write(bytes(2**20))")


# What is out of reach


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5).sendall(b'x')"
        run_plainly(connect)
        server.accept()[0].close()
        assert not passes(connect)
        for attack in (
            "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "import socket\nsocket.socket(socket.AF_UNIX)",
            "import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
            "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
            "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(256)) >= 0",
        ):
            assert not passes(attack)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_files_of_the_user_are_out_of_reach(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    file, folder, other = (repr(str(p)) for p in (secret, tmp_path, tmp_path / "other"))
    attacks = [
        f"assert open({file}).read() == 'mine'",
        f"import os\nassert 'secret.txt' in os.listdir({folder})",
        f"open({file}, 'a').close()",
        f"import os\nos.chmod({file}, 0o777)",
        f"import os\nos.utime({file}, (0, 0))",
        f"import os\nos.mkdir({other})",
        f"import os\nos.symlink('x', {other})",
        f"import os\nos.link({file}, {other})",
        f"import os\nos.truncate({file}, 1)",
        f"open({file}, 'w').write('yours')",
        f"import os\nos.rename({file}, {other})",
        f"import os\nos.remove({file})",
    ]
    for attack in attacks:
        for left in tmp_path.iterdir():
            left.rmdir() if left.is_dir() else left.unlink()
        secret.write_text("mine")
        before = secret.stat()
        assert not passes(attack), attack
        assert secret.read_text() == "mine"
        assert secret.stat()[:7] == before[:7]
        assert secret.stat().st_mtime_ns == before.st_mtime_ns
        assert os.listdir(tmp_path) == ["secret.txt"]
        run_plainly(attack)


def test_the_installation_is_only_read() -> None:
    assert passes("import json\nassert open(json.__file__).read()")
    assert not passes("import json\nopen(json.__file__, 'a')")
    assert not passes("import os\nos.mkdir('folder')")
    assert not passes("import os\nos.stat('/proc/self') and open('/proc/self/environ')")


def test_the_environment_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRD_SECRET", "token")
    see = "import os\nfound = 'SRD_SECRET' in os.environ, 'PATH' in os.environ, 'HOME' in os.environ"
    assert passes(see, "assert found == (False, False, False)")


def test_no_signal_reaches_another_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            for send in (
                "os.kill({0}, 9)",
                "os.killpg(os.getpgid({0}), 0)",
                "signal.pidfd_send_signal(os.pidfd_open({0}), 9)",
            ):
                assert not passes(f"import os, signal\n{send.format(other.pid)}")
            by_input = "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {0})"
            run_plainly(by_input.format(other.pid))
            assert not passes(by_input.format(other.pid))
            assert other.poll() is None
        finally:
            other.kill()


def test_a_killed_parent_takes_its_sandboxes_along(folders: Path) -> None:
    code = "import time\nopen('started', 'w').close()\ntime.sleep(60)"
    parent = multiprocessing.get_context("fork").Process(target=run_tests, args=(code, [""]), kwargs={"seconds": 60.0})
    parent.start()
    try:
        wait_until(lambda: any(folders.glob("*/started")))
    finally:
        parent.kill()
        parent.join()
    wait_until(lambda: not [found for found in left_behind(folders) if found.startswith("/proc")])


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# Samples


def test_rates_keep_the_order_over_workers(folders: Path) -> None:
    answers, tests, expected = [], [], []
    for i in range(12):
        answers.append(f"```python\nimport time\ntime.sleep({0.2 * (i % 3 == 0)})\nvalue = {i}\n```")
        tests.append(None if i % 4 == 3 else [] if i % 4 == 2 else [f"assert value == {i}"] * i + ["assert value < 0"])
        expected.append(math.nan if i % 4 > 1 else i / (i + 1))
    rates = pass_rates(answers, tests, seconds=30, workers=4)
    assert rates == pytest.approx(expected, nan_ok=True)
    assert left_behind(folders) == []


@pytest.mark.usefixtures("unsandboxed")
def test_samples_without_tests_need_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert [math.isnan(x) for x in pass_rates(["a", "b"], [None, []])] == [True, True]
    assert pass_rates([], []) == []


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="2 answers but tests of 1 samples"):
        pass_rates(["a", "b"], [["pass"]])
    with pytest.raises(UserError, match="workers is 0"):
        pass_rates(["a"], [["pass"]], workers=0)
    for seconds in (0, -1, math.nan, math.inf):
        with pytest.raises(UserError, match="seconds is"):
            run_tests("", ["pass"], seconds=seconds)
    with pytest.raises(UserError, match="does not run within memory_mb=1"):
        run_tests("", ["pass"], memory_mb=1)


@pytest.mark.usefixtures("unsandboxed")
def test_a_system_without_protection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    execution._check_sandbox.cache_clear()
    with pytest.raises(UserError, match=r"no sandbox for darwin; run it on Linux 5\.13"):
        run_tests("", ["pass"])


def test_a_missing_protection_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = execution._constant_settings()
    execution._check_sandbox.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(execution, "_constant_settings", lambda: {**settings, "filter": b"\xff" * 8})
        with pytest.raises(UserError, match="seccomp filters: Invalid argument; run it on Linux"):
            run_tests("", ["pass"])
    run_tests("", ["pass"])


# The filter


def verdict(machine: str, number: int, *arguments: int, audit: int | None = None) -> int | str:
    """What the filter says of a call: "allow", "kill", or the error that it gets."""
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine] if audit is None else audit
    data = struct.pack("=IIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    code = list(struct.iter_unpack("=HBBI", sandbox.filter_program(machine)))
    at = value = 0
    while True:
        what, yes, no, k = code[at]
        at += 1
        if what == 0x20:
            (value,) = struct.unpack_from("=I", data, k)
        elif what == 0x54:
            value &= k
        elif what == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(k, k & 0xFFFF)
        else:
            at += yes if (value == k if what == 0x15 else value >= k) else no


CALLS = {  # of x86_64 and aarch64: /usr/include/asm/unistd_64.h, /usr/include/asm-generic/unistd.h
    "read": (0, 63, (), "allow"),
    "mmap": (9, 222, (), "allow"),
    "exit_group": (231, 94, (), "allow"),
    "socket": (41, 198, (), errno.EPERM),
    "connect": (42, 203, (), errno.EPERM),
    "bind": (49, 200, (), errno.EPERM),
    "sendmsg": (46, 211, (), errno.EPERM),
    "execve": (59, 221, (), errno.EPERM),
    "kill": (62, 129, (), errno.EPERM),
    "tgkill": (234, 131, (), errno.EPERM),
    "ptrace": (101, 117, (), errno.EPERM),
    "prctl": (157, 167, (), errno.EPERM),
    "truncate": (76, 45, (), errno.EPERM),
    "fchmodat": (268, 53, (), errno.EPERM),
    "fchownat": (260, 54, (), errno.EPERM),
    "utimensat": (280, 88, (), errno.EPERM),
    "setxattr": (188, 5, (), errno.EPERM),
    "unshare": (272, 97, (), errno.EPERM),
    "mount": (165, 40, (), errno.EPERM),
    "bpf": (321, 280, (), errno.EPERM),
    "process_vm_writev": (311, 271, (), errno.EPERM),
    "memfd_create": (319, 279, (), errno.EPERM),
    "io_uring_setup": (425, 425, (), errno.ENOSYS),
    "pidfd_open": (434, 434, (), errno.ENOSYS),
    "clone3": (435, 435, (), errno.ENOSYS),
    "a call of x32": (0x40000000, 0x40000000, (), errno.ENOSYS),
    "a new thread": (56, 220, (0x3D0F00,), "allow"),
    "a new process": (56, 220, (0x1200011,), errno.EPERM),
    "limits asked for": (302, 261, (0, 9, 0, 1), "allow"),
    "limits set": (302, 261, (0, 9, 1 << 32, 0), errno.EPERM),
    "fcntl F_SETFL": (72, 25, (3, 4), "allow"),
    "fcntl F_SETOWN": (72, 25, (3, 8), errno.EPERM),
    "fcntl F_SETSIG": (72, 25, (3, 10), errno.EPERM),
    "openat to read": (257, 56, (0, 0, 0o2000000), "allow"),
    "openat to write anew": (257, 56, (0, 0, 0o1101), "allow"),
    "openat to read, truncating": (257, 56, (0, 0, 0o1000), errno.EPERM),
    "openat for nothing, truncating": (257, 56, (0, 0, 0o1003), errno.EPERM),
    "a pair of streams": (53, 199, (1, 0o2000001), "allow"),
    "a pair of datagram sockets": (53, 199, (1, 2), errno.EPERM),
    "a pair over the network": (53, 199, (2, 1), errno.EPERM),
    "ioctl FIONBIO": (16, 29, (3, 0x5421), "allow"),
    "ioctl FS_IOC_SETFLAGS": (16, 29, (3, 0x40086602), errno.ENOTTY),
}


@pytest.mark.usefixtures("unsandboxed")
@pytest.mark.parametrize("call", CALLS)
def test_the_filter_knows_both_machines(call: str) -> None:
    *numbers, arguments, expected = CALLS[call]
    for machine, number in zip(sandbox.MACHINES, numbers):
        assert verdict(machine, number, *arguments) == expected
        assert verdict(machine, number, *arguments, audit=0x40000003) == "kill"
