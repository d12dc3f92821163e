"""The table of architectures in docs/models.md says what happens."""

import pytest
from architectures import NAMES
from model_table import COLUMNS, YES, read_table, try_architecture

# As unlike as they come; the rest takes minutes.
SAMPLE = ("gemma3", "lfm2", "deepseek_v3")


def test_every_architecture_has_a_row() -> None:
    table = read_table()
    assert tuple(table) == NAMES
    assert all(row[column] for row in table.values() for column in COLUMNS)
    assert sum(said == YES for row in table.values() for said in row.values()) > 500


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_says_what_happens(name: str) -> None:
    assert try_architecture(name) == read_table()[name]


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLE])
def test_the_other_rows_say_what_happens(name: str) -> None:
    assert try_architecture(name) == read_table()[name]
