"""Signals by which positions are chosen, and the rows of the chosen ones.

Shape letters: N candidates, sample by sample; B samples; K chosen; C rows of a chunk; V classes; D width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import RowValues
from ..losses import Head, LossOptions, Sampled, StudentRows, products_dtype, token_values
from ..losses.buffers import budget_of, workspace
from ..losses.row_order import Visitor
from ..suggest import unknown_name
from ..teacher import HiddenRows, TeacherRows, distillation_loss_of_rows
from ..teacher.stores import draw_rows, logit_chunks
from .positions import SIGNALS, Candidates, Chosen, PositionPolicy, items_of

_OF_STUDENT = ("student_entropy", "student_cross_entropy")


def _named(values: RowValues) -> dict[str, Tensor]:
    return {"student_entropy": values.entropy, "student_cross_entropy": values.cross_entropy}


class Signals:
    """Values of the candidates by name, each computed once and only when a policy asks for it, without gradient.

    student_ND: last hidden states of the candidates. rows: the teacher's rows, at `temperature`. Divergences are at
    that temperature, and so is the teacher's entropy if it comes from compact rows; the student's entropy and the
    confidence gap are at temperature 1. memory_budget, logits_dtype: those of the loss that follows. work:
    multiplications and additions per class so far.
    """

    def __init__(
        self,
        student_ND: Tensor,
        head: Head,
        labels_N: Tensor,
        rows: Callable[[], TeacherRows],
        temperature: float,
        memory_budget: int | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        self.student_ND, self.head, self.labels_N = student_ND.detach(), head, labels_N
        self.rows, self.temperature = functools.cache(rows), temperature
        self.memory_budget, self.logits_dtype = memory_budget, logits_dtype
        # The loss has logits of two sides, this of one: half of the budget serves as many rows, and leaves room.
        self._one_side = budget_of(student_ND.device, memory_budget) // 2
        self.work = 0
        self._found: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        """[N] in nats; for the confidence gap, minus the difference of the two largest probabilities."""
        if name not in self._found:
            self._found |= self._compute(name)
        return self._found[name]

    def choose(
        self,
        policy: PositionPolicy,
        counts_B: Tensor,
        step: int,
        generator: torch.Generator,
        counts: list[int] | None = None,
    ) -> tuple[Chosen, Tensor | None]:
        """What a policy selects, and the student's logits there, [K, V], if they fit in half of the budget.

        Logits are returned only for a policy that chooses in each sample by a signal of the student: they are kept
        while the entropies are computed, a chunk of samples at a time, and need not be computed again for the loss.
        """
        counts, classes = counts or counts_B.tolist(), self.head.num_classes(self.student_ND)
        row_bytes = (self.logits_dtype or products_dtype(self.student_ND, self.head)).itemsize * classes
        most, wanted = self._one_side // row_bytes, items_of(policy, counts)
        of_student = getattr(policy, "by_sample", None) in _OF_STUDENT and not self._found
        whole_rows = self.head.weight is not None and self.head.shard is None
        if not of_student or wanted > most or max(counts, default=0) > most or not whole_rows:
            return policy.select(Candidates(counts_B, self, step, generator, counts)), None
        indices_K = torch.empty(wanted, dtype=torch.long, device=self.student_ND.device)
        kept: list[Tensor] = []

        def visit(samples: slice, rows: slice, logits_CV: Tensor, values: RowValues) -> None:
            of_chunk = _named(values)
            some = Candidates(counts_B[samples], of_chunk.__getitem__, step, generator, counts[samples])
            chosen = policy.select(some).indices_K
            if not kept:
                kept.append(workspace.take("selected", wanted, classes, logits_CV.dtype, logits_CV.device))
            before = items_of(policy, counts[: samples.start])
            part = slice(before, before + len(chosen))
            torch.index_select(logits_CV, 0, chosen, out=kept[0][part])
            torch.add(chosen, rows.start, out=indices_K[part])

        self._found |= _named(self._token_values(counts, visit))
        self.work += self.student_ND.numel()
        return Chosen(indices_K), kept[0] if kept else None

    def found(self, name: str) -> Tensor | None:
        """The values of a signal, if they have been computed already."""
        return self._found.get(name)

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the student's hidden states and of the teacher's; 0 if its rows have none."""
        rows = self.rows()
        return self.student_ND.shape[1], rows.hidden_ND.shape[1] if isinstance(rows, HiddenRows) else 0

    def _compute(self, name: str) -> dict[str, Tensor]:
        of_student, of_teacher = name != "teacher_entropy", name in ("teacher_entropy", "forward_kl", "reverse_kl")
        student, teacher = self.widths if of_teacher else (self.student_ND.shape[1], 0)
        self.work += len(self.labels_N) * (of_student * student + of_teacher * teacher)
        if name in _OF_STUDENT:
            return _named(self._token_values())
        if name == "student_confidence_gap":
            return {name: self._gap()}
        if name == "teacher_entropy":
            return {name: self._teacher_entropy()}
        if name in ("forward_kl", "reverse_kl"):
            options = LossOptions(
                name, self.temperature, reduction="none", ignore_index=None, memory_budget=self.memory_budget
            )
            rows = StudentRows(self.student_ND, self.head, self.labels_N, options)
            return {name: distillation_loss_of_rows(rows, self.rows()).divergence}
        raise UserError(unknown_name("signal of positions", name, SIGNALS))

    def _token_values(self, counts: list[int] | None = None, visit: Visitor | None = None) -> RowValues:
        return token_values(self.student_ND, self.head, self.labels_N, self._one_side, counts, visit, self.logits_dtype)

    def _gap(self) -> Tensor:
        if self.head.shard is not None:
            raise UserError(
                "student_confidence_gap needs whole rows of logits, which no process has of a head in shards; set "
                "head_in_shards to false"
            )
        gaps = [self.student_ND.new_empty(0, dtype=torch.float32)]
        for z in logit_chunks(self.student_ND, self.head, self.head.num_classes(self.student_ND)):
            top = torch.softmax(z, -1).topk(2).values
            gaps.append(top[:, 1] - top[:, 0])
        return torch.cat(gaps)

    def _teacher_entropy(self) -> Tensor:
        rows = self.rows()
        if isinstance(rows, HiddenRows):
            labels_N = torch.zeros_like(self.labels_N)
            return token_values(rows.hidden_ND, rows.head, labels_N, self._one_side).entropy
        entropy = getattr(rows, "entropy_N", None)
        if entropy is None:
            raise UserError("position_selection 'topk_teacher_entropy' needs a teacher cache that keeps it, not topk")
        return entropy


def take_rows(rows: TeacherRows, indices_K: Tensor) -> TeacherRows:
    """Some of a teacher's rows."""
    kind: Any = type(rows)
    return kind(*(x[indices_K] if isinstance(x, Tensor) else x for x in rows))


@torch.no_grad()
def sample_classes(
    rows: HiddenRows, classes: int, temperature: float, draws: int, generator: torch.Generator
) -> Sampled:
    """Draw `draws` of the first `classes` classes of each row from the teacher's softmax; with its entropy.

    The draws are with replacement. The teacher's logits exist only for a chunk of rows at a time.
    """
    chunks = logit_chunks(rows.hidden_ND, rows.head, classes)
    parts = [draw_rows(z, temperature, draws, generator) for z in chunks]
    return Sampled(*(torch.cat(x) for x in zip(*parts)))
