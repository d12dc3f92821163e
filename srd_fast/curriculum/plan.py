"""A curriculum: which samples are trained on, in which subset, and which are left out and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .plan_file import TEXT, read_plan, unreadable, write_plan

METHODS = ("srd", "random", "none")
# Orders of the kept samples that are no signal's.
RANKED, SHUFFLED = "ranked", "shuffled"
REASONS = pa.schema({"sample_id": TEXT, "reason": TEXT})
FUSED = pa.schema({"sample_id": TEXT, "score": pa.float64()})
WEIGHTS = pa.schema({"sample_id": TEXT, "weight": pa.float64()})
# Attributes of a plan besides its samples. Its file has the last two only if they are set.
SETTINGS = ("method", "keep", "keep_rule", "stages", "rrf_k", "signals", "order", "band", "weight_by")
_OPTIONAL = ("band", "weight_by")


@dataclass(frozen=True)
class Signal:
    """How a column of the scores ranks samples from easy to hard.

    Args:
        higher_is_easier: whether a high value means an easy sample.
        weight: factor on this signal's part of the fused score.
    """

    higher_is_easier: bool
    weight: float = 1.0


class CurriculumPlan:
    """Which samples are trained on, in which subset, and which are not and why. A plan does not change.

    A plan holds Arrow columns. `subsets`, `dropped`, `unscored`, `fused` and `kept` are converted to Python objects
    when they are first used; `subset_columns` are the columns themselves.

    Args:
        subsets: sample ids, the subset of the first stage first, each in `order`. Later subsets may be empty.
        dropped: rows of "sample_id" and "reason" for samples beyond the kept ones, from easier to harder.
        unscored: such rows for samples that could not be ranked.
        fused: sample_id -> fused score of every ranked sample; higher is easier.
        method: how samples were ranked: "srd", "random" or "none".
        keep: share of the ranked samples that is kept, in (0, 1].
        stages: number of subsets.
        rrf_k: k of the score 1 / (k + rank).
        signals: column of the scores -> Signal.
        keep_rule: "ratio" if `keep` was given, "knee" if it was found.
        order: the order of the kept samples before they are divided into subsets: "ranked" (from easy to hard),
            "shuffled", or the signal by which they are sorted.
        band: column of the scores -> lowest and highest value of a kept sample.
        weight_by: the column from which weights are computed, or None.
        weights: sample_id -> its weight in the loss, if there are any. A trainer divides them by the mean over the kept
            samples.

    Raises:
        UserError: a row of `dropped` or `unscored` lacks its sample_id or reason, or a score or weight is not finite.
    """

    def __init__(
        self,
        subsets: Sequence[Sequence[str] | pa.Array],
        dropped: Sequence[Mapping[str, str]] | pa.RecordBatch = (),
        unscored: Sequence[Mapping[str, str]] | pa.RecordBatch = (),
        fused: Mapping[str, float] | pa.RecordBatch | None = None,
        method: str = "srd",
        keep: float = 1.0,
        stages: int = 1,
        rrf_k: float = 60,
        signals: Mapping[str, Signal] | None = None,
        keep_rule: str = "ratio",
        order: str = RANKED,
        band: Mapping[str, Sequence[float]] | None = None,
        weight_by: str | None = None,
        weights: Mapping[str, float] | pa.RecordBatch | None = None,
    ) -> None:
        self.subset_columns = [s.cast(TEXT) if isinstance(s, pa.Array) else pa.array(s, TEXT) for s in subsets]
        self.dropped_rows, self.unscored_rows = _reason_rows("dropped", dropped), _reason_rows("unscored", unscored)
        self.fused_rows = _number_rows("fused scores", {} if fused is None else fused, FUSED)
        self.weight_rows = _number_rows("weights", {} if weights is None else weights, WEIGHTS)
        self.method, self.keep, self.keep_rule = method, keep, keep_rule
        self.stages, self.rrf_k, self.signals, self.order = stages, rrf_k, dict(signals or {}), order
        self.band = {name: (float(low), float(high)) for name, (low, high) in (band or {}).items()}
        self.weight_by = weight_by

    @cached_property
    def subsets(self) -> list[list[str]]:
        """Sample ids, the subset of the first stage first, each in the plan's order."""
        return [s.to_pylist() for s in self.subset_columns]

    @cached_property
    def dropped(self) -> list[dict[str, str]]:
        """Rows of sample_id and reason for samples beyond the kept ones, from easier to harder."""
        return self.dropped_rows.to_pylist()

    @cached_property
    def unscored(self) -> list[dict[str, str]]:
        """Rows of sample_id and reason for samples that could not be ranked."""
        return self.unscored_rows.to_pylist()

    @cached_property
    def fused(self) -> dict[str, float]:
        """sample_id -> fused score of every ranked sample, from easy to hard; higher is easier."""
        return dict(zip(self.fused_rows["sample_id"].to_pylist(), self.fused_rows["score"].to_pylist()))

    @cached_property
    def weights(self) -> dict[str, float]:
        """sample_id -> weight in the loss; empty if all weights are equal."""
        return dict(zip(self.weight_rows["sample_id"].to_pylist(), self.weight_rows["weight"].to_pylist()))

    @property
    def kept(self) -> list[str]:
        """All kept sample ids, in the plan's order."""
        return self.stage_ids(len(self.subset_columns))

    @property
    def ranked_by(self) -> list[str]:
        """The signals that rank: those with a weight."""
        return [name for name, signal in self.signals.items() if signal.weight]

    @property
    def is_by_ease(self) -> bool:
        """Whether the subsets go from easy to hard, and not at random or by a gap to the teacher."""
        by = self.ranked_by if self.order == RANKED else [self.order]
        chance = self.order == SHUFFLED or (self.order == RANKED and self.method == "random")
        return not chance and by != ["gap"]

    def stage_ids(self, stage: int) -> list[str]:
        """List the samples of a stage: those of its subset and of all before it (Baby Step).

        Args:
            stage: its number, from 0.

        Returns:
            Sample ids, in the plan's order.
        """
        return [s for subset in self.subsets[: stage + 1] for s in subset]

    def with_subsets(
        self,
        subsets: Sequence[Sequence[str] | pa.Array],
        dropped: Sequence[Mapping[str, str]],
        weights: Mapping[str, float] | None = None,
    ) -> "CurriculumPlan":
        """Make a plan with other subsets and dropped samples, and the same scores and settings.

        Args:
            subsets: sample ids, the subset of the first stage first.
            dropped: rows of "sample_id" and "reason".
            weights: sample_id -> weight in the loss. Default: those of this plan.

        Returns:
            The new plan.
        """
        settings = {name: getattr(self, name) for name in SETTINGS}
        own = self.weight_rows if weights is None else weights
        return CurriculumPlan(subsets, dropped, self.unscored_rows, self.fused_rows, **settings, weights=own)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CurriculumPlan):
            return NotImplemented
        return (
            all(getattr(self, name) == getattr(other, name) for name in SETTINGS)
            and self.subset_columns == other.subset_columns
            and self.dropped_rows.equals(other.dropped_rows)
            and self.unscored_rows.equals(other.unscored_rows)
            and (self.fused_rows.equals(other.fused_rows) or self.fused == other.fused)
            and (self.weight_rows.equals(other.weight_rows) or self.weights == other.weights)
        )

    def __repr__(self) -> str:
        sizes = [len(s) for s in self.subset_columns]
        left = f"{len(self.dropped_rows)} dropped + {len(self.unscored_rows)} unscored"
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)
        return f"<CurriculumPlan of {sizes} + {left}: {settings}>"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Readers see the old file or the new one, never a part.

        Args:
            path: the file. `CurriculumPlan.load` reads an equal plan from it.
        """
        settings = {name: x for name in SETTINGS if (x := getattr(self, name)) or name not in _OPTIONAL}
        settings["signals"] = {n: asdict(s) for n, s in self.signals.items()}
        numbers = {"fused": self.fused_rows, **({"weights": self.weight_rows} if len(self.weight_rows) else {})}
        write_plan(path, settings, self.subset_columns, self.dropped_rows, self.unscored_rows, numbers)

    @classmethod
    def load(cls, path: str | Path) -> "CurriculumPlan":
        """Read a saved plan.

        Args:
            path: a file that `save` wrote.

        Returns:
            The plan.

        Raises:
            UserError: the file is missing or is not a plan.
        """
        content = read_plan(path)
        try:
            content["signals"] = {n: Signal(**s) for n, s in content["signals"].items()}
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise unreadable(path, e) from e


def _reason_rows(name: str, rows: Sequence[Mapping[str, str]] | pa.RecordBatch) -> pa.RecordBatch:
    if isinstance(rows, pa.RecordBatch):
        return rows
    batch = pa.RecordBatch.from_pylist(list(rows), schema=REASONS)
    if any(column.null_count for column in batch.columns):
        raise UserError(f"each row of {name} must have a sample_id and a reason")
    return batch


def _number_rows(what: str, given: Mapping[str, float] | pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if isinstance(given, pa.RecordBatch):
        return given
    columns = [pa.array(list(given), TEXT), pa.array(list(given.values()), pa.float64())]
    if columns[1].null_count or pc.all(pc.is_finite(columns[1])).as_py() is False:
        raise UserError(f"{what} must be finite numbers")
    return pa.RecordBatch.from_arrays(columns, schema=schema)
