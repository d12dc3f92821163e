"""Encoder-decoder models: the encoder reads a prompt, and the decoder is a causal language model of its response.

The decoder's sequence is a start token and the response. State i predicts label i + 1, as in a sample of a causal
language model whose prompt is the start token.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..errors import UserError

# Relatives of T5 whose config lacks `scale_decoder_outputs` in some versions of transformers. They scale if heads are
# tied.
_SCALED_WHERE_TIED = ("switch_transformers", "umt5")
# What a decoder does to its logits: names in the config and of a buffer.
OF_DECODERS = ("scale_decoder_outputs", "final_logits_bias")


class SaysItsKind(Protocol):
    """A model's configuration, or something that stands in for a model, such as a cache of its rows.

    Attributes:
        is_encoder_decoder: whether it has an encoder and a decoder.
    """

    is_encoder_decoder: bool


def is_encoder_decoder(model: nn.Module | SaysItsKind) -> bool:
    """Whether a model has an encoder for the prompt and a decoder for the response.

    Args:
        model: a model, which may be a PEFT model, or an object with `is_encoder_decoder`.

    Returns:
        True for T5, BART and their like.
    """
    return bool(getattr(getattr(model, "config", model), "is_encoder_decoder", False))


def decoder_start(model: nn.Module) -> int | None:
    """The token that begins the decoder's sequence.

    Args:
        model: any model.

    Returns:
        Its id; None for a causal language model, which continues its prompt.

    Raises:
        UserError: the model has a decoder, but its configuration has no start token.
    """
    if not is_encoder_decoder(model):
        return None
    for config in (model.config, getattr(model, "generation_config", None)):
        start = getattr(config, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise UserError(
        f"the config of {type(model).__name__} has no decoder_start_token_id; set it to the token that its decoder "
        "starts with: T5 the pad token, BART </s>, mBART the code of the language to write"
    )


def decoder_output(inner: Any, batch: Mapping[str, Tensor]) -> Any:
    """Run a model without its head.

    Args:
        inner: an encoder-decoder model, without wrappers.
        batch: input_ids and attention_mask [B, P], the prompts; decoder_input_ids and decoder_attention_mask [B, L].

    Returns:
        What the decoder returns. Its `last_hidden_state`, after the final norm, is [B, L, D].

    Raises:
        UserError: the batch is one for a causal language model.
    """
    if "decoder_input_ids" not in batch:
        raise UserError(
            f"a batch for {type(inner).__name__} has no decoder_input_ids; an encoder-decoder model needs a "
            "data_collator that makes them, as DistillationCollator(decoder_start=...) does"
        )
    mask = batch["attention_mask"]
    # Encoder and decoder are called separately, because T5's body is the whole model, which computes logits.
    read = inner.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask, return_dict=True)
    return inner.get_decoder()(
        input_ids=batch["decoder_input_ids"],
        attention_mask=batch["decoder_attention_mask"],
        encoder_hidden_states=read.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
        return_dict=True,
    )


def with_decoder(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Use the samples of a probe as responses too, if the model has a decoder.

    Args:
        model: any model.
        batch: input_ids and attention_mask, each [B, L].

    Returns:
        The batch; for an encoder-decoder model with decoder_input_ids and decoder_attention_mask, each [B, L].
    """
    start = decoder_start(model)
    if start is None:
        return dict(batch)
    ids = nn.functional.pad(batch["input_ids"][:, :-1], (1, 0), value=start)
    return {**batch, "decoder_input_ids": ids, "decoder_attention_mask": batch["attention_mask"]}


def logits_bias(inner: Any) -> Tensor | None:
    """[V], the bias that BART and its relatives add to the logits outside of their head; None for other models."""
    bias = getattr(inner, "final_logits_bias", None)
    return bias.flatten() if isinstance(bias, Tensor) else None


def decoder_scale(config: Any) -> float:
    """The factor between a decoder's states and its head: width ** -0.5 for T5 with a tied head, else 1."""
    tied = getattr(config, "model_type", None) in _SCALED_WHERE_TIED and config.tie_word_embeddings
    scaled = getattr(config, "scale_decoder_outputs", tied)
    return float(config.d_model**-0.5) if scaled else 1.0


def check_same_kind(student: nn.Module | SaysItsKind, teacher: nn.Module | SaysItsKind) -> None:
    """Refuse a pair of an encoder-decoder model and a causal language model.

    Args:
        student: a model, or an object with `is_encoder_decoder`.
        teacher: the same.

    Raises:
        UserError: one of the two has an encoder and the other does not.
    """
    kinds = {True: "an encoder-decoder model", False: "a causal language model"}
    ours, theirs = is_encoder_decoder(student), is_encoder_decoder(teacher)
    if ours != theirs:
        raise UserError(
            f"the student is {kinds[ours]} and the teacher {kinds[theirs]}: they read a prompt in different ways, and "
            "their tokens would not correspond; take two models of one kind"
        )
