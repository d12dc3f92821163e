"""A batch as `transformers` models take it, prepared for the loss and the teacher.

Shape letters: B batch, L length, N rows with loss, D width.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..data import IGNORE_INDEX
from ..errors import UserError
from ..models import body_of, decoder_start, hidden_states, is_encoder_decoder

# Entries of a batch without padding that attention reads, besides the names in a body's own signature.
_OF_ATTENTION = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def with_rows(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Find a batch's rows with loss, and fill in what a model's own call would fill in.

    Args:
        model: the student, without wrappers.
        batch: input_ids and labels [B, L], and other inputs of the model. Labels of a causal language model are at
            their own tokens; those of an encoder-decoder model at the states that predict them. A batch of this
            library's `StepCollator` already has rows and labels.

    Returns:
        The batch with loss_rows [N]: indices among all tokens of the batch of those that predict a label, and
        loss_labels [N]: those labels. For an encoder-decoder model also with decoder_input_ids and both masks.

    Raises:
        UserError: input_ids or labels are missing, or do not fit each other.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"batch must be a mapping with input_ids and labels, got {type(batch).__name__}")
    for name in ("input_ids", "labels"):
        x = batch.get(name)
        if not isinstance(x, Tensor) or x.dim() != 2:
            got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            keys = ", ".join(map(str, batch)) or "nothing"
            raise UserError(f"batch[{name!r}] must be a tensor [batch, tokens], got {got} (the batch has {keys})")
    labels_BL, found = batch["labels"], dict(batch)
    of_two = is_encoder_decoder(model)
    if of_two:
        found.setdefault("decoder_input_ids", _decoder_input_ids(model, labels_BL))
        for name in ("", "decoder_"):
            found.setdefault(f"{name}attention_mask", torch.ones_like(found[f"{name}input_ids"]))
    states = found["decoder_input_ids" if of_two else "input_ids"]
    if states.shape != labels_BL.shape:
        what = "decoder_input_ids" if of_two else "input_ids"
        raise UserError(
            f"batch['labels'] has shape {tuple(labels_BL.shape)} and {what} {tuple(states.shape)}: they must be equal, "
            "with labels unshifted, as a transformers model takes them"
        )
    if "loss_rows" in batch:
        return found
    predicted_BL = labels_BL if of_two else nn.functional.pad(labels_BL[:, 1:], (0, 1), value=IGNORE_INDEX)
    predicted = predicted_BL.flatten()
    found["loss_rows"] = predicted.ne(IGNORE_INDEX).nonzero().squeeze(1)
    found["loss_labels"] = predicted[found["loss_rows"]]
    return found


def label_places(batch: Mapping[str, Any]) -> Tensor:
    """[N] indices of the labels with loss among all labels of a batch from `with_rows`."""
    # The library's own batches always shift labels, even for encoder-decoder models.
    shifts = "decoder_input_ids" not in batch or "loss_counts" in batch
    return batch["loss_rows"] + 1 if shifts else batch["loss_rows"]


def states_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Run a model without its head, on the inputs that its own call would read.

    Args:
        model: the model, without wrappers.
        batch: a batch from `with_rows`.

    Returns:
        [B, L, D].
    """
    if is_encoder_decoder(model) or "cu_seq_lens" in batch:
        return hidden_states(model, batch)
    body = body_of(model)
    read = _read_by(type(body).forward)
    inputs = {name: x for name, x in batch.items() if name in read}
    return body(**{**inputs, "use_cache": False, "return_dict": True}).last_hidden_state


def samples_of(batch: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """The tokenised samples of a batch, by which a teacher cache finds rows.

    Args:
        batch: input_ids and labels [B, L], with attention_mask [B, L] if there is padding; or joined rows [1, L] with
            position_ids, which are 0 where a sample begins.

    Returns:
        For each sample its input_ids and labels without padding.

    Raises:
        UserError: the batch is for an encoder-decoder model, or comes from this library's collator.
    """
    if "decoder_input_ids" in batch or "cu_seq_lens" in batch:
        raise UserError(
            "batch has no 'teacher', the rows of the teacher's cache, and its samples are not known: give the "
            "DataLoader collate_fn=StepCollator(collator, cache) (srd_fast.teacher)"
        )
    ids_BL, labels_BL = batch["input_ids"].cpu(), batch["labels"].cpu()
    if "position_ids" in batch and "attention_mask" not in batch:
        starts = (batch["position_ids"].cpu().flatten() == 0).nonzero().flatten().tolist()
        parts = [slice(a, b) for a, b in zip(starts, [*starts[1:], ids_BL.numel()])]
        pairs = [(ids_BL.flatten()[part], labels_BL.flatten()[part]) for part in parts]
    else:
        mask_BL = batch["attention_mask"].cpu().bool() if "attention_mask" in batch else torch.ones_like(ids_BL).bool()
        pairs = [(ids[mask], labels[mask]) for ids, labels, mask in zip(ids_BL, labels_BL, mask_BL)]
    return [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in pairs]


def _decoder_input_ids(model: Any, labels_BL: Tensor) -> Tensor:
    """[B, L] the labels shifted by one, after the start token, as the model's own call makes them."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels_BL)
    pad = model.config.pad_token_id or 0
    ids_BL = nn.functional.pad(labels_BL[:, :-1], (1, 0), value=decoder_start(model))
    return ids_BL.masked_fill(ids_BL == IGNORE_INDEX, pad)


@cache
def _read_by(forward: Callable[..., Any]) -> frozenset[str]:
    """Names of a batch's entries that a body's forward reads."""
    return frozenset(inspect.signature(forward).parameters) - {"labels"} | _OF_ATTENTION
