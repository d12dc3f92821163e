"""Read from its machine code what a compiled Triton kernel costs: registers, spills, loops and their accesses.

NVIDIA's cubin goes through `cuobjdump` and `nvdisasm`, which Triton's wheel contains; AMD's assembly is text already.
No GPU is needed. A *hot loop* is a set of basic blocks that can all reach each other. Nested loops count as one.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton


@dataclass
class Loop:
    """One pass of one thread through a hot loop.

    loads, stores: bits of each access to global memory. exp2, reciprocals: instructions of the special-function unit,
    which has `special` instructions in all.
    """

    instructions: int = 0
    special: int = 0
    exp2: int = 0
    loads: list[int] = field(default_factory=list)
    stores: list[int] = field(default_factory=list)


@dataclass
class Resources:
    """What one kernel needs on one target.

    registers: 32-bit registers of a thread. spills: accesses to memory that replaces registers (NVIDIA), or registers
    that are kept in memory (AMD). shared_bytes: shared memory of a block of threads.
    """

    registers: int
    spills: int
    shared_bytes: int
    loops: list[Loop]


def resources(kernel: Any) -> Resources:
    """Read a `triton.compiler.CompiledKernel` for NVIDIA or AMD."""
    if "cubin" in kernel.asm:
        return _nvidia(kernel.asm["cubin"], kernel.metadata.shared)
    return _amd(kernel.asm["amdgcn"])


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _nvidia(cubin: bytes, shared_bytes: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {usage}")
    # nvdisasm: "    /*0470*/  @!P0 LDG.E.128 R4, [R2.64] ;", and ".L_x_3:" for a label.
    lines = [
        _Line(label, opcode, target, ends=not guard and opcode in ("BRA", "EXIT", "RET"))
        for label, guard, opcode, target in re.findall(
            r"^(\.\w+):|^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?\s*([\w.]+)(?:.*`\((\.\w+)\))?.*$", code, re.MULTILINE
        )
    ]
    spills = sum(line.opcode.startswith(("LDL", "STL")) for line in lines)
    return Resources(int(found[1]), spills, shared_bytes, _loops(lines, _count_sass))


def _count_sass(loop: Loop, opcode: str) -> None:
    loop.instructions += opcode != "NOP"
    loop.special += opcode.startswith("MUFU")
    loop.exp2 += opcode.startswith("MUFU.EX2")
    if opcode.startswith(("LDG", "STG")):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
        (loop.loads if opcode.startswith("LDG") else loop.stores).append(int(width[1]) if width else 32)


def _amd(code: str) -> Resources:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        if found is None:
            raise ValueError(f"AMD's assembly has no .{name}")
        return int(found[1])

    lines = [
        _Line(label, opcode, target if "branch" in opcode else "", ends=opcode in ("s_branch", "s_endpgm"))
        for label, opcode, target in re.findall(r"^(\.\w+):|^\t([a-z]\w+)(?:[ \t]+(\.\w+)$)?", code, re.MULTILINE)
    ]
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    shared = number("group_segment_fixed_size")
    return Resources(number("vgpr_count"), spills, shared, _loops(lines, _count_gcn))


def _count_gcn(loop: Loop, opcode: str) -> None:
    loop.instructions += opcode != "s_nop"
    loop.special += opcode.startswith(("v_exp_f32", "v_log_f32", "v_rcp_f32"))
    loop.exp2 += opcode.startswith("v_exp_f32")
    access = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", opcode)
    if access:
        kind, what = access.groups()
        bits = re.search(r"dword(?:x(\d))?", what)
        width = 32 * int(bits[1] or 1) if bits else 16 if "short" in what or "16" in what else 8
        (loop.loads if kind == "load" else loop.stores).append(width)


@dataclass
class _Line:
    """A label, or an instruction. target: the label it may jump to. ends: whether the next line never follows it."""

    label: str
    opcode: str
    target: str
    ends: bool


def _loops(lines: list[_Line], count: Callable[[Loop, str], None]) -> list[Loop]:
    """Loops that touch global memory: sets of blocks of a listing that can all reach each other."""
    starts = [0]
    for i, line in enumerate(lines):
        if line.label or (i and (lines[i - 1].target or lines[i - 1].ends)):
            starts.append(i)
    blocks = [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)]) if a < b]
    home = {block[0].label: i for i, block in enumerate(blocks) if block[0].label}
    follow = [{home[block[-1].target]} if block[-1].target in home else set() for block in blocks]
    for i, block in enumerate(blocks[:-1]):
        if not block[-1].ends:
            follow[i].add(i + 1)
    reach = [_reachable(i, follow) for i in range(len(blocks))]
    loops, seen = [], set[int]()
    for i in range(len(blocks)):
        if i in seen or i not in reach[i]:
            continue
        members = [j for j in reach[i] if i in reach[j]]
        seen.update(members)
        loop = Loop()
        for line in (line for j in members for line in blocks[j] if line.opcode):
            count(loop, line.opcode)
        if loop.loads or loop.stores:
            loops.append(loop)
    return loops


def _reachable(start: int, follow: list[set[int]]) -> set[int]:
    """Blocks that can run after `start`; itself only if it can run again."""
    found, todo = set[int](), [start]
    while todo:
        new = follow[todo.pop()] - found
        found |= new
        todo.extend(new)
    return found
