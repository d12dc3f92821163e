"""The kernels in Triton on a CPU: test_kernels.py and test_class_blocks.py once more, under Triton's interpreter.

It must be chosen before Triton is imported, so the tests run in a process of their own. It takes a second for what a
GPU does in no time: by default every divergence runs once, and everything else is marked slow or long.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EACH_DIVERGENCE = "(test_no_further and float32-97-97-T2.0) or test_no_row or test_scratch_behind"


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="is the interpreter's process already")
@pytest.mark.parametrize(
    ("chosen", "marked", "at_least"),
    [
        pytest.param(EACH_DIVERGENCE, "not long", 15, id="each divergence"),
        pytest.param(f"not ({EACH_DIVERGENCE})", "not long", 60, id="the rest", marks=pytest.mark.slow),
        pytest.param("test", "long", 60, id="the whole table", marks=pytest.mark.long),
    ],
)
def test_triton_passes_the_same_tests_under_its_interpreter(chosen: str, marked: str, at_least: int) -> None:
    pytest.importorskip("triton")
    files = [str(HERE / name) for name in ("test_kernels.py", "test_class_blocks.py")]
    run = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", marked]
    run += ["-k", f"(triton or test_class_blocks) and ({chosen})", *files]
    done = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
