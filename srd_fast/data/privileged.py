"""Text that only the teacher reads: its template, and samples as the teacher sees them.

A template with {prompt} replaces the question. Any other template is put before the question: in a chat as the system's
turn or at the beginning of that turn, elsewhere as a paragraph.

A sample has the teacher's prompt as token ids, `privileged_ids`. Teacher and student have the same answer, token by
token, so the teacher's rows match the student's, however long the two prompts are.
"""

from collections.abc import Mapping
from dataclasses import replace
from string import Formatter
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import UserError
from .columns import IGNORE_INDEX, PRIVILEGED_IDS, TOKENISED_FEATURES, first_label
from .conversations import SYSTEM, Conversation
from .tables import Tables
from .templates import substituted
from .values import text_of

PRIVILEGED = "privileged"
# The template if each row has the whole text.
WHOLE_COLUMN = "{privileged}"
_PROMPT, _RESPONSE = "prompt", "response"
_AT_ONCE = 1000


class PrivilegedTemplate:
    """Makes the teacher's prompt from the student's.

    Args:
        text: a text with any of the fields `{prompt}`, the question; `{response}`, the row's answer; and
            `{privileged}`, the row's column of that name.

    Raises:
        UserError: the text has other fields, or adds nothing to the prompt.
    """

    def __init__(self, text: str) -> None:
        known = (_PROMPT, _RESPONSE, PRIVILEGED)
        try:
            self._fields = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
        except ValueError as e:
            raise UserError(f"privileged_template {text!r} is not a format string: {e}") from e
        if not self._fields <= {*known} or text.strip() in ("", f"{{{_PROMPT}}}"):
            raise UserError(
                "privileged_template must be text that says more than the prompt, with any of "
                f"{', '.join(f'{{{name}}}' for name in known)}, got {text!r}"
            )
        self._text = text

    @property
    def reads_column(self) -> bool:
        """Whether the template contains the row's own privileged text."""
        return PRIVILEGED in self._fields

    def lacks(self, row: Mapping[str, Any]) -> bool:
        """Whether a row lacks the text that the template needs."""
        return self.reads_column and row.get(PRIVILEGED) in (None, "")

    def fields(self, fields: Mapping[str, str], row: Mapping[str, Any], answer: str) -> dict[str, str]:
        """The fields of a prompt template, for the teacher.

        Args:
            fields: the fields for the student, with `instruction`.
            row: the row of the data.
            answer: the row's answer.
        """
        question = fields["instruction"]
        text = self._of(row, question, answer)
        return {**fields, "instruction": text if _PROMPT in self._fields else f"{text}\n\n{question}"}

    def conversation(self, chat: Conversation, row: Mapping[str, Any], answer: str) -> Conversation:
        """A conversation, for the teacher.

        Args:
            chat: the conversation for the student.
            row: the row of the data.
            answer: the row's answer.
        """
        text = self._of(row, chat.turns[-1]["content"], answer)
        if _PROMPT in self._fields:
            return chat.asking(text)
        first, *others = chat.turns
        if first["role"] == SYSTEM:
            return replace(chat, turns=({**first, "content": f"{text}\n\n{first['content']}"}, *others))
        return replace(chat, turns=({"role": SYSTEM, "content": text}, *chat.turns))

    def _of(self, row: Mapping[str, Any], question: str, answer: str) -> str:
        given = text_of(row, PRIVILEGED) if self.reads_column else ""
        return substituted(self._text, {_PROMPT: question, _RESPONSE: answer, PRIVILEGED: given})


def check_privileged_template(text: str | None) -> None:
    """Refuse what `PrivilegedTemplate` would refuse."""
    if text is not None:
        PrivilegedTemplate(text)


def check_privileged_column(columns: Mapping[str, str], template: str | None) -> None:
    """Refuse a column of privileged text that no template reads.

    Args:
        columns: the user's mapping of columns, with or without `privileged`.
        template: a valid text of a `PrivilegedTemplate`, or None.

    Raises:
        UserError: no template reads the column.
    """
    if PRIVILEGED in columns and (template is None or not PrivilegedTemplate(template).reads_column):
        why = "there is no privileged_template" if template is None else f"privileged_template is {template!r}"
        raise UserError(
            f"columns has {PRIVILEGED}: {columns[PRIVILEGED]}, and {why}, so that nobody reads it; leave it out, or "
            f"put {WHOLE_COLUMN} into privileged_template"
        )


def seen_by_teacher(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample as its teacher sees it: with the teacher's prompt before the same answer.

    Args:
        sample: a tokenised sample with privileged_ids. It may have any answer, or none.

    Returns:
        The sample with these input_ids and labels, as int64 arrays, and without privileged_ids.
    """
    ids, labels = (np.asarray(sample[name], np.int64) for name in ("input_ids", "labels"))
    prompt, start = np.asarray(sample[PRIVILEGED_IDS], np.int64), first_label(sample["labels"])
    seen = {name: value for name, value in sample.items() if name != PRIVILEGED_IDS}
    seen["input_ids"] = np.concatenate([prompt, ids[start:]])
    seen["labels"] = np.concatenate([np.full(len(prompt), IGNORE_INDEX), labels[start:]])
    return seen


def teachers_samples(samples: Dataset) -> Dataset:
    """Samples as their teacher sees them. Samples without privileged_ids are returned unchanged.

    Args:
        samples: tokenised samples.

    Returns:
        The same number of samples, in the same order, with the columns of tokenised samples.
    """
    if PRIVILEGED_IDS not in samples.column_names or not len(samples):
        return samples
    tables = Tables(TOKENISED_FEATURES.arrow_schema)
    for start in range(0, len(samples), _AT_ONCE):
        some: Any = samples.select(range(start, min(start + _AT_ONCE, len(samples))))
        seen = [seen_by_teacher(sample) for sample in some]
        tables.add({name: [sample[name] for sample in seen] for name in TOKENISED_FEATURES})
    return tables.dataset()
