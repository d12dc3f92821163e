"""On a terminal something moves at all times: bars, and where nothing can be counted, a clock."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "datasets", "pandas", "matplotlib", "peft", "pyarrow"}


def on_a_terminal(*command: str, folder: Path) -> Iterator[tuple[float, str]]:
    """What a command writes to its terminal, and when."""
    screen, of_command = pty.openpty()
    fcntl.ioctl(of_command, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # without a size no bar has room
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    process = subprocess.Popen(
        [sys.executable, *command], stdin=of_command, stdout=of_command, stderr=of_command, cwd=folder, env=environment
    )
    os.close(of_command)
    try:
        while True:
            try:
                written = os.read(screen, 1 << 16) if select.select([screen], [], [], 300)[0] else b""
            except OSError:  # the command has ended, and its terminal with it
                written = b""
            if not written:
                break
            yield time.monotonic(), written.decode(errors="replace")
    finally:
        os.close(screen)
        process.kill()
        assert process.wait() == 0


def shown(code: str, folder: Path) -> str:
    return "".join(text for _, text in on_a_terminal("-c", code, folder=folder))


def test_a_clock_stands_where_no_bar_is_and_leaves_nothing(tmp_path: Path) -> None:
    said = shown(
        "import time; from srd_fast.showing import alive\nwith alive(): time.sleep(1.3)\nprint('done')", tmp_path
    )
    assert re.match(r"\r\| 00:00\r\r/ 00:01\r", said), said
    assert said.endswith("\r       \rdone\r\n")


def test_a_bar_that_nothing_moves_shows_its_time(tmp_path: Path) -> None:
    code = """
        import time
        from srd_fast.showing import alive, progress_bar
        with alive(), progress_bar(what="work", total=3, unit="part", shown=True) as bar:
            bar.update(1)
            time.sleep(2.3)
    """
    said = shown("if 1:" + code, tmp_path)
    assert "work:  33%" in said
    assert {"00:01", "00:02"} <= set(re.findall(r"\[(\d\d:\d\d)<", said)), said
    assert "| 00:0" not in re.sub(r"work:[^\r]*", "", said)


@pytest.mark.parametrize("style", ["lines", "quiet", "json"])
def test_nothing_moves_where_nothing_should(style: str, tmp_path: Path) -> None:
    code = (
        f"import time; from srd_fast.showing import alive, show_as\nshow_as('{style}')\nwith alive(): time.sleep(0.7)"
    )
    assert shown(code, tmp_path) == ""


@pytest.mark.parametrize("verb", [["--help"], ["--version"], ["run", "--help"], ["config", "--help"]])
def test_help_imports_nothing_that_takes_seconds(verb: list[str], tmp_path: Path) -> None:
    code = f"""
        import sys
        from srd_fast.cli import main
        sys.argv = ["srd-fast", *{verb}]
        try:
            main()
        finally:
            loaded = sorted({HEAVY} & set(sys.modules))
            assert not loaded, loaded
    """
    done = subprocess.run(
        [sys.executable, "-c", "if 1:" + code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
def test_no_step_of_the_quickstart_is_silent(tmp_path: Path) -> None:
    """From the start to the last line, through every step."""
    command = ["-m", "srd_fast", "run", "quickstart", "max_rows=24", "validation=8", "output_dir=run"]
    command += ["init_student.warmup_steps=1", "distill.epochs_per_stage=1", "reflect.max_new_tokens=4"]
    last, silences, said = time.monotonic(), [], ""
    for when, text in on_a_terminal(*command, "evaluate.max_new_tokens=4", folder=tmp_path):
        silences.append((when - last, said[-200:], text[:200]))
        last, said = when, said + text
    assert max(silences)[0] < 5, max(silences)
    steps = re.findall(r"\[\d/8\] ([\w-]+): done", said)
    assert steps == ["prepare", "init-student", "reflect", "curate", "cache", "distill", "evaluate", "report"]
    # What takes long has a bar of its own.
    for what in ("generate", "teacher", "step"):
        assert re.search(rf"{what}", said)
