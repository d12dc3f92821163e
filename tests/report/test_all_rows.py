"""All rows in the page: as data that nothing executes, within its five megabytes, and where the picture has them."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import EVIL, Tags, write_full

from srd_fast.errors import UserError
from srd_fast.report import write_report
from srd_fast.report.plots import STRIP
from srd_fast.report.rows import Column, Table, Texts, fit

HOSTILE = (
    EVIL,
    "</script><script>alert(3)</script>",
    "<!-- <script> --> ]]> \u2028 \u2029 \\u003c/script> \" ' & \x00",
    "\ud800 lone, ‮ reversed, 😀",
)
SCRIPT = Path(write_report.__code__.co_filename).with_name("page.js")


def blocks(page: str) -> dict[str, Any]:
    """What the page's data blocks hold, by their id, read as a browser does: to the first end of a script."""
    found = re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script', page, re.DOTALL | re.IGNORECASE)
    return {name: json.loads(text) for name, text in found}


def write_rows(folder: Path, texts: tuple[str, ...], **changes: object) -> None:
    """evaluation.json with measures of every validation row."""
    ids = [f"row-{i:02d}" for i in range(24)]
    rows = {
        "sample_id": ids,
        "generation": [texts[i % len(texts)] for i in range(24)],
        "rouge_l": list(np.linspace(0, 1, 24)),
        "cross_entropy": list(np.linspace(10, 33, 24)),
        "kl": list(np.linspace(5, 28, 24)),
        "num_tokens": [10] * 24,
        **changes,
    }
    models = {name: {"key": "k", "rows": rows | ({"kl": None} if name == "teacher" else {})} for name in
              ("teacher", "start", "student")}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(models))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_full(tmp_path_factory.mktemp("run"))
    table = pq.read_table(folder / "reflections.parquet")
    answers = pa.array([HOSTILE[i % 3] for i in range(24)])
    pq.write_table(table.set_column(1, "generation", answers), folder / "reflections.parquet")
    write_rows(folder, HOSTILE)
    return write_report(folder)


def test_every_row_is_there_with_its_scores_and_texts(page: Path) -> None:
    found = blocks(page.read_text(encoding="utf-8"))
    assert set(found) == {"training-rows", "validation-rows"}
    train, validation = found["training-rows"], found["validation-rows"]
    assert train["ids"] == [f"row-{i:02d}" for i in range(24)]
    assert train["places"] == ["subset 1, easiest", "subset 2", "subset 3, hardest", "dropped", "unscored"]
    assert train["place"] == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 5 + [4]
    assert train["columns"][1]["values"][:2] == [1, 1.182]
    assert train["columns"][1]["values"][23] is None
    answers = next(x["values"] for x in train["texts"] if x["label"] == "student's answer")
    assert answers[:3] == list(HOSTILE[:3])
    titles = [x["title"] for x in validation["columns"]]
    assert titles == ["ROUGE‑L, teacher", "ROUGE‑L, start", "ROUGE‑L, distilled", "KL, start", "KL, distilled"]
    assert validation["columns"][4]["values"][0] == 0.5
    assert [x["label"] for x in validation["texts"]][2:] == ["teacher", "starting student", "distilled student"]
    assert validation["texts"][2]["values"][3] == HOSTILE[3].replace("\ud800", "?")


def test_points_are_where_the_picture_has_them(page: Path) -> None:
    train = blocks(page.read_text(encoding="utf-8"))["training-rows"]
    heights = train["columns"][0]["values"]
    assert heights[1:20] == pytest.approx(list(np.linspace(100, 0, 21))[1:20], rel=1e-3)
    assert 100 + STRIP[0] < heights[0] < 100 + STRIP[1]
    assert all(-STRIP[1] < height < -STRIP[0] for height in heights[20:23])
    for frame in (train["map"]["wide"], train["map"]["narrow"]):
        assert 0 < frame["left"] < frame["right"] < 1
        assert 0 < frame["top"] < frame["bottom"] < 1
        assert (frame["y0"], frame["y1"]) == pytest.approx((-STRIP[1] - 1.5, 100 + STRIP[1] + 1.5))
        assert frame["x1"] == pytest.approx(1.02 * train["map"]["edge"], rel=1e-4)


def test_the_script_makes_text_and_never_markup() -> None:
    script = SCRIPT.read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|srcdoc|fetch\(|import\(", script
    )
    assert "</" not in script


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_a_browser_lists_the_rows_and_runs_nothing_else(page: Path, tmp_path: Path) -> None:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    shown = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    assert shown.count("1–10 of 24 rows") == 2
    assert shown.count('<tr class="row">') == 20
    assert "<script" not in shown
    assert not [x for tag, found in Tags(shown).tags if tag == "img" and "evil" in (x := found["src"] or "")]
    assert "&lt;script&gt;alert(1)" in shown


@pytest.mark.parametrize(
    ("count", "length", "budget"),
    [
        (100_000, 900, 4_000_000),
        (3_000, 4_000, 300_000),
        (40, 20_000, 900_000),
        (60, 300, 2_000_000),
        (5_000, 90, 90_000),
    ],
)
def test_a_table_fits_its_bytes_and_says_what_it_left_out(count: int, length: int, budget: int) -> None:
    text = "Füße <b> & ".ljust(length, "x")
    ids = [f"{i:016x}" for i in range(count)]
    scores = np.random.default_rng(0).uniform(0, 6, count)
    columns = [Column("a", "points", scores * 10), Column("b", "nats", scores)]
    table = Table(ids, columns, [Texts("prompt", [text] * count), Texts("reference", [text] * count)])
    found, said = fit(table, budget)
    assert len(found.encode()) <= budget
    content = json.loads(found)
    with_text = len(content["with_texts"])
    assert [len(x["values"]) for x in content["texts"]] == [with_text] * 2
    listed = len(content["ids"])
    assert len(content["columns"][0]["values"]) == listed
    assert (f"{listed:,} of {count:,} rows are listed" in said) == (listed < count)
    assert (f"{with_text:,} of the listed" in said) == (with_text < listed)
    assert with_text > 0
    if said:
        assert len(found) > 0.5 * budget  # nothing is left out while there is room
    if listed < count:
        assert (content["ids"][0], content["ids"][-1]) == (ids[0], ids[-1])
    if with_text < listed:  # spread over the whole table
        assert np.diff([0, *content["with_texts"], listed]).max() <= 4 * listed / with_text + 1


@pytest.mark.slow
def test_a_page_of_100000_rows_is_five_megabytes_at_most(tmp_path: Path) -> None:
    count = 100_000
    random = np.random.default_rng(0)
    ids = [f"{i:016x}" for i in range(count)]
    (tmp_path / "data").mkdir()
    prompts = [f"### Instruction:\nWhat is {i} + {i}?\n\n### Response:\n" for i in range(count)]
    references = [[f"It is {2 * i}. " * 8] for i in range(count)]
    train = pa.table({"sample_id": ids, "prompt": prompts, "references": references})
    pq.write_table(train, tmp_path / "data" / "train.parquet")
    rouge, entropy = random.uniform(-0.2, 1.2, count).clip(0, 1), random.gamma(4, 1, count)
    scores = {"sample_id": ids, "generation": prompts, "rouge_l": rouge, "cross_entropy": entropy}
    pq.write_table(pa.table(scores), tmp_path / "reflections.parquet")
    page = write_report(tmp_path)
    assert 3_000_000 < page.stat().st_size <= 5_000_000
    text = page.read_text(encoding="utf-8")
    assert len(blocks(text)["training-rows"]["ids"]) == count
    assert "of the listed have their texts, so that the page stays small" in text


def test_measures_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for change, said in (
        ({"rouge_l": [0.5]}, "rouge_l must be as long as sample_id"),
        ({"kl": ["a"] * 24}, "kl must be a list of numbers"),
        ({"generation": []}, "generation must be as long"),
    ):
        write_rows(tmp_path, ("x",), **change)
        with pytest.raises(
            UserError, match=rf"evaluation\.json: teacher\.rows\.{said}|evaluation\.json: start\.rows\.{said}"
        ):
            write_report(tmp_path)


def test_a_run_from_before_there_were_measures_of_rows_has_its_page(tmp_path: Path) -> None:
    write_full(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"teacher": {"key": "k", "rouge_l": 0.4}}))
    for name in ("metrics.jsonl", "summary.json", "reflections.parquet"):
        (tmp_path / name).unlink()
    assert not blocks(write_report(tmp_path).read_text())
