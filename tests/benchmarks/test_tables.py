"""The tables of README and of the docs are those of the committed rows, and say what the rows say."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import tables
from benchmarks.claims import CLAIMS
from benchmarks.rows import RESULTS, Row
from benchmarks.wire import traffic, wire


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_a_page_is_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.render(text, tables.all_rows(RESULTS)) == text, "run python -m benchmarks.tables"


def test_the_page_has_the_traffic_that_is_counted() -> None:
    page = (tables.ROOT / "docs" / "many_gpus.md").read_text(encoding="utf-8")
    assert f"<!-- wire -->\n{wire([8, 64], 8192, 4096)}<!-- end -->" in page, "copy what benchmarks.wire prints"


def test_traffic_is_that_of_its_arithmetic() -> None:
    found = {(n, t.name): t for n in (8, 64) for t in traffic(n, 8192, 4096)}
    # 7/8 of the teacher's weights but its head, 2 bytes each.
    assert found[8, "teacher in FSDP2, beside"].received == 7 / 8 * 2 * (70.6e9 - 128256 * 8192)
    assert found[8, "teacher on ranks of its own"].received == 4096 * 8192 * 2
    # Of 8 x 4,096 rows: hidden states of both, 16 bytes of numbers, 40 of states from each rank, the gradient back.
    rows = 8 * 4096
    assert found[8, "loss: head in shards over 8 GPUs"].received == (
        7 / 8 * rows * (2 * (4096 + 8192) + 16) + 7 * rows * 40 + 7 / 8 * rows * 4 * 4096
    )
    assert found[64, "loss: head in shards over 8 GPUs"] == found[8, "loss: head in shards over 8 GPUs"]
    assert found[8, "student in FSDP2: gathered twice, gradient scattered"].products == pytest.approx(0.92, abs=0.005)


def test_every_table_stands_on_a_page() -> None:
    names = {m[1] for page in tables.PAGES for m in tables.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert names == set(tables.TABLES)


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
    assert (head[0], first[0]) == ("machine", "another, 16 threads")
    assert first[5] == ""  # no GKDTrainer of its own
    assert [line[0] for line in cells(tables.train_gpu(given + other))[3:]] == ["some GPU, 16 threads"] * 5


H100, H200 = ("H100", 16), ("H200", 16)
GEMMA = "gemma3 N=8192 V=262144 D=640/1152"


def measured(
    benchmark: str, machine: tuple[str, int], provider: str, case: str = "jsd", shape: str = GEMMA, **figures: float
) -> list[Row]:
    """Rows of one provider on one machine."""
    who = (benchmark, case, shape, "bfloat16", *machine, provider, "1")
    return [Row(*who, m.replace("_at_", "@"), x, "2.11", "2026-01-01") for m, x in figures.items()]


def lines_of(text: str) -> list[list[str]]:
    """Cells of a table's head and body."""
    head, _, *body = [[c.strip() for c in line[1:-1].split("|")] for line in text.strip().split("\n")]
    return [head, *body]


def test_a_loss_is_divided_by_the_products_of_its_own_machine() -> None:
    rows = measured("loss_gpu", H100, "gemms", seconds=0.020) + measured("loss_gpu", H100, "srd-fast", seconds=0.030)
    rows += measured("loss_gpu", H200, "gemms", seconds=0.010) + measured("loss_gpu", H200, "srd-fast", seconds=0.020)
    rows += measured("loss_gpu", ("H100", 8), "srd-fast", seconds=0.040)
    head, *body = lines_of(tables.loss_time(rows, "loss_gpu", "ms"))
    assert head[:2] == ["machine", "N x V"]
    assert [[line[0], *line[-2:]] for line in body] == [
        ["H100, 16 threads", "20.00", "30.00 (1.50x)"],
        ["H100, 8 threads", "", "40.00"],  # its run had no products
        ["H200, 16 threads", "10.00", "20.00 (2.00x)"],
    ]
    assert lines_of(tables.loss_time([r for r in rows if r.device == "H200"], "loss_gpu", "ms"))[0][0] == "N x V"


def test_other_tables_divide_by_what_their_own_machine_has() -> None:
    some, other = ("one CPU", 2), ("another CPU", 2)
    rows = measured("train", some, "plain loop", "cache, KL alone", "x, 6 steps", step_seconds=2.0)
    rows += measured("train", some, "trl", "cache, KL alone", "x, 6 steps", step_seconds=3.0)
    rows += measured("train", other, "plain loop", "cache, KL alone", "x, 6 steps", step_seconds=1.0)
    rows += measured("train", other, "plain loop", "cache, KL alone, memory", "x, 6 steps", peak_bytes=7e6)
    assert lines_of(tables.train_rivals(rows)) == [
        ["machine", "", "dtype", "a step, s", "peak resident MB", "losses apart"],
        ["one CPU, 2 threads", "plain loop", "bfloat16", "2.00 (1.00x)", "", ""],
        ["one CPU, 2 threads", "trl", "bfloat16", "3.00 (1.50x)", "", ""],
        ["another CPU, 2 threads", "plain loop", "bfloat16", "1.00 (1.00x)", "7", ""],
    ]
    reflected = {"start_seconds": 1, "generate_seconds": 2, "score_seconds": 3, "equal_answers": 1}
    for machine, speed in ((some, 10.0), (other, 40.0)):
        for name, times in (("script", 1), ("vllm", 5)):
            figures = {**reflected, "tokens_per_second": times * speed, "seconds": 60 / times}
            rows += measured("reflect", machine, name, "greedy", "x, 64 rows", **figures)
    found = {(line[0], line[3]): line[4] for line in lines_of(tables.reflect(rows))[1:]}
    assert found["one CPU, 2 threads", "vllm"] == "50 (5.0x)"
    assert found["another CPU, 2 threads", "vllm"] == "200 (5.0x)"
    for machine, loss in ((some, 1e-3), (other, 2e-3)):
        for case in ("T = 1", "T = 2")[: 1 + (machine == some)]:
            figures = {"bytes_per_token": 96, "loss_error": loss, "gradient_error": 10 * loss}
            rows += measured("stores", machine, "top 8", case, "x", **figures)
    assert lines_of(tables.stores(rows))[1:] == [
        ["one CPU, 2 threads", "top 8", "96", "1.0e-03, 1.0e-02", "1.0e-03, 1.0e-02"],
        ["another CPU, 2 threads", "top 8", "96", "2.0e-03, 2.0e-02", ""],
    ]


# README's reasons come from several machines as they are.
@pytest.mark.parametrize("name", [name for name in tables.TABLES if name != "claims"])
def test_a_second_machine_doubles_a_table_and_changes_no_cell(name: str) -> None:
    machines: dict[str, str] = {}
    here = [r for r in tables.all_rows(RESULTS) if machines.setdefault(r.benchmark, r.machine) == r.machine]
    both = here + [replace(r, device=f"not {r.device}") for r in here]
    once, (head, *body) = lines_of(tables.TABLES[name](here)), lines_of(tables.TABLES[name](both))
    assert head == ["machine", *once[0]]
    assert len(body) == 2 * (len(once) - 1)
    for machine in {line[0] for line in body}:
        assert sorted(line[1:] for line in body if line[0] == machine) == sorted(once[1:])


def test_a_reason_names_the_machine_only_where_there_are_several() -> None:
    here = tables.all_rows(RESULTS)
    once = lines_of(tables.claims(here))
    assert len(once) == 1 + len(CLAIMS)
    both = lines_of(tables.claims(here + [replace(r, device=f"not {r.device}") for r in here]))
    assert both[0] == ["machine", *once[0]]
    assert sorted(line[1:] for line in both[1:]) == sorted(2 * once[1:])
    assert all(f"not {line[0]}" in {other[0] for other in both[1:]} or line[0].startswith("not ") for line in both[1:])


def test_who_was_left_out_says_why_in_its_cell() -> None:
    reason = "its kernels need a GPU | " + 20 * "long words "
    rows = measured("loss", ("a CPU", 2), "gemms", seconds=1.0) + measured(
        "loss", ("a CPU", 2), "srd-fast", seconds=2.0
    )
    rows += [replace(r, note=reason) for r in measured("loss", ("a CPU", 2), "quack (CE alone)", left_out=1.0)]
    rows += measured("loss", ("a CPU", 2), "gemms", "tvd", seconds=1.0)
    head, first, second = lines_of(tables.loss_time(rows))
    assert head[-2:] == ["srd-fast", "quack (CE alone)"]
    assert first[-2] == "2.00 (2.00x)"
    assert first[-1].startswith("its kernels need a GPU / long words")
    assert len(first[-1]) <= 80
    assert second[-2:] == ["", ""]
    limit = measured(
        "limits", ("a CPU", 2), "srd-fast", "4 GiB", "gemma3 V=9 D=1/2, jsd", largest_rows=64, searched_to=64
    )
    gone = measured("limits", ("a CPU", 2), "torchtune", "4 GiB", "gemma3 V=9 D=1/2, jsd", left_out=1.0)
    assert lines_of(tables.limits(limit + [replace(r, note="no such loss") for r in gone]))[1][-2:] == [
        "64 or more",
        "no such loss",
    ]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_no_measured_figure_stands_outside_of_the_tables(page: Path) -> None:
    words = tables.BLOCK.sub("", page.read_text(encoding="utf-8"))
    units = re.findall(r"\d[\d.,]*\s?(?:s|ms|x|times|MB|MiB|%)\b", words)
    assert not units, f"figures without a row: {units}"
