"""Divergences D(p, q) between teacher p and student q, and the registry that users extend.

Each is a function of log-probabilities [N, V] that returns its value [N] (nats) and its weight w = dD/d(log q) [N, V];
the gradient with respect to the student's logits follows from w alone (see `srd_fast.kernels.rows`). Terms of w that
are a multiple of q are left out, since they cancel there.

    forward_kl        KL(p, q)                                    w = -p
    reverse_kl        KL(q, p)                                    w = q log(q/p)
    skew_forward_kl   KL(p, m),  m = s p + (1-s) q                w = -(1-s) p q / m
    skew_reverse_kl   KL(q, m),  m = (1-s) p + s q                w = q (log(q/m) - s q/m)
    jsd               b KL(p, m) + (1-b) KL(q, m),                w = (1-b) q log(q/m)
                      m = b p + (1-b) q
    tvd               1/2 sum |p - q|                             w = 1/2 q sign(q - p)

Skew divergences: Ko et al., DistiLLM, arXiv 2402.03898. Generalised JSD and its ends (b = 0 is forward KL, b = 1
reverse KL: the limits of D/b and D/(1-b)):
Agarwal et al., GKD, arXiv 2306.13649. TVD: Wen et al., f-DISTILL, arXiv 2307.15190.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import RowDivergence
from ..suggest import unknown_name

ValueAndWeight = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


def _log_mixture(log_a: Tensor, log_b: Tensor, share_of_a: float) -> Tensor:
    """log(share * a + (1 - share) * b), exact at both ends."""
    if share_of_a <= 0.0:
        return log_b
    if share_of_a >= 1.0:
        return log_a
    return torch.logaddexp(log_a + math.log(share_of_a), log_b + math.log1p(-share_of_a))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _forward_kl(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
    return _kl(log_p, log_q), -log_p.exp()


def _reverse_kl(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
    weight = log_q.exp() * (log_q - log_p)
    return weight.sum(-1), weight


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
    log_m = _log_mixture(log_p, log_q, skew)
    return _kl(log_p, log_m), -(1 - skew) * (log_p + (log_q - log_m)).exp()


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
    q, log_ratio = log_q.exp(), log_q - _log_mixture(log_q, log_p, skew)
    # q/m is at most 1/s, and unbounded for s = 0, where its term is gone.
    weight = q * log_ratio - skew * q * log_ratio.exp() if skew > 0 else q * log_ratio
    return (q * log_ratio).sum(-1), weight


def _jsd(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
    if beta == 0.0:
        return _forward_kl(log_p, log_q, skew, beta)
    if beta == 1.0:
        return _reverse_kl(log_p, log_q, skew, beta)
    log_m = _log_mixture(log_p, log_q, beta)
    weight = (1 - beta) * log_q.exp() * (log_q - log_m)
    return beta * _kl(log_p, log_m) + weight.sum(-1), weight


def _tvd(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    difference = q - log_p.exp()
    return 0.5 * difference.abs().sum(-1), 0.5 * q * difference.sign()


@dataclass(frozen=True)
class Divergence:
    """A registered divergence. `official_t_squared`: whether the SRD authors' code multiplies it by T^2."""

    name: str
    value_and_weight: ValueAndWeight
    official_t_squared: bool = True

    def bind(self, skew: float, beta: float) -> RowDivergence:
        """The row function at the given skew and beta."""
        return partial(self.value_and_weight, skew=skew, beta=beta)  # type: ignore[call-arg]


_REGISTRY = {
    d.name: d
    for d in (
        Divergence("forward_kl", _forward_kl),
        Divergence("reverse_kl", _reverse_kl, official_t_squared=False),
        Divergence("skew_forward_kl", _skew_forward_kl, official_t_squared=False),
        Divergence("skew_reverse_kl", _skew_reverse_kl),
        Divergence("jsd", _jsd),
        Divergence("tvd", _tvd, official_t_squared=False),
    )
}


def divergence_names() -> list[str]:
    """Names that `divergence=` takes, in alphabetical order."""
    return sorted(_REGISTRY)


def get_divergence(name: str) -> Divergence:
    """Look a divergence up. Raises UserError with the list of names for an unknown one."""
    try:
        return _REGISTRY[name]
    except (KeyError, TypeError):
        raise UserError(unknown_name("divergence", name, divergence_names())) from None


def _weight_by_autograd(value: Callable[..., Tensor]) -> ValueAndWeight:
    def value_and_weight(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = log_q.detach().clone().requires_grad_(True)
            rows = value(log_p.detach().clone(), leaf, skew=skew, beta=beta)
            (weight,) = torch.autograd.grad(rows.sum(), leaf)
        return rows.detach(), weight

    return value_and_weight


def register_divergence(
    name: str,
    value: Callable[..., Tensor],
    weight: Callable[..., Tensor] | None = None,
    *,
    replace: bool = False,
) -> None:
    """Add a divergence under `name`, usable at once as `divergence=name`.

    Args:
        name: a new name; an existing one only with `replace=True`.
        value: `value(log_p, log_q, *, skew, beta)` -> D of each row, [N] in nats, from teacher and student
            log-probabilities [N, V] at the temperature of the loss.
        weight: `weight(log_p, log_q, *, skew, beta)` -> w = dD/d(log q), [N, V]. Left out, autograd derives it.

    Example:
        >>> import torch
        >>> register_divergence("squared", lambda log_p, log_q, *, skew, beta:
        ...     ((log_p.exp() - log_q.exp()) ** 2).sum(-1), replace=True)
        >>> "squared" in divergence_names()
        True
    """
    if name in _REGISTRY and not replace:
        raise UserError(f"divergence {name!r} exists already; pass replace=True or take another name")
    if weight is None:
        value_and_weight = _weight_by_autograd(value)
    else:
        given = weight

        def value_and_weight(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
            return value(log_p, log_q, skew=skew, beta=beta), given(log_p, log_q, skew=skew, beta=beta)

    _REGISTRY[name] = Divergence(name, value_and_weight)
