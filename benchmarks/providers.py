"""Who computes a distillation loss from hidden states and two heads: one function each.

A provider takes a `Problem` and gives a `Step`, one forward and backward that leaves gradients in the student's hidden
states and weight. It raises ImportError where its package is missing and NotImplementedError, with the reason, for a
loss that it does not have. `PROVIDERS` lists them; `packages` says whose version stands beside a figure.

The loss is `sft_weight * CE + (1 - sft_weight) * T^2 * D`, the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SKEW, BETA, IGNORE = 0.1, 0.5, -100


@dataclass(frozen=True)
class Shape:
    """N rows, V classes, widths of student and teacher."""

    N: int
    V: int
    D_S: int
    D_T: int


# Vocabulary and widths of real pairs: SmolLM2 360M -> 135M, Qwen2.5 7B -> 0.5B, Llama 3 8B -> 1B, Gemma 3 1B -> 270M.
SHAPES = {
    "smollm2": Shape(1024, 49152, 576, 960),
    "llama3": Shape(512, 128256, 2048, 4096),
    "qwen2.5": Shape(512, 151936, 896, 3584),
    "gemma3": Shape(1024, 262144, 640, 1152),
    "tiny": Shape(64, 4096, 64, 64),
}
GPU_ROWS = 8192


@dataclass(frozen=True)
class Loss:
    """What is computed: a divergence at a temperature, and how much of the cross-entropy of the labels."""

    divergence: str
    sft_weight: float = 0.1
    temperature: float = 2.0

    def __str__(self) -> str:
        at = "" if self.temperature == 2 else f", T = {self.temperature:g}"
        return self.divergence + (" + CE" if self.sft_weight else "") + at

    @property
    def beta(self) -> float:
        """As a generalised JSD: 0 forward KL, 1 reverse KL. NotImplementedError for any other divergence."""
        betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}
        if self.divergence not in betas:
            raise NotImplementedError(f"it has the JSD and its limits, not {self.divergence}")
        return betas[self.divergence]


# Every loss that some rival has, beside the library's default.
LOSSES = {
    str(x): x
    for x in (
        Loss("skew_reverse_kl"),
        Loss("forward_kl"),
        Loss("jsd"),
        Loss("jsd", 0.0),
        Loss("forward_kl", 0.0),
        Loss("forward_kl", 0.0, 1.0),
        Loss("reverse_kl", 0.0),
    )
}


@dataclass
class Problem:
    """Inputs of a loss; the student's hidden states and weight want a gradient."""

    h_S: Tensor
    w_S: Tensor
    h_T: Tensor
    w_T: Tensor
    labels: Tensor
    loss: Loss

    @staticmethod
    def make(shape: Shape, dtype: torch.dtype, device: str, loss: Loss, ignored: float = 0.0) -> "Problem":
        """Random inputs with logits of the spread that language models have, about 3 nats."""
        torch.manual_seed(0)
        draw = partial(torch.randn, device=device, dtype=dtype)
        p = Problem(
            draw(shape.N, shape.D_S).requires_grad_(),
            draw(shape.V, shape.D_S).mul_(3 / shape.D_S**0.5).requires_grad_(),
            draw(shape.N, shape.D_T),
            draw(shape.V, shape.D_T).mul_(3 / shape.D_T**0.5),
            torch.randint(shape.V, (shape.N,), device=device),
            loss,
        )
        p.labels[torch.rand(shape.N, device=device) < ignored] = IGNORE
        return p

    def with_ignored(self, share: float) -> "Problem":
        """The same tensors, with a share of the labels ignored."""
        labels = self.labels.clone()
        labels[torch.rand(len(labels), generator=torch.Generator().manual_seed(1)).to(labels.device) < share] = IGNORE
        return replace(self, labels=labels)

    def clear_gradients(self) -> None:
        """None in both."""
        self.h_S.grad = self.w_S.grad = None

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, in full."""
        z_S = self.h_S @ self.w_S.t()
        with torch.no_grad():
            return z_S, self.h_T @ self.w_T.t()


Step = Callable[[], Any]


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
    """This library in chunks of 128 MiB."""
    return srd_fast(p, 128 << 20)


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


def _divergence(loss: Loss, z_S: Tensor, z_T: Tensor) -> Tensor:
    # From the formulas of SRD and DistiLLM; softmaxes in float32 as in their code, float64 if the logits are.
    wide = torch.promote_types(z_S.dtype, torch.float32)
    log_q = functional.log_softmax(z_S / loss.temperature, dim=-1, dtype=wide)
    log_p = functional.log_softmax(z_T / loss.temperature, dim=-1, dtype=wide)
    q, p = log_q.exp(), log_p.exp()
    if loss.divergence == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if loss.divergence == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if loss.divergence == "skew_forward_kl":
        return (p * (log_p - (SKEW * p + (1 - SKEW) * q).log())).sum(-1)
    if loss.divergence == "skew_reverse_kl":
        return (q * (log_q - ((1 - SKEW) * p + SKEW * q).log())).sum(-1)
    if loss.divergence == "jsd":
        log_m = (BETA * p + (1 - BETA) * q).log()
        return BETA * (p * (log_p - log_m)).sum(-1) + (1 - BETA) * (q * (log_q - log_m)).sum(-1)
    return 0.5 * (p - q).abs().sum(-1)


def plain_loss(loss: Loss, z_S: Tensor, z_T: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not ignored, from full logits."""
    kept = (labels != IGNORE).to(torch.promote_types(z_S.dtype, torch.float32))
    value = (1 - loss.sft_weight) * loss.temperature**2 * (_divergence(loss, z_S, z_T) * kept).sum() / kept.sum()
    if loss.sft_weight:
        value = value + loss.sft_weight * functional.cross_entropy(z_S.to(kept.dtype), labels, ignore_index=IGNORE)
    return value


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


def liger(p: Problem) -> Step:
    """liger-kernel's chunked JSD under torch.compile, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    soft = (1 - p.loss.sft_weight) * p.loss.temperature**2
    loss = LigerFusedLinearJSDLoss(p.loss.sft_weight, soft, p.loss.beta, temperature=p.loss.temperature)

    def step() -> None:
        loss(p.h_S, p.w_S, p.h_T, p.w_T, p.labels).backward()

    return step


def liger_fused(p: Problem) -> Step:
    """liger-kernel's fused linear JSD: its Triton kernel over chunks of logits, on a GPU alone."""
    if p.h_S.device.type != "cuda":
        raise NotImplementedError("its kernel needs a GPU")
    if p.loss.sft_weight:
        raise NotImplementedError("its loss has no cross-entropy")
    from liger_kernel.transformers import LigerFusedLinearJSD

    t = p.loss.temperature
    loss = LigerFusedLinearJSD(jsd_beta=p.loss.beta, ignore_index=IGNORE, temperature=t)

    def step() -> None:
        (loss(p.h_S, p.w_S, p.h_T, p.w_T, p.labels) * t * t).backward()

    return step


def trl_chunked(p: Problem) -> Step:
    """The chunked loss of TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    if p.loss.sft_weight:
        raise NotImplementedError("its loss has no cross-entropy")
    beta, t = p.loss.beta, p.loss.temperature

    def step() -> None:
        mask = (p.labels != IGNORE)[None]
        value, *_ = _chunked_divergence_loss(p.h_S[None], p.h_T[None], p.w_S, p.w_T, mask, beta, temperature=t)
        (value * t * t).backward()

    return step


def trl_gkd(p: Problem) -> Step:
    """The loss of TRL's GKDTrainer, on full logits."""
    from trl.experimental.gkd import GKDTrainer

    if p.loss.sft_weight:
        raise NotImplementedError("its loss has no cross-entropy")
    beta, t = p.loss.beta, p.loss.temperature
    # As its compute_loss calls it: logits and labels of a batch, reduced over the labels that are not ignored.

    def step() -> None:
        z_S, z_T = p.logits()
        value = GKDTrainer.generalized_jsd_loss(z_S[None], z_T[None], p.labels[None], beta, t)
        (value * t * t).backward()

    return step


def torchtune(p: Problem) -> Step:
    """torchtune's chunked forward KL, at its eight chunks, on full logits."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    if p.loss != Loss("forward_kl", 0.0, 1.0):
        raise NotImplementedError("it has the forward KL at temperature 1 alone, without cross-entropy")
    loss = ForwardKLWithChunkedOutputLoss()

    def step() -> None:
        z_S, z_T = (z[None].chunk(loss.num_output_chunks, dim=1) for z in p.logits())
        loss(list(z_S), list(z_T), p.labels[None]).backward()

    return step


def cce(p: Problem) -> Step:
    """cut-cross-entropy, its kernels on a GPU, its torch.compile path elsewhere: the cross-entropy part alone."""
    from cut_cross_entropy import linear_cross_entropy

    if not p.loss.sft_weight:
        raise NotImplementedError("it has the cross-entropy alone")
    implementation = "cce" if p.h_S.is_cuda else "torch_compile"

    def step() -> None:
        linear_cross_entropy(p.h_S, p.w_S, p.labels, impl=implementation).backward()

    return step


CE_ONLY = "cut-cross-entropy (CE alone)"
PROVIDERS: dict[str, Callable[[Problem], Step]] = {
    "gemms": gemms,
    "srd-fast": srd_fast,
    "srd-fast, 128 MiB": srd_fast_small,
    "se-kd": se_kd,
    "plain": plain,
    "plain, compiled": plain_compiled,
    "liger-kernel": liger,
    "liger-kernel fused": liger_fused,
    "trl chunked": trl_chunked,
    "trl gkd": trl_gkd,
    "torchtune": torchtune,
    CE_ONLY: cce,
}
# Those that compute something else than the loss, for comparison: no error beside their figures.
NOT_THE_LOSS = ("gemms", "se-kd", CE_ONLY)
PACKAGES = {
    "srd-fast": "srd-fast",
    "srd-fast, 128 MiB": "srd-fast",
    "se-kd": "srd-fast",
    "liger-kernel": "liger-kernel",
    "liger-kernel fused": "liger-kernel",
    "trl chunked": "trl",
    "trl gkd": "trl",
    "torchtune": "torchtune",
    CE_ONLY: "cut-cross-entropy",
}


def try_step(name: str, p: Problem) -> tuple[Step | None, str]:
    """A provider's step after its first run (which compiles), or None and why it does not run."""
    try:
        step = PROVIDERS[name](p)
        step()
    except Exception as error:  # whatever a rival's package does on this device
        if PACKAGES.get(name) == "srd-fast":
            raise
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return step, ""
