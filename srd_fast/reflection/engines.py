"""Generation engines: prompts as token ids in, generations as token ids out."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import batches_by_length, pad_id
from ..errors import UserError
from ..models import load_model
from ..suggest import unknown_name


@dataclass(frozen=True)
class Sampling:
    """How to generate. temperature 0 is greedy; lengths in tokens."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be a whole number of at least 1, got {self.max_new_tokens!r}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"the generation temperature must be 0 (greedy) or above, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p!r}")


class GenerationEngine(Protocol):
    """Yields (index of the prompt, generated ids without EOS), in any order, as they finish."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Generate for every prompt."""


class TransformersEngine:
    """`transformers` generation in batches of like length, longest first, padded at the left.

    Args:
        student: a causal language model, or where to load one from.
        tokenizer: for the pad and end-of-sequence ids only.
        batch_size: prompts at a time.
        progress: show a bar with tokens/s and the time left.
    """

    def __init__(
        self,
        student: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.model: Any = load_model(student) if isinstance(student, str) else student
        self.batch_size, self.progress = batch_size, progress
        self.pad = pad_id(tokenizer)
        own = getattr(self.model, "generation_config", None)
        eos = getattr(own, "eos_token_id", None)
        self.eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

    def _config(self, sampling: Sampling) -> GenerationConfig:
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        if sampling.no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = sampling.no_repeat_ngram_size
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.eos),
            pad_token_id=self.pad,
            use_cache=True,
            **options,
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Yields batch by batch. Sampled text depends on the seed and on the batches."""
        config, was_training = self._config(sampling), self.model.training
        self.model.eval()
        tokens, started = 0, time.monotonic()
        bar = tqdm(total=len(prompts), desc="generate", unit="sample", disable=not self.progress)
        try:
            for batch, indices in enumerate(batches_by_length([len(p) for p in prompts], self.batch_size)):
                for i, generated in zip(indices, self._batch([prompts[i] for i in indices], config, sampling, batch)):
                    tokens += len(generated)
                    yield i, generated
                bar.update(len(indices))
                bar.set_postfix_str(f"{tokens / max(1e-9, time.monotonic() - started):.0f} tokens/s")
        finally:
            bar.close()
            self.model.train(was_training)

    def _batch(
        self, prompts: list[Sequence[int]], config: GenerationConfig, sampling: Sampling, batch: int
    ) -> list[list[int]]:
        width = max(1, *(len(p) for p in prompts))
        ids = torch.full((len(prompts), width), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            if prompt:
                ids[row, -len(prompt) :] = torch.tensor(prompt)
                mask[row, -len(prompt) :] = 1
        device = self.model.device
        with torch.random.fork_rng(enabled=sampling.temperature > 0):
            if sampling.temperature > 0:
                torch.manual_seed(sampling.seed + batch * 1_000_003)
            out = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        return [self._until_eos(row) for row in out[:, width:].tolist()]

    def _until_eos(self, ids: list[int]) -> list[int]:
        end = next((n for n, token in enumerate(ids) if token in self.eos), len(ids))
        return ids[:end]


_ENGINES: dict[str, Callable[..., GenerationEngine]] = {"transformers": TransformersEngine}


def engine_names() -> list[str]:
    """Names that `engine=` takes."""
    return sorted(_ENGINES)


def register_engine(name: str, factory: Callable[..., GenerationEngine], *, replace: bool = False) -> None:
    """Add an engine. `factory(student, tokenizer, batch_size=..., progress=...)` returns a GenerationEngine."""
    if name in _ENGINES and not replace:
        raise UserError(f"engine {name!r} exists already; pass replace=True or take another name")
    _ENGINES[name] = factory


def make_engine(name: str, student: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> GenerationEngine:
    """The engine called `name` for a student. Raises UserError with the list of names for an unknown one."""
    if name not in _ENGINES:
        raise UserError(unknown_name("engine", name, _ENGINES))
    return _ENGINES[name](student, tokenizer, **options)
