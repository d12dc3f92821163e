"""Data: rows from files, tokenised samples with stable ids, batches."""

from .answers import Answers, answer_ends
from .batches import (
    DistillationCollator,
    batches_by_length,
    divide_by_tokens,
    pad_id,
    pad_right,
    padded_tokens,
    prompt_lengths,
    sequence_lengths,
    token_counts,
    with_borders,
    with_loss_rows,
)
from .chat import check_chat_template_kwargs, template_key
from .checks import check_token_ids
from .samples import TOKENISED_FEATURES, PreparedData, content_id, prepare_dataset
from .sources import SourceRow, read_rows, read_source, shown, source_path
from .tokenisation import IGNORE_INDEX, Tokenisation, first_label

__all__ = [
    "IGNORE_INDEX",
    "TOKENISED_FEATURES",
    "Answers",
    "DistillationCollator",
    "PreparedData",
    "SourceRow",
    "Tokenisation",
    "answer_ends",
    "batches_by_length",
    "check_chat_template_kwargs",
    "check_token_ids",
    "content_id",
    "divide_by_tokens",
    "first_label",
    "pad_id",
    "pad_right",
    "padded_tokens",
    "prepare_dataset",
    "prompt_lengths",
    "read_rows",
    "read_source",
    "sequence_lengths",
    "shown",
    "source_path",
    "template_key",
    "token_counts",
    "with_borders",
    "with_loss_rows",
]
