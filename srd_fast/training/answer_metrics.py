"""Metrics of answers to held-out prompts: scores of all answers together, and means of scores of single answers.

Every difficulty signal that scores answers is also a metric, including a user's own function.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..reflection import Reflected, get_difficulty
from ..reflection.signals import DIFFICULTIES, Difficulty, check_rows
from ..registry import each_once
from ..rouge import RougeL, choose_tokenizer
from ..suggest import unknown_name
from .corpus_metrics import CORPUS_METRICS, check_sacrebleu, corpus_score

ROUGE_L = "rouge_l"
DEFAULT_METRICS = (ROUGE_L, "exact_match")
# Names of other values in the result of an evaluation.
_TAKEN = ("loss", "kl", "cross_entropy", "rouge_l_std", "num_samples", "num_tokens", "examples", "rows",
          "sample_id", "generation")  # fmt: skip


class Metric(NamedTuple):
    """A metric of answers.

    Attributes:
        name: the name of its value.
        higher_is_better: whether a higher value is better.
        signal: scores single answers; None for a metric of all answers together.
    """

    name: str
    higher_is_better: bool
    signal: Difficulty | None


def metric_names() -> list[str]:
    """The names of all metrics, in alphabetical order."""
    return sorted({*CORPUS_METRICS, *(signal.name for signal in DIFFICULTIES.things() if signal.of_answers)})


def get_metrics(names: Sequence[str]) -> dict[str, Metric]:
    """Look up metrics.

    Args:
        names: names from `metric_names()`; or `FILE.py:FUNCTION` or `package.module:function` for a user's function,
            as `reflect` takes it as a signal.

    Returns:
        The metrics by the names of their values.

    Raises:
        UserError: a name is unknown or belongs to another value, a package is missing, or a function cannot be used.
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
        raise UserError(f"metric {name!r} is not a metric of answers; known: {', '.join(metric_names())}")
    if signal.name in _TAKEN:
        raise UserError(f"metric {name!r}: an evaluation has another value called {signal.name!r}; rename the function")
    return Metric(signal.name, signal.higher_is_easier, signal)


class AnswerScores(NamedTuple):
    """The metrics' values for the answers to some samples.

    Attributes:
        means: name of the metric -> its value over all samples.
        rows: name of the metric -> one value a sample, NaN where it has none; without metrics of all answers together.
    """

    means: dict[str, float]
    rows: dict[str, list[float]]


class AnswerMetrics:
    """Scores answers to the same samples, any number of times.

    Args:
        names: as in `get_metrics`.
        samples: tokenised samples.
        tokenizer: the samples' tokenizer.
        rouge_tokenizer: how ROUGE-L cuts text into words, a name that `srd_fast.rouge.RougeL` takes. "auto" chooses by
            the references of these samples.
        batch_size: samples of a forward pass, for user's functions that run the model.

    Raises:
        UserError: as in `get_metrics`.
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
        check_rows(self.metrics, samples, f"the {len(samples)} validation rows")
        self.samples, self.tokenizer, self.batch_size = samples, tokenizer, batch_size
        self.references: list[list[str]] = list(samples["references"])
        self.rouge_tokenizer = choose_tokenizer(rouge_tokenizer, self.references)
        self._rouge = RougeL(self.rouge_tokenizer)

    def __call__(self, answers: Sequence[str], model: Any) -> AnswerScores:
        """Score the answers of a model.

        Args:
            answers: one a sample, in order.
            model: the model that gave them.

        Returns:
            The values.

        Raises:
            UserError: a metric has no value for any sample, or a function returns another number of values.
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
