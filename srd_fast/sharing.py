"""A process's place among those that share a piece of work."""

from typing import TypeVar

T = TypeVar("T")


class Sharing:
    """One of the processes that do a piece of work together; as it stands, the only one.

    All of them make the same calls in the same order.

    rank: this process's number, from 0. world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def share(self, value: T) -> T:
        """The value of the first process, in every process."""
        return value

    def gather(self, mine: T) -> list[T]:
        """In the first process the values of all, by rank; in the others an empty list."""
        return [mine]


ALONE = Sharing()
