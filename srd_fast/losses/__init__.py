"""Divergences in plain PyTorch, and the distillation loss from hidden states: packing, chunking, autograd."""

from .buffers import free_workspace
from .distillation import (
    DistillationLoss,
    DistillationOutput,
    check_vocabularies,
    distillation_loss,
    distillation_loss_from_logits,
    token_cross_entropy,
)
from .divergences import divergence_names, get_divergence, register_divergence
from .head import Head

__all__ = [
    "DistillationLoss",
    "DistillationOutput",
    "Head",
    "check_vocabularies",
    "distillation_loss",
    "distillation_loss_from_logits",
    "divergence_names",
    "free_workspace",
    "get_divergence",
    "register_divergence",
    "token_cross_entropy",
]
