"""Read a run folder into one dataclass, and check every file.

A missing file is ``None``; a damaged one raises :class:`~srd_fast.errors.UserError` naming it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.report.answers import ValidationAnswers, read_answers
from srd_fast.report.files import Fields, check_texts, index_of, read_json, read_rows, read_table, read_text

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TrainRows:
    """The training rows, as columns. Only the few rows that the page shows become Python objects."""

    table: pa.Table
    index: dict[str, int]

    def prompt(self, sample_id: str) -> str | None:
        """The full rendered prompt, or None for an unknown row."""
        row = self.index.get(sample_id)
        return None if row is None else self.table["prompt"][row].as_py()

    def references(self, sample_id: str) -> list[str]:
        """The reference responses; empty for an unknown row."""
        row = self.index.get(sample_id)
        return [] if row is None else list(self.table["references"][row].as_py() or [])


@dataclass(frozen=True)
class Reflections:
    """The starting student's answers and their scores.

    ``scores`` maps a signal to one value per row, NaN where a row is unscored: ``rouge_l`` in 0..1,
    ``cross_entropy`` in nats per token, other signals in their own unit.
    """

    table: pa.Table
    index: dict[str, int]
    scores: dict[str, FloatArray]

    def generation(self, sample_id: str) -> str | None:
        """The starting student's answer, or None for an unknown row."""
        row = self.index.get(sample_id)
        return None if row is None else self.table["generation"][row].as_py()

    def score(self, signal: str, sample_id: str) -> float:
        """The value of one signal, NaN for an unknown row or signal."""
        row = self.index.get(sample_id)
        return math.nan if row is None or signal not in self.scores else float(self.scores[signal][row])

    def unscored(self) -> list[tuple[str, str]]:
        """(sample_id, reason) of every row that carries a reason."""
        if "reason" not in self.table.column_names:
            return []
        reasons = zip(self.table["sample_id"].to_pylist(), self.table["reason"].to_pylist(), strict=True)
        return [(sample_id, reason) for sample_id, reason in reasons if reason is not None]


@dataclass(frozen=True)
class Metrics:
    """Columns over steps, one value per step in increasing order, such as ``train["loss"]``.

    ``validation`` has ``kl`` and ``cross_entropy``, and the metrics of answers that were measured, by name.
    """

    train: dict[str, FloatArray]
    validation: dict[str, FloatArray]


@dataclass(frozen=True)
class Example:
    """One held-out prompt, with its reference and a model's answer."""

    sample_id: str
    prompt: str
    reference: str
    generation: str


@dataclass(frozen=True)
class Evaluation:
    """One model on the validation rows: scores of answers in 0..1, the rest in nats per token, NaN if not measured."""

    rouge_l: float = math.nan
    rouge_l_std: float = math.nan
    cross_entropy: float = math.nan
    kl: float = math.nan
    num_samples: float = math.nan
    num_tokens: float = math.nan
    examples: tuple[Example, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    """Other metrics of the answers, by name."""


@dataclass(frozen=True)
class BestStep:
    """The step whose student was kept, as the best by a metric on the validation rows."""

    step: float
    metric: str
    value: float


@dataclass(frozen=True)
class Summary:
    """The figures of a finished run. ``evaluation`` has the keys ``teacher``, ``start`` and ``student``."""

    version: str
    teacher: str
    student: str
    divergence: str
    data: dict[str, float]
    evaluation: dict[str, Evaluation]
    timings: dict[str, float]
    """Seconds by step. Those of the evaluation itself are only in steps.json, which is written after it."""
    training: dict[str, float]
    environment: dict[str, str]
    stages: tuple[dict[str, float], ...] = ()
    mode: str = ""
    answers: dict[str, float] = field(default_factory=dict)
    best: BestStep | None = None


@dataclass(frozen=True)
class SelectedSample:
    """A sample's response token by token: the student's entropy in nats, and whether the loss sees the token."""

    sample_id: str
    prompt: str
    tokens: list[tuple[str, float, bool]]


@dataclass(frozen=True)
class Selection:
    """Which positions a policy chose: counts by entropy (``edges`` in nats), and some samples.

    ``saved_head_work``: share of the heads' products that was saved.
    """

    policy: str
    ratio: float
    saved_head_work: float
    edges: list[float]
    candidates: list[float]
    chosen: list[float]
    samples: list[SelectedSample]


@dataclass(frozen=True)
class Run:
    """A run folder; a field is None when its file is missing."""

    folder: Path
    train: TrainRows | None
    num_validation: int | None
    reflections: Reflections | None
    plan: CurriculumPlan | None
    metrics: Metrics | None
    summary: Summary | None
    config: str | None
    selection: Selection | None = None
    answers: ValidationAnswers | None = None


def read_run(run_folder: str | Path) -> Run:
    """Read every known file of a run folder.

    Raises:
        UserError: the folder does not exist or a file in it is damaged; the message names the file.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    return Run(
        folder=folder,
        train=_read_train(folder / "data" / "train.parquet"),
        num_validation=_count_rows(folder / "data" / "validation.parquet"),
        reflections=_read_reflections(folder / "reflections.parquet"),
        plan=_read_plan(folder / "plan.json"),
        metrics=read_metrics(folder / "metrics.jsonl"),
        summary=_read_summary(folder / "summary.json", _seconds(folder / "steps.json")),
        config=read_text(folder / "config.yaml"),
        selection=_read_selection(folder / "selection.json"),
        answers=read_answers(folder),
    )


def _read_train(path: Path) -> TrainRows | None:
    table = read_rows(path)
    return None if table is None else TrainRows(table, index_of(table))


def _count_rows(path: Path) -> int | None:
    table = read_table(path, ("sample_id",))
    return None if table is None else len(table)


def _read_reflections(path: Path) -> Reflections | None:
    table = read_table(path, ("sample_id", "generation"), optional=None)
    if table is None:
        return None
    scores = {
        field.name: np.asarray(table[field.name].to_numpy(), dtype=np.float64)
        for field in table.schema
        if pa.types.is_floating(field.type)
    }
    check_texts(table, path, ("sample_id", "generation"))
    return Reflections(table, index_of(table), scores)


def _read_plan(path: Path) -> CurriculumPlan | None:
    return CurriculumPlan.load(path) if path.exists() else None


TRAIN_COLUMNS = (
    "step",
    "stage",
    "temperature",
    "sft_weight",
    "learning_rate",
    "loss",
    "divergence",
    "tokens_per_second",
    "memory_mb",
)
VALIDATION_COLUMNS = ("step", "kl", "cross_entropy")


def read_metrics(path: Path) -> Metrics | None:
    """What was measured while training; None if there is no file."""
    text = read_text(path)
    if text is None:
        return None
    train: dict[float, Fields] = {}
    validation: dict[float, Fields] = {}
    lines = text.rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = Fields(path, json.loads(line), f"line {number}")
        except json.JSONDecodeError as error:
            # A run that is still going, or was cut off, may leave its last line half written.
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is not valid JSON ({error.msg})") from error
        step = row.number("step")
        rows = {"train": train, "eval": validation}.get(row.text("kind"))
        if rows is not None:
            if math.isnan(step):
                raise row.fail("step", "a number")
            # A resumed run repeats steps: the last entry belongs to the final student.
            rows[step] = row
    measured = {name for row in validation.values() for name in row.numeric()}
    columns = (*VALIDATION_COLUMNS, *sorted(measured - {*VALIDATION_COLUMNS, "generation_seconds"}))
    metrics = Metrics(_columns(train, TRAIN_COLUMNS), _columns(validation, columns))
    stage = metrics.train["stage"]
    stage[~(stage >= 1)] = 1
    return metrics


def _columns(rows: Mapping[float, Fields], names: Sequence[str]) -> dict[str, FloatArray]:
    ordered = [rows[step] for step in sorted(rows)]
    return {name: np.array([row.number(name) for row in ordered], dtype=np.float64) for name in names}


def _seconds(path: Path) -> dict[str, float]:
    """Seconds of each finished step; empty if there is no steps.json, or a damaged one."""
    try:
        fields = read_json(path)
        found = {} if fields is None else {name: fields.child(name).number("seconds") for name in fields.data}
    except UserError:
        return {}
    return {name: value for name, value in found.items() if name != "report"}


def _read_summary(path: Path, seconds: Mapping[str, float]) -> Summary | None:
    fields = read_json(path)
    if fields is None:
        return None
    models = fields.child("evaluation")
    environment = fields.child("environment")
    return Summary(
        version=fields.text("srd_fast_version"),
        teacher=fields.text("teacher"),
        student=fields.text("student"),
        divergence=fields.text("divergence"),
        data=fields.child("data").numbers(),
        evaluation={name: _evaluation(models.child(name)) for name in models.data},
        timings={**seconds, **fields.child("timings").numbers()},
        training=fields.child("training").numbers(),
        environment={name: str(value) for name, value in environment.data.items()},
        stages=tuple(row.numbers() for row in fields.objects("stages")),
        mode=fields.text("mode"),
        answers=fields.child("answers").numbers(),
        best=_best(fields.child("best")),
    )


def _best(fields: Fields) -> BestStep | None:
    if not fields.data:
        return None
    return BestStep(fields.number("step"), fields.text("metric"), fields.number("value"))


def _read_selection(path: Path) -> Selection | None:
    fields = read_json(path)
    if fields is None:
        return None
    histogram = fields.child("histogram")
    samples = []
    for row in fields.objects("samples"):
        columns = [row.items(name) for name in ("tokens", "entropy", "chosen")]
        if len(set(map(len, columns))) != 1:
            raise row.fail("tokens", "as long as entropy and chosen")
        tokens = [(str(token), float(entropy), bool(seen)) for token, entropy, seen in zip(*columns)]
        samples.append(SelectedSample(row.text("sample_id"), row.text("prompt"), tokens))
    edges, candidates, chosen = (histogram.items(name) for name in ("edges", "candidates", "chosen"))
    ratio, saved = fields.number("ratio"), fields.number("saved_head_work")
    return Selection(fields.text("policy"), ratio, saved, edges, candidates, chosen, samples)


_OF_EVALUATION = {"rouge_l", "rouge_l_std", "cross_entropy", "kl", "num_samples", "num_tokens", "examples", "rows"}


def _evaluation(fields: Fields) -> Evaluation:
    examples = tuple(
        Example(row.text("sample_id"), row.text("prompt"), row.text("reference"), row.text("generation"))
        for row in fields.objects("examples")
    )
    return Evaluation(
        rouge_l=fields.number("rouge_l"),
        rouge_l_std=fields.number("rouge_l_std"),
        cross_entropy=fields.number("cross_entropy"),
        kl=fields.number("kl"),
        num_samples=fields.number("num_samples"),
        num_tokens=fields.number("num_tokens"),
        examples=examples,
        metrics={n: x for n in fields.numeric() if n not in _OF_EVALUATION and not math.isnan(x := fields.number(n))},
    )
