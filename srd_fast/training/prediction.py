"""A student's predictions on held-out rows, for a user's own metrics: class indices instead of logits.

The logits of a whole evaluation are often larger than memory. So the likeliest class of each token is found chunk by
chunk, like the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction

from ..data import IGNORE_INDEX
from ..errors import UserError
from ..kernels import RowValues
from ..losses import Head
from ..losses.token_values import token_values

EvaluationSets = Dataset | dict[str, Dataset] | None
ComputeMetrics = Callable[[EvalPrediction], Mapping[str, float]]
_FOR_METRICS = {"inputs", "loss"}


def named_sets(rows: Any) -> bool:
    """Whether `rows` are several data sets by name, and not the columns of a single one."""
    if type(rows) is not dict:
        return False
    first: list[Any] = [next(iter(x), None) if isinstance(x, (list, tuple)) else {} for x in rows.values()]
    return bool(rows) and all(isinstance(x, Mapping) for x in first)


class Predictions:
    """Collects the likeliest class of each token with loss.

    Args:
        prompts: keep the prompts too.
    """

    def __init__(self, prompts: bool = False) -> None:
        self.prompts = prompts
        self._rows: list[tuple[list[int], list[int], list[float], list[int]]] = []

    def of_batch(
        self, batch: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
    ) -> Callable[[Head, Tensor], None]:
        """Make a function that records the predictions of a batch, to be called inside the head's call.

        Args:
            batch: a collated batch, on the student's device.
            samples: the batch's samples.

        Returns:
            A function of the head and the [N, D] states of the tokens with loss.
        """

        def look(head: Head, hidden_ND: Tensor) -> None:
            labels_N = batch["loss_labels"]
            found_N = torch.empty_like(labels_N)

            def visit(_: slice, rows: slice, logits_CV: Tensor, __: RowValues) -> None:
                found_N[rows] = logits_CV.argmax(-1)

            losses_N = token_values(hidden_ND, head, labels_N, counts=[1] * len(labels_N), visit=visit).cross_entropy
            columns = found_N.tolist(), labels_N.tolist(), losses_N.tolist()
            start = 0
            for sample, count in zip(samples, batch["loss_counts"]):
                if not count:
                    continue  # a rank without rows of its own
                of_sample = [column[start : start + count] for column in columns]
                prompt = list(sample["input_ids"]) if self.prompts else []
                self._rows.append((*of_sample, prompt))  # type: ignore[arg-type]
                start += count

        return look

    def gathered(self, count: int, world: int) -> EvalPrediction:
        """Put the rows of all ranks together, in the order of the data set.

        Args:
            count: number of rows of the data set.
            world: number of ranks, which take turns with the rows.

        Returns:
            `predictions` and `label_ids` [count, longest] int64, padded with -100; `losses` of the same shape, padded
            with NaN; `inputs`, if kept, [count, longest].
        """
        of_ranks = [self._rows] if world == 1 else gather_object([self._rows])
        rows = [of_ranks[i % world][i // world] for i in range(count)]
        found, labels, losses, prompts = zip(*rows)
        return EvalPrediction(
            _array(found, IGNORE_INDEX, np.int64),
            _array(labels, IGNORE_INDEX, np.int64),
            _array(prompts, IGNORE_INDEX, np.int64) if self.prompts else None,
            _array(losses, np.nan, np.float32),
        )


def _array(rows: Sequence[Sequence[float]], filler: float, dtype: Any) -> np.ndarray:
    made = np.full((len(rows), max(map(len, rows))), filler, dtype)
    lengths = np.array([len(row) for row in rows])
    made[np.arange(made.shape[1]) < lengths[:, None]] = np.fromiter(chain.from_iterable(rows), dtype)
    return made


def own_metrics(
    compute: ComputeMetrics, found: EvalPrediction, include: Sequence[str], prefix: str
) -> dict[str, float]:
    """Call a user's function of metrics.

    Args:
        compute: the function.
        found: the predictions for all rows.
        include: what it gets besides predictions and labels: "inputs", "loss".
        prefix: is put before the metrics' names, with "_".

    Returns:
        The metrics by their names with the prefix.

    Raises:
        UserError: the function does not return a dictionary of numbers.
    """
    given = EvalPrediction(
        found.predictions,
        found.label_ids,
        found.inputs if "inputs" in include else None,
        found.losses if "loss" in include else None,
    )
    metrics = compute(given)
    if not isinstance(metrics, Mapping):
        raise UserError(f"compute_metrics must return a dictionary of metrics, got {type(metrics).__name__}")
    return {
        k if k.startswith(f"{prefix}_") else f"{prefix}_{k}": getattr(v, "item", lambda v=v: v)()
        for k, v in metrics.items()
    }


def check_include(include: Sequence[str], compute: ComputeMetrics | None) -> None:
    """Refuse names in `include_for_metrics` that have no meaning.

    Raises:
        UserError: a name is unknown, or there is no `compute_metrics`.
    """
    unknown = set(include) - _FOR_METRICS
    if unknown:
        raise UserError(f"include_for_metrics has {sorted(unknown)[0]!r}; it may be inputs and loss")
    if include and compute is None:
        raise UserError(
            f"include_for_metrics is {list(include)}, but there is no compute_metrics to get it; leave it out"
        )
