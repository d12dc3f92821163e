"""Fresh answers instead of a batch's own: by the student at that step (GKD, arXiv 2306.13649), or by the teacher.

The loader collates a batch before the weights of its step exist. So each batch carries its samples, and just before the
step `FreshAnswers` makes another batch from their prompts and new answers.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..curriculum import Curriculum
from ..data import (
    PRIVILEGED_IDS,
    answer_ends,
    answered,
    end_of,
    first_label,
    prompt_lengths,
    seen_by_teacher,
    token_counts,
)
from ..errors import UserError
from ..models import check_positions, is_encoder_decoder
from ..reflection import GenerationEngine, Sampling, stopping_at
from ..teacher import LiveTeacher, OwnTeacher, RowsOfSamples, TeacherSource, at_work
from .batching import micro_batches
from .config import SRDConfig
from .kept_engine import KeptEngine
from .replay import DATA, FRESH, REPLAYED, AnswerSchedule, ReplayBuffer, place_seed

logger = logging.getLogger(__name__)

# Share of cut answers that is told.
_MANY_CUT = 0.9
# Keys of a batch: its samples; whether its labels are the student's own answers.
SAMPLES, OWN = "samples", "own_answers"
# Counts that are summed over the steps and processes between two logs.
_COUNTED = ("steps", "own", "replayed", "answers", "cut", "empty", "tokens", "seconds")


class BatchSamples:
    """The samples of a batch, in a wrapper that data loaders pass on unchanged.

    Args:
        samples: tokenised samples.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]]) -> None:
        self.samples = samples


class WithSamples:
    """Collates like another collator, and adds the samples to their batch.

    Args:
        collate: the other collator.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.collate(samples), SAMPLES: BatchSamples(samples)}


def check_answering(
    args: SRDConfig,
    student: nn.Module,
    teacher: TeacherSource,
    classes: int,
    curriculum: Curriculum,
    train: Dataset,
    taught: Dataset,
) -> None:
    """Refuse a training whose steps could not have fresh answers.

    Args:
        args: the training's config.
        student: the model that is trained.
        teacher: the source of the teacher's rows.
        classes: the student's number of classes.
        curriculum: the schedule of `train`.
        train: tokenised samples.
        taught: the same samples, as the teacher sees them.

    Raises:
        UserError: the student or the teacher cannot run on new answers, or prompts leave no room for them.
    """
    asked = f"lmbda is {args.lmbda!r}" if args.lmbda else "seq_kd is true"
    live = at_work(teacher)
    if isinstance(live, RowsOfSamples):
        raise UserError(
            f"{asked}, and a cache has no rows of fresh answers: give the teacher itself as "
            "teacher_model, and the cache as teacher_cache"
        )
    if classes > teacher.num_classes:
        raise UserError(
            f"{asked}, but the student has {classes} classes and the teacher "
            f"{teacher.num_classes}: fresh answers may hold tokens that the teacher does not have"
        )
    if args.seq_kd and not isinstance(live, LiveTeacher):
        raise UserError(f"seq_kd needs a teacher that can answer, a model, not {type(live).__name__}")
    kept = sorted({i for stage in curriculum.stages for i in stage.samples.tolist()})
    theirs = live.model if isinstance(live, LiveTeacher) else live
    of_teacher = "prompt" if taught is train else "privileged"
    for samples, models, prompt in ((taught, {"teacher": theirs}, of_teacher), (train, {"student": student}, "prompt")):
        used = samples.select(kept)
        prompts = prompt_lengths(used)
        way_out = f"lower max_new_tokens or max_{prompt}_length"
        check_positions(token_counts(used), prompts, used["sample_id"], models, way_out, args.max_new_tokens)
    longest = max(prompts) + args.max_new_tokens + is_encoder_decoder(student)
    if 0 < args.max_tokens_per_batch < longest:
        raise UserError(
            f"max_tokens_per_batch is {args.max_tokens_per_batch}, but a prompt and its fresh answer may have "
            f"{longest} tokens; raise it to that, or lower max_new_tokens"
        )


class FreshAnswers:
    """Decides for each step on which answers it trains, and makes them.

    Everything depends only on the seed, the step, the weights, the log, and what was saved with a checkpoint.

    Args:
        args: the training's config.
        tokenizer: the models' tokenizer.
        train: the tokenised samples.
        total_steps: the curriculum's number of steps.
        collate: makes a batch, or micro-batches, of samples, without a cache's rows.
        longest: tokens of the longest prompt that the teacher sees.
        engine: the student's engine.
        classes: the student's number of classes.
    """

    def __init__(
        self,
        args: SRDConfig,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        total_steps: int,
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
        longest: int,
        engine: KeptEngine,
        classes: int,
    ) -> None:
        self.args, self.tokenizer, self.collate, self.classes = args, tokenizer, collate, classes
        self.schedule = AnswerSchedule(args.lmbda, args.replay_buffer, total_steps, args.seed)
        self.buffer = ReplayBuffer(args.replay_buffer)
        self.ends, self.eos = answer_ends(train, tokenizer), int(tokenizer.eos_token_id)
        self._length = max(prompt_lengths(train)) + args.max_new_tokens
        self._length_of_teacher = longest + args.max_new_tokens
        sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.generation_temperature)
        self._sampling = stopping_at(sampling, sorted(self.ends - {self.eos}))
        self._of_student, self._of_teacher = engine, KeptEngine(args, tokenizer)
        engine.reserve(self._length)
        self._counts, self._lag, self._warned = dict.fromkeys(_COUNTED, 0.0), 0, False

    def in_place_of(
        self,
        batches: list[dict[str, Any]],
        step: int,
        losses: Sequence[float],
        student: nn.Module,
        teacher: TeacherSource,
    ) -> list[dict[str, Any]]:
        """The batches that a step trains on.

        Args:
            batches: the loader's batches. Their samples are taken out.
            step: the step's number, from 0.
            losses: the validation losses before the step.
            student: the student, without wrappers.
            teacher: the source of the teacher's rows.

        Returns:
            The same batches, or others with the same prompts; with the key `OWN` if labels are the student's answers.
        """
        drawn = [batch.pop(SAMPLES).samples for batch in batches]
        kind = self.schedule.kind(step, losses, len(self.buffer))
        self._counts["steps"] += 1
        self._counts["own"] += kind != DATA
        self._counts["replayed"] += kind == REPLAYED
        if kind == DATA and not self.args.seq_kd:
            return batches
        made = []
        for number, samples in enumerate(drawn):
            seed = place_seed(self.args.seed, step, number, self.args.process_index)
            if kind == REPLAYED:
                answers: Sequence[Mapping[str, Any]] = self.buffer.draw(len(samples), seed)
            else:
                began = time.monotonic()
                answers = self._answers(samples, seed, step, None if kind == FRESH else teacher, student)
                self._counts["seconds"] += time.monotonic() - began
            if kind == FRESH:
                self.buffer.add(answers)
            batch = self.collate(answers)
            for part in micro_batches(batch):
                part[OWN] = kind != DATA
            made.append(batch)
        for engine in (self._of_student, self._of_teacher):
            engine.rest()
        return made

    def _answers(
        self,
        samples: Sequence[Mapping[str, Any]],
        seed: int,
        step: int,
        teacher: TeacherSource | None,
        student: nn.Module,
    ) -> list[dict[str, Any]]:
        """The samples with new answers by the student, or by the teacher if it is given."""
        seen = [s if teacher is None or PRIVILEGED_IDS not in s else seen_by_teacher(s) for s in samples]
        prompts = [[int(x) for x in s["input_ids"][: first_label(s["labels"])]] for s in seen]
        sampling = Sampling(**{**vars(self._sampling), "seed": seed})
        if teacher is None:
            engine = self._engine(self._of_student, student, step, self._length, moves=True)
            self._lag = max(self._lag, self._of_student.lag(step))
            found = dict(engine.generate(prompts, sampling))
        else:
            live = at_work(teacher)
            assert isinstance(live, LiveTeacher)  # `check_answering` refuses others
            moves = isinstance(live, OwnTeacher) and live.moves
            engine = self._engine(self._of_teacher, live.model, step, self._length_of_teacher, moves)
            found = live.run(lambda: dict(engine.generate(prompts, sampling)))
            highest = max((x for ids in found.values() for x in ids), default=0)
            if highest >= self.classes:
                raise UserError(
                    f"seq_kd: the teacher answered with token {highest}, and the student has {self.classes} classes: "
                    "give the student as many as the teacher (resize_token_embeddings)"
                )
        return [self._answered(sample, found[i]) for i, sample in enumerate(samples)]

    def _answered(self, sample: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
        """A sample with an answer. The answer's end token has loss; an answer that the limit cut has none.

        An empty answer is only the end token: the student has to unlearn to stop at once.
        """
        cut = len(ids) >= self.args.max_new_tokens
        for name, value in (("answers", 1), ("cut", cut), ("empty", not ids), ("tokens", len(ids))):
            self._counts[name] += value
        return answered(sample, ids, None if cut else end_of(sample["labels"], self.ends, self.eos))

    def _engine(self, kept: KeptEngine, model: Any, step: int, length: int, moves: bool) -> GenerationEngine:
        """The engine with a model's weights. If the model is being trained, they may be `sync_every` steps old."""
        behind = self.args.sync_every - 1 if moves else step
        return kept.of(model, step, self._sampling, self.args.per_device_train_batch_size, length, behind)

    def close(self) -> None:
        """Close the teacher's engine; a later step starts it again."""
        self._of_teacher.close()

    def take(self, losses: Sequence[float], add: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What happened since the last call, for the log.

        Args:
            losses: the validation losses so far.
            add: sums a tensor over the processes of the training.

        Returns:
            own_answers and replayed: shares of the steps. If there were fresh answers, answers_cut and answers_empty:
            shares of them, and answer_tokens: their mean length. generation_seconds: mean of a step in a process.
            weights_lag: how many steps old an engine's weights were at most. lmbda: the share for the next step.
        """
        sums = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=self.args.device)
        total = dict(zip(_COUNTED, add(sums).tolist(), strict=True))
        steps = max(1.0, total["steps"])
        found = {
            "own_answers": total["own"] / steps,
            "replayed": total["replayed"] / steps,
            "generation_seconds": total["seconds"] / steps,
            "weights_lag": float(self._lag),
            "lmbda": self.schedule.share_after(losses),
        }
        if total["answers"]:
            shares = {"answers_cut": total["cut"], "answers_empty": total["empty"], "answer_tokens": total["tokens"]}
            found |= {name: count / total["answers"] for name, count in shares.items()}
            self._warn_of_cut(found["answers_cut"])
        self._counts, self._lag = dict.fromkeys(_COUNTED, 0.0), 0
        return found

    def _warn_of_cut(self, share: float) -> None:
        """Say once that hardly any answer ends."""
        if share >= _MANY_CUT and not self._warned:
            self._warned = True
            logger.warning(
                "%.0f %% of the fresh answers since the last log did not end within max_new_tokens=%d: raise it if the "
                "data's answers are longer. A student that is trained on endless answers of its own learns to write "
                "them; a lower learning rate, a lower lmbda or fine-tuning it first helps",
                100 * share,
                self.args.max_new_tokens,
            )

    @property
    def _file(self) -> str:
        return f"own_answers-{self.args.process_index}.parquet"

    def save(self, checkpoint: Path) -> None:
        """Save the buffer. This must come before the checkpoint's last file, which marks it as complete."""
        if self.args.replay_buffer:
            checkpoint.mkdir(parents=True, exist_ok=True)
            self.buffer.save(checkpoint / self._file)

    def load(self, checkpoint: Path) -> None:
        """Load the buffer of a checkpoint. If there is no such file, the buffer is empty."""
        if self.args.replay_buffer and (checkpoint / self._file).is_file():
            self.buffer.load(checkpoint / self._file)
