"""The row loss as one Triton kernel: online statistics in one read of the logits, the gradient after one more.

Shape letters: C rows of a chunk, V classes, S student, T teacher, K classes that both have.

For one row, with z the logits, M their maximum and S(t) = sum exp((z - M) / t), every log-probability is
(z - M)/t - ln S(t): the maximum is subtracted from raw logits first, so nothing of the size of a logit is ever rounded.

Pass 1 keeps, in every lane of a block, a running maximum m and sums relative to it. A new logit z moves them by
e = exp(-|z - m| / t), the only exponential it costs: where z is the new maximum the old sums shrink by e, else z
contributes e. Lanes are merged once, after the loop. The exponential at t = 1, for cross-entropy and entropy, is e at
T = 1, its square at T = 2, and a second exponential at any other T. Along with S the lanes carry

    A = sum e (z - m)              entropy = ln S - A/S at t = 1
    B = sum e (z_other - m_other)  one-read divergences: KL = (A - B)/(S t) - ln S + ln S_other

Two-read divergences need sum(w) before the first gradient element, so a second pass accumulates D and sum(w).
The last pass writes  g = a (softmax(z) - onehot) + b/t (w - q sum(w)).  Passes run in alternating directions: the end
of one is still in the L2 cache when the next begins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergences import FORMULAS, RowDivergence
from .rows import ALIGNMENT, LOGIT_FLOOR, RowCoefficients, RowValues

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(LOGIT_FLOOR)
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_logits(pointer, offsets, limit, readable, softcap, SOFTCAP: tl.constexpr):
    """Logits as float32 after the softcap, -1e30 from `limit` on and for -inf. `readable` and beyond is not touched."""
    z = tl.load(pointer + offsets, mask=offsets < readable, other=FLOOR).to(tl.float32)
    if SOFTCAP:
        # tanh(x) = (1 - u) / (1 + u) with u = exp(-2 |x|), which loses nothing where x is large.
        x = z / softcap
        u = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        tanh = (1 - u) / (1 + u)
        z = tl.where(x < 0, -tanh, tanh) * softcap
    # A NaN stays one: training must see it.
    z = tl.maximum(z, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(offsets < limit, z, FLOOR)


@triton.jit
def row_kernel(
    student_ptr,
    teacher_ptr,
    gradient_ptr,
    labels_ptr,
    weights_ptr,
    divergence_ptr,
    cross_entropy_ptr,
    entropy_ptr,
    student_stride,
    teacher_stride,
    gradient_stride,
    V,
    K,
    student_readable,
    teacher_readable,
    temperature,
    cross_entropy_coefficient,
    divergence_coefficient,
    skew,
    beta,
    student_softcap,
    teacher_softcap,
    PAIR: tl.constexpr,
    SIDE: tl.constexpr,
    TEACHER: tl.constexpr,
    T_KIND: tl.constexpr,
    PADDED: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. See the module's text for the sums.

    PAIR: a divergence's (value, weight) function. SIDE: whose sums give a one-read divergence, 1 teacher (forward KL),
    2 student (reverse KL), 0 for two reads. T_KIND: 1 or 2 for these temperatures, 0 for any other. PADDED: V > K.
    *_readable: columns of a row, from V or K up, that may be read, and in the gradient written.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    gradient_ptr += row * gradient_stride
    label = tl.load(labels_ptr + row)
    lanes = tl.arange(0, BLOCK)
    c = 1.0 / temperature * LOG2E
    num_blocks = tl.cdiv(V, BLOCK)

    # Student sums: mS; s at T over K classes, s1 at T = 1 over V, a1 = A at T = 1. Teacher sums: mT, t. a, b: A and B.
    m_S = tl.full([BLOCK], FLOOR, tl.float32)
    s1 = tl.zeros([BLOCK], tl.float32)
    a1 = tl.zeros([BLOCK], tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    m_K = tl.full([BLOCK], FLOOR, tl.float32)
    m_T = tl.full([BLOCK], FLOOR, tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    for block in range(0, num_blocks):
        offsets = block * BLOCK + lanes
        z_S = load_logits(student_ptr, offsets, V, student_readable, student_softcap, STUDENT_SOFTCAP)
        up = z_S > m_S
        d = tl.abs(z_S - m_S)
        if T_KIND == 1 or not TEACHER:
            e1 = tl.exp2(-d * LOG2E)
            e = e1
        elif T_KIND == 2:
            e = tl.exp2(-d * c)
            e1 = e * e
        else:
            e = tl.exp2(-d * c)
            e1 = tl.exp2(-d * LOG2E)
        a1 = tl.where(up, (a1 - s1 * d) * e1, a1 - e1 * d)
        s1 = tl.where(up, s1 * e1 + 1, s1 + e1)
        if TEACHER:
            z_T = load_logits(teacher_ptr, offsets, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP)
            if PADDED:
                z_K = tl.where(offsets < K, z_S, FLOOR)
                up_K = z_K > m_K
                d_K = tl.abs(z_K - m_K)
                e_K = tl.exp2(-d_K * c)
            else:
                z_K = z_S
                up_K = up
                d_K = d
                e_K = e
            up_T = z_T > m_T
            d_T = tl.abs(z_T - m_T)
            e_T = tl.exp2(-d_T * c)
            old_m = m_S
            if PADDED:
                old_m = m_K
            new_K = tl.maximum(old_m, z_K)
            new_T = tl.maximum(m_T, z_T)
            if SIDE == 1:
                # The student's maximum moves by d_K where up_K: every old term of B gets that much smaller.
                b = tl.where(up_K, b - t * d_K, b)
                b = tl.where(up_T, b * e_T + (z_K - new_K), b + e_T * (z_K - new_K))
                a = tl.where(up_T, (a - t * d_T) * e_T, a - e_T * d_T)
            if SIDE == 2:
                b = tl.where(up_T, b - s * d_T, b)
                b = tl.where(up_K, b * e_K + (z_T - new_T), b + e_K * (z_T - new_T))
                a = tl.where(up_K, (a - s * d_K) * e_K, a - e_K * d_K)
            s = tl.where(up_K, s * e_K + 1, s + e_K)
            t = tl.where(up_T, t * e_T + 1, t + e_T)
            m_T = new_T
            if PADDED:
                m_K = new_K
        m_S = tl.maximum(m_S, z_S)

    M_S = tl.max(m_S, axis=0)
    f1 = tl.exp2((m_S - M_S) * LOG2E)
    S1 = tl.sum(s1 * f1, axis=0)
    log_S1 = tl.log2(S1) * LN2
    A1 = tl.sum((a1 + s1 * (m_S - M_S)) * f1, axis=0)
    z_label = load_logits(student_ptr, label, V, student_readable, student_softcap, STUDENT_SOFTCAP)
    tl.store(cross_entropy_ptr + row, log_S1 - (z_label - M_S))
    tl.store(entropy_ptr + row, log_S1 - A1 / S1)

    D = 0.0
    W = 0.0
    M_K = M_S
    M_T = M_S
    log_S = log_S1
    log_T = log_S1
    if TEACHER:
        if not PADDED:
            m_K = m_S
        M_K = tl.max(m_K, axis=0)
        M_T = tl.max(m_T, axis=0)
        f_K = tl.exp2((m_K - M_K) * c)
        f_T = tl.exp2((m_T - M_T) * c)
        S_K = tl.sum(s * f_K, axis=0)
        S_T = tl.sum(t * f_T, axis=0)
        log_S = tl.log2(S_K) * LN2
        log_T = tl.log2(S_T) * LN2
        if SIDE == 1:
            A = tl.sum((a + t * (m_T - M_T)) * f_T, axis=0)
            B = tl.sum((b + t * (m_K - M_K)) * f_T, axis=0)
            D = (A - B) / (S_T * temperature) - log_T + log_S
            W = -1.0
        if SIDE == 2:
            A = tl.sum((a + s * (m_K - M_K)) * f_K, axis=0)
            B = tl.sum((b + s * (m_T - M_T)) * f_K, axis=0)
            D = (A - B) / (S_K * temperature) - log_S + log_T
            W = D
        if SIDE == 0:
            value = tl.zeros([BLOCK], tl.float32)
            weight = tl.zeros([BLOCK], tl.float32)
            for i in range(0, num_blocks):
                offsets = (num_blocks - 1 - i) * BLOCK + lanes
                z_S = load_logits(student_ptr, offsets, V, student_readable, student_softcap, STUDENT_SOFTCAP)
                z_T = load_logits(teacher_ptr, offsets, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP)
                inside = offsets < K
                log_q = tl.where(inside, (z_S - M_K) / temperature - log_S, FLOOR)
                log_p = tl.where(inside, (z_T - M_T) / temperature - log_T, FLOOR)
                v, w = PAIR(log_p, log_q, tl.exp2(log_p * LOG2E), tl.exp2(log_q * LOG2E), skew, beta)
                value += v
                weight += w
            D = tl.sum(value, axis=0)
            W = tl.sum(weight, axis=0)
        tl.store(divergence_ptr + row, D)

    if GRADIENT:
        factor = 1.0
        if WEIGHTS:
            factor = tl.load(weights_ptr + row)
        ce = cross_entropy_coefficient * factor
        div = divergence_coefficient / temperature * factor
        for i in range(0, num_blocks):
            offsets = (num_blocks - 1 - i) * BLOCK + lanes
            if SIDE == 0 and TEACHER:
                offsets = i * BLOCK + lanes
            z_S = load_logits(student_ptr, offsets, V, student_readable, student_softcap, STUDENT_SOFTCAP)
            g = tl.zeros([BLOCK], tl.float32)
            if TEACHER:
                z_T = load_logits(teacher_ptr, offsets, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP)
                log_q = (z_S - M_K) / temperature - log_S
                log_p = (z_T - M_T) / temperature - log_T
                if PADDED:
                    log_q = tl.where(offsets < K, log_q, FLOOR)
                    log_p = tl.where(offsets < K, log_p, FLOOR)
                q = tl.exp2(log_q * LOG2E)
                v, w = PAIR(log_p, log_q, tl.exp2(log_p * LOG2E), q, skew, beta)
                g = div * (w - q * W)
            if CROSS_ENTROPY:
                if TEACHER and T_KIND == 1 and not PADDED:
                    q1 = q
                elif TEACHER and T_KIND == 2 and not PADDED:
                    # q = exp(y/2)/S and q1 = exp(y)/S1: the square of q, rescaled.
                    q1 = q * q * tl.exp2((2 * log_S - log_S1) * LOG2E)
                else:
                    q1 = tl.exp2(((z_S - M_S) - log_S1) * LOG2E)
                g += ce * (q1 - tl.where(offsets == label, 1.0, 0.0))
            if STUDENT_SOFTCAP:
                u = z_S / student_softcap
                g *= 1 - u * u
            tl.store(gradient_ptr + offsets, g.to(gradient_ptr.dtype.element_ty), mask=offsets < student_readable)


def launch_options(V: int) -> dict[str, int]:
    """Block of classes and warps of a program for rows of V classes."""
    block = min(2048, triton.next_power_of_2(V))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


def _readable(logits: Tensor, padding_is_scratch: bool) -> int:
    """Columns of a row that the kernel may touch: with scratch behind each row, up to the next aligned one."""
    classes, stride = logits.shape[1], logits.stride(0)
    aligned = -(-classes // ALIGNMENT) * ALIGNMENT
    return aligned if padding_is_scratch and stride >= aligned else classes


def distillation_rows_triton(
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
    padding_is_scratch: bool = False,
) -> RowValues:
    """`distillation_rows` as one kernel launch, for float32, bfloat16 and float16 logits with contiguous rows.

    padding_is_scratch: where a row's stride goes beyond its classes, the rest of it may be read and, in `gradient_CV`,
    written. Such rows are read 128 bits at a time whatever V is.
    """
    C, V = student_logits_CV.shape
    device = student_logits_CV.device
    # A dummy stands for what is switched off: the kernel never touches it.
    teacher = student_logits_CV if teacher_logits_CV is None else teacher_logits_CV
    gradient = student_logits_CV if gradient_CV is None else gradient_CV
    weights = labels_C if row_weights_C is None else row_weights_C.to(torch.float32).contiguous()
    K = min(V, teacher.shape[1])
    formula = FORMULAS["forward_kl"] if divergence is None or divergence.formula is None else divergence.formula
    values = RowValues(*(torch.zeros(C, dtype=torch.float32, device=device) for _ in range(3)))
    if C == 0:
        return values
    readable = _readable(student_logits_CV, padding_is_scratch)
    if gradient_CV is not None:
        readable = min(readable, _readable(gradient_CV, padding_is_scratch))
    row_kernel[(C,)](
        student_logits_CV,
        teacher,
        gradient,
        labels_C.contiguous(),
        weights,
        values.divergence,
        values.cross_entropy,
        values.entropy,
        student_logits_CV.stride(0),
        teacher.stride(0),
        gradient.stride(0),
        V,
        K,
        readable,
        K if teacher.shape[1] != K else _readable(teacher, padding_is_scratch),
        float(coefficients.temperature),
        float(coefficients.cross_entropy),
        float(coefficients.divergence),
        0.0 if divergence is None else divergence.skew,
        0.0 if divergence is None else divergence.beta,
        1.0 if student_softcap is None else student_softcap,
        1.0 if teacher_softcap is None else teacher_softcap,
        PAIR=formula.triton,
        SIDE={"teacher": 1, "student": 2, None: 0}[formula.one_read],
        TEACHER=teacher_logits_CV is not None,
        T_KIND={1.0: 1, 2.0: 2}.get(float(coefficients.temperature), 0),
        PADDED=V > K,
        STUDENT_SOFTCAP=student_softcap is not None,
        TEACHER_SOFTCAP=teacher_softcap is not None,
        WEIGHTS=row_weights_C is not None,
        CROSS_ENTROPY=teacher_logits_CV is None or coefficients.cross_entropy != 0,
        GRADIENT=gradient_CV is not None,
        **launch_options(V),
    )
    return values
