"""A teacher that runs beside the student."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models import check_head, compile_layers, find_head, hidden_states, unwrap
from .source import HiddenRows, TeacherRows, rows_with_loss


def _check_quantised(model: nn.Module, device: torch.device | str | None) -> None:
    """Refuse a quantised teacher whose logits would not be those of its hidden states, or that is elsewhere."""
    weight = find_head(model, "teacher").weight
    assert weight is not None
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UserError(
            f"the teacher's head is quantised ({str(weight.dtype).removeprefix('torch.')}), and the loss needs its "
            "full weight: quantise the teacher without it (modules_to_not_convert, llm_int8_skip_modules: ['lm_head'])"
        )
    if device is not None and torch.device(device).type != weight.device.type:
        raise UserError(
            f"the teacher is quantised and on {weight.device}, from where it cannot be moved to {device}: load it "
            "there (device_map)"
        )


class LiveTeacher:
    """A teacher that runs beside the student, in eval mode and its own dtype, outside autocast.

    Args:
        model: a causal language model.
        device: where it runs. Default: where it is.
        offload: keep its body in the host's memory and copy it to `device` for each batch. The head stays on `device`.
        freeze: switch off the gradients of its parameters, so that no optimizer can train it.

    Raises:
        UserError: the teacher's head is quantised, a quantised teacher would have to be moved, or its logits cannot be
            rebuilt from its hidden states and head.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        offload: bool = False,
        freeze: bool = True,
    ) -> None:
        quantised = getattr(unwrap(model), "hf_quantizer", None) is not None
        if quantised and offload:
            raise UserError("teacher_offload is true, but a quantised teacher cannot be moved; set it to false")
        if quantised:
            _check_quantised(model, device)
        self.model = model.to(device) if device is not None and not offload and not quantised else model
        self.model.eval()
        if freeze:
            self.model.requires_grad_(False)
        check_head(self.model, "teacher")
        head = find_head(self.model)
        assert head.weight is not None
        self.device = torch.device(device) if device is not None else head.weight.device
        self.offload = offload
        if offload and self.device.type == "cuda":
            # Copies from page-locked memory need no staging, and run beside the student's work.
            for x in self._body():
                x.data = x.data.pin_memory()
        self.head = head.on(self.device)
        own = (head.weight, self.head.weight), (head.bias, self.head.bias)
        self._heads = {id(x): there for x, there in own if x is not None and there is not None}
        self.num_classes = head.weight.shape[0]

    def _body(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Put the body on the device for a while. Nothing is copied back, because nothing changes."""
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

    def compile(self, **options: Any) -> str | None:
        """Run `compile_layers` on the model as `rows` runs it, with the same options and result."""
        with self._on_device():
            return compile_layers(self.model, lambda: torch.autocast(self.device.type, enabled=False), **options)

    @torch.inference_mode()
    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """Hidden states of the rows with loss. They do not depend on the temperature."""
        with self._on_device(), torch.autocast(self.device.type, enabled=False):
            return HiddenRows(rows_with_loss(hidden_states(self.model, batch), batch), self.head)
