"""The best step of a training by its evaluations: its checkpoint, early stopping, and the message about it.

All of it depends only on what was logged, so a training that was killed and resumed ends with the same student.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import UserError
from ..showing import say_json, style


class Best(NamedTuple):
    """The step whose student was the best.

    Attributes:
        step: its number.
        metric: the metric by which it is the best, without "eval_".
        value: the metric's value.
    """

    step: int
    metric: str
    value: float


def check_saves(args: TrainingArguments) -> None:
    """Refuse `load_best_model_at_end` if an evaluation's step would have no checkpoint.

    Args:
        args: the config before `TrainingArguments.__post_init__`.

    Raises:
        UserError: the settings of saving and evaluation do not fit.
    """
    if not args.load_best_model_at_end:
        return
    save, evaluate = (getattr(x, "value", x) for x in (args.save_strategy, args.eval_strategy))
    if evaluate == "no":
        raise UserError("load_best_model_at_end is true, but eval_strategy is 'no'; set it to 'steps'")
    if save not in (evaluate, "best"):
        raise UserError(
            f"load_best_model_at_end is true, but save_strategy is {save!r} and eval_strategy is {evaluate!r}; set "
            "both to 'steps'"
        )
    between, every = args.save_steps, args.eval_steps or args.logging_steps
    whole = all(isinstance(x, (int, float)) and x >= 1 for x in (between, every))  # other checks report the rest
    if save == "steps" and whole and between % every:
        raise UserError(
            f"save_steps is {between:g}, and with load_best_model_at_end it must be a multiple of eval_steps, which is "
            f"{every:g}; set it to {math.ceil(between / every) * every:g}"
        )


def best_of(args: TrainingArguments, state: TrainerState) -> Best | None:
    """The step whose student a finished training keeps; None if it is the last one.

    Args:
        args: the training's config.
        state: the training's state at its end.
    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None or not state.best_global_step:
        return None
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    return Best(int(state.best_global_step), metric, float(state.best_metric or 0.0))


def evaluations_since_best(history: Iterable[Mapping[str, Any]], metric: str, greater_is_better: bool) -> int:
    """How many evaluations came after the best one.

    Args:
        history: a Trainer's `log_history`.
        metric: the metric's name in the log.
        greater_is_better: whether a higher value is better.

    Returns:
        Their number; 0 if the last evaluation is better than all before it, or if there is none. Evaluations before the
        first step do not count.
    """
    values = {x["step"]: float(x[metric]) for x in history if metric in x and x["step"]}
    best, since = float("nan"), 0
    for step in sorted(values):
        value = values[step]
        better = best != best or (value > best if greater_is_better else value < best)
        best, since = (value, 0) if better else (best, since + 1)
    return since


class BestStep(TrainerCallback):
    """Ends a training whose metric no longer improves, and says which step's student is kept.

    Args:
        patience: evaluations without improvement after which training ends; 0: never end early.
    """

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the current place of the best checkpoint, and stop at once if the training had ended already."""
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():  # the folder may have been copied or moved
            state.best_model_checkpoint = str(best)
        self._end_if_due(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop if there was no improvement for too long."""
        self._end_if_due(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say which step's student is kept."""
        best = best_of(args, state)
        if best is None or not state.is_world_process_zero or style() == "quiet":
            return
        if style() == "json":
            say_json(event="best", **best._asdict())
        else:
            many = f"{self.patience} evaluation{'s' if self.patience > 1 else ''}"
            early = f", after {many} without a better one" if self._is_due(args, state) else ""
            print(
                f"the student is that of step {best.step}, the best by {best.metric} ({best.value:.4g}); training "
                f"ended at step {state.global_step}{early}",
                flush=True,
            )

    def _end_if_due(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if self._is_due(args, state):
            control.should_training_stop = True

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        metric = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        since = evaluations_since_best(state.log_history, metric, bool(args.greater_is_better))
        return 0 < self.patience <= since
