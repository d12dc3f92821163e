"""One self-contained HTML page from a run folder."""

import os
from pathlib import Path

from srd_fast.errors import UserError
from srd_fast.report.page import render
from srd_fast.report.read import read_run

__all__ = ["write_report"]


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
    # JSON may carry a lone surrogate, which UTF-8 cannot.
    page = render(run).encode("utf-8", errors="replace")
    target = run.folder / "report.html"
    temporary = run.folder / f".report.html.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(page)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
