"""What is computed in the benchmarks of the loss: sizes, losses, random inputs, and the loss by its formulas.

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
# Gemma 3 4B -> a student of its width.
SHAPES = {
    "smollm2": Shape(1024, 49152, 576, 960),
    "llama3": Shape(512, 128256, 2048, 4096),
    "qwen2.5": Shape(512, 151936, 896, 3584),
    "gemma3": Shape(1024, 262144, 640, 1152),
    "gemma3-4b": Shape(1024, 262144, 2560, 2560),
    "tiny": Shape(64, 4096, 64, 64),
}
GPU_ROWS = 8192
# Rows and classes whose logits are looked at together where nothing is timed.
_ROWS_AT_ONCE, _CLASSES_AT_ONCE = 1024, 4096


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

    @torch.no_grad()
    def teacher_lse(self) -> Tensor:
        """[N] float32: log-sum-exp of the teacher's logits at the loss's temperature, from logits in float32."""
        common = min(len(self.w_S), len(self.w_T))
        found = torch.full((len(self.h_T),), -torch.inf, dtype=torch.float32, device=self.h_T.device)
        for w_T in self.w_T[:common].split(_CLASSES_AT_ONCE):
            wide = w_T.float().t() / self.loss.temperature
            for rows, h_T in zip(found.split(_ROWS_AT_ONCE), self.h_T.split(_ROWS_AT_ONCE)):
                torch.logaddexp(rows, (h_T.float() @ wide).logsumexp(-1), out=rows)
        return found


# One forward and backward.
Step = Callable[[], Any]


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
