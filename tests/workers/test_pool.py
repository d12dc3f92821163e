"""Workers that die are started again once for a request, and no request is lost."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from srd_fast.errors import EngineDiedError, UserError
from srd_fast.workers import Pool


class Doubler:
    """Answers twice what it is asked. `deaths` is shared: what is asked dies as often as it says there."""

    def __init__(self, index: int, deaths: dict[Any, int], log: list[str], unable: bool = False) -> None:
        self.index, self.deaths, self.log, self.unable, self.busy = index, deaths, log, unable, threading.Lock()
        log.append(f"begin {index}")

    def ready(self) -> None:
        if self.unable:
            raise UserError(f"worker {self.index} does not start")
        self.log.append(f"ready {self.index}")

    def ask(self, number: int) -> int:
        assert self.busy.acquire(blocking=False), "two requests at once"
        try:
            if self.deaths.get(number, 0):
                self.deaths[number] -= 1
                raise EngineDiedError(f"no answer to {number}")
            if number < 0:
                raise UserError("a number below 0")
            return 2 * number
        finally:
            self.busy.release()

    def end(self) -> None:
        self.log.append(f"end {self.index}")


def test_all_begin_before_the_first_is_waited_for() -> None:
    log: list[str] = []
    pool = Pool(lambda i: Doubler(i, {}, log), 3, "a doubler")
    assert log == []
    assert [pool.ask(n) for n in range(7)] == [0, 2, 4, 6, 8, 10, 12]
    assert log == [f"{what} {i}" for what in ("begin", "ready") for i in range(3)]
    pool.close()
    assert log[6:] == ["end 0", "end 1", "end 2"]
    assert pool.ask(4) == 8, "it starts again"


def test_many_threads_and_deaths(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    deaths = dict.fromkeys(range(0, 200, 7), 1)
    pool = Pool(lambda i: Doubler(i, deaths, log), 4, "a doubler")
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(pool.ask, range(200))) == [2 * n for n in range(200)]
    count = len(range(0, 200, 7))
    assert caplog.text.count("a doubler died and is started again: no answer to") == count
    begun, ended = (sum(x.startswith(what) for x in log) for what in ("begin", "end"))
    assert (begun, ended) == (4 + count, count)


def test_the_second_death_and_other_errors_are_the_callers() -> None:
    deaths = {3: 2}
    pool = Pool(lambda i: Doubler(i, deaths, []), 1, "a doubler")
    with pytest.raises(EngineDiedError, match="no answer to 3"):
        pool.ask(3)
    with pytest.raises(UserError, match="below 0"):
        pool.ask(-1)
    assert pool.ask(3) == 6, "the worker is free again"


def test_one_that_does_not_start_ends_all() -> None:
    log: list[str] = []
    pool = Pool(lambda i: Doubler(i, {}, log, unable=i == 1), 2, "a doubler")
    for _ in range(2):
        with pytest.raises(UserError, match="worker 1 does not start"):
            pool.ask(1)
    assert log == 2 * ["begin 0", "begin 1", "ready 0", "end 0", "end 1"]


def test_a_restart_that_fails_leaves_the_place_for_the_next_request() -> None:
    log: list[str] = []
    unable, deaths = iter((False, True, False)), {5: 1}
    pool = Pool(lambda i: Doubler(i, deaths, log, unable=next(unable)), 1, "a doubler")
    with pytest.raises(UserError, match="worker 0 does not start"):
        pool.ask(5)
    assert pool.ask(6) == 12


def test_all_are_asked_once_and_one_that_dies_of_it_again(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    asked: list[int] = []

    class Noting(Doubler):
        def ask(self, number: int) -> int:
            asked.append(self.index)
            return super().ask(number)

    pool = Pool(lambda i: Noting(i, {5: 1}, log) if i == 1 else Noting(i, {}, log), 3, "a doubler")
    assert pool.ask_all(5) == [], "none has been started"
    with ThreadPoolExecutor(4) as threads:
        others = threads.map(pool.ask, range(100, 150))
        assert pool.ask_all(4) in ([8, 8, 8], [])
        assert list(others) == [2 * n for n in range(100, 150)]
    asked.clear()
    with pytest.raises(EngineDiedError, match="no answer to 5"):  # the one in its place has a death of its own
        pool.ask_all(5)
    assert sorted(asked) == [0, 1, 1, 2]
    assert "a doubler died and is started again: no answer to 5" in caplog.text
    assert pool.ask_all(6) == [12, 12, 12]
    with pytest.raises(UserError, match="below 0"):
        pool.ask_all(-1)
    assert pool.ask(7) == 14, "all are free again"
