"""This library inside of other people's training: loops of their own, other trainers, and files that others wrote."""

from .curriculum import attach_curriculum
from .loop import model_distillation_loss
from .official import read_official_reflections

__all__ = ["attach_curriculum", "model_distillation_loss", "read_official_reflections"]
