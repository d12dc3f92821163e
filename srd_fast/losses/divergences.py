"""The registry of divergences D(p, q) between teacher p and student q, to which users can add their own.

The formulas, their sources and their kernels are in `srd_fast.kernels.divergences`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import FORMULAS, RowDivergence
from ..registry import Registry

ValueAndWeight = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
# The divergences that the SRD authors' code does not multiply by T^2.
_OFFICIALLY_UNSCALED = ("reverse_kl", "skew_forward_kl", "tvd")


@dataclass(frozen=True)
class Divergence:
    """A registered divergence.

    value_and_weight: (log_p, log_q, skew, beta) -> D and w for whole rows, or None for one of the built-in formulas.
    official_t_squared: whether the SRD authors' code multiplies it by T^2.
    """

    name: str
    value_and_weight: ValueAndWeight | None = None
    official_t_squared: bool = True

    def bind(self, skew: float, beta: float) -> RowDivergence:
        """The row loss's divergence at the given skew and beta."""
        function = self.value_and_weight
        if function is None:
            return RowDivergence.of(self.name, skew, beta)
        return RowDivergence(None, skew, beta, lambda log_p, log_q: function(log_p, log_q, skew, beta))


# Names of other libraries, and those of DistiLLM's and SRD's code.
_SYNONYMS = {
    **dict.fromkeys(("kl", "kld", "kl_div", "fkl", "tfkl", "kl_divergence"), "forward_kl"),
    **dict.fromkeys(("rkl", "trkl", "kl_reverse"), "reverse_kl"),
    **dict.fromkeys(("sfkl", "tsfkl", "skl", "skew_kl"), "skew_forward_kl"),
    **dict.fromkeys(("srkl", "tsrkl"), "skew_reverse_kl"),
    **dict.fromkeys(("js", "tjsd", "jensen_shannon"), "jsd"),
    **dict.fromkeys(("tv", "ttvd", "total_variation"), "tvd"),
    "akl": "adaptive_kl",
}
DIVERGENCES = Registry(
    "divergence",
    {name: Divergence(name, official_t_squared=name not in _OFFICIALLY_UNSCALED) for name in FORMULAS},
    synonyms=_SYNONYMS,
)


def divergence_names() -> list[str]:
    """Names that `divergence=` takes.

    Returns:
        All names, in alphabetical order.
    """
    return DIVERGENCES.names()


def get_divergence(name: str) -> Divergence:
    """Look up a divergence.

    Raises:
        UserError: for an unknown name, with the list of names.
    """
    return DIVERGENCES.get(name)


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
    """Add a divergence under `name`, usable at once as `divergence=name`, in eager PyTorch.

    Args:
        name: a new name; an existing one only with `replace=True`.
        value: `value(log_p, log_q, *, skew, beta)` -> D of each row, [N] in nats, from teacher and student
            log-probabilities [N, V] at the temperature of the loss.
        weight: `weight(log_p, log_q, *, skew, beta)` -> w = dD/d(log q), [N, V]. Left out, autograd derives it.
        replace: whether an existing divergence of this name is replaced.

    Raises:
        UserError: the name is taken, or is not text.

    Examples:
        >>> import torch
        >>> register_divergence("squared", lambda log_p, log_q, *, skew, beta:
        ...     ((log_p.exp() - log_q.exp()) ** 2).sum(-1), replace=True)
        >>> "squared" in divergence_names()
        True
    """
    if weight is None:
        value_and_weight = _weight_by_autograd(value)
    else:
        given = weight

        def value_and_weight(log_p: Tensor, log_q: Tensor, skew: float, beta: float) -> tuple[Tensor, Tensor]:
            return value(log_p, log_q, skew=skew, beta=beta), given(log_p, log_q, skew=skew, beta=beta)

    DIVERGENCES.register(name, Divergence(name, value_and_weight), replace=replace)
