"""Two functions of `torch.distributed` whose names differ between releases."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _newest(*names: str) -> Any:
    return next(getattr(dist, name) for name in names if hasattr(dist, name))


def all_gather(found: Tensor, mine: Tensor, group: "ProcessGroup") -> None:
    """Write the `mine` of all ranks, one after the other, to `found`, [ranks * rows, ...]."""
    _newest("all_gather_single", "all_gather_into_tensor")(found, mine, group=group)


def reduce_scatter(own: Tensor, given: Tensor, group: "ProcessGroup") -> None:
    """Add up the `given` of all ranks, [ranks * rows, ...], and write this rank's part to `own`."""
    _newest("reduce_scatter_single", "reduce_scatter_tensor")(own, given, group=group)
