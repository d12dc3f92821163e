"""Workers that each handle one request at a time. A worker that dies is started again, once per request."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ..errors import EngineDiedError

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """Something that is starting elsewhere, and answers requests when it is ready."""

    def ready(self) -> None:
        """Wait until it has started. A `UserError` says why it cannot start."""

    def ask(self, *request: Any) -> Any:
        """Return the answer, or raise `EngineDiedError` if there will be none."""

    def end(self) -> None:
        """End it, dead or alive."""


class Pool:
    """A pool of `size` workers, which serves as many threads at once.

    Args:
        begin: starts worker number i, from 0, without waiting for it.
        size: the number of workers.
        what: what the log calls a worker.
    """

    def __init__(self, begin: Callable[[int], Worker], size: int, what: str) -> None:
        self.size, self._begin, self._what = size, begin, what
        self._workers: list[Worker] = []
        self._free: queue.Queue[int] = queue.Queue()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start all workers, unless they run."""
        with self._lock:
            if self._workers:
                return
            self._free = queue.Queue()
            try:
                for index in range(self.size):
                    self._workers.append(self._begin(index))
                for worker in self._workers:
                    worker.ready()
            except BaseException:
                self.close()
                raise
            for index in range(self.size):
                self._free.put(index)

    def ask(self, *request: Any) -> Any:
        """Give a request to a free worker, and wait for the answer.

        Args:
            *request: the arguments of the worker's `ask`.

        Returns:
            The answer.

        Raises:
            UserError: from the worker, or because it cannot be started.
            EngineDiedError: the worker has died twice.
        """
        self.start()
        index = self._free.get()
        try:
            return self._ask(index, request)
        finally:
            self._free.put(index)

    def ask_all(self, *request: Any) -> list[Any]:
        """Give a request to every started worker, as soon as it is free, and wait for all answers.

        Args:
            *request: the arguments of a worker's `ask`. If a worker dies of it, it is asked again after a restart.

        Returns:
            The answers of the started workers; empty if there are none.

        Raises:
            UserError: as in `ask`, from the first worker with an error, after all have answered.
        """
        with self._lock:
            taken = [self._free.get() for _ in self._workers]
            try:
                with ThreadPoolExecutor(max(1, len(taken))) as threads:
                    return list(threads.map(lambda index: self._ask(index, request), taken))
            finally:
                for index in taken:
                    self._free.put(index)

    def _ask(self, index: int, request: tuple[Any, ...]) -> Any:
        try:
            return self._workers[index].ask(*request)
        except EngineDiedError as e:
            logger.warning("%s died and is started again: %s", self._what, e)
        self._workers[index].end()
        self._workers[index] = worker = self._begin(index)
        worker.ready()
        return worker.ask(*request)

    def close(self) -> None:
        """End all workers. When this returns, what they held is free."""
        for worker in self._workers:
            worker.end()
        self._workers = []
