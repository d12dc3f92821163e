"""Read the output files of the SRD authors' scripts as reflections.

Their `generate_data.py` writes `answers.jsonl`, a line a row: prompt, LLM_output, lm_loss. Their `rank.py` adds answer,
Rouge_L, lm_loss and ranks to the rows themselves (`sorted_train.jsonl`, and `raw.jsonl` of each stage).
"""

import logging
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import Tokenisation, prepare_dataset, read_rows
from ..errors import UserError
from ..rouge import RougeL, choose_tokenizer

logger = logging.getLogger(__name__)

_OF_ROWS = ("instruction", "input", "output")
_OF_RANK = {"Rouge_L", "lm_loss", "RoughL_rank", "lmloss_rank", "hybrid_rank_score", "rank"}  # RoughL is theirs
Answer = tuple[str, float]


def read_official_reflections(
    answers: str | Path,
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_name: str | None = None,
    template: str = "alpaca",
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """Read the answers of the authors' scripts (SRD, arXiv 2508.06135) in the form of `reflect`'s result.

    Answers are matched with the rows by the text of the prompt, in files of `rank.py` by prompt and output, not by
    position. A prompt whose end their scripts cut is found by its beginning. ROUGE-L is computed again, as in
    `reflect`, because theirs drops all letters that are not Latin.

    Args:
        answers: `answers.jsonl`, `sorted_train.jsonl` or `raw.jsonl`.
        dataset: the rows that will be trained on, in any format that `reflect` takes.
        tokenizer: the student's, with which the prompts are made.
        model_name: the column of the answers in a file of `rank.py` (its `--model-name`). Default: the only column that
            belongs neither to the row nor to the ranking.
        template: prompt template of the rows.
        columns: which column of the data is which of a row format's.

    Returns:
        A data set for `curate`, in the order of the samples: sample_id, generation, rouge_l (0 to 1), cross_entropy in
        nats per token (their lm_loss), NaN if there is no answer, and reason (why it is missing, or None).

    Raises:
        UserError: the file is none of these, or it has no answer for any row.
    """
    tokenisation = Tokenisation(tokenizer, template)
    samples = prepare_dataset(dataset, tokenisation, columns=columns).dataset
    ids, prompts, references = (list(samples[name]) for name in ("sample_id", "prompt", "references"))
    found = _answers_of(str(answers), prompts, references, tokenisation, model_name)
    missing = found.count(None)
    if missing == len(ids):
        raise UserError(
            f"{str(answers)!r} has no answer for any of the {len(ids)} rows: their prompts differ. Give the data of "
            f"that run, and its template (it is {template!r} here)"
        )
    if missing:
        logger.warning("%d of %d rows have no answer in %s; curate lists them", missing, len(ids), answers)
    generations = ["" if answer is None else answer[0] for answer in found]
    losses = [math.nan if answer is None else answer[1] for answer in found]
    reasons = [_reason(answer, texts, str(answers)) for answer, texts in zip(found, references)]
    scores = RougeL(choose_tokenizer("auto", references)).score_all(generations, references)

    def scored(values: Sequence[float]) -> list[float]:
        return [v if reason is None else math.nan for v, reason in zip(values, reasons)]

    return Dataset.from_dict(
        {
            "sample_id": ids,
            "generation": generations,
            "rouge_l": scored(scores),
            "cross_entropy": scored(losses),
            "reason": reasons,
        }
    )


def _reason(answer: Answer | None, references: Sequence[str], file: str) -> str | None:
    """Why a row cannot be scored."""
    if answer is None:
        return f"no answer in {Path(file).name}"
    if not any(text.strip() for text in references):
        return "empty reference"
    return None if math.isfinite(answer[1]) else f"lm_loss is {answer[1]}, not a finite number"


def _answers_of(
    file: str,
    prompts: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenisation: Tokenisation,
    model_name: str | None,
) -> list[Answer | None]:
    """The answer of each sample. Answers to equal rows are used in the order of the file."""
    rows = read_rows(file)
    known: set[str] = set().union(*(row.keys() for row in rows[:100])) if rows else set()
    keys: list[tuple[str, ...]]
    waiting: dict[tuple[str, ...], deque[Answer]] = defaultdict(deque)
    if {"prompt", "LLM_output", "lm_loss"} <= known:
        for number, row in enumerate(rows, 1):
            waiting[(_plain(row.get("prompt")),)].append(_answer(row, "LLM_output", file, number))
        keys = [(_plain(prompt),) for prompt in prompts]
    elif {"instruction", "output", "lm_loss"} <= known:
        column = _column_of_answers(known, model_name, file)
        given = [{**{n: row.get(n) or "" for n in _OF_ROWS}, "sample_id": str(i)} for i, row in enumerate(rows)]
        made = prepare_dataset(given, tokenisation, name=file).dataset
        for number, prompt, texts in zip(made["sample_id"], made["prompt"], made["references"]):
            answer = _answer(rows[int(number)], column, file, int(number) + 1)
            waiting[_plain(prompt), _plain(texts[0])].append(answer)
        keys = [(_plain(prompt), _plain(texts[0] if texts else "")) for prompt, texts in zip(prompts, references)]
    else:
        raise UserError(
            f"{file!r} has the columns {', '.join(sorted(known)) or 'none'}: it must be answers.jsonl (prompt, "
            "LLM_output, lm_loss), or a file of rank.py (instruction, output, lm_loss and the answer)"
        )
    found = [waiting[key].popleft() if waiting.get(key) else None for key in keys]
    left = {key[0]: answers for key, answers in waiting.items() if len(key) == 1 and key[0] and answers}
    for i, key in enumerate(keys):
        if found[i] is None and (cut := next((p for p in left if left[p] and key[0].startswith(p)), None)):
            found[i] = left[cut].popleft()
    return found


def _column_of_answers(known: set[str], model_name: str | None, file: str) -> str:
    others = sorted(known - _OF_RANK - {*_OF_ROWS, "prompt", "sample_id"})
    if model_name is None and len(others) == 1:
        return others[0]
    if model_name not in known:
        raise UserError(
            f"model_name is {model_name!r}, and the columns of {file!r} that may hold the answers are "
            f"{', '.join(others) or 'none'}: name one of them"
        )
    assert model_name is not None
    return model_name


def _answer(row: Mapping[str, Any], column: str, file: str, number: int) -> Answer:
    text, loss = row.get(column), row.get("lm_loss")
    if not isinstance(text, str) or isinstance(loss, bool) or not isinstance(loss, (int, float)):
        raise UserError(
            f"{file!r}, row {number}: {column} must be a text and lm_loss a number, got {text!r:.40} and {loss!r}"
        )
    return text, float(loss)


def _plain(text: Any) -> str:
    """The text with single spaces, because their scripts change spaces."""
    return " ".join(str(text).split())
