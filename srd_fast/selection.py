"""Selective distillation: which positions, classes and samples the loss sees (SE-KD, arXiv 2602.01395).

A position is a row with loss: a token of a response. Of each sample with n of them a policy takes k = ceil(ratio n),
by a signal of the student or the teacher, before any work on the teacher's logits or on gradients:

    all                     every position
    topk_SIGNAL             the k highest of each sample, an earlier one first where two are equal; SIGNALS below
    global_threshold        those with an entropy above a percentile of the last 30,000, whatever sample they are in
    curriculum              k neighbours in the order of entropy, from the lowest at step 0 to the highest at the end
    stochastic              k draws with probability in proportion to entropy, weighted so that the mean is that of all

Classes: `sample_classes` draws them from the teacher's distribution (sparse logit sampling, arXiv 2503.16870), so that
the loss needs no V-wide teacher row; its mean is the forward KL over all classes.
Samples: those with the highest mean entropy under the starting student, a share of each subset of the curriculum.

Shape letters: N candidates, sample by sample; B samples; K chosen; V classes; D width.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn

from .curation import CurriculumPlan
from .data import IGNORE_INDEX, DistillationCollator, batches_by_length, pad_id
from .errors import UserError
from .losses import Head, Sampled, token_values
from .losses.buffers import budget_of
from .models import find_head, hidden_states
from .suggest import unknown_name
from .teacher import HiddenRows, TeacherRows, distillation_loss_of_rows, labels_with_loss, rows_with_loss
from .teacher.stores import draw_rows, logit_chunks

ALL = "all"
# Entropies that the global threshold remembers, and the least weight of a position that is drawn by its entropy.
QUEUE = 30_000
_LEAST_ENTROPY = 1e-4


def rows_of_samples(batch: Mapping[str, Tensor]) -> Tensor:
    """[B] int64: rows with loss of each sample of a padded or flattened batch, in the order of `rows_with_loss`."""
    has_loss = batch["labels"][:, 1:] != IGNORE_INDEX
    if "cu_seq_lens" not in batch:
        return has_loss.sum(1)
    ends = batch["cu_seq_lens"].to(has_loss.device).long()
    # The label at position i is number i - 1 here; the first label of a sample never has loss.
    before = torch.nn.functional.pad(has_loss[0].cumsum(0), (2, 0))[ends]
    return before.diff()


def share_of(counts_B: Tensor, ratio: float) -> Tensor:
    """ceil(ratio * n) of each count, as exact as the ratio is meant: 0.1 of 30 is 3."""
    return torch.ceil(counts_B.double() * (ratio * (1 - 1e-12))).long()


@dataclass
class Candidates:
    """The positions to choose from.

    counts_B: of each sample. signal: values [N] by name, computed when asked for, on the device of the rows.
    step: the optimizer's, from 0. generator: for draws, on that device.
    """

    counts_B: Tensor
    signal: Callable[[str], Tensor]
    step: int
    generator: torch.Generator


@dataclass(frozen=True)
class Chosen:
    """indices_K: of the chosen candidates, ascending. weights_K: factors on their losses, None for 1."""

    indices_K: Tensor
    weights_K: Tensor | None = None


class PositionPolicy(Protocol):
    """Chooses positions. A policy that remembers something has `state_dict` and `load_state_dict` (tensors by name)."""

    def select(self, candidates: Candidates) -> Chosen:
        """Which of the candidates the loss sees."""

    def num_items(self, counts_B: Tensor) -> Tensor:
        """What the sum of the chosen losses is divided by, known before the batch has run."""


def _ranked(values_N: Tensor, counts_B: Tensor, descending: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(indices sample by sample in the order of their values, rank of each within its sample, its sample)."""
    sample_N = torch.repeat_interleave(torch.arange(len(counts_B), device=values_N.device), counts_B)
    order = torch.argsort(values_N, descending=descending, stable=True)
    order = order[torch.argsort(sample_N[order], stable=True)]
    starts_B = counts_B.cumsum(0) - counts_B
    return order, torch.arange(len(order), device=order.device) - starts_B[sample_N], sample_N


@dataclass(frozen=True)
class TopPositions:
    """The highest values of a signal in each sample."""

    ratio: float
    signal: str = "student_entropy"

    def select(self, candidates: Candidates) -> Chosen:
        """ceil(ratio n) of each sample."""
        counts_B = candidates.counts_B
        order, rank_N, sample_N = _ranked(candidates.signal(self.signal), counts_B, descending=True)
        return Chosen(order[rank_N < share_of(counts_B, self.ratio)[sample_N]].sort().values)

    def num_items(self, counts_B: Tensor) -> Tensor:
        """As many as are chosen: the loss is their mean."""
        return share_of(counts_B, self.ratio).sum()


@dataclass(frozen=True)
class CurriculumPositions:
    """A window of ceil(ratio n) positions in the order of entropy, from the lowest to the highest over `steps`."""

    ratio: float
    steps: int = 4000

    def select(self, candidates: Candidates) -> Chosen:
        """The window at the candidates' step."""
        counts_B = candidates.counts_B
        order, rank_N, sample_N = _ranked(candidates.signal("student_entropy"), counts_B, descending=False)
        width_B = share_of(counts_B, self.ratio)
        progress = min(1.0, candidates.step / self.steps)
        low_B = torch.round((counts_B - width_B) * progress).long()
        inside = (rank_N >= low_B[sample_N]) & (rank_N < (low_B + width_B)[sample_N])
        return Chosen(order[inside].sort().values)

    def num_items(self, counts_B: Tensor) -> Tensor:
        """As many as are chosen."""
        return share_of(counts_B, self.ratio).sum()


@dataclass
class ThresholdPositions:
    """Entropies above the (1 - ratio) quantile of the last `QUEUE` ones, those of the batch included."""

    ratio: float
    queue: Tensor = field(default_factory=lambda: torch.empty(0))

    def select(self, candidates: Candidates) -> Chosen:
        """Weighted so that their mean stands for all candidates of the batch."""
        values_N = candidates.signal("student_entropy").float()
        self.queue = torch.cat((self.queue.to(values_N.device), values_N))[-QUEUE:]
        if not len(values_N):
            return Chosen(values_N.long())
        threshold = torch.quantile(self.queue, 1 - self.ratio)
        indices_K = (values_N >= threshold).nonzero().squeeze(1)
        factor = len(values_N) / max(1, len(indices_K))
        return Chosen(indices_K, torch.full_like(values_N[indices_K], factor))

    def num_items(self, counts_B: Tensor) -> Tensor:
        """All candidates."""
        return counts_B.sum()

    def state_dict(self) -> dict[str, Tensor]:
        """The remembered entropies."""
        return {"queue": self.queue.cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with them."""
        self.queue = state["queue"]


@dataclass(frozen=True)
class DrawnPositions:
    """ceil(ratio n) draws with replacement in each sample, with probability in proportion to entropy.

    A position drawn c times of k, each time with probability q, has weight c / (k q): the weighted sum has the mean of
    the sum over all positions. Entropies below 1e-4 nats count as that, so that none is out of reach.
    """

    ratio: float

    def select(self, candidates: Candidates) -> Chosen:
        """The positions drawn at least once."""
        counts_B = candidates.counts_B
        values_N = candidates.signal("student_entropy").double().clamp(min=_LEAST_ENTROPY)
        if not len(values_N):
            return Chosen(values_N.long())
        draws_B = share_of(counts_B, self.ratio)
        sample_N = torch.repeat_interleave(torch.arange(len(counts_B), device=values_N.device), counts_B)
        cumulative_N = values_N.cumsum(0)
        ends_B = counts_B.cumsum(0)
        starts_B = ends_B - counts_B
        edges = torch.nn.functional.pad(cumulative_N, (1, 0))
        low_B, total_B = edges[starts_B], edges[ends_B] - edges[starts_B]
        of_draw = torch.repeat_interleave(torch.arange(len(counts_B), device=values_N.device), draws_B)
        u = torch.rand(len(of_draw), dtype=torch.float64, device=values_N.device, generator=candidates.generator)
        drawn = torch.searchsorted(cumulative_N, low_B[of_draw] + u * total_B[of_draw], right=True)
        drawn = torch.minimum(torch.maximum(drawn, starts_B[of_draw]), ends_B[of_draw] - 1)
        times_N = torch.bincount(drawn, minlength=len(values_N))
        indices_K = times_N.nonzero().squeeze(1)
        sample_K = sample_N[indices_K]
        q_K = values_N[indices_K] / total_B[sample_K]
        return Chosen(indices_K, (times_N[indices_K] / (draws_B[sample_K] * q_K)).float())

    def num_items(self, counts_B: Tensor) -> Tensor:
        """All positions: the loss estimates the mean over them."""
        return counts_B.sum()


SIGNALS = (
    "student_entropy",
    "student_cross_entropy",
    "student_confidence_gap",
    "teacher_entropy",
    "forward_kl",
    "reverse_kl",
)
_POSITIONS: dict[str, Callable[..., PositionPolicy]] = {
    **{f"topk_{signal}": (lambda ratio, signal=signal, **_: TopPositions(ratio, signal)) for signal in SIGNALS},
    "global_threshold": lambda ratio, **_: ThresholdPositions(ratio),
    "curriculum": lambda ratio, steps=4000, **_: CurriculumPositions(ratio, steps),
    "stochastic": lambda ratio, **_: DrawnPositions(ratio),
}


def position_policies() -> list[str]:
    """Names that `position_selection` takes."""
    return [ALL, *_POSITIONS]


def register_position_policy(name: str, factory: Callable[..., PositionPolicy], *, replace: bool = False) -> None:
    """Add a policy: `factory(ratio, steps=...)` makes one."""
    if (name in _POSITIONS or name == ALL) and not replace:
        raise UserError(f"position policy {name!r} exists already; pass replace=True or take another name")
    _POSITIONS[name] = factory


def check_rows_have_signal(policy: str, kind: str) -> None:
    """UserError for a policy whose signal the rows of this kind of teacher cache do not give."""
    kinds = {"topk_teacher_entropy": ("hidden", "sampled", "projected"), "topk_reverse_kl": ("hidden", "topk")}
    if kind not in kinds.get(policy, (kind,)):
        raise UserError(
            f"position_selection {policy!r} needs a teacher_cache_kind of {', '.join(kinds[policy])}, not {kind!r}"
        )


def make_position_policy(name: str, ratio: float, steps: int = 4000) -> PositionPolicy | None:
    """The policy of a name; None for "all". Raises UserError with the list of names for an unknown one."""
    if name == ALL:
        return None
    if name not in _POSITIONS:
        raise UserError(unknown_name("position_selection", name, position_policies()))
    return _POSITIONS[name](ratio, steps=steps)


class Signals:
    """Values of the candidates by name, each computed once and only when a policy asks for it, without gradient.

    student_ND: last hidden states of the candidates. rows: the teacher's, at `temperature`; the divergences are at that
    temperature, as is the teacher's entropy where its rows hold just that; the student's and the gap are at 1.
    memory_budget: of the loss that follows, in bytes.
    """

    def __init__(
        self,
        student_ND: Tensor,
        head: Head,
        labels_N: Tensor,
        rows: Callable[[], TeacherRows],
        temperature: float,
        memory_budget: int | None = None,
    ) -> None:
        self.student_ND, self.head, self.labels_N = student_ND.detach(), head, labels_N
        self.rows, self.temperature = rows, temperature
        self.memory_budget = memory_budget
        # One side's logits where the loss holds two: as many rows at a time in half of it, and room left for the loss.
        self._one_side = budget_of(student_ND.device, memory_budget) // 2
        self._found: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, name: str) -> Tensor:
        """[N] in nats; of the gap, minus the difference of the two largest probabilities."""
        if name not in self._found:
            self._found |= self._compute(name)
        return self._found[name]

    def found(self, name: str) -> Tensor | None:
        """The values of a name if something asked for them before."""
        return self._found.get(name)

    def _compute(self, name: str) -> dict[str, Tensor]:
        if name in ("student_entropy", "student_cross_entropy"):
            values = token_values(self.student_ND, self.head, self.labels_N, self._one_side)
            return {"student_entropy": values.entropy, "student_cross_entropy": values.cross_entropy}
        if name == "student_confidence_gap":
            return {name: self._gap()}
        if name == "teacher_entropy":
            return {name: self._teacher_entropy()}
        if name in ("forward_kl", "reverse_kl"):
            out = distillation_loss_of_rows(
                self.student_ND, self.head, self.rows(), self.labels_N,
                divergence=name, temperature=self.temperature, reduction="none", memory_budget=self.memory_budget,
            )  # fmt: skip
            return {name: out.divergence}
        raise UserError(unknown_name("signal of positions", name, SIGNALS))

    def _gap(self) -> Tensor:
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
    """`draws` of the first `classes` of each row, with replacement, from the teacher's softmax, and its entropy.

    The teacher's logits exist for a chunk of rows at a time.
    """
    chunks = logit_chunks(rows.hidden_ND, rows.head, classes)
    parts = [draw_rows(z, temperature, draws, generator) for z in chunks]
    return Sampled(*(torch.cat(x) for x in zip(*parts)))


def batch_generator(device: torch.device, *place: int) -> torch.Generator:
    """A generator for the draws of one batch, the same whenever that batch comes: seed, step, micro-batch, rank."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


class SelectedPositions:
    """What was chosen so far: shares for the log, histograms of the student's entropy for the report.

    edges: of the histogram's bins, nats; the last bin ends at ln V.
    """

    def __init__(self, classes: int, bins: int = 24) -> None:
        self.edges = torch.linspace(0, math.log(classes), bins + 1)
        self.candidates, self.chosen = torch.zeros(bins, dtype=torch.long), torch.zeros(bins, dtype=torch.long)
        self._since = torch.zeros(2, dtype=torch.long)

    def add(self, signals: Signals, indices_K: Tensor) -> None:
        """Count a batch, by the student's entropy where that was computed."""
        self._since += torch.tensor([len(signals.labels_N), len(indices_K)])
        entropy_N = signals.found("student_entropy")
        if entropy_N is not None:
            bin_N = torch.bucketize(entropy_N.float().cpu(), self.edges[1:-1])
            self.candidates += torch.bincount(bin_N, minlength=len(self.candidates))
            self.chosen += torch.bincount(bin_N[indices_K.cpu()], minlength=len(self.chosen))

    def take(self) -> dict[str, float]:
        """Share of the positions that was chosen since the last call."""
        candidates, chosen = self._since.tolist()
        self._since.zero_()
        return {"selected_share": chosen / max(1, candidates)}

    def histogram(self) -> dict[str, list[float]]:
        """edges, and counts of candidates and chosen positions in each bin."""
        return {n: getattr(self, n).tolist() for n in ("edges", "candidates", "chosen")}


# Samples

_SAMPLES = ("topk_student_entropy", "topk_student_cross_entropy")


def sample_policies() -> list[str]:
    """Names that `sample_selection` takes."""
    return [ALL, *_SAMPLES]


def check_sample_policy(name: str) -> None:
    """UserError with the list of names for an unknown one."""
    if name not in sample_policies():
        raise UserError(unknown_name("sample_selection", name, sample_policies()))


@torch.no_grad()
def sample_means(
    student: nn.Module, samples: Dataset, tokenizer: Any, signal: str, batch_size: int = 32
) -> list[float]:
    """Mean of a student's signal over the positions of each sample; NaN for a sample without any."""
    collate, head = DistillationCollator(pad_id(tokenizer)), find_head(student)
    assert head.weight is not None
    found = [math.nan] * len(samples)
    was_training = student.training
    student.eval()
    for indices in batches_by_length([len(x) for x in samples["input_ids"]], batch_size):
        some = samples[indices]
        batch = collate([{"input_ids": x, "labels": y} for x, y in zip(some["input_ids"], some["labels"])])
        batch = {k: v.to(head.weight.device) for k, v in batch.items()}
        labels_N = labels_with_loss(batch["labels"])
        values = token_values(rows_with_loss(hidden_states(student, batch), batch["labels"]), head, labels_N)
        chosen = values.entropy if signal == "student_entropy" else values.cross_entropy
        for i, of_sample in zip(indices, chosen.split(rows_of_samples(batch).tolist())):
            found[i] = float(of_sample.mean())
    student.train(was_training)
    return found


def select_samples(
    plan: CurriculumPlan, samples: Dataset, student: nn.Module, tokenizer: Any, policy: str, ratio: float
) -> CurriculumPlan:
    """The plan with ceil(ratio n) samples of each subset: those with the highest mean signal under `student`.

    Args:
        policy: from `sample_policies()`; "all" gives the plan back.
    """
    check_sample_policy(policy)
    if policy == ALL:
        return plan
    kept = set(plan.kept)
    if missing := sorted(kept.difference(samples["sample_id"])):
        raise UserError(
            f"the plan keeps {len(missing)} samples that the data does not have, the first is {missing[0]!r}: curate "
            "again with this data"
        )
    some = samples.select([i for i, sample_id in enumerate(samples["sample_id"]) if sample_id in kept])
    signal = policy.removeprefix("topk_")
    value = dict(zip(some["sample_id"], sample_means(student, some, tokenizer, signal)))
    subsets, dropped = [], list(plan.dropped)
    for subset in plan.subsets:
        count = int(share_of(torch.tensor(len(subset)), ratio))
        ranked = sorted(subset, key=lambda i: (-value[i] if value[i] == value[i] else math.inf, i))
        chosen = set(ranked[:count])
        subsets.append([i for i in subset if i in chosen])
        words = f"{signal.replace('_', ' ')} %.3f, beyond the {count} highest of its subset"
        dropped += [{"sample_id": i, "reason": words % value[i]} for i in ranked[count:]]
    return plan.with_subsets(subsets, dropped)
