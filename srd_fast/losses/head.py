"""The output projection of a language model, as the loss applies it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from ..suggest import unknown_name
from .buffers import class_slices

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class VocabularyShard:
    """The classes of this rank's head, where a vocabulary is divided over the ranks of a process group.

    The gradients of weight and bias are sums over the rows of all ranks. If the loss was multiplied by the number of
    ranks, because the optimizer step expects means over data-parallel ranks, set `head_gradient` to 1 / ranks.

    Args:
        group: the ranks that have the whole vocabulary together.
        first: this rank's first class. The number of its classes is the number of rows of its weight, which may be 0.
        classes: V, the number of classes of all ranks together.
        rows: "same" if all ranks hold the same hidden states and labels, as in tensor parallelism. "own" if each rank
            has rows of its own, as in data parallelism with a sharded model.
        head_gradient: factor on the gradients of weight and bias.
    """

    group: "ProcessGroup"
    first: int
    classes: int
    rows: str = "same"
    head_gradient: float = 1.0

    def __post_init__(self) -> None:
        if self.rows not in ("same", "own"):
            raise UserError(unknown_name("rows of a VocabularyShard", self.rows, ("same", "own")))
        if not 0 <= self.first <= self.classes:
            raise UserError(
                f"first of a VocabularyShard must be from 0 to its classes, {self.classes}, got {self.first!r}"
            )

    @staticmethod
    def of(
        weight: "DTensor", rows: str = "same", head_gradient: float = 1.0, name: str = "weight"
    ) -> "VocabularyShard":
        """Find which classes of a DTensor's head this rank has.

        Args:
            weight: [V, D], divided by classes, `Shard(0)`, over one dimension of its mesh. It may be copied,
                `Replicate()`, over others; the caller must then sum the gradients over those itself.
            rows: "same" or "own".
            head_gradient: factor on the gradients of weight and bias.
            name: what messages call the weight.

        Returns:
            The shard. Its group is the ranks along the divided dimension.

        Raises:
            UserError: the weight is divided in another way.
        """
        divided = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
        if len(divided) != 1 or type(weight.placements[divided[0]]).__name__ != "Shard" or weight.dim() != 2:
            divided = []
        if not divided or not weight.placements[divided[0]].is_shard(0):
            raise UserError(
                f"{name} must be divided by classes, Shard(0), over one dimension of its mesh, got "
                f"{weight.placements} of shape {tuple(weight.shape)}; redistribute it, or give full_tensor()"
            )
        mesh, dimension = weight.device_mesh, divided[0]
        classes, ranks = weight.shape[0], mesh.size(dimension)
        first = min(classes, mesh.get_local_rank(dimension) * -(-classes // ranks))
        return VocabularyShard(mesh.get_group(dimension), first, classes, rows, head_gradient)

    @property
    def own_rows(self) -> bool:
        """Whether each rank has rows of its own."""
        return self.rows == "own"


@dataclass(frozen=True)
class Head:
    """A model's output projection: logits = softcap * tanh(z / softcap), z = scale * (hidden @ weight.T + bias).

    Args:
        weight: [V, D], or None where the "hidden states" are logits already.
        bias: [V], or None.
        softcap: above 0, or None for z itself.
        scale: factor above 0.
        shard: which classes weight and bias have, if they are only this rank's part of the vocabulary.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    shard: VocabularyShard | None = None

    def project(self, hidden_CD: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute logits before the softcap.

        Without a weight the hidden states themselves are returned, not a copy.

        Args:
            hidden_CD: [C, D] hidden states.
            out: [C, V] where the logits go; default: a new tensor of the weight's dtype. A float32 `out` with a
                narrower weight receives the unrounded products.

        Returns:
            [C, V] logits.
        """
        weight = self.weight
        if weight is None:
            return hidden_CD
        hidden_CD = hidden_CD.to(weight.dtype)
        if self.scale != 1.0:
            hidden_CD = hidden_CD * self.scale
        if out is None:
            out = hidden_CD.new_empty(hidden_CD.shape[0], weight.shape[0])
        if out.dtype != weight.dtype:
            self._project_wide(hidden_CD, weight, out)
        elif self.bias is None:
            torch.mm(hidden_CD, weight.t(), out=out)
        else:
            torch.addmm(self.bias.to(weight.dtype) * self.scale, hidden_CD, weight.t(), out=out)
        return out

    def _project_wide(self, hidden_CD: Tensor, weight: Tensor, out: Tensor) -> None:
        if out.is_cuda:
            torch.mm(hidden_CD, weight.t(), out_dtype=out.dtype, out=out)
        else:
            # On a CPU the product of narrow matrices is rounded, so the weight is widened, one slice at a time.
            for part in class_slices(weight.shape[0]):
                torch.mm(hidden_CD.to(out.dtype), weight[part].to(out.dtype).t(), out=out[:, part])
        if self.bias is not None:
            out += self.bias.to(out.dtype) * self.scale

    def to(self, dtype: torch.dtype) -> "Head":
        """Return the head with weight and bias in `dtype`."""
        weight, bias = (None if x is None else x.to(dtype) for x in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def on(self, device: torch.device | str) -> "Head":
        """Return the head on a device, detached from the autograd graph."""
        weight, bias = (None if x is None else x.detach().to(device) for x in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def tensors(self) -> dict[str, Tensor]:
        """Weight and bias by name, detached from the autograd graph; the bias only if there is one."""
        parts = {"weight": self.weight, "bias": self.bias}
        return {name: x.detach() for name, x in parts.items() if x is not None}

    def num_classes(self, hidden: Tensor) -> int:
        """The number of classes, V; for a shard, that of all ranks together."""
        if self.shard is not None:
            return self.shard.classes
        return hidden.shape[-1] if self.weight is None else self.weight.shape[0]
