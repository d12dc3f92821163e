"""How long work shows where it is: a bar on a terminal, a plain line now and then in a file, json, or nothing."""

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from tqdm.auto import tqdm

from .errors import UserError

STYLES = ("auto", "lines", "json", "quiet")
# Seconds between two lines about the same work where there is no terminal.
_SECONDS = 30.0
# Seconds between two signs of life on a terminal.
_BEAT = 0.5
_of_process = {"style": "auto"}


def show_as(style: str) -> None:
    """Choose how work in this process shows where it is.

    Args:
        style: "auto": a bar on a terminal, else lines; "lines"; "json": a line of json each; "quiet": nothing.

    Raises:
        UserError: it is none of these.
    """
    if style not in STYLES:
        raise UserError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    _of_process["style"] = style


def style() -> str:
    """What `show_as` chose; instead of "auto", "bar" on a terminal and else "lines"."""
    chosen = _of_process["style"]
    return chosen if chosen != "auto" else "bar" if sys.stderr.isatty() else "lines"


def say_json(**values: Any) -> None:
    """Print a line of json for another program."""
    print(json.dumps(values), flush=True)


def progress_bar(items: Iterable[Any] | None = None, *, what: str, total: int, unit: str, shown: bool) -> "tqdm[Any]":
    """Make a bar in this process's style.

    Args:
        items: to go through, or None to `update` the bar by hand.
        what: is done, in a word.
        total: of the units.
        unit: what is counted.
        shown: False for no bar.

    Returns:
        The bar.
    """
    kind = tqdm if style() == "bar" else _Lines
    options = {} if kind is tqdm else {"mininterval": _SECONDS, "maxinterval": _SECONDS}
    return kind(items, what, total, unit=unit, disable=not shown or style() == "quiet", **options)


@contextmanager
def alive() -> Iterator[None]:
    """On a terminal, show that work goes on where nothing else does: bars' clocks run, and without a bar a small one.

    That covers what no bar can count: imports, loading, compiling, one long step.
    """
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(ended,), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()


def _beat(ended: threading.Event) -> None:
    began, drawn = time.monotonic(), ""
    for sign in cycle("|/-\\"):
        if ended.wait(_BEAT):
            break
        if style() != "bar":
            continue
        with tqdm.get_lock():
            bars = list(getattr(tqdm, "_instances", ()))
        for bar in bars:
            bar.refresh()
        if not bars:
            # The cursor goes back, so that whatever is written next takes its place.
            drawn = f"{sign} {tqdm.format_interval(time.monotonic() - began)}"
            sys.stderr.write(f"\r{drawn}\r")
            sys.stderr.flush()
    if drawn and style() == "bar":
        sys.stderr.write(f"\r{' ' * len(drawn)}\r")
        sys.stderr.flush()


class _Lines(tqdm):
    """A bar that writes a line of its own each time, or json, instead of moving."""

    _last = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.n == self._last:
            return True
        self._last = self.n
        if style() == "json":
            say_json(event="progress", what=self.desc, done=self.n, total=self.total)
            return True
        elapsed = self.format_dict["elapsed"]
        left = self.format_interval(elapsed / self.n * (self.total - self.n)) if self.n else "?"
        self.fp.write(f"{self.desc}: {self.n}/{self.total} {self.unit}s, ETA {left}\n")
        return True

    def close(self) -> None:
        if not self.disable:
            self.disable: bool = True
            self._decr_instances(self)
            self.display()
