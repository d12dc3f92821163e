"""Baby Step as a sequence of samples: samples, T, SFT weight and learning rate depend only on the step's number.

Stage k trains on subsets 1..k together (Baby Step; Bengio et al., ICML 2009; SRD, arXiv 2508.06135). A step takes
`batch_size` samples over all ranks and accumulation steps, so a resumed run needs only the step's number.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .plan import CurriculumPlan


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        samples: positions in the data set.
        first_step: its number in the run, from 0.
        steps: number of steps.
        temperature: T of the divergence.
        sft_weight: weight of the cross-entropy.
        peak_learning_rate: of the stage's cosine.
    """

    samples: np.ndarray
    first_step: int
    steps: int
    temperature: float
    sft_weight: float
    peak_learning_rate: float


def per_stage(name: str, given: float | Sequence[float] | None, start: float, end: float, stages: int) -> list[float]:
    """One value for each stage: the list as given, a constant, or linear from `start` to `end`."""
    if given is None:
        return [start] if stages == 1 else [start + (end - start) * s / (stages - 1) for s in range(stages)]
    if isinstance(given, (int, float)):
        return [float(given)] * stages
    if len(given) != stages:
        raise UserError(f"{name} has {len(given)} values for {stages} stages; give one a stage, or one number")
    return [float(x) for x in given]


class Curriculum:
    """The schedule of a whole run.

    A stage has ceil(samples * epochs / batch_size) steps. If its last step lacks samples, they come from one more
    shuffle.

    Args:
        plan: which samples belong to which subset.
        sample_ids: ids of the data set in its order. They must include every kept sample.
        batch_size: samples a step, over all ranks and accumulation steps.
        epochs_per_stage: passes over the samples of each stage; may be fractional.
        temperatures: T of each stage.
        sft_weights: weight of the cross-entropy in each stage, 0 to 1.
        learning_rates: peak learning rate of each stage.
        min_learning_rate: where each cosine ends.
        restart_learning_rate: a cosine for each stage. Otherwise one over the run, from the first stage's peak.
        warmup: steps (from 1 on) or share (below 1) of each cosine that rises linearly.
        seed: of the shuffling inside an epoch.
        lengths: tokens of each sample of the data set; needed for `length_buckets`.
        length_buckets: how many batches are sorted by length together. The longest samples of that many batches become
            one batch, the next longest another, and so on; then these batches are shuffled again. Samples stay in their
            stage. 0: batches stay as shuffled.

    Raises:
        UserError: the first subset is empty, or the data lacks samples of the plan.
    """

    def __init__(
        self,
        plan: CurriculumPlan,
        sample_ids: Sequence[str],
        *,
        batch_size: int,
        epochs_per_stage: Sequence[float],
        temperatures: Sequence[float],
        sft_weights: Sequence[float],
        learning_rates: Sequence[float],
        min_learning_rate: float = 0.0,
        restart_learning_rate: bool = True,
        warmup: float = 0,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        length_buckets: int = 0,
    ) -> None:
        columns = plan.subset_columns
        if not columns or not len(columns[0]):
            raise UserError("the plan's first subset is empty, so its first stage has nothing to train on")
        kept = pa.concat_arrays(columns)
        positions = pc.index_in(kept, value_set=pa.array(list(sample_ids), kept.type))
        if positions.null_count:
            missing = kept.filter(positions.is_null())
            raise UserError(
                f"the plan keeps {len(missing)} samples that the data does not have, the first is "
                f"{missing[0].as_py()!r}: curate again with this data"
            )
        ends = np.cumsum([len(c) for c in columns])
        self.batch_size, self.seed = batch_size, seed
        self.length_buckets = length_buckets
        self._lengths = np.array(lengths) if lengths is not None else None
        self.min_learning_rate, self.warmup = min_learning_rate, warmup
        self.restart_learning_rate = restart_learning_rate
        self.stages: list[Stage] = []
        step = 0
        for k, end in enumerate(ends):
            samples = positions[:end].to_numpy().astype(np.int64)
            steps = max(1, math.ceil(len(samples) * epochs_per_stage[k] / batch_size - 1e-9))
            self.stages.append(Stage(samples, step, steps, temperatures[k], sft_weights[k], learning_rates[k]))
            step += steps
        self.total_steps = step

    def stage_of(self, step: int) -> int:
        """Index (from 0) of the stage that a step (from 0) belongs to; the last stage for steps beyond the end."""
        return next((k for k, s in enumerate(self.stages) if step < s.first_step + s.steps), len(self.stages) - 1)

    def temperature(self, step: int) -> float:
        """T at `step`."""
        return self.stages[self.stage_of(step)].temperature

    def sft_weight(self, step: int) -> float:
        """Weight of the cross-entropy at `step`."""
        return self.stages[self.stage_of(step)].sft_weight

    def learning_rate(self, step: int) -> float:
        """Learning rate at `step`: linear rise, then cosine to `min_learning_rate`."""
        stage = self.stages[self.stage_of(step)]
        if self.restart_learning_rate:
            peak, done, length = stage.peak_learning_rate, step - stage.first_step, stage.steps
        else:
            peak, done, length = self.stages[0].peak_learning_rate, step, self.total_steps
        rise = self.warmup if self.warmup >= 1 else math.ceil(self.warmup * length)
        if done < rise:
            return peak * (done + 1) / (rise + 1)
        share = min(1.0, (done - rise) / max(1, length - rise))
        low = min(self.min_learning_rate, peak)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * share))

    def is_stage_start(self, step: int) -> bool:
        """Whether a step is the first of a stage other than the first stage."""
        return any(step == s.first_step for s in self.stages[1:])

    def indices(self) -> Iterator[int]:
        """Positions in the data set for the whole run, `batch_size` of them for each step."""
        for k, stage in enumerate(self.stages):
            shuffled = self._shuffled(k, stage)
            if self.length_buckets < 2 or self._lengths is None:
                yield from shuffled
                continue
            window = 0
            while samples := list(islice(shuffled, self.length_buckets * self.batch_size)):
                order = sorted(samples, key=lambda i: (-self._lengths[i], i))  # type: ignore[index]
                batches = np.array(order).reshape(-1, self.batch_size)
                yield from np.random.default_rng((self.seed, k, 1 << 32, window)).permutation(batches).ravel().tolist()
                window += 1

    def _shuffled(self, k: int, stage: Stage) -> Iterator[int]:
        needed, epoch = stage.steps * self.batch_size, 0
        while needed > 0:
            shuffled = np.random.default_rng((self.seed, k, epoch)).permutation(stage.samples)[:needed]
            yield from shuffled.tolist()
            needed -= len(shuffled)
            epoch += 1

    @property
    def sample_passes(self) -> int:
        """How many samples go through the student in the whole run."""
        return self.total_steps * self.batch_size
