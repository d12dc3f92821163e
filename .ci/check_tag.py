"""A release's tag, version and changelog say the same: python .ci/check_tag.py v0.1.0 (exit status 1 if not)."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def problem(tag: str, pyproject: str, changelog: str) -> str | None:
    """What is wrong with a tag, given the text of both files; None where nothing is."""
    found = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    version = found[1] if found else "missing"
    if tag != f"v{version}":
        return f"the tag is {tag}, and the version in pyproject.toml is {version}"
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        return f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD'"
    return None


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CHANGELOG.md")]
    sys.exit(problem(sys.argv[1], *texts))
