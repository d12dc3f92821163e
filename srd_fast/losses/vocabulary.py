"""Heads that are shards of a vocabulary: made from DTensors, checked against the other ranks' shards, and matched with
the classes of a teacher's head.

Ranks must not wait for a rank that has refused its arguments. So each loss begins with an exchange of a few numbers:
whether a rank refuses, how many rows it has, and a checksum of what must be equal on all ranks.
"""

import sys
import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import UserError
from .collectives import all_gather
from .head import Head, VocabularyShard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Numbers in an exchange. All exchanges have this size, so that a refusal can be sent in place of any of them.
_NUMBERS = 40
_OWN = 10
# Errors that all ranks raise anyway, so that none has to be told.
_raised_by_all: "weakref.WeakSet[UserError]" = weakref.WeakSet()


def is_dtensor(x: Any) -> bool:
    """Whether this is a DTensor. The module is not imported for that: whoever has a DTensor has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def head_of(
    weight: Tensor | None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    vocabulary: VocabularyShard | None = None,
    rows: str = "same",
    head_gradient: float = 1.0,
    side: str = "student",
) -> Head:
    """Make a head from a weight that is whole, a block of classes, or a DTensor.

    Args:
        weight: [V, D] whole or as a DTensor, or [V_r, D] with `vocabulary`. A DTensor's gradient is a DTensor.
        bias: [V] if the weight is whole. Beside a shard: [V_r], a DTensor, or [V] if it needs no gradient.
        softcap: as in `Head`.
        scale: as in `Head`.
        vocabulary: which classes a plain weight has. Default: all of them, or those of the DTensor.
        rows: "same" or "own", for a DTensor: see `VocabularyShard`.
        head_gradient: for a DTensor, factor on the gradients of weight and bias.
        side: "student" or "teacher", for messages.

    Returns:
        The head; a shard if the weight is one.

    Raises:
        UserError: the weight or the bias is divided in another way than by classes.
    """
    name = f"{side}_weight"
    if is_dtensor(weight):
        parameter: DTensor = weight  # type: ignore[assignment]
        if not all(placement.is_replicate() for placement in parameter.placements):
            vocabulary = vocabulary or VocabularyShard.of(parameter, rows, head_gradient, name)
        if vocabulary is not None and is_dtensor(bias):
            bias = bias.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[union-attr]
        weight = parameter.to_local()
    if is_dtensor(bias):
        bias = bias.to_local()  # type: ignore[union-attr]
    if vocabulary is None:
        return Head(weight, bias, softcap, scale)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise UserError(f"{name} must be a matrix [V_r, D] where it is a shard, got {getattr(weight, 'shape', weight)}")
    end = vocabulary.first + len(weight)
    if end > vocabulary.classes:
        raise UserError(
            f"{name} has {len(weight)} classes from {vocabulary.first} on, but the vocabulary has {vocabulary.classes}"
        )
    if bias is not None and len(bias) == vocabulary.classes != len(weight):
        if bias.requires_grad:
            raise UserError(
                f"{side}_bias is whole beside a {name} that is a shard, and requires a gradient: give its part from "
                f"class {vocabulary.first} to {end}"
            )
        bias = bias[vocabulary.first : end]
    return Head(weight, bias, softcap, scale, vocabulary)


def plain(name: str, x: Any) -> Any:
    """Return a DTensor that every rank holds whole as a plain tensor, and anything else as it is.

    Raises:
        UserError: the DTensor is divided.
    """
    if not is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        raise UserError(
            f"{name} is a DTensor in {x.placements}: redistribute it to Replicate(), or give to_local() and a "
            "vocabulary whose rows are 'own'"
        )
    return x.to_local()


@contextmanager
def refusing_together(shard: VocabularyShard | None, weight: Tensor | None) -> Iterator[None]:
    """Tell the other ranks of a UserError in the block, so that they raise one too instead of waiting.

    weight: the shard's weight, on the device over which the ranks communicate.
    """
    try:
        yield
    except UserError as error:
        if shard is not None and error not in _raised_by_all:
            _raised_by_all.add(error)
            device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
            _exchange(shard, device, [0], None)
        raise


def _refuse(message: str) -> UserError:
    error = UserError(message)
    _raised_by_all.add(error)
    return error


def _exchange(
    shard: VocabularyShard, device: torch.device, numbers: Sequence[int], checksum: Tensor | None
) -> list[list[int]]:
    """Gather the numbers of all ranks, by rank. checksum: one more, the last, which may still be computed on a GPU."""
    ranks = dist.get_world_size(shard.group)
    mine = torch.tensor([*numbers, *[0] * (_NUMBERS - len(numbers))], dtype=torch.int64, device=device)
    if checksum is not None:
        mine[-1] = checksum
    found = mine.new_empty(ranks * _NUMBERS)
    all_gather(found, mine, shard.group)
    rows: list[list[int]] = found.view(ranks, _NUMBERS).tolist()
    refusing = [rank for rank, row in enumerate(rows) if row[0] == 0]
    if numbers[0] and refusing:
        raise _refuse(
            f"the loss of a vocabulary in shards needs all ranks, but rank {refusing[0]} of the group refused its "
            "arguments: its own message says why"
        )
    return rows


def rows_of_all(shard: VocabularyShard, device: torch.device, rows: int) -> int:
    """The number of rows of all ranks together."""
    return sum(row[1] for row in _exchange(shard, device, [1, rows], None))


def agree(
    shard: VocabularyShard, labels_N: Tensor, numbers: Sequence[int], same: dict[str, Any]
) -> list[tuple[int, ...]]:
    """Exchange some numbers with the other ranks, and check that what must be equal on all ranks is.

    Args:
        shard: whose group it is.
        labels_N: [N] labels of this rank.
        numbers: at most 10, which may differ.
        same: what must be equal on all ranks, by the name that the message gives it.

    Returns:
        The numbers of each rank.

    Raises:
        UserError: something differs, or a rank refused its arguments. All ranks raise it.
    """
    checksum = None
    if not shard.own_rows:
        same = {**same, "number of labels with loss": len(labels_N)}
        places_N = torch.arange(1, len(labels_N) + 1, device=labels_N.device)
        checksum = (labels_N * places_N).sum()
    codes = [zlib.crc32(repr(value).encode()) for value in same.values()]
    padded = [*numbers, *[0] * (_OWN - len(numbers))]
    rows = _exchange(shard, labels_N.device, [1, *padded, *codes], checksum)
    own = rows[dist.get_rank(shard.group)]
    names = {1 + _OWN + i: name for i, name in enumerate(same)} | {_NUMBERS - 1: "labels"}
    for rank, row in enumerate(rows):
        differing = [name for at, name in names.items() if row[at] != own[at]]
        if differing:
            here = f", here {same[differing[0]]!r}" if differing[0] in same else ""
            raise _refuse(
                f"{differing[0]} must be the same on all ranks of a vocabulary in shards, but differ on rank {rank} of "
                f"the group{here}"
            )
    return [tuple(row[1 : 1 + len(numbers)]) for row in rows]


def check_ranges(ranges: Sequence[range], classes: int, side: str) -> None:
    """Refuse shards that do not have each class exactly once."""
    end = 0
    for part in sorted((r for r in ranges if r), key=lambda r: r.start):
        if part.start != end:
            break
        end = part.stop
    if end != classes or sum(map(len, ranges)) != classes:
        found = ", ".join(f"{r.start} to {r.stop}" for r in ranges)
        raise _refuse(
            f"the shards of {side}_weight must have each of {classes} classes once, but the ranks have {found}"
        )


class TeacherBlock:
    """The classes of a teacher's head that this rank's student has too.

    They are a view of the teacher's head if it is whole on each rank, or if its shards have the same classes as the
    student's. Otherwise the ranks send each other the missing classes, once: the block is kept as long as the teacher's
    weight exists.

    Args:
        head: the teacher's.
        wanted: this rank's classes.
    """

    # Storage of a shard -> the key of the classes that were asked for, and their block.
    _kept: ClassVar[dict[StorageWeakRef, tuple[Any, Tensor]]] = {}

    def __init__(self, head: Head, wanted: range) -> None:
        assert head.weight is not None
        self.head, self.wanted = head, wanted
        self.first, self.classes = (0, len(head.weight)) if head.shard is None else (head.shard.first, len(head.weight))

    @property
    def numbers(self) -> tuple[int, int, int]:
        """What the other ranks must know: first class, number of classes, and whether this rank has kept the block."""
        return self.first, self.classes, int(all(self._of_kept(x) is not None for x in self.head.tensors().values()))

    def _key(self, x: Tensor) -> Any:
        return x._version, x.storage_offset(), x.shape, x.dtype, self.wanted

    def _of_kept(self, x: Tensor) -> Tensor | None:
        key, block = self._kept.get(StorageWeakRef(x.untyped_storage()), (None, None))
        return block if key == self._key(x) else None

    def of(self, numbers: Sequence[tuple[int, int, int]], wanted: Sequence[range]) -> Head:
        """The block as a plain head.

        Args:
            numbers: the `numbers` of all ranks.
            wanted: the wanted classes of all ranks.

        Returns:
            [K_r, D] for K_r classes of `wanted`.
        """
        have = [range(first, first + classes) for first, classes, _ in numbers]
        parts = self.head.tensors()
        if all(not w or (w.start >= h.start and w.stop <= h.stop) for w, h in zip(wanted, have)):
            begin = self.wanted.start - self.first if self.wanted else 0
            blocks = {name: x[begin : begin + len(self.wanted)] for name, x in parts.items()}
        elif all(kept for _, _, kept in numbers):
            blocks = {name: block for name, x in parts.items() if (block := self._of_kept(x)) is not None}
        else:
            blocks = {name: self._fetch(x, have, wanted) for name, x in parts.items()}
        return replace(self.head, weight=blocks["weight"], bias=blocks.get("bias"), shard=None)

    def _fetch(self, x: Tensor, have: Sequence[range], wanted: Sequence[range]) -> Tensor:
        """Send the other ranks the classes that they lack, and receive those that this rank lacks."""
        assert self.head.shard is not None
        group = self.head.shard.group
        rank = dist.get_rank(group)
        block = x.new_empty(len(self.wanted), *x.shape[1:])
        operations = []
        for other in range(dist.get_world_size(group)):
            peer = dist.get_global_rank(group, other)
            given, taken = _common(have[rank], wanted[other]), _common(have[other], self.wanted)
            source = x[given.start - self.first : given.stop - self.first]
            target = block[taken.start - self.wanted.start : taken.stop - self.wanted.start]
            if other == rank:
                target.copy_(source)
                continue
            if given:
                operations.append(dist.P2POp(dist.isend, source.contiguous(), peer, group))
            if taken:
                operations.append(dist.P2POp(dist.irecv, target, peer, group))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        for reference in [r for r in self._kept if r.expired()]:
            del self._kept[reference]
        self._kept[StorageWeakRef(x.untyped_storage())] = self._key(x), block
        return block


def _common(a: range, b: range) -> range:
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    # An empty range starts where `a` does, so that slices relative to `a` are valid.
    return range(start, stop) if start < stop else range(a.start, a.start)
