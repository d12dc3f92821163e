"""The quickstart rows are reproducible, distinct, balanced and right."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from itertools import pairwise

import pytest

from srd_fast.data.quickstart import FAMILIES, MAX_ROWS, make_quickstart_rows, make_quickstart_splits

ROWS = make_quickstart_rows(MAX_ROWS, seed=3)
FACTORS = {
    ("kilometers", "meters"): 1000, ("meters", "centimeters"): 100, ("centimeters", "millimeters"): 10,
    ("kilograms", "grams"): 1000, ("liters", "milliliters"): 1000, ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60, ("days", "hours"): 24, ("weeks", "days"): 7, ("feet", "inches"): 12,
    ("yards", "feet"): 3, ("pounds", "ounces"): 16,
}  # fmt: skip


def _key(row: dict[str, str]) -> tuple[str, str]:
    return row["instruction"], row["input"]


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _payload(row: dict[str, str]) -> str:
    """The text a prompt is about: the input, or what follows the colon or stands in double quotes."""
    return row["input"] or re.split(r": | \"", row["instruction"], maxsplit=1)[1].rstrip('"')


def _arithmetic(row: dict[str, str]) -> None:
    prompt = row["instruction"] + " " + row["input"]
    a, b = _integers(prompt)
    if "Subtract" in prompt:
        expected = b - a
    elif re.search(r"times|Multiply", prompt):
        expected = a * b
    else:
        assert re.search(r"\+|Add", prompt)
        expected = a + b
    assert _integers(row["output"])[-1] == expected


def _comparison(row: dict[str, str]) -> None:
    numbers = re.findall(r"\d+(?:\.\d+)?", row["instruction"] + " " + row["input"])
    small, large = sorted(numbers, key=Decimal)
    assert Decimal(small) < Decimal(large)
    answer = re.findall(r"\d+(?:\.\d+)?", row["output"])
    if len(answer) == 2:
        assert answer == ([large, small] if "larger" in row["output"] else [small, large])
    else:
        assert answer == [small if "smaller" in row["instruction"] else large]


def _sort_numbers(row: dict[str, str]) -> None:
    expected = sorted(_integers(_payload(row)), reverse="descending" in row["instruction"])
    assert _integers(row["output"]) == expected
    assert len(set(expected)) == len(expected) >= 3


def _order_words(row: dict[str, str]) -> None:
    words = _payload(row).split(", ")
    reverse = "Reverse" in row["instruction"] or "last to first" in row["instruction"]
    assert row["output"].split(": ")[-1].split(", ") == (words[::-1] if reverse else sorted(words))


def _sequence(row: dict[str, str]) -> None:
    terms = _integers(row["instruction"] + " " + row["input"])
    steps = {after - before for before, after in pairwise(terms)}
    assert len(steps) == 1
    step, answer = steps.pop(), _integers(row["output"])
    if "how much" in row["instruction"]:
        assert answer == [abs(step)]
        assert ("increases" in row["output"]) == (step > 0)
    else:
        assert answer == [terms[-1] + step * (i + 1) for i in range(len(answer))]


def _units(row: dict[str, str]) -> None:
    quantities = {}
    for number, unit in re.findall(r"(\d+) ([a-z]+)", f"{row['instruction']} {row['input']} {row['output']}"):
        quantities[unit] = int(number)
    (first, m), (second, n) = quantities.items()
    factor = FACTORS.get((first, second))
    assert n == m * factor if factor else m == n * FACTORS[second, first]


def _word_problem(row: dict[str, str]) -> None:
    a, b = _integers(row["instruction"])
    operations = {"gives": a - b, "in all": a + b, "boxes": a * b, "shares": a // b}
    (expected,) = (value for word, value in operations.items() if word in row["instruction"])
    assert _integers(row["output"])[-1] == expected
    assert "shares" not in row["instruction"] or a % b == 0


def _explanation(row: dict[str, str]) -> None:
    numbers = _integers(row["output"])
    assert numbers[0] == _integers(row["instruction"])[0]
    if "divisible" in row["instruction"]:
        assert numbers[0] == numbers[3] * numbers[2] == numbers[4]
        assert numbers[1] == numbers[2]
    else:
        assert numbers[1] == numbers[0] % 10
        assert ("even" if numbers[0] % 2 == 0 else "odd") in row["output"].split(" because")[0]
        if "be divided" in row["output"]:
            assert ("cannot" in row["output"]) == (numbers[0] % 2 == 1)


def _count_words(row: dict[str, str]) -> None:
    assert _integers(row["output"]) == [len(re.findall(r"[A-Za-z]+", _payload(row)))]


def _spelling(row: dict[str, str]) -> None:
    word = row["input"] or re.findall(r"'(\w+)'|spell (\w+)\?", row["instruction"])[0]
    word = word if isinstance(word, str) else "".join(word)
    assert row["output"].split()[-1].rstrip(".").split("-") == list(word)


def _reverse_string(row: dict[str, str]) -> None:
    word = row["input"] or re.sub(r"Reverse the word|Spell|backwards|\W", "", row["instruction"])
    answer = row["output"].split()[-1].rstrip(".")
    assert "".join(reversed(answer)) == word


def _uppercase(row: dict[str, str]) -> None:
    assert row["output"].isupper()
    assert row["output"].lower() == _payload(row).lower()


def _echo(row: dict[str, str]) -> None:
    assert row["output"] == _payload(row)


def _date_format(row: dict[str, str]) -> None:
    formats = ("%B %d, %Y", "%Y-%m-%d", "%d/%m/%Y")
    pattern = r"[A-Z][a-z]+ \d+, \d{4}|\d{4}-\d\d-\d\d|\d\d/\d\d/\d{4}"
    dates = []
    for text in re.findall(pattern, f"{row['instruction']} {row['input']} {row['output']}"):
        for form in formats:
            try:
                dates.append(datetime.strptime(text, form))
            except ValueError:
                continue
    assert len(dates) == 2
    assert dates[0] == dates[1]


def _json_object(row: dict[str, str]) -> None:
    record, sentence = sorted((row["input"], row["output"]), key=lambda text: text[0] != "{")
    facts = json.loads(record)
    assert list(facts) == ["name", "age", "city"]
    assert sentence == f"{facts['name']} is {facts['age']} years old and lives in {facts['city']}."


def _extraction(row: dict[str, str]) -> None:
    answer = row["output"].removeprefix("The date is ").rstrip(".")
    assert answer in row["input"]
    pattern = {"Ext": r"\S+@example\.com", "Whi": r"[A-Z][a-z]+ \d+, \d{4}", "Fin": r"[A-Z][a-z]+ [A-Z][a-z]+"}
    assert re.fullmatch(pattern[row["instruction"][:3]], answer)


VERIFIERS: dict[str, Callable[[dict[str, str]], None]] = {
    check.__name__.lstrip("_"): check
    for check in (
        _arithmetic, _comparison, _sort_numbers, _order_words, _sequence, _units, _word_problem, _explanation,
        _count_words, _spelling, _reverse_string, _uppercase, _echo, _date_format, _json_object, _extraction,
    )
}  # fmt: skip


@pytest.mark.parametrize("topic", VERIFIERS)
def test_answer_follows_from_the_prompt(topic: str) -> None:
    rows = [row for row in ROWS if row["topic"] == topic]
    assert len(rows) >= 90
    for row in rows:
        VERIFIERS[topic](row)


def test_rows_are_pinned() -> None:
    text = json.dumps(make_quickstart_rows(50, 0), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    assert digest == "95b1b7644a241fadc810e66c45bbfd08"


def test_seed_decides_and_longer_lists_extend_shorter_ones() -> None:
    assert make_quickstart_rows(300, 5) == make_quickstart_rows(300, 5)
    assert make_quickstart_rows(300, 5)[:77] == make_quickstart_rows(77, 5)
    assert make_quickstart_rows(77, 5) != make_quickstart_rows(77, 6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_twice_and_families_balanced(seed: int) -> None:
    rows = make_quickstart_rows(2000, seed)
    assert len(rows) == len({_key(row) for row in rows}) == 2000
    counts = Counter(row["topic"] for row in rows)
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_template_is_used() -> None:
    for topic, (templates, _) in FAMILIES.items():
        assert len(templates) >= 2
        for instruction, context, _ in templates:
            pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(instruction))
            assert any(
                row["topic"] == topic
                and re.fullmatch(pattern, row["instruction"])
                and bool(row["input"]) == bool(context)
                for row in ROWS
            )


def test_rows_are_plain_complete_text() -> None:
    for row in ROWS:
        assert list(row) == ["instruction", "input", "output", "topic"]
        for field, text in row.items():
            assert text == text.strip()
            assert text.isascii()
            assert text or field == "input"
        assert not re.search(r"\{\w*\}|=>|\|", "".join(row.values()))
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", row["instruction"] + row["output"])
    lengths = [len(row["output"].split()) for row in ROWS]
    assert max(lengths) <= 30
    assert 4 <= sum(lengths) / len(lengths) <= 12


def test_splits_are_disjoint_and_balanced() -> None:
    train, validation = make_quickstart_splits(1900, 100, seed=4)
    assert (len(train), len(validation)) == (1900, 100)
    assert not {_key(row) for row in train} & {_key(row) for row in validation}
    assert {row["topic"] for row in validation} == {row["topic"] for row in train} == set(FAMILIES)


def test_validation_does_not_depend_on_the_number_of_training_rows() -> None:
    assert make_quickstart_splits(10, 60, seed=4)[1] == make_quickstart_splits(900, 60, seed=4)[1]


@pytest.mark.parametrize("arguments", [(-1, 0), (MAX_ROWS + 1, 0), (1, -1)])
def test_bad_row_counts_and_seeds_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        make_quickstart_rows(*arguments)


@pytest.mark.parametrize("counts", [(-1, 5), (5, -1), (MAX_ROWS, 1)])
def test_bad_split_sizes_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        make_quickstart_splits(*counts, seed=0)
