"""How long work shows its progress: a bar on a terminal, a plain line now and then in a file, json, or nothing."""

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
# Seconds between two lines about the same work, if there is no terminal.
_SECONDS = 30.0
# Seconds between two signs of life on a terminal.
_BEAT = 0.5
_of_process = {"style": "auto"}


def show_as(style: str) -> None:
    """Choose how work in this process shows its progress.

    Args:
        style: "auto": a bar on a terminal, else lines; "lines"; "json": lines of json; "quiet": nothing.

    Raises:
        UserError: the style is unknown.
    """
    if style not in STYLES:
        raise UserError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    _of_process["style"] = style


def style() -> str:
    """The style that `show_as` chose. "auto" becomes "bar" on a terminal, else "lines"."""
    chosen = _of_process["style"]
    return chosen if chosen != "auto" else "bar" if sys.stderr.isatty() else "lines"


def say_json(**values: Any) -> None:
    """Print a line of json for another program."""
    print(json.dumps(values), flush=True)


def progress_bar(items: Iterable[Any] | None = None, *, what: str, total: int, unit: str, shown: bool) -> "tqdm[Any]":
    """Make a bar in this process's style.

    Args:
        items: what the bar iterates over, or None to `update` the bar by hand.
        what: the name of the work, in a word.
        total: the number of units.
        unit: what is counted, in the singular.
        shown: False for no bar.

    Returns:
        The bar.
    """
    kind = tqdm if style() == "bar" else _Lines
    options = {} if kind is tqdm else {"mininterval": _SECONDS, "maxinterval": _SECONDS}
    return kind(items, what, total, unit=unit, disable=not shown or style() == "quiet", **options)


@contextmanager
def alive() -> Iterator[None]:
    """On a terminal, keep a clock running: that of the current bar, or a small one of its own where there is no bar.

    It shows that work goes on where no bar can count: imports, loading, compiling, one long step.
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
    """A bar that writes a new line each time, or json, instead of redrawing itself."""

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
