"""Rows of logits, their loss as a textbook writes it in any dtype, and the same by each row function.

A row function is *accurate* where it is no further from float64 than plain PyTorch is, give or take a tolerance.
"""

import functools
import math
import os
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from tiny import ROW_FIRST, plain_cross_entropy, plain_row_first
from torch import Tensor

from srd_fast.kernels import RowCoefficients, RowDivergence, distillation_rows

KINDS = ("random", "peaked", "identical", "masked", "one_hot")
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
SKEW, BETA = 0.1, 0.3
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BY_CLASSES = " classes"
# Of the largest value: what a backend may be worse by than plain PyTorch where its result has that dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}
# Rounding falls either way where terms of tens of nats cancel (reverse KL and a teacher that is certain): there the
# error of one sample is now half, now twice that of plain PyTorch, and the two are equal on average.
LUCK = 2.0


class Result(NamedTuple):
    """Per-row values [C] and the gradient on the student's logits [C, V]."""

    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    loss: Tensor
    gradient: Tensor


@dataclass
class Rows:
    """What a row function takes. The softcap is that of both sides."""

    student_CV: Tensor
    teacher_CV: Tensor
    labels_C: Tensor
    weights_C: Tensor
    softcap: float | None = None

    def first(self, count: int) -> "Rows":
        """The first rows alone."""
        tensors = (self.student_CV, self.teacher_CV, self.labels_C, self.weights_C)
        return Rows(*(x[:count] for x in tensors), self.softcap)


def make_rows(
    kind: str,
    rows: int,
    classes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    softcap: float | None = None,
) -> Rows:
    """Logits of a few units, and what the kind says. Where the student has more classes, row 0's label is the last."""
    g = torch.Generator().manual_seed(seed)
    v_S, v_T = classes
    common = min(classes)
    student, teacher = torch.randn(rows, v_S, generator=g) * 3, torch.randn(rows, v_T, generator=g) * 3
    labels = torch.randint(min(8, v_S - 1), v_S, (rows,), generator=g)
    if v_S > v_T and rows:
        labels[0] = v_S - 1
    if kind == "peaked":
        student[:, 5] += 30
        teacher[:, 3] += 60
    elif kind == "identical":
        teacher[:, :common] = student[:, :common]
    elif kind == "masked":  # some classes that both rule out
        student[:, 1:8:2] = teacher[:, 1:8:2] = -math.inf
    elif kind == "masked_apart":  # some that only one rules out
        student[:, 1:5] = -math.inf
        teacher[:, 3:8] = -math.inf
    elif kind == "one_hot":
        teacher[torch.arange(rows), labels.clamp(max=common - 1)] += 25
    elif kind != "random":
        raise ValueError(kind)
    weights = torch.rand(rows, generator=g) + 0.5
    sides = (x.to(device=device, dtype=dtype) for x in (student, teacher))
    return Rows(*sides, labels.to(device), weights.to(device), softcap)


def coefficients(temperature: float) -> RowCoefficients:
    """Both terms weigh something."""
    return RowCoefficients(0.3, 0.7 * temperature**2, temperature)


def _divergence(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    def mixture(log_a: Tensor, log_b: Tensor, share_of_a: float) -> Tensor:
        return torch.logaddexp(log_a + math.log(share_of_a), log_b + math.log(1 - share_of_a))

    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "skew_forward_kl":
        return kl(log_p, mixture(log_p, log_q, SKEW))
    if name == "skew_reverse_kl":
        return kl(log_q, mixture(log_q, log_p, SKEW))
    if name == "jsd":
        log_m = mixture(log_p, log_q, BETA)
        return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)
    if name == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    return plain_row_first(name, log_p, log_q)


def textbook(rows: Rows, divergence: str, temperature: float, dtype: torch.dtype) -> Result:
    """By autograd in `dtype` from the stored logits, -inf floored at -1e30; the gradient in the logits' own dtype."""
    leaf = rows.student_CV.detach().to(dtype).clamp(min=-1e30).requires_grad_()
    z_S, z_T = leaf, rows.teacher_CV.to(dtype).clamp(min=-1e30)
    if rows.softcap is not None:
        z_S, z_T = (rows.softcap * torch.tanh(z / rows.softcap) for z in (z_S, z_T))
    common = min(z_S.shape[-1], z_T.shape[-1])
    log_p = torch.log_softmax(z_T[:, :common] / temperature, -1)
    log_q = torch.log_softmax(z_S[:, :common] / temperature, -1)
    d, ce = _divergence(divergence, log_p, log_q), plain_cross_entropy(z_S, rows.labels_C)
    log_q_1 = torch.log_softmax(z_S.detach(), -1)
    k = coefficients(temperature)
    loss = k.cross_entropy * ce + k.divergence * d
    (gradient,) = torch.autograd.grad((loss * rows.weights_C.to(dtype)).sum(), leaf)
    if dtype != torch.float64:
        gradient = gradient.to(rows.student_CV.dtype)
    return Result(d.detach(), ce.detach(), -(log_q_1.exp() * log_q_1).sum(-1), loss.detach(), gradient)


def by_backend(backend: str, rows: Rows, divergence: str, temperature: float, **options: Any) -> Result:
    """By a row function, the gradient written over the logits as the chunked loss does it.

    backend: "eager", "compile" or "triton", for blocks of classes followed by " classes".
    """
    if backend.endswith(BY_CLASSES):
        return by_class_blocks(backend.removesuffix(BY_CLASSES), rows, divergence, temperature, **options)
    z, k = rows.student_CV.clone(memory_format=torch.preserve_format), coefficients(temperature)
    gradient = z
    if backend == "triton" and INTERPRETED and z.dtype == torch.bfloat16:
        # Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds.
        gradient = torch.empty_like(z, dtype=torch.float32)
    arguments = (z, rows.teacher_CV, rows.labels_C, RowDivergence.of(divergence, SKEW, BETA), k)
    keywords = {"student_softcap": rows.softcap, "teacher_softcap": rows.softcap}
    keywords |= {"row_weights_C": rows.weights_C, "gradient_CV": gradient, **options}
    if backend == "triton":
        from srd_fast.kernels.triton_rows import distillation_rows_triton

        values = distillation_rows_triton(*arguments, **keywords)
    else:
        values = distillation_rows(*arguments, **keywords, compiled=backend == "compile")
    loss = k.cross_entropy * values.cross_entropy + k.divergence * values.divergence
    return Result(*values, loss, gradient.to(z.dtype))


def class_slices(common: int, classes: int, width: int) -> list[slice]:
    """Blocks of classes, none with some on both sides of `common`."""
    ends = sorted({*range(width, classes, width), common, classes} - {0})
    return [slice(a, b) for a, b in zip([0, *ends], ends)]


def by_class_blocks(
    backend: str,
    rows: Rows,
    divergence: str,
    temperature: float,
    *,
    width: int | None = None,
    parts: int | None = None,
    teacher_lse: bool = False,
    writes: bool = True,
    gradient_dtype: torch.dtype | None = None,
) -> Result:
    """By blocks of classes, each for some of the rows in turn.

    width: classes of a block; default: three or four blocks, two under the interpreter. parts: of the rows; default:
    two of more than three rows. teacher_lse: the teacher's log-sum-exp is given. gradient_dtype: of a gradient beside
    the logits; default: it is written over the logits.
    """
    from srd_fast.kernels.class_blocks import ClassBlocks

    kind: type[ClassBlocks] = ClassBlocks
    if backend == "triton":
        from srd_fast.kernels.triton_class_blocks import TritonClassBlocks

        kind = TritonClassBlocks
    z_S, z_T, k = rows.student_CV.clone(), rows.teacher_CV, coefficients(temperature)
    common, classes, count = min(z_S.shape[1], z_T.shape[1]), z_S.shape[1], len(rows.labels_C)
    lse_C = None
    if teacher_lse:
        exact = z_T[:, :common].double().clamp(min=-1e30)
        exact = exact if rows.softcap is None else rows.softcap * torch.tanh(exact / rows.softcap)
        lse_C = (exact / temperature).logsumexp(1).float()
    loss = kind(
        rows.labels_C, RowDivergence.of(divergence, SKEW, BETA), k,
        student_softcap=rows.softcap, teacher_softcap=rows.softcap, row_weights_N=rows.weights_C,
        teacher_lse_N=lse_C, writes=writes, compiled=backend == "compile",
    )  # fmt: skip
    # Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds.
    cut_off = backend == "triton" and INTERPRETED and z_S.dtype == torch.bfloat16
    written = torch.float32 if cut_off else gradient_dtype
    gradient = z_S if written is None else torch.empty_like(z_S, dtype=written)
    number = parts or (2 if count > 3 else 1)
    row_parts = [slice(count * i // number, count * (i + 1) // number) for i in range(number)]
    blocks = class_slices(common, classes, width or -(-classes // (2 if INTERPRETED else 3)))

    def teacher(part: slice, block: slice) -> Tensor | None:
        return z_T[part, block] if block.start < common else None

    for block, part in product(blocks, row_parts):
        of_teacher = teacher(part, block) if loss.reads_teacher else None
        loss.read(part, block.start, z_S[part, block], of_teacher, common=block.start < common)
    loss.normalise()
    both = [(block, part) for block, part in product(blocks, row_parts) if block.start < common]

    def look() -> None:
        for block, part in both:
            loss.look(part, z_T[part, block])

    if loss.gathers:
        loss.heads(look)
        for block, part in both:
            loss.gather(part, z_S[part, block], z_T[part, block])
        loss.settle()
    for block, part in product(blocks if loss.weighs else [], row_parts):
        if block.start < common:
            loss.weigh(part, block.start, z_S[part, block], z_T[part, block])
    for block, part in product(blocks if writes else [], row_parts):
        loss.write(part, block.start, z_S[part, block], teacher(part, block), gradient[part, block])
    values = loss.values()
    total = k.cross_entropy * values.cross_entropy + k.divergence * values.divergence
    return Result(*values, total, gradient.to(gradient_dtype or z_S.dtype))


@functools.lru_cache(maxsize=len(KINDS))
def rows_and_rivals(
    divergence: str, temperature: float, kind: str, count: int, **options: Any
) -> tuple[Rows, Result, Result]:
    """`make_rows`, and of them what plain PyTorch makes in float32 and in float64. Kept for the next backend."""
    made = make_rows(kind, count, **options)
    return made, *(textbook(made, divergence, temperature, dtype) for dtype in (torch.float32, torch.float64))


def at_kinks(rows: Rows, temperature: float) -> float:
    """What the total variation's gradient may be off by: its terms of the classes where p is q but for rounding."""
    common = min(rows.student_CV.shape[1], rows.teacher_CV.shape[1])
    sides = [x[:, :common].double().clamp(min=-1e30) for x in (rows.student_CV, rows.teacher_CV)]
    if rows.softcap is not None:
        sides = [rows.softcap * torch.tanh(x / rows.softcap) for x in sides]
    q, p = (torch.softmax(x / temperature, -1) for x in sides)
    factor = coefficients(temperature).divergence / temperature * rows.weights_C.max().item()
    return factor * (q * ((p - q).abs() < 1e-5 * q)).sum(-1).max().item()


def assert_accurate(
    backend: str, divergence: str, temperature: float, kind: str, count: int, tried: int | None = None, **options: Any
) -> None:
    """Nothing is NaN; every value, and the gradient's largest error and l2 error, are as good as plain PyTorch's.

    tried: rows that the backend gets; what plain PyTorch's error is like shows on all of them. options: of `make_rows`.
    """
    rows, plain, truth = rows_and_rivals(divergence, temperature, kind, count, **options)
    tried = tried or count
    found = by_backend(backend, rows.first(tried), divergence, temperature)
    for name, x, rival, exact in zip(Result._fields, found, plain, truth):
        what = f"{backend}, {kind}, V {rows.student_CV.shape[1]}, T {temperature}: {name}"
        assert x.shape == exact[:tried].shape, f"{what} is {tuple(x.shape)}"
        assert not x.isnan().any(), f"{what} has NaN"
        error, of_rival = x.double() - exact[:tried], rival.double() - exact
        # A divergence of equal rows is 0, and so is the entropy of a certain student: there the tolerance is in nats.
        in_nats = name == "entropy" or (name == "divergence" and kind == "identical")
        largest, size = exact.abs().max().item(), exact.norm().item() * (tried / count) ** 0.5
        scale = max(largest, 1.0) if in_nats else largest
        assert scale > 1e-12, f"{what} is zero, this could not fail"
        tolerance = TOLERANCE[x.dtype] * scale
        if name == "loss" and kind == "identical":  # made of a divergence whose tolerance is in nats
            tolerance += TOLERANCE[x.dtype] * coefficients(temperature).divergence
        if name == "gradient" and divergence == "tvd":
            tolerance += at_kinks(rows, temperature)
        one_read = backend.startswith("triton") or backend.endswith(BY_CLASSES)
        if one_read and name == "gradient" and divergence == "reverse_kl":
            # sum(w) is D there, from another sum than each w: the gradient is off by some of D's last digit.
            tolerance += 2**-22 * truth.divergence.max().item() * coefficients(temperature).divergence / temperature
        if name == "gradient" and divergence in ROW_FIRST:
            # Means of log(q/p) are subtracted from it there: the gradient is off by some of their last digit.
            of_kl = rows_and_rivals("reverse_kl", temperature, kind, count, **options)[2].divergence.max().item()
            tolerance += 2**-21 * of_kl * coefficients(temperature).divergence / temperature
        worst, allowed = error.abs().max().item(), LUCK * of_rival.abs().max().item() + tolerance
        assert worst <= allowed, f"{what} off by {worst:.2e}, largest {largest:.2e}, may be {allowed:.2e}"
        if name == "gradient":
            allowed = LUCK * of_rival.norm().item() * (tried / count) ** 0.5 + tolerance * size / largest
            worst = error.norm().item()
            assert worst <= allowed, f"{what} off by {worst:.2e} (l2) of {size:.2e}, may be {allowed:.2e}"
