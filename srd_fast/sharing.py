"""A process's place among those that share a piece of work."""

from typing import TypeVar

T = TypeVar("T")


class Sharing:
    """One of several processes that do a piece of work together. This base class stands for a single process.

    All processes make the same calls in the same order.

    rank: this process's number, from 0. world: the number of processes.
    """

    rank: int = 0
    world: int = 1

    def share(self, value: T) -> T:
        """Return the first process's value in every process."""
        return value

    def gather(self, mine: T) -> list[T]:
        """Return the values of all processes, by rank, in the first process, and an empty list in the others."""
        return [mine]


ALONE = Sharing()
