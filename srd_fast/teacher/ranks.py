"""Processes that fill one cache together: each has its share, and all go on, or end, together."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import SRDFastError, UserError, first_line

K = TypeVar("K")
T = TypeVar("T")
# Shares take as long as they take; a rank that dies closes its connections, which the others see at once.
_PATIENCE = timedelta(days=30)


class Ranks:
    """The processes of a group; without a group, this one alone.

    What they tell each other goes over a gloo group of their own, whose collectives need no GPU and wait for days.

    Args:
        group: which processes. All of them must make one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if group is not None and group.size() > 1:
            self.rank, self.size = group.rank(), group.size()
            members = dist.get_process_group_ranks(group)
            self._group = dist.new_group(members, _PATIENCE, "gloo", use_local_synchronization=True)

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all have in the same order. Neighbours, alike in cost, go to different ranks."""
        return list(items[self.rank :: self.size])

    def gather(self, item: T) -> list[T]:
        """What each rank gives, in their order."""
        found = [item] * self.size
        if self._group is not None:
            with _naming_the_dead():
                dist.all_gather_object(found, item, self._group)
        return found

    def merged(self, part: Mapping[K, T]) -> dict[K, T]:
        """The parts of all ranks in one."""
        return {key: value for of_rank in self.gather(part) for key, value in of_rank.items()}

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self._group is None:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        with _naming_the_dead():
            dist.all_reduce(flags, dist.ReduceOp.MAX, self._group)
        return bool(flags)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end for the other ranks, and fail where one of them has failed.

        Raises:
            UserError: another rank has failed, with its message and kind. This rank's own error is raised as it is.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        failures = self.gather(None if error is None else _failure(error))
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise _again(rank, *failure)

    def first(self, make: Callable[[], T]) -> T:
        """Let the first rank make something, and give it to all.

        Args:
            make: what the first rank calls. The others wait.

        Returns:
            What it made.

        Raises:
            UserError: the first rank has failed, see `together`.
        """
        made: T | None = None
        with self.together():
            if self.rank == 0:
                made = make()
        return self.gather(made)[0]  # type: ignore[return-value]


@contextmanager
def _naming_the_dead() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # gloo's, where a connection is closed
        raise UserError(
            f"another rank has ended ({first_line(e)}): see what it said; the same command goes on where all were"
        ) from e


def _failure(error: Exception) -> tuple[type[Exception] | None, str, dict[str, Any]]:
    """Kind, message and attributes of an error of this package; of any other, which may not be pickled, its text."""
    if isinstance(error, SRDFastError):
        return type(error), str(error), vars(error)
    return None, "".join(traceback.format_exception_only(error)).strip(), {}


def _again(rank: int, kind: type[Exception] | None, message: str, attributes: dict[str, Any]) -> Exception:
    if kind is None:
        return UserError(f"rank {rank} failed: {message}")
    error = kind.__new__(kind)  # some are made of other arguments than their message
    error.args = (message,)
    vars(error).update(attributes)
    return error
