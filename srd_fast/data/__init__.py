"""Data: rows from files, tokenised samples with stable ids, batches."""

from .batches import (
    DistillationCollator,
    batches_by_length,
    divide_by_tokens,
    pad_id,
    pad_right,
    with_borders,
    with_loss_rows,
)
from .checks import check_token_ids
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
    "check_token_ids",
    "content_id",
    "divide_by_tokens",
    "first_label",
    "pad_id",
    "pad_right",
    "prepare_dataset",
    "read_rows",
    "read_source",
    "shown",
    "source_path",
    "with_borders",
    "with_loss_rows",
]
