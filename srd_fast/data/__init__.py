"""Data: rows from files, tokenised samples with stable ids, batches."""

from .answers import Answers, answer_ends, answered, end_of
from .batches import (
    WEIGHT,
    DistillationCollator,
    batches_by_length,
    divide_by_tokens,
    flat_lists,
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
from .columns import IGNORE_INDEX, PRIVILEGED_FEATURES, PRIVILEGED_IDS, TOKENISED_FEATURES, first_label, read_columns
from .conversations import TRAIN_ON, check_train_on
from .files import SourceRow, shown
from .formats import ROW_FORMATS, register_row_format, row_format_names
from .mapping import check_columns
from .own_rows import DataFunction, check_made, data_function_of, made_rows
from .privileged import (
    PRIVILEGED,
    WHOLE_COLUMN,
    check_privileged_column,
    check_privileged_template,
    seen_by_teacher,
    teachers_samples,
)
from .rows import Rows
from .samples import PreparedData, content_id, prepare_dataset
from .sources import check_source, read_rows, read_source, rows_of, source_files, source_path
from .tokenisation import Tokenisation

__all__ = [
    "IGNORE_INDEX",
    "PRIVILEGED",
    "PRIVILEGED_FEATURES",
    "PRIVILEGED_IDS",
    "ROW_FORMATS",
    "TOKENISED_FEATURES",
    "TRAIN_ON",
    "WEIGHT",
    "WHOLE_COLUMN",
    "Answers",
    "DataFunction",
    "DistillationCollator",
    "PreparedData",
    "Rows",
    "SourceRow",
    "Tokenisation",
    "answer_ends",
    "answered",
    "batches_by_length",
    "check_chat_template_kwargs",
    "check_columns",
    "check_made",
    "check_privileged_column",
    "check_privileged_template",
    "check_source",
    "check_token_ids",
    "check_train_on",
    "content_id",
    "data_function_of",
    "divide_by_tokens",
    "end_of",
    "first_label",
    "flat_lists",
    "made_rows",
    "pad_id",
    "pad_right",
    "padded_tokens",
    "prepare_dataset",
    "prompt_lengths",
    "read_columns",
    "read_rows",
    "read_source",
    "register_row_format",
    "row_format_names",
    "rows_of",
    "seen_by_teacher",
    "sequence_lengths",
    "shown",
    "source_files",
    "source_path",
    "teachers_samples",
    "template_key",
    "token_counts",
    "with_borders",
    "with_loss_rows",
]
