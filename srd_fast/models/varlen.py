"""Attention within the samples of a flattened batch: transformers' attention implementation `srd_varlen`.

With `cu_seq_lens_q`, a forward pass attends causally within each sample, and never makes a mask of the whole batch.
Without it (padded batches, generation), both mask and attention are those of transformers' `sdpa`.

In a compiled layer, a flattened batch is one opaque operation: torch's kernel or `srd_fast::attend_in_samples`. It
reads the lengths when it runs, so one graph serves batches of all lengths.

One file, because it is one operation: mask, attention, and the same compiled, forward and backward.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import accumulate, groupby, pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def _torch_kernel() -> Callable[..., Any] | None:
    """torch's flash attention, if this torch has it with windows, else None.

    `torch.nn.attention.varlen.varlen_attn` calls the same kernel through Python code. With that code, attention took an
    eighth of the host's time in a compiled step of Qwen2.5 0.5B beside an H100.
    """
    kernel = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if kernel is None or not hasattr(kernel, "default"):
        return None
    names = {argument.name for argument in kernel.default._schema.arguments}
    return kernel.default if {"scale", "window_size_left", "window_size_right"} <= names else None


IMPLEMENTATION = "srd_varlen"
_KERNEL = _torch_kernel()
_HALF = (torch.float16, torch.bfloat16)
# True inside the forward pass of a flattened batch. It only saves masks and refuses layers without the keywords. Which
# token sees which depends only on the keywords, which gradient checkpointing passes on to the recomputation.
_in_flattened_forward: ContextVar[bool] = ContextVar("in_flattened_forward", default=False)


@contextmanager
def flattened_forward() -> Iterator[None]:
    """Mark the forward pass of a flattened batch: no masks, and every attention layer must get `cu_seq_lens_q`."""
    token = _in_flattened_forward.set(True)
    try:
        yield
    finally:
        _in_flattened_forward.reset(token)


def varlen_keywords(
    cu_seq_lens: Tensor,
    device: torch.device,
    implementation: str,
    sample_lengths: list[int] | None = None,
    continues: list[int] | None = None,
) -> dict[str, Any]:
    """Make the keywords of the model's forward that tell its attention layers about a flattened batch.

    Args:
        cu_seq_lens: [B + 1] int32, where each sample begins, then the total.
        device: the model's device.
        implementation: the model's attention implementation. Flash attention takes only its own keywords.
        sample_lengths: the B lengths. Without them this waits for cu_seq_lens, unless that is on the CPU.
        continues: for each of the last samples, the number of the sample that it continues, or -1.

    Returns:
        The keywords.

    Raises:
        ValueError: the implementation cannot take `continues`.
    """
    lengths = cu_seq_lens.diff().tolist() if sample_lengths is None else sample_lengths
    longest, starts = max(lengths), cu_seq_lens.to(device, torch.int32, non_blocking=True)
    keywords = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    if implementation != IMPLEMENTATION:
        if continues:
            raise ValueError(f"in {implementation} no sample can see the keys of another")
        return keywords
    if continues:
        keywords |= {"continues": continues, "continues_on_host": torch.tensor(continues, dtype=torch.int32)}
    on_host = starts if starts.device.type == "cpu" else torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return keywords | {"sample_lengths": lengths, "starts_on_host": on_host}


def varlen_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers' `sdpa` gets. For a flattened batch: None, or the window of a sliding-window layer.

    The window is the last size of an int64 tensor [1, 1, 1, window] in place of the mask: a shape can be read without
    waiting for a device, and a compiler treats it as a number that may vary.

    Raises:
        ValueError: a flattened batch needs a mask that is neither causal nor a sliding window.
    """
    if not _in_flattened_forward.get():
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)
    window, config = kwargs.get("local_size"), kwargs.get("config")
    if kwargs.get("use_vmap") or kwargs.get("allow_is_bidirectional_skip"):
        raise ValueError("its mask is more than causal")
    if window is None:
        return None
    if getattr(config, "attention_chunk_size", None) is not None or getattr(config, "sliding_window", None) != window:
        raise ValueError("its mask is local and no sliding window")
    return torch.empty(1, 1, 1, 1, dtype=torch.int64, device=kwargs.get("device")).expand(1, 1, 1, window)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sample_lengths: list[int] | None = None,
    starts_on_host: Tensor | None = None,
    continues: list[int] | None = None,
    continues_on_host: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample.

    Args:
        module: the attention layer.
        query: [1, heads, L, D].
        key: [1, key heads, L, D].
        value: [1, key heads, L, D_v].
        attention_mask: from `varlen_mask`. A whole mask is used as `sdpa` uses it.
        dropout: probability, 0 outside of training.
        scaling: factor on the products. Default: 1 / sqrt(D).
        cu_seq_lens_q: [B + 1] int32, where each sample begins, then L. Without it this is `sdpa`.
        max_length_q: the longest length.
        sample_lengths: all lengths, so that nothing waits for the device.
        starts_on_host: cu_seq_lens_q on the CPU, for the same reason.
        continues: for each of the last samples, the number of the sample that it continues and attends to, or -1.
        continues_on_host: the same as an int32 tensor on the CPU.
        **kwargs: what else transformers gives to attention layers.

    Returns:
        [1, L, heads, D_v], and None.

    Raises:
        ValueError: the layer has what a flattened batch cannot have: softcap, sinks, position bias, or attention that
            is not causal; or samples continue others on a GPU whose kernel cannot do that.
    """
    compiling = torch.compiler.is_compiling()
    flattened = not compiling and _in_flattened_forward.get()
    if flattened and cu_seq_lens_q is None:
        raise ValueError("its attention does not get the keywords of its forward")
    whole_mask = attention_mask is not None and attention_mask.dtype != torch.int64
    if flattened and whole_mask:
        raise ValueError("it makes masks of its own")
    if cu_seq_lens_q is None or whole_mask:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    _check_causal_self_attention(module, query, key, kwargs)
    window = None if attention_mask is None else attention_mask.shape[-1]
    if _has_kernel(query, value, dropout):
        if continues_on_host is not None:
            raise ValueError("in torch's variable-length attention no sample can see the keys of another")
        longest = max(_lengths(cu_seq_lens_q)) if max_length_q is None else max_length_q
        # Not in a compiled layer, which would be compiled once for each answer.
        if not compiling and window is not None and window >= longest:
            window = None
        return _attend_in_kernel(query, key, value, cu_seq_lens_q, longest, scaling, window), None
    if compiling:
        dtype = _kernel_dtype(query)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        starts = cu_seq_lens_q if starts_on_host is None else starts_on_host
        fronts = starts.new_empty(0) if continues_on_host is None else continues_on_host
        options = 0 if window is None else window, scaling, dropout, fronts
        return _attend_in_samples(q, k, v, starts, *options)[0], None
    lengths = _lengths(cu_seq_lens_q) if sample_lengths is None else sample_lengths
    return _attend_by_length(query, key, value, lengths, window, scaling, dropout, continues), None


def _lengths(starts: Tensor) -> list[int]:
    return [end - start for start, end in pairwise(starts.tolist())]


def _attend_by_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window: int | None,
    scaling: float | None,
    dropout: float,
    continues: list[int] | None = None,
) -> Tensor:
    """`varlen_attention` by `sdpa`: one call for each run of samples with the same length and the same beginning."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    groups: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
    # The backward of split is one concatenation; that of slices is a zero-filled copy of the batch for each sample.
    # Samples that others continue come first, each as a run of its own.
    fronts = len(lengths) - len(continues) if continues else 0
    goes_on = [*range(-2, -2 - fronts, -1), *continues] if continues else [-1] * len(lengths)
    runs = [(n, front, len(list(run))) for (n, front), run in groupby(zip(lengths, goes_on))]
    parts = [x.split([n * count for n, _, count in runs], dim=2) for x in (query, key, value)]
    outputs = []
    for (n, front, count), *part in zip(runs, *parts):
        q, k, v = (x[0].unflatten(1, (count, n)).transpose(0, 1) for x in part)
        before = lengths[front] if front >= 0 else 0
        if before:
            k, v = (torch.cat((x[front].expand(count, -1, -1, -1), own), 2) for x, own in zip(parts[1:], (k, v)))
        whole = window is None or before + n <= window
        band = None if whole and not before else _band(n, before, None if whole else window, q.device)
        out = sdpa(groups, q, k, v, band, dropout=dropout, scaling=scaling, is_causal=True)[0]
        outputs.append(out.flatten(0, 1))
    return torch.cat(outputs)[None]


def _check_causal_self_attention(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    extras = [n for n in ("softcap", "s_aux", "position_bias", "cache") if kwargs.get(n) is not None]
    if extras:
        raise ValueError(f"its attention has {' and '.join(extras)}")
    given = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if given is None else given):
        raise ValueError("its attention is not causal")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(f"queries {tuple(query.shape)} and keys {tuple(key.shape)} are not those of a flattened batch")


def _band(n: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, n, before + n], True where a token sees another: itself and earlier ones, at most `window` in all."""
    seen = torch.ones(n, before + n, dtype=torch.bool, device=device).tril_(before)
    return (seen if window is None else seen.triu_(before + 1 - window))[None, None]


def _kernel_dtype(query: Tensor) -> torch.dtype:
    """The dtype in which scaled_dot_product_attention would run. Autocast casts its inputs, but not a custom op's."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _has_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length flash attention can take these."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and torch.version.hip is None
        and _KERNEL is not None
        and dropout == 0
        and _kernel_dtype(query) in _HALF
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and _is_ampere_or_newer(query.device)
    )


@torch.compiler.assume_constant_result
def _is_ampere_or_newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_in_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """`varlen_attention` by torch's kernel. Its window (left, 0) is `left` tokens before the current one; -1 is all."""
    assert _KERNEL is not None
    dtype, left = _kernel_dtype(query), -1 if window is None else window - 1
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    starts = cu_seq_lens.to(query.device)
    options: dict[str, Any] = {"scale": scaling, "window_size_left": left, "window_size_right": 0}
    # No dropout, and no debugging mask. The causal kernel is a separate one, without a window.
    return _KERNEL(q, k, v, starts, starts, longest, longest, 0.0, left == -1, False, **options)[0][None]


@torch.library.custom_op("srd_fast::attend_in_samples", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _attend_in_samples(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    window: int,
    scaling: float | None,
    dropout: float,
    continues: Tensor,
) -> tuple[Tensor, Tensor]:
    """`_attend_by_length` as one operation that compilers do not look into.

    Args:
        query: [1, heads, L, D].
        key: [1, key heads, L, D].
        value: [1, key heads, L, D_v].
        starts: [B + 1] int32, where each sample begins, then L. If it is on the CPU, nothing waits for it.
        window: tokens that a token sees; 0 for all.
        scaling: factor on the products, or None.
        dropout: probability.
        continues: for each of the last samples, the number of the sample that it continues, or -1; empty if none does.

    Returns:
        [1, L, heads, D_v], and the state of the random numbers before dropout, which is empty without dropout.
    """
    state = _random_state(query.device) if dropout else torch.empty(0, dtype=torch.uint8)
    return _attend_by_length(
        query, key, value, _lengths(starts), window or None, scaling, dropout, continues.tolist()
    ), state


@_attend_in_samples.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    window: int,
    scaling: float | None,
    dropout: float,
    continues: Tensor,
) -> tuple[Tensor, Tensor]:
    _, heads, length, _ = query.shape
    states = len(_random_state(query.device)) if dropout else 0
    state = torch.empty(states, dtype=torch.uint8, device="cpu")
    return query.new_empty(1, length, heads, value.shape[-1]), state


# Not a custom_op, because autograd would not record what runs inside it.
torch.library.define(
    "srd_fast::attend_in_samples_backward",
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor starts, Tensor state, SymInt window,"
    " float? scaling, float dropout, Tensor continues) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("srd_fast::attend_in_samples_backward", "default")
def _attend_in_samples_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    state: Tensor,
    window: int,
    scaling: float | None,
    dropout: float,
    continues: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. The forward pass runs again, which is little work compared to a layer's."""
    now = _random_state(query.device) if dropout else None
    try:
        if dropout:
            _set_random_state(query.device, state)
        with _recording(), torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
            out = _attend_by_length(q, k, v, _lengths(starts), window or None, scaling, dropout, continues.tolist())
    finally:
        if now is not None:
            _set_random_state(query.device, now)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), gradient)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@torch.library.register_fake("srd_fast::attend_in_samples_backward")
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    state: Tensor,
    window: int,
    scaling: float | None,
    dropout: float,
    continues: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    return dq, dk, dv


def _recording() -> AbstractContextManager[Any]:
    """Let autograd record below a dispatch mode, which otherwise disables it."""
    shut_out = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    guard: Any = torch._C._ForceDispatchKeyGuard
    return guard(torch._C._dispatch_tls_local_include_set(), shut_out)


def _random_state(device: torch.device) -> Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, starts, *ctx.options, continues = inputs
    ctx.save_for_backward(query, key, value, starts, output[1], continues)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *saved, continues = ctx.saved_tensors
    gradients = torch.ops.srd_fast.attend_in_samples_backward(gradient, *saved, *ctx.options, continues)
    return *gradients, None, None, None, None, None


_attend_in_samples.register_autograd(_backward, setup_context=_keep_for_backward)

AttentionInterface.register(IMPLEMENTATION, varlen_attention)
AttentionMaskInterface.register(IMPLEMENTATION, varlen_mask)
