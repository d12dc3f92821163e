"""What the Triton kernels share: logits as they are read, log-probabilities, and the running sums of a thread.

A thread keeps a running maximum m and sums relative to it. Of the neighbouring logits that it reads at once, 128 bits,
it takes the maximum first: then the old sums are multiplied once by exp((m - m') / t), and each logit costs only one
exponential. Threads are merged after the loop. The exponential at t = 1, for cross-entropy and entropy, is the
one at T = 1, its square at T = 2, and a second one at any other T.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import row_first
from .divergences import LOG2E, Formula
from .passes import LOGIT_FLOOR

FLOOR = tl.constexpr(LOGIT_FLOOR)
NATS = tl.constexpr(row_first.NATS)
HEAD_MASS = tl.constexpr(row_first.HEAD_MASS)
LOOKS = tl.constexpr(row_first.looks(torch.float32))
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_logits(pointer, first, lanes, limit, readable, softcap, SOFTCAP: tl.constexpr):
    """Logits `first` + lanes in float32 after the softcap; -1e30 for -inf, and for lanes from `limit` on.

    Nothing from `readable` on is read.
    """
    offsets = first + lanes
    z = tl.load(pointer + offsets, mask=offsets < readable, other=FLOOR).to(tl.float32)
    if SOFTCAP:
        # tanh(x) = (1 - u) / (1 + u) with u = exp(-2 |x|), which loses nothing where x is large.
        x = z / softcap
        u = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        tanh = (1 - u) / (1 + u)
        z = tl.where(x < 0, -tanh, tanh) * softcap
    # A NaN stays one: training must see it.
    z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    # One branch for all lanes: only a row's last block has any to compare.
    if first + lanes.numel > limit:
        z = tl.where(offsets < limit, z, FLOOR)
    return z


@triton.jit
def store_gradient(
    pointer, first, lanes, limit, g, z, softcap, label, ce, CROSS_ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Store the gradient g of logits z, those of `load_logits`: less ce at the label, and through the softcap."""
    columns = first + lanes
    if CROSS_ENTROPY:  # noqa: SIM102 - decided while compiling
        # One branch for all lanes, as in `load_logits`.
        if (label >= first) & (label < first + lanes.numel):
            g -= tl.where(columns == label, ce, 0.0)
    if SOFTCAP:
        u = z / softcap
        g *= 1 - u * u
    tl.store(pointer + columns, g.to(pointer.dtype.element_ty), mask=columns < limit)


@triton.jit
def approximate_log2(x):
    """log2 as one instruction of NVIDIA GPUs: absolute error 2^-22 for x from 0.5 to 2, else relative error 2^-22."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def exact_log2(x):
    """log2 for all other targets."""
    return tl.log2(x)


LOG2 = exact_log2 if INTERPRETED or torch.version.cuda is None else approximate_log2
"""The logarithm of this machine's GPU."""


@triton.jit
def log_softmax(z, maximum, log_sum, inverse_t):
    """log q and q, of logits z from their row's maximum and the logarithm of its sum."""
    log_q = (z - maximum) * inverse_t - log_sum
    return log_q, tl.exp2(log_q * LOG2E)


@triton.jit
def head_of(pointer, lanes, limit, readable, softcap, maximum, log_sum, inverse_t, SOFTCAP: tl.constexpr):
    """Log p from which on a class is in the row's head: `row_first.HeadSearch` by one program."""
    BLOCK: tl.constexpr = lanes.numel
    low = tl.full((), -1, tl.int32)
    high = tl.full((), NATS, tl.float32).to(tl.int32, bitcast=True)
    for _ in range(0, LOOKS):
        middle = low + (high - low) // 2
        begin = -tl.maximum(middle, 0).to(tl.float32, bitcast=True)
        mass = tl.zeros([lanes.shape[0]], tl.float32)
        for i in range(0, tl.cdiv(limit, BLOCK)):
            mass += mass_from(
                pointer, i * BLOCK, lanes, limit, readable, softcap, maximum, log_sum, inverse_t, begin, SOFTCAP
            )
        fits = (middle < 0) | (tl.sum(mass, axis=0) <= HEAD_MASS)
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    return tl.minimum(-tl.maximum(low, 0).to(tl.float32, bitcast=True), -log_sum)


@triton.jit
def mass_from(
    pointer, first, lanes, limit, readable, softcap, maximum, log_sum, inverse_t, begin, SOFTCAP: tl.constexpr
):
    """Each thread's probability of the classes `first` + lanes that are at least as likely as `begin`."""
    z = load_logits(pointer, first, lanes, limit, readable, softcap, SOFTCAP)
    log_p, p = log_softmax(z, maximum, log_sum, inverse_t)
    return tl.sum(tl.where(log_p >= begin, p, 0.0), axis=1)


@triton.jit
def powers(d, step, c):
    """2^(d c) of logits less their maximum, and what sums so far shrink by where the maximum rose by -step."""
    return tl.exp2(d * c), tl.exp2(step * c)


@triton.jit
def exponentials(z, m, c):
    """The maximum of each thread with more logits z, and `powers` of these."""
    new = tl.maximum(m, tl.max(z, axis=1))
    step = m - new
    e, shrink = powers(z - new[:, None], step, c)
    return new, e, shrink


@triton.jit
def add_student(z, m, s1, a1, c, T_KIND: tl.constexpr):
    """Add logits z to a thread's sums of e^(z - m) and e^(z - m) (z - m), relative to its maximum m.

    Returns the new maximum and sums, and `powers`: those with c where T_KIND is 2, else those at temperature 1.
    """
    new = tl.maximum(m, tl.max(z, axis=1))
    step = m - new
    d = z - new[:, None]
    if T_KIND == 2:
        e, shrink = powers(d, step, c)
        e1 = e * e
        shrink1 = shrink * shrink
    else:
        e1, shrink1 = powers(d, step, LOG2E)
        e = e1
        shrink = shrink1
    a1 = (a1 + s1 * step) * shrink1 + tl.sum(e1 * d, axis=1)
    return new, s1 * shrink1 + tl.sum(e1, axis=1), a1, e, shrink


@triton.jit
def merged(sums, m, maximum, c):
    """The sum of all threads' sums, which are relative to their m, relative to one maximum."""
    return tl.sum(sums * tl.exp2((m - maximum) * c), axis=0)


SIDES = {"teacher": 1, "student": 2, None: 0}
"""`Formula.one_read` as kernels take it."""


def formula_options(formula: Formula) -> dict[str, Any]:
    """A divergence's functions, as kernels take them."""
    first = formula.row_first
    of_row = (None, None, False) if first is None else (first.sums_triton, first.settle_triton, first.head)
    return {"PAIR": formula.triton, **dict(zip(("SUMS", "SETTLE", "HEAD"), of_row))}


def kind_of_temperature(temperature: float) -> int:
    """1 or 2 for these temperatures, 0 for any other: `T_KIND` of the kernels."""
    return {1.0: 1, 2.0: 2}.get(float(temperature), 0)
