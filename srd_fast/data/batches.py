"""Batches of tokenised samples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .tokenisation import IGNORE_INDEX


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """[B, L] int64, shorter rows filled at the end."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value
    )


@dataclass
class DistillationCollator:
    """Batches tokenised samples, padded at the end, or with `flatten` one behind the other.

    Padded: input_ids, attention_mask, labels, each [B, L]. The attention mask comes from lengths, never from the pad
    id, which may be the EOS id.

    Flattened: input_ids, position_ids (from 0 in each sample), labels, each [1, L] with L the sum of the lengths, and
    cu_seq_lens [B + 1] int32: where each sample begins, then L. There is no attention_mask.

    Labels stand at their own tokens, to be shifted by one later. The first label of a sample has no token before it, so
    in a flattened batch it is always -100: shifted, nothing is predicted across the border of two samples.
    """

    pad_token_id: int
    flatten: bool = False

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate."""
        ids = [s["input_ids"] for s in samples]
        if self.flatten:
            return {
                "input_ids": _row([x for row in ids for x in row]),
                "position_ids": _row([i for row in ids for i in range(len(row))]),
                "labels": _row([x for s in samples for x in (IGNORE_INDEX, *s["labels"][1:])]),
                "cu_seq_lens": torch.tensor([0, *accumulate(map(len, ids))], dtype=torch.int32),
            }
        return {
            "input_ids": pad_right(ids, self.pad_token_id),
            "attention_mask": pad_right([[1] * len(x) for x in ids], 0),
            "labels": pad_right([s["labels"] for s in samples], IGNORE_INDEX),
        }


def _row(values: list[int]) -> torch.Tensor:
    """[1, L] int64."""
    return torch.tensor([values], dtype=torch.long)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with: the tokenizer's, else its EOS."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, so that the largest batch meets the memory limit first."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
