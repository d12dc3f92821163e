"""Who computes a distillation loss from hidden states and two heads: one function each.

A provider takes a `Problem` and gives a `Step`, one forward and backward that leaves gradients in the student's hidden
states and weight. It raises ImportError where its package is missing and NotImplementedError, with the reason, for a
loss that it does not have or a machine that it does not know. `PROVIDERS` lists them; `PACKAGES` says whose version
stands beside a figure.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import other_libraries as others
from .other_libraries import CE_ONLY, LIGER_CE, LIGER_CUTE, QUACK
from .problem import BETA, SKEW, Loss, Problem, Step, plain_loss

SMALL = 128 << 20


def gemms(p: Problem) -> Step:
    """The floor: the four matrix products that no exact method avoids, into buffers that exist already. No loss."""
    z_S, z_T = (torch.empty(len(p.h_S), len(w), dtype=w.dtype, device=w.device) for w in (p.w_S, p.w_T))
    d_h, d_w = torch.empty_like(p.h_S), torch.empty_like(p.w_S)

    @torch.no_grad()
    def step() -> None:
        torch.mm(p.h_S, p.w_S.t(), out=z_S)
        torch.mm(p.h_T, p.w_T.t(), out=z_T)
        torch.mm(z_S, p.w_S, out=d_h)
        torch.mm(z_S.t(), p.h_S, out=d_w)

    return step


def _ours(loss: Loss, **options: Any) -> Any:
    from srd_fast import DistillationLoss

    options |= {"divergence": loss.divergence, "temperature": loss.temperature, "sft_weight": loss.sft_weight}
    return DistillationLoss(skew=SKEW, beta=BETA, **options)


def srd_fast(p: Problem, memory_budget: int | None = None) -> Step:
    """This library."""
    loss = _ours(p.loss, memory_budget=memory_budget)

    def step() -> None:
        loss(p.h_S, p.w_S, p.h_T, p.w_T, p.labels).loss.backward()

    return step


def srd_fast_small(p: Problem) -> Step:
    """This library in 128 MiB."""
    return srd_fast(p, SMALL)


def srd_fast_in_order(
    p: Problem, order: str, memory_budget: int | None = None, teacher_lse: Tensor | None = None
) -> Step:
    """This library in one order of the work, "rows" or "classes" outside. teacher_lse: `Problem.teacher_lse`, known."""
    from srd_fast import distillation_loss

    if "order" not in inspect.signature(distillation_loss).parameters:
        if (order, teacher_lse) == ("rows", None):
            return srd_fast(p, memory_budget)
        raise NotImplementedError("this version's distillation_loss has no order of the work to choose")
    known = {} if teacher_lse is None else {"teacher_lse": teacher_lse}
    loss = _ours(p.loss, memory_budget=memory_budget, order=order)

    def step() -> None:
        loss(p.h_S, p.w_S, p.h_T, p.w_T, p.labels, **known).loss.backward()

    return step


def srd_fast_classes(p: Problem) -> Step:
    """This library with the classes outside, in 128 MiB."""
    return srd_fast_in_order(p, "classes", SMALL)


def srd_fast_cached(p: Problem) -> Step:
    """The same where the teacher's log-sum-exp is known, as it is of a teacher that was run before."""
    return srd_fast_in_order(p, "classes", SMALL, p.teacher_lse())


def se_kd(p: Problem) -> Step:
    """This library on the 20 % of positions with the highest entropy of the student, as `SRDTrainer` chooses them."""
    from srd_fast.losses import Head
    from srd_fast.selection import Signals, TopPositions

    loss = _ours(p.loss)
    counts_B = torch.full((8,), len(p.labels) // 8, device=p.labels.device)
    generator, policy = torch.Generator(p.labels.device), TopPositions(0.2)

    def no_rows() -> Any:
        raise AssertionError("the student's entropy needs no teacher")

    def step() -> None:
        signals = Signals(p.h_S, Head(p.w_S), p.labels, no_rows, p.loss.temperature)
        chosen, logits = signals.choose(policy, counts_B, 0, generator)
        rows = chosen.indices_K
        args = p.h_S[rows], p.w_S, p.h_T[rows], p.w_T, p.labels[rows]
        loss(*args, student_logits=logits).loss.backward()

    return step


def plain(p: Problem) -> Step:
    """PyTorch on full logits, as the published code of SRD and DistiLLM has it."""

    def step() -> None:
        plain_loss(p.loss, *p.logits(), p.labels).backward()

    return step


def plain_compiled(p: Problem) -> Step:
    """The same under torch.compile, products and all."""

    @torch.compile
    def forward(h_S: Tensor, w_S: Tensor, h_T: Tensor, w_T: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            z_T = h_T @ w_T.t()
        return plain_loss(p.loss, h_S @ w_S.t(), z_T, labels)

    def step() -> None:
        forward(p.h_S, p.w_S, p.h_T, p.w_T, p.labels).backward()

    return step


PROVIDERS: dict[str, Callable[[Problem], Step]] = {
    "gemms": gemms,
    "srd-fast": srd_fast,
    "srd-fast, 128 MiB": srd_fast_small,
    "srd-fast, classes, 128 MiB": srd_fast_classes,
    "srd-fast, classes, 128 MiB, lse known": srd_fast_cached,
    "se-kd": se_kd,
    "plain": plain,
    "plain, compiled": plain_compiled,
    "liger-kernel": others.liger,
    "liger-kernel fused": others.liger_fused,
    "liger-kernel fused, CuTe": others.liger_fused_cute,
    "liger-kernel fused KL": others.liger_fused_kl,
    "trl chunked": others.trl_chunked,
    "trl gkd": others.trl_gkd,
    "torchtune": others.torchtune,
    CE_ONLY: others.cce,
    QUACK: others.quack,
    LIGER_CE: others.liger_scaled_ce,
    LIGER_CUTE: others.liger_cute,
}
# Those that compute something else than the loss, for comparison: no error beside their figures.
NOT_THE_LOSS = ("gemms", "se-kd", CE_ONLY, QUACK, LIGER_CE, LIGER_CUTE)
_PACKAGES = {
    "srd-fast": "srd-fast",
    "se-kd": "srd-fast",
    "liger-kernel": "liger-kernel",
    "liger-cute-kernels": "liger-cute-kernels",
    "trl": "trl",
    "torchtune": "torchtune",
    "cut-cross-entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
}
# Of those that are PyTorch alone there is none.
PACKAGES = {name: _PACKAGES[first] for name in PROVIDERS if (first := name.split(",")[0].split()[0]) in _PACKAGES}


def why_not(error: Exception) -> str:
    """In a line, for a reader."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, (ImportError, NotImplementedError)) else f"{type(error).__name__}: {text}"


def try_step(name: str, p: Problem) -> tuple[Step | None, str]:
    """A provider's step after its first run (which compiles), or None and why it does not run."""
    try:
        step = PROVIDERS[name](p)
        step()
    except Exception as error:  # whatever a rival's package does on this device
        if PACKAGES.get(name) == "srd-fast" and not isinstance(error, NotImplementedError):
            raise
        return None, why_not(error)
    return step, ""
