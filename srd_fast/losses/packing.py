"""Labels, weights and hidden states of a batch: checked, then reduced to the rows that have a loss."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import RowDivergence
from ..kernels.compact import SparseDivergence
from .chunked import ChunkedLoss
from .head import Head, VocabularyShard
from .options import LossOptions, check_in_range, in_range, require
from .packed import PackedRows
from .vocabulary import refusing_together, rows_of_all

# Vocabularies are padded to a multiple that suits the hardware; the most seen is 943 unused classes (Phi-2).
_MOST_PADDING = 1024


@dataclass
class DistillationOutput:
    """What a distillation loss returns. Only `loss` carries a gradient.

    With reduction "mean" and "sum" every value is a scalar, reduced in the same way. With "none" each has the shape of
    the labels, 0 at ignored ones.

    Attributes:
        loss: the loss to train on.
        divergence: D in nats at the temperature, without the factor T^2.
        cross_entropy: on the labels, in nats at temperature 1.
        entropy: of the student's softmax, in nats at temperature 1.
        num_items: scalar, the denominator of "mean".
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    num_items: Tensor


def check_tensor(name: str, value: Any, optional: bool = False) -> None:
    """Refuse anything but a dense tensor of real numbers."""
    if optional and value is None:
        return
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()
    kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    require(dense, f"{name} must be a dense tensor of real numbers{', or None' if optional else ''}, got {kind}")


def check_num_items(value: Any) -> None:
    """Refuse anything that cannot be the denominator of a mean."""
    if value is not None and not isinstance(value, Tensor):
        require(
            in_range(value, 0, 2**53) and value > 0,
            f"num_items must be a number above 0, a scalar tensor, or None to count the labels, got {value!r}",
        )
    if isinstance(value, Tensor):
        real = value.layout == torch.strided and not value.is_complex() and value.dtype != torch.bool
        require(
            value.numel() == 1 and value.dim() == 0 and real,
            f"num_items must be a scalar tensor of a number, got {tuple(value.shape)} {value.dtype}",
        )


def check_head_numbers(side: str, softcap: Any, scale: Any) -> None:
    """Refuse a softcap or scale that is out of range. side: "student" or "teacher"."""
    if softcap is not None:
        check_in_range(f"{side}_softcap", softcap)
    check_in_range(f"{side}_scale", scale)


def check_side(side: str, hidden: Tensor, head: Head, labels: Tensor) -> None:
    """Refuse hidden states or logits that do not fit the labels or their head."""
    check_head_numbers(side, head.softcap, head.scale)
    what = f"{side}_hidden" if head.weight is not None else f"{side}_logits"
    check_tensor(what, hidden)
    check_tensor(f"{side}_weight", head.weight, optional=True)
    check_tensor(f"{side}_bias", head.bias, optional=True)
    for name, given in ((f"{side}_weight", head.weight), (f"{side}_bias", head.bias)):
        on = labels.device if given is None else given.device
        require(on == labels.device, f"{name} is on {on} and labels on {labels.device}")
    require(hidden.is_floating_point(), f"{what} must be floating point, got {hidden.dtype}")
    require(
        hidden.shape[:-1] == labels.shape,
        f"{what} has shape {tuple(hidden.shape)} and labels {tuple(labels.shape)}: all but the last "
        f"dimension of {what} must be that of labels",
    )
    require(hidden.device == labels.device, f"{what} is on {hidden.device} and labels on {labels.device}")
    if head.weight is None:
        return
    require(
        head.weight.dim() == 2 and head.weight.is_floating_point(),
        f"{side}_weight must be a floating-point matrix [V, D], got {tuple(head.weight.shape)} {head.weight.dtype}",
    )
    require(
        hidden.shape[-1] == head.weight.shape[1],
        f"{side}_hidden is {hidden.shape[-1]} wide but {side}_weight is [V, D] = {tuple(head.weight.shape)}",
    )
    require(
        head.bias is None or tuple(head.bias.shape) == (head.weight.shape[0],),
        f"{side}_bias must have shape ({head.weight.shape[0]},), got "
        f"{None if head.bias is None else tuple(head.bias.shape)}",
    )


def check_teacher_lse(lse: Any, labels: Tensor) -> None:
    """Refuse a log-sum-exp that does not fit the labels."""
    check_tensor("teacher_lse", lse)
    require(
        lse.shape == labels.shape and lse.device == labels.device and lse.dtype in (torch.float32, torch.float64),
        f"teacher_lse must be float32 or float64 in the shape of labels, {tuple(labels.shape)} on {labels.device}, got "
        f"{tuple(lse.shape)} {lse.dtype} on {lse.device}",
    )


def check_vocabularies(student_classes: int, teacher_classes: int) -> None:
    """Refuse two vocabularies whose sizes differ by more than padding can explain."""
    small, large = sorted((student_classes, teacher_classes))
    require(
        large - small <= min(_MOST_PADDING, small // 2),
        f"student and teacher have {student_classes} and {teacher_classes} classes, too far apart for one "
        "vocabulary with padding: both must use the same tokenizer",
    )


def check_teacher_shard(teacher: VocabularyShard | None, student: VocabularyShard | None) -> None:
    """Refuse a teacher whose shards are on other ranks than the student's."""
    if teacher is None:
        return
    require(
        student is not None,
        "teacher_weight is in shards and student_weight is whole: give student_weight in shards of the same ranks, or "
        "teacher_weight whole (full_tensor())",
    )
    assert student is not None
    ranks = [dist.get_process_group_ranks(shard.group) for shard in (student, teacher)]
    require(
        ranks[0] == ranks[1],
        f"teacher_weight and student_weight must be in shards of the same ranks, got ranks {ranks[1]} and {ranks[0]}",
    )


def check_classes(what: str, classes: Tensor, num_classes: int, otherwise: str = "") -> None:
    """Refuse class indices out of range. otherwise: what else the message says they may be."""
    # On a GPU, looking at them would make the host wait; there the gather has an assertion of its own.
    if classes.device.type == "cpu" and classes.numel():
        values = classes.detach().numpy()
        low, high = int(values.min()), int(values.max())
        require(
            low >= 0 and high < num_classes,
            f"{what} must be from 0 to {num_classes - 1}{otherwise}, got {low if low < 0 else high}",
        )


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """Bring a number to the device. A Python number goes there as the argument of a kernel, so nothing waits."""
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


def autocast_dtype(student: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would run products of these hidden states; None if it would not change it."""
    # Autocast leaves float64 alone.
    kind = student.device.type
    if student.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def products_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """The dtype of the products of these hidden states with a head: the head's, or autocast's if that is on."""
    return autocast_dtype(hidden) or (hidden.dtype if head.weight is None else head.weight.dtype)


class StudentRows:
    """The student's rows with loss, and all that a loss needs except the teacher, checked.

    kept: indices of the N rows among all labels, or None for all of them. weights_N: factor on each row's loss,
    including the denominator of the mean unless that could underflow.

    Args:
        student: [..., D] hidden states, or [..., V] logits where the head has no weight.
        head: turns them into logits.
        labels: [...] class indices, or `options.ignore_index`.
        options: of the loss.
        token_weights: [...] factor on each label's loss.
        num_items: denominator of the mean. Default: the number of labels with loss; of all ranks, if the head is a
            shard and each rank has rows of its own.
        student_logits: [..., V] before the softcap, if they were computed already; they are overwritten.

    Raises:
        UserError: an argument is wrong.
    """

    def __init__(
        self,
        student: Tensor,
        head: Head,
        labels: Tensor,
        options: LossOptions,
        token_weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
        student_logits: Tensor | None = None,
    ) -> None:
        with refusing_together(head.shard, head.weight):
            self._pack(student, head, labels, options, token_weights, num_items, student_logits)

    def _pack(
        self,
        student: Tensor,
        head: Head,
        labels: Tensor,
        options: LossOptions,
        token_weights: Tensor | None,
        num_items: float | Tensor | None,
        student_logits: Tensor | None,
    ) -> None:
        check_num_items(num_items)
        check_tensor("labels", labels)
        check_tensor("token_weights", token_weights, optional=True)
        check_tensor("student_logits", student_logits, optional=True)
        require(
            labels.dtype in (torch.int64, torch.int32),
            f"labels must be integers (int64 or int32), got {labels.dtype}",
        )
        check_side("student", student, head, labels)
        if token_weights is not None:
            require(
                token_weights.device == labels.device,
                f"token_weights is on {token_weights.device} and labels on {labels.device}",
            )
            shapes = f"token_weights has shape {tuple(token_weights.shape)}, labels {tuple(labels.shape)}"
            require(token_weights.shape == labels.shape, f"{shapes}: they must be equal")

        self.head, self.labels, self.options = head, labels, options
        self.num_classes = head.num_classes(student)
        self.compute = torch.promote_types(student.dtype, torch.float32)
        self.kept: Tensor | None = None
        if options.ignore_index is not None:
            kept = labels.reshape(-1).ne(options.ignore_index).nonzero().squeeze(1)
            self.kept = kept if len(kept) < labels.numel() else None
        self.labels_N = self._rows(labels.reshape(-1)).long()
        check_classes("labels", self.labels_N, self.num_classes, " or ignore_index")
        self.hidden_ND = self._rows(student.reshape(-1, student.shape[-1]))
        self.gemm_dtype = autocast_dtype(student)
        if num_items is None:
            num_items = len(self.labels_N)
            if head.shard is not None and head.shard.own_rows:
                num_items = rows_of_all(head.shard, labels.device, num_items)
        self.num_items = _scalar(num_items, labels.device)
        self.weights_N = None if token_weights is None else self.of_rows(token_weights).to(self.compute)
        self.logits_NV = self._given_logits(student_logits, student)
        # The denominator goes into the rows' weights, where it is applied in float32, before a gradient is rounded. Not
        # with float16 gradients: a factor of 1 / num_items would push them out of the range of float16.
        self._divide = options.reduction == "mean"
        if self._divide and torch.float16 not in (self.gemm_dtype, student.dtype):
            share = 1 / self.num_items.clamp(min=1).to(self.compute)
            self.weights_N = share.expand(self.labels_N.shape) if self.weights_N is None else self.weights_N * share
            self._divide = False

    def _given_logits(self, logits: Tensor | None, student: Tensor) -> Tensor | None:
        if logits is None:
            return None
        dtype = self.options.logits_dtype or products_dtype(student, self.head)
        wanted = (*self.labels.shape, self.num_classes)
        require(
            tuple(logits.shape) == wanted and logits.dtype == dtype and logits.device == self.labels.device,
            f"student_logits must be {wanted} in {dtype}, as the head would give them, got {tuple(logits.shape)} in "
            f"{logits.dtype} on {logits.device}",
        )
        flat_NV = logits.detach().flatten(0, -2)
        return flat_NV if len(self.labels_N) == len(flat_NV) else self._rows(flat_NV)

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.kept is None else x[self.kept]

    def of_rows(self, x: Tensor) -> Tensor:
        """Pick the rows with loss, detached, from a tensor [..., D], or from [...], the shape of the labels."""
        return self._rows(x.detach().reshape(-1, *x.shape[self.labels.dim() :]))

    def _in_place(self, x_N: Tensor) -> Tensor:
        """Put [N] values into the shape of the labels, 0 at ignored ones."""
        if self.kept is None:
            return x_N.view(self.labels.shape)
        return x_N.new_zeros(self.labels.numel()).index_put((self.kept,), x_N).view(self.labels.shape)

    def loss(
        self,
        *,
        teacher_ND: Tensor | None = None,
        teacher_head: Head | None = None,
        divergence: RowDivergence | None = None,
        teacher_lse_N: Tensor | None = None,
        compact: SparseDivergence | None = None,
        projection_ND: Tensor | None = None,
    ) -> DistillationOutput:
        """Compute the loss beside a teacher. The arguments are fields of `PackedRows`; none: no teacher."""
        options = self.options
        rows = PackedRows(
            labels_N=self.labels_N,
            weights_N=self.weights_N,
            coefficients=options.coefficients,
            student_softcap=self.head.softcap,
            student_scale=self.head.scale,
            gemm_dtype=self.gemm_dtype,
            logits_dtype=options.logits_dtype,
            backend=options.backend,
            memory_budget=options.memory_budget,
            order=options.order,
            student_NV=self.logits_NV,
            shard=self.head.shard,
            standardize=options.standardize_logits,
            teacher_ND=teacher_ND,
            teacher_head=teacher_head,
            divergence=divergence,
            teacher_lse_N=teacher_lse_N,
            compact=compact,
            projection_ND=projection_ND,
        )
        per_row = options.reduction == "none"
        loss, *values = ChunkedLoss.apply(
            self.hidden_ND, self.head.weight, self.head.bias, rows, per_row, torch.is_grad_enabled()
        )
        if self.weights_N is not None:
            values = [x * self.weights_N for x in values]
        out = [self._in_place(x) for x in (loss, *values)] if per_row else [loss, *(x.sum() for x in values)]
        if self._divide:
            out = [x / self.num_items.clamp(min=1) for x in out]
        return DistillationOutput(out[0], out[1], out[2], out[3], self.num_items)
