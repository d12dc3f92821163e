"""Stop on Ctrl-C or a cluster's SIGTERM: at once, or after the work in progress has been saved."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by SIGINT or SIGTERM. status: the usual exit status for the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class _Requests:
    def __init__(self) -> None:
        self.deferred, self.pending = False, 0
        self.raised: Stopped | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # On a second signal, do not wait any longer.
        if not self.deferred or self.pending:
            self.raised = Stopped(number)
            raise self.raised
        self.pending = number


_requests = _Requests()


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Stopped` in the block, which must run in the main thread.

    `Stopped` is raised even if a library in which the signal arrives turns it into another error.
    """
    before = {n: signal.signal(n, _requests) for n in (signal.SIGINT, signal.SIGTERM)}
    _requests.deferred, _requests.pending, _requests.raised = False, 0, None
    try:
        yield
    except Exception as error:
        if _requests.raised:
            raise _requests.raised from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_now() -> None:
    """Raise `Stopped` in the main thread, from another thread, even within `stopping_later`."""
    _requests.deferred = False
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stopping_later(any_of: Callable[[int], int] = int) -> Iterator[TrainerCallback]:
    """Delay the first signal: training with the yielded callback finishes the step, saves a checkpoint and ends.

    After such a signal, `Stopped` is raised at the end of the block.

    Args:
        any_of: called after each step by all processes that train together, with the number of this process's signal or
            0; returns the number for all.
    """
    _requests.deferred, _requests.pending = True, 0
    try:
        yield _SaveAndStop(any_of)
    finally:
        _requests.deferred = False
    if _requests.pending:
        raise Stopped(_requests.pending)


class _SaveAndStop(TrainerCallback):
    def __init__(self, any_of: Callable[[int], int]) -> None:
        self.any_of = any_of

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _requests.pending = self.any_of(_requests.pending)
        if _requests.pending:
            control.should_save = control.should_training_stop = True
            # Training resumes from this checkpoint; the best one is kept beside it.
            args.save_only_model = args.load_best_model_at_end = False
            if args.save_total_limit == 1:
                args.save_total_limit = 2
