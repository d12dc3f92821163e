"""What docs/reference.py does to the pages of the site, and the pictures they show."""

import re
import subprocess
import sys
from pathlib import Path

import browser
import pytest
from test_docstrings import REFERENCE

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PICTURE = """<picture>
  <source media="(prefers-color-scheme: dark) and (max-width: 600px)" srcset="a-narrow-dark.svg">
  <source media="(prefers-color-scheme: dark)" srcset="a-dark.svg">
  <source media="(max-width: 600px)" srcset="a-narrow-light.svg">
  <img alt="A" src="a-light.svg">
</picture>"""


@pytest.mark.parametrize(
    ("html", "whole"),
    [
        ("<p>so <code>srd-fast config --all</code>: cross-entropy</p>", ["srd-fast", "--all"]),
        ("<td>1.523 ± 0.011</td><td>none [-0.026, +0.008]</td>", ["1.523 ± 0.011", "[-0.026, +0.008]"]),
        ("<th>ROUGE-L, points</th><td>llama3 512 x 128,256</td>", ["ROUGE-L,", "512 x 128,256"]),
        ("<pre><code>run<span> </span>--force<span> </span>a-b</code></pre>", ["--force"]),
        (f"<td>{'a-' * 20}</td><code>one two</code>", []),
    ],
)
def test_a_line_does_not_break_within(html: str, whole: list[str]) -> None:
    marked = REFERENCE.on_page_content(html)
    assert re.findall(r'<span class="whole">(.*?)</span>', marked) == whole
    assert re.sub(r'<span class="whole">(.*?)</span>', r"\1", marked) == html


def test_a_picture_is_there_for_light_and_for_dark_pages() -> None:
    both = REFERENCE.on_page_content(PICTURE)
    light, dark = re.findall(r'<picture class="on-(?:light|dark)">.*?</picture>', both, re.S)
    assert re.findall(r"a-[a-z-]+\.svg", light) == ["a-narrow-light.svg", "a-light.svg"]
    assert re.findall(r"a-[a-z-]+\.svg", dark) == ["a-narrow-dark.svg", "a-dark.svg"]
    assert "prefers-color-scheme" not in light + dark


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_every_picture_has_its_four_files(page: Path) -> None:
    for picture in re.findall(r"<picture>.*?</picture>", page.read_text(encoding="utf-8"), re.S):
        files = re.findall(r'(?:src|srcset)="([^"]*)"', picture)
        assert [re.sub(r".*?((?:-narrow)?-(?:light|dark))\.svg$", r"\1", name) for name in files] == [
            "-narrow-dark",
            "-dark",
            "-narrow-light",
            "-light",
        ]
        assert all((page.parent / name).is_file() for name in files)


@pytest.mark.slow
@browser.needs_browser
def test_no_page_of_the_site_is_wider_than_its_window(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is missing: pip install 'srd-fast[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = [str(page.relative_to(tmp_path / "site")) for page in (tmp_path / "site").rglob("*.html")]
    assert len(pages) > len(PAGES)
    assert browser.too_wide(tmp_path / "site", pages, (400, 1200)) == {}
