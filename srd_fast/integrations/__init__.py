"""This library inside other people's training: their own loops, other trainers, and files of other libraries."""

from .curriculum import attach_curriculum
from .loop import model_distillation_loss
from .official import read_official_reflections
from .top_k import cache_from_top_k

__all__ = ["attach_curriculum", "cache_from_top_k", "model_distillation_loss", "read_official_reflections"]
