"""How answers are generated, and where they end."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a student generates its answers.

    Args:
        max_new_tokens: the most tokens of an answer, at least 1.
        temperature: 0 (greedy) or above.
        top_p: draw from the likeliest tokens that have this share of the probability, above 0 to 1; 1: from all.
        top_k: draw from so many of the likeliest tokens; 0: from all.
        min_p: lowest probability of a token, as a share of the likeliest token's, 0 to 1; 0: no limit.
        repetition_penalty: makes tokens that occurred already less likely, above 0; 1: no penalty.
        no_repeat_ngram_size: length of sequences of tokens that may not occur twice; 0: no limit.
        seed: seed of the draws.
        stop_ids: tokens that end an answer, besides the tokenizer's EOS and those of the model's generation config.
            `reflect` and `evaluate` add the end tokens of the data's answers.

    Raises:
        UserError: a value is out of range. The message names the field.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be a whole number of at least 1, got {self.max_new_tokens!r}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"the generation temperature must be 0 (greedy) or above, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p!r}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], got {self.min_p!r}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty!r}")
        for name in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise UserError(f"{name} must be a whole number of at least 0, got {value!r}")

    def seed_of(self, prompts: Sequence[Sequence[int]]) -> int:
        """A seed for generating these prompts together, which depends only on them and on `seed`.

        Args:
            prompts: the token ids of each prompt.

        Returns:
            A number from 0 to 2^63.
        """
        state = hashlib.blake2b(str(self.seed).encode(), digest_size=8)
        for prompt in prompts:
            state.update(array("q", [len(prompt), *prompt]).tobytes())
        return int.from_bytes(state.digest(), "little") >> 1


def stopping_at(sampling: Sampling, ids: Sequence[int]) -> Sampling:
    """The same sampling with additional tokens that end an answer."""
    return replace(sampling, stop_ids=tuple(sorted({*sampling.stop_ids, *ids})))


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> set[int]:
    """Ids that end a generation: the tokenizer's EOS and those of the model's generation config."""
    own = getattr(generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def until_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first that ends a generation."""
    return list(ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))])
