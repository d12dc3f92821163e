"""A curriculum: which samples are trained on, in which subset, and which are not and why."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .plan_file import TEXT, read_plan, unreadable, write_plan

METHODS = ("srd", "random", "none")
REASONS = pa.schema({"sample_id": TEXT, "reason": TEXT})
FUSED = pa.schema({"sample_id": TEXT, "score": pa.float64()})
# Attributes of a plan beside its samples.
SETTINGS = ("method", "keep", "keep_rule", "stages", "rrf_k", "signals")


@dataclass(frozen=True)
class Signal:
    """How a column of the scores ranks samples from easy to hard."""

    higher_is_easier: bool
    weight: float = 1.0


class CurriculumPlan:
    """Which samples are trained on, in which subset, and which are not and why. Not to be changed.

    It holds Arrow columns; `subsets`, `dropped`, `unscored`, `fused` and `kept` make their Python objects when they are
    first asked for, `subset_columns` makes none.

    Args:
        subsets: sample ids, easiest subset first and easy to hard inside; later ones may be empty.
        dropped: {"sample_id", "reason"} from easier to harder.
        unscored: the same for samples that could not be ranked.
        fused: sample_id -> fused score, for every ranked sample; higher is easier.
        method, keep, stages, rrf_k, signals: what `curate` was asked for; `keep` the share that is kept.
        keep_rule: "ratio" if `keep` was given, "knee" if it was found.

    Raises:
        UserError: a row of `dropped` or `unscored` lacks its sample_id or reason.
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
    ) -> None:
        self.subset_columns = [s.cast(TEXT) if isinstance(s, pa.Array) else pa.array(s, TEXT) for s in subsets]
        self.dropped_rows, self.unscored_rows = _reason_rows("dropped", dropped), _reason_rows("unscored", unscored)
        self.fused_rows = _score_rows({} if fused is None else fused)
        self.method, self.keep, self.keep_rule = method, keep, keep_rule
        self.stages, self.rrf_k, self.signals = stages, rrf_k, dict(signals or {})

    @cached_property
    def subsets(self) -> list[list[str]]:
        """Sample ids, easiest subset first and easy to hard inside."""
        return [s.to_pylist() for s in self.subset_columns]

    @cached_property
    def dropped(self) -> list[dict[str, str]]:
        """{"sample_id", "reason"} of the samples beyond the kept ones, from easier to harder."""
        return self.dropped_rows.to_pylist()

    @cached_property
    def unscored(self) -> list[dict[str, str]]:
        """{"sample_id", "reason"} of the samples that could not be ranked."""
        return self.unscored_rows.to_pylist()

    @cached_property
    def fused(self) -> dict[str, float]:
        """sample_id -> fused score of every ranked sample, easy to hard; higher is easier."""
        return dict(zip(self.fused_rows["sample_id"].to_pylist(), self.fused_rows["score"].to_pylist()))

    @property
    def kept(self) -> list[str]:
        """All kept sample ids, easy to hard."""
        return self.stage_ids(len(self.subset_columns))

    def stage_ids(self, stage: int) -> list[str]:
        """Samples of stage `stage` (from 0): Baby Step, subsets 0 to `stage` together."""
        return [s for subset in self.subsets[: stage + 1] for s in subset]

    def with_subsets(
        self, subsets: Sequence[Sequence[str] | pa.Array], dropped: Sequence[Mapping[str, str]]
    ) -> "CurriculumPlan":
        """The same plan with other subsets and dropped samples."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        return CurriculumPlan(subsets, dropped, self.unscored_rows, self.fused_rows, **settings)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CurriculumPlan):
            return NotImplemented
        return (
            all(getattr(self, name) == getattr(other, name) for name in SETTINGS)
            and self.subset_columns == other.subset_columns
            and self.dropped_rows.equals(other.dropped_rows)
            and self.unscored_rows.equals(other.unscored_rows)
            and (self.fused_rows.equals(other.fused_rows) or self.fused == other.fused)
        )

    def __repr__(self) -> str:
        sizes = [len(s) for s in self.subset_columns]
        left = f"{len(self.dropped_rows)} dropped + {len(self.unscored_rows)} unscored"
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTINGS)
        return f"<CurriculumPlan of {sizes} + {left}: {settings}>"

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically and in pieces. `CurriculumPlan.load` gives back an equal plan."""
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings["signals"] = {n: asdict(s) for n, s in self.signals.items()}
        write_plan(path, settings, self.subset_columns, self.dropped_rows, self.unscored_rows, self.fused_rows)

    @classmethod
    def load(cls, path: str | Path) -> "CurriculumPlan":
        """Read a saved plan.

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


def _score_rows(fused: Mapping[str, float] | pa.RecordBatch) -> pa.RecordBatch:
    if isinstance(fused, pa.RecordBatch):
        return fused
    columns = [pa.array(list(fused), TEXT), pa.array(list(fused.values()), pa.float64())]
    if columns[1].null_count or pc.all(pc.is_finite(columns[1])).as_py() is False:
        raise UserError("fused scores must be finite numbers")
    return pa.RecordBatch.from_arrays(columns, schema=FUSED)
