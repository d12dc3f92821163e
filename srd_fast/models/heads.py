"""Take a language model apart into body and head, and prove on real tokens that both give its logits."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..losses import Head, head_of
from .encoder_decoder import (
    OF_DECODERS,
    decoder_output,
    decoder_scale,
    is_encoder_decoder,
    logits_bias,
    with_decoder,
)
from .varlen import IMPLEMENTATION, flattened_forward, varlen_keywords
from .wrapping import DTensor, call_through, whole_shape

# Names in configs of a factor on the logits, a divisor and a softcap, with an example of a model for each.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, Inkling
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_DIVISOR_IS_FACTOR = ("hyperclovax",)
# Tokens with which both rows of `check_head` begin.
_ALIKE = 4
# Largest relative difference that rounding can explain, between rebuilt and own logits and between hidden states.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

R = TypeVar("R")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a compiled or PEFT model, with the adapters in its layers; others unchanged."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head; the model itself if it lacks the base model that it names (Llama 4)."""
    inner: Any = unwrap(model)
    return inner.base_model if inner.base_model is not inner else getattr(inner, "model", inner)


def embeddings_of(model: nn.Module) -> int:
    """How many tokens a model has input embeddings for."""
    inner: Any = unwrap(model)
    return whole_shape(inner.get_input_embeddings().weight)[0]


def classes_of(model: nn.Module, name: str = "model") -> int:
    """How many classes a model's head has. Arguments and errors are those of `find_head`."""
    return whole_shape(head_module(model, name).weight)[0]


def hidden_states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Hidden states after the final norm, as the head sees them: those of `body_output`.

    Args:
        model: a causal language model.
        batch: as `body_output` takes it.

    Returns:
        [B, L, D]; of a flattened batch, [1, L, D].
    """
    return body_output(model, batch).last_hidden_state


def body_output(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """Run a model without its head.

    Args:
        model: a language model. `enable_flattening` says whether it takes flattened batches.
        batch: input_ids and attention_mask, each [B, L]; or a flattened batch: input_ids and position_ids, each [1, L],
            and cu_seq_lens [B + 1] int32, where each sample begins, then L. sample_lengths, a list of B numbers, saves
            a wait for cu_seq_lens on a GPU. With continues, a list, the last len(continues) samples continue earlier
            ones: sample number continues[i], or none for -1 (see `unfit_for_shared_prefix`). For an encoder-decoder
            model: input_ids and attention_mask of the prompts, and decoder_input_ids and decoder_attention_mask, each
            [B, L]. Other keys are not used.

    Returns:
        What the model's body returns. Its `last_hidden_state` is [B, L, D], of a flattened batch [1, L, D]; with
        `output_router_logits` in the model's config it has `router_logits`.
    """
    inner: Any = unwrap(model)
    if is_encoder_decoder(inner):
        return decoder_output(inner, batch)
    ids, options = batch["input_ids"], {"use_cache": False, "return_dict": True}
    if "cu_seq_lens" not in batch:
        return body_of(inner)(input_ids=ids, attention_mask=batch["attention_mask"], **options)
    implementation = inner.config._attn_implementation
    lengths, continues = batch.get("sample_lengths"), batch.get("continues")
    keywords = varlen_keywords(batch["cu_seq_lens"], ids.device, implementation, lengths, continues)
    if implementation == IMPLEMENTATION:
        # Without a mask, transformers would search position_ids for samples, which waits for a GPU.
        keywords["attention_mask"] = torch.ones(1, 1, dtype=torch.bool, device=ids.device).expand_as(ids)
    with flattened_forward():
        return body_of(inner)(input_ids=ids, position_ids=batch["position_ids"], **options, **keywords)


def find_head(model: nn.Module, name: str = "model") -> Head:
    """The language-model head: weight, bias, softcap and scale, read from the modules and the config.

    The known names in configs are at the top of this file. `check_head` detects anything else that a model does to its
    logits.

    Args:
        model: a causal language model.
        name: "student" or "teacher", for the message.

    Returns:
        The head.

    Raises:
        UserError: the model has no head, or one that cannot be taken out.
    """
    head = head_as_it_lies(model, name)
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):  # in shards also in the call, as tensor parallelism leaves it
        weight, bias = weight.full_tensor(), bias.full_tensor() if isinstance(bias, DTensor) else bias
    if weight is None or weight.shape != whole_shape(weight) or weight.dim() != 2:
        raise UserError(
            f"{name} {type(unwrap(model)).__name__}: its head lies in shards here (a weight of "
            f"{tuple(() if weight is None else weight.shape)}), and is whole only inside of the model's own call; pass "
            "a model that is not sharded yet"
        )
    return replace(head, weight=weight, bias=bias)


def head_as_it_lies(model: nn.Module, name: str = "model") -> Head:
    """`find_head` for weight and bias in any state: they may be DTensors, parts of a weight, or without storage."""
    inner: Any = unwrap(model)
    module = head_module(model, name)
    scale, bias = 1.0, getattr(module, "bias", None)
    if is_encoder_decoder(inner):
        config = getattr(inner.get_decoder(), "config", inner.config)
        scale, bias = decoder_scale(inner.config), logits_bias(inner) if bias is None else bias
    else:
        config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    factors, divisors = _numbers(config, _FACTORS), _numbers(config, _DIVISORS)
    if getattr(config, "model_type", None) in _DIVISOR_IS_FACTOR:
        factors, divisors = [*factors, *divisors], []
    softcap = next(iter(_numbers(config, _SOFTCAPS)), None)
    return Head(module.weight, bias, softcap, scale * math.prod(factors) / math.prod(divisors))


def through_head(model: nn.Module, use: Callable[[Head, Tensor], R], hidden_ND: Tensor, name: str = "model") -> R:
    """Run `use(head, hidden_ND)` inside the call of the head's module.

    If a wrapper such as FSDP shards the head, it is whole inside that call, and its gradient goes back to the shards. A
    head that is sharded even there stays so, and all processes that share it call this together: with the same rows in
    a tensor-parallel model, with rows of their own after `divide_vocabulary`.

    Args:
        model: a causal language model; if it is sharded, inside its own call (see `call_through`).
        use: as `call_through` takes it.
        hidden_ND: [N, D] hidden states.
        name: as for `find_head`.

    Returns:
        What `use` returns.

    Raises:
        UserError: as `find_head`.
    """
    return _inside_head(model, lambda x: use(_head_in_call(model, name), x), hidden_ND, name)


def _inside_head(model: nn.Module, use: Callable[[Tensor], R], hidden_ND: Tensor, name: str) -> R:
    outer = head_module(model, name)
    *_, inner = (m for m in outer.modules() if getattr(m, "weight", None) is outer.weight)
    return call_through(outer, inner, use, hidden_ND)


def _head_in_call(model: nn.Module, name: str) -> Head:
    """A model's head inside of its call: whole, or this process's shard."""
    head = head_as_it_lies(model, name)
    if not isinstance(head.weight, DTensor):
        return find_head(model, name)
    own = any(getattr(m, "own_rows", False) for m in head_module(model, name).modules())
    rows, gradient = ("own", 1 / head.weight.device_mesh.size()) if own else ("same", 1.0)
    return head_of(head.weight, head.bias, head.softcap, head.scale, rows=rows, head_gradient=gradient)


def head_module(model: nn.Module, name: str = "model") -> Any:
    """The module of a model's head, including peft's wrapper if there is one."""
    inner: Any = unwrap(model)
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise UserError(
            f"{name} {type(inner).__name__} has no language-model head (get_output_embeddings() gives {module!r}); "
            "pass a causal language model, e.g. from AutoModelForCausalLM.from_pretrained"
        )
    if hasattr(module, "base_layer"):
        raise UserError(
            f"{name} {type(inner).__name__}: its head carries an adapter ({type(module).__name__}), which a loss from "
            "hidden states and the head's weight would miss; take it out of target_modules, or use modules_to_save"
        )
    return module


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    """The values of those `names` in a config that are numbers."""
    values = (getattr(config, name, None) for name in names)
    return [float(x) for x in values if isinstance(x, (int, float))]


@torch.no_grad()
def check_head(model: nn.Module, name: str, head: Head | None = None, device: torch.device | None = None) -> None:
    """Try a model on a few tokens: it must be causal, and head(hidden states) must be its own logits.

    Args:
        model: a causal language model, in any dtype, on any device. Its mode does not change.
        name: "student" or "teacher", for the message.
        head: the model's whole head, if the model itself has only a part of it.
        device: where its inputs go. Default: where the head is.

    Raises:
        UserError: the hidden state of a token changes with a later token, so the model would see the labels that it
            should predict; or head(hidden states) differs from the model's logits by more than rounding, so the loss
            would train another model.
    """
    inner: Any = unwrap(model)
    who = f"{name} {type(inner).__name__}"
    weight = head_module(model, name).weight if head is None else head.weight
    assert weight is not None
    device, was_training = device or weight.device, model.training
    tolerance = _TOLERANCE.get(weight.dtype, 5e-2)
    vocabulary = min(classes_of(model, name), embeddings_of(model))
    ids = torch.arange(1, 13, device=device) * 7919 % vocabulary
    # Two rows that begin alike and continue differently.
    input_ids = torch.stack((ids[:8], torch.cat((ids[:_ALIKE], ids[-(8 - _ALIKE) :]))))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if is_encoder_decoder(inner):
        # One prompt has padding, so that a model that needs another kind of mask fails here.
        batch = {**with_decoder(inner, batch), "input_ids": ids[:8].expand(2, 8)}
        batch["attention_mask"] = (torch.arange(8, device=device) < 6).long().expand(2, 8)

    def rebuild(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        states_BLD = hidden_states(model, batch)
        if head is None:
            of_head = _inside_head(model, lambda x: _logits(find_head(model, name), x), states_BLD.flatten(0, 1), name)
            return states_BLD, of_head
        states_BLD = states_BLD.to(weight.device)
        return states_BLD, _logits(head, states_BLD.flatten(0, 1))

    model.eval()
    try:
        if head is None:
            own = inner(**batch, use_cache=False).logits
            states_BLD, rebuilt = call_through(inner, inner, rebuild, batch)
        else:  # perhaps inside of the model's call already
            own = inner.forward(**batch, use_cache=False).logits.to(weight.device)
            states_BLD, rebuilt = rebuild(batch)
        rebuilt = rebuilt.view_as(own)
    except (RuntimeError, AttributeError, TypeError, ValueError) as e:
        raise UserError(f"{who}: cannot rebuild its logits from its hidden states: {first_line(e)}") from e
    finally:
        model.train(was_training)
    if not own.isfinite().all():
        raise UserError(
            f"{who}: its logits of a few tokens are not finite: its weights are damaged, or {own.dtype} is too narrow "
            "for them; load it in bfloat16 or float32, or take another checkpoint"
        )
    change = _change(*states_BLD[:, :_ALIKE].float())
    if not change <= tolerance:
        raise UserError(
            f"{who} is not causal: the hidden states of earlier tokens change with a later token, by {change:.1e} of "
            "their size, so it sees the labels that it should predict; take a decoder, such as the models that "
            "AutoModelForCausalLM is for (of BERT and its like, with is_decoder in the config)"
        )
    own, rebuilt = own.float(), rebuilt.float()
    difference = ((own - rebuilt).abs().max() / own.abs().max().clamp(min=1e-6)).item()
    if not difference <= tolerance:
        ratio = (own.flatten() @ rebuilt.flatten() / rebuilt.flatten().square().sum()).item()
        known = ", ".join(("bias", *_SOFTCAPS, *_FACTORS, *_DIVISORS, *OF_DECODERS))
        raise UserError(
            f"{who}: its hidden states times its head differ from its own logits by {difference:.1e} of the largest "
            f"logit (best single factor between them: {ratio:.4g}). It changes its logits in a way not known here "
            f"(known: {known}), so training from hidden states would train another model; use "
            "distillation_loss_from_logits for it"
        )


def _logits(head: Head, hidden_ND: Tensor) -> Tensor:
    logits_NV = head.project(hidden_ND)
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def _change(one_LD: Tensor, other_LD: Tensor) -> float:
    """The largest relative change of a token's state. Sizes are means, in which one huge entry hides no change."""
    return ((one_LD - other_LD).abs().mean(1) / one_LD.abs().mean(1).clamp(min=1e-6)).max().item()
