"""The row loss in eager PyTorch: each softmax is computed once, and all that follows is made of it.

Shape letters: R rows of a block, V classes.

Every operation is a pass over [R, V], so there are as few of them as possible, in place where a tensor is not needed
any more. `passes.py`, whose functions a compiler turns into loops, computes the same values of each class anew instead.

Sums are PyTorch's own, which adds in pairs; its fused `log_softmax` adds a row's terms one after the other, and its
error grows with V.
"""

import torch
from torch import Tensor

from .passes import logits
from .row_numbers import RowNumbers


def eager_block(
    numbers: RowNumbers,
    student_RV: Tensor,
    teacher_RV: Tensor | None,
    labels_R1: Tensor,
    weights_R1: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence, cross-entropy and entropy of a block of rows.

    Args:
        numbers: the divergence, its coefficients and the softcaps.
        student_RV: [R, V_S] before the softcap.
        teacher_RV: [R, V_T] before the softcap, or None.
        labels_R1: [R, 1] class indices.
        weights_R1: [R, 1] factor on each row's gradient, or None for 1.
        out: [R, V_S], `student_RV` itself or None: receives the gradient.

    Returns:
        Three tensors, each [R, 1].
    """
    cap, divergence = numbers.caps[0], numbers.divergence
    z, tempered = _below_maximum(student_RV, cap), None
    if teacher_RV is not None and divergence is not None:
        classes = min(student_RV.shape[1], teacher_RV.shape[1])
        if classes < student_RV.shape[1]:
            tempered = _below_maximum(student_RV[:, :classes], cap).mul_(numbers.inverse_t)
        elif numbers.temperature_kind != "one":
            tempered = z * numbers.inverse_t
    log_q_1, q_1 = _softmax(z)
    cross_entropy = -log_q_1.gather(1, labels_R1)
    entropy = -(q_1 * log_q_1).sum(-1, keepdim=True)
    a_R1, b_R1 = numbers.factors(weights_R1, cross_entropy)
    if teacher_RV is None or divergence is None:
        value, g = torch.zeros_like(entropy), q_1.mul_(a_R1)
    else:
        log_q, q = (log_q_1, q_1) if tempered is None else _softmax(tempered)
        del log_q_1, z, tempered
        z = _below_maximum(teacher_RV[:, :classes], numbers.caps[1])
        log_p, p = _softmax(z if numbers.temperature_kind == "one" else z.mul_(numbers.inverse_t))
        value_R, w = divergence(log_p, log_q, p, q)
        value = value_R[:, None]
        if out is None:
            return value, cross_entropy, entropy
        del z, log_p, p, log_q
        g = torch.addcmul(w, q, w.sum(-1, keepdim=True), value=-1).mul_(b_R1)
        if classes == student_RV.shape[1]:
            g.addcmul_(q_1, a_R1)
        else:
            of_all = q_1.mul_(a_R1)
            of_all[:, :classes] += g
            g = of_all
    if out is not None:
        g.scatter_add_(1, labels_R1, -a_R1)
        if cap is not None:
            g *= numbers.slope(logits(student_RV, cap))
        out.copy_(g)
    return value, cross_entropy, entropy


def _below_maximum(stored: Tensor, cap: Tensor | None) -> Tensor:
    """Logits less their row's maximum, in a tensor of their own."""
    z = logits(stored, cap)
    return z.sub_(z.amax(-1, keepdim=True))


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and probabilities. z: logits less their maximum; overwritten.

    The probabilities are the exponentials of the rounded log-probabilities, not quotients by the sum: an error that is
    in both alike, as that of the sum's logarithm, cancels in most divergences.
    """
    p = z.exp()
    z -= p.sum(-1, keepdim=True).log_()
    return z, torch.exp(z, out=p)
