"""Processes that fill one cache together: each has its share, and all continue or fail together."""

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
# A share may take any time. A rank that dies closes its connections, which the others see at once.
_PATIENCE = timedelta(days=30)


class Ranks:
    """The processes of a group; without a group, only this process.

    They communicate over a separate gloo group, whose collectives need no GPU and may wait for days.

    Args:
        group: the processes. All of them must make a `Ranks`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if group is not None and group.size() > 1:
            self.rank, self.size = group.rank(), group.size()
            members = dist.get_process_group_ranks(group)
            self._group = dist.new_group(members, _PATIENCE, "gloo", use_local_synchronization=True)

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list that all have. Neighbours, which cost about the same, go to different ranks."""
        return list(items[self.rank :: self.size])

    def gather(self, item: T) -> list[T]:
        """The items of all ranks, by rank."""
        found = [item] * self.size
        if self._group is not None:
            with _naming_the_dead():
                dist.all_gather_object(found, item, self._group)
        return found

    def merged(self, part: Mapping[K, T]) -> dict[K, T]:
        """The parts of all ranks in one dictionary."""
        return {key: value for of_rank in self.gather(part) for key, value in of_rank.items()}

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self._group is None:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        with _naming_the_dead():
            dist.all_reduce(flags, dist.ReduceOp.MAX, self._group)
        return bool(flags)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end of the block for the other ranks, and fail if one of them has failed.

        Raises:
            UserError: another rank has failed; message and type are those of its error. This rank's own error is raised
                unchanged.
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
        """Let the first rank make something, and send it to all.

        Args:
            make: is called on the first rank, while the others wait.

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
    except RuntimeError as e:  # from gloo, if a connection is closed
        raise UserError(
            f"another rank has ended ({first_line(e)}): see its own message; the same command goes on where all were"
        ) from e


def _failure(error: Exception) -> tuple[type[Exception] | None, str, dict[str, Any]]:
    """Type, message and attributes of an error of this package; of any other, which may not be picklable, its text."""
    if isinstance(error, SRDFastError):
        return type(error), str(error), vars(error)
    return None, "".join(traceback.format_exception_only(error)).strip(), {}


def _again(rank: int, kind: type[Exception] | None, message: str, attributes: dict[str, Any]) -> Exception:
    if kind is None:
        return UserError(f"rank {rank} failed: {message}")
    error = kind.__new__(kind)  # because some take other arguments than their message
    error.args = (message,)
    vars(error).update(attributes)
    return error
