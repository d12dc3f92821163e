"""The rows of a loss whose vocabulary is divided over ranks: each rank sees all of them, with its own classes.

Shape letters: N rows of this rank, C rows of all ranks in a part, D width, F numbers of a row.

A part is a set of rows that is worked on at once. The gradient of its hidden states is a sum over all ranks, each of
which computes what comes from its own classes. If all ranks hold the same rows, each gets the whole sum. If each rank
holds its own, a part has some rows of every rank, in the order of the ranks: their hidden states are gathered first,
and in the end each rank gets the sum for its own rows.
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

    own: which of this rank's rows. sizes: how many rows of each rank, if ranks have rows of their own. last: no part
    follows.
    """

    own: slice
    sizes: tuple[int, ...]
    last: bool


class JointRows:
    """How the ranks of a loss work together.

    Args:
        shard: this rank's classes.
        classes: the classes of each rank.
        counts: number of rows of each rank.
    """

    def __init__(self, shard: VocabularyShard, classes: Sequence[range], counts: Sequence[int]) -> None:
        self.shard, self.group = shard, shard.group
        self.first = next((rank for rank, part in enumerate(classes) if 0 in part), 0)
        self.rank, self.ranks = dist.get_rank(shard.group), len(counts)
        self.counts = counts if shard.own_rows else counts[:1]
        self.total = sum(self.counts)

    def parts(self, rows: int) -> Iterator[Part]:
        """Divide all rows into parts of at most `rows` rows of all ranks together, but at least one of each rank."""
        most, size = max(self.counts), max(1, rows // len(self.counts))
        for i in range(0, most, size):
            sizes = tuple(min(max(count - i, 0), size) for count in self.counts)
            own = sizes[self.rank] if self.shard.own_rows else sizes[0]
            yield Part(slice(i, i + own), sizes, i + size >= most)

    def gather(self, x: Tensor, part: Part) -> Tensor:
        """From a tensor of each rank's rows, [N, ...], gather the rows of a part, [C, ...]."""
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
        """Do the same as `gather` for several tensors [N], in one call."""
        if not self.shard.own_rows:
            return [None if x is None else self.gather(x, part) for x in numbers]
        # float64 holds labels and weights exactly.
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
        """Sum the ranks' contributions to the hidden gradient, and return the sum for this rank's rows."""
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
        """Join the ranks' results of `read`."""
        join_states(loss, self._of_all(state_of(loss)), self.first)
        if len(loss.kept_logits):
            # Each logit is on one rank and 0 on the others, so the sum is exact.
            logits_KN = loss.kept_logits.contiguous()
            dist.all_reduce(logits_KN, group=self.group)
            loss.kept_logits.copy_(logits_KN)

    def has_looked(self, loss: ClassBlocks) -> None:
        """Join the ranks' probabilities from `look`."""
        join_sums(loss, self._of_all(sums_of(loss, ["mass"])), ["mass"])

    def has_gathered(self, loss: ClassBlocks) -> None:
        """Join the ranks' sums from `gather`."""
        join_sums(loss, self._of_all(sums_of(loss, "abc")), "abc")

    def has_weighed(self, loss: ClassBlocks) -> None:
        """Join the ranks' parts of D and sum(w)."""
        join_terms(loss, self._of_all(terms_of(loss)))

    def _of_all(self, numbers_FN: Tensor) -> Tensor:
        """Gather [F, N] numbers of all ranks as [ranks, F, N]."""
        found = numbers_FN.new_empty(self.ranks * len(numbers_FN), numbers_FN.shape[1])
        all_gather(found, numbers_FN, self.group)
        return found.view(self.ranks, *numbers_FN.shape)


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x.contiguous()
    wide = x.new_zeros(rows, *x.shape[1:])
    wide[: len(x)] = x
    return wide
