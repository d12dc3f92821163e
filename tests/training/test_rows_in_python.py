"""`reflect`, `evaluate` and `SRDTrainer` take rows from anywhere, under any names, and train on the turns asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, SRDConfig, SRDTrainer, evaluate, reflect
from srd_fast.data import IGNORE_INDEX
from srd_fast.data.quickstart import make_quickstart_rows

Row = dict[str, Any]
ROWS: list[Row] = [{k: row[k] for k in ("instruction", "output")} for row in make_quickstart_rows(4, seed=6)]
OWN = [{"q": row["instruction"], "a": row["output"]} for row in ROWS]
SHORT = Sampling(max_new_tokens=2)
TURNS = [
    {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Un."},
    {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Deux."},
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("own_folder")


def standard(row: Row) -> Row:
    return {"question": row["q"], "answer": row["a"]}


WAYS: dict[str, tuple[Any, Row]] = {
    "columns": (OWN, {"columns": {"instruction": "q", "output": "a"}}),
    "a function": (pd.DataFrame(OWN), {"data_function": standard}),
    "a function by name, of a file": ("rows.csv", {"data_function": "mine.py:standard"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_call_takes_rows_of_other_names(
    way: str,
    tiny_model: PreTrainedModel,
    make_tiny_model: Callable[[int], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows, options = WAYS[way]
    pd.DataFrame(OWN).to_csv("rows.csv", index=False)
    Path("mine.py").write_text("def standard(row):\n    return {'question': row['q'], 'answer': row['a']}\n")

    def trained_on(data: Any, **more: Any) -> list[Row]:
        args = SRDConfig(output_dir="out", use_cpu=True, report_to=[])
        trainer = SRDTrainer(
            tiny_model, make_tiny_model(3), args, data, eval_dataset=data, processing_class=tiny_tokenizer, **more
        )
        return [*trainer.train_dataset, *trainer.eval_dataset]

    asked = {"progress": False, "sampling": SHORT}
    assert evaluate(tiny_model, rows, tiny_tokenizer, **asked, **options) == (
        evaluate(tiny_model, ROWS, tiny_tokenizer, **asked)
    )
    assert reflect(tiny_model, rows, tiny_tokenizer, **asked, **options).to_list() == (
        reflect(tiny_model, ROWS, tiny_tokenizer, **asked).to_list()
    )
    assert trained_on(rows, **options) == trained_on(ROWS)


def test_all_answers_count_where_they_are_asked_for(
    tiny_model: PreTrainedModel,
    make_tiny_model: Callable[[int], PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows, asked = [{"messages": TURNS}], {"progress": False, "sampling": SHORT}
    last, both = (evaluate(tiny_model, rows, tiny_tokenizer, train_on=t, **asked) for t in ("last", "all"))
    answers = [len(tiny_tokenizer(text).input_ids) for text in ("Un.", "Deux.")]
    assert (last["num_tokens"], both["num_tokens"]) == (answers[1] + 1, sum(answers) + 1)
    assert [x["examples"][0]["reference"] for x in (last, both)] == ["Deux.", "Un."]
    scores = [
        reflect(tiny_model, rows, tiny_tokenizer, train_on=t, **asked)["cross_entropy"][0] for t in ("last", "all")
    ]
    assert scores == pytest.approx([last["cross_entropy"], both["cross_entropy"]], rel=1e-5)
    args = SRDConfig(output_dir="out", use_cpu=True, report_to=[], train_on="all")
    trainer = SRDTrainer(tiny_model, make_tiny_model(3), args, rows, processing_class=tiny_tokenizer)
    labels = trainer.train_dataset[0]["labels"]
    assert sum(x != IGNORE_INDEX for x in labels) == both["num_tokens"]
    with pytest.raises(ValueError, match="unknown train_on 'first'"):
        SRDConfig(output_dir="out", train_on="first")
