"""Difficulty signals: one number a sample that says how hard it is for the student."""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data import IGNORE_INDEX, DistillationCollator, answer_ends, first_label
from ..errors import UserError
from ..losses import token_cross_entropy
from ..models import common_prefix, decoder_start, find_head, hidden_states, share_prefix
from ..own_code import file_of, function_of
from ..registry import Registry, each_once
from ..rouge import RougeL, normal_form
from ..sharing import ALONE, Sharing
from ..showing import progress_bar
from ..teacher.source import TeacherSource
from .attempts import PASS_RATE, pass_rate
from .execution import EXECUTION, pass_rates
from .final_number import final_number
from .gap import gap, teacher_cross_entropy
from .parts import cut

logger = logging.getLogger(__name__)

NUMERIC_MATCH = "numeric_match"
# Signals that need something of the rows that rows may lack: see `check_rows`.
OF_ROWS = frozenset({EXECUTION, NUMERIC_MATCH})
# Columns of `reflect` besides the signals.
RESERVED = ("sample_id", "generation", "generated_ids", "attempts", "attempt_ids", "reason")


@dataclass(frozen=True)
class Reflected:
    """Everything that a signal may use: tokenised samples, the student's answers, and the student itself.

    dataset: columns sample_id, prompt, references, input_ids, labels, tests. generations: one text a sample, in the
    same order. test_seconds, test_memory_mb: limits of each test of `execution`.
    log_probs: if the engine gave them, the log-probabilities (nats) of all tokens but the first of each sample.
    sharing: the processes that share the work of signals marked `shared`. Other signals run only in the first process.
    teacher: the source of the teacher's rows, if `reflect` was given a teacher.
    attempts: for each attempt the answers to all samples; the first are `generations`. judge: the signal that says
    which attempts pass.
    """

    dataset: Dataset
    generations: Sequence[str]
    student: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 32
    rouge_tokenizer: str = "auto"
    score_eos: bool = True
    progress: bool = True
    log_probs: Sequence[Sequence[float]] | None = None
    test_seconds: float = 5.0
    test_memory_mb: int = 512
    sharing: Sharing = ALONE
    teacher: TeacherSource | None = None
    attempts: Sequence[Sequence[str]] = ()
    judge: "Difficulty | None" = None

    @cached_property
    def student_losses(self) -> list[float]:
        """`cross_entropy`, computed once for all signals that use it."""
        return cross_entropy(self)

    @cached_property
    def teacher_losses(self) -> list[float]:
        """`teacher_cross_entropy`, computed once for all signals that use it."""
        return teacher_cross_entropy(self)


@dataclass(frozen=True)
class Difficulty:
    """A signal: the name of its column, its function, its direction, and a package of the extra `metrics` if needed.

    shared: whether all processes of a group call it, and the first one's values count.
    needs_teacher: whether it compares with the teacher.
    of_answers: whether it scores answers, so that it is also a metric for evaluations.
    """

    name: str
    function: Callable[[Reflected], Sequence[float]]
    higher_is_easier: bool
    package: str | None = None
    shared: bool = False
    needs_teacher: bool = False
    of_answers: bool = True


def rouge_l(reflected: Reflected) -> list[float]:
    """ROUGE-L F-measure of each answer against its references, 0..1."""
    scorer = RougeL(reflected.rouge_tokenizer)
    scores = scorer.score_all(reflected.generations, list(reflected.dataset["references"]))
    if scorer.emptied:
        way = "by those few" if reflected.rouge_tokenizer == "rouge" else "as words of any script"
        logger.warning(
            "rouge-score's tokenizer loses most letters of the references of %d of %d samples: they are scored %s",
            scorer.emptied, len(scores), way,
        )  # fmt: skip
    return scores


@torch.no_grad()
def cross_entropy(reflected: Reflected) -> list[float]:
    """Mean token cross-entropy of each reference under the student, nats per token."""
    rows = reflected.dataset
    ends = set() if reflected.score_eos else answer_ends(rows, reflected.tokenizer)

    def scored(labels: list[int]) -> list[int]:
        """The labels that count; the end token counts only with score_eos."""
        return [*labels[:-1], IGNORE_INDEX] if labels[-1] in ends else labels

    if reflected.log_probs is not None:
        labels = (scored(y) for batch in rows.iter(1000) for y in batch["labels"])
        return [_mean_loss(y, log_probs) for y, log_probs in zip(labels, reflected.log_probs)]
    model = reflected.student
    collate = DistillationCollator(decoder_start=decoder_start(model))
    head = find_head(model)
    assert head.weight is not None
    device = head.weight.device
    lengths = [len(x) for batch in rows.iter(1000) for x in batch["input_ids"]]
    found: dict[int, float] = {}
    was_training = model.training
    model.eval()
    batches, sharing = cut(lengths, reflected.batch_size, rows["sample_id"]), reflected.sharing
    mine = batches[sharing.rank :: sharing.world]
    bar = progress_bar(what="cross-entropy", total=sum(map(len, mine)), unit="sample", shown=reflected.progress)

    def collated(indices: list[int]) -> dict[str, torch.Tensor]:
        some = rows[indices]
        batch = collate([{"input_ids": x, "labels": scored(y)} for x, y in zip(some["input_ids"], some["labels"])])
        return {k: v.to(device) for k, v in batch.items()}

    start = common_start(rows) if len(batches) > 2 else []
    shared = share_prefix(model, start, collated(batches[0][-2:])) if start else None
    for indices in mine:
        batch = collated(indices)
        if shared is not None:
            batch = {k: v[:, shared.length :] for k, v in batch.items()}
        states_BLD = hidden_states(model, batch) if shared is None else shared.hidden_states(batch)
        target = batch["labels"][:, 1:]
        kept = target != IGNORE_INDEX
        losses = token_cross_entropy(states_BLD[:, :-1][kept], head, target[kept])
        for i, of_sample in zip(indices, losses.split(kept.sum(1).tolist())):
            found[i] = float(of_sample.mean()) if len(of_sample) else float("nan")
        bar.update(len(indices))
    bar.close()
    model.train(was_training)
    by_sample = {i: value for of_process in sharing.gather(found) for i, value in of_process.items()}
    return [by_sample.get(i, float("nan")) for i in range(len(rows))]


def common_start(rows: Dataset) -> list[int]:
    """The tokens with which all samples begin, excluding any token whose state predicts a first label."""
    found: list[int] | None = None
    for batch in rows.iter(1000):
        some = [ids[: max(0, first_label(y) - 1)] for ids, y in zip(batch["input_ids"], batch["labels"])]
        found = common_prefix([*some, *([] if found is None else [found])])
    return found or []


def _mean_loss(labels: Sequence[int], log_probs: Sequence[float]) -> float:
    """Mean of -log p over the tokens that count; the first token has no log-probability."""
    losses = [-p for label, p in zip(labels[1:], log_probs) if label != IGNORE_INDEX]
    return sum(losses) / len(losses) if losses else float("nan")


def exact_match(reflected: Reflected) -> list[float]:
    """1 if the answer equals one of its references, else 0. Case, amounts of white space and the encoding of characters
    are ignored."""

    def normalised(text: str) -> str:
        return " ".join(normal_form(text).split())

    answers = zip(reflected.generations, reflected.dataset["references"])
    return [float(normalised(g) in map(normalised, references)) for g, references in answers]


def check_rows(asked: Iterable[str], samples: Dataset, what: str) -> None:
    """Refuse signals or metrics that need something that no row has, before anything is answered.

    Args:
        asked: names of signals or metrics.
        samples: tokenised samples.
        what: what the message calls them.

    Raises:
        UserError: execution is asked for and no row has tests, or numeric_match and no reference has a number.
    """
    names = set(asked)
    if EXECUTION in names and not any(samples["tests"]):
        raise UserError(
            f"{EXECUTION!r} runs the tests of a row, and none of {what} has any in a column tests; leave it out, or "
            "give the rows tests"
        )
    if NUMERIC_MATCH in names and all(final_number(r) is None for row in samples["references"] for r in row):
        raise UserError(
            f"{NUMERIC_MATCH!r} compares final numbers, and no reference of {what} has a number; leave it out, or take "
            "exact_match"
        )


def numeric_match(reflected: Reflected) -> list[float]:
    """1 if the final number of the answer is that of one of its references (GSM8K), else 0; NaN if no reference has a
    number."""

    def score(answer: str, references: Sequence[str]) -> float:
        wanted = {final_number(r) for r in references} - {None}
        return float(final_number(answer) in wanted) if wanted else math.nan

    return [score(g, r) for g, r in zip(reflected.generations, reflected.dataset["references"])]


def chrf(reflected: Reflected) -> list[float]:
    """chrF2 of each answer (sacrebleu's, character 6-grams), 0..1, the best over its references."""
    from sacrebleu.metrics import CHRF

    return _sentence_scores(CHRF(), reflected)


def bleu(reflected: Reflected) -> list[float]:
    """BLEU-4 of each answer (sacrebleu's: 13a tokens, exponential smoothing, no n-grams longer than the answer), 0..1,
    the best over its references."""
    from sacrebleu.metrics import BLEU

    return _sentence_scores(BLEU(effective_order=True), reflected)


def _sentence_scores(metric: Any, reflected: Reflected) -> list[float]:
    # sacrebleu's percentages may exceed 100 by a rounding error.
    return [
        max((min(metric.sentence_score(g, [r]).score / 100, 1.0) for r in references), default=0.0)
        for g, references in zip(reflected.generations, reflected.dataset["references"])
    ]


def execution(reflected: Reflected) -> list[float]:
    """Share of a sample's tests (column `tests`) that the code in its answer passes, each run in a sandbox, 0..1."""
    tests, seconds, memory_mb = reflected.dataset["tests"], reflected.test_seconds, reflected.test_memory_mb
    return pass_rates(reflected.generations, tests, seconds=seconds, memory_mb=memory_mb)


_BUILT_IN = (
    Difficulty("rouge_l", rouge_l, higher_is_easier=True),
    Difficulty("cross_entropy", attrgetter("student_losses"), False, shared=True, of_answers=False),
    Difficulty(
        "teacher_cross_entropy",
        attrgetter("teacher_losses"),
        higher_is_easier=False,
        shared=True,
        needs_teacher=True,
        of_answers=False,
    ),
    Difficulty("gap", gap, higher_is_easier=True, shared=True, needs_teacher=True, of_answers=False),
    Difficulty(EXECUTION, execution, higher_is_easier=True),
    Difficulty("exact_match", exact_match, higher_is_easier=True),
    Difficulty(NUMERIC_MATCH, numeric_match, higher_is_easier=True),
    Difficulty(PASS_RATE, pass_rate, higher_is_easier=True, of_answers=False),
    Difficulty("chrf", chrf, higher_is_easier=True, package="sacrebleu"),
    Difficulty("bleu", bleu, higher_is_easier=True, package="sacrebleu"),
)
DIFFICULTIES = Registry("difficulty signal", {signal.name: signal for signal in _BUILT_IN})


def difficulty_names() -> list[str]:
    """Names that `signals=` takes.

    Returns:
        All names, in alphabetical order.
    """
    return DIFFICULTIES.names()


def get_difficulty(name: str) -> Difficulty:
    """Look up a signal, or import a user's function, named `package.module:function` or `path/to/file.py:function`.

    The column of a user's function has the function's name, and its attribute `higher_is_easier` is its direction.

    Raises:
        UserError: the name is unknown, a package is missing, or a user's function cannot be used: there is no such
            file, module or function, its code has an error, or it has no direction.
    """
    if name not in DIFFICULTIES and ":" in name:
        return _imported(name)
    signal = DIFFICULTIES.get(name)
    if signal.package is not None and importlib.util.find_spec(signal.package) is None:
        raise UserError(
            f"difficulty signal {name!r} needs the {signal.package} package: pip install 'srd-fast[metrics]'"
        )
    return signal


def _imported(name: str) -> Difficulty:
    function, attribute = function_of(name, "difficulty signal"), column_of(name)
    if attribute in DIFFICULTIES or attribute in RESERVED:
        raise UserError(f"difficulty signal {name!r}: the name {attribute!r} is taken; rename the function")
    direction = getattr(function, "higher_is_easier", None)
    if not isinstance(direction, bool):
        raise UserError(
            f"difficulty signal {name!r} does not say its direction: write {attribute}.higher_is_easier = True below "
            "the function, or False if a high value means a hard sample"
        )
    return Difficulty(attribute, function, direction)


def column_of(name: str) -> str:
    """The column of a signal, which may be given by that name or as `reflect` takes it."""
    return name if name in DIFFICULTIES else name.rpartition(":")[2]


def get_difficulties(names: Iterable[str]) -> dict[str, Difficulty]:
    """Look up signals, and return them by their columns.

    Raises:
        UserError: a name is wrong, or two signals have the same column.
    """
    return each_once("difficulty signal", ((signal.name, signal) for signal in map(get_difficulty, names)))


def signal_files(names: Iterable[str]) -> list[Path]:
    """The files of the signals that are named `path/to/file.py:function`."""
    return [path for path in map(file_of, names) if path is not None]


def register_difficulty(
    name: str,
    function: Callable[[Reflected], Sequence[float]],
    *,
    higher_is_easier: bool,
    replace: bool = False,
) -> None:
    """Add a difficulty signal under `name`, usable at once in `reflect(signals=[...])` and as a column for `curate`.

    Args:
        name: a new name; an existing one only with `replace=True`.
        function: `function(reflected)` -> one number a sample, in order; NaN or infinity marks a sample as unscored.
        higher_is_easier: whether a high value means an easy sample.
        replace: whether an existing signal of this name is replaced.

    Raises:
        UserError: the name is taken, or is not text.

    Examples:
        >>> register_difficulty("brevity", lambda r: [-len(g) for g in r.generations],
        ...     higher_is_easier=True, replace=True)
        >>> get_difficulty("brevity").higher_is_easier
        True
    """
    if name in RESERVED:
        raise UserError(f"difficulty signal {name!r}: `reflect` has another column of that name; take another name")
    DIFFICULTIES.register(name, Difficulty(name, function, higher_is_easier), replace=replace)
