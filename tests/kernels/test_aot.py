"""Proof without a GPU: what the Triton kernels move in the interpreter, and their machine code for four GPUs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from srd_fast.kernels import FORMULAS, triton_class_blocks, triton_rows
from srd_fast.kernels.aot import Finding
from srd_fast.kernels.aot_kernels import (
    TARGETS,
    BlockConfiguration,
    Configuration,
    block_configurations,
    configurations,
)
from srd_fast.kernels.disassembly import _count_gcn, _count_sass, _Line, _loops

# Label, row pointers' scalars and the three results of a row, spread over its classes; the rest of an aligned row.
SCALARS = 0.1
# Of the rows that `kernel_trace.py` has.
CLASSES, STRIDE = 4500, 4512
# Of a pair of bf16 logits, in `aot --quick`: whole rows by divergence, blocks of classes by pass.
BYTES = {"forward_kl": 10, "reverse_kl": 10, "skew_reverse_kl": 14, "read": 4, "write": 6}


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def traced() -> dict[str, dict[str, float]]:
    done = run(str(Path(__file__).with_name("kernel_trace.py")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("divergence", FORMULAS)
def test_traced_bytes_per_logit_in_bfloat16(traced: dict[str, dict[str, float]], divergence: str) -> None:
    reads, first = 1 if FORMULAS[divergence].one_read else 2, FORMULAS[divergence].row_first
    # The teacher alone is looked at once for each bit; D is found with the gradient, or by one more read.
    looked = 2 * 31 * STRIDE / CLASSES if first is not None and first.head else 0
    for kind in ("values", "gradient"):
        traced[f"{divergence} {kind}"]["loads"] -= looked
    assert traced[f"{divergence} values"]["loads"] == pytest.approx(4 * (reads + (first is not None)), abs=SCALARS)
    assert traced[f"{divergence} values"]["stores"] == pytest.approx(0, abs=SCALARS)
    with_gradient = traced[f"{divergence} gradient"]
    assert with_gradient["loads"] == pytest.approx(4 * reads + 4, abs=SCALARS)
    assert with_gradient["stores"] == pytest.approx(2, abs=SCALARS)
    assert sum(with_gradient.values()) == pytest.approx(10 if reads == 1 else 14, abs=SCALARS)


def test_traced_bytes_of_cross_entropy_alone(traced: dict[str, dict[str, float]]) -> None:
    assert sum(traced["cross_entropy gradient"].values()) == pytest.approx(6, abs=SCALARS)
    assert sum(traced["cross_entropy values"].values()) == pytest.approx(2, abs=SCALARS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], list[Finding]]:
    """`aot --quick`: what it printed, and its findings."""
    file = tmp_path_factory.mktemp("aot") / "findings.json"
    done = run("-m", "srd_fast.kernels.aot", "--quick", "--json", str(file), cwd=Path(__file__).parents[2])
    assert done.returncode in (0, 1), done.stderr
    return done, [Finding(**finding) for finding in json.loads(file.read_text())]


@pytest.mark.slow
def test_compiled_kernels_keep_the_rules(
    compiled: tuple[subprocess.CompletedProcess[str], list[Finding]],
) -> None:
    done, findings = compiled
    assert done.returncode == 0, done.stdout
    assert "20 kernels, 0 that break a rule." in done.stdout
    assert {finding.target for finding in findings} == set(TARGETS)
    for finding in findings:
        assert finding.error is None
        assert finding.spills == 0
        work = finding.configuration.split()[0]
        assert (finding.load_bits, finding.store_bits) == (128, None if work == "read" else 128)
        assert finding.bytes_per_logit == BYTES[work]
        # Four programs of 256 threads fit the registers of an SM, or two of 512; of an AMD GPU, seven waves a SIMD.
        assert 16 <= finding.registers <= (64 if finding.target.startswith("sm_") else 72)


@pytest.mark.slow
def test_compiled_kernels_stay_lean(compiled: tuple[subprocess.CompletedProcess[str], list[Finding]]) -> None:
    """Many more instructions, and not memory limits an H100. Measured on sm_90: 59, 61, 98; of blocks 30, 33."""
    limits = {"read": (20, 33), "write": (20, 36)}
    for finding in compiled[1]:
        if finding.target.startswith("sm_"):
            work = finding.configuration.split()[0]
            low, high = limits.get(work, (20, 110 if "skew" in work else 65))
            assert low < finding.instructions_per_logit < high
            assert 1 <= finding.exp2_per_logit < (9 if "skew" in work else 5)


def test_the_interpreter_cannot_compile() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "srd_fast.kernels.aot", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr.splitlines()[-1]


def test_every_block_size_is_among_the_configurations() -> None:
    every = configurations()
    assert len(set(map(str, every))) == len(every)
    for warp_size, hopper in ((32, False), (32, True), (64, False)):
        possible = {json.dumps(triton_rows.launch_options(V, warp_size, hopper)) for V in range(1, 5000)}
        examined = {json.dumps(triton_rows.launch_options(c.classes, warp_size, hopper)) for c in every}
        assert possible == examined


@pytest.mark.parametrize(
    ("changes", "reads", "limit"),
    [
        ({"divergence": "forward_kl"}, 2, 10),
        ({}, 3, 14),
        ({"logits": "fp32"}, 3, 26),
        ({"gradient": None}, 2, 8),
        ({"divergence": None}, 2, 6),
        ({"divergence": "csd"}, 3, 14),
        ({"divergence": "csd", "gradient": None}, 3, 12),
        ({"divergence": "adaptive_kl"}, 3, 16),
    ],
)
def test_byte_limits(changes: dict[str, Any], reads: int, limit: int) -> None:
    configuration = Configuration(**changes)
    assert (configuration.reads, configuration.byte_limit) == (reads, limit)


@pytest.mark.parametrize("warp_size", [32, 64])
def test_every_number_of_warps_for_blocks_of_classes_is_among_the_configurations(warp_size: int) -> None:
    every = block_configurations()
    assert len(set(map(str, every))) == len(every)
    assert {c.divergence for c in every if c.work == "write"} == {*FORMULAS, None}
    possible = {
        json.dumps(triton_class_blocks.launch_options(n, warp_size))
        for n in [*range(1, 5000), *range(5000, 300000, 64)]
    }
    assert possible == {json.dumps(triton_class_blocks.launch_options(c.classes, warp_size)) for c in every}


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"teacher": None}, 2),
        ({}, 4),
        ({"divergence": None}, 2),
        ({"teacher": "fp32"}, 6),
        ({"work": "weigh"}, 4),
        ({"work": "gather"}, 4),
        ({"work": "look"}, 2),
        ({"work": "write"}, 6),
        ({"work": "write", "teacher": None}, 6),
        ({"work": "write", "divergence": None}, 4),
        ({"work": "write", "gradient": "fp32"}, 8),
    ],
)
def test_byte_limits_of_blocks_of_classes(changes: dict[str, Any], limit: int) -> None:
    assert BlockConfiguration(**changes).byte_limit == limit


def lines(text: str) -> list[_Line]:
    """ "label:", "opcode" or "opcode -> target", "!" before an opcode after which nothing follows."""
    found = []
    for entry in text.split(";"):
        label, opcode, target = re.fullmatch(r"\s*(?:(\.\w+):|!?([\w.]+)(?: -> (\.\w+))?)\s*", entry).groups("")
        found.append(_Line(label, opcode, target, ends="!" in entry))
    return found


def test_loops_are_found_wherever_their_blocks_lie() -> None:
    text = "LDG.E;.A:;LDG.E.128.CONSTANT;MUFU.EX2;BRA -> .C;.B:;!EXIT;.C:;STG.E.U16;MUFU.RCP;BRA -> .A;!BRA -> .B"
    (loop,) = _loops(lines(text), _count_sass)
    assert (loop.loads, loop.stores, loop.exp2, loop.special, loop.instructions) == ([128], [16], 1, 2, 6)


def test_widths_of_amd_accesses() -> None:
    text = ".A:;global_load_dwordx4;buffer_load_dword;global_store_short;s_nop;v_exp_f32_e32;s_cbranch_scc1 -> .A"
    (loop,) = _loops(lines(text), _count_gcn)
    assert (loop.loads, loop.stores, loop.exp2, loop.instructions) == ([128, 32], [16], 1, 5)
