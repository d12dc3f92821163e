"""What a teacher reads and its student does not: a template of privileged text, and samples as the teacher sees them.

A text with {prompt} is the question as the teacher reads it. Any other stands before the question: in a chat as the
system's turn, or at the beginning of that, elsewhere as a paragraph.

A sample has the teacher's prompt as token ids, `privileged_ids`. Its answer is that of the student, token by token, so
the teacher's rows are those of the student's answer, in the same order, however long the two prompts are.
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
# The template of rows that say all of it themselves.
WHOLE_COLUMN = "{privileged}"
_PROMPT, _RESPONSE = "prompt", "response"
_AT_ONCE = 1000


class PrivilegedTemplate:
    """Makes what a teacher reads out of what its student reads.

    Args:
        text: with any of `{prompt}`, the question; `{response}`, the row's answer; and `{privileged}`, the row's column
            of that name.

    Raises:
        UserError: the text has other fields, or says nothing.
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
        """Whether the text has the row's own privileged text in it."""
        return PRIVILEGED in self._fields

    def lacks(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has no text in the column that the template needs."""
        return self.reads_column and row.get(PRIVILEGED) in (None, "")

    def fields(self, fields: Mapping[str, str], row: Mapping[str, Any], answer: str) -> dict[str, str]:
        """A prompt template's fields as the teacher reads them.

        Args:
            fields: as the student reads them, with `instruction`.
            row: of the data.
            answer: of the row.
        """
        question = fields["instruction"]
        text = self._of(row, question, answer)
        return {**fields, "instruction": text if _PROMPT in self._fields else f"{text}\n\n{question}"}

    def conversation(self, chat: Conversation, row: Mapping[str, Any], answer: str) -> Conversation:
        """A conversation as the teacher reads it.

        Args:
            chat: as the student reads it.
            row: of the data.
            answer: of the row.
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
        columns: as the user maps them, with or without `privileged`.
        template: of a `PrivilegedTemplate`, in which nothing is wrong, or None.

    Raises:
        UserError: with the way out.
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
        sample: tokenised, with privileged_ids. It may have any answer, or none.

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
    """Samples as their teacher sees them: those without privileged_ids as they are.

    Args:
        samples: tokenised.

    Returns:
        As many, in their order, with the columns of tokenised samples.
    """
    if PRIVILEGED_IDS not in samples.column_names or not len(samples):
        return samples
    tables = Tables(TOKENISED_FEATURES.arrow_schema)
    for start in range(0, len(samples), _AT_ONCE):
        some: Any = samples.select(range(start, min(start + _AT_ONCE, len(samples))))
        seen = [seen_by_teacher(sample) for sample in some]
        tables.add({name: [sample[name] for sample in seen] for name in TOKENISED_FEATURES})
    return tables.dataset()
