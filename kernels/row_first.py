"""Divergences whose terms need numbers of the whole row first. `divergences.py` has the others.

Each has three functions. `sums` returns a class's terms of three sums over the row; `settle` computes three numbers a,
b, c from the sums; `terms` takes these numbers and returns the class's terms of D and of dD/dx itself, which add up to
0 over the row, so that no sum(w) is needed. d = log(q/p) differs from the difference of the logits over T by a constant
of the row.

    csd           1/4 sum_v sum_u w1_v w2_u (d_v - d_u)^2, w1 and w2 constant in the gradient
                  dD/dx = 1/2 [w2 (d - E1) + w1 (d - E2)],  E = sum(w d)
                  csd: w1 = w2 = q. csd_ts: p, q. csd_us: u, q. csd_uu: u, u, with u = 1 / number of classes
    adaptive_kl   g KL(p, q) + (1-g) KL(q, p), g constant in the gradient: the share of the head in sum |p - q|

Concrete score distillation: Kim et al., arXiv 2509.25837, with the factor of the authors' code. Multiplied by T^2, its
gradient is [w2 (d - E1) + w1 (d - E2)] / 2 of raw logits, with w at temperature T, as in their code. u leaves out
classes with a logit of -inf on either side. In exact arithmetic, the gradient of `csd` is that of the reverse KL.

Adaptive KL: Wu et al., arXiv 2404.02657, with head and tail as in the authors' code: the head has the teacher's
likeliest classes whose probabilities add up to at most 1/2, and always the likeliest one. Equally likely classes are in
the same part.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .jit import constexpr, jit, tl

# For a class with a logit of -inf, log(q/p) is of the order of 1e30: its square would not be finite.
_FAR = 1e15
FAR = constexpr(_FAR)
HEAD_MASS = 0.5
"""Probability of the head, at most, if it is more than the likeliest class."""
# Classes that are less likely than e^-NATS do not take part.
NATS = 128.0
Three = tuple[Tensor, Tensor, Tensor]


def _apart(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q - log_p).clamp(-_FAR, _FAR)


def _uniform(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (torch.minimum(log_p, log_q) > -_FAR).to(log_p.dtype)


@jit
def apart_triton(log_p, log_q):
    d = tl.maximum(log_q - log_p, -FAR, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(d, FAR, propagate_nan=tl.PropagateNan.ALL)


@jit
def uniform_triton(log_p, log_q):
    return tl.where(tl.minimum(log_p, log_q) > -FAR, 1.0, 0.0)


def as_they_are(a: Tensor, b: Tensor, c: Tensor) -> Three:
    return a, b, c


@jit
def as_they_are_triton(a, b, c):
    return a, b, c


def csd_sums(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, head: Tensor | None) -> Three:
    mean = q * _apart(log_p, log_q)
    return mean, mean, mean


@jit
def csd_sums_triton(log_p, log_q, p, q, head):
    mean = q * apart_triton(log_p, log_q)
    return mean, mean, mean


def csd(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, a: Any, b: Any, c: Any) -> tuple[Tensor, Tensor]:
    d = _apart(log_p, log_q) - a
    g = q * d
    return 0.5 * g * d, g


@jit
def csd_triton(log_p, log_q, p, q, a, b, c):
    d = apart_triton(log_p, log_q) - a
    g = q * d
    return 0.5 * g * d, g


def csd_ts_sums(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, head: Tensor | None) -> Three:
    d = _apart(log_p, log_q)
    return p * d, q * d, d * 0


@jit
def csd_ts_sums_triton(log_p, log_q, p, q, head):
    d = apart_triton(log_p, log_q)
    return p * d, q * d, d * 0


def csd_ts(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, a: Any, b: Any, c: Any) -> tuple[Tensor, Tensor]:
    d = _apart(log_p, log_q)
    from_a = d - a
    return 0.25 * (p + q) * from_a * from_a, 0.5 * (q * from_a + p * (d - b))


@jit
def csd_ts_triton(log_p, log_q, p, q, a, b, c):
    d = apart_triton(log_p, log_q)
    from_a = d - a
    return 0.25 * (p + q) * from_a * from_a, 0.5 * (q * from_a + p * (d - b))


def csd_us_sums(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, head: Tensor | None) -> Three:
    d, u = _apart(log_p, log_q), _uniform(log_p, log_q)
    return u * d, q * d, u


@jit
def csd_us_sums_triton(log_p, log_q, p, q, head):
    d = apart_triton(log_p, log_q)
    u = uniform_triton(log_p, log_q)
    return u * d, q * d, u


def of_one(a: Tensor, b: Tensor, c: Tensor) -> Three:
    c = c.clamp(min=1)
    return a / c, b, 1 / c


@jit
def of_one_triton(a, b, c):
    c = tl.maximum(c, 1.0)
    return a / c, b, 1 / c


def csd_us(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, a: Any, b: Any, c: Any) -> tuple[Tensor, Tensor]:
    u = c * _uniform(log_p, log_q)
    return csd_ts(log_p, log_q, u, q, a, b, c)


@jit
def csd_us_triton(log_p, log_q, p, q, a, b, c):
    u = c * uniform_triton(log_p, log_q)
    return csd_ts_triton(log_p, log_q, u, q, a, b, c)


def csd_uu(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, a: Any, b: Any, c: Any) -> tuple[Tensor, Tensor]:
    return csd(log_p, log_q, p, c * _uniform(log_p, log_q), a, b, c)


@jit
def csd_uu_triton(log_p, log_q, p, q, a, b, c):
    return csd_triton(log_p, log_q, p, c * uniform_triton(log_p, log_q), a, b, c)


def adaptive_kl_sums(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, head: Tensor) -> Three:
    gap, reverse = (p - q).abs(), q * (log_q - log_p)
    in_head = gap * (log_p >= head)
    return in_head, gap - in_head, reverse


@jit
def adaptive_kl_sums_triton(log_p, log_q, p, q, head):
    gap = tl.abs(p - q)
    in_head = tl.where(log_p >= head, gap, 0.0)
    return in_head, gap - in_head, q * (log_q - log_p)


def shares(a: Tensor, b: Tensor, c: Tensor) -> Three:
    total = a + b
    # Equal rows have no gap; then the share does not matter, because the gradient is 0.
    share = torch.where(total > 0, a / total.clamp(min=torch.finfo(a.dtype).tiny), 0.5)
    return share, 1 - share, c


@jit
def shares_triton(a, b, c):
    total = a + b
    share = tl.where(total > 0, a / tl.maximum(total, 1e-37, propagate_nan=tl.PropagateNan.ALL), 0.5)
    return share, 1 - share, c


def adaptive_kl(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, a: Any, b: Any, c: Any) -> tuple[Tensor, Tensor]:
    d = log_q - log_p
    return (b * q - a * p) * d, a * (q - p) + b * q * (d - c)


@jit
def adaptive_kl_triton(log_p, log_q, p, q, a, b, c):
    d = log_q - log_p
    return (b * q - a * p) * d, a * (q - p) + b * q * (d - c)


class HeadSearch:
    """Finds where the head of each row begins, without sorting it: by bisection on the bits of -log p.

    Floats above 0 are ordered like their bits, so 31 looks at a row of float32 find the exact border.

    Args:
        likeliest: [R, 1] log p of each row's likeliest class.
    """

    def __init__(self, likeliest: Tensor) -> None:
        self.likeliest = likeliest
        integer = torch.int64 if likeliest.dtype == torch.float64 else torch.int32
        self.looks = looks(likeliest.dtype)
        # The head fits at `low` but not at `high`. At -1 it has no class; at `high` all that take part.
        self.low = torch.full_like(likeliest, -1, dtype=integer)
        self.high = torch.full_like(likeliest, NATS).view(integer)

    @property
    def _middle(self) -> Tensor:
        # Once the two are neighbours, this is the lower one.
        return self.low + (self.high - self.low) // 2

    def _at(self, bits: Tensor) -> Tensor:
        return -bits.clamp(min=0).view(self.likeliest.dtype)

    @property
    def begin(self) -> Tensor:
        """[R, 1] the log p for the next look: the mass of all classes that are at least as likely is needed."""
        return self._at(self._middle)

    def narrow(self, mass: Tensor) -> None:
        """Take the result of a look.

        Args:
            mass: [R, 1] probability of all classes whose log p is at least `begin`.
        """
        middle = self._middle
        fits = (middle < 0) | (mass <= HEAD_MASS)
        self.low, self.high = torch.where(fits, middle, self.low), torch.where(fits, self.high, middle)

    @property
    def head(self) -> Tensor:
        """[R, 1] the lowest log p of a class in the head, after all looks."""
        return torch.minimum(self._at(self.low), self.likeliest)


def looks(dtype: torch.dtype) -> int:
    """How often `HeadSearch` looks at a row of sums in a dtype: once for each bit but the sign."""
    return 8 * dtype.itemsize - 1


def find_head(likeliest: Tensor, mass_from: Callable[[Tensor], Tensor]) -> Tensor:
    """Find where the head of each row begins, if whole rows are available.

    Args:
        likeliest: [R, 1] log p of each row's likeliest class.
        mass_from: log p [R, 1] -> [R, 1] probability of all classes that are at least as likely.

    Returns:
        [R, 1] the lowest log p of a class in the head.
    """
    search = HeadSearch(likeliest)
    for _ in range(search.looks):
        search.narrow(mass_from(search.begin))
    return search.head
