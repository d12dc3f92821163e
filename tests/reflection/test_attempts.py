"""Pass rates over several sampled answers: what they are, that a kill changes nothing, and what cannot be asked for."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, UserError, reflect, register_engine
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.reflection import TransformersEngine
from srd_fast.reflection import reflect as reflecting

pytestmark = pytest.mark.usefixtures("own_registries")
SUMS: list[dict[str, Any]] = [
    {"instruction": "What is 3 + 4?", "output": "#### 7"},
    {"instruction": "What is the half of 18?", "output": "It is 9."},
    {"instruction": "Name a colour.", "output": "red"},
]
# By seed, in the order of the rows.
TABLE = {
    5: ["It is 7.", "9", "blue"],
    6: ["8", "it is nine", "blue 2"],
    7: ["3 + 4 = 7", "I take 9.0", "red"],
    8: ["7", "10", "green"],
}


class Answers:
    """An engine that gives the answers of a table: seed -> one text a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, table: dict[int, list[str]]) -> None:
        self.tokenizer, self.table, self.seeds = tokenizer, table, list[int]()
        self.places: dict[tuple[int, ...], int] = {}
        register_engine("answers", lambda *_, **__: self, replace=True)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        self.seeds.append(sampling.seed)
        for i, prompt in enumerate(prompts):
            text = self.tokenizer.decode(list(prompt))
            row = next(n for n, sample in enumerate(SUMS) if sample["instruction"] in text)
            yield i, self.tokenizer(self.table[sampling.seed][row]).input_ids


def run(model: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    given: dict[str, Any] = {
        "engine": "answers", "attempts": 4, "judge": "numeric_match", "signals": ["pass_rate", "exact_match"],
        "sampling": Sampling(max_new_tokens=9, temperature=1.0, seed=5), "progress": False,
    }  # fmt: skip
    return reflect(model, options.pop("rows", SUMS), tokenizer, **{**given, **options})


def test_the_pass_rate_is_the_share_of_attempts_that_pass(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = Answers(tiny_tokenizer, TABLE)
    found = run(tiny_model, tiny_tokenizer, keep_ids=True)
    assert engine.seeds == [5, 6, 7, 8]
    assert found["pass_rate"][:2] == [0.75, 0.5]
    assert math.isnan(found["pass_rate"][2]), "the reference of the third has no number"
    assert found["reason"] == [None, None, "pass_rate is nan, not a finite number"]
    assert found["attempts"] == [list(texts) for texts in zip(*TABLE.values())]
    assert found["generation"] == TABLE[5], "other signals and the page look at the first"
    assert [x[0] for x in found["attempt_ids"]] == found["generated_ids"]
    matches = run(tiny_model, tiny_tokenizer, judge="exact_match")
    assert matches["pass_rate"] == [0, 0, 0.25]
    assert matches["exact_match"] == [0, 0, 0]
    plain = run(tiny_model, tiny_tokenizer, attempts=1, judge="exact_match", signals=["exact_match"])
    assert plain.column_names == ["sample_id", "generation", "exact_match", "reason"]


def test_a_function_of_ones_own_judges(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    Answers(tiny_tokenizer, TABLE)
    (tmp_path / "mine.py").write_text(
        "def short(r): return [1 if len(g) < 5 else 0.5 for g in r.generations]\nshort.higher_is_easier = True\n"
        "def long(r): return [len(g) for g in r.generations]\nlong.higher_is_easier = False\n"
    )
    found = run(tiny_model, tiny_tokenizer, judge=f"{tmp_path}/mine.py:short", signals=["pass_rate"])
    assert found["pass_rate"] == [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match="judge 'long' does not say of an answer whether it passes"):
        run(tiny_model, tiny_tokenizer, judge=f"{tmp_path}/mine.py:long")


def test_code_passes_where_all_its_tests_do(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"both": 1.0, "one": 0.5, "none": 0.0}
    monkeypatch.setattr(
        "srd_fast.reflection.signals.pass_rates", lambda answers, tests, **_: [rates[a] for a in answers]
    )
    Answers(tiny_tokenizer, {5: ["both", "one", "none"], 6: ["both", "both", "one"], 7: ["one"] * 3, 8: ["both"] * 3})
    rows = [{**row, "tests": "pass"} for row in SUMS]
    found = run(tiny_model, tiny_tokenizer, rows=rows, judge="execution", signals=["pass_rate"])
    assert found["pass_rate"] == [0.75, 0.5, 0.25]


def test_killed_at_any_part_it_goes_on_and_gives_the_same(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [dict(row) for row in make_quickstart_rows(10, seed=3)]
    options: dict[str, Any] = {
        "rows": rows, "engine": "transformers", "batch_size": 1, "attempts": 3, "keep_ids": True,
        "sampling": Sampling(max_new_tokens=5, temperature=1.0), "signals": ["pass_rate", "rouge_l"],
        "judge": "exact_match",
    }  # fmt: skip
    whole = run(tiny_model, tiny_tokenizer, **options)
    assert any(len(set(map(tuple, ids))) > 1 for ids in whole["attempt_ids"]), "every attempt is the same"
    folder, made = tmp_path / "parts", []
    real = TransformersEngine.generate

    def counted(self: Any, prompts: Any, sampling: Sampling) -> Any:
        made.append(sampling.seed)
        if len(made) == 5:  # in the second of three attempts, of three parts each
            raise KeyboardInterrupt
        return real(self, prompts, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tiny_tokenizer, **options, parts_folder=folder)
    again = run(tiny_model, tiny_tokenizer, **options, parts_folder=folder)
    assert made == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    for name in whole.column_names:
        if name != "pass_rate":
            assert again[name] == whole[name], name
    # One attempt alone is the first of them.
    one = run(tiny_model, tiny_tokenizer, **{**options, "attempts": 1, "signals": ["rouge_l"]}, parts_folder=folder)
    assert one["generation"] == whole["generation"]
    assert len(made) == 10


def test_what_cannot_be_asked_for_is_said_before_any_work(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers(tiny_tokenizer, TABLE)
    monkeypatch.setattr(reflecting, "_generate", lambda *_: pytest.fail("answers are generated"), raising=False)
    for options, words in (
        ({"attempts": 0}, "attempts must be a whole number of at least 1, got 0"),
        ({"attempts": 1}, "'pass_rate' is a share of several attempts, and attempts is 1; set it to 8"),
        ({"signals": ["rouge_l"]}, "attempts is 4, and no signal looks at them: add 'pass_rate'"),
        ({"sampling": Sampling()}, "attempts is 4, and temperature is 0"),
        ({"judge": "cross_entropy"}, "judge 'cross_entropy' does not say"),
        ({"judge": "pass_rate"}, "judge 'pass_rate' does not say"),
        ({"judge": "numeric"}, "unknown difficulty signal 'numeric'; did you mean 'numeric_match'"),
    ):
        with pytest.raises(UserError, match=words):
            run(tiny_model, tiny_tokenizer, **options)
