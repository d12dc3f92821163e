"""One self-contained HTML page from a run folder, or from several compared."""

from pathlib import Path

from srd_fast.report.comparison import compare_runs, comparison_text
from srd_fast.report.comparison_page import write_comparison
from srd_fast.report.controls import controls_json
from srd_fast.report.page import render, write_page
from srd_fast.report.read import read_run

__all__ = ["compare_runs", "comparison_text", "controls_json", "write_comparison", "write_report"]


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder, replacing an older one in a single step.

    Every file of the folder is optional: a section whose file is missing says so and names the step that
    writes it. The page loads nothing from outside, and the same run gives the same bytes, 5 MB at most. Its one script
    lists all rows, and shows those under the pointer on the difficulty map; the rest needs none.

    Args:
        run_folder: a folder written by ``srd-fast run``.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder does not exist, one of its files is damaged, or the page cannot be written.
    """
    run = read_run(run_folder)
    return write_page(run.folder / "report.html", render(run))
