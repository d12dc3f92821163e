"""What a teacher gives to a batch, whether it runs beside the student or was run once before."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..data import IGNORE_INDEX
from ..losses import (
    DistillationOutput,
    Head,
    LossOptions,
    Projected,
    Sampled,
    TopK,
    loss_beside_compact_teacher,
    loss_beside_head,
)


class HiddenRows(NamedTuple):
    """A teacher's rows as hidden states.

    Attributes:
        hidden_ND: [N, D_T] last hidden states of the rows with loss.
        head: turns them into logits.
    """

    hidden_ND: Tensor
    head: Head


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
            N rows in the order of `rows_with_loss`, which is that of the labels with loss.
        """


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


def distillation_loss_of_rows(
    student_ND: Tensor,
    student_head: Head,
    rows: TeacherRows,
    labels_N: Tensor,
    options: LossOptions,
    *,
    token_weights: Tensor | None = None,
    num_items: float | Tensor | None = None,
    student_logits: Tensor | None = None,
) -> DistillationOutput:
    """Compute the loss of a batch's rows with loss from any kind of teacher's rows.

    Args:
        student_ND: [N, D] hidden states.
        student_head: turns them into logits.
        rows: the teacher's, in the order of the student's.
        labels_N: [N] int64. All have a loss, whatever `options.ignore_index` says.
        options: of the loss.
        token_weights: [N] factor on each row's loss.
        num_items: denominator of the mean. Default: N.
        student_logits: [N, V] before the softcap, where they were computed already; they are overwritten.

    Returns:
        The loss and its parts.
    """
    options = replace(options, ignore_index=None)
    data: dict[str, Any] = {"token_weights": token_weights, "num_items": num_items, "student_logits": student_logits}
    if isinstance(rows, HiddenRows):
        return loss_beside_head(student_ND, student_head, rows.hidden_ND, rows.head, labels_N, options, **data)
    return loss_beside_compact_teacher(student_ND, student_head, rows, labels_N, options, **data)
