"""The row loss as one Triton kernel: online statistics in one read of the logits, the gradient after one more.

Shape letters: C rows of a chunk, V classes, S student, T teacher, K classes that both have.

For one row, with z the logits, M their maximum and S(t) = sum exp((z - M) / t), every log-probability is
(z - M)/t - ln S(t): the maximum is subtracted from raw logits first, so nothing of the size of a logit is ever rounded.

Pass 1 keeps the running sums of `triton_sums.py` for every thread. Along with S a thread carries

    A = sum e^(z - m) (z - m)                      entropy = ln S - A/S, at t = 1
    B = sum e ((z_S - o_S) - (z_T - o_T))          one-read divergences, e of the side that weighs the terms

from which KL = +-(B/S - (M_S - o_S) + (M_T - o_T))/t -+ ln S_S +- ln S_T, with o the label's logits or 0. The gradient
of reverse KL is q ((z_S - o_S) - (z_T - o_T) - B/S)/t: both terms rounded alike, and no logarithms of sums.

Two-read divergences need sum(w) before the first gradient element, so a second pass accumulates D and sum(w). Those
of `row_first.py` have their numbers of the row from that pass, and D from the last.
The last pass writes  g = a (softmax(z) - onehot) + b/t (w - q sum(w)).  Passes run in alternating directions: the end
of one is still in the L2 cache when the next begins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergences import FORMULAS, LN2, LOG2E, RowDivergence
from .pieces import ALIGNMENT
from .row_numbers import RowCoefficients, RowValues
from .triton_sums import (
    FLOOR,
    LOG2,
    SIDES,
    add_student,
    exponentials,
    formula_options,
    head_of,
    kind_of_temperature,
    load_logits,
    log_softmax,
    merged,
    powers,
    store_gradient,
)


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
    SUMS: tl.constexpr,
    SETTLE: tl.constexpr,
    HEAD: tl.constexpr,
    LOG2: tl.constexpr,
    SIDE: tl.constexpr,
    TEACHER: tl.constexpr,
    T_KIND: tl.constexpr,
    PADDED: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row. The text at the top of this file explains the sums.

    PAIR: a divergence's (value, weight) function. SUMS, SETTLE: what one needs first, or None; HEAD: whether SUMS takes
    where the teacher's head begins. LOG2: the logarithm it uses. SIDE: whose sums give a one-read
    divergence, 1 teacher (forward KL), 2 student (reverse KL), 0 for two reads. T_KIND: 1 or 2 for these temperatures,
    0 for any other. PADDED: V > K.
    *_readable: columns of a row, V or K or more, that may be read, and in the gradient written. WIDTH: lanes that take
    128 bits in the narrowest tensor. BLOCK: lanes in all.
    """
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    gradient_ptr += row * gradient_stride
    label = tl.load(labels_ptr + row).to(tl.int32)
    # Lanes as [GROUPS, WIDTH]: the WIDTH neighbours that a thread reads at once.
    GROUPS: tl.constexpr = BLOCK // WIDTH
    lanes = tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inverse_t = 1.0 / temperature
    c = inverse_t * LOG2E
    num_blocks = tl.cdiv(V, BLOCK)

    # Read before the reductions: their barriers keep the gradient, which may overwrite the label's logit, behind.
    one = tl.arange(0, 1)
    z_label = tl.sum(
        load_logits(student_ptr, label, one, V, student_readable, student_softcap, STUDENT_SOFTCAP), axis=0
    )
    if TEACHER and SIDE != 0:
        # What one-read divergences measure both sides from: one class, so that equal rows are exactly equal.
        at = tl.minimum(label, K - 1)
        at_S = load_logits(student_ptr, at, one, K, student_readable, student_softcap, STUDENT_SOFTCAP)
        at_T = load_logits(teacher_ptr, at, one, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP)
        finite = (at_S > FLOOR) & (at_T > FLOOR)
        origin = tl.sum(tl.where(finite, at_S, 0.0), axis=0)
        origin_T = tl.sum(tl.where(finite, at_T, 0.0), axis=0)

    # Student sums: s1 at T = 1 over V classes, relative to m_S, and a1; s at T over K classes, relative to m_K.
    # Teacher sums: t, relative to m_T. b: B.
    m_S = tl.full([GROUPS], FLOOR, tl.float32)
    s1 = tl.zeros([GROUPS], tl.float32)
    a1 = tl.zeros([GROUPS], tl.float32)
    m_K = tl.full([GROUPS], FLOOR, tl.float32)
    s = tl.zeros([GROUPS], tl.float32)
    m_T = tl.full([GROUPS], FLOOR, tl.float32)
    t = tl.zeros([GROUPS], tl.float32)
    b = tl.zeros([GROUPS], tl.float32)
    for block in range(0, num_blocks):
        first = block * BLOCK
        z_S = load_logits(student_ptr, first, lanes, V, student_readable, student_softcap, STUDENT_SOFTCAP)
        old = m_S
        m_S, s1, a1, e, shrink = add_student(z_S, m_S, s1, a1, c, T_KIND if TEACHER else 1)
        if TEACHER:
            z_T = load_logits(teacher_ptr, first, lanes, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP)
            m_T, e_T, shrink_T = exponentials(z_T, m_T, c)
            z_K = z_S
            if PADDED:
                z_K = tl.where(first + lanes < K, z_S, FLOOR)
                m_K, e, shrink = exponentials(z_K, m_K, c)
            elif T_KIND == 0:
                e, shrink = powers(z_S - m_S[:, None], old - m_S, c)
            if SIDE == 1:
                b = b * shrink_T + tl.sum(e_T * ((z_K - origin) - (z_T - origin_T)), axis=1)
            if SIDE == 2:
                b = b * shrink + tl.sum(e * ((z_K - origin) - (z_T - origin_T)), axis=1)
            s = s * shrink + tl.sum(e, axis=1)
            t = t * shrink_T + tl.sum(e_T, axis=1)

    M_S = tl.max(m_S, axis=0)
    S1 = merged(s1, m_S, M_S, LOG2E)
    log_S1 = tl.log2(S1) * LN2
    A1 = merged(a1 + s1 * (m_S - M_S), m_S, M_S, LOG2E)
    tl.store(cross_entropy_ptr + row, log_S1 - (z_label - M_S))
    tl.store(entropy_ptr + row, log_S1 - A1 / S1)

    D = 0.0
    W = 0.0
    M_K = M_S
    M_T = M_S
    log_S = log_S1
    log_T = log_S1
    number_a = 0.0
    number_b = 0.0
    number_c = 0.0
    value = tl.zeros([GROUPS], tl.float32)
    if TEACHER:
        if not PADDED:
            m_K = m_S
        M_K = tl.max(m_K, axis=0)
        M_T = tl.max(m_T, axis=0)
        S_K = merged(s, m_K, M_K, c)
        S_T = merged(t, m_T, M_T, c)
        log_S = tl.log2(S_K) * LN2
        log_T = tl.log2(S_T) * LN2
        if SIDE == 1:
            B = merged(b, m_T, M_T, c) / S_T
            D = (((M_K - origin) - (M_T - origin_T)) - B) * inverse_t + log_S - log_T
        if SIDE == 2:
            B = merged(b, m_K, M_K, c) / S_K
            D = (B - ((M_K - origin) - (M_T - origin_T))) * inverse_t - log_S + log_T
        if SIDE == 0:
            head = 0.0
            if HEAD:
                head = head_of(
                    teacher_ptr, lanes, K, teacher_readable, teacher_softcap, M_T, log_T, inverse_t, TEACHER_SOFTCAP
                )
            weight = tl.zeros([GROUPS], tl.float32)
            c_sum = tl.zeros([GROUPS], tl.float32)
            for i in range(0, num_blocks):
                first = (num_blocks - 1 - i) * BLOCK
                z_S = load_logits(student_ptr, first, lanes, K, student_readable, student_softcap, STUDENT_SOFTCAP)
                z_T = load_logits(teacher_ptr, first, lanes, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP)
                log_q, q = log_softmax(z_S, M_K, log_S, inverse_t)
                log_p, p = log_softmax(z_T, M_T, log_T, inverse_t)
                if SUMS is None:
                    v, w = PAIR(log_p, log_q, p, q, skew, beta, LOG2)
                else:
                    v, w, c_terms = SUMS(log_p, log_q, p, q, head)
                    c_sum += tl.sum(c_terms, axis=1)
                value += tl.sum(v, axis=1)
                weight += tl.sum(w, axis=1)
            D = tl.sum(value, axis=0)
            W = tl.sum(weight, axis=0)
            if SUMS is not None:
                number_a, number_b, number_c = SETTLE(D, W, tl.sum(c_sum, axis=0))
                value = tl.zeros([GROUPS], tl.float32)
                if not GRADIENT:
                    for i in range(0, num_blocks):
                        first = i * BLOCK
                        z_S = load_logits(
                            student_ptr, first, lanes, K, student_readable, student_softcap, STUDENT_SOFTCAP
                        )
                        z_T = load_logits(
                            teacher_ptr, first, lanes, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP
                        )
                        log_q, q = log_softmax(z_S, M_K, log_S, inverse_t)
                        log_p, p = log_softmax(z_T, M_T, log_T, inverse_t)
                        v, w = PAIR(log_p, log_q, p, q, number_a, number_b, number_c)
                        value += tl.sum(v, axis=1)
                    D = tl.sum(value, axis=0)
        if SUMS is None or not GRADIENT:
            tl.store(divergence_ptr + row, D)

    if GRADIENT:
        factor = 1.0
        if WEIGHTS:
            factor = tl.load(weights_ptr + row)
        ce = cross_entropy_coefficient * factor
        div = divergence_coefficient / temperature * factor
        # At T = 2, q = exp(y/2)/S and q1 = exp(y)/S1: the square of q, rescaled.
        ce_of_square = ce * tl.exp2((2 * log_S - log_S1) * LOG2E)
        for i in range(0, num_blocks):
            first = (num_blocks - 1 - i) * BLOCK
            if SIDE == 0 and TEACHER:
                first = i * BLOCK
            z_S = load_logits(student_ptr, first, lanes, V, student_readable, student_softcap, STUDENT_SOFTCAP)
            g = tl.zeros([GROUPS, WIDTH], tl.float32)
            if TEACHER:
                z_T = load_logits(teacher_ptr, first, lanes, K, teacher_readable, teacher_softcap, TEACHER_SOFTCAP)
                z_K = z_S
                if PADDED:
                    z_K = tl.where(first + lanes < K, z_S, FLOOR)
                log_q, q = log_softmax(z_K, M_K, log_S, inverse_t)
                log_p, p = log_softmax(z_T, M_T, log_T, inverse_t)
                if SUMS is None:
                    v, w = PAIR(log_p, log_q, p, q, skew, beta, LOG2)
                else:
                    v, w = PAIR(log_p, log_q, p, q, number_a, number_b, number_c)
                    value += tl.sum(v, axis=1)
                if SUMS is not None:
                    g = div * w
                elif SIDE == 1:
                    g = div * (w + q)
                elif SIDE == 2:
                    # w = q log(q/p) and sum(w) = D: what rounds both alike goes first.
                    g = div * q * (((z_K - origin) - (z_T - origin_T) - B) * inverse_t)
                else:
                    g = div * (w - q * W)
            if CROSS_ENTROPY:
                if TEACHER and T_KIND == 1 and not PADDED:
                    g += ce * q
                elif TEACHER and T_KIND == 2 and not PADDED:
                    g += ce_of_square * q * q
                else:
                    g += ce * tl.exp2(((z_S - M_S) - log_S1) * LOG2E)
            store_gradient(
                gradient_ptr, first, lanes, student_readable, g, z_S, student_softcap, label, ce,
                CROSS_ENTROPY, STUDENT_SOFTCAP,
            )  # fmt: skip
        if TEACHER and SUMS is not None:
            tl.store(divergence_ptr + row, tl.sum(value, axis=0))


def launch_options(
    V: int, warp_size: int = 32 if torch.version.hip is None else 64, hopper: bool = False
) -> dict[str, int]:
    """Block of classes, warps of a program, and compile options for rows of V classes.

    A thread has eight classes, which are 128 bits of a 16-bit type. There are no more threads than V needs, and at most
    256. hopper: at most 512, which was measured to be faster on an H100; on other GPUs some configurations would spill.
    """
    block = min(4096 if hopper else 2048, max(8 * warp_size, triton.next_power_of_2(V)))
    # Triton 3.10 turns fused multiply-adds off unless asked: a tenth more instructions.
    return {"BLOCK": block, "num_warps": block // (8 * warp_size), "enable_fp_fusion": True}


def is_hopper(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 9."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _readable(logits: Tensor, padding_is_scratch: bool) -> int:
    """Columns of a row that the kernel may access: up to the next aligned one, if the gap between rows is scratch."""
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

    padding_is_scratch: where a row's stride is larger than its number of classes, the rest of it may be read and, in
    `gradient_CV`, written. Such rows are read 128 bits at a time whatever V is.
    """
    C, V = student_logits_CV.shape
    device = student_logits_CV.device
    # A dummy replaces tensors that are switched off: the kernel never accesses it.
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
        **formula_options(formula),
        LOG2=LOG2,
        SIDE=SIDES[formula.one_read],
        TEACHER=teacher_logits_CV is not None,
        T_KIND=kind_of_temperature(coefficients.temperature),
        PADDED=V > K,
        STUDENT_SOFTCAP=student_softcap is not None,
        TEACHER_SOFTCAP=teacher_softcap is not None,
        WEIGHTS=row_weights_C is not None,
        CROSS_ENTROPY=teacher_logits_CV is None or coefficients.cross_entropy != 0,
        GRADIENT=gradient_CV is not None,
        WIDTH=16 // min(student_logits_CV.element_size(), gradient.element_size()),
        **launch_options(V, hopper=is_hopper(device)),
    )
    return values
