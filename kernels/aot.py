"""Compile the row kernel for GPUs without having one, and check the machine code against what the design promises.

    python -m srd_fast.kernels.aot [--target sm_90] [--quick] [--json FILE]

prints, for every configuration that `distillation_rows_triton` can choose and every target: registers of a thread,
spills, shared memory of a program, bits that a load and a store of the hot loops move at once, bytes of global memory,
exp2 and instructions for each logit (pair of student's and teacher's logit), summed over the loops. Exit status 1 with
the list of broken rules:

    no spill; every access in a hot loop moves 128 bits; no more bytes for each logit than the reads that a divergence
    needs (one-read divergences in bf16: 10, two-read ones: 14)

Instructions are an upper bound: code that only a row's last block or the label's block runs counts in every block.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import triton_rows, triton_sums
from .disassembly import Resources, resources
from .divergences import FORMULAS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Configuration:
    """What decides the code of `row_kernel`: see `triton_rows.distillation_rows_triton`.

    divergence: None for cross-entropy alone. temperature: 1, 2, or 0 for any other. gradient: its dtype, or None
    without. classes: V. even_classes: whether V is a multiple of 16. aligned_rows: whether strides and readable columns
    are.
    """

    divergence: str | None = "skew_reverse_kl"
    temperature: int = 2
    logits: str = "bf16"
    gradient: str | None = "bf16"
    cross_entropy: bool = True
    padded: bool = False
    student_softcap: bool = False
    teacher_softcap: bool = False
    weights: bool = False
    classes: int = 152064
    even_classes: bool = True
    aligned_rows: bool = True

    def __str__(self) -> str:
        changed = [
            f.name if getattr(self, f.name) is True else f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)[4:]
            if getattr(self, f.name) != f.default
        ]
        temperature = "T=other" if self.temperature == 0 else f"T={self.temperature}"
        name = "cross_entropy" if self.divergence is None else f"{self.divergence} {temperature}"
        return " ".join([name, f"{self.logits}->{self.gradient or 'none'}", *changed])

    @property
    def reads(self) -> int:
        """How often each logit must be read."""
        before = 1 if self.divergence is None or FORMULAS[self.divergence].one_read else 2
        return before + (self.gradient is not None)

    @property
    def byte_limit(self) -> int:
        """Bytes of global memory that a student's logit, its teacher's and its gradient need."""
        both = BYTES[self.logits] * (1 if self.divergence is None else 2)
        return self.reads * both + (BYTES[self.gradient] if self.gradient else 0)


def configurations(quick: bool = False) -> list[Configuration]:
    """All configurations that the launcher can choose. quick: three divergences in bf16 at one temperature."""
    default = Configuration()
    if quick:
        return [dataclasses.replace(default, divergence=d) for d in ("forward_kl", "reverse_kl", "skew_reverse_kl")]
    every = [
        dataclasses.replace(default, divergence=d, temperature=t, logits=dtype, gradient=dtype)
        for d in FORMULAS
        for t in (1, 2, 0)
        for dtype in ("bf16", "fp32")
    ]
    changes: list[dict[str, Any]] = [
        {"padded": True},
        {"student_softcap": True, "teacher_softcap": True},
        {"weights": True},
        {"cross_entropy": False},
        {"gradient": None},
        {"logits": "fp16", "gradient": "fp16"},
        {"logits": "fp32", "gradient": "bf16"},
        {"padded": True, "student_softcap": True, "teacher_softcap": True, "weights": True, "temperature": 0},
        {"divergence": None, "temperature": 1},
        {"divergence": None, "temperature": 1, "gradient": None},
        {"even_classes": False, "classes": 151669},
        {"even_classes": False, "classes": 151669, "aligned_rows": False},
        *({"classes": classes} for classes in (256, 512, 1024, 2048)),
    ]
    return every + [dataclasses.replace(default, **change) for change in changes]


def constants(configuration: Configuration, target: GPUTarget) -> dict[str, Any]:
    """`row_kernel`'s compile-time arguments."""
    formula = FORMULAS[configuration.divergence or "forward_kl"]
    narrowest = min(BYTES[configuration.logits], BYTES[configuration.gradient or configuration.logits])
    return {
        "PAIR": formula.triton,
        "LOG2": triton_sums.approximate_log2 if target.backend == "cuda" else triton_sums.exact_log2,
        "SIDE": triton_sums.SIDES[formula.one_read],
        "TEACHER": configuration.divergence is not None,
        "T_KIND": configuration.temperature,
        "PADDED": configuration.padded,
        "STUDENT_SOFTCAP": configuration.student_softcap,
        "TEACHER_SOFTCAP": configuration.teacher_softcap,
        "WEIGHTS": configuration.weights,
        "CROSS_ENTROPY": configuration.cross_entropy,
        "GRADIENT": configuration.gradient is not None,
        "WIDTH": 16 // narrowest,
    }


def compile_for(configuration: Configuration, target: GPUTarget) -> Any:
    """The `triton.compiler.CompiledKernel` of a configuration."""
    options = triton_rows.launch_options(configuration.classes, target.warp_size, target.arch == 90)
    fixed = {**constants(configuration, target), "BLOCK": options.pop("BLOCK")}
    logits, classes = f"*{configuration.logits}", configuration.even_classes
    rows = configuration.aligned_rows
    # Type of each argument, and whether it is a multiple of 16 bytes, or of 16.
    types = {
        "student_ptr": (logits, True),
        "teacher_ptr": (logits, True),
        "gradient_ptr": (f"*{configuration.gradient or configuration.logits}", True),
        "labels_ptr": ("*i64", True),
        **dict.fromkeys(("weights_ptr", "divergence_ptr", "cross_entropy_ptr", "entropy_ptr"), ("*fp32", True)),
        **dict.fromkeys(("student_stride", "teacher_stride", "gradient_stride"), ("i32", rows)),
        **dict.fromkeys(("student_readable", "teacher_readable"), ("i32", rows)),
        **dict.fromkeys(("V", "K"), ("i32", classes)),
        **dict.fromkeys(("temperature", "cross_entropy_coefficient", "divergence_coefficient"), ("fp32", False)),
        **dict.fromkeys(("skew", "beta", "student_softcap", "teacher_softcap"), ("fp32", False)),
    }
    return compile_kernel(triton_rows.row_kernel, types, fixed, target, options)


def compile_kernel(
    kernel: Any, types: dict[str, tuple[str, bool]], fixed: dict[str, Any], target: GPUTarget, options: dict[str, Any]
) -> Any:
    """Compile a `triton.jit` function. types: for each run-time argument its type, and whether 16 divides it."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types[name][0] for name in names}
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in fixed and types[name][1]
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()}, divisible)
    return triton.compile(source, target=target, options=options)


@dataclass
class Finding:
    """What compiling one configuration for one target gave.

    error: why it could not be compiled. *_per_logit: for each pair of a student's and a teacher's logit.
    """

    configuration: str
    target: str
    error: str | None = None
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    load_bits: int = 0
    store_bits: int | None = None
    bytes_per_logit: float = 0
    exp2_per_logit: float = 0
    special_per_logit: float = 0
    instructions_per_logit: float = 0
    broken: list[str] = dataclasses.field(default_factory=list)


def per_thread(configuration: Configuration, target: GPUTarget) -> float:
    """Logits of a block for each of its threads."""
    options = triton_rows.launch_options(configuration.classes, target.warp_size, target.arch == 90)
    return options["BLOCK"] / (options["num_warps"] * target.warp_size)


def summarise(found: Resources, logits: float, configuration: str, target: str) -> Finding:
    """The numbers of a kernel. logits: how many each thread handles in one pass through a hot loop."""
    loads = [bits for loop in found.loops for bits in loop.loads]
    stores = [bits for loop in found.loops for bits in loop.stores]
    return Finding(
        configuration,
        target,
        registers=found.registers,
        spills=found.spills,
        shared_bytes=found.shared_bytes,
        load_bits=min(loads, default=0),
        store_bits=min(stores, default=None),
        bytes_per_logit=sum(loads + stores) / 8 / logits,
        exp2_per_logit=round(sum(loop.exp2 for loop in found.loops) / logits, 2),
        special_per_logit=round(sum(loop.special for loop in found.loops) / logits, 2),
        instructions_per_logit=round(sum(loop.instructions for loop in found.loops) / logits, 1),
    )


def examine(task: tuple[Configuration, str]) -> Finding:
    """Compile one configuration for one target and check it against the rules."""
    configuration, name = task
    target = TARGETS[name]
    try:
        found = resources(compile_for(configuration, target))
    except Exception as error:  # Whatever a compiler backend raises is a finding, not the end of the report.
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        error_line = f"{type(error).__name__}: {reason}"
        return Finding(str(configuration), name, error=error_line, broken=["does not compile"])
    finding = summarise(found, per_thread(configuration, target), str(configuration), name)
    if finding.spills:
        finding.broken.append(f"{finding.spills} spills")
    narrowest = min(finding.load_bits, finding.store_bits or finding.load_bits)
    if narrowest < 128 and configuration.aligned_rows:
        finding.broken.append(f"an access of {narrowest} bits in a hot loop")
    if len(found.loops) != configuration.reads:
        finding.broken.append(f"{len(found.loops)} hot loops where {configuration.reads} were meant")
    if finding.bytes_per_logit > configuration.byte_limit:
        finding.broken.append(f"{finding.bytes_per_logit:g} bytes a logit, meant: {configuration.byte_limit}")
    return finding


def report(targets: list[str], quick: bool = False) -> Iterator[Finding]:
    """A finding for each configuration and target, from two processes."""
    tasks = [(configuration, target) for configuration in configurations(quick) for target in targets]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield from pool.imap(examine, tasks)


_HEADER = (
    f"{'configuration':56} {'target':7} registers spills shared load store bytes exp2 instructions\n"
    f"{'':56} {'':7} {'':9} {'':6} {'B':>6} {'bits':>4} {'bits':>5} {'a logit':>23}"
)


def line(finding: Finding) -> str:
    """A finding as a row of the table."""
    f = finding
    if f.error:
        return f"{f.configuration:56} {f.target:7} {f.error}"
    counts = f"{f.bytes_per_logit:5g} {f.exp2_per_logit:4.1f} {f.instructions_per_logit:12.1f}"
    store = "-" if f.store_bits is None else f.store_bits
    where = f"{f.configuration:56} {f.target:7} {f.registers:9} {f.spills:6} {f.shared_bytes:6}"
    return f"{where} {f.load_bits:4} {store:>5} {counts}{'  <- ' + '; '.join(f.broken) if f.broken else ''}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m srd_fast.kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="one target; may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="three divergences at T = 2 in bf16")
    parser.add_argument("--json", metavar="FILE", help="write the findings as a list of objects too")
    options = parser.parse_args(arguments)
    if triton_sums.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    findings = []
    print(_HEADER, flush=True)
    for finding in report(options.target or list(TARGETS), options.quick):
        findings.append(finding)
        print(line(finding), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([dataclasses.asdict(finding) for finding in findings], file, indent=1)
    broken = [finding for finding in findings if finding.broken]
    print(f"{len(findings)} kernels, {len(broken)} that break a rule" + (":" if broken else "."))
    for finding in broken:
        print(f"  {finding.configuration} on {finding.target}: {'; '.join(finding.broken)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
