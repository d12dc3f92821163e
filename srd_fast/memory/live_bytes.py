"""Count the bytes of tensors that are alive while code runs on fake tensors, which have shapes but no memory.

A fake tensor goes through autograd, autocast and attention kernels like a real one, and its storage is freed when the
real one would be. So the peak is that of the real run, except for what kernels allocate internally.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten


class _Watch(TorchDispatchMode):
    """Sees the results of every operation. It is active above the mode that makes them fake."""

    def __init__(self, owner: "LiveBytes") -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return self.owner.value_of(args[0])
        label = self.owner.label_of_copy(args[0]) if func is _aten._to_copy.default else None
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.owner.see(x, label)
        if func is _aten.full.default and out.numel() == 1:
            self.owner.values[out.untyped_storage()._cdata] = args[1]
        return out


class LiveBytes:
    """`with LiveBytes() as live:` makes every tensor fake and counts its storage, by label, until it dies.

    live: current bytes by label. peak: bytes by label when their sum was largest; peak_moment: the value of `moment`
    then. masks_are_whole: the value read from a fake boolean tensor, the only value on which sizes depend.
    """

    def __init__(self, masks_are_whole: bool = False) -> None:
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.moment = self.peak_moment = self.label = ""
        self.masks_are_whole = masks_are_whole
        self.values: dict[int, Any] = {}
        self._total = self._largest = 0
        self._labels: dict[int, str] = {}
        self._copies: dict[str, str] = {}
        self._modes = FakeTensorMode(allow_non_fake_inputs=True), _Watch(self)

    def __enter__(self) -> "LiveBytes":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @contextmanager
    def labelled(self, label: str, copies: dict[str, str] | None = None) -> Iterator[None]:
        """Label new storage; a copy in another dtype of a tensor labelled L gets the label `copies[L]`."""
        before = self.label, self._copies
        self.label, self._copies = label, copies or {}
        try:
            yield
        finally:
            self.label, self._copies = before

    def label_of_copy(self, x: Tensor) -> str | None:
        """The label of a copy of `x` in another dtype; None for the current label."""
        return self._copies.get(self._labels.get(x.untyped_storage()._cdata, ""))

    def see(self, x: Tensor, label: str | None = None) -> None:
        """Count the storage of `x`, unless it is counted already or on the device meta, where it takes no memory."""
        if x.device.type == "meta":
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._labels:
            return
        self._labels[key] = label or self.label
        weakref.finalize(storage, self._gone, key, size)
        self.live[self._labels[key]] += size
        self._total += size
        if self._total > self._largest:
            self._largest, self.peak, self.peak_moment = self._total, dict(self.live), self.moment

    def _gone(self, key: int, size: int) -> None:
        self.live[self._labels.pop(key)] -= size
        self.values.pop(key, None)
        self._total -= size

    def relabel(self, x: Tensor, label: str) -> None:
        """Give the storage of `x` another label from now on."""
        storage = x.untyped_storage()
        before = self._labels.get(storage._cdata)
        if before is not None:
            self.live[before] -= storage.nbytes()
            self.live[label] += storage.nbytes()
            self._labels[storage._cdata] = label

    def value_of(self, x: Tensor) -> Any:
        """The result of `x.item()`: the value with which full() filled it, else `masks_are_whole`, or 1."""
        known = self.values.get(x.untyped_storage()._cdata)
        if known is not None:
            return known
        return self.masks_are_whole if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1
