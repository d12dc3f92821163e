"""Data: rows from files, tokenised samples with stable ids, batches."""

from .batches import (
    DistillationCollator,
    batches_by_length,
    divide_by_tokens,
    pad_id,
    pad_right,
    padded_tokens,
    sequence_lengths,
    with_loss_rows,
)
from .samples import TOKENISED_FEATURES, PreparedData, content_id, prepare_dataset
from .sources import SourceRow, read_rows, read_source, shown, source_path
from .tokenisation import IGNORE_INDEX, Tokenisation, first_label

__all__ = [
    "IGNORE_INDEX",
    "TOKENISED_FEATURES",
    "DistillationCollator",
    "PreparedData",
    "SourceRow",
    "Tokenisation",
    "batches_by_length",
    "content_id",
    "divide_by_tokens",
    "first_label",
    "pad_id",
    "pad_right",
    "padded_tokens",
    "prepare_dataset",
    "read_rows",
    "read_source",
    "sequence_lengths",
    "shown",
    "source_path",
    "with_loss_rows",
]
