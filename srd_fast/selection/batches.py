"""Selection during training: what the loss sees of each batch, and statistics of what was chosen.

Shape letters: N candidates, sample by sample; K chosen; V classes; D width.
"""

import copy
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..losses import Head
from ..teacher import HiddenRows, TeacherRows
from .positions import Candidates, Chosen, counts_of_samples, make_position_policy, rows_of_samples
from .signals import Signals, sample_classes, take_rows


def batch_generator(device: torch.device, *place: int) -> torch.Generator:
    """A random generator for one batch that is always the same for that batch. place: seed, step, micro-batch, rank."""
    digest = hashlib.blake2b(repr(place).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _saved(done: float, whole: float) -> float:
    return 1 - done / whole if whole else 0.0


class SelectedPositions:
    """Counts what was chosen so far: shares for the log, histograms of the student's entropy for the report.

    edges: edges of the histogram's bins, in nats; the last bin ends at ln V. work: multiplications of the heads'
    products per class, those done and those for all positions: three products for the student's head (forward, backward
    and its gradient), one for the teacher's.
    """

    def __init__(self, classes: int, bins: int = 24) -> None:
        self.edges = torch.linspace(0, math.log(classes), bins + 1)
        self.candidates, self.chosen = torch.zeros(bins, dtype=torch.long), torch.zeros(bins, dtype=torch.long)
        self.work = torch.zeros(2, dtype=torch.double)
        self._since = torch.zeros(4, dtype=torch.double)

    def add(self, signals: Signals, indices_K: Tensor, kept: bool = False) -> None:
        """Count a batch, by the student's entropy if that was computed. kept: the chosen logits were computed too."""
        student, teacher = signals.widths
        candidates, chosen, each = len(signals.labels_N), len(indices_K), 3 * student + teacher
        work = torch.tensor([signals.work + chosen * (each - kept * student), candidates * each], dtype=torch.double)
        self.work += work
        self._since += torch.tensor([candidates, chosen, *work])
        entropy_N = signals.found("student_entropy")
        if entropy_N is not None:
            # Counts stay on the rows' device, so that nothing waits for it.
            self.edges, self.candidates, self.chosen = (
                x.to(entropy_N.device) for x in (self.edges, self.candidates, self.chosen)
            )
            bin_N = torch.bucketize(entropy_N.float(), self.edges[1:-1])
            self.candidates.index_add_(0, bin_N, torch.ones_like(bin_N))
            self.chosen.index_add_(0, bin_N[indices_K], torch.ones_like(indices_K))

    def take(self) -> dict[str, float]:
        """The shares since the last call: of positions chosen, and of the heads' products saved."""
        candidates, chosen, done, whole = self._since.tolist()
        self._since.zero_()
        return {"selected_share": chosen / max(1, candidates), "saved_head_work": _saved(done, whole)}

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The counts, on the CPU, for `add_counts` in another process."""
        return self.work.cpu(), self.candidates.cpu(), self.chosen.cpu()

    def add_counts(self, counts: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add what another process counted in the same training."""
        work, candidates, chosen = counts
        self.work += work
        self.candidates += candidates.to(self.candidates.device)
        self.chosen += chosen.to(self.chosen.device)

    @property
    def saved_head_work(self) -> float:
        """Share of the heads' products saved so far."""
        return _saved(*self.work.tolist())

    def histogram(self) -> dict[str, list[float]]:
        """Edges of the bins, and how many candidates and chosen positions each bin has."""
        return {n: getattr(self, n).tolist() for n in ("edges", "candidates", "chosen")}


class Seen(NamedTuple):
    """What the loss sees of a batch's rows with loss.

    Attributes:
        student_KD: [K, D] the student's hidden states.
        rows: the teacher's rows.
        labels_K: [K] labels.
        weights_K: [K] factors on the losses, or None.
        logits_KV: [K, V] the student's logits, if they were computed already.
    """

    student_KD: Tensor
    rows: TeacherRows
    labels_K: Tensor
    weights_K: Tensor | None = None
    logits_KV: Tensor | None = None


class SelectionSettings(Protocol):
    """The fields of `SRDConfig` that a selection reads."""

    position_selection: str
    position_ratio: float
    position_steps: int
    class_sampling: int
    memory_budget: int | None
    seed: int

    @property
    def logits(self) -> torch.dtype | None:
        """Dtype of the loss's logits."""

    @property
    def process_index(self) -> int:
        """Rank of this process."""


class BatchSelection:
    """Chooses the positions and classes of each batch that the loss sees, as an `SRDConfig` says.

    policy: None if the loss sees every position.

    Args:
        args: the training's config.
        classes: V, the student's number of classes.
    """

    def __init__(self, args: SelectionSettings, classes: int) -> None:
        self.args = args
        self.policy = make_position_policy(args.position_selection, args.position_ratio, args.position_steps)
        self.selected = SelectedPositions(classes)
        self._step, self._micro_batch = -1, 0

    def begin(self) -> None:
        """Call this when training starts or resumes."""
        self._step = -1

    def __call__(
        self,
        student_ND: Tensor,
        head: Head,
        rows: TeacherRows,
        labels_N: Tensor,
        batch: Mapping[str, Any],
        step: int,
        temperature: float,
    ) -> Seen:
        """What the loss sees of the next micro-batch of optimizer step `step`."""
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        place = (self.args.seed, step, self._micro_batch, self.args.process_index)
        generator = batch_generator(student_ND.device, *place)
        weights_N = batch.get("loss_weights")
        seen = Seen(student_ND, rows, labels_N, weights_N)
        if self.policy is not None:
            signals = Signals(
                student_ND, head, labels_N, lambda: rows, temperature, self.args.memory_budget, self.args.logits
            )
            chosen, logits_KV = signals.choose(
                self.policy, rows_of_samples(batch), step, generator, counts_of_samples(batch)
            )
            self.selected.add(signals, chosen.indices_K, kept=logits_KV is not None)
            at = chosen.indices_K
            weights_K = chosen.weights_K
            if weights_N is not None:
                weights_K = weights_N[at] if weights_K is None else weights_N[at] * weights_K
            seen = Seen(student_ND[at], take_rows(rows, at), labels_N[at], weights_K, logits_KV)
        if not self.args.class_sampling:
            return seen
        if not isinstance(seen.rows, HiddenRows):
            raise UserError(f"class_sampling needs a teacher's hidden states, not {type(rows).__name__} rows")
        drawn = sample_classes(
            seen.rows, head.num_classes(student_ND), temperature, self.args.class_sampling, generator
        )
        return seen._replace(rows=drawn)

    def chosen(self, signals: Signals, batch: Mapping[str, Any], step: int) -> Chosen:
        """What the policy would choose in a batch, without effect on counts, the policy's state or random numbers."""
        policy = copy.deepcopy(self.policy)
        assert policy is not None
        generator = batch_generator(signals.labels_N.device, self.args.seed)
        counts_B, counts = rows_of_samples(batch), counts_of_samples(batch)
        return policy.select(Candidates(counts_B, signals, step, generator, counts))

    @property
    def _state_file(self) -> str:
        return f"position_selection-{self.args.process_index}.safetensors"

    def save(self, checkpoint: Path) -> None:
        """Save the policy's state. This must come before the checkpoint's last file, which marks it as complete."""
        state = getattr(self.policy, "state_dict", None)
        if state is not None:
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_file(state(), checkpoint / self._state_file)

    def load(self, checkpoint: Path) -> None:
        """Load the policy's state from a checkpoint. If there is no such file, it starts empty."""
        load = getattr(self.policy, "load_state_dict", None)
        if load is not None and (checkpoint / self._state_file).is_file():
            load(load_file(checkpoint / self._state_file))
