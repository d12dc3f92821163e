"""Which positions of a batch the loss sees.

A position is a row with loss: a token of a response. In each sample with n positions, a policy takes k = ceil(ratio n):

    all                     every position
    topk_SIGNAL             the k highest of each sample, an earlier one first where two are equal; SIGNALS below
    global_threshold        those with an entropy above a percentile of the last 30,000, in whichever sample
    curriculum              k neighbours in the order of entropy, from the lowest at step 0 to the highest at the end
    stochastic              k draws with probability in proportion to entropy, weighted so that the mean is that of all

Shape letters: N candidates, sample by sample; B samples; K chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..data import IGNORE_INDEX
from ..errors import UserError
from ..losses import Projected, Sampled, TopK
from ..registry import Registry
from ..teacher.stores import CACHE_KINDS

ALL = "all"
# Number of entropies that the global threshold remembers, and lowest entropy, in nats, that counts for a draw.
QUEUE = 30_000
_LEAST_ENTROPY = 1e-4


def rows_of_samples(batch: Mapping[str, Any]) -> Tensor:
    """[B] int64: rows with loss of each sample of a padded or flattened batch, in the order of `rows_with_loss`."""
    has_loss = batch["labels"][:, 1:] != IGNORE_INDEX
    if "cu_seq_lens" not in batch:
        return has_loss.sum(1)
    ends = batch["cu_seq_lens"].to(has_loss.device).long()
    # The label at position i is number i - 1 here; the first label of a sample never has loss.
    before = torch.nn.functional.pad(has_loss[0].cumsum(0), (2, 0))[ends]
    return before.diff()[-len(batch["continues"]) :] if "continues" in batch else before.diff()


def counts_of_samples(batch: Mapping[str, Any]) -> list[int]:
    """`rows_of_samples` on the host. It waits for a GPU, unless the batch comes from `with_loss_rows`."""
    return batch["loss_counts"] if "loss_counts" in batch else rows_of_samples(batch).tolist()


def share_of(counts_B: Tensor, ratio: float) -> Tensor:
    """ceil(ratio * n) of each count, in decimal arithmetic: 0.1 of 30 is 3, not 4."""
    return torch.ceil(counts_B.double() * (ratio * (1 - 1e-12))).long()


@dataclass
class Candidates:
    """The positions to choose from.

    counts_B: number of candidates of each sample, on the device of the rows. signal: values [N] by name, on that
    device, computed when they are first used. step: the optimizer step, from 0. generator: for draws, on that device.
    counts: counts_B on the host, so that sizes are known without waiting for the device; read from there if not given.
    """

    counts_B: Tensor
    signal: Callable[[str], Tensor]
    step: int
    generator: torch.Generator
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = self.counts or self.counts_B.tolist()

    def total_share(self, ratio: float) -> int:
        """The sum of `share_of` the counts, known on the host."""
        return sum(share_of(torch.tensor(self.counts), ratio).tolist())


@dataclass(frozen=True)
class Chosen:
    """indices_K: of the chosen candidates, ascending. weights_K: factors on their losses, None for 1."""

    indices_K: Tensor
    weights_K: Tensor | None = None


class PositionPolicy(Protocol):
    """The interface of a policy, which chooses positions.

    A policy with a state has `state_dict` and `load_state_dict` (tensors by name). If its choice in a sample depends
    only on one signal in that sample, is not random, and has as many positions as `num_items` says, it may have
    `by_sample`, that signal's name.
    """

    def select(self, candidates: Candidates) -> Chosen:
        """Choose which candidates the loss sees."""

    def num_items(self, counts_B: Tensor) -> Tensor:
        """The number by which the sum of the chosen losses is divided; it must be known before the batch has run."""


def items_of(policy: PositionPolicy, counts: Sequence[int]) -> int:
    """`num_items` for counts on the host."""
    items: Any = torch.as_tensor(policy.num_items(torch.tensor(counts, dtype=torch.long))).tolist()
    return int(items)


def _sample_of_rows(counts_B: Tensor, total: int) -> Tensor:
    """[N] the sample of each row. `total` is N, which is passed because reading it would wait for a GPU."""
    return torch.repeat_interleave(torch.arange(len(counts_B), device=counts_B.device), counts_B, output_size=total)


def _neighbours(candidates: Candidates, signal: str, descending: bool, low_B: Tensor | None, ratio: float) -> Tensor:
    """[K] ascending: ceil(ratio n) neighbours of each sample in the order of a signal, from rank low_B (None: 0) on."""
    counts_B, values_N = candidates.counts_B, candidates.signal(signal)
    sample_N = _sample_of_rows(counts_B, len(values_N))
    order_N = torch.argsort(values_N, descending=descending, stable=True)
    order_N = order_N[torch.argsort(sample_N[order_N], stable=True)]
    width_B = share_of(counts_B, ratio)
    first_B = counts_B.cumsum(0) - counts_B
    first_B = first_B if low_B is None else first_B + low_B
    total = candidates.total_share(ratio)
    sample_K = _sample_of_rows(width_B, total)
    place_K = torch.arange(total, device=values_N.device) - (width_B.cumsum(0) - width_B)[sample_K]
    return order_N[first_B[sample_K] + place_K].sort().values


@dataclass(frozen=True)
class TopPositions:
    """The highest values of a signal in each sample."""

    ratio: float
    signal: str = "student_entropy"

    @property
    def by_sample(self) -> str:
        """The signal."""
        return self.signal

    def select(self, candidates: Candidates) -> Chosen:
        """The ceil(ratio n) highest of each sample."""
        return Chosen(_neighbours(candidates, self.signal, True, None, self.ratio))

    def num_items(self, counts_B: Tensor) -> Tensor:
        """The number of chosen positions: the loss is their mean."""
        return share_of(counts_B, self.ratio).sum()


@dataclass(frozen=True)
class CurriculumPositions:
    """A window of ceil(ratio n) positions in the order of entropy, from the lowest to the highest over `steps`."""

    ratio: float
    steps: int = 4000
    by_sample: ClassVar[str] = "student_entropy"

    def select(self, candidates: Candidates) -> Chosen:
        """The window at the candidates' step."""
        counts_B = candidates.counts_B
        progress = min(1.0, candidates.step / self.steps)
        low_B = torch.round((counts_B - share_of(counts_B, self.ratio)) * progress).long()
        return Chosen(_neighbours(candidates, "student_entropy", False, low_B, self.ratio))

    def num_items(self, counts_B: Tensor) -> Tensor:
        """The number of chosen positions."""
        return share_of(counts_B, self.ratio).sum()


@dataclass
class ThresholdPositions:
    """Positions whose entropy is above the (1 - ratio) quantile of the last `QUEUE` ones, including the batch's."""

    ratio: float
    queue: Tensor = field(default_factory=lambda: torch.empty(0))

    def select(self, candidates: Candidates) -> Chosen:
        """The positions above the threshold, weighted so that their mean stands for all candidates of the batch."""
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
        """Replace the remembered entropies."""
        self.queue = state["queue"]


@dataclass(frozen=True)
class DrawnPositions:
    """ceil(ratio n) draws with replacement in each sample, with probability in proportion to entropy.

    A position that is drawn c times in k draws, with probability q each time, has weight c / (k q), so that the
    expected weighted sum is the sum over all positions. Entropies below 1e-4 nats count as 1e-4, so that every position
    can be drawn.
    """

    ratio: float

    def select(self, candidates: Candidates) -> Chosen:
        """The positions drawn at least once."""
        counts_B = candidates.counts_B
        values_N = candidates.signal("student_entropy").double().clamp(min=_LEAST_ENTROPY)
        if not len(values_N):
            return Chosen(values_N.long())
        draws_B = share_of(counts_B, self.ratio)
        sample_N = _sample_of_rows(counts_B, len(values_N))
        cumulative_N = values_N.cumsum(0)
        ends_B = counts_B.cumsum(0)
        starts_B = ends_B - counts_B
        edges = torch.nn.functional.pad(cumulative_N, (1, 0))
        low_B, total_B = edges[starts_B], edges[ends_B] - edges[starts_B]
        of_draw = _sample_of_rows(draws_B, candidates.total_share(self.ratio))
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
# Signals that the rows of some kinds of teacher cache cannot give.
_UNKNOWN_TO = {"teacher_entropy": (TopK,), "reverse_kl": (Sampled, Projected)}
_OF_SIGNALS = {f"topk_{signal}": signal for signal in SIGNALS}
POSITION_POLICIES: Registry[Callable[..., PositionPolicy]] = Registry(
    "position_selection",
    {
        **{
            name: (lambda ratio, signal=signal, **_: TopPositions(ratio, signal))
            for name, signal in _OF_SIGNALS.items()
        },
        "global_threshold": lambda ratio, **_: ThresholdPositions(ratio),
        "curriculum": lambda ratio, steps=4000, **_: CurriculumPositions(ratio, steps),
        "stochastic": lambda ratio, **_: DrawnPositions(ratio),
    },
    reserved=[ALL],
)


def position_policy_names() -> list[str]:
    """Names that `position_selection=` takes.

    Returns:
        All names, in alphabetical order.
    """
    return POSITION_POLICIES.names()


def register_position_policy(name: str, factory: Callable[..., PositionPolicy], *, replace: bool = False) -> None:
    """Add a policy under `name`, usable at once as `SRDConfig(position_selection=name)`.

    Args:
        name: a new name; an existing one only with `replace=True`.
        factory: `factory(ratio, steps=...)` -> a `PositionPolicy`, from the config's position_ratio and position_steps.
        replace: whether an existing policy of this name is replaced.

    Raises:
        UserError: the name is taken, or is not text.
    """
    POSITION_POLICIES.register(name, factory, replace=replace)


def check_rows_have_signal(policy: str, kind: str) -> None:
    """Refuse a policy whose signal the rows of this kind of teacher cache cannot give.

    Raises:
        UserError: they cannot. The message names the kinds that can.
    """
    lacking = _UNKNOWN_TO.get(_OF_SIGNALS.get(policy, ""), ())
    if CACHE_KINDS.get(kind).rows in lacking:
        fit = [name for name in CACHE_KINDS.names() if CACHE_KINDS.get(name).rows not in lacking]
        raise UserError(f"position_selection {policy!r} needs a teacher_cache_kind of {', '.join(fit)}, not {kind!r}")


def make_position_policy(name: str, ratio: float, steps: int = 4000) -> PositionPolicy | None:
    """Make a policy by its name; None for "all".

    Raises:
        UserError: the name is unknown. The message has the list of names.
    """
    return None if name == ALL else POSITION_POLICIES.get(name)(ratio, steps=steps)
