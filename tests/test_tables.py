"""README's tables are those of the committed rows, and say what the rows say."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import tables
from benchmarks.rows import RESULTS, Row


def test_readme_is_current() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert tables.render(text, tables.all_rows(RESULTS)) == text, "run python -m benchmarks.tables"


def test_readme_has_every_table_once() -> None:
    names = [m[1] for m in tables.BLOCK.finditer(tables.README.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(tables.TABLES)


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_has_rows(name: str) -> None:
    head, line, *body = tables.TABLES[name](tables.all_rows(RESULTS)).strip().split("\n")
    columns = head.count("|")
    assert body
    assert all(x.count("|") == columns for x in (line, *body))


@pytest.mark.parametrize("name", tables.TABLES)
def test_without_rows_a_table_is_its_head(name: str) -> None:
    assert tables.TABLES[name]([]).count("\n") == 2


def test_a_group_is_a_line_and_ratios_are_of_its_own_figures() -> None:
    def row(provider: str, metric: str, value: float, case: str = "jsd") -> Row:
        group = ("loss", case, "smollm2 N=1024 V=49152 D=576/960", "float32", "some CPU", 2)
        return Row(*group, provider, "1", metric, value, "2.13", "2026-01-01")

    rows = [row("gemms", "seconds", 2.0), row("srd-fast", "seconds", 3.0), row("plain", "seconds", 8.0)]
    rows += [row("gemms", "seconds", 4.0, "tvd"), row("srd-fast", "seconds", 5.0, "tvd")]
    _, _, *body = tables.loss_time(rows).strip().split("\n")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in body]
    assert cells == [
        ["smollm2 1,024 x 49,152", "float32", "jsd", "2.00", "3.00 (1.50x)", "8.00 (4.00x)"],
        ["smollm2 1,024 x 49,152", "float32", "tvd", "4.00", "5.00 (1.25x)", ""],
    ]


def test_no_figure_in_the_measured_part_stands_outside_of_the_tables() -> None:
    text = tables.README.read_text(encoding="utf-8")
    measured = text[text.index("## Measured") : text.index("## Your own models")]
    words = tables.BLOCK.sub("", measured)
    units = re.findall(r"\d[\d.,]*\s?(?:s|ms|x|times|MB|MiB|%)\b", words)
    assert not units, f"figures without a row: {units}"
