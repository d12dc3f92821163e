"""Switch a model to flattened batches, and prove on a few tokens that they give what padded batches give."""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from .encoder_decoder import is_encoder_decoder
from .heads import body_of, hidden_states, unwrap
from .placement import entry_device, is_fully_sharded
from .text import text_config, text_tower
from .varlen import IMPLEMENTATION

# The largest mean error that rounding can explain: of a token's hidden state and of its gradient, relative to their
# norms. Float64 models compute norms and softmaxes in float32, and on a GPU float32 may be TF32, with the mantissa of
# float16. SmolLM2-135M against itself in float32: bfloat16 0.03 and 0.1, float16 0.002 and 0.02. If samples see each
# other: 0.4 and 1.4.
TOLERANCE = {
    torch.float64: (1e-5, 1e-5),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (0.02, 0.15),
    torch.bfloat16: (0.1, 0.4),
}
_LENGTHS = (7, 1, 12)
# For models with a state that passes from token to token: one sample is longer than any usual chunk (64 to 256 tokens).
_LONG = (7, 1, 270, 12, 5)
_MIXERS = (nn.Conv1d, nn.RNNBase)
_ATTENTION = {"full_attention", "sliding_attention", "attention"}


def enable_flattening(model: nn.Module) -> str | None:
    """Let a causal language model take flattened batches in `hidden_states`, if it gives the same results for them.

    Its attention implementation becomes `srd_varlen`, which equals `sdpa` for padded batches and generation; flash
    attention stays. A few samples are then run flattened and padded. Their hidden states must agree, and if the model
    is trained, so must the gradients of their input embeddings. On a GPU, a float32 model is also tried under bfloat16
    autocast. No sample may have a gradient with respect to another one's tokens.

    Args:
        model: on its device and in its dtype; a PEFT model too. Its mode does not change.

    Returns:
        None, or a clause that says why the model cannot take flattened batches. It is then as it was before.
    """
    inner: Any = unwrap(model)
    before, mixes, reason = _implementations(inner), mixes_elsewhere(inner), unfit(inner)
    if reason is None:
        try:
            with evaluating(model):
                reason = _switch_and_compare(model, inner, _LENGTHS if mixes is None else _LONG)
        except Exception as e:  # a model may raise anything for a batch that it does not understand
            reason = first_line(e)
    if reason is None:
        return None
    for config, implementation in before:
        config._attn_implementation_internal = implementation
    if mixes is None and any(_asks_for_sdpa(kind) for kind in {type(m) for m in body_of(inner).modules()}):
        mixes = "its layers treat the sdpa implementation by its name"
    return reason if mixes is None else f"{mixes}: {reason}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and back into its own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def unfit_for_shared_prefix(model: nn.Module) -> str | None:
    """Find out whether a flattened batch may hold a beginning that several samples share only once, before all samples.

    Samples with two shared beginnings are run flattened and padded. Their hidden states and gradients must agree, as in
    `enable_flattening`.

    Args:
        model: one that takes flattened batches. It does not change.

    Returns:
        None, or a clause that says why not.
    """
    inner: Any = unwrap(model)
    if inner.config._attn_implementation != IMPLEMENTATION:
        return f"its attention implementation is {inner.config._attn_implementation}"
    embedding = inner.get_input_embeddings()
    device, dtype = entry_device(model), embedding.weight.dtype
    if device.type == "cuda":
        return "on a GPU each sample has keys of its own"
    if any(p.requires_grad for p in model.parameters()) and _drops(inner):
        return "its dropout would be the same for all samples that share a beginning"
    padded, flattened = _prefix_batches(embedding.weight.shape[0], device)
    try:
        with evaluating(model):
            wanted, found = (_hidden_and_gradient(model, embedding, batch) for batch in (padded, flattened))
    except Exception as e:  # as in enable_flattening
        return first_line(e)
    for what, tolerance, a_BLD, b_BLD in zip(("hidden states", "gradients"), TOLERANCE[dtype], wanted, found):
        # The gradient of a shared beginning is the sum over all samples that have it.
        expected_LD, found_LD = _by_place(a_BLD, padded), _by_place(b_BLD, flattened)
        if what == "hidden states":
            expected_LD = expected_LD / _by_place(torch.ones_like(a_BLD), padded)
        difference = row_error(found_LD, expected_LD)
        if not difference <= tolerance:
            return f"its {what} behind a shared beginning come out different by {difference:.1e} ({dtype})"
    return None


def _drops(inner: Any) -> bool:
    """Whether training drops values at random, judged by modules and the configuration."""
    config = text_config(inner.config)
    rates = [v for n, v in config.to_dict().items() if "drop" in n and isinstance(v, float)]
    return any(rates) or any(m.p > 0 for m in inner.modules() if isinstance(m, nn.modules.dropout._DropoutNd))


def unfit(inner: Any) -> str | None:
    """Why a model cannot take flattened batches, if that can be seen without running it; else None.

    Whatever shows in the results is left to `_switch_and_compare`, such as samples that see each other.
    """
    if is_encoder_decoder(inner):
        return "it has an encoder and a decoder"
    if is_fully_sharded(inner):
        return "its weights are sharded (FSDP2)"
    body = body_of(inner)
    parameters = inspect.signature(body.forward).parameters
    if "position_ids" not in parameters:
        return "it takes no position_ids"
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return "its forward takes no keywords for its attention"
    implementation = inner.config._attn_implementation
    if _is_flash(implementation):
        return None
    if implementation not in ("sdpa", "eager", IMPLEMENTATION):
        return f"its attention implementation is {implementation}"
    if not getattr(inner, "_can_set_attn_implementation", lambda: False)():
        return "its attention implementation cannot be set"
    if not getattr(inner, "_supports_sdpa", False):
        return "its attention is more than scaled_dot_product_attention"
    return None


def mixes_elsewhere(inner: Any) -> str | None:
    """Say whether layers of the text part look as if they mix tokens outside of attention; None if they do not.

    Whether they keep samples apart depends on the version of transformers and on its kernels, so it has to be tried.
    """
    mixer = next((m for m in text_tower(inner).modules() if isinstance(m, _MIXERS)), None)
    if mixer is not None:
        return f"its layers mix tokens outside of attention ({type(mixer).__name__})"
    other = sorted(set(getattr(text_config(inner.config), "layer_types", None) or ()) - _ATTENTION)
    return f"its layers are not all full or sliding attention ({', '.join(other)})" if other else None


def _is_flash(implementation: str | None) -> bool:
    return "flash" in str(implementation)


def _asks_for_sdpa(kind: type) -> bool:
    """Whether a module's code compares its attention implementation with "sdpa": another name may change it."""
    if kind.__module__.startswith("torch."):
        return False
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        return False
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)[^\n]*sdpa", source) is not None


def _implementations(inner: Any) -> list[tuple[Any, Any]]:
    """Every config of a model and its parts, with its attention implementation."""
    configs = {id(c): c for c in _configs(inner)}
    return [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation_internal")]


def _configs(inner: Any) -> Iterator[Any]:
    waiting = [m.config for m in inner.modules() if hasattr(m, "config")]
    while waiting:
        config = waiting.pop()
        yield config
        waiting += [c for c in (getattr(config, n, None) for n in getattr(config, "sub_configs", {})) if c is not None]


def _switch_and_compare(model: nn.Module, inner: Any, lengths: tuple[int, ...]) -> str | None:
    embedding = inner.get_input_embeddings()
    device, dtype = entry_device(model), embedding.weight.dtype
    padded, flattened = probe_batches(embedding.weight.shape[0], device, lengths)
    runs: list[tuple[torch.dtype, Callable[[], Any]]] = [(dtype, nullcontext)]
    if device.type == "cuda" and dtype == torch.float32:
        runs.append((torch.bfloat16, lambda: torch.autocast("cuda", torch.bfloat16)))
    expected = []
    for _, context in runs:
        with context():
            expected.append(_hidden_and_gradient(model, embedding, padded))
    if not _is_flash(inner.config._attn_implementation):
        inner.set_attn_implementation(IMPLEMENTATION)
    own = padded["attention_mask"].bool()
    # 1 for the tokens of every second sample; those samples have neighbours on both sides.
    second_L = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)]).to(device)
    for (precision, context), wanted in zip(runs, expected):
        may_be_tf32 = device.type == "cuda" and precision == torch.float32
        tolerances = TOLERANCE[torch.float16 if may_be_tf32 else precision]
        with context():
            again = _hidden_and_gradient(model, embedding, padded)
            *found, leak_BLD = _hidden_and_gradient(model, embedding, flattened, second_L)
        for what, tolerance, a, b, c in zip(("hidden states", "gradients"), tolerances, wanted, again, found):
            for batch, difference in (("flattened", row_error(c[0], a[own])), ("padded", row_error(b[own], a[own]))):
                if not difference <= tolerance:
                    return f"its {what} in {batch} batches come out different by {difference:.1e} ({precision})"
        # A second test, because the tolerance for half precision is larger than what some mixers leak between samples.
        if (leak_BLD[0][second_L == 0] != 0).any():
            return "its samples are not kept apart in flattened batches"
    return None


def probe_batches(
    vocabulary: int, device: torch.device, lengths: tuple[int, ...] = _LENGTHS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Samples of uneven lengths, padded and flattened."""
    rows = (torch.arange(1, sum(lengths) + 1) * 7919 % vocabulary).split(lengths)
    ones = [torch.ones_like(row) for row in rows]
    padded = {
        "input_ids": nn.utils.rnn.pad_sequence(list(rows), batch_first=True),
        "attention_mask": nn.utils.rnn.pad_sequence(ones, batch_first=True),
    }
    flattened = {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens": torch.tensor((0, *lengths)).cumsum(0).int(),
    }
    # Copies, because a compiler would treat views differently from the tensors of a collator.
    return {n: x.to(device, copy=True) for n, x in padded.items()}, {
        n: x.to(device, copy=True) for n, x in flattened.items()
    }


# Lengths of a probe's shared beginnings; and for each sample, which one it continues and its number of own tokens. Two
# neighbours are alike.
_FRONTS = (9, 11)
_BEHIND = ((0, 5), (1, 1), (1, 1), (-1, 6), (0, 12))


def _prefix_batches(vocabulary: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples with shared beginnings, padded and flattened. places [B, L]: a token's index in the flattened batch."""
    borders = [0, *accumulate((*_FRONTS, *(n for _, n in _BEHIND)))]
    ids, parts = torch.arange(1, borders[-1] + 1) * 7919 % vocabulary, [*map(torch.arange, borders, borders[1:])]
    behind = list(enumerate((front for front, _ in _BEHIND), len(_FRONTS)))
    rows = [parts[i] if front < 0 else torch.cat((parts[front], parts[i])) for i, front in behind]
    places = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    has_loss = torch.arange(borders[-1]) >= sum(_FRONTS)
    own = [(0 if front < 0 else _FRONTS[front], n) for front, n in _BEHIND]
    positions = [*map(torch.arange, _FRONTS), *(torch.arange(begin, begin + n) for begin, n in own)]
    padded = {
        "input_ids": ids[places],
        "attention_mask": mask,
        "places": places,
        "weights": mask * has_loss[places],
    }
    flattened = {
        "input_ids": ids[None],
        "position_ids": torch.cat(positions)[None],
        "cu_seq_lens": torch.tensor(borders, dtype=torch.int32),
        "places": torch.arange(borders[-1])[None],
        "weights": has_loss.long()[None],
    }
    moved: Any = [{name: x.to(device) for name, x in batch.items()} for batch in (padded, flattened)]
    return moved[0], moved[1] | {"continues": [front for front, _ in _BEHIND]}


def _by_place(x_BLD: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """[tokens, D]: for each place in the flattened batch, the sum over the samples that have it."""
    own = batch.get("attention_mask", torch.ones_like(batch["places"])).bool()
    places = batch["places"][own]
    return x_BLD.new_zeros(int(places.max()) + 1, x_BLD.shape[-1]).index_add_(0, places, x_BLD[own])


def _hidden_and_gradient(
    model: nn.Module, embedding: nn.Module, batch: Mapping[str, Any], chosen_L: Tensor | None = None
) -> list[Tensor]:
    """Hidden states; if a parameter is trained, also the gradients of the input embeddings. Each is [B, L, D].

    The gradients are of a sum over the tokens whose entry in `weights` is not 0. With `chosen_L`, the last result is
    the gradients of a sum over the tokens whose entry there is not 0, even if no parameter is trained.
    """
    trained = any(p.requires_grad for p in model.parameters())
    ids = batch["input_ids"]
    sums = [batch.get("weights", batch.get("attention_mask", torch.ones_like(ids)))] if trained else []
    sums += [] if chosen_L is None else [chosen_L[None]]
    with captured(embedding) as embeddings, torch.set_grad_enabled(bool(sums)):
        hidden_BLD = hidden_states(model, batch)
        # Each token has its own direction, the same in both batches; padding has 0.
        column = torch.arange(hidden_BLD.shape[-1], device=ids.device)
        direction_BLD = torch.cos(ids[..., None] + 1.7 * column)
        gradients = [
            torch.autograd.grad(
                (hidden_BLD * direction_BLD * mask[..., None]).sum(), embeddings[-1:], retain_graph=True
            )
            for mask in sums
        ]
    return [hidden_BLD.detach(), *(gradient_BLD for (gradient_BLD,) in gradients)]


@contextmanager
def captured(embedding: nn.Module, as_it_is: bool = False) -> Iterator[list[Tensor]]:
    """Collect a module's outputs as leaves that need gradients; with `as_it_is`, only those that needed them before."""
    outputs: list[Tensor] = []

    def capture(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        wanted = output.requires_grad if as_it_is else torch.is_grad_enabled()
        outputs.append(output.detach().requires_grad_(wanted))
        return outputs[-1]

    handle = embedding.register_forward_hook(capture)
    try:
        yield outputs
    finally:
        handle.remove()


def row_error(found_ND: Tensor, expected_ND: Tensor) -> float:
    """Mean over rows of the relative error. A row's norm counts as at least a hundredth of the largest row's."""
    found, expected = found_ND.double(), expected_ND.double()
    norms = expected.norm(dim=-1)
    return ((found - expected).norm(dim=-1) / norms.clamp(min=norms.max() / 100).clamp(min=1e-12)).mean().item()
