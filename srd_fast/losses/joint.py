"""The rows of a loss whose vocabulary is divided over ranks: each rank sees all of them, with its own classes.

Shape letters: N rows of this rank, C rows of all ranks in a part, D width, F numbers of a row.

Where all ranks hold the same rows, a part is some of them, and their hidden gradient is the sum of what all ranks'
classes give. Where each holds its own, a part is some rows of each rank, one rank's after the other's: they are
gathered, and each rank gets back the sum for its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import ClassBlocks, join_states, join_sums, join_terms, state_of, sums_of, terms_of
from .collectives import all_gather, reduce_scatter
from .head import VocabularyShard


@dataclass(frozen=True)
class Part:
    """Some rows of all ranks.

    own: of this rank's rows. sizes: how many of each rank, where ranks have rows of their own. last: no part follows.
    """

    own: slice
    sizes: tuple[int, ...]
    last: bool


class JointRows:
    """How the ranks of a loss work together.

    Args:
        shard: of this rank's head.
        classes: of each rank's head.
        counts: rows of each rank.
    """

    def __init__(self, shard: VocabularyShard, classes: Sequence[range], counts: Sequence[int]) -> None:
        self.shard, self.group = shard, shard.group
        self.first = next((rank for rank, part in enumerate(classes) if 0 in part), 0)
        self.rank, self.ranks = dist.get_rank(shard.group), len(counts)
        self.counts = counts if shard.own_rows else counts[:1]
        self.total = sum(self.counts)

    def parts(self, rows: int) -> Iterator[Part]:
        """All rows, at most so many of all ranks together at once, or one of each."""
        most, size = max(self.counts), max(1, rows // len(self.counts))
        for i in range(0, most, size):
            sizes = tuple(min(max(count - i, 0), size) for count in self.counts)
            own = sizes[self.rank] if self.shard.own_rows else sizes[0]
            yield Part(slice(i, i + own), sizes, i + size >= most)

    def gather(self, x: Tensor, part: Part) -> Tensor:
        """The part of all ranks of a tensor of this rank's rows, [N, ...] -> [C, ...]."""
        x = x[part.own]
        if not self.shard.own_rows:
            return x
        most = max(part.sizes)
        found = x.new_empty(self.ranks * most, *x.shape[1:])
        all_gather(found, _padded(x, most), self.group)
        if min(part.sizes) == most:
            return found
        return torch.cat([found[rank * most : rank * most + size] for rank, size in enumerate(part.sizes)])

    def gather_numbers(self, numbers: Sequence[Tensor | None], part: Part) -> list[Tensor | None]:
        """The part of all ranks of some tensors [N], as `gather` does it, in one call."""
        if not self.shard.own_rows:
            return [None if x is None else self.gather(x, part) for x in numbers]
        # float64 holds a label, and any weight, as it is.
        given = [x.double() for x in numbers if x is not None]
        columns = iter(self.gather(torch.stack(given, 1), part).unbind(1))
        return [None if x is None else next(columns).to(x.dtype) for x in numbers]

    def of_own(self, x: Tensor, part: Part) -> Tensor:
        """This rank's rows of a tensor of the part, [C, ...]."""
        if not self.shard.own_rows:
            return x
        begin = sum(part.sizes[: self.rank])
        return x[begin : begin + part.sizes[self.rank]]

    def add_hidden(self, sum_CD: Tensor, part: Part) -> Tensor:
        """Of what each rank's classes give to the hidden gradient, the sum for this rank's rows."""
        if not self.shard.own_rows:
            dist.all_reduce(sum_CD, group=self.group)
            return sum_CD
        most = max(part.sizes)
        if min(part.sizes) < most:
            sum_CD = torch.cat([_padded(x, most) for x in sum_CD.split(list(part.sizes))])
        own = sum_CD.new_empty(most, sum_CD.shape[1])
        reduce_scatter(own, sum_CD, self.group)
        return own[: part.sizes[self.rank]]

    def has_read(self, loss: ClassBlocks) -> None:
        """Join what the ranks' classes gave in `read`."""
        join_states(loss, self._of_all(state_of(loss)), self.first)
        if len(loss.kept_logits):
            # Each is on one rank, so nothing is rounded.
            logits_KN = loss.kept_logits.contiguous()
            dist.all_reduce(logits_KN, group=self.group)
            loss.kept_logits.copy_(logits_KN)

    def has_looked(self, loss: ClassBlocks) -> None:
        """Join the probabilities that they found in `look`."""
        join_sums(loss, self._of_all(sums_of(loss, ["mass"])), ["mass"])

    def has_gathered(self, loss: ClassBlocks) -> None:
        """Join the sums that they found in `gather`."""
        join_sums(loss, self._of_all(sums_of(loss, "abc")), "abc")

    def has_weighed(self, loss: ClassBlocks) -> None:
        """Join what they gave to D and sum(w)."""
        join_terms(loss, self._of_all(terms_of(loss)))

    def _of_all(self, numbers_FN: Tensor) -> Tensor:
        """[F, N] numbers of all ranks, [ranks, F, N]."""
        found = numbers_FN.new_empty(self.ranks * len(numbers_FN), numbers_FN.shape[1])
        all_gather(found, numbers_FN, self.group)
        return found.view(self.ranks, *numbers_FN.shape)


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x.contiguous()
    wide = x.new_zeros(rows, *x.shape[1:])
    wide[: len(x)] = x
    return wide
