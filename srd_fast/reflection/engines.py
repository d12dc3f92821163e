"""Generation engines: prompts as token ids in, generations as token ids out."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..models import load_model
from ..registry import Registry
from .sampling import Sampling
from .transformers_engine import TransformersEngine

logger = logging.getLogger(__name__)

AUTO = "auto"


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
