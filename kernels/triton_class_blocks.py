"""The passes of `class_blocks.py` as Triton kernels, one program for each row of a block of classes.

Shape letters: N rows, R some of them, B classes of a block, S student, T teacher, K classes that both have.

The state is one tensor, [fields, N], so that a kernel takes one pointer to it and finds row n's field f at f N + n. A
program adds up its classes as described in `triton_sums.py`, and joins them with the row's state at the end. It reads
the state before the sums over its threads: their barriers ensure that nothing is overwritten before it is read.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .class_blocks import ClassBlocks
from .divergences import FORMULAS, LOG2E
from .triton_class_sums import (
    CROSS,
    DIVERGENCE,
    LABEL,
    MAX_K,
    MAX_S,
    MAX_T,
    ORIGIN_S,
    ORIGIN_T,
    PRODUCT_S,
    SUM_K,
    SUM_S,
    SUM_T,
    WEIGHT,
    A,
    B,
    C,
    add,
    lanes_of,
    look_kernel,
    weigh_kernel,
)
from .triton_sums import (
    FLOOR,
    LOG2,
    SIDES,
    add_student,
    exponentials,
    formula_options,
    kind_of_temperature,
    load_logits,
    log_softmax,
    merged,
    powers,
    store_gradient,
)


@triton.jit(do_not_specialize=["first_row", "N", "first"])
def read_kernel(
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
    COMMON: tl.constexpr,
    TEACHER: tl.constexpr,
    SIDE: tl.constexpr,
    T_KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ClassBlocks.read` for the classes from `first` up to `first` + `classes`.

    COMMON: both sides have the classes. TEACHER: its logits are there. SIDE: whose exponentials `cross` has, 1 teacher,
    2 student, 0 none. T_KIND: 1 or 2 for these temperatures, 0 for any other. WIDTH: lanes that take 128 bits in the
    narrowest tensor. BLOCK: lanes in all.
    """
    row = tl.program_id(0).to(tl.int64)
    state_ptr += first_row + row
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    label = tl.load(labels_ptr + first_row + row).to(tl.int32) - first
    lanes = lanes_of(BLOCK, WIDTH)
    c = LOG2E / temperature
    old_S = tl.load(state_ptr + MAX_S * N)
    old_K = tl.load(state_ptr + MAX_K * N)
    old_T = tl.load(state_ptr + MAX_T * N)
    origin = tl.load(state_ptr + ORIGIN_S * N)
    origin_T = tl.load(state_ptr + ORIGIN_T * N)
    if (label >= 0) & (label < classes):
        one = tl.arange(0, 1)
        z = load_logits(student_ptr, label, one, classes, classes, student_softcap, STUDENT_SOFTCAP)
        tl.store(state_ptr + LABEL * N, tl.sum(z, axis=0))

    m_S = tl.full([BLOCK // WIDTH], FLOOR, tl.float32)
    s1 = tl.zeros([BLOCK // WIDTH], tl.float32)
    a1 = tl.zeros([BLOCK // WIDTH], tl.float32)
    s = tl.zeros([BLOCK // WIDTH], tl.float32)
    m_T = tl.full([BLOCK // WIDTH], FLOOR, tl.float32)
    t = tl.zeros([BLOCK // WIDTH], tl.float32)
    b = tl.zeros([BLOCK // WIDTH], tl.float32)
    for i in range(0, tl.cdiv(classes, BLOCK)):
        at = i * BLOCK
        z_S = load_logits(student_ptr, at, lanes, classes, classes, student_softcap, STUDENT_SOFTCAP)
        old = m_S
        m_S, s1, a1, e, shrink = add_student(z_S, m_S, s1, a1, c, T_KIND if COMMON else 1)
        if COMMON:
            if T_KIND == 0:
                e, shrink = powers(z_S - m_S[:, None], old - m_S, c)
            s = s * shrink + tl.sum(e, axis=1)
        if TEACHER:
            z_T = load_logits(teacher_ptr, at, lanes, classes, classes, teacher_softcap, TEACHER_SOFTCAP)
            m_T, e_T, shrink_T = exponentials(z_T, m_T, c)
            t = t * shrink_T + tl.sum(e_T, axis=1)
            if SIDE == 1:
                b = b * shrink_T + tl.sum(e_T * ((z_S - origin) - (z_T - origin_T)), axis=1)
            if SIDE == 2:
                b = b * shrink + tl.sum(e * ((z_S - origin) - (z_T - origin_T)), axis=1)

    M = tl.max(m_S, axis=0)
    M_S = tl.maximum(M, old_S)
    # A of a row goes with its S as it was.
    old_sum = tl.load(state_ptr + SUM_S * N)
    a = tl.load(state_ptr + PRODUCT_S * N) + old_sum * (old_S - M_S)
    join(state_ptr + PRODUCT_S * N, a, a1 + s1 * (m_S - M_S), m_S, old_S, M_S, LOG2E)
    join(state_ptr + SUM_S * N, old_sum, s1, m_S, old_S, M_S, LOG2E)
    tl.store(state_ptr + MAX_S * N, M_S)
    if COMMON:
        M_K = tl.maximum(M, old_K)
        join(state_ptr + SUM_K * N, tl.load(state_ptr + SUM_K * N), s, m_S, old_K, M_K, c)
        if SIDE == 2:
            join(state_ptr + CROSS * N, tl.load(state_ptr + CROSS * N), b, m_S, old_K, M_K, c)
        tl.store(state_ptr + MAX_K * N, M_K)
    if TEACHER:
        M_T = tl.maximum(tl.max(m_T, axis=0), old_T)
        join(state_ptr + SUM_T * N, tl.load(state_ptr + SUM_T * N), t, m_T, old_T, M_T, c)
        if SIDE == 1:
            join(state_ptr + CROSS * N, tl.load(state_ptr + CROSS * N), b, m_T, old_T, M_T, c)
        tl.store(state_ptr + MAX_T * N, M_T)


@triton.jit
def join(pointer, old, sums, m, old_maximum, maximum, c):
    """Store the row's sum so far, relative to `old_maximum`, and its threads', relative to their m, as one."""
    tl.store(pointer, old * tl.exp2((old_maximum - maximum) * c) + merged(sums, m, maximum, c))


@triton.jit(do_not_specialize=["first_row", "N", "first"])
def write_kernel(
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
    gradient_ptr,
    weights_ptr,
    gradient_stride,
    cross_entropy_coefficient,
    divergence_coefficient,
    PAIR: tl.constexpr,
    SUMS: tl.constexpr,
    LOG2: tl.constexpr,
    SIDE: tl.constexpr,
    TEACHER: tl.constexpr,
    VALUES: tl.constexpr,
    T_KIND: tl.constexpr,
    STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ClassBlocks.write`. SIDE: whose sums give a one-read divergence, 0 for two reads. VALUES: add to D too."""
    row = tl.program_id(0).to(tl.int64)
    state_ptr += first_row + row
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    gradient_ptr += row * gradient_stride
    label = tl.load(labels_ptr + first_row + row).to(tl.int32) - first
    lanes = lanes_of(BLOCK, WIDTH)
    inverse_t = 1.0 / temperature
    factor = 1.0
    if WEIGHTS:
        factor = tl.load(weights_ptr + first_row + row)
    ce = cross_entropy_coefficient * factor
    div = divergence_coefficient * inverse_t * factor
    M_S = tl.load(state_ptr + MAX_S * N)
    log_S1 = tl.load(state_ptr + SUM_S * N)
    M_K = tl.load(state_ptr + MAX_K * N)
    log_S = tl.load(state_ptr + SUM_K * N)
    M_T = tl.load(state_ptr + MAX_T * N)
    log_T = tl.load(state_ptr + SUM_T * N)
    origin = tl.load(state_ptr + ORIGIN_S * N)
    origin_T = tl.load(state_ptr + ORIGIN_T * N)
    mean = tl.load(state_ptr + CROSS * N)
    W = tl.load(state_ptr + WEIGHT * N)
    a = tl.load(state_ptr + A * N)
    b = tl.load(state_ptr + B * N)
    c = tl.load(state_ptr + C * N)
    # q at temperature 1 is a power of q at T times a ratio of sums, for T = 1 and 2.
    ce_of_power = ce * tl.exp2(((T_KIND * log_S - log_S1) - (M_S - M_K)) * LOG2E)
    value = tl.zeros([BLOCK // WIDTH], tl.float32)
    for i in range(0, tl.cdiv(classes, BLOCK)):
        at = i * BLOCK
        z_S = load_logits(student_ptr, at, lanes, classes, classes, student_softcap, STUDENT_SOFTCAP)
        g = tl.zeros([BLOCK // WIDTH, WIDTH], tl.float32)
        if TEACHER:
            z_T = load_logits(teacher_ptr, at, lanes, classes, classes, teacher_softcap, TEACHER_SOFTCAP)
            log_q, q = log_softmax(z_S, M_K, log_S, inverse_t)
            log_p, p = log_softmax(z_T, M_T, log_T, inverse_t)
            if SUMS is not None:
                v, w = PAIR(log_p, log_q, p, q, a, b, c)
            else:
                v, w = PAIR(log_p, log_q, p, q, skew, beta, LOG2)
            if SUMS is not None:
                g = div * w
            elif SIDE == 1:
                g = div * (w + q)
            elif SIDE == 2:
                g = div * q * (((z_S - origin) - (z_T - origin_T) - mean) * inverse_t)
            else:
                g = div * (w - q * W)
            if VALUES:
                value += tl.sum(v, axis=1)
        if CROSS_ENTROPY:
            if TEACHER and T_KIND == 1:
                g += ce_of_power * q
            elif TEACHER and T_KIND == 2:
                g += ce_of_power * q * q
            else:
                g += ce * tl.exp2(((z_S - M_S) - log_S1) * LOG2E)
        store_gradient(
            gradient_ptr, at, lanes, classes, g, z_S, student_softcap, label, ce, CROSS_ENTROPY, STUDENT_SOFTCAP
        )
    if VALUES:
        add(state_ptr + DIVERGENCE * N, value)


def launch_options(classes: int, warp_size: int = 32 if torch.version.hip is None else 64) -> dict[str, Any]:
    """Lanes, warps of a program, and compile options for blocks of classes.

    A thread reads eight classes at once, 128 bits of a 16-bit type, and eight times where there are enough: the sums
    over a program's threads are as many instructions as one of these reads.
    """
    warps = min(8, max(1, triton.next_power_of_2(classes) // (64 * warp_size)))
    return {"BLOCK": 8 * warp_size * warps, "num_warps": warps, "enable_fp_fusion": True}


class TritonClassBlocks(ClassBlocks):
    """`ClassBlocks` on a GPU, for float32, bfloat16 and float16 logits with contiguous rows; `compiled` means nothing.

    The two sides may differ in dtype, and rows may lie apart.
    """

    def __init__(self, labels_N: Tensor, *args: Any, **options: Any) -> None:
        super().__init__(labels_N.contiguous(), *args, **options)
        self._stacked = torch.stack([self.state[name] for name in self.FIELDS])
        self.state = dict(zip(self.FIELDS, self._stacked))
        if self.row_weights_N is not None:
            self.row_weights_N = self.row_weights_N.contiguous()

    def _launch(
        self, kernel: Any, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor | None, **options: Any
    ) -> None:
        """Start a kernel for some rows. options: what it takes beyond what all take."""
        if not len(student_RB):
            return
        # A dummy stands for what is switched off: no kernel touches it.
        teacher = student_RB if teacher_RB is None else teacher_RB
        written = options.get("gradient_ptr", student_RB)
        kernel[(len(student_RB),)](
            self._stacked,
            self.labels_N,
            student_RB,
            teacher,
            rows.start,
            len(self.labels_N),
            first,
            student_RB.shape[1],
            student_RB.stride(0),
            teacher.stride(0),
            float(self.coefficients.temperature),
            *(1.0 if cap is None else cap for cap in self.softcaps),
            STUDENT_SOFTCAP=self.softcaps[0] is not None,
            TEACHER_SOFTCAP=self.softcaps[1] is not None,
            WIDTH=16 // min(x.element_size() for x in (student_RB, teacher, written)),
            **launch_options(student_RB.shape[1]),
            **options,
        )

    def _pair(self) -> dict[str, Any]:
        """The divergence, as kernels take it."""
        d = self.divergence
        formula = FORMULAS["forward_kl"] if d is None or d.formula is None else d.formula
        parameters = {"skew": 0.0, "beta": 0.0} if d is None else {"skew": d.skew, "beta": d.beta}
        options = formula_options(formula)
        return {**parameters, "PAIR": options["PAIR"], "SUMS": options["SUMS"], "LOG2": LOG2}

    def read(self, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor | None, common: bool) -> None:
        """See `ClassBlocks.read`."""
        if self.crosses and teacher_RB is not None:
            self._origins(rows, first, student_RB, teacher_RB)
        self._launch(
            read_kernel, rows, first, student_RB, teacher_RB, COMMON=common, TEACHER=teacher_RB is not None,
            SIDE=SIDES[self.side] if teacher_RB is not None else 0,
            T_KIND=kind_of_temperature(self.coefficients.temperature),
        )  # fmt: skip

    def weigh(self, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor) -> None:
        """See `ClassBlocks.weigh`."""
        self._launch(weigh_kernel, rows, first, student_RB, teacher_RB, GATHER=False, **self._pair())

    def gather(self, rows: slice, student_RB: Tensor, teacher_RB: Tensor) -> None:
        """See `ClassBlocks.gather`."""
        self._launch(weigh_kernel, rows, 0, student_RB, teacher_RB, GATHER=True, **self._pair())

    def look(self, rows: slice, teacher_RB: Tensor) -> None:
        """See `ClassBlocks.look`."""
        self._launch(look_kernel, rows, 0, teacher_RB, teacher_RB)

    def write(
        self, rows: slice, first: int, student_RB: Tensor, teacher_RB: Tensor | None, gradient_RB: Tensor
    ) -> None:
        """See `ClassBlocks.write`."""
        k, weights = self.coefficients, self.row_weights_N
        self._launch(
            write_kernel, rows, first, student_RB, teacher_RB,
            gradient_ptr=gradient_RB,
            weights_ptr=self.labels_N if weights is None else weights,
            gradient_stride=gradient_RB.stride(0),
            cross_entropy_coefficient=float(k.cross_entropy),
            divergence_coefficient=float(k.divergence),
            SIDE=SIDES[self.side],
            TEACHER=teacher_RB is not None,
            VALUES=self.values_on_writing and teacher_RB is not None,
            T_KIND=kind_of_temperature(k.temperature),
            WEIGHTS=weights is not None,
            CROSS_ENTROPY=teacher_RB is None or k.cross_entropy != 0,
            **self._pair(),
        )  # fmt: skip
