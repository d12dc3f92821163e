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
    """Last hidden states of the rows with loss, [N, D_T], and the head that turns them into logits."""

    hidden_ND: Tensor
    head: Head


TeacherRows = HiddenRows | TopK | Sampled | Projected


class TeacherSource(Protocol):
    """A teacher: `num_classes` is V_T."""

    num_classes: int

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """The teacher's side of a batch's rows with loss, in the order of `rows_with_loss`, without gradient.

        Args:
            batch: what the collator made: the model's inputs, labels, and what the source itself attached.
            temperature: of the softmax that the rows are for.
        """


def rows_with_loss(states_BLD: Tensor, batch: Mapping[str, Any] | Tensor) -> Tensor:
    """[N, D]: the states that predict a label, sample by sample: state i predicts label i + 1.

    Args:
        states_BLD: [B, L, D].
        batch: with labels [B, L], or these alone. What `with_loss_rows` added spares a GPU the search, for which the
            host would wait.
    """
    if isinstance(batch, Tensor):
        batch = {"labels": batch}
    if "loss_rows" in batch:
        return states_BLD.flatten(0, 1).index_select(0, batch["loss_rows"])
    return states_BLD[:, :-1][batch["labels"][:, 1:] != IGNORE_INDEX]


def labels_with_loss(batch: Mapping[str, Any]) -> Tensor:
    """[N]: the labels of `rows_with_loss`."""
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
    """The loss of a batch's rows with loss, by the kind of the teacher's rows.

    Args:
        student_ND: [N, D] hidden states.
        student_head: of the student.
        rows: the teacher's, in the order of the student's.
        labels_N: [N] int64; all have a loss, whatever `options.ignore_index` says.
        options: of the loss.
        token_weights: as in `distillation_loss`.
        num_items: as there.
        student_logits: as there.
    """
    options = replace(options, ignore_index=None)
    data: dict[str, Any] = {"token_weights": token_weights, "num_items": num_items, "student_logits": student_logits}
    if isinstance(rows, HiddenRows):
        return loss_beside_head(student_ND, student_head, rows.hidden_ND, rows.head, labels_N, options, **data)
    return loss_beside_compact_teacher(student_ND, student_head, rows, labels_N, options, **data)
