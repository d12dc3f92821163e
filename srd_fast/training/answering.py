"""A model answers held-out prompts: in a separate evaluation, or at intervals during its training."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..data import Answers, batches_by_length, first_label, prompt_lengths, token_counts
from ..errors import UserError
from ..models import check_positions
from ..reflection import GenerationEngine, Sampling, stopping_at
from ..reflection.signals import check_rows
from ..sharing import Sharing
from ..showing import progress_bar
from .answer_metrics import AnswerMetrics
from .config import SRDConfig
from .kept_engine import KeptEngine

T = TypeVar("T")


class Prompts:
    """The prompts of samples, which an engine answers in batches.

    Args:
        samples: tokenised samples.
        tokenizer: the samples' tokenizer.
        batch_size: prompts that are answered together.
    """

    def __init__(self, samples: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        self.reader, self.batch_size = Answers(samples, tokenizer), batch_size
        rows: Any = samples.select_columns(["input_ids", "labels"])
        self.ids = [row["input_ids"][: first_label(row["labels"])] for row in rows]

    def longest(self, sampling: Sampling) -> int:
        """Number of tokens of the longest prompt and its answer together."""
        return max(map(len, self.ids)) + sampling.max_new_tokens

    def answered(self, engine: GenerationEngine, sampling: Sampling, sharing: Sharing, progress: bool) -> list[str]:
        """Answer all prompts.

        Args:
            engine: the model's engine.
            sampling: how to generate, including the tokens that end answers.
            sharing: the processes that do it together. Each takes whole batches, so that every answer is generated in
                the same batch as with one process.
            progress: show a progress bar.

        Returns:
            The text of each answer. In all processes but the first it may be empty.
        """
        batches = list(batches_by_length([*map(len, self.ids)], self.batch_size))[sharing.rank :: sharing.world]
        mine = sorted(i for batch in batches for i in batch)
        made = engine.generate([self.ids[i] for i in mine], sampling)
        bar = progress_bar(made, what="generate", total=len(mine), unit="sample", shown=progress)
        of_mine = {mine[i]: self.reader.text(mine[i], generated) for i, generated in bar}
        texts = [""] * len(self.ids)
        for of_process in sharing.gather(of_mine):
            for i, text in of_process.items():
                texts[i] = text
        return texts


class Training(Sharing):
    """The processes of a training, for work that they share between its steps.

    Args:
        args: the training's config.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.rank, self.world = args.process_index, args.world_size

    def share(self, value: T) -> T:
        """Return the first process's value in every process."""
        values = [value]
        if self.world > 1:
            broadcast_object_list(values)
        return values[0]

    def gather(self, mine: T) -> list[T]:
        """Return the values of all processes, by rank, in every process."""
        return [mine] if self.world == 1 else list(gather_object([mine]))


@contextmanager
def draws_kept(device: torch.device) -> Iterator[None]:
    """Restore the states of all random number generators (Python, NumPy, torch; host and device) after the block."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def check_generation(args: SRDConfig, student: nn.Module, sets: Sequence[Dataset]) -> None:
    """Refuse a training whose evaluations could not generate answers.

    Args:
        args: the training's config, with `eval_generate`.
        student: the model that is trained.
        sets: tokenised validation samples.

    Raises:
        UserError: there are no prompts, or they leave no room for answers.
    """
    if not sets:
        raise UserError("eval_generate is true, but there is no eval_dataset: give one, or set it to false")
    for samples in sets:
        rows = samples.select(chosen_rows(len(samples), args.eval_generate_rows))
        check_rows(args.answer_metrics, rows, f"the {len(rows)} validation rows")
        check_positions(
            token_counts(rows),
            prompt_lengths(rows),
            rows["sample_id"],
            {"student": student},
            "lower eval_max_new_tokens or max_prompt_length",
            args.answer_limit,
        )


def chosen_rows(count: int, most: int | None) -> list[int]:
    """Indices of the rows that are answered, spread evenly over all rows: the same at each evaluation."""
    if most is None or most >= count:
        return list(range(count))
    return [i * count // most for i in range(most)]


class _Set(NamedTuple):
    prompts: Prompts
    metrics: AnswerMetrics


class EvaluationAnswers:
    """Answers validation prompts with the student's current weights, and scores the answers.

    They depend only on the weights, the seed and the rows. The training's random numbers are not used.

    Args:
        args: the training's config.
        tokenizer: the student's tokenizer.
        autocast: makes the autocast context in which the student runs.
        engine: the student's engine.
        sets: tokenised validation samples that are known beforehand.
    """

    def __init__(
        self,
        args: SRDConfig,
        tokenizer: PreTrainedTokenizerBase,
        autocast: Callable[[], AbstractContextManager[Any]],
        engine: KeptEngine,
        sets: Sequence[Dataset] = (),
    ) -> None:
        self.args, self.tokenizer, self.autocast, self.engine = args, tokenizer, autocast, engine
        for samples in sets:
            rows = samples.select(chosen_rows(len(samples), args.eval_generate_rows))
            engine.reserve(max(prompt_lengths(rows)) + args.answer_limit)
        self.sharing = Training(args)
        self._sets: dict[str, _Set] = {}

    def measure(self, samples: Dataset, student: Any, step: int) -> Mapping[str, float]:
        """Let the student answer with its current weights, in all processes together.

        Args:
            samples: tokenised samples.
            student: the student, without wrappers.
            step: number of the training step.

        Returns:
            The value of each metric, and generation_seconds; the same in every process.
        """
        began, args = time.monotonic(), self.args
        prompts, metrics = self._set(samples)
        sampling = Sampling(max_new_tokens=args.answer_limit, temperature=args.eval_temperature, seed=args.seed)
        sampling = stopping_at(sampling, prompts.reader.stop_ids)
        with draws_kept(args.device), self.autocast():
            engine = self.engine.of(student, step, sampling, prompts.batch_size, prompts.longest(sampling))
            answers = prompts.answered(engine, sampling, self.sharing, progress=False)
            self.engine.rest()
            # Only in one process: tests of code depend on the clock, and a user's function may be random.
            found = metrics(answers, student).means if self.sharing.rank == 0 else {}
        shared: dict[str, float] = self.sharing.share({**found, "generation_seconds": time.monotonic() - began})
        return shared

    def _set(self, samples: Dataset) -> _Set:
        key = samples._fingerprint
        if key not in self._sets:
            size = self.args.per_device_eval_batch_size
            rows = samples.select(chosen_rows(len(samples), self.args.eval_generate_rows))
            prompts = Prompts(rows, self.tokenizer, size)
            self._sets[key] = _Set(
                prompts, AnswerMetrics(self.args.answer_metrics, rows, self.tokenizer, batch_size=size)
            )
        return self._sets[key]
