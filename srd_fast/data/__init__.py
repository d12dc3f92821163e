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
from .files import SourceRow, shown
from .formats import ROW_FORMATS, register_row_format, row_format_names
from .mapping import check_columns
from .samples import TOKENISED_FEATURES, PreparedData, content_id, prepare_dataset
from .sources import Rows, check_source, read_rows, read_source, rows_of, source_files, source_path
from .tokenisation import IGNORE_INDEX, Tokenisation, first_label

__all__ = [
    "IGNORE_INDEX",
    "ROW_FORMATS",
    "TOKENISED_FEATURES",
    "Answers",
    "DistillationCollator",
    "PreparedData",
    "Rows",
    "SourceRow",
    "Tokenisation",
    "answer_ends",
    "batches_by_length",
    "check_chat_template_kwargs",
    "check_columns",
    "check_source",
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
    "register_row_format",
    "row_format_names",
    "rows_of",
    "sequence_lengths",
    "shown",
    "source_files",
    "source_path",
    "template_key",
    "token_counts",
    "with_borders",
    "with_loss_rows",
]
