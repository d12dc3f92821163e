"""Workers, each with one request at a time. One that dies is started again, once for a request."""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ..errors import EngineDiedError

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """Something that has begun to start elsewhere, and answers when it is ready."""

    def ready(self) -> None:
        """Wait until it has started, or raise a `UserError` that says why it cannot."""

    def ask(self, *request: Any) -> Any:
        """Return the answer, or raise `EngineDiedError` where there will be none."""

    def end(self) -> None:
        """End it, dead or alive."""


class Pool:
    """`size` workers for as many threads.

    Args:
        begin: begins to start worker number i, from 0, and does not wait for it.
        size: how many there are.
        what: one of them in words, for the log.
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
        """Give a request to a worker that is free, and wait for the answer.

        Args:
            request: what its `ask` takes.

        Returns:
            Its answer.

        Raises:
            UserError: what the worker says; it cannot be started; or it has died twice (`EngineDiedError`).
        """
        self.start()
        index = self._free.get()
        try:
            return self._ask(index, request)
        finally:
            self._free.put(index)

    def ask_all(self, *request: Any) -> list[Any]:
        """Give one request to every worker that has been started, when it is free, and wait for all answers.

        Args:
            request: what its `ask` takes. A worker that dies of it is asked again when it is back.

        Returns:
            Their answers. None where no worker has been started.

        Raises:
            UserError: as `ask` raises it, of the first worker that has something to say, after all have answered.
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
