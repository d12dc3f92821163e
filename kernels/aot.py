"""Compile the loss kernels for GPUs without having one, and check that the machine code is what the design promises.

    python -m srd_fast.kernels.aot [--target sm_90] [--quick] [--in-turn] [--json FILE]

prints, for every configuration of `aot_kernels.py` and every target: registers of a thread, spills, shared memory of a
program, bits that each load and each store of the hot loops moves, and, for each logit (pair of student's and teacher's
logit), bytes of global memory, exp2 and instructions, summed over the loops. It ends with exit status 1 and a list if
one of these rules is broken:

    no spill; every access in a hot loop moves 128 bits; no more bytes for each logit than the reads that a divergence
    needs (whole rows in bf16: 10 for one-read divergences, 14 for two-read ones; blocks of classes: 4 to read, 4 to
    weigh, 6 to write)

Instructions are an upper bound: code that only a row's last block or the label's block runs counts in every block.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from . import triton_sums
from .aot_kernels import TARGETS, AnyConfiguration, block_configurations, configurations
from .disassembly import Resources, resources


@dataclass
class Finding:
    """The result of compiling one configuration for one target.

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


def per_thread(configuration: AnyConfiguration, target: GPUTarget) -> float:
    """Number of a block's logits for each of its threads."""
    options = configuration.options(target)
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


def examine(task: tuple[AnyConfiguration, str]) -> Finding:
    """Compile one configuration for one target and check it against the rules."""
    configuration, name = task
    target = TARGETS[name]
    try:
        found = resources(configuration.compile(target))
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
    meant = configuration.reads + configuration.looks
    if len(found.loops) != meant:
        finding.broken.append(f"{len(found.loops)} hot loops where {meant} were meant")
    if finding.bytes_per_logit > configuration.byte_limit:
        finding.broken.append(f"{finding.bytes_per_logit:g} bytes a logit, meant: {configuration.byte_limit}")
    return finding


def report(targets: list[str], quick: bool = False, in_turn: bool = False) -> Iterator[Finding]:
    """A finding for each configuration and target, or for each configuration and one target, from two processes."""
    every: list[AnyConfiguration] = [*configurations(quick), *block_configurations(quick)]
    tasks = [(configuration, target) for configuration in every for target in targets]
    if in_turn:
        tasks = [(configuration, targets[i % len(targets)]) for i, configuration in enumerate(every)]
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
    parser.add_argument(
        "--in-turn", action="store_true", help="each configuration for one of the targets, which take turns"
    )
    parser.add_argument("--json", metavar="FILE", help="write the findings as a list of objects too")
    options = parser.parse_args(arguments)
    if triton_sums.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    findings = []
    print(_HEADER, flush=True)
    for finding in report(options.target or list(TARGETS), options.quick, options.in_turn):
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
