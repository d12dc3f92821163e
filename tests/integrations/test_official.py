"""Files as the authors' scripts write them, in another order than the data, with duplicates and cut prompts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from srd_fast import UserError, curate, read_official_reflections
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.rouge import RougeL

ROWS = [{k: row[k] for k in ("instruction", "input", "output")} for row in make_quickstart_rows(8, seed=3)]
ROWS += [ROWS[0]]  # twice, with two answers
ANSWERS = [f"{row['output']} or so {i}" for i, row in enumerate(ROWS)]
LOSSES = [0.5 + 0.25 * i for i in range(len(ROWS))]


def prompt(row: Mapping[str, str]) -> str:
    """The authors' Alpaca template, stripped as their answers.jsonl has it."""
    given = row["input"]
    context = ", paired with an input that provides further context" if given else ""
    text = f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
    text += f"request.\n\n### Instruction:\n{row['instruction']}\n\n"
    return text + (f"### Input:\n{given}\n\n" if given else "") + "### Response:"


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(order: Sequence[int], **change: Any) -> list[dict[str, Any]]:
    made = [{"prompt": prompt(ROWS[i]), "LLM_output": ANSWERS[i], "lm_loss": LOSSES[i]} for i in order]
    return [{**row, **change} for row in made]


def ranked(order: Sequence[int], name: str = "gpt2") -> list[dict[str, Any]]:
    ranks = {"Rouge_L": 0.1, "RoughL_rank": 1, "lmloss_rank": 2, "hybrid_rank_score": 0.03, "rank": 1}
    return [{**ROWS[i], name: ANSWERS[i], "lm_loss": LOSSES[i], **ranks} for i in order]


@pytest.mark.parametrize("make", [answers, ranked])
def test_answers_find_their_rows_in_any_order(
    make: Any, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The first of two equal rows gets the first of their answers in the file."""
    order = [8, 5, 2, 7, 0, 1, 6, 3, 4]
    file = written(tmp_path / "answers.jsonl", make(order))
    scores = read_official_reflections(file, ROWS, tiny_tokenizer)
    whose = [8, 1, 2, 3, 4, 5, 6, 7, 0]
    assert scores["generation"] == [ANSWERS[i] for i in whose]
    assert scores["cross_entropy"] == [LOSSES[i] for i in whose]
    expected = RougeL("rouge").score_all([ANSWERS[i] for i in whose], [[r["output"]] for r in ROWS])
    assert scores["rouge_l"] == pytest.approx(expected)
    assert set(scores["reason"]) == {None}
    assert len(set(scores["sample_id"])) == 9
    plan = curate(scores, keep=1.0, stages=3)
    assert sorted(i for subset in plan.subsets for i in subset) == sorted(scores["sample_id"])


def test_cut_prompts_missing_answers_and_losses(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = answers(range(4))
    rows[1]["prompt"] = rows[1]["prompt"][: -len("### Response:") - 4]
    rows[2]["lm_loss"] = math.nan
    scores = read_official_reflections(written(tmp_path / "a.jsonl", rows), ROWS[:8], tiny_tokenizer)
    assert scores["generation"][:4] == ANSWERS[:4]
    assert scores["reason"][:2] == [None, None]
    assert "lm_loss is nan" in scores["reason"][2]
    assert scores["reason"][4:] == ["no answer in a.jsonl"] * 4
    assert all(math.isnan(x) for x in (*scores["rouge_l"][4:], scores["cross_entropy"][2]))
    assert len(curate(scores, keep=1.0, stages=1).unscored) == 5


@pytest.mark.parametrize(
    ("rows", "model_name", "message"),
    [
        ([{"a": 1}], None, "has the columns a: it must be answers.jsonl"),
        (answers([0], prompt="another one"), None, "no answer for any of the 9 rows"),
        (answers([0], lm_loss="x"), None, "row 1: LLM_output must be a text and lm_loss a number"),
        ([{**ranked([0])[0], "qwen": "x"}], None, "that may hold the answers are gpt2, qwen"),
        (ranked([0]), "llama", "model_name is 'llama'"),
    ],
)
def test_other_files_are_refused(
    rows: list[dict[str, Any]],
    model_name: str | None,
    message: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    file = written(tmp_path / "answers.jsonl", rows)
    with pytest.raises(UserError, match=message):
        read_official_reflections(file, ROWS, tiny_tokenizer, model_name=model_name)
    named = read_official_reflections(
        written(tmp_path / "r.jsonl", ranked([0], "a")), ROWS, tiny_tokenizer, model_name="a"
    )
    assert named["generation"][0] == ANSWERS[0]
