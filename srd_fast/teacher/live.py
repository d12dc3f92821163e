"""A teacher that runs beside the student."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..errors import UserError
from ..models import (
    check_head,
    compile_layers,
    entry_device,
    find_head,
    hidden_states,
    is_dispatched,
    is_sharded,
    run_inside,
    tensor_parallel_group,
    unpack,
    unwrap,
    whole,
    whole_head,
    with_decoder,
)
from .source import HiddenRows, TeacherRows, rows_with_loss

logger = logging.getLogger(__name__)

T = TypeVar("T")
# The entries of a batch that a model reads.
_READ = {"input_ids", "attention_mask", "position_ids", "cu_seq_lens", "sample_lengths", "continues"}
_READ |= {"decoder_input_ids", "decoder_attention_mask"}


class LiveTeacher:
    """A teacher that runs beside the student, in eval mode and its own dtype, outside the student's autocast.

    A model that is spread out is not moved: over several devices, the host's memory or the disk (`device_map`,
    accelerate's hooks), or in shards on several processes (tensor parallelism, FSDP2). These processes must all make a
    LiveTeacher, and call it equally often. Batches go to the device of its embeddings. A sharded head is kept whole on
    each process.

    Args:
        model: a causal language model.
        device: where the hidden states go, and where a model on a single device runs. Default: where its head is.
        offload: keep its body in the host's memory and copy it to `device` for each batch. The head stays on `device`.
        freeze: switch off the gradients of its parameters, so that no optimizer can train it.
        autocast: bfloat16 or float16: run products in this dtype while the weights stay float32. Default: no autocast.

    Raises:
        UserError: the teacher's head is quantised, a quantised teacher would have to be moved, `offload` is asked for a
            model that cannot be moved, or its logits cannot be rebuilt from its hidden states and head.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        offload: bool = False,
        freeze: bool = True,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._dtype: torch.dtype | None = None
        unpack(model)
        stays = _why_it_stays(model)
        if stays is not None and offload:
            raise UserError(f"teacher_offload is true, but {stays} cannot be moved; set it to false")
        if stays == _QUANTISED and device is not None and entry_device(model).type != torch.device(device).type:
            raise UserError(
                f"the teacher is quantised and on {entry_device(model)}, from where it cannot be moved to {device}: "
                "load it there (device_map)"
            )
        self.model = model.to(device) if device is not None and stays is None and not offload else model
        self.model.eval()
        if freeze:
            self.model.requires_grad_(False)
        self.offload, self.sharded = offload, is_sharded(model)
        self.peers = tensor_parallel_group(model) if self.sharded else None
        self.head = whole_head(self.model, device)
        assert self.head.weight is not None
        self.device = self.head.weight.device if device is None else torch.device(device)
        self.num_classes = self.head.weight.shape[0]
        if self.sharded and dist.get_rank() == 0:
            size = sum(x.nbytes for x in self.head.tensors().values())
            logger.warning("the teacher's head is whole on every rank, which takes %.2f GB of each", size / 1e9)
        own = find_head(self.model)
        # A body in the host's memory is tried on the CPU.
        tried, place = (own, None) if offload else (self.head, self.entry)
        self.run(check_head, self.model, "teacher", tried, place, on_device=False)
        self._dtype = None if autocast == torch.float32 else autocast
        pairs = (own.weight, self.head.weight), (own.bias, self.head.bias)
        self._heads = {id(x): there for x, there in pairs if x is not None and there is not None}
        if offload and self.device.type == "cuda":
            # Copies from page-locked memory need no extra copy, and run beside the student's work.
            for x in self._body():
                x.data = x.data.pin_memory()

    @property
    def entry(self) -> torch.device:
        """The device for batches."""
        return self.device if self.offload else entry_device(self.model)

    def _body(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Put the body on the device during the block. Nothing is copied back, because nothing changes."""
        if not self.offload:
            yield
            return
        home = [(x, x.data) for x in self._body()]
        try:
            for x, data in home:
                x.data = self._heads[id(x)] if id(x) in self._heads else data.to(self.device, non_blocking=True)
            yield
        finally:
            for x, data in home:
                x.data = data

    def _without_gradient(self) -> AbstractContextManager[Any]:
        # Weights that FSDP2 gathers in inference mode could not be used outside of it.
        return torch.no_grad() if self.sharded else torch.inference_mode()

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self._dtype, enabled=self._dtype is not None)

    def compile(self, **options: Any) -> str | None:
        """Run `compile_layers` on the model as `rows` runs it, with the same options and result."""
        if self.sharded or is_dispatched(self.model):
            return "its weights are spread out"
        with self._on_device():
            return compile_layers(self.model, lambda: self._autocast(self.device), **options)

    def run(self, function: Callable[..., T], *args: Any, on_device: bool = True) -> T:
        """Call a function that uses the model's parts, in the same contexts as `hidden_states`: wrapper and autocast.

        Args:
            function: the function.
            *args: its arguments, with tensors on `entry`.
            on_device: put an offloaded body on `device` meanwhile.

        Returns:
            What the function returns.
        """
        place = self._on_device() if on_device else nullcontext()
        with self._without_gradient(), place, self._autocast(self.entry):
            try:
                return run_inside(self.model, function, *args)
            finally:
                if isinstance(self.model, FSDPModule):
                    self.model.reshard()  # free embeddings and head, which FSDP2 keeps for a backward pass

    def hidden_states(self, batch: Mapping[str, Any]) -> Tensor:
        """Run the model on a batch.

        Ranks of a tensor-parallel group may have different batches: all of them run each batch, one after the other.

        Args:
            batch: a batch of the collator, on any device.

        Returns:
            [B, L, D] on `device`, without gradient.
        """
        read = {name: x for name, x in batch.items() if name in _READ}
        if self.peers is None:
            return self._states(read)
        batches: list[dict[str, Any]] = [{} for _ in range(self.peers.size())]
        dist.all_gather_object(batches, moved(read, "cpu"), self.peers)
        mine = self.peers.rank()
        if all(_are_equal(b, batches[0]) for b in batches[1:]):
            return self._states(read)
        of_all = [self._states(b) if i == mine else self._states(b)[:0] for i, b in enumerate(batches)]
        return of_all[mine]

    def _states(self, batch: Mapping[str, Any]) -> Tensor:
        return whole(self.run(hidden_states, self.model, moved(batch, self.entry))).to(self.device)

    def some_batch(self) -> dict[str, Tensor]:
        """A batch of one token, for a pass whose result only other ranks need."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.entry)
        return with_decoder(unwrap(self.model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """Hidden states of the rows with loss. They do not depend on the temperature."""
        states_BLD = self.hidden_states(batch)
        with self._without_gradient():
            return HiddenRows(rows_with_loss(states_BLD, batch), self.head)


_QUANTISED = "a quantised teacher"


def _why_it_stays(model: nn.Module) -> str | None:
    """What the message calls a model that cannot be moved; None for one that can."""
    if is_sharded(model):
        return "a teacher in shards on several processes"
    if is_dispatched(model):
        return "a teacher with a device_map"
    return _QUANTISED if getattr(unwrap(model), "hf_quantizer", None) is not None else None


def moved(batch: Any, device: torch.device | str) -> Any:
    """Move a batch to a device, including a teacher's rows in it, which may still be on their way.

    Args:
        batch: a dictionary, which may hold others.
        device: where its tensors go.

    Returns:
        A batch of the same structure. Values that cannot be moved stay as they are.
    """
    if isinstance(batch, Mapping):
        return {name: moved(x, device) for name, x in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch


def _are_equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)

    return a.keys() == b.keys() and all(same(x, b[name]) for name, x in a.items())
