"""A first config for someone's data and models: `srd-fast init`."""

from typing import Any

import numpy as np

from ..data import IGNORE_INDEX, Tokenisation, check_columns, prepare_dataset, read_source
from ..errors import UserError
from ..models import check_tokenizers, is_encoder_decoder, load_config, load_tokenizer, max_positions
from .config_help import text_of

# Rows that are looked at, and how lengths are rounded up.
_SEEN, _STEP = 1000, 64
_LONGEST = 1 << 20
_BAD = 0.1


def first_config(
    data: str,
    teacher: str,
    student: str = "prune",
    output_dir: str = "runs/mine",
    columns: dict[str, str] | None = None,
) -> str:
    """Look at data and models, and make a config that fits them.

    The template is the tokenizer's chat template, if it has one. The lengths fit 99 of 100 rows that were looked at, as
    far as the teacher has positions for them.

    Args:
        data: where rows come from, as in the key `data`.
        teacher: folder or hub id.
        student: folder or hub id, or "prune": half of the teacher's layers.
        output_dir: the run folder.
        columns: as in the key `columns`.

    Returns:
        YAML, with each key's meaning above it.

    Raises:
        UserError: rows or models cannot be read, or too few rows can be used.
    """
    named = check_columns(columns or {})
    tokenizer, config = load_tokenizer(teacher), load_config(teacher)
    if student != "prune":
        check_tokenizers(load_tokenizer(student), tokenizer)
    template = "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"
    tokenisation = Tokenisation(tokenizer, template, _LONGEST, _LONGEST, encoder_decoder=is_encoder_decoder(config))
    rows = read_source(data)
    some = prepare_dataset(rows.head(_SEEN), tokenisation, "data", _BAD, named).dataset
    if len(some) < 4:
        raise UserError(f"data {data!r} has {len(some)} usable rows, and a curriculum needs 4 at least")
    if not any(text for texts in some["references"] for text in texts):
        raise UserError(f"data {data!r}: all of {len(some)} answers that were looked at are empty; nothing to learn")
    responses = [sum(x != IGNORE_INDEX for x in labels) for labels in some["labels"]]
    prompts = [len(ids) - n for ids, n in zip(some["input_ids"], responses)]
    prompt, response = _within(max_positions(config)[0], _rounded(prompts), _rounded(responses))
    fit = sum(p <= prompt and r <= response for p, r in zip(prompts, responses))
    values: dict[str, Any] = {
        "teacher": teacher,
        "student": student,
        "output_dir": output_dir,
        "data": data,
        "validation": max(1, min(100, len(some) // 10)),
        **({"columns": named} if named else {}),
        "template": template,
        "max_prompt_length": prompt,
        "max_response_length": response,
        "preset": "paper",
    }
    if student == "prune":
        values["init_student"] = {"layers": max(1, config.get_text_config().num_hidden_layers // 2)}
    values["reflect"] = {"max_new_tokens": response}
    values["curate"] = {"keep": 0.75, "stages": min(3, len(some) // 2)}
    values["distill"] = {"divergence": "skew_reverse_kl", "learning_rate": 1e-4}
    values["evaluate"] = {"max_new_tokens": response}
    first = f"# {len(some):,} rows were looked at: {100 * fit // len(some)} of 100 fit in the lengths below.\n"
    return first + text_of(values) + "\n# srd-fast config prints every other key with its default.\n"


def _within(positions: int | None, prompt: int, response: int) -> tuple[int, int]:
    """Lengths of prompt and response for which a model has positions."""
    if positions is None or prompt + response <= positions:
        return prompt, response
    response = min(response, max(positions // 2, positions - prompt))
    return min(prompt, positions - response), response


def _rounded(lengths: list[int]) -> int:
    return int(-(-np.quantile(lengths, 0.99) // _STEP)) * _STEP
