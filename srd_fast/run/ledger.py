"""The steps of a run, messages about them, and `steps.json`, the list of the finished ones."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import content_digest, write_text
from .config import RunConfig

if TYPE_CHECKING:
    from .steps import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Args:
        name: the step's name.
        outputs: the paths in the run folder that it makes.
        depends: the part of the config on which it depends.
        after: the steps before it.
        run: runs it.
        caches: paths from which an interrupted step resumes; --force deletes them.
        in_run: whether a run has the step. If not, later steps depend on the steps before it.
    """

    name: str
    outputs: Callable[[RunConfig], list[str]]
    depends: Callable[[RunConfig], Any]
    after: tuple[str, ...]
    run: Callable[["Run"], None]
    caches: tuple[str, ...] = ()
    in_run: Callable[[RunConfig], bool] = lambda c: True


class News(str):
    """A line about a step of a run.

    Args:
        text: the line.
        step: the step's name.
        state: "skipped", "started" or "done".
        seconds: how long it took, or None.
    """

    def __new__(cls, text: str, step: str, state: str, seconds: float | None = None) -> "News":
        made = super().__new__(cls, text)
        made.step, made.state, made.seconds = step, state, seconds
        return made

    step: str
    state: str
    seconds: float | None


class Ledger:
    """`steps.json`: for each finished step its fingerprint, the digests of its outputs, its seconds, and the config.

    The config is a digest of config.yaml when the step was last done, or found done. If it is no longer that of the
    file, a later run with another config has not come this far.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "steps.json"
        self.entries: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self.entries = {
                    name: {
                        "fingerprint": e["fingerprint"],
                        "outputs": dict(e["outputs"]),
                        "seconds": float(e["seconds"]),
                        "config": e.get("config", ""),
                    }
                    for name, e in content.items()
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                logger.warning("%s is damaged: every step is done again", self.path)

    def begin(self) -> None:
        """Mark the folder as a run's, before there is a finished step."""
        if not self.path.exists():
            self._write()

    def is_valid(self, step: Step, fingerprint: str, config: RunConfig, folder: Path) -> bool:
        """Whether the step was done with the same inputs, and its outputs have not changed since."""
        entry = self.entries.get(step.name)
        if entry is None or entry.get("fingerprint") != fingerprint:
            return False
        return all(entry["outputs"].get(o) == content_digest(folder / o) is not None for o in step.outputs(config))

    def record(self, step: Step, fingerprint: str, config: RunConfig, folder: Path, seconds: float) -> None:
        """Record a finished step, atomically."""
        outputs = {o: content_digest(folder / o) for o in step.outputs(config)}
        self._put(step, {"fingerprint": fingerprint, "outputs": outputs, "seconds": seconds}, folder)

    def confirm(self, step: Step, folder: Path) -> None:
        """Record that a finished step is also that of the folder's present config, atomically."""
        entry = self.entries[step.name]
        if entry["config"] != content_digest(folder / "config.yaml"):
            self._put(step, entry, folder)

    def _put(self, step: Step, entry: dict[str, Any], folder: Path) -> None:
        self.entries[step.name] = {**entry, "config": content_digest(folder / "config.yaml")}
        self._write()

    def adopt(self, step: Step, entry: dict[str, Any]) -> None:
        """Record a step that another run has done and whose outputs are linked here, atomically."""
        self.entries[step.name] = entry
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.entries, indent=1))
