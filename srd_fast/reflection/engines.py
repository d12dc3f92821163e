"""Generation engines: prompts as token ids in, generations as token ids out."""

import hashlib
import inspect
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import distributed
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import batches_by_length, pad_id
from ..errors import UserError
from ..models import called_by_parts, decoder_start, embeddings_of, entry_device, load_model, unwrap
from ..registry import Registry

logger = logging.getLogger(__name__)

AUTO = "auto"


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


class GenerationEngine(Protocol):
    """The interface of an engine: `generate` yields (index of the prompt, generated ids without EOS), in any order.

    Further members, all optional:

    parallel: how many calls of `generate` it accepts at once, from threads (default 1).
    shard_size: how many prompts `reflect` passes in one call (default 256).
    reserve(length, sampling): called before the first `generate`; length: most tokens of a prompt and its generation.
    token_log_probs(samples): like `generate`: the log-probabilities of all tokens but the first of each sample.
    settings: what its answers depend on besides `Sampling`; it is stored with them. Default: all its options.
    update_weights(student): for engines with their own weights: use the current weights of this model, which has the
        same shapes. If that is impossible, it raises a UserError; a training then closes the engine and makes a new
        one, as it does without this method.
    sleep(): free what memory it can until the next call; called after the answers of a step or an evaluation.
    close(): called after the last `generate`.
    """

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Generate for every prompt."""


def stopping_at(sampling: Sampling, ids: Sequence[int]) -> Sampling:
    """The same sampling with additional tokens that end an answer."""
    return replace(sampling, stop_ids=tuple(sorted({*sampling.stop_ids, *ids})))


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> set[int]:
    """Ids that end a generation: the tokenizer's EOS and those of the model's generation config."""
    own = getattr(generation_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


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


def until_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """The ids before the first that ends a generation."""
    return list(ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))])


# For a process that has no batch left while others do.
_IDLE = Sampling(max_new_tokens=1)


class TransformersEngine:
    """Generation with `transformers`, in batches of similar length, longest first.

    Prompts are padded on the left; those of an encoder-decoder model on the right, as in training. Only `Sampling`
    decides how to generate; of the student's generation config, only the tokens that begin and end an answer are used.

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

    def _config(self, sampling: Sampling) -> GenerationConfig:
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {n: getattr(sampling, n) for n in ("temperature", "top_p", "top_k")}
            options |= {"min_p": sampling.min_p} if sampling.min_p else {}
        if sampling.repetition_penalty != 1:
            options["repetition_penalty"] = sampling.repetition_penalty
        if sampling.no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = sampling.no_repeat_ngram_size
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted({*self.ends, *sampling.stop_ids}),
            pad_token_id=self.pad,
            **self.starts,
            use_cache=True,
            **options,
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        """Yield the generations, batch by batch. Sampled text depends on the seed and on which prompts share a batch.

        All processes that have shards of a model must generate together, each from its own prompts.
        """
        config, was_training = self._config(sampling), self.model.training
        batches = list(batches_by_length([len(p) for p in prompts], self.batch_size))
        self.model.eval()
        try:
            with called_by_parts(self.model) as together:
                more_elsewhere = self._most(len(batches)) - len(batches) if together else 0
                for indices in batches:
                    given = [prompts[i] for i in indices]
                    yield from zip(indices, self._batch(given, config, sampling, together))
                for _ in range(more_elsewhere):
                    self._batch([[self.pad]], self._config(_IDLE), _IDLE, together)
        finally:
            self.model.train(was_training)

    def _most(self, batches: int) -> int:
        """The largest number of batches that any process has."""
        most = torch.tensor(batches, device=entry_device(self.model))
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return int(most)

    def _batch(
        self, prompts: list[Sequence[int]], config: GenerationConfig, sampling: Sampling, together: bool
    ) -> list[list[int]]:
        width = max(1, *(len(p) for p in prompts))
        ids = torch.full((len(prompts), width), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if self.start is None else slice(len(prompt))
            ids[row, place] = torch.tensor(prompt, dtype=torch.long)
            mask[row, place] = 1
        device = entry_device(self.model)
        with torch.random.fork_rng(enabled=sampling.temperature > 0), nothing_shipped(self.model):
            if sampling.temperature > 0:
                torch.manual_seed(sampling.seed_of(prompts))
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                synced_gpus=together or None,
            )
        begun = width if self.start is None else 1  # what generate returns begins with the prompt, or the start token
        return [until_end(row, {*self.ends, *sampling.stop_ids}) for row in out[:, begun:].tolist()]


@dataclass(frozen=True)
class _Entry:
    factory: Callable[..., GenerationEngine]
    from_source: bool


def _vllm(*args: Any, **options: Any) -> GenerationEngine:
    from .vllm_engine import VLLMEngine

    return VLLMEngine(*args, **options)


def _ray(*args: Any, **options: Any) -> GenerationEngine:
    from .ray_engine import RayEngine

    return RayEngine(*args, **options)


ENGINES = Registry(
    "engine",
    {
        "transformers": _Entry(TransformersEngine, from_source=False),
        "vllm": _Entry(_vllm, from_source=True),
        "ray": _Entry(_ray, from_source=True),
    },
    reserved=[AUTO],
)


def engine_names() -> list[str]:
    """Names that `engine=` takes.

    Returns:
        All names, in alphabetical order.
    """
    return ENGINES.names()


def register_engine(
    name: str, factory: Callable[..., GenerationEngine], *, from_source: bool = False, replace: bool = False
) -> None:
    """Add a generation engine under `name`, usable at once as `engine=name`.

    Args:
        name: a new name; an existing one only with `replace=True`.
        factory: `factory(student, tokenizer, batch_size=..., **engine_options)` -> a `GenerationEngine`.
        from_source: if `reflect` was given the student's name or folder, pass that as `student`, and `dtype` as an
            option. Without it, `student` is always a loaded model.
        replace: whether an existing engine of this name is replaced.

    Raises:
        UserError: the name is taken, or is not text.
    """
    ENGINES.register(name, _Entry(factory, from_source), replace=replace)


def check_engine_options(options: Mapping[str, Any] | None) -> None:
    """Refuse options of an engine that every engine gets anyway.

    Raises:
        UserError: there is such an option. The message says where it belongs.
    """
    for name in options or ():
        if name in ("batch_size", "length", "sampling", "device"):
            given = {"length": "follows from the data", "sampling": "is an argument of its own, or the keys beside it"}
            raise UserError(
                f"engine_options holds {name!r}, which {given.get(name, 'is an argument of its own, beside them')}"
            )


def make_engine(
    name: str,
    student: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    sampling: Sampling,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> GenerationEngine:
    """Make the engine called `name` for a student.

    Args:
        name: a name from `engine_names()`; "auto" is vllm if that is installed and starts, else transformers.
        student: a causal language model, or the folder or hub id of one.
        tokenizer: the student's tokenizer.
        sampling: how answers will be generated.
        length: tokens of the longest prompt and its generation together, or of the longest sample to score.
        dtype: the dtype in which a student given by name is loaded.
        device: where a student given by name is loaded.
        **options: batch_size and further options of the engine.

    Raises:
        UserError: the name or an option is unknown, or the engine does not start.
    """
    ENGINES.check(name)
    if name == AUTO:
        from ..workers.vllm import is_installed

        if is_installed():
            try:
                engine = _make("vllm", student, tokenizer, length, sampling, dtype, device, options)
                engine.start()  # type: ignore[attr-defined]
                return engine
            except UserError as e:
                logger.warning("engine auto takes transformers, because vLLM cannot be used: %s", e)
        name = "transformers"
    return _make(name, student, tokenizer, length, sampling, dtype, device, options)


def _make(
    name: str,
    student: PreTrainedModel | str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    sampling: Sampling,
    dtype: torch.dtype,
    device: torch.device | str,
    options: dict[str, Any],
) -> GenerationEngine:
    entry = ENGINES.get(name)
    if isinstance(student, str) and entry.from_source:
        options = {"dtype": dtype, **options}
    try:
        inspect.signature(entry.factory).bind(student, tokenizer, **options)
    except TypeError as e:
        raise UserError(f"engine {name!r} does not take these options: {e}") from e
    if isinstance(student, str) and not entry.from_source:
        student = load_model(student, dtype, device)
    engine = entry.factory(student, tokenizer, **options)
    if hasattr(engine, "reserve"):
        engine.reserve(length, sampling)
    return engine


@contextmanager
def open_engine(*args: Any, **options: Any) -> Iterator[GenerationEngine]:
    """`make_engine`, closed at the end."""
    engine = make_engine(*args, **options)
    try:
        yield engine
    finally:
        if hasattr(engine, "close"):
            engine.close()


def engine_settings(engine: GenerationEngine, sampling: Sampling) -> dict[str, Any]:
    """What a generation depends on besides student and prompt. It is stored with it, so that none are mixed up."""
    settings = {"engine": type(engine).__name__, **getattr(engine, "settings", {}), **asdict(sampling)}
    if not sampling.stop_ids:  # so that parts of versions without this field stay readable
        del settings["stop_ids"]
    return settings
