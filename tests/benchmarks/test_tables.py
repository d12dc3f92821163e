"""README's tables are those of the committed rows, and say what the rows say."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
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


def test_steps_on_a_gpu_are_beside_gkd_and_the_plain_loop() -> None:
    def rows(side: str, batch: str = ", batch 8", device: str = "some GPU", **figures: float) -> list[Row]:
        case = "a step" if batch else "largest batch"
        who = (case, f"qwen2.5-7b-1.5b{batch}, samples of 256 to 1024 tokens", "bfloat16", device, 16, side, "1")
        return [Row("train_gpu", *who, m.replace("_at_", "@"), x, "2.11", "2026-01-01") for m, x in figures.items()]

    def step(seconds: float, loss: float, **more: float) -> dict[str, float]:
        times = {"step_seconds": seconds, "step_seconds_p20": seconds - 0.01, "step_seconds_p80": seconds + 0.01}
        return {"fits": 1, **times, "tokens_per_second": 5000, "loss_at_1": 2.0, "loss_at_2": loss, **more}

    profile = {"gpu_busy_share": 0.9, "kernels": 1234.4, "synchronisations": 2.5, "peak_bytes": 3 * 2**30}
    old = Row("train_gpu", "srd-fast, cache", "x", "bfloat16", "a", 1, "plain loop", "1", "step_seconds", 1, "2", "1")
    lora = "srd-fast, cache, LoRA"
    given = [old, *rows("plain loop", fits=0), *rows("trl DistillationTrainer", failed=1)]
    given += rows("trl GKDTrainer", **step(0.4, 2.0)) + rows("srd-fast, cache", **step(0.1, 2.002, **profile))
    given += rows(lora, **step(0.2, 3.0))
    given += rows("srd-fast, cache", "", largest_batch=96, searched_to=512)
    given += rows("trl GKDTrainer", "", largest_batch=512, searched_to=512)

    def cells(text: str) -> list[list[str]]:
        return [[c.strip() for c in line.strip("|").split("|")] for line in text.strip().split("\n")]

    head, _, *body = cells(tables.train_gpu(given))
    assert head[:4] == ["pair", "batch", "", "a step, ms"]
    measured = ["90 %", "1,234", "2.5", "3.0", "5,000", "1.0e-03", "96"]
    assert body == [
        ["qwen2.5-7b-1.5b", "8", "srd-fast, cache", "100 (90 to 110)", "0.25x", *measured],
        ["qwen2.5-7b-1.5b", "8", "trl GKDTrainer", "400 (390 to 410)", "1.00x", *[""] * 4, "5,000", "", "512 or more"],
        ["qwen2.5-7b-1.5b", "8", "plain loop", "out of memory", *[""] * 8],
        [
            "qwen2.5-7b-1.5b",
            "8",
            "srd-fast, cache, LoRA",
            "200 (190 to 210)",
            "0.50x",
            *[""] * 4,
            "5,000",
            "0.0e+00",
            "",
        ],
        ["qwen2.5-7b-1.5b", "8", "trl DistillationTrainer", "failed", *[""] * 8],
    ]
    other = rows("srd-fast, cache", device="another", **step(0.3, 2.0))
    head, _, first, *_ = cells(tables.train_gpu(given + other))
    assert (head[0], first[0]) == ("GPU", "another")
    assert first[5] == ""  # no GKDTrainer of its own


def test_no_figure_in_the_measured_part_stands_outside_of_the_tables() -> None:
    text = tables.README.read_text(encoding="utf-8")
    measured = text[text.index("## Measured") : text.index("## Your own models")]
    words = tables.BLOCK.sub("", measured)
    units = re.findall(r"\d[\d.,]*\s?(?:s|ms|x|times|MB|MiB|%)\b", words)
    assert not units, f"figures without a row: {units}"
