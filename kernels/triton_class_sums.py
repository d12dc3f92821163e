"""The passes of `class_blocks.py` between the first and the last as Triton kernels, and where a row's state has what.

Shape letters and the state are those of `triton_class_blocks.py`.
"""

import triton
import triton.language as tl

from .class_blocks import ClassBlocks
from .triton_sums import load_logits, log_softmax, mass_from

(
    LABEL, ORIGIN_S, ORIGIN_T, MAX_S, SUM_S, PRODUCT_S, MAX_K, SUM_K, MAX_T, SUM_T, CROSS, DIVERGENCE, WEIGHT, A, B, C,
    HEAD, MASS,
) = (tl.constexpr(i) for i in range(len(ClassBlocks.FIELDS)))  # fmt: skip


@triton.jit
def lanes_of(BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """0 to BLOCK as [GROUPS, WIDTH]: the WIDTH neighbours that a thread reads at once."""
    return tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit(do_not_specialize=["first_row", "N", "first"])
def weigh_kernel(
    state_ptr,
    labels_ptr,
    student_ptr,
    teacher_ptr,
    first_row,
    N,
    first,
    classes,
    student_stride,
    teacher_stride,
    temperature,
    student_softcap,
    teacher_softcap,
    skew,
    beta,
    PAIR: tl.constexpr,
    SUMS: tl.constexpr,
    LOG2: tl.constexpr,
    GATHER: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ClassBlocks.weigh`, or `gather` with GATHER.

    PAIR: a divergence's (value, weight) function. SUMS: what it needs first, or None. LOG2: the logarithm it uses.
    """
    row = tl.program_id(0).to(tl.int64)
    state_ptr += first_row + row
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    lanes = lanes_of(BLOCK, WIDTH)
    inverse_t = 1.0 / temperature
    M_K = tl.load(state_ptr + MAX_K * N)
    log_S = tl.load(state_ptr + SUM_K * N)
    M_T = tl.load(state_ptr + MAX_T * N)
    log_T = tl.load(state_ptr + SUM_T * N)
    a = tl.load(state_ptr + A * N)
    b = tl.load(state_ptr + B * N)
    c = tl.load(state_ptr + C * N)
    head = tl.load(state_ptr + HEAD * N)
    value = tl.zeros([BLOCK // WIDTH], tl.float32)
    weight = tl.zeros([BLOCK // WIDTH], tl.float32)
    third = tl.zeros([BLOCK // WIDTH], tl.float32)
    for i in range(0, tl.cdiv(classes, BLOCK)):
        at = i * BLOCK
        z_S = load_logits(student_ptr, at, lanes, classes, classes, student_softcap, STUDENT_SOFTCAP)
        z_T = load_logits(teacher_ptr, at, lanes, classes, classes, teacher_softcap, TEACHER_SOFTCAP)
        log_q, q = log_softmax(z_S, M_K, log_S, inverse_t)
        log_p, p = log_softmax(z_T, M_T, log_T, inverse_t)
        if GATHER:
            v, w, x = SUMS(log_p, log_q, p, q, head)
            third += tl.sum(x, axis=1)
        elif SUMS is not None:
            v, w = PAIR(log_p, log_q, p, q, a, b, c)
        else:
            v, w = PAIR(log_p, log_q, p, q, skew, beta, LOG2)
        value += tl.sum(v, axis=1)
        weight += tl.sum(w, axis=1)
    if GATHER:
        add(state_ptr + A * N, value)
        add(state_ptr + B * N, weight)
        add(state_ptr + C * N, third)
    else:
        add(state_ptr + DIVERGENCE * N, value)
        if SUMS is None:
            add(state_ptr + WEIGHT * N, weight)


@triton.jit(do_not_specialize=["first_row", "N", "first"])
def look_kernel(
    state_ptr,
    labels_ptr,
    student_ptr,
    teacher_ptr,
    first_row,
    N,
    first,
    classes,
    student_stride,
    teacher_stride,
    temperature,
    student_softcap,
    teacher_softcap,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ClassBlocks.look`."""
    row = tl.program_id(0).to(tl.int64)
    state_ptr += first_row + row
    teacher_ptr += row * teacher_stride
    lanes = lanes_of(BLOCK, WIDTH)
    inverse_t = 1.0 / temperature
    M_T = tl.load(state_ptr + MAX_T * N)
    log_T = tl.load(state_ptr + SUM_T * N)
    begin = tl.load(state_ptr + HEAD * N)
    mass = tl.zeros([BLOCK // WIDTH], tl.float32)
    for i in range(0, tl.cdiv(classes, BLOCK)):
        mass += mass_from(
            teacher_ptr, i * BLOCK, lanes, classes, classes, teacher_softcap, M_T, log_T, inverse_t, begin,
            TEACHER_SOFTCAP,
        )  # fmt: skip
    add(state_ptr + MASS * N, mass)


@triton.jit
def add(pointer, terms):
    """Add all threads' terms to a number of the row."""
    old = tl.load(pointer)
    tl.store(pointer, old + tl.sum(terms, axis=0))
