"""Compile the decoder layers of a model, one graph for all of them, and prove on a few tokens that nothing changes.

A compiled layer is the same module with another class: a subclass whose `forward` is compiled. Names of parameters,
hooks and adapters stay. transformers' gradient checkpointing, in `forward` or `__call__`, stays outside the graph.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import first_line
from .encoder_decoder import is_encoder_decoder, with_decoder
from .flattening import TOLERANCE, captured, probe_batches, row_error
from .heads import body_of, hidden_states, unwrap

try:
    from torch.utils._python_dispatch import is_in_any_mode_without_ignore_compile_internals as _is_watched
except ImportError:  # torch < 2.12 may not have it
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode as _is_watched

logger = logging.getLogger(__name__)

# Graphs of one layer class: training or not, gradients or not, kinds of masks and of layers, inputs with gradient.
_MOST_GRAPHS = 64


def compile_layers(
    model: nn.Module,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    *,
    flattened: bool,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
) -> str | None:
    """Compile the decoder layers of a causal language model in place, if that does not change its results.

    All layers of a class share one graph for each way in which they run, whatever the lengths. A few tokens go through
    the model before and after: through a frozen model in inference mode, through any other in training, with gradients,
    and in evaluation. A class of layers that cannot be compiled, or gives other results, stays as it is. Layers with a
    cache of keys (generation) run uncompiled. Copies and pickles of a compiled model are uncompiled.

    Args:
        model: on its device and in its dtype, after `enable_flattening`; a PEFT model too. Its mode does not change.
        autocast: makes the autocast context in which the model will run.
        flattened: whether it will run on flattened batches, instead of padded ones.
        backend: the backend of `torch.compile`.
        mode: the mode of `torch.compile`.

    Returns:
        None, or a clause that says which layers are not compiled, and why.
    """
    uncompile_layers(model)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    proof = _Proof(model, autocast, flattened)
    modes = [(m, m.training) for m in model.modules()]
    reasons = []
    try:
        with proof.undisturbed():
            layers = proof.expect()
            if not layers:
                return f"{type(unwrap(model)).__name__} has no layers that transformers could checkpoint"
            for kind, members in layers.items():
                reason = _compile_kind(kind, members, proof, backend, mode)
                reasons += [] if reason is None else [f"{kind.__name__}: {reason}"]
    finally:
        for module, training in modes:
            module.training = training
    return "; ".join(reasons) or None


def uncompile_layers(model: nn.Module) -> None:
    """Give compiled layers their original class back."""
    for module in model.modules():
        plain = getattr(type(module), "compiled_from", None)
        if plain is not None:
            module.__class__ = plain


def _compile_kind(
    kind: type[nn.Module], members: list[nn.Module], proof: "_Proof", backend: Any, mode: str | None
) -> str | None:
    try:
        made = _compiled_class(kind, backend, mode)
        for layer in members:
            layer.__class__ = made
        # Otherwise sizes that happen to be equal here would be compiled as one size, and module numbers as inputs.
        shapes: Any = torch.fx.experimental._config
        with shapes.patch(use_duck_shape=False), torch._dynamo.config.patch(specialize_float=True):
            reason = proof.difference()
    except Exception as e:  # compilers raise anything for what they do not understand
        reason = first_line(getattr(e, "inner_exception", e))
    if reason is None:
        made.proven = True
    else:
        for layer in members:
            layer.__class__ = kind
    return reason


def _compiled_class(kind: type[nn.Module], backend: Any, mode: str | None) -> Any:
    plain = _without_checkpointing(kind)

    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain(layer, *args, **kwargs)

    # torch limits the number of graphs per code object, so each class of each model gets a code object of its own.
    run.__code__ = run.__code__.replace(co_name=f"{kind.__name__}_forward")
    compiled = torch.compile(run, backend=backend, mode=mode, dynamic=True, fullgraph=True)

    @wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # With a cache, which is indexed by the layer's number, each layer would need its own graph. And torch compiles
        # nothing while a dispatch mode is active.
        if made.failed or _is_watched() or any(isinstance(x, Cache) for x in (*args, *kwargs.values())):
            return plain(self, *args, **kwargs)
        try:
            return compiled(self, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as e:
            if not made.proven:
                raise
            made.failed = True
            logger.warning(
                "%s runs uncompiled from here on: %s", kind.__name__, first_line(getattr(e, "inner_exception", e))
            )
            return plain(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> Any:
        return _uncompiled, (kind,), self.__getstate__()

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    own = {"forward": forward, "__reduce_ex__": reduce_ex, "compiled_from": kind, "proven": False, "failed": False}
    made: Any = type(kind.__name__, (kind,), names | own)
    return made


def _uncompiled(kind: type[nn.Module]) -> nn.Module:
    """An empty layer, for a copy or a pickle to fill."""
    return kind.__new__(kind)


def _without_checkpointing(kind: Any) -> Callable[..., Any]:
    """The class's `forward`, without the wrapper that newer versions of transformers put around it."""
    forward = kind.forward
    wrapped = (
        getattr(forward, "__code__", None) is not None and forward.__code__.co_name == "forward_with_checkpointing"
    )
    return forward.__wrapped__ if wrapped else forward


@dataclass
class _Way:
    """One way in which the model runs, and its uncompiled results."""

    batch: dict[str, Any]
    training: bool
    gradients: bool
    random: bool = False
    expected: Any = None


class _Proof:
    """Runs a model on a few tokens, before and after compiling, and compares the results."""

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]], flattened: bool) -> None:
        self.model, self.autocast = model, autocast
        inner: Any = unwrap(model)
        self.body = body_of(inner)
        self.embedding = inner.get_input_embeddings()
        weight = self.embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        padded, flat = probe_batches(weight.shape[0], self.device)
        # A batch without padding has no mask, and so a graph of its own.
        self.batches = [flat] if flattened else [padded, {n: x[::2, :7].clone() for n, x in padded.items()}]
        if is_encoder_decoder(inner):
            self.batches = [with_decoder(inner, batch) for batch in self.batches]
        self.frozen = not any(p.requires_grad for p in model.parameters())
        self.layers: dict[type[nn.Module], list[nn.Module]] = {}
        self.ways: list[_Way] = []

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Restore the state of the random number generators afterwards."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield

    def expect(self) -> dict[type[nn.Module], list[nn.Module]]:
        """Run every way uncompiled, and return the outermost layers that ran, by class."""
        with self._watched_layers():
            for batch in self.batches:
                self.ways.append(_Way(batch, False, False))
                self.ways[-1].expected = self._run(self.ways[-1])
        self.trained = [p for p in self._first_and_last() if p.requires_grad]
        for batch in [] if self.frozen else self.batches:
            way, second = _Way(batch, True, True), _Way(batch, False, True)
            way.expected, again = self._run(way, seed=0), self._run(way, seed=1)
            way.random = not torch.equal(way.expected[0], again[0])
            if way.random:
                second.expected = self._run(second)
                self.ways.append(second)
            self.ways.append(way)
        return self.layers

    def difference(self) -> str | None:
        """Say what is different now, or return None."""
        for way in self.ways:
            found, precision = self._run(way), self._precision()
            may_be_tf32 = self.device.type == "cuda" and precision == torch.float32
            for_states, for_gradients = TOLERANCE[torch.float16 if may_be_tf32 else precision]
            if way.random:
                if not all(x.isfinite().all() for x in found):
                    return "what comes out compiled is not finite"
                continue
            largest = max((x.norm() for x in way.expected[1:]), default=torch.zeros(()))
            for i, (a, b) in enumerate(zip(found, way.expected)):
                what, tolerance = ("gradients", for_gradients) if i else ("hidden states", for_states)
                error = row_error(a, b) if i == 0 else ((a - b).norm() / b.norm().clamp(min=largest / 100)).item()
                if not error <= tolerance:
                    return f"its {what} come out different by {error:.1e} compiled ({precision})"
        return None

    def _precision(self) -> torch.dtype:
        with self.autocast():
            on = torch.is_autocast_enabled(self.device.type)
            return torch.get_autocast_dtype(self.device.type) if on else self.dtype

    def _run(self, way: _Way, seed: int = 0) -> list[Tensor]:
        """Hidden states [tokens, D], and gradients of the outer layers and, if they are trained, of the embeddings."""
        torch.manual_seed(seed)
        self.model.train(way.training)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.frozen))
            stack.enter_context(torch.set_grad_enabled(way.gradients))
            outputs = stack.enter_context(captured(self.embedding, as_it_is=True))
            with self.autocast():
                hidden_BLD = hidden_states(self.model, way.batch)
            masks = [way.batch[n] for n in ("decoder_attention_mask", "attention_mask") if n in way.batch]
            mask = masks[0].bool() if masks else torch.ones_like(way.batch["input_ids"], dtype=torch.bool)
            hidden_ND = hidden_BLD[mask]
            if not way.gradients:
                return [hidden_ND.clone()]
            sources = [x for x in outputs[-1:] if x.requires_grad] + self.trained
            column = torch.arange(hidden_ND.numel(), device=self.device).view_as(hidden_ND)
            gradients = torch.autograd.grad((hidden_ND * torch.cos(1.7 * column)).sum(), sources, allow_unused=True)
        return [hidden_ND.detach(), *(g.float() for g in gradients if g is not None)]

    @contextmanager
    def _watched_layers(self) -> Iterator[None]:
        handles: list[Any] = []
        running: list[nn.Module] = []

        def enter(layer: nn.Module, args: Any) -> None:
            members = self.layers.setdefault(type(layer), [])
            if not running and layer not in members:
                members.append(layer)
            running.append(layer)

        def leave(layer: nn.Module, args: Any, output: Any) -> None:
            running.pop()

        for module in self.body.modules():
            if isinstance(module, GradientCheckpointingLayer):
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            self.layers = {kind: members for kind, members in self.layers.items() if members}
            for handle in handles:
                handle.remove()

    def _first_and_last(self) -> list[nn.Parameter]:
        """Parameters of the first and last layer of each class. The graph of all layers lies between them."""
        layers = {id(x): x for members in self.layers.values() for x in (members[0], members[-1])}
        return [p for layer in layers.values() for p in layer.parameters()]
