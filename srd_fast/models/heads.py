"""Take a causal language model apart into body and head, and prove on real tokens that both give its logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..losses import Head
from .encoder_decoder import decoder_scale, decoder_states, is_encoder_decoder, logits_bias, with_decoder
from .varlen import IMPLEMENTATION, flattened_forward, varlen_keywords

# Largest difference between rebuilt and own logits that rounding explains, relative to the largest logit.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, with the adapters in its layers; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def hidden_states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Hidden states after the final norm, as the head sees them.

    Args:
        model: a language model. `enable_flattening` says whether it takes flattened batches.
        batch: input_ids and attention_mask, each [B, L]; or a flattened batch: input_ids and position_ids, each [1, L],
            and cu_seq_lens [B + 1] int32, where each sample begins, then L. With sample_lengths, a list of B numbers,
            nothing waits for cu_seq_lens on a device. With continues, a list, the last len(continues) samples continue
            earlier ones: sample number continues[i], or none for -1 (see `unfit_for_shared_prefix`). For an
            encoder-decoder model input_ids and attention_mask of the prompts, and decoder_input_ids and
            decoder_attention_mask, each [B, L]. Other keys are not used.

    Returns:
        [B, L, D]; of a flattened batch, [1, L, D].
    """
    inner: Any = unwrap(model)
    if is_encoder_decoder(inner):
        return decoder_states(inner, batch)
    ids, options = batch["input_ids"], {"use_cache": False, "return_dict": True}
    if "cu_seq_lens" not in batch:
        return inner.base_model(input_ids=ids, attention_mask=batch["attention_mask"], **options).last_hidden_state
    implementation = inner.config._attn_implementation
    lengths, continues = batch.get("sample_lengths"), batch.get("continues")
    keywords = varlen_keywords(batch["cu_seq_lens"], ids.device, implementation, lengths, continues)
    if implementation == IMPLEMENTATION:
        # transformers looks in position_ids for samples, and waits for the answer, unless it gets a mask.
        keywords["attention_mask"] = torch.ones(1, 1, dtype=torch.bool, device=ids.device).expand_as(ids)
    with flattened_forward():
        out = inner.base_model(input_ids=ids, position_ids=batch["position_ids"], **options, **keywords)
    return out.last_hidden_state


def find_head(model: nn.Module, name: str = "model") -> Head:
    """The language-model head: weight, bias, softcap and scale, read from the modules and the config.

    Known names in the config are `logit_scale` (Cohere: a factor), `logits_scaling` (Granite: a divisor) and
    `final_logit_softcapping` (Gemma 2 and 3: a softcap) and `scale_decoder_outputs` (T5: a factor). BART's
    `final_logits_bias` is a bias. `check_head` finds anything else that a model does to its logits.

    Args:
        model: a causal language model.
        name: "student" or "teacher", for the message.

    Returns:
        The head.

    Raises:
        UserError: the model has no head, or one that cannot be taken out.
    """
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
    scale: float | None
    if is_encoder_decoder(inner):
        config, scale = getattr(inner.get_decoder(), "config", inner.config), decoder_scale(inner.config)
    else:
        config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
        scale = getattr(config, "logit_scale", None)
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        scale = 1.0 / config.logits_scaling
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = logits_bias(inner) if getattr(module, "bias", None) is None else module.bias
    return Head(module.weight, bias, softcap, 1.0 if scale is None else float(scale))


@torch.no_grad()
def check_head(model: nn.Module, name: str) -> None:
    """Compare head(hidden states) with the model's own logits on a few tokens.

    Args:
        model: a causal language model, in any dtype, on any device. Its mode does not change.
        name: "student" or "teacher", for the message.

    Raises:
        UserError: the two differ by more than rounding. The model then does something unknown to its logits, and a loss
            from its hidden states would be that of another model.
    """
    inner: Any = unwrap(model)
    head = find_head(model, name)
    assert head.weight is not None
    device, was_training = head.weight.device, model.training
    model.eval()
    vocabulary = min(head.weight.shape[0], inner.get_input_embeddings().weight.shape[0])
    input_ids = (torch.arange(1, 13, device=device) * 7919 % vocabulary).view(2, 6)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if is_encoder_decoder(inner):
        batch["attention_mask"][1, 4:] = 0  # one that wants its mask in another form is found out too
        batch = with_decoder(inner, batch)
    try:
        own = inner(**batch, use_cache=False).logits
        rebuilt = head.project(hidden_states(model, batch).flatten(0, 1)).view_as(own)
    except (RuntimeError, AttributeError, TypeError) as e:
        raise UserError(f"{name} {type(inner).__name__}: cannot rebuild its logits from its hidden states: {e}") from e
    finally:
        model.train(was_training)
    if not own.isfinite().all():
        raise UserError(
            f"{name} {type(inner).__name__}: its logits of a few tokens are not finite: its weights are damaged, or "
            f"{own.dtype} is too narrow for them; load it in bfloat16 or float32, or take another checkpoint"
        )
    if head.softcap is not None:
        rebuilt = head.softcap * torch.tanh(rebuilt / head.softcap)
    own, rebuilt = own.float(), rebuilt.float()
    difference = ((own - rebuilt).abs().max() / own.abs().max().clamp(min=1e-6)).item()
    if not difference <= _TOLERANCE.get(head.weight.dtype, 5e-2):
        ratio = (own.flatten() @ rebuilt.flatten() / rebuilt.flatten().square().sum()).item()
        raise UserError(
            f"{name} {type(inner).__name__}: its hidden states times its head differ from its own logits by "
            f"{difference:.1e} of the largest logit (best single factor between them: {ratio:.4g}). It changes its "
            "logits in a way not known here (known: bias, final_logits_bias, final_logit_softcapping, logit_scale, "
            "logits_scaling, scale_decoder_outputs), so "
            "training from hidden states would train another model; use distillation_loss_from_logits for it"
        )
