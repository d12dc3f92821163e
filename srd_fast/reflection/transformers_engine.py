"""Generation with `transformers`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin

from ..data import batches_by_length, pad_id
from ..errors import UserError
from ..models import called_by_parts, decoder_start, embeddings_of, entry_device, load_model, unwrap
from .sampling import Sampling, end_ids, until_end

# The name of the cache, which transformers 5.24 changed.
_CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__annotations__ else "past_key_values"
# With so few rows a step takes as long as with fewer: it reads all weights anyway.
_FEW_ROWS = 16


@contextmanager
def nothing_shipped(model: PreTrainedModel) -> Iterator[None]:
    """Hide a model's own generation config, from which `generate` takes all values that the given one does not set.

    Its penalties, beams, forced and forbidden tokens or time limits would change even greedy answers.
    """
    holders: list[Any] = [m for m in (model, unwrap(model)) if "generation_config" in vars(m)]
    own = [holder.generation_config for holder in holders]
    config: Any = unwrap(model).config
    # A balancing loss needs whole batches: with a cache of keys, it would make generation fail.
    routed = [c for c in (config, config.get_text_config()) if getattr(c, "output_router_logits", False)]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        for part in routed:
            part.output_router_logits = False
        yield
    finally:
        for holder, shipped in zip(holders, own):
            holder.generation_config = shipped
        for part in routed:
            part.output_router_logits = True


class _Draw(LogitsProcessor):
    """Draws each row's token, and leaves no other one possible.

    `generate` itself would draw a number for each class, which takes a CPU a sixth of a small model's time. One
    number a row is enough: the token is where the sum of the probabilities passes it.
    """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1)
        if scores.device.type == "cpu":
            sums = probabilities.cumsum(-1, dtype=torch.float64)  # else tokens below float32's rounding never come
            total = sums[:, -1:]
            if not total.isfinite().all():
                raise UserError("the student's logits are not finite, so no answer can be drawn from them")
            token = torch.searchsorted(sums, torch.rand_like(total) * total, right=True)
            token.clamp_(max=scores.shape[-1] - 1)
        else:
            token = torch.multinomial(probabilities, 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


class _HalfEnded(StoppingCriteria):
    """Ends a call of `generate` when half of its rows have ended.

    Attributes:
        ended: [B] bool, the rows that have.
    """

    def __init__(self, ends: Tensor, rows: int) -> None:
        self.ends, self.ended = ends, torch.zeros(rows, dtype=torch.bool, device=ends.device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.ended |= torch.isin(input_ids[:, -1], self.ends)
        return (2 * self.ended.sum() >= len(self.ended)).expand(len(self.ended))


def _empty_cache(model: Any) -> DynamicCache | None:
    """A cache whose rows can be left out; None for models that need another."""
    inner: Any = unwrap(model)
    config = inner.config.get_text_config(decoder=True)
    # Models of several kinds of input, or that prepare theirs in their own way, know more of rows than the cache does.
    plain = type(inner).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    plain = plain and not getattr(inner, "_is_stateful", False)  # its layers may keep states that are in no cache
    if not plain or config is not inner.config or not inner._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=config)
    return cache if all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers) else None


# For a process that has no batch left while others do.
_IDLE = Sampling(max_new_tokens=1)


class TransformersEngine:
    """Generation with `transformers`, in batches of similar length, longest first.

    Prompts are padded on the left; those of an encoder-decoder model on the right, as in training. Only `Sampling`
    decides how to generate; of the student's generation config, only the tokens that begin and end an answer are used.
    When half of a batch's answers have ended, the others go on in a batch of their own.

    Args:
        student: a language model, or a folder or hub id to load one from (in float32).
        tokenizer: used only for the pad and end-of-sequence ids.
        batch_size: prompts of a batch, at least 1.
    """

    def __init__(
        self, student: PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        self.model: Any = load_model(student) if isinstance(student, str) else student
        self.batch_size, self.shard_size = batch_size, 4 * batch_size
        self.pad, self.start = pad_id(tokenizer, embeddings_of(self.model)), decoder_start(self.model)
        own = getattr(self.model, "generation_config", None)
        self.ends = end_ids(tokenizer, own)
        self.starts = {name: getattr(own, name, None) for name in ("bos_token_id", "decoder_start_token_id")}
        if self.start is not None:
            self.starts["decoder_start_token_id"] = self.start
            # The language that a multilingual model is to write.
            self.starts["forced_bos_token_id"] = getattr(own, "forced_bos_token_id", None)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Yield the generations, batch by batch. Sampled text depends on the seed and on which prompts share a batch.

        All processes that have shards of a model must generate together, each from its own prompts.
        """
        was_training = self.model.training
        batches = list(batches_by_length([len(p) for p in prompts], self.batch_size))
        self.model.eval()
        try:
            with called_by_parts(self.model) as together:
                more_elsewhere = self._most(len(batches)) - len(batches) if together else 0
                for indices in batches:
                    given = [prompts[i] for i in indices]
                    yield from zip(indices, self._batch(given, sampling, together))
                for _ in range(more_elsewhere):
                    self._batch([[self.pad]], _IDLE, together)
        finally:
            self.model.train(was_training)

    def _most(self, batches: int) -> int:
        """The largest number of batches that any process has."""
        most = torch.tensor(batches, device=entry_device(self.model))
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return int(most)

    def _batch(self, prompts: list[Sequence[int]], sampling: Sampling, together: bool) -> list[list[int]]:
        width = max(1, *(len(p) for p in prompts))
        ids = torch.full((len(prompts), width), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if self.start is None else slice(len(prompt))
            ids[row, place] = torch.tensor(prompt, dtype=torch.long)
            mask[row, place] = 1
        device, ends = entry_device(self.model), {*self.ends, *sampling.stop_ids}
        begun = width if self.start is None else 1  # what generate returns begins with the prompt, or the start token
        options = self._options(sampling, ends, begun)
        with torch.random.fork_rng(enabled=sampling.temperature > 0), nothing_shipped(self.model):
            if sampling.temperature > 0:
                torch.manual_seed(sampling.seed_of(prompts))
            if together:  # all processes must make as many calls
                found = self.model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), synced_gpus=True, **options
                )
                rows = found.tolist()
            else:
                rows = self._shrinking(ids.to(device), mask.to(device), ends, options)
        return [until_end(row[begun:], ends) for row in rows]

    def _options(self, sampling: Sampling, ends: set[int], begun: int) -> dict[str, Any]:
        """Of `generate`. begun: tokens that its rows begin with."""
        config = GenerationConfig(
            max_length=begun + sampling.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=self.pad,
            do_sample=False,
            use_cache=True,
            **self.starts,
        )
        if sampling.repetition_penalty != 1:
            config.repetition_penalty = sampling.repetition_penalty
        if sampling.no_repeat_ngram_size:
            config.no_repeat_ngram_size = sampling.no_repeat_ngram_size
        draw: list[LogitsProcessor] = []
        if sampling.temperature > 0:
            draw.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                draw.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                draw.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p:
                draw.append(MinPLogitsWarper(float(sampling.min_p)))
            draw.append(_Draw())
        return {"generation_config": config, "logits_processor": LogitsProcessorList(draw)}

    def _shrinking(self, ids: Tensor, mask: Tensor, ends: set[int], options: dict[str, Any]) -> list[list[int]]:
        """The rows after generation; those that have ended leave the batch when they are half of it.

        Args:
            ids: [B, L] prompts.
            mask: [B, L] of their tokens.
            ends: tokens that end an answer.
            options: of `generate`.
        """
        cache = None if self.start is not None else _empty_cache(self.model)
        kept = {} if cache is None else {_CACHE: cache}
        rows, found = torch.arange(len(ids)), dict[int, list[int]]()
        stop_at = torch.tensor(sorted(ends), dtype=torch.long, device=ids.device)
        while True:
            half = _HalfEnded(stop_at, len(ids))
            criteria = StoppingCriteriaList([half] if cache is not None and len(ids) > _FEW_ROWS else [])
            ids = self.model.generate(input_ids=ids, attention_mask=mask, stopping_criteria=criteria, **options, **kept)
            found.update(zip(rows.tolist(), ids.tolist()))
            going = (~half.ended).nonzero()[:, 0].cpu()  # layers may be on several devices
            at_limit = ids.shape[1] == options["generation_config"].max_length
            if cache is None or not criteria or at_limit or not len(going):
                return [found[row] for row in range(len(found))]
            cache.batch_select_indices(going)
            ids, rows = ids[going], rows[going]
            mask = nn.functional.pad(mask[going], (0, ids.shape[1] - mask.shape[1]), value=1)
