"""Rows that are tokenised already."""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from .columns import IGNORE_INDEX, PRIVILEGED_IDS, first_label
from .files import shown
from .values import given_references, text_of


def tokenised_sample(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, ends: Collection[str], limit: int
) -> dict[str, Any]:
    """Make the sample of a row with input_ids and labels, without its id.

    Args:
        row: values by column.
        tokenizer: the tokenizer that made the ids.
        ends: texts of the tokens that end an answer.
        limit: the most tokens of a sample.

    Raises:
        UserError: the row cannot be used.
    """
    ids, labels = row["input_ids"], row["labels"]
    if not isinstance(ids, list) or not isinstance(labels, list) or len(ids) != len(labels):
        raise UserError("input_ids and labels must be lists of the same length")
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in (*ids, *labels)):
        raise UserError("input_ids and labels must hold whole numbers")
    size = len(tokenizer)
    bad = [i for i in ids if not 0 <= i < size] + [x for x in labels if x != IGNORE_INDEX and not 0 <= x < size]
    if bad:
        raise UserError(f"token id {bad[0]} is outside the tokenizer's {size}")
    start = first_label(labels)
    if start == len(labels) or start == 0:
        raise UserError("labels must have -100 over the prompt and then at least one token with loss")
    if len(ids) > limit:
        raise UserError(f"{len(ids)} tokens, above max_prompt_length + max_response_length = {limit}")
    # The student answers the first turn, whose prompt ends at the first label. So only that turn is the reference.
    response = labels[start : next((i for i in range(start, len(ids)) if labels[i] == IGNORE_INDEX), len(ids))]
    if tokenizer.convert_ids_to_tokens(response[-1]) in ends:
        response = response[:-1]
    references = given_references(row) or [str(tokenizer.decode(response, skip_special_tokens=True))]
    prompt = str(tokenizer.decode(ids[:start])) if row.get("prompt") is None else text_of(row, "prompt")
    return {"prompt": prompt, "references": references, "input_ids": ids, "labels": labels}


def given_privileged_ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The teacher's prompt in such a row.

    Args:
        row: a row with privileged_ids.
        tokenizer: the tokenizer that made the ids.

    Raises:
        UserError: they are not valid ids.
    """
    ids, size = row[PRIVILEGED_IDS], len(tokenizer)
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < size for i in ids):
        raise UserError(f"{PRIVILEGED_IDS} must be a list of token ids below {size}, got {shown(repr(ids))}")
    return ids
