"""The functions of V-wide tensors of which the row loss consists. `torch.compile` turns each into loops.

Shape letters: R rows, V classes, S student, T teacher, P pieces of a row, W classes of a piece.

With the teacher's logits there are three: `statistics` (maxima and sums of exponentials), `reduction` (D and sum(w))
and `gradient`; divergences that need numbers of the row first have `mass_from` and `row_sums` besides. With a teacher
known at few classes there are two: `tempered_statistics` and `tempered_gradient`. They also run in eager PyTorch;
compiled, they need no V-wide temporary. Logarithms of sums, and single classes, are left to the caller: work on [R, 1]
tensors between V-wide loops would keep the compiler from joining the loops, and a one-hot row would cost a third of the
gradient's time.

A compiled loop adds a row's terms one after the other, so small ones are lost once the sum is large; eager PyTorch adds
in pairs. Reductions therefore take pieces of a row, which `merge` joins.

All softmaxes subtract the maximum from raw logits before anything else, so nothing of the size of a logit is rounded.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Terms
from .row_first import Three

LOGIT_FLOOR = -1e30
"""Stands in for -inf: low enough that exp() gives exactly 0, high enough that differences stay finite."""
# The softcaps of student and teacher.
Caps = tuple[Tensor | None, Tensor | None]


def logits(stored: Tensor, softcap: Tensor | None) -> Tensor:
    z = stored.to(torch.promote_types(stored.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.clamp(min=LOGIT_FLOOR)


def _student_sums(z: Tensor, inverse_t: Tensor | float, temperature_kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maximum = z.amax(-1, keepdim=True)
    z = z - maximum
    e_t = torch.exp(z * inverse_t)
    # One exponential is enough at the usual temperatures, 1 and 2.
    e = e_t if temperature_kind == "one" else e_t * e_t if temperature_kind == "two" else torch.exp(z)
    return maximum.squeeze(-1), e.sum(-1), (e * z).sum(-1), e_t.sum(-1)


def statistics(
    student: Tensor, teacher: Tensor, caps: Caps, inverse_t: Tensor, temperature_kind: str
) -> tuple[Tensor, ...]:
    """Reductions of pieces [R, P, W], each [R, P].

    Student: maximum M, and sums of e^(z-M), e^(z-M) (z-M) and e^((z-M)/T). Teacher: maximum, and sum of e^((z-M)/T).
    """
    z_T = logits(teacher, caps[1])
    maximum = z_T.amax(-1, keepdim=True)
    sum_t = torch.exp((z_T - maximum) * inverse_t).sum(-1)
    return (*_student_sums(logits(student, caps[0]), inverse_t, temperature_kind), maximum.squeeze(-1), sum_t)


def student_statistics(student: Tensor, cap: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`statistics` of the student alone, at temperature 1."""
    maximum, s, a, _ = _student_sums(logits(student, cap), 1.0, "one")
    return maximum, s, a


def log_probabilities(
    stored: Tensor, cap: Tensor | None, maximum: Tensor, log_sum: Tensor, inverse_t: Tensor
) -> tuple[Tensor, Tensor]:
    log_p = (logits(stored, cap) - maximum) * inverse_t - log_sum
    return log_p, log_p.exp()


def _at_temperature_1(q: Tensor, z: Tensor, maximum: Tensor, log_sum_1: Tensor, temperature_kind: str) -> Tensor:
    # At T = 2, q = e^(y/2) / S_2 and q_1 = e^y / S_1, so q_1 = q^2 S_2^2 / S_1; at T = 1 it is q times a ratio of sums.
    if temperature_kind == "one":
        return q
    return q * q if temperature_kind == "two" else torch.exp((z - maximum) - log_sum_1)


class Origins(NamedTuple):
    """The logits of one class, from which one-read divergences measure all others: each [R, 1].

    With the same class for both sides, equal rows have terms that are exactly 0.

    Attributes:
        of_S: the student's logit.
        of_T: the teacher's.
    """

    of_S: Tensor
    of_T: Tensor


def crossed_statistics(
    student: Tensor,
    teacher: Tensor,
    origins: Origins,
    caps: Caps,
    inverse_t: Tensor,
    temperature_kind: str,
    of_teacher: bool,
) -> tuple[Tensor, ...]:
    """`statistics`, and the sum of e ((z_S - o_S) - (z_T - o_T)), with e of the teacher or of the student, at T."""
    z_S, z_T = logits(student, caps[0]), logits(teacher, caps[1])
    maximum_S, s, a, s_t = _student_sums(z_S, inverse_t, temperature_kind)
    maximum_T = z_T.amax(-1, keepdim=True)
    e_T = torch.exp((z_T - maximum_T) * inverse_t)
    e = e_T if of_teacher else torch.exp((z_S - maximum_S[..., None]) * inverse_t)
    apart = (z_S - origins.of_S[..., None]) - (z_T - origins.of_T[..., None])
    return maximum_S, s, a, s_t, maximum_T.squeeze(-1), e_T.sum(-1), (e * apart).sum(-1)


class Normalisers(NamedTuple):
    """The numbers that turn a row's logits into log-probabilities at the temperature: each [R, 1].

    Attributes:
        max_S: the student's largest logit.
        log_sum_S: logarithm of the student's sum of e^((z - max)/T).
        max_T: the teacher's largest logit.
        log_sum_T: the same logarithm for the teacher.
    """

    max_S: Tensor
    log_sum_S: Tensor
    max_T: Tensor
    log_sum_T: Tensor


class Settled(NamedTuple):
    """`Normalisers`, and the three numbers of the row that a divergence needs first: each [R, 1]."""

    max_S: Tensor
    log_sum_S: Tensor
    max_T: Tensor
    log_sum_T: Tensor
    a: Tensor
    b: Tensor
    c: Tensor


class Headed(NamedTuple):
    """`Normalisers`, and the teacher's log-probability from which on a class is in the head: each [R, 1]."""

    max_S: Tensor
    log_sum_S: Tensor
    max_T: Tensor
    log_sum_T: Tensor
    head: Tensor


def row_sums(
    student: Tensor, teacher: Tensor, n: Headed, caps: Caps, inverse_t: Tensor, sums: Callable[..., Three]
) -> Three:
    """Terms of pieces [R, P, W] of the three sums that a divergence needs first, each [R, P]."""
    max_S, log_sum_S, max_T, log_sum_T, head = (x[..., None] for x in n)
    log_q, q = log_probabilities(student, caps[0], max_S, log_sum_S, inverse_t)
    log_p, p = log_probabilities(teacher, caps[1], max_T, log_sum_T, inverse_t)
    a, b, c = sums(log_p, log_q, p, q, head)
    return a.sum(-1), b.sum(-1), c.sum(-1)


def mass_from(teacher: Tensor, n: Headed, cap: Tensor | None, inverse_t: Tensor) -> tuple[Tensor]:
    """Probability of the classes of pieces [R, P, W] that are at least as likely as `head`, [R, P]."""
    max_T, log_sum_T, head = (x[..., None] for x in (n.max_T, n.log_sum_T, n.head))
    log_p, p = log_probabilities(teacher, cap, max_T, log_sum_T, inverse_t)
    return ((p * (log_p >= head)).sum(-1),)


def reduction(
    student: Tensor,
    teacher: Tensor,
    n: Normalisers | Settled,
    caps: Caps,
    inverse_t: Tensor,
    skew: Tensor,
    beta: Tensor,
    terms: Terms,
) -> tuple[Tensor, Tensor]:
    """Terms of pieces [R, P, W] of D and sum(w), each [R, P]. Normalisers are [R, P], so that loops can be joined."""
    max_S, log_sum_S, max_T, log_sum_T, *settled = (x[..., None] for x in n)
    log_q, q = log_probabilities(student, caps[0], max_S, log_sum_S, inverse_t)
    log_p, p = log_probabilities(teacher, caps[1], max_T, log_sum_T, inverse_t)
    value, w = terms(log_p, log_q, p, q, *(settled or (skew, beta)))
    return value.sum(-1), w.sum(-1)


def gradient(
    student: Tensor,
    teacher: Tensor,
    caps: Caps,
    n: Normalisers | Settled,
    sum_w: Tensor,
    log_sum_1: Tensor,
    factors: tuple[Tensor, Tensor],
    inverse_t: Tensor,
    skew: Tensor,
    beta: Tensor,
    terms: Terms,
    temperature_kind: str,
    out: Tensor | None,
) -> None:
    """Write a q_1 + b (w - q sum(w)) to `out`, or over `student` if `out` is None.

    q_1: softmax at temperature 1; its logarithm is (z - max_S) - log_sum_1. factors: a and b, each [R, 1]; where q_1 is
    computed as a power of q, a includes the ratio of their sums.
    """
    z = logits(student, caps[0])
    log_q = (z - n.max_S) * inverse_t - n.log_sum_S
    q = log_q.exp()
    log_p, p = log_probabilities(teacher, caps[1], n.max_T, n.log_sum_T, inverse_t)
    # PyTorch 2.8 cannot compile a slice of a named tuple.
    w = terms(log_p, log_q, p, q, *(tuple(n)[4:] or (skew, beta)))[1]
    q_1 = _at_temperature_1(q, z, n.max_S, log_sum_1, temperature_kind)
    g = factors[0] * q_1 + factors[1] * (w - q * sum_w)
    if caps[0] is not None:
        g = g * (1 - (z / caps[0]).square())
    (student if out is None else out).copy_(g)


def student_gradient(
    student: Tensor, cap: Tensor | None, maximum: Tensor, log_sum_1: Tensor, factor: Tensor, out: Tensor | None
) -> None:
    """`gradient` for the cross-entropy alone."""
    z = logits(student, cap)
    g = factor * torch.exp((z - maximum) - log_sum_1)
    if cap is not None:
        g = g * (1 - (z / cap).square())
    (student if out is None else out).copy_(g)


def _rest_logits(stored: Tensor, cap: Tensor | None, apart: bool) -> Tensor:
    z = logits(stored, cap)
    # A softcap would turn -inf, the mark of classes that are left out, into an ordinary logit.
    return torch.where(stored == -math.inf, LOGIT_FLOOR, z) if apart and cap is not None else z


def tempered_statistics(
    student: Tensor, cap: Tensor | None, inverse_t: Tensor, temperature_kind: str, apart: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`statistics` of the student alone. apart: -inf marks classes that are left out, even under a softcap."""
    return _student_sums(_rest_logits(student, cap, apart), inverse_t, temperature_kind)


def tempered_gradient(
    student: Tensor,
    cap: Tensor | None,
    maximum: Tensor,
    log_sum_t: Tensor,
    log_sum_1: Tensor,
    factors: tuple[Tensor, Tensor],
    inverse_t: Tensor,
    temperature_kind: str,
    apart: bool,
    out: Tensor | None,
) -> None:
    """Write a q_1 + c q to `out`, or over `student` if `out` is None. q_1 and a are those of `gradient`.

    q is over the classes that are not left out. maximum, log_sum_t, log_sum_1, and a and c in `factors`: each [R, 1].
    """
    z = _rest_logits(student, cap, apart)
    q = torch.exp((z - maximum) * inverse_t - log_sum_t)
    q_1 = _at_temperature_1(q, z, maximum, log_sum_1, temperature_kind)
    g = factors[0] * q_1 + factors[1] * q
    if cap is not None:
        g = g * (1 - (z / cap).clamp(min=-1).square())
    (student if out is None else out).copy_(g)


def merge(
    maxima_RP: Tensor, scale: Tensor | float, sums_RP: Tensor, products_RP: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Join pieces: maximum M, sum of e = e^((z-M) scale) and, if products are given, of e (z-M), each [R, 1]."""
    maximum = maxima_RP.amax(1, keepdim=True)
    lower = maxima_RP - maximum
    moved = (lower * scale).exp()
    merged = maximum, (sums_RP * moved).sum(1, keepdim=True)
    if products_RP is None:
        return merged
    return *merged, ((products_RP + sums_RP * lower) * moved).sum(1, keepdim=True)
