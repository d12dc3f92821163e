"""What runs under a piece of code: the dtypes of the heads' products, what a GPU would be waited for, large tensors."""

import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a GPU would be waited for.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")


class Products(TorchDispatchMode):
    """(dtype of the factors, of the result) of every matrix product with one of the heads, by the head's classes.

    heads: their classes; no other dimension of the models may be one of these.
    """

    def __init__(self, *heads: int) -> None:
        super().__init__()
        self.seen: dict[int, Counter[tuple[torch.dtype, ...]]] = {classes: Counter() for classes in heads}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            factors = [x for x in args if isinstance(x, Tensor)][-2:]
            for classes, seen in self.seen.items():
                if any(classes in x.shape for x in factors):
                    seen[(*(x.dtype for x in factors), out.dtype)] += 1
        return out

    def dtypes(self, classes: int) -> set[torch.dtype]:
        """All that took part."""
        return {dtype for key in self.seen[classes] for dtype in key}


def products_of(act: Callable[[], Any], *heads: int) -> Products:
    """Of what a function does."""
    with Products(*heads) as products:
        act()
    return products


class Waits(TorchDispatchMode):
    """Operations that wait for a device, by the innermost line of Python that is neither torch's nor this file's."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found, self.operations = False, Counter[tuple[str, str]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.on:
            self.operations += 1
            name = func.overloadpacket.__name__
            if name in WAITS:
                outside = [
                    f for f in traceback.extract_stack() if "/torch/" not in f.filename and __file__ != f.filename
                ]
                self.found[name, f"{Path(outside[-1].filename).name}:{outside[-1].name}"] += 1
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that an operation makes on this rank."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does with its shard comes here then
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        # DTensor tries an operation on fake tensors first, which have a shape and no memory.
        real = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)]
        storages = [x.untyped_storage() for x in real]
        made = [s.nbytes() // 4 for s in storages if s._cdata not in given]  # all is float32 here
        self.elements = max(self.elements, *made, 0)
        return out


class Wide(TorchDispatchMode):
    """Passes over tensors of at least `elements`, and how many such tensors are alive at once beside those given."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.passes, self.most_alive = elements, 0, 0
        self._alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        self.passes += not func.is_view and any(x.numel() >= self.elements for x in tensors)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in given and x.numel() >= self.elements:
                self._alive[storage._cdata] = StorageWeakRef(storage)
        self._alive = {key: ref for key, ref in self._alive.items() if not ref.expired()}
        self.most_alive = max(self.most_alive, len(self._alive))
        return out
