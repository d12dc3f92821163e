"""The order of the samples, and the batches of a training step, divided by their tokens if asked to."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainingArguments

from ..curriculum import Curriculum, CurriculumPlan
from ..data import IGNORE_INDEX, WEIGHT, divide_by_tokens, prompt_lengths, sequence_lengths, token_counts
from ..errors import UserError
from ..models import check_positions
from ..teacher import StepCollator, TeacherCache, TeacherSource
from .config import SRDConfig

logger = logging.getLogger(__name__)

MICRO_BATCHES = "micro_batches"
# Number of coming steps whose samples the operating system is told to read from the cache.
_AHEAD = 4


class IndexStream(Sampler[int]):
    """The curriculum's sequence of samples, as positions in the data set.

    Args:
        curriculum: the schedule.
        will_need: called with the samples of each step a few steps before their turn.
    """

    def __init__(self, curriculum: Curriculum, will_need: Callable[[list[int]], None] | None = None) -> None:
        self.curriculum, self.will_need = curriculum, will_need

    def __iter__(self) -> Iterator[int]:
        size = self.curriculum.batch_size
        ahead = islice(self.curriculum.indices(), _AHEAD * size, None)
        for number, index in enumerate(self.curriculum.indices()):
            yield index
            if self.will_need is not None and number % size == 0 and (coming := list(islice(ahead, size))):
                self.will_need(coming)

    def __len__(self) -> int:
        return self.curriculum.sample_passes


def index_stream(curriculum: Curriculum, samples: Dataset, teacher: TeacherSource) -> IndexStream:
    """Make the curriculum's sequence of samples. With a teacher cache, rows are read ahead.

    Args:
        curriculum: the samples' schedule.
        samples: tokenised samples, as the teacher sees them.
        teacher: any source of rows; only from a cache is anything read.

    Returns:
        The sequence.
    """
    if not isinstance(teacher, TeacherCache):
        return IndexStream(curriculum)
    rows, places = (
        samples.select_columns(["sample_id", "input_ids", "labels"]).with_format("numpy"),
        dict[int, tuple[int, int, int]](),
    )

    def will_need(indices: list[int]) -> None:
        new = [i for i in indices if i not in places]
        places.update(zip(new, map(teacher.place, rows.__getitems__(new))))
        for index in indices:
            teacher.will_need(places[index])

    return IndexStream(curriculum, will_need)


class TokenBatches:
    """Collates the samples of a step into several micro-batches with a limit on their tokens.

    The result has one key, `MICRO_BATCHES`.

    Args:
        collate: makes one micro-batch.
        max_tokens: the most tokens of a micro-batch, including padding.
        flattened: whether batches have no padding.
        encoder_decoder: whether the models are encoder-decoder models.
    """

    def __init__(self, collate: StepCollator, max_tokens: int, flattened: bool, encoder_decoder: bool = False) -> None:
        self.collate, self.max_tokens, self.flattened = collate, max_tokens, flattened
        self.encoder_decoder = encoder_decoder

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [sequence_lengths(s, self.encoder_decoder) for s in samples]
        parts = divide_by_tokens(lengths, self.max_tokens, self.flattened)
        return {MICRO_BATCHES: [self.collate([samples[i] for i in part]) for part in parts]}


def micro_batches(batch: Mapping[str, Any]) -> list[Any]:
    """The micro-batches in a collator's batch; the batch itself if it is not divided."""
    return batch.get(MICRO_BATCHES, [batch])


@contextmanager
def casts_kept() -> Iterator[None]:
    """Let autocast keep its copies of the weights from one micro-batch to the next, as it does within a forward pass.

    In the block the weights must not change, and must not be used with gradients switched off.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def make_curriculum(
    plan: CurriculumPlan, samples: Dataset, args: SRDConfig, processes: int | None = None
) -> Curriculum:
    """Make the schedule of a plan, as the config describes it.

    Args:
        plan: which samples belong to which stage.
        samples: tokenised samples, with sample_id.
        args: the training's config.
        processes: number of processes that share a step, at least 1. Default: those of the current training.

    Returns:
        The schedule.
    """
    world = args.world_size if processes is None else processes
    stages = args.of_stages(len(plan.subset_columns))
    return Curriculum(
        plan,
        samples["sample_id"],
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * world,
        epochs_per_stage=stages.epochs,
        temperatures=stages.temperatures,
        sft_weights=stages.sft_weights,
        learning_rates=stages.learning_rates,
        min_learning_rate=args.min_learning_rate,
        restart_learning_rate=args.restart_learning_rate,
        warmup=args.warmup_steps,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        lengths=[len(ids) for ids in samples["input_ids"]] if args.length_buckets > 1 else None,
        length_buckets=args.length_buckets,
    )


def with_weights(plan: CurriculumPlan, samples: Dataset) -> Dataset:
    """Add a plan's weights to samples, if it has any, divided by the mean of the kept samples' weights.

    Args:
        plan: the samples' plan.
        samples: tokenised samples, with sample_id.

    Returns:
        The samples, with a column `WEIGHT` if the plan has weights.

    Raises:
        UserError: a kept sample has no weight, or all weights are 0.
    """
    if not plan.weights:
        return samples
    kept = plan.kept
    lost = next((i for i in kept if i not in plan.weights), None)
    if lost is not None:
        raise UserError(f"the plan has weights, and none of sample {lost!r}, which it keeps: curate again")
    mean = sum(plan.weights[i] for i in kept) / len(kept)
    if not mean > 0:
        raise UserError("the plan's weights are 0 for all samples that it keeps, and there is nothing to train on")
    # Samples outside the plan are never drawn.
    return samples.add_column(WEIGHT, [plan.weights.get(i, 0.0) / mean for i in samples["sample_id"]])


def check_max_steps(curriculum: Curriculum, args: TrainingArguments) -> None:
    """Refuse a `max_steps` beyond the end of a curriculum.

    Args:
        curriculum: the training's schedule.
        args: the training's config.

    Raises:
        UserError: max_steps is larger than the number of steps.
    """
    if args.max_steps > curriculum.total_steps:
        raise UserError(
            f"max_steps is {args.max_steps} but the curriculum has {curriculum.total_steps} steps; raise "
            "epochs_per_stage, or leave max_steps out"
        )


def warn_of_cut(curriculum: Curriculum, args: SRDConfig) -> None:
    """Warn if `max_steps` ends a training in the middle of a stage, when the learning rate is still high.

    Args:
        curriculum: the training's schedule.
        args: the training's config.
    """
    most, total = args.max_steps, curriculum.total_steps
    if not 0 < most < total or curriculum.is_stage_start(most):
        return
    epochs = args.of_stages(len(curriculum.stages)).epochs
    fewer = [round(x * most / total, 3) for x in epochs]
    logger.warning(
        "max_steps ends training at step %d of %d, in stage %d of %d, at learning rate %.3g: the schedule is that of "
        "all steps; for a whole one of about as many steps set epochs_per_stage to %s instead",
        most, total, curriculum.stage_of(most) + 1, len(curriculum.stages), curriculum.learning_rate(most),
        fewer[0] if len(set(fewer)) == 1 else fewer,
    )  # fmt: skip


def check_fit(
    train: Dataset,
    evaluation: Dataset | None,
    curriculum: Curriculum,
    models: Mapping[str, object],
    privileged: bool = False,
) -> None:
    """Refuse samples of the curriculum or of the evaluation that need more positions than a model has.

    Args:
        train: tokenised samples.
        evaluation: tokenised samples, or None.
        curriculum: the schedule of `train`.
        models: the models, by the names that messages use.
        privileged: whether the prompts are those of a teacher that reads more than the student.

    Raises:
        UserError: a sample is too long. The message names the longest one.
    """
    used = train.select(sorted({i for stage in curriculum.stages for i in stage.samples.tolist()}))
    for samples in (used, evaluation):
        if samples is not None:
            way_out = f"lower max_{'privileged' if privileged else 'prompt'}_length or max_response_length"
            check_positions(token_counts(samples), prompt_lengths(samples), samples["sample_id"], models, way_out)


def check_lengths(most: int, curriculum: Curriculum, train: Dataset, encoder_decoder: bool = False) -> None:
    """Refuse a sample that no micro-batch can hold.

    Args:
        most: the most tokens of a micro-batch, `max_tokens_per_batch`.
        curriculum: the schedule of `train`.
        train: tokenised samples.
        encoder_decoder: whether the models are encoder-decoder models, so that a response has a start token.

    Raises:
        UserError: a sample is too long. The message names the longest one.
    """
    lengths = [len(ids) + encoder_decoder for ids in train["input_ids"]]
    longest = max((i for stage in curriculum.stages for i in stage.samples.tolist()), key=lengths.__getitem__)
    if lengths[longest] > most:
        raise UserError(
            f"max_tokens_per_batch is {most} but sample {train[longest]['sample_id']!r} has {lengths[longest]} "
            "tokens; raise it to that at least, or lower max_prompt_length or max_response_length"
        )


def evaluation_batches(
    dataset: Dataset, args: SRDConfig, collate: Callable[..., Any]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield batches with their samples: each row is in one batch of one rank, and all ranks get equally many batches.

    A rank that has no rows left gets a batch without loss.
    """
    world, size = args.world_size, args.per_device_eval_batch_size
    mine = list(range(args.process_index, len(dataset), world))
    for start in range(0, math.ceil(len(dataset) / world), size):
        samples = [dataset[i] for i in mine[start : start + size]]
        if not samples:
            samples = [{**dataset[0], "labels": [IGNORE_INDEX] * len(dataset[0]["labels"])}]
        yield collate(samples), samples
