"""Columns of tokenised samples."""

from collections.abc import Sequence

from datasets import Features, List, Value

# The label of a token without loss.
IGNORE_INDEX = -100
# Column of the teacher's prompt, if the teacher has another one than the student.
PRIVILEGED_IDS = "privileged_ids"
TOKENISED_FEATURES = Features(
    {
        "sample_id": Value("string"),
        "prompt": Value("string"),
        "references": List(Value("string")),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "tests": List(Value("string")),
    }
)
PRIVILEGED_FEATURES = Features({**TOKENISED_FEATURES, PRIVILEGED_IDS: List(Value("int32"))})
# The columns that a training step reads.
_READ = ("input_ids", "labels", PRIVILEGED_IDS)


def first_label(labels: Sequence[int]) -> int:
    """Index of the first token with loss, which is the length of the prompt."""
    return next((i for i, x in enumerate(labels) if x != IGNORE_INDEX), len(labels))


def read_columns(names: Sequence[str]) -> list[str]:
    """Those of a data set's columns that a training step reads."""
    return [name for name in _READ if name in names]
