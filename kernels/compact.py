"""The common part of rows whose teacher is known at few classes, for whole rows and for blocks of classes.

Shape letters: C rows of a chunk, R rows, K classes that a row's teacher is known at, B = K + 1 buckets, V classes, P
pieces of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .passes import logits, merge, tempered_statistics


@dataclass(frozen=True)
class SparseDivergence:
    """D of C rows whose teacher is known at K classes a row, as a function of the student's probabilities there.

    A subclass sets `apart`: whether each of the K classes, all distinct, is a bucket, and all other classes are one
    more. Otherwise the last bucket is all V classes.

    Args:
        ids_CK: [C, K] int64, the classes, or None for none.
    """

    ids_CK: Tensor | None
    apart: ClassVar[bool]

    def rows(self, part: slice) -> "SparseDivergence":
        """Take the part of every tensor that belongs to some of the rows.

        Args:
            part: the rows.

        Returns:
            The divergence of these rows.
        """
        return replace(self, **{name: x[part] for name, x in vars(self).items() if isinstance(x, Tensor)})

    def __call__(self, log_q_CB: Tensor, log_sum_C1: Tensor) -> tuple[Tensor, Tensor]:
        """Compute D and its gradient on x = z/T, for each class and for the last bucket.

        The last bucket's gradient is the sum over its classes; the caller distributes it over them in proportion to q.

        Args:
            log_q_CB: [C, K + 1] log-probabilities at T of the classes and of the last bucket.
            log_sum_C1: [C, 1] logarithm of the sum of e^(z/T) over all V classes.

        Returns:
            D [C, 1] in nats, and dD/dx [C, K + 1].
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CompactSums:
    """Sums over the logits of some rows, and D. All are [R, 1], except the last two.

    "rest" means all classes, without the K ones if the divergence has them apart. log_sum_1: logarithm of the sum of
    e^(z - max_1) at temperature 1 over all classes; log_sum_beside_rest: the same relative to max_rest.
    log_sum_rest: of e^((z - max_rest)/T) over the rest. z_RK: logits of the K classes. gradient_RB: dD/d(z/T).
    """

    max_1: Tensor
    log_sum_1: Tensor
    entropy: Tensor
    max_rest: Tensor
    log_sum_rest: Tensor
    log_sum_beside_rest: Tensor
    divergence: Tensor
    z_RK: Tensor
    gradient_RB: Tensor

    def gradient_on_ids(self, is_label_RK: Tensor, a_R1: Tensor, b_R1: Tensor, cap: Tensor | None) -> Tensor:
        """The gradient on the K classes, [R, K]. a_R1, b_R1: factors of the cross-entropy and of D's gradient."""
        g_RK = a_R1 * ((self.z_RK - self.max_1 - self.log_sum_1).exp() - is_label_RK.to(a_R1.dtype))
        g_RK = g_RK + b_R1 * self.gradient_RB[:, :-1]
        return g_RK if cap is None else g_RK * (1 - (self.z_RK / cap).square())


def compact_sums(
    pieces_RP: Sequence[Tensor],
    ids_RK: Tensor,
    divergence: SparseDivergence,
    cap: Tensor | None,
    inverse_t: Tensor,
    temperature_kind: str,
) -> CompactSums:
    """Join the pieces of rows with the classes that they left out, and compute D.

    Args:
        pieces_RP: the result of `tempered_statistics`: maxima, and sums of e, of e (z - max) and at T; each [R, P].
        ids_RK: [R, K] the stored logits of the K classes.
        divergence: of these rows.
        cap: softcap of the logits, or None.
        inverse_t: 1 / T.
        temperature_kind: "one", "two" or "other".

    Returns:
        The sums.
    """
    max_RP, s_RP, a_RP, s_t_RP = pieces_RP
    max_rest, s_t = merge(max_RP, inverse_t, s_t_RP)
    log_sum_rest = s_t.log()
    if divergence.apart:
        known = tempered_statistics(ids_RK[:, None], cap, inverse_t, temperature_kind, False)
        max_RP, s_RP, a_RP, s_t_RP = (torch.cat(both, 1) for both in zip(pieces_RP, known))
    _, s_t = merge(max_RP, inverse_t, s_t_RP)
    log_sum_t = s_t.log()
    max_1, s, a = merge(max_RP, 1.0, s_RP, a_RP)
    log_sum_1 = s.log()
    z_RK = logits(ids_RK, cap)
    log_q_RK = (z_RK - max_1) * inverse_t - log_sum_t
    log_q_rest = (max_rest - max_1) * inverse_t + (log_sum_rest - log_sum_t)
    value, gradient_RB = divergence(torch.cat((log_q_RK, log_q_rest), 1), max_1 * inverse_t + log_sum_t)
    return CompactSums(
        max_1, log_sum_1, log_sum_1 - a / s, max_rest, log_sum_rest, log_sum_1 + (max_1 - max_rest), value, z_RK,
        gradient_RB,
    )  # fmt: skip
