"""Divergences D(p, q) between teacher p and student q: each once in PyTorch and, beside it, once for Triton.

With x = z_S / T and q = softmax(x), let w = dD / d(log q) with every log q_v taken as independent. Then

    dD/dx_v = w_v - q_v * sum(w)          and          d(log q)/dz = (d(log q)/dx) / T

so a divergence is fully described by each class's term of it and w. Adding any multiple of q to w changes nothing, so
such terms are left out. Both functions of a divergence take log p, log q, p, q of some classes, and skew s and beta b,
and return the classes' terms of D (nats) and w. The one for Triton also takes LOG2, the GPU's logarithm. It is applied
to ratios such as m/q, not to m: log(q/m) is of the order of 1, so an approximate logarithm is exact enough.

    forward_kl        KL(p, q)                                    w = -p
    reverse_kl        KL(q, p)                                    w = q log(q/p)
    skew_forward_kl   KL(p, m),  m = s p + (1-s) q                w = -(1-s) p q / m
    skew_reverse_kl   KL(q, m),  m = (1-s) p + s q                w = q (log(q/m) - s q/m)
    jsd               b KL(p, m) + (1-b) KL(q, m),                w = (1-b) q log(q/m)
                      m = b p + (1-b) q
    tvd               1/2 sum |p - q|                             w = 1/2 q sign(q - p)

`row_first.py` has divergences whose terms need numbers of the whole row first.

Skew divergences: Ko et al., DistiLLM, arXiv 2402.03898. Generalised JSD and its ends (b = 0 is forward KL, b = 1
reverse KL: the limits of D/b and D/(1-b)): Agarwal et al., GKD, arXiv 2306.13649. TVD: Wen et al., f-DISTILL,
arXiv 2307.15190.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import row_first
from .jit import LN2, LOG2E, constexpr, jit, tl
from .row_first import Three, find_head

# Called with log p, log q, p, q and then skew and beta, or the row's three numbers.
Terms = Callable[..., tuple[Tensor, Tensor]]
RowFunction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
ROUNDING = constexpr(32 * torch.finfo(torch.float32).eps)


def _mixture(a: Tensor, b: Tensor, share_of_a: Any) -> Tensor:
    return (share_of_a * a + (1 - share_of_a) * b).clamp(min=torch.finfo(a.dtype).tiny)


def forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: Any, beta: Any) -> tuple[Tensor, Tensor]:
    return p * (log_p - log_q), -p


@jit
def forward_kl_triton(log_p, log_q, p, q, skew, beta, LOG2):
    return p * (log_p - log_q), -p


def reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: Any, beta: Any) -> tuple[Tensor, Tensor]:
    w = q * (log_q - log_p)
    return w, w


@jit
def reverse_kl_triton(log_p, log_q, p, q, skew, beta, LOG2):
    w = q * (log_q - log_p)
    return w, w


def skew_forward_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: Any, beta: Any) -> tuple[Tensor, Tensor]:
    m = _mixture(p, q, skew)
    return p * (log_p - m.log()), (skew - 1) * q * (p / m)


@jit
def skew_forward_kl_triton(log_p, log_q, p, q, skew, beta, LOG2):
    # m = p u. If q/p is above 2^126, p is below all normal numbers and adds nothing.
    bits = tl.minimum((log_q - log_p) * LOG2E, 126.0, propagate_nan=tl.PropagateNan.ALL)
    log2_u = LOG2(skew + (1 - skew) * tl.exp2(bits))
    return p * log2_u * -LN2, (skew - 1) * q * tl.exp2(-log2_u)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: Any, beta: Any) -> tuple[Tensor, Tensor]:
    m = _mixture(q, p, skew)
    value = q * (log_q - m.log())
    return value, value - skew * q * (q / m)


@jit
def skew_reverse_kl_triton(log_p, log_q, p, q, skew, beta, LOG2):
    # m = q u. If p/q is above 2^126, q is below all normal numbers and adds nothing.
    bits = tl.minimum((log_p - log_q) * LOG2E, 126.0, propagate_nan=tl.PropagateNan.ALL)
    log2_u = LOG2(skew + (1 - skew) * tl.exp2(bits))
    value = q * log2_u * -LN2
    return value, value - skew * q * tl.exp2(-log2_u)


def jsd(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: Any, beta: Any) -> tuple[Tensor, Tensor]:
    log_m = _mixture(p, q, beta).log()
    w = (1 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + w, w


@jit
def jsd_triton(log_p, log_q, p, q, skew, beta, LOG2):
    # m over the larger of p and q, so that neither ratio overflows.
    difference = log_p - log_q
    ratio = tl.exp2(tl.abs(difference) * -LOG2E)
    larger = tl.where(difference > 0, beta, 1 - beta)
    log_m = LOG2(larger + (1 - larger) * ratio) * LN2
    w = (beta - 1) * q * (tl.maximum(difference, 0.0) + log_m)
    return beta * p * (tl.minimum(difference, 0.0) - log_m) + w, w


def tvd(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, skew: Any, beta: Any) -> tuple[Tensor, Tensor]:
    difference = q - p
    # Equal up to rounding counts as equal: otherwise the sign of rounding noise would give a full gradient.
    distinct = difference.abs() > 32 * torch.finfo(q.dtype).eps * q
    return 0.5 * difference.abs(), 0.5 * q * difference.sign() * distinct


@jit
def tvd_triton(log_p, log_q, p, q, skew, beta, LOG2):
    difference = q - p
    rounding = q * ROUNDING
    sign = tl.where(difference > rounding, 1.0, tl.where(difference < -rounding, -1.0, 0.0))
    return 0.5 * tl.abs(difference), 0.5 * q * sign


@dataclass(frozen=True)
class RowFirst:
    """The numbers of a row that a divergence needs before its classes' terms: see `row_first.py`.

    Args:
        sums: (log_p, log_q, p, q, head) -> the classes' terms of three sums.
        settle: the sums -> the three numbers that `Formula.terms` takes in place of skew and beta.
        sums_triton: `sums`; None without Triton.
        settle_triton: `settle`; None without Triton.
        head: whether the row is first divided into a head and a tail; if not, `sums` gets None for `head`.
        every_class: whether D needs every class by itself, so that no classes may be combined in a bucket.
    """

    sums: Callable[..., Three]
    settle: Callable[..., Three]
    sums_triton: Any
    settle_triton: Any
    head: bool = False
    every_class: bool = False


@dataclass(frozen=True)
class Formula:
    """A divergence's two functions, in PyTorch and for Triton, which return the classes' terms of D and w.

    Args:
        name: the divergence's name.
        terms: in PyTorch: (log_p, log_q, p, q, skew, beta) -> terms of D in nats, and w.
        triton: the same for Triton, with the GPU's logarithm as one more argument; None without Triton.
        one_read: "teacher" or "student" if D is the mean of log-probabilities under that side's distribution, and w
            needs nothing else but D. The Triton kernel then has both after one read of the logits. Else None.
        row_first: given if the terms need numbers of the whole row; w is then dD/dx. Else None.
    """

    name: str
    terms: Terms
    triton: Any
    one_read: str | None = None
    row_first: RowFirst | None = None


def _csd(name: str, weights: str) -> Formula:
    """One weighting of concrete score distillation: ss, ts, us or uu."""
    of = functools.partial(getattr, row_first)
    sums = {"ss": "csd_sums", "ts": "csd_ts_sums"}.get(weights, "csd_us_sums")
    settle = "of_one" if "u" in weights else "as_they_are"
    both = of(sums), of(settle), of(f"{sums}_triton"), of(f"{settle}_triton")
    return Formula(name, of(name), of(f"{name}_triton"), row_first=RowFirst(*both, every_class="u" in weights))


FORMULAS = {
    f.name: f
    for f in (
        Formula("forward_kl", forward_kl, forward_kl_triton, "teacher"),
        Formula("reverse_kl", reverse_kl, reverse_kl_triton, "student"),
        Formula("skew_forward_kl", skew_forward_kl, skew_forward_kl_triton),
        Formula("skew_reverse_kl", skew_reverse_kl, skew_reverse_kl_triton),
        Formula("jsd", jsd, jsd_triton),
        Formula("tvd", tvd, tvd_triton),
        _csd("csd", "ss"),
        _csd("csd_ts", "ts"),
        _csd("csd_us", "us"),
        _csd("csd_uu", "uu"),
        Formula(
            "adaptive_kl",
            row_first.adaptive_kl,
            row_first.adaptive_kl_triton,
            row_first=RowFirst(
                row_first.adaptive_kl_sums,
                row_first.shares,
                row_first.adaptive_kl_sums_triton,
                row_first.shares_triton,
                head=True,
                every_class=True,
            ),
        ),
    )
}
"""Name -> formula of every divergence that runs on all backends."""

# At the ends of skew and beta, the divergence is a plain KL, which is also exact where the other side underflows.
_LIMITS = {
    ("skew_forward_kl", "skew", 0.0): "forward_kl",
    ("skew_reverse_kl", "skew", 0.0): "reverse_kl",
    ("jsd", "beta", 0.0): "forward_kl",
    ("jsd", "beta", 1.0): "reverse_kl",
}


@dataclass(frozen=True)
class RowDivergence:
    """A divergence with its parameters: a formula, or a function of whole rows that only eager PyTorch can run.

    Args:
        formula: one of `FORMULAS`, or None where `rows` is given.
        skew: s of the skew divergences, 0 to 1.
        beta: beta of the JSD, 0 to 1.
        rows: (log_p_CK, log_q_CK) -> D of each row, [C] in nats, and w = dD/d(log q), [C, K].
    """

    formula: Formula | None
    skew: float = 0.1
    beta: float = 0.5
    rows: RowFunction | None = None

    @staticmethod
    def of(name: str, skew: float = 0.1, beta: float = 0.5) -> "RowDivergence":
        """Make one of `FORMULAS`. At the ends of skew and beta it is the KL that is the divergence's limit there.

        Args:
            name: a key of `FORMULAS`.
            skew: s of the skew divergences, 0 to 1.
            beta: beta of the JSD, 0 (forward KL) to 1 (reverse KL).

        Returns:
            The divergence.
        """
        for (limited, parameter, end), limit in _LIMITS.items():
            if name == limited and {"skew": skew, "beta": beta}[parameter] == end:
                name = limit
        return RowDivergence(FORMULAS[name], skew, beta)

    def __call__(
        self, log_p_CK: Tensor, log_q_CK: Tensor, p_CK: Tensor | None = None, q_CK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute D and its weights.

        Args:
            log_p_CK: [C, K] the teacher's log-probabilities.
            log_q_CK: [C, K] the student's.
            p_CK: [C, K] the teacher's probabilities. Default: computed.
            q_CK: [C, K] the student's.

        Returns:
            D of each row, [C] in nats, and w = dD/d(log q), [C, K].
        """
        if self.rows is not None:
            return self.rows(log_p_CK, log_q_CK)
        assert self.formula is not None
        p_CK = log_p_CK.exp() if p_CK is None else p_CK
        q_CK = log_q_CK.exp() if q_CK is None else q_CK
        row_first, both = self.formula.row_first, (log_p_CK, log_q_CK, p_CK, q_CK)
        numbers: tuple[Any, ...] = self.skew, self.beta
        if row_first is not None:
            head_C1 = None
            if row_first.head:
                likeliest_C1 = log_p_CK.amax(-1, keepdim=True)
                head_C1 = find_head(
                    likeliest_C1, lambda begin_C1: (both[2] * (log_p_CK >= begin_C1)).sum(-1, keepdim=True)
                )
            numbers = row_first.settle(*(x.sum(-1, keepdim=True) for x in row_first.sums(*both, head_C1)))
        value, w = self.formula.terms(*both, *numbers)
        return value.sum(-1), w
