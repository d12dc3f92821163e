"""The row loss in eager PyTorch: the backend that runs everywhere, and the one others are measured against.

Shape letters: C rows of a chunk, V classes, S student, T teacher, K classes that both have.

With x = z_S / t and q = softmax(x), let w = dD / d(log q) with every log q_v taken as independent. Then

    dD/dx_v = w_v - q_v * sum(w)          and          d(log q)/dz = (d(log q)/dx) / t

so a divergence is fully described by its value and its w; adding any multiple of q to w changes nothing.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Stands in for -inf: large enough that exp() gives exactly 0, small enough that differences stay finite.
LOGIT_FLOOR = -1e30


class RowDivergence(Protocol):
    """A divergence D(p, q) between teacher p and student q, per row."""

    def __call__(self, log_p_CK: Tensor, log_q_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence of each row, [C] in nats, and w = dD/d(log q), [C, K]."""


class RowCoefficients(NamedTuple):
    """loss of a row = `cross_entropy` * CE + `divergence` * D(p, q), with p, q at `temperature`."""

    cross_entropy: float
    divergence: float
    temperature: float


class RowValues(NamedTuple):
    """Per-row values, each [C] in nats and without weights: D at the temperature, CE and entropy at temperature 1."""

    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor


def _softcap(logits_CV: Tensor, softcap: float | None) -> Tensor:
    return logits_CV if softcap is None else softcap * torch.tanh(logits_CV / softcap)


def _log_softmax(logits_CV: Tensor) -> Tensor:
    return torch.log_softmax(logits_CV.clamp(min=LOGIT_FLOOR), dim=-1)


def distillation_rows(
    student_logits_CV: Tensor,
    teacher_logits_CV: Tensor | None,
    labels_C: Tensor,
    divergence: RowDivergence | None,
    coefficients: RowCoefficients,
    *,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_weights_C: Tensor | None = None,
    gradient: bool = True,
) -> RowValues:
    """Divergence, cross-entropy and entropy of each row; the gradient replaces `student_logits_CV` in place.

    Args:
        student_logits_CV: [C, V_S], before the softcap, any float dtype. With `gradient`, overwritten by
            row_weight * d(loss of the row)/d(these logits).
        teacher_logits_CV: [C, V_T] or None for cross-entropy and entropy alone. Where V_T != V_S (padded
            vocabularies) the divergence is taken over the first min(V_S, V_T) classes, renormalised.
        labels_C: [C] class indices below V_S.
        divergence: value and weight of D on log-probabilities; None if and only if there is no teacher.
        coefficients: what a row's loss is made of.
        student_softcap, teacher_softcap: c in c * tanh(z / c), applied to the logits first (Gemma 2).
        row_weights_C: [C] factor on each row's gradient; the returned values are not weighted.
        gradient: False leaves the logits as they are and saves the work.
    """
    compute = torch.promote_types(student_logits_CV.dtype, torch.float32)
    z_S = _softcap(student_logits_CV.to(compute), student_softcap)
    log_q1 = _log_softmax(z_S)
    q1 = log_q1.exp()
    cross_entropy_C = -log_q1.gather(1, labels_C[:, None]).squeeze(1)
    entropy_C = -(q1 * log_q1).sum(-1)

    weight_CK: Tensor | None = None
    if teacher_logits_CV is None or divergence is None:
        divergence_C = torch.zeros_like(cross_entropy_C)
    else:
        common = min(student_logits_CV.shape[1], teacher_logits_CV.shape[1])
        t = coefficients.temperature
        log_p = _log_softmax(_softcap(teacher_logits_CV[:, :common].to(compute), teacher_softcap) / t)
        same = t == 1.0 and common == z_S.shape[1]
        log_q = log_q1 if same else _log_softmax(z_S[:, :common] / t)
        divergence_C, weight_CK = divergence(log_p, log_q)
    values = RowValues(divergence_C, cross_entropy_C, entropy_C)
    if not gradient:
        return values

    g_CV = q1.scatter_add_(1, labels_C[:, None], torch.full_like(cross_entropy_C, -1.0)[:, None])
    g_CV *= coefficients.cross_entropy
    if weight_CK is not None:
        share = coefficients.divergence / coefficients.temperature
        g_CV[:, : weight_CK.shape[1]] += share * (weight_CK - log_q.exp() * weight_CK.sum(-1, keepdim=True))
    if student_softcap is not None:
        g_CV *= 1 - (z_S / student_softcap).square()
    if row_weights_C is not None:
        g_CV *= row_weights_C[:, None]
    student_logits_CV.copy_(g_CV)
    return values
