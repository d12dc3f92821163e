"""README's table of reasons: each a figure beside that of what others use, of rows of one benchmark."""

from typing import NamedTuple

from .markdown import Line, groups, table
from .plan import GKD
from .rows import Row

OURS, PLAIN = "srd-fast", "plain loop"
STANDARD = "smollm2-135m-instruct -> 15 layers, real rows, 100 steps of 16"
QWEN, GEMMA = "qwen2.5-1.5b-0.5b, batch 8, samples of 256 to 1024 tokens", "gemma3 N=8192 V=262144 D=640/1152"


class Claim(NamedTuple):
    """One reason.

    words: what was measured. group: case, shape and dtype of the rows. ours, theirs: provider and case, where that is
    not the group's. metric, unit, factor: what is shown, and what a row's value is multiplied with.
    """

    words: str
    benchmark: str
    group: tuple[str, str, str]
    metric: str
    unit: str
    factor: float
    ours: str
    theirs: str
    module: str
    their_case: str | None = None


CLAIMS = (
    Claim(
        "a step on an H100, Qwen2.5 1.5B to 0.5B, beside TRL's GKDTrainer", "train_gpu", ("a step", QWEN, "bfloat16"),
        "step_seconds", "ms", 1e3, f"{OURS}, cache", GKD, "train_gpu",
    ),
    Claim(
        "GPU memory of that step", "train_gpu", ("a step", QWEN, "bfloat16"),
        "peak_bytes", "GiB", 2**-30, f"{OURS}, cache", GKD, "train_gpu",
    ),
    Claim(
        "a whole SRD run on two CPU cores, SmolLM2-135M to its half, beside the loop one writes first", "train",
        ("cache, learning rate 0.0001", STANDARD, "float32"), "whole_seconds", "s", 1, OURS, PLAIN,
        "train --data ROWS.jsonl",
    ),
    Claim(
        "memory of training Gemma 3 270M (262,144 classes) on a CPU, beside that loop", "large_vocabulary",
        ("8 samples of 256 tokens, train", "gemma-3-270m -> 6 layers, V = 262144", "float32"), "resident_bytes", "GiB",
        2**-30, OURS, PLAIN, "large_vocabulary", "8 samples of 256 tokens, loop",
    ),
    Claim(
        "the loss alone on an H100, 8,192 rows of 262,144 classes, beside `torch.compile`", "loss_gpu",
        ("jsd", GEMMA, "bfloat16"), "seconds", "ms", 1e3, OURS, "plain, compiled", "loss --device cuda",
    ),
    Claim(
        "memory of that loss, logits included", "loss_gpu", ("jsd", GEMMA, "bfloat16"),
        "extra_peak_bytes", "MiB", 2**-20, OURS, "plain, compiled", "loss --device cuda",
    ),
)  # fmt: skip


def claims(rows: list[Row]) -> str:
    """Ours, theirs, and ours as a share of theirs. The words name the kind of machine; a name tells several apart."""
    body: list[Line] = []
    for claim in CLAIMS:
        found = groups(rows, claim.benchmark)
        lines: list[Line] = []
        for key, figures in found.items():
            if (key.case, key.shape, key.dtype) != claim.group:
                continue
            others = figures if claim.their_case is None else found.get(key._replace(case=claim.their_case), {})
            ours, theirs = (f.get(n, {}).get(claim.metric) for f, n in ((figures, claim.ours), (others, claim.theirs)))
            if ours is not None and theirs is not None:
                shown = [_figure(x * claim.factor, claim.unit) for x in (ours, theirs)]
                command = f"`python -m benchmarks.{claim.module}`"
                lines.append((key.machine, [claim.words, *shown, f"{ours / theirs:.2f}x", command]))
        body += lines if len(lines) > 1 else [("", cells) for _, cells in lines]
    return table(["", "srd-fast", "beside it", "ratio", "repeat it"], body)


def _figure(value: float, unit: str) -> str:
    return f"{value:,.{0 if value >= 100 else 1}f} {unit}"
