"""PREDICTED time of the distillation loss on GPUs, from machine code and data sheets. Nothing here was measured.

    python -m benchmarks.roofline [--csv FILE]

For each device, shape and divergence: the row kernel compiled ahead of time (`srd_fast.kernels.aot`), and, where
liger-kernel can be imported, its `fused_linear_jsd` with its Triton kernel compiled the same way. Prints Markdown
tables and writes every number in long form: provider, version, device, shape, divergence, quantity, value, unit.

Rates. H100 SXM (NVIDIA H100 Tensor Core GPU data sheet; Hopper architecture white paper): 3.35 TB/s, 989 TFLOP/s dense
bfloat16, 132 SMs, 1.83 GHz boost. A100 SXM 80 GB (NVIDIA A100 data sheet; Ampere architecture white paper): 2.039 TB/s,
312 TFLOP/s, 108 SMs, 1.41 GHz. Both: 4 warp instructions and 16 special functions a clock and SM (CUDA C++ programming
guide, arithmetic throughput).

Model, where a *logit* is one of N x V pairs of student's and teacher's logit:
- A row kernel takes the longest of: bytes over bandwidth, instructions over issue rate, special functions over their
  rate. Counts are those of the hot loops; T = 2. Nothing is found in a cache: a bound from above, most of all for
  liger-kernel, whose chunks of 64 rows are of the size of the H100's cache of 50 MB.
- A GEMM of 2 N V D operations runs at 70 % of the peak, or takes as long as its operands and output need to move once
  for each chunk, whichever is longer.
- The gradient of the head is read and written once for each chunk: 4 bytes a weight each way here, 2 in liger-kernel,
  which sums in the weights' dtype.
- All of these follow one another. Launches, synchronisation and the tails of grids cost nothing.
- Chunks. Here: 1 GiB // (4 V) rows, rounded down to a multiple of 128. liger-kernel below Blackwell:
  next_power_of_2(ceil(N / ceil(V / D_S))) rows.

liger-kernel 0.8.5, `ops/fused_linear_jsd.py`: logits come from the GEMMs in float32. Each eager operation of PyTorch is
counted as one read of its inputs and one write of its output (its softmax reads more than once: in its favour), in
bytes a logit: two divisions by T 16, two log_softmax 16, softmax 8, zeros for the loss 4, sum of the loss 4, row sum of
dx 4, softmax times it 8, the difference 12, division by T 8, cast to bfloat16 6. Its JSD knows forward KL, reverse KL
and JSD, without the cross-entropy and entropy that the row kernel here also computes. Its CuTe DSL kernel for Hopper,
an optional extra, and its `torch.compile`d `chunked_loss` are not modelled.
"""

import argparse
import csv
import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from srd_fast.kernels import FORMULAS
from srd_fast.kernels.aot import Finding, examine, summarise
from srd_fast.kernels.aot_kernels import TARGETS, Configuration, compile_kernel
from srd_fast.kernels.disassembly import resources

GEMM_EFFICIENCY = 0.7
LIGER_EAGER_BYTES = {"scale": 16, "log_softmax": 16, "softmax": 8, "loss": 8, "dx": 4 + 8 + 12 + 8 + 6}
# beta of liger-kernel's JSD for each divergence that it has.
LIGER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
LIGER_BLOCK, LIGER_WARPS = 4096, 4


@dataclass(frozen=True)
class Device:
    """target: of the compiler. Rates a second: bytes, dense bfloat16 operations, clocks."""

    target: str
    bandwidth: float
    flops: float
    sms: int
    clock: float


DEVICES = {
    "H100 SXM": Device("sm_90", 3.35e12, 989e12, 132, 1.83e9),
    "A100 SXM 80GB": Device("sm_80", 2.039e12, 312e12, 108, 1.41e9),
}


class Shape(NamedTuple):
    """N rows, V classes, widths of student and teacher."""

    N: int
    V: int
    D_S: int
    D_T: int

    def __str__(self) -> str:
        return f"N={self.N} V={self.V} D={self.D_S}/{self.D_T}"


SHAPES = [Shape(8192, 152064, 896, 3584), Shape(8192, 262144, 2048, 3584)]


def kernel_seconds(kernel: Finding, shape: Shape, device: Device) -> dict[str, float]:
    """Seconds that each of a row kernel's resources would take alone; the longest is the kernel's."""
    logits = shape.N * shape.V
    return {
        "memory": logits * kernel.bytes_per_logit / device.bandwidth,
        "instructions": logits * kernel.instructions_per_logit / (device.sms * 4 * 32 * device.clock),
        "special functions": logits * kernel.special_per_logit / (device.sms * 16 * device.clock),
    }


def gemm_seconds(shape: Shape, chunk: int, logit_bytes: int, device: Device) -> float:
    """The four products of every chunk: two to logits, two to gradients from bfloat16 gradients of the logits."""

    def product(rows: int, width: int, stored: int, weight_bytes: int) -> float:
        moved = rows * shape.V * stored + rows * width * 2 + shape.V * width * weight_bytes
        return max(2 * rows * shape.V * width / (GEMM_EFFICIENCY * device.flops), moved / device.bandwidth)

    chunks = [min(chunk, shape.N - start) for start in range(0, shape.N, chunk)]
    return sum(
        product(rows, shape.D_S, logit_bytes, 2)
        + product(rows, shape.D_T, logit_bytes, 2)
        + product(rows, shape.D_S, 2, 2)
        # The gradient of the head itself: see the model's third point.
        + product(rows, shape.D_S, 2, 0)
        for rows in chunks
    )


def predict(
    kernel: Finding, shape: Shape, device: Device, chunk: int, logit_bytes: int, eager_bytes: int, gradient_bytes: int
) -> dict[str, tuple[float, str]]:
    """Quantity -> value and unit.

    logit_bytes: of a logit that a GEMM writes. eager_bytes: of all PyTorch operations on a logit. gradient_bytes: of an
    element of the head's gradient.
    """
    parts = kernel_seconds(kernel, shape, device)
    limit = max(parts, key=lambda part: parts[part])
    chunks = -(-shape.N // chunk)
    seconds = {
        "row kernel": parts[limit],
        "eager operations": shape.N * shape.V * eager_bytes / device.bandwidth,
        "GEMMs": gemm_seconds(shape, chunk, logit_bytes, device),
        "head gradient": chunks * 2 * shape.V * shape.D_S * gradient_bytes / device.bandwidth,
    }
    floor = 2 * shape.N * shape.V * (3 * shape.D_S + shape.D_T) / (GEMM_EFFICIENCY * device.flops)
    times = {**seconds, "total": sum(seconds.values()), "GEMMs unchunked": floor}
    counts = {
        "chunk": (chunk, "rows"),
        "bytes per logit": (kernel.bytes_per_logit + eager_bytes, "bytes"),
        "instructions per logit": (kernel.instructions_per_logit, "instructions"),
        "special functions per logit": (kernel.special_per_logit, "instructions"),
        "registers": (kernel.registers, "registers"),
        "spills": (kernel.spills, "accesses"),
    }
    limits = {f"row kernel, {part} alone": (value * 1e3, "ms predicted") for part, value in parts.items()}
    return {**{name: (s * 1e3, "ms predicted") for name, s in times.items()}, **limits, **counts}


def liger_kernel_finding(divergence: str, target: str) -> Finding:
    """liger-kernel's JSD kernel for float32, compiled with the block and the warps of its launcher."""
    from liger_kernel.ops.jsd import _jsd_kernel

    types: dict[str, tuple[str, bool]] = {
        **dict.fromkeys(("X_ptr", "Y_ptr", "loss_ptr", "dX_ptr", "label_ptr"), ("*fp32", True)),
        **dict.fromkeys(("X_stride", "Y_stride", "loss_stride", "dX_stride", "n_non_ignore", "n_cols"), ("i32", True)),
    }
    fixed: dict[str, Any] = {
        "beta": LIGER_BETA[divergence],
        "ignore_index": -100,
        "BLOCK_SIZE": LIGER_BLOCK,
        "HAS_LABEL": False,
    }
    compiled = compile_kernel(_jsd_kernel, types, fixed, TARGETS[target], {"num_warps": LIGER_WARPS})
    return summarise(resources(compiled), LIGER_BLOCK / (LIGER_WARPS * 32), f"liger jsd {divergence}", target)


def liger_version() -> str | None:
    """None where liger-kernel cannot be imported."""
    try:
        from liger_kernel.ops.jsd import _jsd_kernel  # noqa: F401

        return importlib.metadata.version("liger-kernel")
    except ImportError as error:
        print(f"liger-kernel is left out: {error}", file=sys.stderr)
        return None


class Prediction(NamedTuple):
    provider: str
    version: str
    device: str
    shape: Shape
    divergence: str
    quantities: dict[str, tuple[float, str]]


def predictions() -> Iterator[Prediction]:
    """Every provider on every device, shape and divergence."""
    ours, liger = importlib.metadata.version("srd-fast"), liger_version()
    for device_name, device in DEVICES.items():
        for divergence in FORMULAS:
            kernel = examine((Configuration(divergence=divergence), device.target))
            theirs = liger_kernel_finding(divergence, device.target) if liger and divergence in LIGER_BETA else None
            for shape in SHAPES:
                where = (device_name, shape, divergence)
                rows = min((1 << 30) // (4 * shape.V) // 128 * 128, shape.N)
                yield Prediction("srd-fast", ours, *where, predict(kernel, shape, device, rows, 2, 0, 4))
                if liger and theirs:
                    steps = -(-shape.V // shape.D_S)
                    rows = min(1 << (-(-shape.N // steps) - 1).bit_length(), shape.N)
                    eager = sum(LIGER_EAGER_BYTES.values())
                    of_liger = predict(theirs, shape, device, rows, 4, eager, 2)
                    yield Prediction("liger fused_linear_jsd", liger, *where, of_liger)


def tables(found: list[Prediction]) -> str:
    """Markdown, a table for each device and shape."""
    shown = ["row kernel", "eager operations", "GEMMs", "head gradient", "total"]
    lines = ["**PREDICTION from compiled code and published peak rates; no GPU ran.** Times in ms.", ""]
    for device, shape in dict.fromkeys((p.device, p.shape) for p in found):
        here = [p for p in found if (p.device, p.shape) == (device, shape)]
        floor = here[0].quantities["GEMMs unchunked"][0]
        lines += [f"{device}, {shape}; the four GEMMs unchunked: {floor:.1f} ms", ""]
        lines += [f"| divergence | provider | chunk | bytes a logit | {' | '.join(shown)} | row kernel waits for |"]
        lines += ["|---|---|" + "--:|" * (2 + len(shown)) + "---|"]
        for p in here:
            q = p.quantities
            parts = {name.split(", ")[1]: q[name][0] for name in q if name.startswith("row kernel, ")}
            limit = max(parts, key=lambda part: parts[part]).removesuffix(" alone")
            times = " | ".join(f"{q[name][0]:.1f}" for name in shown)
            counts = f"{q['chunk'][0]} | {q['bytes per logit'][0]:g}"
            lines.append(f"| {p.divergence} | {p.provider} {p.version} | {counts} | {times} | {limit} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = Path(__file__).parent / "results" / "roofline.csv"
    parser.add_argument("--csv", type=Path, default=default, help="where the numbers go (default: %(default)s)")
    file = parser.parse_args().csv
    found = list(predictions())
    print(tables(found))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["provider", "version", "device", "shape", "divergence", "quantity", "value", "unit"])
        for *where, quantities in found:
            writer.writerows([*where, name, f"{value:.6g}", unit] for name, (value, unit) in quantities.items())


if __name__ == "__main__":
    main()
