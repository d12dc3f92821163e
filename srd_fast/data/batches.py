"""Batches of tokenised samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..models import shared_starts
from .columns import IGNORE_INDEX, first_label

# Column of a sample's weight in the loss, if samples differ in it.
WEIGHT = "weight"


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """[B, L] int64; shorter rows are filled at the end with `value`."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


@dataclass
class DistillationCollator:
    """Makes batches of tokenised samples: padded at the end, or with `flatten` joined one after the other.

    Padded: input_ids, attention_mask, labels, each [B, L]. The attention mask comes from lengths, never from the pad
    id, which may be the EOS id.

    Flattened: input_ids, position_ids (from 0 in each sample), labels, each [1, L] with L the sum of the lengths, and
    cu_seq_lens [B + 1] int32: where each sample begins, then L. There is no attention_mask.

    Labels are at the positions of their own tokens and are shifted by one later. The first token of a sample cannot be
    predicted. In a flattened batch its label is therefore always -100, so that no sample predicts the next one.

    With `share_prefix`, tokens with which several samples of a flattened batch begin, such as those of a prompt
    template, are stored only once. All such beginnings come before all samples, which keep their order. cu_seq_lens
    counts a beginning as a sample of its own; continues, a list [B], has the number of each sample's beginning, or -1.
    A beginning ends before the token that predicts a first label, so it has no loss.

    With `decoder_start`, a padded batch has the prompts as input_ids and attention_mask [B, P], and the responses
    after that token as decoder_input_ids, decoder_attention_mask and labels [B, L].

    Args:
        pad_token_id: fills padded input_ids, which the mask hides; any id for which the model has an embedding.
        flatten: join samples instead of padding them.
        share_prefix: with `flatten`, store common beginnings once.
        decoder_start: `models.decoder_start` of an encoder-decoder model; None for a causal language model.
    """

    pad_token_id: int = 0
    flatten: bool = False
    share_prefix: bool = False
    decoder_start: int | None = None

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of tokenised samples."""
        if self.decoder_start is not None:
            return self._of_two_parts(samples, self.decoder_start)
        ids = [s["input_ids"] for s in samples]
        if self.flatten:
            return self._flattened([np.asarray(x, np.int64) for x in ids], [s["labels"] for s in samples])
        return {
            "input_ids": pad_right(ids, self.pad_token_id),
            "attention_mask": pad_right([[1] * len(x) for x in ids], 0),
            "labels": pad_right([s["labels"] for s in samples], IGNORE_INDEX),
        }

    def _of_two_parts(self, samples: Sequence[Mapping[str, Any]], start: int) -> dict[str, torch.Tensor]:
        prompts, responses, labels = [], [], []
        for sample in samples:
            ids, of_sample = sample["input_ids"], sample["labels"]
            length = first_label(of_sample)
            prompts.append(ids[:length])
            responses.append([start, *ids[length:]])
            labels.append([IGNORE_INDEX, *of_sample[length:]])
        return {
            "input_ids": pad_right(prompts, self.pad_token_id),
            "attention_mask": pad_right([[1] * len(x) for x in prompts], 0),
            "decoder_input_ids": pad_right(responses, self.pad_token_id),
            "decoder_attention_mask": pad_right([[1] * len(x) for x in responses], 0),
            "labels": pad_right(labels, IGNORE_INDEX),
        }

    def _flattened(self, ids: list[np.ndarray], labels: list[Sequence[int]]) -> dict[str, Any]:
        starts, continues = _shared(ids, labels) if self.share_prefix else ([], [-1] * len(ids))
        begins = [len(starts[k]) if k >= 0 else 0 for k in continues]
        parts = [*starts, *(x[n:] for x, n in zip(ids, begins))]
        positions = [np.arange(len(x)) for x in starts] + [np.arange(n, len(x)) for x, n in zip(ids, begins)]
        borders = np.cumsum([0, *map(len, parts)], dtype=np.int32)
        labels_L = np.concatenate(
            [
                *(np.full(len(x), IGNORE_INDEX) for x in starts),
                *(np.asarray(y, np.int64)[n:] for y, n in zip(labels, begins)),
            ]
        )
        labels_L[borders[:-1]] = IGNORE_INDEX
        batch = {
            "input_ids": torch.from_numpy(np.concatenate(parts))[None],
            "position_ids": torch.from_numpy(np.concatenate(positions))[None],
            "labels": torch.from_numpy(labels_L)[None],
            "cu_seq_lens": torch.from_numpy(borders),
        }
        return {**batch, "continues": continues} if starts else batch


def _shared(ids: list[np.ndarray], labels: list[Sequence[int]]) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of each common beginning, and for each sample the number of its beginning, or -1."""
    # The token before a first label predicts it, so it stays with its sample. So each sample keeps at least one token.
    prompts = [x[: max(0, min(len(x), first_label(y)) - 1)].tolist() for x, y in zip(ids, labels)]
    *groups, _ = shared_starts(prompts, least_rows=2)
    continues = [-1] * len(ids)
    for k, (_, members) in enumerate(groups):
        for i in members:
            continues[i] = k
    return [np.asarray(start, np.int64) for start, _ in groups], continues


def with_borders(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the batch of any collator to one of the two forms of `DistillationCollator`.

    A batch with position_ids and no attention_mask is a flattened one, such as those of
    `transformers.DataCollatorWithFlattening`: a sample begins where a position is 0. One with neither has no padding.

    Args:
        batch: input_ids and labels [B, L] on the CPU.

    Returns:
        The batch, with attention_mask [B, L], or with cu_seq_lens [B + 1] int32.
    """
    if "attention_mask" in batch or "cu_seq_lens" in batch:
        return dict(batch)
    if "position_ids" not in batch:
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    positions_L = batch["position_ids"].flatten()
    starts = (positions_L == 0).nonzero().flatten()
    labels_L = batch["labels"].flatten().clone()
    labels_L[starts] = IGNORE_INDEX
    return {
        **batch,
        "labels": labels_L[None],
        "cu_seq_lens": torch.cat((starts, starts.new_tensor([len(positions_L)]))).int(),
    }


def with_loss_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a batch what a step needs on the host, so that it never has to wait for the device.

    Args:
        batch: labels [B, L] on the CPU; of a flattened batch [1, L], with cu_seq_lens.

    Returns:
        The batch with loss_rows [N] int64: indices among all tokens of the batch of those that predict a label other
        than -100; loss_labels [N] int64: those labels; loss_counts: a list of each sample's number of them; and for a
        flattened batch sample_lengths, a list with shared beginnings first.
    """
    labels_BL = batch["labels"].numpy()
    has_loss_BL = labels_BL[:, 1:] != IGNORE_INDEX
    rows_N = np.flatnonzero(np.pad(has_loss_BL, ((0, 0), (0, 1))))
    labels_N = labels_BL.reshape(-1)[rows_N + 1]
    added = {"loss_rows": torch.from_numpy(rows_N), "loss_labels": torch.from_numpy(labels_N)}
    if "cu_seq_lens" not in batch:
        return {**batch, **added, "loss_counts": has_loss_BL.sum(1).tolist()}
    starts = batch["cu_seq_lens"].numpy()
    # A row belongs to the sample whose label it predicts; shared beginnings have no rows.
    counts = np.diff(np.searchsorted(rows_N, starts - 1))
    counts = counts[-len(batch["continues"]) :] if "continues" in batch else counts
    return {**batch, **added, "loss_counts": counts.tolist(), "sample_lengths": np.diff(starts).tolist()}


def pad_id(tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None) -> int:
    """The id to pad with.

    Args:
        tokenizer: the model's tokenizer.
        embeddings: how many tokens the model has embeddings for; a pad token may have been added without one.

    Returns:
        The tokenizer's pad id, or its EOS id if it has no pad id that the model can take.
    """
    pad = tokenizer.pad_token_id
    usable = pad is not None and (embeddings is None or pad < embeddings)
    return pad if usable else tokenizer.eos_token_id


def sequence_lengths(sample: Mapping[str, Any], encoder_decoder: bool) -> tuple[int, ...]:
    """Lengths in tokens of the sequences that a model makes of a sample.

    Args:
        sample: a tokenised sample, with input_ids and labels.
        encoder_decoder: whether the model has an encoder and a decoder.

    Returns:
        One length; for an encoder-decoder model two: of the prompt, and of the response with the start token.
    """
    length = len(sample["input_ids"])
    if not encoder_decoder:
        return (length,)
    prompt = first_label(sample["labels"])
    return prompt, 1 + length - prompt


def padded_tokens(lengths: Sequence[Sequence[int]]) -> int:
    """Tokens of a padded batch, including padding. lengths: of each sample's sequences, which are padded separately."""
    return len(lengths) * sum(map(max, zip(*lengths)))


def divide_by_tokens(lengths: Sequence[int | Sequence[int]], max_tokens: int, flattened: bool) -> list[list[int]]:
    """Divide samples into few batches of similar size with at most `max_tokens` tokens each.

    Args:
        lengths: number of tokens of each sample, or its `sequence_lengths`; their sum is at most max_tokens.
        max_tokens: the most tokens of a batch.
        flattened: whether a batch has the sum of its lengths. Otherwise it is padded, see `padded_tokens`.

    Returns:
        Indices of the samples of each batch, ascending within it.
    """
    sequences = [(x,) if isinstance(x, int) else x for x in lengths]
    totals = [sum(x) for x in sequences]
    longest_first = sorted(range(len(lengths)), key=lambda i: (-totals[i], i))
    if not flattened:
        batches: list[list[int]] = []
        for i in longest_first:
            if not batches or padded_tokens([sequences[j] for j in (*batches[-1], i)]) > max_tokens:
                batches.append([])
            batches[-1].append(i)
        return [sorted(batch) for batch in batches]
    count = max(1, -(-sum(totals) // max_tokens))
    while True:
        # The longest sample that is left goes into the batch with the most room.
        batches, filled = [[] for _ in range(count)], [0] * count
        for i in longest_first:
            least = min(range(count), key=filled.__getitem__)
            batches[least].append(i)
            filled[least] += totals[i]
        if max(filled) <= max_tokens or count >= len(lengths):
            return [sorted(batch) for batch in batches if batch]
        count += 1


def token_counts(samples: Dataset) -> list[int]:
    """Tokens of each sample."""
    tables: Any = samples.select_columns(["input_ids"]).with_format("arrow")
    return [n for table in tables.iter(10_000) for n in pc.list_value_length(table["input_ids"]).to_pylist()]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar length, longest first, so that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def prompt_lengths(samples: Dataset) -> list[int]:
    """Tokens of each sample's prompt."""
    found: list[int] = []
    tables: Any = samples.select_columns(["labels"]).with_format("arrow")
    for table in tables.iter(10_000):
        labels, starts, ends = flat_lists(table["labels"])
        places = np.append(np.flatnonzero(labels != IGNORE_INDEX), len(labels))
        first = places[np.searchsorted(places, starts)]
        found += (np.minimum(first, ends) - starts).tolist()
    return found


def flat_lists(column: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column of lists of numbers as one array, and where each row begins and ends in it.

    Args:
        column: a column of an Arrow table.
    """
    lengths = pc.list_value_length(column).to_numpy()
    ends = np.cumsum(lengths)
    return pc.list_flatten(column).to_numpy(), ends - lengths, ends
