"""Columns under other names, and rows that a function of the user's makes, of rows and of files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_data import prepare
from transformers import PreTrainedTokenizerFast

from srd_fast.data import PreparedData, Tokenisation, prepare_dataset, read_source
from srd_fast.errors import UserError

Row = dict[str, Any]
ROWS = [{"q": f"What is {i}?", "a": f"It is {i}.", "meta": {"by": "me", "hint": "h"}} for i in range(4)]
SAME = [{"instruction": row["q"], "output": row["a"]} for row in ROWS]
FILE = """
from pathlib import Path

def one(row):
    return {"question": row["q"], "answer": row["a"]}

def several(row):
    yield {"instruction": row["q"], "output": row["a"]}
    yield {"instruction": row["q"] + " Again?", "output": row["a"]}

def even(row):
    return one(row) if row["q"][8] in "02" else None

def picky(row):
    return {"instruction": row["q"], "output": row["answers"][0]}

def of_file(path):
    for line in Path(path).read_text().splitlines():
        question, _, answer = line.partition("|")
        yield {"instruction": question, "output": answer}

def broken(path):
    yield {"instruction": "a", "output": "b"}
    raise OSError("no more")

nothing = 3
def no_argument(): return []
"""


def made(rows: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> PreparedData:
    return prepare_dataset(rows, Tokenisation(tokenizer), **options)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


MAPPINGS: list[tuple[Row, Row]] = [
    ({"instruction": "q", "output": "a"}, {}),
    ({"question": "q", "answer": "a"}, {}),
    ({"instruction": "q", "input": "meta.hint", "output": "a"}, {"input": "h"}),
    ({"question": "q", "context": "meta.hint", "answer": "a"}, {"input": "h"}),
    ({"instruction": "q", "output": "a", "sample_id": "q"}, {}),
]


@pytest.mark.parametrize(("columns", "more"), MAPPINGS, ids=[str(i) for i in range(len(MAPPINGS))])
def test_columns_are_renamed(columns: Row, more: Row, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = made(ROWS, tiny_tokenizer, columns=columns).dataset
    expected = prepare([{**row, **more} for row in SAME], tiny_tokenizer).dataset
    given = [row["q"] for row in ROWS] if "sample_id" in columns else expected["sample_id"][:]
    assert found["sample_id"][:] == given
    assert found.remove_columns("sample_id").to_list() == expected.remove_columns("sample_id").to_list()


def test_a_mapping_decides_the_format(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**row, "instruction": "other", "output": "other"} for row in ROWS]
    found = made(rows, tiny_tokenizer, columns={"prompt": "q", "completion": "a"}).dataset
    as_they_are = [{"prompt": row["q"], "completion": row["a"]} for row in ROWS]
    assert found.to_list() == prepare(as_they_are, tiny_tokenizer).dataset.to_list()
    # What the rows have under its own name need not be mapped.
    half = [{"instruction": row["q"], "a": row["a"], "prompt": "x", "completion": "y"} for row in ROWS]
    assert made(half, tiny_tokenizer, columns={"output": "a"}).dataset.to_list() == (
        prepare(SAME, tiny_tokenizer).dataset.to_list()
    )


def test_the_mapping_that_a_refusal_names_does(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for rows in (
        [{"frage": row["q"], "antwort": row["a"]} for row in ROWS],
        [{"Question": row["q"], "Answer": row["a"], "id": 1} for row in ROWS],
        [{"translation": {"en": row["q"], "de": row["a"]}} for row in ROWS],
        [{"thread": [{"from": "human", "value": row["q"]}, {"from": "gpt", "value": row["a"]}]} for row in ROWS],
    ):
        with pytest.raises(UserError) as error:
            made(rows, tiny_tokenizer)
        typed = str(error.value).partition("columns: {")[2].partition("}")[0]
        columns = dict(pair.split(": ") for pair in typed.split(", "))
        found = made(rows, tiny_tokenizer, columns=columns).dataset
        assert found["references"][:] == [[row["a"]] for row in ROWS]


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"instruction": "qq", "output": "a"}, r"data has no such column: unknown column 'qq'; did you mean 'q'"),
        ({"instruction": "meta.nothing", "output": "a"}, "unknown column 'meta.nothing'"),
        ({"instrucion": "q", "output": "a"}, "unknown column of a row format 'instrucion'; did you mean 'instruction'"),
        (
            {"instruction": "q", "completion": "a", "messages": "m"},
            "no row format has completion, instruction, messages",
        ),
        ({"instruction": 3}, "columns must say which column is which"),
        (["q", "a"], "columns must say which column is which"),
    ],
)
def test_wrong_mappings_are_refused(columns: Any, complaint: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=complaint):
        made(ROWS, tiny_tokenizer, columns=columns)


def test_a_function_makes_rows_of_rows(mine: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = prepare(SAME, tiny_tokenizer).dataset.to_list()
    assert made(ROWS, tiny_tokenizer, data_function=f"{mine}:one").dataset.to_list() == expected
    assert (
        made(
            ROWS, tiny_tokenizer, data_function=lambda row: {"question": row["q"], "answer": row["a"]}
        ).dataset.to_list()
        == expected
    )
    assert len(made(ROWS, tiny_tokenizer, data_function=f"{mine}:several").dataset) == 8
    assert len(made(ROWS, tiny_tokenizer, data_function=f"{mine}:even").dataset) == 2
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, ROWS), "{"]))
    prepared = made(str(path), tiny_tokenizer, data_function=f"{mine}:one")
    assert prepared.dataset.to_list() == expected
    assert prepared.rejected[0][0] == "line 5"


def test_a_function_that_fails_rejects_its_row(mine: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*ROWS[:1], {**ROWS[1], "answers": ["x"]}]
    prepared = made(rows, tiny_tokenizer, data_function=f"{mine}:picky")
    assert prepared.rejected == [("row 1", "data_function picky fails with KeyError: 'answers'")]
    with pytest.raises(UserError, match="none of 4 rows is usable; first: row 1: expected an object, got int"):
        made(ROWS, tiny_tokenizer, data_function=lambda row: [1])


def test_a_function_makes_rows_of_files(mine: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, rows in zip(paths, (ROWS[:3], ROWS[3:])):
        path.write_text("\n".join(f"{row['q']}|{row['a']}" for row in rows))
    expected = prepare(SAME, tiny_tokenizer).dataset.to_list()
    for source in (paths, [str(p) for p in paths], str(tmp_path / "*.txt")):
        assert made(source, tiny_tokenizer, data_function=f"{mine}:of_file").dataset.to_list() == expected
    called = []

    def once(path: Path) -> Iterator[Row]:
        called.append(path)
        yield from SAME

    assert made(paths[0], tiny_tokenizer, data_function=once).dataset.to_list() == expected
    assert called == [paths[0]]
    with pytest.raises(UserError, match=r"broken fails on '.*a\.txt', behind row 1 with OSError: no more"):
        made(paths[0], tiny_tokenizer, data_function=f"{mine}:broken")
    with pytest.raises(UserError, match="must be a file for a data_function of files, got list"):
        made(ROWS, tiny_tokenizer, data_function=f"{mine}:of_file")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("{mine}:on", "data_function '.*mine.py:on': unknown function 'on'; did you mean 'one'"),
        ("{mine}:nothing", "is not a function but of type int"),
        ("{mine}:no_argument", "data_function no_argument must take a row, or a file as `path`"),
        ("absent.py:rows", "file 'absent.py' does not exist"),
        ("rows", "must be package.module:function or path/to/file.py:function"),
    ],
)
def test_functions_that_are_not_there(
    name: str, complaint: str, mine: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=complaint):
        made(ROWS, tiny_tokenizer, data_function=name.format(mine=mine))


def test_places_are_those_of_the_rows_that_rows_were_made_of(
    mine: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, [ROWS[0], {**ROWS[1], "a": 5}])))
    prepared = prepare_dataset(read_source(path), Tokenisation(tiny_tokenizer), data_function=f"{mine}:several")
    assert [where.partition(" (")[0] for where, _ in prepared.rejected] == [
        "line 3, made row 1", "line 3, made row 2",
    ]  # fmt: skip
