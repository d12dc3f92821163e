"""The HTML report: nothing from the data is markup, nothing is loaded, every section tells what it has or lacks."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srd_fast.errors import UserError
from srd_fast.report import write_report
from srd_fast.report.plots import smooth_by_stage, stage_bands
from srd_fast.report.read import read_run

EVIL = '<script>alert(1)</script><img src="https://evil.example/x.png" onerror=alert(2)>'
SECTIONS = (
    "Before and after",
    "Difficulty map",
    "What the ranking follows",
    "Stages over time",
    "Loss and validation",
    "Speed and memory",
    "Samples",
    "Unscored rows",
    "Timings",
    "Environment and configuration",
)


def write_plan(folder: Path, **changes: object) -> None:
    ids = [f"row-{i:02d}" for i in range(24)]
    plan = {
        "format": "srd_fast.plan/1",
        "method": "srd",
        "keep": 0.75,
        "stages": 3,
        "rrf_k": 60,
        "signals": {"rouge_l": {"higher_is_easier": True, "weight": 1.0}},
        "subsets": [ids[:6], ids[6:12], ids[12:18]],
        "dropped": [{"sample_id": sample_id, "reason": "hardest quarter"} for sample_id in ids[18:23]],
        "unscored": [{"sample_id": ids[23], "reason": f"empty reference {EVIL}"}],
        "fused": {sample_id: 0.03 - 0.001 * i for i, sample_id in enumerate(ids[:23])},
    }
    (folder / "plan.json").write_text(json.dumps(plan | changes))


def write_metrics(folder: Path, tail: str = "") -> None:
    rows: list[dict[str, object]] = [{"kind": "eval", "step": 0, "kl": 4.0, "cross_entropy": 6.0}]
    for step in range(1, 13):
        stage = (step + 3) // 4
        rows.append(
            {"kind": "train", "step": step, "stage": stage, "temperature": 0.5 + stage / 2, "sft_weight": 0.2}
            | {"learning_rate": 4e-4, "loss": 5 / step, "divergence": 4 / step, "tokens_per_second": 900.0}
            | {"memory_mb": 3000.0, "seconds": float(step), "an_unknown_key": [1]}
        )
    rows.append({"kind": "eval", "step": 12, "kl": 0.9, "cross_entropy": 2.3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def write_summary(folder: Path) -> None:
    def scores(rouge_l: float, cross_entropy: float, kl: float | None) -> dict[str, object]:
        example = {"sample_id": "v1", "prompt": EVIL, "reference": "yes", "generation": "no"}
        return {"rouge_l": rouge_l, "rouge_l_std": 0.01, "cross_entropy": cross_entropy, "kl": kl} | {
            "num_samples": 100,
            "num_tokens": 7000,
            "examples": [example],
        }

    summary = {
        "srd_fast_version": "0.1.0",
        "teacher": f"org/teacher{EVIL}",
        "student": "/models/small-student",
        "divergence": "forward_kl",
        "data": {"train": 24, "validation": 100, "rejected": 1},
        "evaluation": {
            "teacher": scores(0.462, 1.6, None),
            "start": scores(0.076, 6.5, 4.987),
            "student": scores(0.398, 2.341, 0.931),
        },
        "timings": {"prepare": 1.0, "reflect": 90.0, "distill": 4000.0},
        "training": {"steps": 12, "sample_passes": 96, "tokens": 9000, "tokens_per_second": 900.0},
        "environment": {"device": "cpu", "torch": "2.9"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_full(folder: Path) -> Path:
    ids = [f"row-{i:02d}" for i in range(24)]
    (folder / "data").mkdir()
    prompts = [f"prompt of {sample_id} {EVIL}" for sample_id in ids]
    table = pa.table({"sample_id": ids, "prompt": prompts, "references": [["sea", EVIL]] * 24})
    pq.write_table(table, folder / "data" / "train.parquet")
    pq.write_table(table, folder / "data" / "validation.parquet")
    rouge = [*np.linspace(1, 0, 21), 0.0, 0.0, math.nan]
    entropy = [*np.linspace(1, 5, 23), math.nan]
    reflections = {"sample_id": ids, "generation": [f"答案 {EVIL}"] * 24, "rouge_l": rouge, "cross_entropy": entropy}
    pq.write_table(pa.table(reflections | {"reason": [None] * 23 + ["empty"]}), folder / "reflections.parquet")
    write_plan(folder)
    write_metrics(folder)
    write_summary(folder)
    (folder / "config.yaml").write_text(f"teacher: x  # {EVIL}\n")
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = write_full(tmp_path_factory.mktemp("run"))
    page = write_report(folder)
    assert page == folder / "report.html"
    return folder, page.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every element with its attributes, the text of the page and its headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def bold(page: str) -> list[str]:
    return [re.sub("<[^>]*>", "", text) for text in re.findall(r"<strong>(.*?)</strong>", page)]


def pictures(page: str) -> list[str]:
    found = re.findall(r'(?:src|srcset)="data:image/svg\+xml;base64,([^"]+)"', page)
    return [base64.b64decode(text).decode() for text in found]


def test_data_never_becomes_markup(full: tuple[Path, str]) -> None:
    page = full[1]
    # The page's own: the rows, which no browser executes, and what lists them.
    assert [found.get("type") for tag, found in Tags(page).tags if tag == "script"] == ["application/json", None]
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "<script" not in page.lower()
    tags = Tags(page)
    assert {tag for tag, _ in tags.tags}.isdisjoint({"iframe", "object", "embed", "base", "form"})
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on")]
    # It is all there as text: title, heading, prompts, references, answers, reasons, examples, configuration.
    assert tags.text.count("<script>alert(1)</script>") > 40
    assert "答案" in tags.text


def test_nothing_is_loaded(full: tuple[Path, str]) -> None:
    page = full[1]
    for tag, attributes in Tags(page).tags:
        for name in ("src", "srcset", "href", "action", "poster", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), (tag, name, value[:80])
    assert "@import" not in page
    assert re.findall(r"url\([^)]*\)", page) == []
    svgs = pictures(page)
    assert len(svgs) == 8
    for svg in svgs:
        assert "<script" not in svg
        assert set(re.findall(r'href="(.)', svg)) <= {"#", "d"}
        assert set(re.findall(r"url\((.)", svg)) <= {"#"}


def test_content_security_policy_comes_first(full: tuple[Path, str]) -> None:
    page = full[1]
    tags = Tags(page).tags
    policies = [i for i, (_, a) in enumerate(tags) if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    policy = tags[policies[0]][1]["content"] or ""
    assert {"default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"} <= set(policy.split("; "))
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert [x for x in policy.split("; ") if "script" in x] == [f"script-src 'sha256-{digest}'"]
    assert len(script) == 1
    loads = [i for i, (tag, _) in enumerate(tags) if tag in ("style", "link", "img")]
    assert policies[0] < min(loads)


def test_full_page_has_every_section_in_order(full: tuple[Path, str]) -> None:
    page = full[1]
    assert re.findall(r"<h2[^>]*>([^<]+)</h2>", page) == list(SECTIONS)
    assert "is missing" not in page
    assert page.count('class="card"') == 4
    assert all(len(attributes["alt"] or "") > 40 for tag, attributes in Tags(page).tags if tag == "img")
    for title, first in (
        ("Easiest kept rows", "row-00"),
        ("Hardest kept rows", "row-17"),
        ("Hardest dropped rows", "row-22"),
        ("Nearest to the border: the last kept", "row-17"),
        ("Nearest to the border: the first dropped", "row-18"),
    ):
        assert re.search(rf'{title}</h3>\s*<article class="sample">\s*<header><span class="id">{first}<', page)


def test_result_sentence_and_table(full: tuple[Path, str]) -> None:
    page = full[1]
    assert (
        "Distillation raised ROUGE-L from 7.6 to 39.8 points (the teacher scores 46.2) and lowered the KL divergence "
        "to the teacher from 4.987 to 0.931 nats per token."
    ) in page
    assert bold(page) == ["39.8 ± 1.0", "2.341", "0.931"]
    assert 'subset 1, easiest <span class="count">6 rows' in page
    assert "1 h 06 min" in page


def test_metrics_of_answers_have_columns_of_their_own(tmp_path: Path) -> None:
    write_summary(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name, bleu in (("teacher", 0.31), ("start", 0.042), ("student", 0.2)):
        summary["evaluation"][name]["bleu"] = bleu
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = write_report(tmp_path).read_text()
    assert re.findall(r'<th scope="col">(ROUGE-L|BLEU|chrF) <span class="unit">points', page) == ["ROUGE-L", "BLEU"]
    assert bold(page) == ["39.8 ± 1.0", "20.0", "2.341", "0.931"]
    assert "<td>31.0</td>" in page


@pytest.mark.parametrize(
    ("ledger", "total"),
    [
        (None, "1 h 08 min"),
        ({"evaluate": {"seconds": 1800.0}, "report": {"seconds": 9000.0}}, "1 h 38 min"),
        ({"reflect": {"seconds": 5.0}, "evaluate": {"seconds": 1.0}}, "1 h 08 min"),
        ({"evaluate": "damaged"}, "1 h 08 min"),
    ],
)
def test_the_total_has_the_evaluation_that_ended_after_the_summary(
    tmp_path: Path, ledger: dict[str, object] | None, total: str
) -> None:
    write_summary(tmp_path)
    if ledger is not None:
        (tmp_path / "steps.json").write_text(json.dumps(ledger))
    page = write_report(tmp_path).read_text()
    assert re.findall(r'<th scope="row">total</th><td>([^<]+)<', page) == [total]
    rows = re.findall(r"<tr><td>([\w-]+)</td><td>[^<]+</td><td aria-hidden", page)
    with_it = isinstance((ledger or {}).get("evaluate"), dict)
    assert rows == ["prepare", "reflect", "distill", *(["evaluate"] if with_it else [])]


def test_labels_of_small_numbers_survive_in_the_plots(full: tuple[Path, str]) -> None:
    assert any(">0.0004<" in svg for svg in pictures(full[1]))


def test_same_input_same_bytes(full: tuple[Path, str]) -> None:
    folder, page = full
    assert write_report(folder).read_bytes() == page.encode()
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []


def test_missing_files_are_named_with_the_step_that_writes_them(tmp_path: Path) -> None:
    def said(folder: Path) -> list[str]:
        sections = re.findall(r'<h2 id="(\w+)">(.*?)</section>', write_report(folder).read_text(), re.DOTALL)
        return [" ".join(re.findall(r'<p class="missing">(.*?)</p>', body)) for _, body in sections]

    summary = "summary.json is missing; <code>srd-fast evaluate</code> writes it."
    metrics = "metrics.jsonl is missing; <code>srd-fast distill</code> writes it."
    reflections = "reflections.parquet is missing; <code>srd-fast reflect</code> writes it."
    train = "data/train.parquet (written by the prepare step of <code>srd-fast run</code>)"
    config = "config.yaml is missing; <code>srd-fast run</code> writes it."
    write_plan(tmp_path)
    found = said(tmp_path)
    assert found[:5] == [summary, reflections, metrics, metrics, metrics]
    assert found[5].startswith(train)
    assert "reflections.parquet (written by" in found[5]
    assert found[6:] == ["", summary, f"{summary} {config}"]
    (tmp_path / "plan.json").unlink()
    found = said(tmp_path)
    assert "plan.json (written by <code>srd-fast curate</code>)" in found[5]
    assert found[6] == "plan.json is missing; <code>srd-fast curate</code> writes it."


def test_last_row_of_a_repeated_step_wins(tmp_path: Path) -> None:
    write_metrics(
        tmp_path,
        '{"kind": "train", "step": 5, "stage": 2, "loss": 77.0}\n{"kind": "eval", "step": 12, "kl": 0.5}\n',
    )
    metrics = read_run(tmp_path).metrics
    assert metrics is not None
    assert metrics.train["step"].tolist() == list(range(1, 13))
    assert metrics.train["loss"][4] == 77.0
    assert metrics.validation["step"].tolist() == [0, 12]
    assert metrics.validation["kl"].tolist() == [4.0, 0.5]


@pytest.mark.parametrize("end", ["", "\n"])
def test_half_written_last_line_is_ignored(tmp_path: Path, end: str) -> None:
    write_metrics(tmp_path, '{"kind": "train", "step": 13, "lo' + end)
    metrics = read_run(tmp_path).metrics
    assert metrics is not None
    assert metrics.train["step"].tolist() == list(range(1, 13))


def test_half_written_line_in_the_middle_is_damage(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "tr\n{"kind": "eval", "step": 0, "kl": 1.0}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 "):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.json", '{"format": "srd_fast.plan/1", ', r"plan\.json' cannot be read \(Expecting property name"),
        ("plan.json", "[]", r"plan\.json' cannot be read \(it holds a list, not an object"),
        (
            "plan.json",
            '{"format": "srd_fast.plan/9"}',
            r"plan\.json' cannot be read \(its format is not",
        ),
        ("summary.json", '{"timings": {"distill": "long"}}', r"summary\.json: timings\.distill must be a number"),
        ("metrics.jsonl", '{"kind": "train", "loss": 1}\n', r"metrics\.jsonl: line 1\.step must be a number"),
        ("reflections.parquet", "PAR1", r"reflections\.parquet: not a readable Parquet file"),
        ("config.yaml", b"\xff\xfe", r"config\.yaml: not UTF-8"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_missing_column_and_missing_folder_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"sample_id": ["a"]}), tmp_path / "reflections.parquet")
    with pytest.raises(UserError, match=r"reflections\.parquet: column 'generation' is missing"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nowhere")


def test_what_is_folded_is_printed_and_what_is_clicked_is_not(full: tuple[Path, str]) -> None:
    page = full[1]
    assert page.count("<details>") == 2
    assert re.search(r'"beforeprint".*?details:not\(\[open\]\).*?details\.open = true', page, re.S)
    paper = page[page.index("@media print") : page.index("</style>")]
    assert re.search(r"nav, \.browser, [^{]*\{ display: none; \}", paper)
    assert "tfoot { display: table-row-group; }" in paper
    # A printed page is narrower than 760 pixels, and a picture for telephones would fill it.
    assert re.findall(r'<source media="([^"]*)"', page) == ["screen and (max-width: 760px)"] * 4


def test_smoothing_never_crosses_a_stage_border() -> None:
    stages = np.repeat([1.0, 2.0, 3.0], 20)
    values = stages * 10
    values[3] = np.nan
    assert smooth_by_stage(values, stages) == pytest.approx(stages * 10)
    noisy = np.tile([0.0, 1.0], 30)
    assert smooth_by_stage(noisy, np.ones(60))[10:50] == pytest.approx(0.5, abs=0.11)
    assert stage_bands(np.arange(1.0, 61.0), stages) == [(1.0, 20.5, 1), (20.5, 40.5, 2), (40.5, 60.0, 3)]
