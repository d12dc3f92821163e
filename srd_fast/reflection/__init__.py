"""The student answers every training prompt, and its answers are scored, to find out how hard each sample is for it."""

from ..rouge import RougeL
from .engines import GenerationEngine, engine_names, open_engine, register_engine
from .reflect import reflect
from .sampling import Sampling, stopping_at
from .shards import merge_shards, write_shard
from .signals import Reflected, difficulty_names, get_difficulties, get_difficulty, register_difficulty
from .transformers_engine import TransformersEngine

__all__ = [
    "GenerationEngine",
    "Reflected",
    "RougeL",
    "Sampling",
    "TransformersEngine",
    "difficulty_names",
    "engine_names",
    "get_difficulties",
    "get_difficulty",
    "merge_shards",
    "open_engine",
    "reflect",
    "register_difficulty",
    "register_engine",
    "stopping_at",
    "write_shard",
]
