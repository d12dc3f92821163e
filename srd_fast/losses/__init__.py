"""Distillation losses from hidden states, in chunks of rows, and the divergences they may use."""

from .backends import expect_logits
from .buffers import free_workspace, is_out_of_memory
from .compact import (
    CompactTeacher,
    Projected,
    Sampled,
    TopK,
    check_rest,
    compact_distillation_loss,
    loss_beside_compact_teacher,
)
from .distillation import DistillationLoss, distillation_loss, distillation_loss_from_logits, loss_beside_head
from .divergences import divergence_names, get_divergence, register_divergence
from .head import Head, VocabularyShard
from .options import LossOptions
from .packing import DistillationOutput, StudentRows, check_vocabularies, products_dtype
from .token_values import token_cross_entropy, token_values
from .vocabulary import head_of

__all__ = [
    "CompactTeacher",
    "DistillationLoss",
    "DistillationOutput",
    "Head",
    "LossOptions",
    "Projected",
    "Sampled",
    "StudentRows",
    "TopK",
    "VocabularyShard",
    "check_rest",
    "check_vocabularies",
    "compact_distillation_loss",
    "distillation_loss",
    "distillation_loss_from_logits",
    "divergence_names",
    "expect_logits",
    "free_workspace",
    "get_divergence",
    "head_of",
    "is_out_of_memory",
    "loss_beside_compact_teacher",
    "loss_beside_head",
    "products_dtype",
    "register_divergence",
    "token_cross_entropy",
    "token_values",
]
