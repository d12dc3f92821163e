"""The teacher's cross-entropy of the references, and how far the student is behind it: what it can learn."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from ..data import IGNORE_INDEX, DistillationCollator, answer_ends, check_token_ids, prompt_lengths, token_counts
from ..errors import UserError
from ..losses import token_cross_entropy
from ..models import (
    check_positions,
    check_same_kind,
    decoder_start,
    embeddings_of,
    entry_device,
    load_config,
    load_model,
    model_without_weights,
)
from ..showing import progress_bar
from ..teacher import LiveTeacher
from ..teacher.collator import StepCollator
from ..teacher.live import moved
from ..teacher.source import HiddenRows, RowsOfSamples, TeacherSource, labels_with_loss
from .parts import cut

if TYPE_CHECKING:
    from .signals import Difficulty, Reflected


@torch.no_grad()
def teacher_cross_entropy(reflected: "Reflected") -> list[float]:
    """Mean token cross-entropy of each reference under the teacher, nats per token."""
    rows, source, sharing = reflected.dataset, reflected.teacher, reflected.sharing
    assert source is not None
    ends = set() if reflected.score_eos else answer_ends(rows, reflected.tokenizer)
    device = entry_device(reflected.student)
    kept = source.to(device) if isinstance(source, RowsOfSamples) else None
    collate = StepCollator(DistillationCollator(decoder_start=decoder_start(reflected.student)), kept)
    lengths = [len(x) for batch in rows.iter(1000) for x in batch["input_ids"]]
    batches = cut(lengths, reflected.batch_size, rows["sample_id"])
    mine = batches[sharing.rank :: sharing.world]
    found: dict[int, float] = {}
    bar = progress_bar(
        what="teacher's cross-entropy", total=sum(map(len, mine)), unit="sample", shown=reflected.progress
    )
    for indices in mine:
        some = rows[indices]
        samples = [dict(zip(some, row)) for row in zip(*some.values())]
        batch = moved(collate(samples), device)
        given = source.rows(batch, 1.0)
        if not isinstance(given, HiddenRows):
            raise UserError(
                f"the teacher's cross-entropy needs its hidden states, and this source gives {type(given).__name__}: "
                "give a cache of kind 'hidden', or the teacher itself"
            )
        losses = token_cross_entropy(given.hidden_ND, given.head, labels_with_loss(batch).to(given.hidden_ND.device))
        counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
        for i, labels, of_sample in zip(indices, some["labels"], losses.split(counts), strict=True):
            scored = of_sample[:-1] if labels[-1] in ends else of_sample
            found[i] = float(scored.mean()) if len(scored) else math.nan
        bar.update(len(indices))
    bar.close()
    by_sample = {i: value for of_process in sharing.gather(found) for i, value in of_process.items()}
    return [by_sample.get(i, math.nan) for i in range(len(rows))]


def gap(reflected: "Reflected") -> list[float]:
    """The student's cross-entropy of each reference minus the teacher's, nats per token: how much it can learn."""
    return [ours - theirs for ours, theirs in zip(reflected.student_losses, reflected.teacher_losses, strict=True)]


def check_teacher_given(teacher: object, signals: Iterable["Difficulty"]) -> None:
    """Refuse signals that compare with a teacher if there is none."""
    for signal in signals:
        if signal.needs_teacher and teacher is None:
            raise UserError(
                f"difficulty signal {signal.name!r} compares with a teacher: pass reflect(teacher=...), a model, its "
                "folder or hub id, or a cache of its hidden states"
            )


def check_teacher(
    teacher: PreTrainedModel | TeacherSource | str | None, student: PreTrainedModel | str, samples: Dataset
) -> None:
    """Refuse a teacher that cannot read the samples. A source of its rows cannot be checked before.

    Raises:
        UserError: it is of another kind than the student, or has no embedding or position for some token.
    """
    model = model_without_weights(teacher) if isinstance(teacher, str) else teacher
    if not isinstance(model, nn.Module):
        return
    check_same_kind(load_config(student) if isinstance(student, str) else student, model)
    check_token_ids(samples, {"teacher": embeddings_of(model)})
    ids, way_out = list(samples["sample_id"]), "shorten them"
    check_positions(token_counts(samples), prompt_lengths(samples), ids, {"teacher": teacher}, way_out)


def teacher_source(
    teacher: PreTrainedModel | TeacherSource | str | None, dtype: torch.dtype, device: torch.device | str
) -> TeacherSource | None:
    """The source of the teacher's rows: the given cache, or a live model, which is loaded if only its name is given."""
    if isinstance(teacher, str):
        teacher = load_model(teacher, dtype, device, quantised=True)
    return LiveTeacher(teacher, freeze=False) if isinstance(teacher, nn.Module) else teacher
