"""What the project promises its contributors: checks, forms, workflows, changelog, citation and deprecations."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
GROUPS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    found = re.search(r'^version = "(.+)"$', text("pyproject.toml"), re.MULTILINE)
    assert found
    return found[1]


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# Checks of the code


def checks() -> list[str]:
    """The commands of the paragraph of .ci/run that checks the code."""
    (paragraph,) = [p for p in text(".ci/run").split("\n\n") if "\nruff check ." in p]
    return [line for line in paragraph.split("\n") if not line.startswith("#")]


def test_pre_commit_and_ci_run_the_same_checks() -> None:
    hooks = [hook for repo in loaded(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == checks()
    # With the names of changed files behind it, a command would check those alone.
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in hooks)


def test_contributing_names_the_same_checks() -> None:
    assert f"\n{' && '.join(checks())}\n" in text("CONTRIBUTING.md")


# Workflows


def jobs(name: str) -> dict[str, Any]:
    """The jobs of a workflow, those of the local workflows that it uses in their places."""
    found: dict[str, Any] = {}
    for job, content in loaded(WORKFLOWS / name)["jobs"].items():
        if "uses" in content:
            used = content["uses"].removeprefix("./.github/workflows/")
            found[job] = {**content, "steps": [s for j in jobs(used).values() for s in j["steps"]]}
        else:
            found[job] = content
    return found


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def before(name: str, job: str) -> list[str]:
    """What must have passed before a job begins."""
    needed = jobs(name)[job].get("needs", [])
    needed = [needed] if isinstance(needed, str) else needed
    return [c for n in needed for c in [*before(name, n), *commands(jobs(name)[n])]]


def test_ci_runs_everything_on_main_and_pull_requests() -> None:
    ci = loaded(WORKFLOWS / "ci.yml")
    triggers = ci[True]  # YAML 1.1 reads the key `on` as true
    assert triggers["push"]["branches"] == ["main"]
    assert "pull_request" in triggers
    # release.yml calls it.
    assert "workflow_call" in triggers
    assert any(".ci/run" in commands(job) for job in jobs("ci.yml").values())


def test_ci_tests_the_oldest_python() -> None:
    found = re.search(r'^requires-python = ">=(.+)"$', text("pyproject.toml"), re.MULTILINE)
    assert found
    matrices = [job["strategy"]["matrix"]["python-version"] for job in jobs("ci.yml").values() if "strategy" in job]
    assert any(found[1] in versions for versions in matrices)


def test_nothing_is_published_before_the_tag_and_all_of_ci_are_checked() -> None:
    passed = before("release.yml", "publish")
    assert passed[0] == 'python .ci/check_tag.py "$GITHUB_REF_NAME"'
    assert passed.index(".ci/run") < passed.index("python -m build") < passed.index("twine check --strict dist/*")
    # The one job that may ask PyPI for a token runs no code of ours.
    allowed = {name for name, job in jobs("release.yml").items() if "id-token" in job.get("permissions", {})}
    assert allowed == {"publish"}
    assert not commands(jobs("release.yml")["publish"])


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_scripts_and_versions_of_workflows_are_there(name: str) -> None:
    for job in jobs(name).values():
        for command in commands(job):
            for script in re.findall(r"\.ci/\w+(?:\.py)?", command):
                assert (ROOT / script).is_file()
        for step in job["steps"]:
            # A quoted one: YAML reads 3.10 as 3.1.
            assert isinstance(step.get("with", {}).get("python-version", ""), str)
    for action in re.findall(r"uses: (?!\./)(\S+)", text(f".github/workflows/{name}")):
        assert re.search(r"@(release/)?v\d+$", action), f"{action}: pin its major version"


# Forms


@pytest.mark.parametrize("path", [p for p in FORMS if p.name != "config.yml"], ids=lambda p: p.stem)
def test_issue_forms_are_what_github_takes(path: Path) -> None:
    form = loaded(path)
    assert form["name"]
    assert form["description"]
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in asked}) == len(asked) > 0
    assert all(field["type"] in ("input", "textarea", "dropdown", "checkboxes") for field in asked)
    assert all(field["attributes"]["label"] for field in asked)


def test_a_bug_report_asks_for_what_a_maintainer_needs() -> None:
    form = loaded(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml")
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    required = {name for name, field in fields.items() if field.get("validations", {}).get("required")}
    assert {"what", "config", "versions", "device"} <= required
    for package in ("srd-fast", "torch", "triton", "transformers"):
        assert f"{package}:" in fields["versions"]["attributes"]["value"]


def test_files_that_a_bug_report_names_are_those_of_a_run() -> None:
    form = loaded(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml")
    (asked,) = [f["attributes"]["description"] for f in form["body"] if f.get("id") == "files"]
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "srd_fast").rglob("*.py"))
    named = re.findall(r"\w+\.(?:yaml|jsonl|json|html)\b", asked)
    assert len(named) >= 5
    for name in named:
        assert f'"{name}"' in sources, f"no run writes {name}"


def test_issues_are_written_in_a_form() -> None:
    assert loaded(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": False}


# Citation, changelog, release


def test_the_citation_is_of_this_version() -> None:
    citation = loaded(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"]
    assert [author["name"] for author in citation["authors"]]
    # A version of two numbers without quotes would be a float.
    assert citation["version"] == version()
    assert f'license = "{citation["license"]}"' in text("pyproject.toml")
    assert f"keywords = {citation['keywords']}".replace("'", '"') in text("pyproject.toml")


def problems(changelog: str, package_version: str) -> list[str]:
    """What is wrong with the headings of a changelog, the newest above."""
    found, headings = [], re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    for number, heading in enumerate(headings):
        if heading == "[Unreleased]":
            if number:
                found.append("Unreleased is not above all releases")
        elif not re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading):
            found.append(f"{heading!r} is neither [Unreleased] nor [X.Y.Z] - YYYY-MM-DD")
    released = [tuple(map(int, x)) for x in re.findall(r"^## \[(\d+)\.(\d+)\.(\d+)\]", changelog, re.MULTILINE)]
    if released != sorted(set(released), reverse=True):
        found.append("releases are not from the newest to the oldest")
    if released and released[0] > tuple(map(int, package_version.split("."))):
        found.append(f"the newest release is above the package's version {package_version}")
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        groups = re.findall(r"^### (.*)$", section, re.MULTILINE)
        if groups != [g for g in GROUPS if g in groups]:
            found.append(f"groups {groups} are not some of {GROUPS}, in this order")
        for group in re.split(r"^### ", section, flags=re.MULTILINE)[1:]:
            if "\n- " not in group:
                found.append(f"group {group.strip()!r} has no entry")
    return found if headings else ["no heading"]


def test_the_changelog_is_well_formed() -> None:
    assert problems(text("CHANGELOG.md"), version()) == []


@pytest.mark.parametrize(
    ("changelog", "problem"),
    [
        ("# Changelog\n", "no heading"),
        ("## Unreleased\n", "'Unreleased' is neither"),
        ("## [0.1.0] - January\n", "is neither"),
        ("## [0.1.0] - 2026-01-02\n## [Unreleased]\n", "Unreleased is not above"),
        ("## [0.1.0] - 2026-01-02\n## [0.2.0] - 2026-01-01\n", "from the newest"),
        ("## [0.3.0] - 2026-01-02\n", "above the package's version 0.2.0"),
        ("## [Unreleased]\n\n### News\n\n- x\n", "groups ['News']"),
        ("## [Unreleased]\n\n### Added\n\n### Fixed\n\n- x\n", "'Added' has no entry"),
    ],
)
def test_what_is_wrong_with_a_changelog_is_seen(changelog: str, problem: str) -> None:
    assert any(problem in p for p in problems(changelog, "0.2.0"))


@pytest.fixture(scope="module")
def check_tag() -> Callable[[str, str, str], str | None]:
    spec = importlib.util.spec_from_file_location("check_tag", ROOT / ".ci" / "check_tag.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    problem: Callable[[str, str, str], str | None] = module.problem
    return problem


def test_a_tag_is_of_the_version_and_of_a_dated_section(check_tag: Callable[[str, str, str], str | None]) -> None:
    pyproject, released = text("pyproject.toml"), f"## [{version()}] - 2026-01-02\n"
    assert check_tag(f"v{version()}", pyproject, released) is None
    assert "the tag is v9.9.9" in str(check_tag("v9.9.9", pyproject, released))
    assert "no heading" in str(check_tag(f"v{version()}", pyproject, "## [Unreleased]\n"))


# Deprecations


def test_the_command_shows_our_deprecations_alone() -> None:
    found = re.search(r'"([^"]+ goes away in [^"]+)"', text("CONTRIBUTING.md"))
    assert found, "CONTRIBUTING has no example of a deprecation's words"
    code = f"""
import warnings
from srd_fast.cli import _quiet
_quiet()
warnings.warn({found[1]!r}, FutureWarning)
warnings.warn("another package's", FutureWarning)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found[1] in done.stderr
    assert "another package's" not in done.stderr
