"""Inputs and outputs of row functions, and the numbers that all rows of a loss share.

Shape letters: C rows of a chunk, R rows of a block.
"""

import functools
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .divergences import RowDivergence
from .passes import Caps


class RowCoefficients(NamedTuple):
    """The loss of a row: `cross_entropy` * CE + `divergence` * D(p, q), with p and q at `temperature`.

    Attributes:
        cross_entropy: weight of the cross-entropy.
        divergence: weight of D.
        temperature: T, above 0, of both softmaxes in D.
    """

    cross_entropy: float
    divergence: float
    temperature: float


class RowValues(NamedTuple):
    """Values of each row in nats, without weights.

    Attributes:
        divergence: [C] D at the temperature.
        cross_entropy: [C] at temperature 1.
        entropy: [C] of the student, at temperature 1.
    """

    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor


class RowBackend(Protocol):
    """The signature of `distillation_rows` and its equivalents on other backends."""

    def __call__(
        self,
        student_logits_CV: Tensor,
        teacher_logits_CV: Tensor | None,
        labels_C: Tensor,
        divergence: RowDivergence | None,
        coefficients: RowCoefficients,
        *,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        row_weights_C: Tensor | None = None,
        gradient_CV: Tensor | None = None,
    ) -> RowValues:
        """See `distillation_rows`."""


class RowNumbers:
    """The numbers that all rows of a loss share, in the form that its passes in PyTorch take.

    Args:
        divergence: D, or None.
        coefficients: weights of cross-entropy and D, and the temperature.
        softcaps: softcaps of the student's and the teacher's logits, each above 0 or None.
        compute: dtype of the sums.
        device: where the rows are.
    """

    def __init__(
        self,
        divergence: RowDivergence | None,
        coefficients: RowCoefficients,
        softcaps: tuple[float | None, float | None],
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        self.divergence, self.coefficients, self.compute = divergence, coefficients, compute
        t = coefficients.temperature
        self.temperature_kind = "one" if t == 1 else "two" if t == 2 else "other"
        # As tensors, because a compiled function would be specialised to the value of a Python float.
        number = functools.partial(torch.full, (), dtype=compute, device=device)
        self.inverse_t = number(1 / t)
        of_student, of_teacher = (None if cap is None else number(cap) for cap in softcaps)
        self.caps: Caps = (of_student, of_teacher)
        if divergence is not None:
            self.skew, self.beta = number(divergence.skew), number(divergence.beta)

    def factors(self, weights_R1: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Find the factors of the gradients of cross-entropy and D on each row.

        Args:
            weights_R1: [R, 1] weights of rows, or None for 1.
            like: [R, 1] of the compute dtype.

        Returns:
            a and b, each [R, 1].
        """
        weight = torch.ones_like(like) if weights_R1 is None else weights_R1.to(like.dtype)
        return weight * self.coefficients.cross_entropy, weight * self.coefficients.divergence * self.inverse_t

    def factor_of_power(self, a_R1: Tensor, log_sum_t: Tensor, log_sum_1: Tensor) -> Tensor:
        """Find the factor of q_1 where it is computed as a power of q.

        Args:
            a_R1: [R, 1] factor of q_1.
            log_sum_t: [R, 1] logarithm of the sum at the temperature.
            log_sum_1: [R, 1] the same at temperature 1, relative to the same maximum.

        Returns:
            a times the ratio of the two normalising constants; a itself at temperatures where q_1 is not a power of q.
        """
        power = {"one": 1, "two": 2, "other": 0}[self.temperature_kind]
        return a_R1 * (power * log_sum_t - log_sum_1).exp() if power else a_R1

    def slope(self, z: Tensor) -> Tensor | float:
        """Find the derivative of the student's softcap.

        Args:
            z: the logits after the softcap.

        Returns:
            The derivative at each of them.
        """
        cap = self.caps[0]
        return 1.0 if cap is None else 1 - (z / cap).square()
