"""The benchmarks' rows, their command lines, and small runs of the quick ones."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in p.read_text("utf-8"))

sys.path.insert(0, str(ROOT))  # benchmarks are no part of the installed package
from benchmarks import rows  # noqa: E402
from benchmarks.rows import Row  # noqa: E402

sys.path.remove(str(ROOT))

# Each as `python -m benchmarks.NAME --help` would run it; in one process, as most of the time goes into shared imports.
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for name in sys.argv[1:]:
    sys.argv, told = [name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(told):
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
            code = "no exit"
        except SystemExit as e:
            code = e.code
        except Exception as e:
            code = repr(e)
    found[name] = code, told.getvalue()
print(json.dumps(found))
"""


def row(**changed: object) -> Row:
    """Some row."""
    who = {"case": "jsd, T = 2", "shape": "N=4", "dtype": "float32", "device": "a CPU", "threads": 2}
    usual = Row("loss", **who, provider="srd-fast", version="0.1", metric="seconds", value=0.1, torch="2", date="2026")
    return replace(usual, **changed)


def run(*arguments: str) -> str:
    """What python prints in the root of the checkout."""
    command, environment = [sys.executable, *arguments], {k: v for k, v in os.environ.items() if k != "SRD_FAST_DATA"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [row(value=1 / 3), row(metric="bytes", value=12.0), row(benchmark="rouge", case="", dtype="")]
    rows.write(written, tmp_path / "new" / "folder")
    assert rows.read(tmp_path / "new" / "folder" / "loss.csv") == written[:2]
    assert rows.read(tmp_path / "new" / "folder" / "rouge.csv") == written[2:]
    assert rows.read(tmp_path / "none.csv") == []


def test_a_group_written_again_takes_the_place_of_the_old_one_only(tmp_path: Path) -> None:
    others = [row(**{x: y}) for x, y in {"case": "a", "shape": "b", "dtype": "c", "device": "d", "threads": 3}.items()]
    rows.write([row(), row(provider="gone"), *others], tmp_path)
    again = [row(value=5.0), row(provider="new", value=6.0)]
    rows.write(again, tmp_path)
    found = rows.read(tmp_path / "loss.csv")
    assert [r for r in found if r.group == row().group] == again
    assert sorted(r.group for r in found) == sorted(r.group for r in others + again)


def test_made_rows_say_who_and_where() -> None:
    figures = {"srd-fast": {"seconds": 1.0, "bytes": 2}, "plain": {"seconds": 3.0}}
    made = rows.make_rows("loss", figures, case="a", shape="b", packages={"srd-fast": "srd-fast"})
    assert [(r.provider, r.metric, r.value) for r in made] == [
        (p, m, v) for p in figures for m, v in figures[p].items()
    ]
    assert [r.version for r in made] == [rows.version_of(x) for x in ("srd-fast", "srd-fast", "torch")]
    assert len({r.group for r in made}) == 1
    assert rows.version_of(None) == ""


def test_spread_is_median_and_quantiles() -> None:
    assert rows.spread("s", [5.0, 1.0, 4.0, 2.0, 3.0, 0.0]) == {"s": 2.5, "s_p20": 1.0, "s_p80": 4.0}
    assert rows.spread("s", [7.0]) == {"s": 7.0, "s_p20": 7.0, "s_p80": 7.0}


def test_the_device_has_a_name() -> None:
    assert rows.device_name().strip()


@pytest.fixture(scope="module")
def helped() -> dict[str, tuple[int | str, str]]:
    """Exit code and help of every script."""
    return json.loads(run("-c", HELP, *SCRIPTS).splitlines()[-1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, helped: dict[str, tuple[int | str, str]]) -> None:
    if name == "roofline" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    code, told = helped[name]
    assert code == 0
    assert told.startswith("usage: ")


@pytest.mark.slow
def test_curate_measures_a_process_without_torch(tmp_path: Path) -> None:
    imports = "import sys, benchmarks.curate, srd_fast.curriculum; print('torch' in sys.modules)"
    assert run("-c", imports).strip() == "False"
    told = run("-m", "benchmarks.curate", "--rows", "2000", "--results", str(tmp_path))
    found = rows.read(tmp_path / "curate.csv")
    assert {(r.case, r.provider) for r in found} == {("srd, keep 0.75", "srd-fast")}
    assert {r.version for r in found} == {rows.version_of("srd-fast")}
    for shape in ("200 rows", "2000 rows"):
        figures = {r.metric: r.value for r in found if r.shape == shape}
        seconds = {"curate_seconds", "save_seconds", "seconds", "cpu_seconds"}
        assert set(figures) == {*seconds, "peak_bytes", "plan_bytes"}
        assert all(0 < figures[s] < 60 for s in seconds)
        assert figures["seconds"] == pytest.approx(figures["curate_seconds"] + figures["save_seconds"])
        assert figures["peak_bytes"] > 20 << 20
    assert [line.split("|")[1].strip() for line in told.splitlines()] == ["rows", "---", "200", "2,000"]


@pytest.mark.slow
def test_rouge_is_compared(tmp_path: Path) -> None:
    options = ["--pairs", "300", "--processes-up-to", "0", "--results", str(tmp_path)]
    told = run("-m", "benchmarks.rouge", *options)
    assert "all values equal" in told
    assert "| pairs |" not in told
    found = rows.read(tmp_path / "rouge.csv")
    assert {r.shape for r in found} == {"300 pairs, quickstart"}
    ours, theirs = [("srd-fast", "seconds"), ("srd-fast", "different_values")], ("rouge-score", "seconds")
    assert {(r.provider, r.metric) for r in found} == {*ours, theirs}
    assert {(r.provider, r.version) for r in found} == {(p, rows.version_of(p)) for p in ("srd-fast", "rouge-score")}
    assert all(r.value > 0 for r in found if r.metric == "seconds")
    assert [r.value for r in found if r.metric == "different_values"] == [0]


@pytest.mark.slow
def test_the_hosts_part_of_a_step() -> None:
    small = ["--layers", "2", "--batch", "2", "--steps", "4"]
    told = run("-m", "benchmarks.host_step", *small)
    lines = [line.split("|") for line in told[told.index("| part |") :].splitlines()]
    found = {line[1].strip(): [float(x) for x in line[2:5]] for line in lines[2:-2]}
    assert set(found) == {"batch", "forward and loss", "forward, loss, backward", "clipping", "check", "whole step"}
    assert all(0 <= low <= median <= high for median, low, high in found.values())
    assert found["whole step"][0] > found["forward, loss, backward"][0] > found["forward and loss"][0] > 0
    operations = int(lines[-1][0].split()[0].replace(",", ""))
    assert 500 < operations < 10_000
