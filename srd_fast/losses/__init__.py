"""Divergences in plain PyTorch, and the distillation loss from hidden states: packing, chunking, autograd."""

from .backends import expect_logits
from .buffers import free_workspace, is_out_of_memory
from .compact import CompactTeacher, Projected, Sampled, TopK, compact_distillation_loss
from .distillation import (
    DistillationLoss,
    DistillationOutput,
    check_vocabularies,
    distillation_loss,
    distillation_loss_from_logits,
    products_dtype,
    token_cross_entropy,
    token_values,
)
from .divergences import divergence_names, get_divergence, register_divergence
from .head import Head

__all__ = [
    "CompactTeacher",
    "DistillationLoss",
    "DistillationOutput",
    "Head",
    "Projected",
    "Sampled",
    "TopK",
    "check_vocabularies",
    "compact_distillation_loss",
    "distillation_loss",
    "distillation_loss_from_logits",
    "divergence_names",
    "expect_logits",
    "free_workspace",
    "get_divergence",
    "is_out_of_memory",
    "products_dtype",
    "register_divergence",
    "token_cross_entropy",
    "token_values",
]
