"""The progress that a training shows: a bar on a terminal, short lines in a file, json, or nothing."""

import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ..showing import say_json, style

# The most lines of a whole training in a file; a bar shows every log.
_MOST_LINES = 200
# Entries of a log that a line shows, and their format.
_SHOWN = {
    "loss": "loss",
    "kl": "kl",
    "cross_entropy": "cross-entropy",
    "learning_rate": "lr",
    "tokens_per_second": "tokens/s",
}


class ProgressLine(TrainerCallback):
    """Shows the step, the number of steps, the remaining time and the loss, instead of transformers' two callbacks."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._began = self._first = self._shown = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and the bar if there is one."""
        self._began, self._first, self._shown = time.monotonic(), state.global_step, -_MOST_LINES
        if state.is_world_process_zero and style() == "bar" and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a log."""
        found = dict(logs or {})
        if not state.is_world_process_zero or style() == "quiet":
            return
        left = self._seconds_left(state)
        if style() == "json":
            event = {"event": "log", "step": state.global_step, "total": state.max_steps, "seconds_left": left}
            say_json(**event, **found)
            return
        values = [f"{word} {_short(found[name])}" for name, word in _SHOWN.items() if name in found]
        if "loss" not in found:  # of an evaluation, whose names have a prefix
            values = [f"{name} {_short(x)}" for name, x in found.items() if "eval" in name and isinstance(x, float)]
        elif self._bar is not None:
            self._bar.set_postfix_str(", ".join(values))
            return
        if not values or not self._is_due(state, evaluation="loss" not in found):
            return
        total = state.max_steps
        place = f"step {state.global_step}/{total}" if total else "evaluation"
        eta = "" if left is None or not total else f"  ETA {tqdm.format_interval(left)}"
        line = f"{place}{eta}  {'  '.join(values)}"
        if self._bar is not None:
            tqdm.write(line)
        else:
            print(line, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _seconds_left(self, state: TrainerState) -> float | None:
        done = state.global_step - self._first
        if not self._began or done < 1:
            return None
        return round((time.monotonic() - self._began) / done * (state.max_steps - state.global_step), 1)

    def _is_due(self, state: TrainerState, evaluation: bool) -> bool:
        step = state.global_step
        due = evaluation or step == state.max_steps or step - self._shown >= state.max_steps / _MOST_LINES
        if due and not evaluation:
            self._shown = step
        return due


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
