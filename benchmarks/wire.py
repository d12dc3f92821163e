"""Bytes on the wire of a training step, counted: nothing here is measured.

    python -m benchmarks.wire [--gpus 8 64] [--tokens 8192] [--rows 4096]

A teacher of 70B parameters and a student of 8B (the sizes of Llama 3.1), both in bfloat16. Each line says what one GPU
receives in a step, and how long that takes at the two speeds, beside how long its own products take. Rings: of what
all W ranks end up with, a rank receives (W - 1) / W in an all-gather or a reduce-scatter, twice that in an all-reduce.
"""

import argparse
from dataclasses import dataclass

from .markdown import table


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder: parameters, width, layers and classes. Body: without the head."""

    parameters: float
    width: int
    layers: int
    classes: int = 128_256

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.classes * self.width

    @property
    def body(self) -> float:
        """Parameters without the head."""
        return self.parameters - self.head


TEACHER, STUDENT = Model(70.6e9, 8192, 80), Model(8.03e9, 4096, 32)
NODE = 8
BFLOAT16, FLOAT32 = 2, 4
# Bytes a second that a GPU receives within a node and between nodes, and operations a second.
NVLINK, NETWORK, FLOPS = 400e9, 50e9, 400e12
# Of a row, that each rank of a head in shards gives for a JSD: maxima and sums, then D and sum(w); labels and weights.
STATES, NUMBERS = 40, 16


@dataclass(frozen=True)
class Traffic:
    """One part of a step: what a GPU receives, over which wire, and the seconds of its own products meanwhile."""

    name: str
    received: float
    speed: float
    products: float

    @property
    def seconds(self) -> float:
        """On the wire."""
        return self.received / self.speed


def ring(whole: float, ranks: int) -> float:
    """Bytes that a rank receives of a tensor of so many bytes that all of them end up with."""
    return whole * (ranks - 1) / ranks


def head_in_shards(rows: int, ranks: int, speed: float) -> Traffic:
    """The loss of a head in shards over ranks that each have rows of their own: rows of all, states, gradient back."""
    everyone = rows * ranks
    received = ring(everyone * (BFLOAT16 * (STUDENT.width + TEACHER.width) + NUMBERS), ranks)
    received += (ranks - 1) * everyone * STATES
    received += ring(everyone * FLOAT32 * STUDENT.width, ranks)
    return Traffic(f"loss: head in shards over {ranks} GPUs", received, speed, loss_seconds(rows))


def head_gathered(rows: int, ranks: int, speed: float) -> Traffic:
    """The loss of a head that FSDP gathers with the rest of the model, and reduces."""
    received = 2 * ring(STUDENT.head * BFLOAT16, ranks) + ring(STUDENT.head * BFLOAT16, ranks)
    return Traffic("loss: head gathered whole", received, speed, loss_seconds(rows))


def loss_seconds(rows: int) -> float:
    """Of the four products of the loss."""
    return rows * STUDENT.classes * (6 * STUDENT.width + 2 * TEACHER.width) / FLOPS


def traffic(gpus: int, tokens: int, rows: int) -> list[Traffic]:
    """Every part of every way to do a step.

    Args:
        gpus: W, all of which train the student.
        tokens: of a GPU's batch.
        rows: of these, with loss.

    Returns:
        The student, the ways of its loss, the ways of its teacher.
    """
    speed = NVLINK if gpus <= NODE else NETWORK
    student, forward = STUDENT.body * BFLOAT16, 2 * TEACHER.body * tokens / FLOPS
    training = Traffic(
        "student in FSDP2: gathered twice, gradient scattered", 3 * ring(student, gpus), speed,
        6 * STUDENT.body * tokens / FLOPS,
    )  # fmt: skip
    # Two sums a layer, over the tokens of all GPUs that work on one batch together.
    sums = 2 * TEACHER.layers * 2 * ring(NODE * tokens * TEACHER.width * BFLOAT16, NODE)
    states = rows * TEACHER.width * BFLOAT16
    return [
        training,
        head_gathered(rows, gpus, speed),
        head_in_shards(rows, NODE, NVLINK),
        *([head_in_shards(rows, gpus, speed)] if gpus > NODE else []),
        Traffic("teacher in FSDP2, beside", ring(TEACHER.body * BFLOAT16, gpus), speed, forward),
        Traffic(f"teacher in tensor parallelism over {NODE}, beside", sums, NVLINK, forward),
        Traffic("teacher on ranks of its own", states, speed, 0.0),
        Traffic("teacher in a cache (read from the disk)", states, speed, 0.0),
    ]


def wire(gpus: list[int], tokens: int, rows: int) -> str:
    """The table for each number of GPUs."""
    body = []
    for n in gpus:
        for t in traffic(n, tokens, rows):
            figures = [f"{t.received / 1e9:,.2f}", f"{t.speed / 1e9:.0f}", f"{t.seconds:.3f}", f"{t.products:.2f}"]
            body.append(("", [str(n), t.name, *figures]))
    return table(["GPUs", "", "received, GB", "at GB/s", "wire, s", "its products, s"], body)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=8192, help="of a GPU's batch")
    parser.add_argument("--rows", type=int, default=4096, help="of these, with loss")
    args = parser.parse_args()
    print(wire(args.gpus, args.tokens, args.rows), end="")


if __name__ == "__main__":
    main()
