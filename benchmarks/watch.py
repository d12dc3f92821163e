"""A clock that does not make the host wait: marks in the device's queue between steps, a profile of the last ones."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .step_trace import StepTrace, summarise


@dataclass
class StepWatch:
    """Told of every step, it times those after the first `warmup` and then profiles the last.

    The peak is of all steps before those that are profiled.
    """

    device: str
    warmup: int
    timed: int
    profiled: int
    folder: Path
    peak_bytes: int | None = None
    _marks: list[Any] = field(default_factory=list)
    _done: int = 0
    _profile: Any = None

    @property
    def steps(self) -> int:
        """All."""
        return self.warmup + self.timed + self.profiled

    def begin(self) -> None:
        """Before the first step, with everything that lives longer than a step on its device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if not self.warmup:
            self._mark()

    def step_done(self) -> None:
        """After each step."""
        self._done += 1
        if self.warmup <= self._done <= self.warmup + self.timed:
            self._mark()
        if self._done == self.warmup + self.timed:
            self._finish_timing()
        if self._done == self.steps and self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()

    def seconds(self) -> list[float]:
        """Of each timed step: from where the device had done the one before to where it had done this one."""
        pairs = zip(self._marks, self._marks[1:])
        if self.device == "cuda":
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]

    def trace(self) -> StepTrace | None:
        """Of the profiled steps; None without a GPU."""
        if self._profile is None:
            return None
        path = self.folder / "trace.json"
        self._profile.export_chrome_trace(str(path))
        return summarise(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], self.profiled)

    def _mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _finish_timing(self) -> None:
        if self.device != "cuda":
            return
        torch.cuda.synchronize()
        self.peak_bytes = torch.cuda.max_memory_allocated()
        if self.profiled:
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()
