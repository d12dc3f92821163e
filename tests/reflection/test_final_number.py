"""The final number of an answer, as GSM8K is judged."""

import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srd_fast.reflection import get_difficulty
from srd_fast.reflection.final_number import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 left. So 3 + 4 = 7.", "7"),
        ("7 apples, as he said\n#### 1,250", "1250"),
        ("#### 5 apples of 12", "5"),
        ("#### -3", "-3"),
        ("1 #### 2 #### $3.50", "3.5"),
        ("we get 12 ####", "12"),
        ("the total is $1,234,567.80!", "1234567.8"),
        ("in the end x=-5", "-5"),
        ("it costs -$5.", "-5"),
        ("10-5", "5"),
        ("10 - 5", "5"),
        ("1,2,3", "3"),
        ("a 4-year plan", "4"),
        ("a share of .5", "0.5"),
        ("\uff11\uff12", "12"),
        ("\u22124", "-4"),
        ("50%", "50"),
        ("3.0", "3"),
    ],
)
def test_the_last_number_counts(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


def test_a_text_without_a_number_has_none() -> None:
    assert final_number("") is final_number("none at all ####") is None


def scores(answers: list[str], references: list[list[str]]) -> list[float]:
    reflected: Any = SimpleNamespace(generations=answers, dataset={"references": references})
    return list(get_difficulty("numeric_match").function(reflected))


def test_an_answer_matches_by_its_number_alone() -> None:
    references = [["#### 7"], ["#### 7"], ["about 3", "or 4.0"], ["#### 1,000"], ["#### 7"]]
    found = scores(["It is 7 apples.", "7 of 8", "4", "1000.00", "no idea"], references)
    assert found == [1, 0, 1, 1, 0]
    unscored = scores(["7", "7"], [["no number"], ["8"]])
    assert unscored[0] != unscored[0]
    assert unscored[1] == 0


def test_references_of_gsm8k_match_themselves_alone(data_folder: Path | None) -> None:
    if data_folder is None:
        pytest.skip("no real data")
    rows = [json.loads(line) for line in (data_folder / "gsm8k_train.jsonl").read_text().splitlines()[:500]]
    references = [[row["output"]] for row in rows]
    assert set(scores([row["output"] for row in rows], references)) == {1.0}
    shifted = scores([rows[i - 1]["output"] for i in range(len(rows))], references)
    assert sum(shifted) < 0.1 * len(rows)
