"""What a teacher gives to a batch, whether it runs beside the student or was run once before."""

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
        lse_N: [N] log sum_v exp(z_v / T) at the temperature asked for, or None where the source does not keep it. z are
            the logits after scale, bias and softcap, not rounded; v is over the classes that student and teacher share.
            Float32, or float64 beside a head of it.
    """

    hidden_ND: Tensor
    head: Head
    lse_N: Tensor | None = None


TeacherRows = HiddenRows | TopK | Sampled | Projected


class TeacherSource(Protocol):
    """What a teacher must have: any object with these may be `SRDTrainer`'s `teacher_model`.

    Attributes:
        num_classes: V_T, the number of the teacher's classes.
    """

    num_classes: int

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """Return the teacher's side of a batch's rows with loss, without gradient.

        Args:
            batch: what the collator made: the model's inputs, labels, and what the source itself attached.
            temperature: T of the softmax that the rows are for.

        Returns:
            N rows in the order of `rows_with_loss`, which is that of the labels with loss. A source that knows the
            log-sum-exp of each row at T may give it as `HiddenRows.lse_N`; the loss then applies the head less often.
        """


@runtime_checkable
class RowsOfSamples(TeacherSource, Protocol):
    """A source that is asked for the rows of samples when their batch is collated. It finds them under "teacher"."""

    def to(self, device: torch.device | str) -> "RowsOfSamples":
        """Move to a device what all batches share, and return the source."""

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the rows of samples, one sample after the other, on the CPU."""

    def collate_ahead(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """Begin with what `collate` does, and return an object whose `to(device)` ends it."""


def rows_with_loss(states_BLD: Tensor, batch: Mapping[str, Any] | Tensor) -> Tensor:
    """Select the states that predict a label, sample by sample. State i predicts label i + 1.

    Args:
        states_BLD: [B, L, D] states of all tokens.
        batch: with labels [B, L], or these labels alone. In a batch from `with_loss_rows` the rows are known already,
            so the host need not wait for a GPU to find them.

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
        student: its rows with loss.
        rows: the teacher's, in the order of the student's.

    Returns:
        The loss and its parts.
    """
    if isinstance(rows, HiddenRows):
        return loss_beside_head(student, rows.hidden_ND, rows.head, rows.lse_N)
    return loss_beside_compact_teacher(student, rows)
