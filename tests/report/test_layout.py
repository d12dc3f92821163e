"""The pages of a run in narrow and wide windows."""

from pathlib import Path

import browser
import pytest
from test_comparison import write_run
from test_report import write_full

from srd_fast.report import compare_runs, write_comparison, write_report


def write_pages(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    write_report(write_full(folder / "run"))
    runs = [
        write_run(folder / f"{name}_of_a_long_name", (2.0, kl), seed, config={"seed": seed, "curate": {"keep": kl}})
        for seed in (0, 1)
        for name, kl in ((f"first{seed}", 0.5), (f"second{seed}", 0.75))
    ]
    write_comparison(compare_runs(runs), folder / "comparison.html")
    assert "± " in (folder / "comparison.html").read_text(encoding="utf-8")
    return ["run/report.html", "comparison.html"]


@pytest.mark.slow
@browser.needs_browser
def test_no_page_is_wider_than_its_window(tmp_path: Path) -> None:
    pages = write_pages(tmp_path)
    assert browser.too_wide(tmp_path, pages, (400, 1200)) == {}
    (tmp_path / "wide.html").write_text('<div style="width: 500px">wide</div>', encoding="utf-8")
    assert browser.too_wide(tmp_path, ["wide.html"], (400,)).keys() == {"wide.html 400"}
