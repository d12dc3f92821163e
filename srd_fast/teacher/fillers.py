"""How the ranks that fill a cache run a teacher, which may be sharded over several of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from . import shards
from .folder import write_all
from .live import LiveTeacher
from .ranks import Ranks
from .vllm_teacher import VLLMTeacher

Makers = Mapping[str, Callable[[], Mapping[str, Tensor]]]


class Filler(Protocol):
    """Decides which rank makes which files of a cache, and how."""

    def share(self, names: list[str]) -> list[str]:
        """The files that this rank makes, of those that all ranks make together."""

    def write(self, folder: Path, makers: Makers, done: Callable[[str], None]) -> None:
        """Write this rank's share. makers: file name -> its maker; done: called with each finished file's name."""

    def in_step(self) -> AbstractContextManager[None]:
        """A context for making a share."""


class VLLMFillers:
    """With vLLM each rank has its own engine; if an engine uses several devices, only the first rank has one.

    Args:
        teacher: the teacher, which makes as many files at once as it has processes.
        ranks: the ranks that fill the cache.
    """

    def __init__(self, teacher: VLLMTeacher, ranks: Ranks) -> None:
        self.teacher, self.ranks = teacher, ranks

    def share(self, names: list[str]) -> list[str]:
        """The files that this rank makes."""
        if self.teacher.spreads:
            return names if self.ranks.rank == 0 else []
        return self.ranks.share(names)

    def write(self, folder: Path, makers: Makers, done: Callable[[str], None]) -> None:
        """Write this rank's share."""
        write_all(folder, makers, done, self.teacher.parallel)

    def in_step(self) -> AbstractContextManager[None]:
        """Nothing: no rank needs another one."""
        return nullcontext()


class Fillers:
    """Decides which rank makes which files of a cache, and when each rank runs the teacher.

    With a whole teacher, a rank works alone. With FSDP2, a forward pass needs all ranks, each with its own batch: they
    work in step, and a rank that has finished its share repeats its last batch until all have finished. With tensor
    parallelism, the ranks of a group need the same batch: they make the same files, and the first of them writes.

    Args:
        live: the teacher.
        ranks: the ranks that fill the cache.
    """

    def __init__(self, live: LiveTeacher, ranks: Ranks) -> None:
        self.live, self.ranks = live, ranks
        self.steps = live.sharded and live.peers is None and ranks.size > 1
        firsts = ranks.gather(ranks.rank - (0 if live.peers is None else live.peers.rank()))
        self._first = firsts[ranks.rank]
        self._teams = sorted(set(firsts))
        self._last: Mapping[str, Any] | None = None

    def share(self, names: list[str]) -> list[str]:
        """The files that this rank makes, of those that all are to make."""
        return names[self._teams.index(self._first) :: len(self._teams)]

    def write(self, folder: Path, makers: Makers, done: Callable[[str], None]) -> None:
        """Write this rank's share.

        Args:
            folder: the cache's folder.
            makers: file name -> the function that makes its tensors.
            done: called with each finished file's name.
        """
        if self.live.peers is None:
            write_all(folder, makers, done)
            return
        for name, make in makers.items():
            made = make()  # even if the file exists by now: the others in the group do not know that
            if self.live.peers.rank() == 0:
                shards.write_once(folder / name, lambda made=made: made, wait=True)  # type: ignore[misc]
            done(name)

    def hidden_states(self, batch: Mapping[str, Any]) -> Tensor:
        """Run the teacher on a batch, in step with the other ranks."""
        if self.steps:
            self.ranks.any(True)
            self._last = batch
        return self.live.hidden_states(batch)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """A context for making a share. At its end, even after an error, this rank helps until all have finished."""
        try:
            yield
        finally:
            while self.steps and self.ranks.any(False):
                self.live.hidden_states(self._last or self.live.some_batch())
