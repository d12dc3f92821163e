"""Generated answers to tokenised samples: the tokens that end them, and their text, which is scored."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .columns import IGNORE_INDEX, first_label


class Answers:
    """Reads answers that a model generates for tokenised samples.

    Args:
        samples: tokenised samples.
        tokenizer: the tokenizer that made them.
    """

    def __init__(self, samples: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._marks = _marks(tokenizer)
        self.ends = answer_ends(samples, tokenizer)
        self._behind: dict[int, int] = {}
        rows: Any = samples.select_columns(["labels", "references"])
        for i, row in enumerate(rows):
            mark = self._mark_before(row["labels"], (row["references"] or [""])[0].strip())
            if mark is not None:
                self._behind[i] = mark

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens besides EOS that end an answer."""
        return tuple(sorted(self.ends - {self.tokenizer.eos_token_id}))

    def text(self, index: int, ids: Sequence[int]) -> str:
        """The text of an answer that is compared with references: without its end, special tokens and thoughts.

        Args:
            index: the sample's index.
            ids: the generated token ids.
        """
        ids = list(ids)
        ids = ids[: next((n for n, token in enumerate(ids) if token in self.ends), len(ids))]
        mark = self._behind.get(index)
        if mark in ids:
            ids = ids[len(ids) - ids[::-1].index(mark) :]
        return self._read(ids)

    def _read(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _mark_before(self, labels: Sequence[int], reference: str) -> int | None:
        """The token, such as the end of a think block, after which the text of the reference begins in a response."""
        response = _first_turn(labels[first_label(labels) :])
        places = [n for n, token in enumerate(response[:-1]) if token in self._marks]
        if not places or self._read(response) == reference:
            return None
        return next((response[n] for n in reversed(places) if self._read(response[n + 1 :]) == reference), None)


def _first_turn(labels: Sequence[int]) -> Sequence[int]:
    """The labels before the first one without loss."""
    return labels[: next((n for n, x in enumerate(labels) if x == IGNORE_INDEX), len(labels))]


def end_of(labels: Sequence[int], ends: set[int], default: int) -> int:
    """The token that ends an answer to a sample: the one that ends the sample's own response.

    Args:
        labels: the sample's labels.
        ends: ids that may end an answer, from `answer_ends`.
        default: the id for a response that was cut before its end.
    """
    turn = _first_turn(labels[first_label(labels) :])
    return int(turn[-1]) if len(turn) and turn[-1] in ends else default


def answered(
    sample: Mapping[str, Any], answer: Sequence[int], end: int | None, most: int | None = None
) -> dict[str, Any]:
    """Put another answer in place of a sample's response. Only the answer's tokens have loss.

    Args:
        sample: a tokenised sample. If it has several turns, the first is answered, and the others are dropped.
        answer: token ids, without the end token.
        end: the token that ends the answer, which has loss too; None if the answer was cut before its end.
        most: the most tokens of the answer, including its end. A longer one is cut and gets no end token.

    Returns:
        The sample with these input_ids and labels.
    """
    prompt = [int(x) for x in sample["input_ids"][: first_label(sample["labels"])]]
    ids = [*answer, *([] if end is None else [end])][:most]
    return {**sample, "input_ids": prompt + ids, "labels": [IGNORE_INDEX] * len(prompt) + ids}


def answer_ends(samples: Dataset, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids at which an answer ends: EOS, and the last tokens of turns, such as a chat template's end of turn.

    The last token with loss of a turn counts if it is one of the tokenizer's added tokens, and if no answer continues
    after it: an answer that was cut may end in any token.

    Args:
        samples: tokenised samples.
        tokenizer: the tokenizer that made them.

    Returns:
        The ids.
    """
    last: set[int] = set()
    inside: set[int] = set()
    rows: Any = samples.select_columns(["labels"]).with_format("numpy")
    for batch in rows.iter(1000):
        labels = np.concatenate([x for y in batch["labels"] for x in (y, [IGNORE_INDEX])]).astype(np.int64)
        here, behind = labels[:-1], labels[1:]
        last.update(np.unique(here[(here != IGNORE_INDEX) & (behind == IGNORE_INDEX)]).tolist())
        inside.update(np.unique(here[(here != IGNORE_INDEX) & (behind != IGNORE_INDEX)]).tolist())
    return {tokenizer.eos_token_id, *(_marks(tokenizer) & last - inside)}


def _marks(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the added tokens that are not blank."""
    added = {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.content.strip()}
    return added | set(tokenizer.all_special_ids)
