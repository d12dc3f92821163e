"""Each model's answer to each validation row, with its measures: evaluation.json and the validation split."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from srd_fast.report.files import Fields, read_json, read_rows

# The models of a run, in the order in which pages show them.
NAMES = {"teacher": "teacher", "start": "starting student", "student": "distilled student"}


@dataclass(frozen=True)
class RowMeasures:
    """One model's measures on the validation rows, NaN for what was not measured.

    Args:
        index: sample_id -> its place in the columns.
        generations: the answers.
        rouge_l: ROUGE-L, 0 to 1.
        cross_entropy: cross-entropy summed over the tokens of a row, in nats.
        kl: KL to the teacher, summed over the tokens of a row, in nats.
        num_tokens: number of tokens with loss.
    """

    index: Mapping[str, int]
    generations: list[str]
    rouge_l: npt.NDArray[np.float64]
    cross_entropy: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    num_tokens: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ValidationAnswers:
    """The validation rows, and the models' measures on them. models has the keys "teacher", "start" and "student"."""

    table: pa.Table | None
    models: dict[str, RowMeasures]


def read_answers(folder: Path) -> ValidationAnswers | None:
    """Read the measures of single rows.

    Args:
        folder: the run folder.

    Returns:
        The measures; None if there are none, as in runs of older versions.

    Raises:
        UserError: a file is damaged.
    """
    fields = read_json(folder / "evaluation.json")
    if fields is None:
        return None
    models = {}
    for name in NAMES:
        rows = fields.child(name).child("rows")
        if rows.data:
            models[name] = _measures(rows)
    if not models:
        return None
    return ValidationAnswers(read_rows(folder / "data" / "validation.parquet"), models)


def texts_of(table: pa.Table) -> tuple[dict[str, str], dict[str, str]]:
    """sample_id -> prompt, and sample_id -> references, one below the other."""
    ids = table["sample_id"].to_pylist()
    joined = ("\n– or –\n".join(y for y in x or [] if y is not None) for x in table["references"].to_pylist())
    return dict(zip(ids, table["prompt"].to_pylist())), dict(zip(ids, joined))


def _measures(rows: Fields) -> RowMeasures:
    ids = [str(x) for x in rows.items("sample_id")]

    def numbers(name: str) -> npt.NDArray[np.float64]:
        values = rows.items(name) or [math.nan] * len(ids)
        if len(values) != len(ids):
            raise rows.fail(name, "as long as sample_id")
        if not all(x is None or (isinstance(x, int | float) and not isinstance(x, bool)) for x in values):
            raise rows.fail(name, "a list of numbers")
        return np.array(values, dtype=np.float64)

    generations = [str(x) for x in rows.items("generation")]
    if len(generations) != len(ids):
        raise rows.fail("generation", "as long as sample_id")
    columns = (numbers(name) for name in ("rouge_l", "cross_entropy", "kl", "num_tokens"))
    return RowMeasures({x: i for i, x in enumerate(ids)}, generations, *columns)
