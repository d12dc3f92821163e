"""Metrics of answers to held-out prompts: those of all answers together, and means of what scores single ones.

Whatever scores answers as a difficulty signal is a metric too, a function of the user's own among them.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..reflection import Reflected, get_difficulty
from ..reflection.execution import check_tests
from ..reflection.signals import DIFFICULTIES, Difficulty
from ..registry import each_once
from ..rouge import RougeL, choose_tokenizer
from ..suggest import unknown_name
from .corpus_metrics import CORPUS_METRICS, check_sacrebleu, corpus_score

ROUGE_L = "rouge_l"
DEFAULT_METRICS = (ROUGE_L, "exact_match")
# What else an evaluation gives by these names.
_TAKEN = ("loss", "kl", "cross_entropy", "rouge_l_std", "num_samples", "num_tokens", "examples", "rows",
          "sample_id", "generation")  # fmt: skip


class Metric(NamedTuple):
    """A metric of answers.

    Attributes:
        name: of its value.
        higher_is_better: its direction.
        signal: what scores single answers; None for a metric of all together.
    """

    name: str
    higher_is_better: bool
    signal: Difficulty | None


def metric_names() -> list[str]:
    """Names of metrics that there are, in alphabetical order."""
    return sorted({*CORPUS_METRICS, *(signal.name for signal in DIFFICULTIES.things() if signal.of_answers)})


def get_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Look metrics up.

    Args:
        names: from `metric_names()`, or `FILE.py:FUNCTION` or `package.module:function` for a function of the user's
            own, which is one that `reflect` takes as a signal.

    Returns:
        The metrics by the names of their values.

    Raises:
        UserError: a name is unknown or that of another value, a package is missing, or a function cannot be used.
    """
    return each_once("metric", ((metric.name, metric) for metric in map(_metric, names)))


def _metric(name: str) -> Metric:
    if name in CORPUS_METRICS:
        check_sacrebleu(name)
        return Metric(name, True, None)
    if not isinstance(name, str) or (name not in DIFFICULTIES and ":" not in name):
        raise UserError(unknown_name("metric", name, metric_names()) + "; or FILE.py:FUNCTION for one of your own")
    signal = get_difficulty(name)
    if not signal.of_answers:
        raise UserError(f"metric {name!r} is no metric of answers; there are {', '.join(metric_names())}")
    if signal.name in _TAKEN:
        raise UserError(f"metric {name!r}: an evaluation has another value called {signal.name!r}; rename the function")
    return Metric(signal.name, signal.higher_is_easier, signal)


class AnswerScores(NamedTuple):
    """What metrics say of the answers to some samples.

    Attributes:
        means: name of the metric -> its value over all samples.
        rows: name of the metric -> one value a sample, NaN where it says nothing; not of metrics of all together.
    """

    means: dict[str, float]
    rows: dict[str, list[float]]


class AnswerMetrics:
    """Scores answers to the same samples, as often as there are any.

    Args:
        names: as `get_metrics` takes them.
        samples: tokenised.
        tokenizer: of the samples.
        rouge_tokenizer: how ROUGE-L cuts text into words, a name that `srd_fast.rouge.RougeL` takes. "auto" chooses by
            the references of these samples.
        batch_size: for functions of the user's own that run the model.

    Raises:
        UserError: as of `get_metrics`.
    """

    def __init__(
        self,
        names: Sequence[str],
        samples: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        rouge_tokenizer: str = "auto",
        batch_size: int = 32,
    ) -> None:
        self.metrics = get_metrics(names)
        check_tests(self.metrics, samples["tests"], f"{len(samples)} validation rows")
        self.samples, self.tokenizer, self.batch_size = samples, tokenizer, batch_size
        self.references: list[list[str]] = list(samples["references"])
        self.rouge_tokenizer = choose_tokenizer(rouge_tokenizer, self.references)
        self._rouge = RougeL(self.rouge_tokenizer)

    def __call__(self, answers: Sequence[str], model: Any) -> AnswerScores:
        """Score the answers that a model gave.

        Args:
            answers: one a sample, in order.
            model: which gave them.

        Returns:
            The values.

        Raises:
            UserError: a metric says nothing of any sample, or a function gives another number of values.
        """
        means: dict[str, float] = {}
        rows: dict[str, list[float]] = {}
        for name, metric in self.metrics.items():
            if metric.signal is None:
                means[name] = corpus_score(name, answers, self.references)
            else:
                rows[name] = self._of_rows(metric.signal, answers, model)
                scored = [x for x in rows[name] if math.isfinite(x)]
                if not scored:
                    raise UserError(
                        f"metric {name!r} says nothing of any of {len(answers)} validation rows: it is not for this "
                        "data; leave it out"
                    )
                means[name] = statistics.fmean(scored)
        return AnswerScores(means, rows)

    def _of_rows(self, signal: Difficulty, answers: Sequence[str], model: Any) -> list[float]:
        if signal.name == ROUGE_L:  # with the stems of the last call
            return list(self._rouge.score_all(answers, self.references))
        reflected = Reflected(
            self.samples,
            answers,
            model,
            self.tokenizer,
            self.batch_size,
            self.rouge_tokenizer,
            progress=False,
        )
        values = [float(x) for x in signal.function(reflected)]
        if len(values) != len(answers):
            raise UserError(f"metric {signal.name!r} gave {len(values)} values for {len(answers)} rows")
        return values
