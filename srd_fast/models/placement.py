"""Where the weights of a model are: on one device, behind accelerate's hooks, or in shards on several processes.

A model that is spread out cannot be moved. Its inputs go to the device of its embeddings. If a whole weight is needed,
it is fetched or gathered.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn

from ..errors import UserError
from ..losses import Head
from .heads import head_as_it_lies, unwrap
from .wrapping import DTensor, FSDPModule, FullyShardedDataParallel, call_through, whole_shape

T = TypeVar("T")


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """accelerate's hooks that move a module's inputs and weights, the inner one last."""
    hook = getattr(module, "_hf_hook", None)
    found = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [h for h in found if isinstance(h, AlignDevicesHook)]


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks move a model's weights or inputs: `device_map`, offload to the CPU or to disk."""
    return any(_hooks(m) for m in model.modules())


def is_sharded(model: nn.Module) -> bool:
    """Whether no process has all weights of a model: FSDP, ZeRO-3 or tensor parallelism."""
    if is_fully_sharded(model) or isinstance(model, FullyShardedDataParallel):
        return True
    return any(isinstance(p, DTensor) or p.shape != whole_shape(p) for p in model.parameters())


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 gathers a model's weights in each forward pass."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


def tensor_parallel_group(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that must run a model on the same batch, because each has a part of every product.

    Args:
        model: any model.

    Returns:
        Their group; None if each process may have its own batch.

    Raises:
        UserError: the weights are sharded along several dimensions, and none is called "tp".
    """
    shards = [p for p in model.parameters() if isinstance(p, DTensor)]
    if not shards:
        return None
    mesh = shards[0].device_mesh
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        return mesh["tp"].get_group() if mesh["tp"].size() > 1 else None
    if is_fully_sharded(model):
        # A weight is divided once in replicated shards, and twice if FSDP shards a tensor-parallel model.
        if not any(sum(p.is_shard() for p in x.placements) > 1 for x in shards):
            return None
    elif mesh.ndim == 1:
        return mesh.get_group()
    raise UserError(
        f"the weights of {type(model).__name__} are sharded over a mesh of {mesh.ndim} dimensions "
        f"({', '.join(names) or 'no names'}); call the one of tensor parallelism 'tp' (mesh_dim_names)"
    )


def entry_device(model: nn.Module) -> torch.device:
    """The device for a model's inputs: the one on which its embeddings run."""
    module: Any = unwrap(model)
    module = module.get_input_embeddings()
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return _device(hook.execution_device)
    weight: Tensor = module.weight
    if isinstance(weight, DTensor):  # FSDP2 may keep its shards in the host's memory, and runs on the mesh's device
        return _of_mesh(weight)
    return weight.device


def _of_mesh(x: DTensor) -> torch.device:
    kind = x.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _device(given: Any) -> torch.device:
    """A device from accelerate, which names a GPU by its number."""
    if isinstance(given, int):
        accelerator = torch.accelerator.current_accelerator()
        return torch.device("cuda" if accelerator is None else accelerator.type, given)
    return torch.device(given)


def run_inside(model: nn.Module, run: Callable[..., T], *args: Any) -> T:
    """Run a function that uses a model's parts. With FSDP2 it runs inside the model's call, which gathers weights."""
    if not isinstance(model, FSDPModule):
        return run(*args)
    return call_through(model, unwrap(model), run, *args)  # FSDP2 moves the tensors among these to its device


@contextmanager
def called_by_parts(model: nn.Module) -> Iterator[bool]:
    """Allow code of other libraries, such as `generate`, to call a model or the models inside it.

    Args:
        model: any model, without wrappers.

    Yields:
        Whether all processes must call it equally often, because FSDP2 gathers its weights in each call.
    """
    if not is_fully_sharded(model) or dist.get_world_size() == 1:
        yield False
        return
    if not isinstance(model, FSDPModule):
        yield True
        return
    # FSDP2 takes the module of the outermost call as the root. `generate` of an adapted model skips that module, whose
    # own weights would then stay in shards.
    run_inside(model, lambda *_, **__: None)
    model.unshard()
    try:
        yield True
    finally:
        model.reshard()


def whole(x: Tensor) -> Tensor:
    """A weight as one tensor. All processes that have shards of it must call this together."""
    if not isinstance(x, DTensor):
        return x
    return cast(DTensor, x.to(_of_mesh(x))).full_tensor()


def unpack(model: nn.Module) -> None:
    """Unpack weights that a quantiser would unpack in a model's first call, because here only its parts are called.

    Args:
        model: any model. With compressed-tensors, it has floating-point weights afterwards if its kernels cannot run.
    """
    inner: Any = unwrap(model)
    if getattr(inner, "ct_decompress_hook", None) is not None:
        inner.hf_quantizer.compressor.decompress_model(inner)


def whole_head(model: nn.Module, device: torch.device | str | None = None, name: str = "teacher") -> Head:
    """A model's head with its whole weight, detached from the autograd graph.

    Args:
        model: a language model. If it is sharded, all processes that have shards must call this together.
        device: where the head goes. Default: where the model applies it.
        name: "student" or "teacher", for the message.

    Returns:
        The head.

    Raises:
        UserError: the model has no head, one that cannot be taken out, or a quantised one.
    """
    head = head_as_it_lies(model, name)
    module: Any = unwrap(model)
    module = module.get_output_embeddings()
    weight, bias = head.weight, head.bias
    assert weight is not None
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UserError(
            f"the {name}'s head is quantised ({str(weight.dtype).removeprefix('torch.')}), and the loss needs its "
            "full weight: quantise the teacher without it (modules_to_not_convert, llm_int8_skip_modules: ['lm_head'])"
        )
    place = next((_device(h.execution_device) for h in _hooks(module) if h.execution_device is not None), None)
    with torch.no_grad():
        held = dict(_own_state(module))
        weight = whole(held.get("weight", weight))
        bias = None if bias is None else whole(held.get("bias", bias))
        return replace(head, weight=weight, bias=bias).on(device or place or weight.device)


def _own_state(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A module's own entries of its model's state, by name. Offloaded weights are read."""
    own: dict[str, Any] = {}
    module._save_to_state_dict(own, prefix, keep_vars=False)
    kept = next((h.weights_map for h in _hooks(module) if h.offload and h.weights_map is not None), None)
    for name, x in own.items():
        is_elsewhere = isinstance(x, Tensor) and x.device.type == "meta"
        yield name, kept[name.removeprefix(prefix)] if is_elsewhere and kept is not None else x


def state_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each entry of a model's state, one after the other.

    Offloaded weights are read and sharded ones gathered one at a time, so that only one is in memory.

    Args:
        model: any model. If it is sharded, all processes that have shards must call this together.

    Yields:
        What `state_dict` would hold.
    """
    if not (is_dispatched(model) or is_sharded(model)):
        yield from model.state_dict().items()
        return
    for path, module in model.named_modules(remove_duplicate=False):
        for name, x in _own_state(module, f"{path}." if path else ""):
            yield name, whole(x)
