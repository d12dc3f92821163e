"""The micro-batches of a run's training: from its prepared samples, or else from the limits in its config."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import ValidationError

from ..curriculum import CurriculumPlan
from ..data import IGNORE_INDEX, divide_by_tokens
from ..errors import UserError
from ..run.config import RunConfig
from ..run.steps import Run
from ..training.batching import make_curriculum
from ..training.config import SRDConfig
from .batch import Batch


@dataclass(frozen=True)
class Lengths:
    """Tokens, and tokens with loss, of each prepared sample, in order. train_order: the run's sequence, if known."""

    train: list[tuple[int, int]]
    validation: list[tuple[int, int]]
    train_order: list[int] | None
    kept: list[int] | None
    source: str


_LIMITS = ("max_prompt_length", "max_response_length")
_SPEECH = ("chat_template_kwargs", "parse_special_tokens", "columns", "data_function", "train_on")
_DATA_KEYS = ("teacher", "data", "data_split", "validation", "max_rows", "template", *_SPEECH, "seed", *_LIMITS)
_PLAN_KEYS = ("student", "init_student", "reflect", "curate")


def _same(config: RunConfig, folder: Path, keys: Sequence[str]) -> bool:
    """Whether the run folder was made with the same values of these keys."""
    try:
        there = RunConfig(**yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValidationError):
        return False
    return all(getattr(there, k) == getattr(config, k) for k in keys)


def read_lengths(config: RunConfig, args: SRDConfig) -> Lengths | None:
    """Lengths of the samples in the run folder, if they were made with the same settings; else None."""
    folder = Path(config.output_dir)
    if not (folder / "data" / "validation.parquet").is_file() or not _same(config, folder, _DATA_KEYS):
        return None
    run = Run(config, folder, {}, {})
    samples = {split: run.data(split) for split in ("train", "validation")}
    sizes = {
        split: [
            (len(ids), sum(x != IGNORE_INDEX for x in labels[1:]))
            for ids, labels in zip(rows["input_ids"], rows["labels"])
        ]
        for split, rows in samples.items()
    }
    order = kept = None
    source = f"the longest samples of {folder / 'data'}"
    if (folder / "plan.json").is_file() and _same(config, folder, _PLAN_KEYS):
        try:
            curriculum = make_curriculum(CurriculumPlan.load(folder / "plan.json"), samples["train"], args)
        except UserError:
            pass  # the plan is of other data
        else:
            steps = curriculum.total_steps if args.max_steps < 0 else min(args.max_steps, curriculum.total_steps)
            order = list(curriculum.indices())[: steps * curriculum.batch_size]
            kept = sorted({i for stage in curriculum.stages for i in stage.samples.tolist()})
            source = f"every batch of {folder / 'plan.json'}"
    return Lengths(sizes["train"], sizes["validation"], order, kept, source)


Sizes = Sequence[tuple[int, int]]  # for each sample: tokens, and tokens with loss


def _batch(sizes: Sizes, encoder_decoder: bool) -> Batch:
    """A batch of samples whose tokens before those with loss are prompts."""
    prompts = tuple(n - rows for n, rows in sizes) if encoder_decoder else None
    return Batch(tuple(n for n, _ in sizes), sum(rows for _, rows in sizes), prompts)


def _largest(batches: Sequence[Sizes], flattened: bool, encoder_decoder: bool) -> Batch:
    """The batch with the most tokens, including padding, but with the largest number of rows of any batch."""
    made = [_batch(sizes, encoder_decoder) for sizes in batches]
    chosen = max(made, key=lambda batch: batch.tokens(flattened))
    return replace(chosen, rows=max(batch.rows for batch in made))


def _divided(batch: Sizes, most: int, flattened: bool, encoder_decoder: bool) -> list[Sizes]:
    """The micro-batches that `max_tokens_per_batch` makes of a batch. A longer sample is a micro-batch of its own."""
    if not most:
        return [batch]
    lengths = _batch(batch, encoder_decoder).sequences
    parts = divide_by_tokens(lengths, max(most, *map(sum, lengths)), flattened)
    return [[batch[i] for i in part] for part in parts]


def train_batches(lengths: Lengths | None, config: RunConfig, size: int, encoder_decoder: bool = False) -> list[Sizes]:
    """The batches of the run, or the largest that are possible."""
    if lengths is None:
        return [[(config.max_prompt_length + config.max_response_length, config.max_response_length)] * size]
    if lengths.train_order is None:
        longest = sorted(lengths.train, key=lambda x: -x[0])[:size]
        most_rows = sorted((rows for _, rows in lengths.train), reverse=True)
        if encoder_decoder:
            prompts = sorted((n - rows for n, rows in lengths.train), reverse=True)[:size]
            return [[(n + rows, rows) for n, rows in zip(prompts, most_rows)]]
        return [[(n, rows) for (n, _), rows in zip(longest, most_rows)]]
    order = [lengths.train[i] for i in lengths.train_order]
    return [order[i : i + size] for i in range(0, len(order), size)]


def train_batch(
    lengths: Lengths | None, config: RunConfig, args: SRDConfig, flattened: bool, encoder_decoder: bool
) -> Batch:
    """The largest micro-batch of training."""
    batches = train_batches(lengths, config, args.per_device_train_batch_size, encoder_decoder)
    most = args.max_tokens_per_batch
    parts = [part for batch in batches for part in _divided(batch, most, flattened, encoder_decoder)]
    return _largest(parts, flattened, encoder_decoder)


def evaluation_batch(
    lengths: Lengths | None, config: RunConfig, size: int, flattened: bool, encoder_decoder: bool
) -> Batch:
    """The largest batch of an evaluation."""
    if lengths is None:
        if isinstance(config.validation, int):
            size = min(size, config.validation)
        return _largest(train_batches(None, config, size), flattened, encoder_decoder)
    rows = lengths.validation
    return _largest([rows[i : i + size] for i in range(0, len(rows), size)], flattened, encoder_decoder)
