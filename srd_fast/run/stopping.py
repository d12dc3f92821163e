"""Ending on Ctrl-C or a cluster's SIGTERM: at once, or after the work in progress has been saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by SIGINT or SIGTERM. status: the exit status that is customary for the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class _Requests:
    def __init__(self) -> None:
        self.deferred, self.pending = False, 0
        self.raised: Stopped | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # Asked a second time, whoever waits has lost patience.
        if not self.deferred or self.pending:
            self.raised = Stopped(number)
            raise self.raised
        self.pending = number


_requests = _Requests()


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `Stopped` in the block, which must run in the main thread.

    A library in which the signal arrives may turn it into an error of its own. `Stopped` is raised nevertheless.
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


@contextmanager
def stopping_later() -> Iterator[TrainerCallback]:
    """Let the first signal wait: training with the yielded callback saves a checkpoint after the step and ends.

    After such a signal, `Stopped` is raised at the end of the block.
    """
    _requests.deferred = True
    try:
        yield _SaveAndStop()
    finally:
        _requests.deferred = False
    if _requests.pending:
        raise Stopped(_requests.pending)


class _SaveAndStop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if _requests.pending:
            control.should_save = control.should_training_stop = True
