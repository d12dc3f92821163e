"""The interface of teachers: their rows for a batch, whether they run beside the student or were run before."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data import IGNORE_INDEX
from ..losses import (
    DistillationOutput,
    Head,
    Projected,
    Sampled,
    StudentRows,
    TopK,
    loss_beside_compact_teacher,
    loss_beside_head,
)


class HiddenRows(NamedTuple):
    """A teacher's rows as hidden states.

    Attributes:
        hidden_ND: [N, D_T] last hidden states of the rows with loss.
        head: turns them into logits.
        lse_N: [N] log sum_v exp(z_v / T) at the requested temperature, or None if the source does not store it. z are
            the unrounded logits after scale, bias and softcap; v is over the classes that student and teacher share.
            Float32, or float64 with a float64 head.
    """

    hidden_ND: Tensor
    head: Head
    lse_N: Tensor | None = None


TeacherRows = HiddenRows | TopK | Sampled | Projected


class TeacherSource(Protocol):
    """The interface of a teacher. Any object with these members can be the `teacher_model` of `SRDTrainer`.

    Attributes:
        num_classes: V_T, the number of the teacher's classes.
    """

    num_classes: int

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """Return the teacher's side of a batch's rows with loss, without gradient.

        Args:
            batch: the collator's batch: the model's inputs, labels, and what the source itself has added.
            temperature: the temperature T of the softmax for which the rows are needed.

        Returns:
            N rows in the order of `rows_with_loss`, which is that of the labels with loss. A source that knows the
            log-sum-exp of each row at T may return it as `HiddenRows.lse_N`, which saves applications of the head.
        """


@runtime_checkable
class RowsOfSamples(TeacherSource, Protocol):
    """A source whose rows are requested when a batch is collated. `rows` finds them in the batch under "teacher"."""

    def to(self, device: torch.device | str) -> "RowsOfSamples":
        """Move the part that all batches share to a device, and return the source."""

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the rows of samples, one sample after the other, on the CPU."""

    def collate_ahead(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """Start what `collate` does, and return an object whose `to(device)` waits for the rows and returns them."""


def rows_with_loss(states_BLD: Tensor, batch: Mapping[str, Any] | Tensor) -> Tensor:
    """Select the states that predict a label, sample by sample. State i predicts label i + 1.

    Args:
        states_BLD: [B, L, D] states of all tokens.
        batch: a batch with labels [B, L], or only the labels. In a batch from `with_loss_rows` the rows are already
            known, so the host need not wait for a GPU.

    Returns:
        [N, D] states.
    """
    if isinstance(batch, Tensor):
        batch = {"labels": batch}
    if "loss_rows" in batch:
        return states_BLD.flatten(0, 1).index_select(0, batch["loss_rows"])
    return states_BLD[:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX]


def labels_with_loss(batch: Mapping[str, Any]) -> Tensor:
    """The labels that belong to `rows_with_loss`, [N]."""
    if "loss_labels" in batch:
        return batch["loss_labels"]
    labels = batch["labels"][:, 1:]
    return labels[labels != IGNORE_INDEX]


def distillation_loss_of_rows(student: StudentRows, rows: TeacherRows) -> DistillationOutput:
    """Compute the loss of a batch's rows with loss from any kind of teacher's rows.

    Args:
        student: the student's rows with loss.
        rows: the teacher's rows, in the same order.

    Returns:
        The loss and its parts.
    """
    if isinstance(rows, HiddenRows):
        return loss_beside_head(student, rows.hidden_ND, rows.head, rows.lse_N)
    return loss_beside_compact_teacher(student, rows)
