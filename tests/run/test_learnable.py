"""The preset `learnable` through a whole run: what is kept has the largest gap, and the teacher sees each row once."""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from srd_fast.cli import main
from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.report import page
from srd_fast.report.figures import groups_of
from srd_fast.report.read import read_run
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.pipeline import execute
from srd_fast.run.steps import selection
from srd_fast.run.steps.selection import curate_inputs
from srd_fast.teacher import LiveTeacher, TeacherCache, build

STEPS = ("prepare", "reflect")


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path) -> dict[str, Any]:
    return {
        **tiny.tiny_run(tiny_teacher_folder),
        "preset": "learnable",
        "reflect": {"engine": "transformers", "max_new_tokens": 2, "batch_size": 8},
        "distill": {
            "per_device_train_batch_size": 4, "epochs_per_stage": 1, "eval_strategy": "no", "save_strategy": "no",
        },
    }  # fmt: skip


def config_file(settings: dict[str, Any], folder: Path, **changes: Any) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / "run"), **changes}))
    return file


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The run folder, and how many rows the teacher was run on to fill its cache."""
    folder, seen = tmp_path_factory.mktemp("learnable"), 0
    with pytest.MonkeyPatch.context() as patched:
        real = build._Maker.make

        def counted(self: build._Maker, group: Any) -> Any:
            nonlocal seen
            seen += len(group)
            return real(self, group)

        patched.setattr(build._Maker, "make", counted)
        patched.setattr(LiveTeacher, "rows", interrupted)
        for view in ("difficulty_view", "schedule_view", "curves_view", "throughput_view"):  # pictures take seconds
            patched.setattr(page, view, lambda run: {"missing": "left out", "picture": None, "frames": None})
        patched.setattr(sys, "argv", ["srd-fast", "run", str(config_file(settings, folder)), "--quiet"])
        package = logging.getLogger("srd_fast")
        kept = package.handlers[:], package.propagate, package.level
        with pytest.raises(SystemExit) as ended:
            main()
        package.handlers[:], package.propagate, package.level = kept
    assert not ended.value.code
    return folder / "run", seen


def column(folder: Path, name: str) -> dict[str, Any]:
    table = pq.read_table(folder / "reflections.parquet")
    return dict(zip(table["sample_id"].to_pylist(), table[name].to_pylist()))


def test_the_rows_with_the_largest_gap_are_kept_in_an_order_by_chance(finished: tuple[Path, int]) -> None:
    folder, _ = finished
    gaps, ours, theirs = (column(folder, n) for n in ("gap", "cross_entropy", "teacher_cross_entropy"))
    assert gaps == pytest.approx({i: ours[i] - theirs[i] for i in ours})
    plan = CurriculumPlan.load(folder / "plan.json")
    ranked = sorted(gaps, key=lambda i: -gaps[i])
    assert set(plan.kept) == set(ranked[:12])
    assert plan.kept != ranked[:12]
    content = json.loads((folder / "plan.json").read_text())
    assert content["order"] == "shuffled"
    assert content["signals"] == {"gap": {"higher_is_easier": True, "weight": 1.0}}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1 + 2 + 3


def test_the_teacher_sees_each_row_once(finished: tuple[Path, int]) -> None:
    folder, seen = finished
    assert seen == 16 + 4
    assert len(TeacherCache(folder / "teacher_cache")) == 16 + 4


def test_the_page_names_signals_and_order(finished: tuple[Path, int]) -> None:
    text = (finished[0] / "report.html").read_text()
    assert re.search(r"ranked by\s*</[^>]+>\s*<[^>]+>\s*gap\s*<", text)
    assert "12 kept in 3 subsets, 4 dropped, subsets shuffled" in text
    assert "Kept rows with the most to learn" in text
    assert "Easiest" not in text
    read = read_run(finished[0])
    assert read.reflections is not None
    assert [group.label for group in groups_of(read.reflections, read.plan)[0]] == [
        "subset 1", "subset 2", "subset 3", "dropped",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": {"kind": "topk", "k": 4}},
        pytest.param({"mode": "seqkd"}, marks=pytest.mark.slow),
        pytest.param({"mode": "offline_on_policy"}, marks=pytest.mark.slow),
        pytest.param({"mode": "on_policy"}, marks=pytest.mark.slow),
    ],
)
def test_where_no_hidden_states_of_the_data_are_kept_the_teacher_runs_for_the_signal(
    changes: dict[str, Any], settings: dict[str, Any], finished: tuple[Path, int], tmp_path: Path
) -> None:
    config = load_run_config(config_file(settings, tmp_path, **changes))
    for step in STEPS:
        execute(config, only=step, say=lambda text: None)
    assert column(tmp_path / "run", "gap") == pytest.approx(column(finished[0], "gap"), abs=1e-5)
    assert (tmp_path / "run" / "teacher_cache").exists() == (changes == {"mode": "on_policy"})


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_killed_it_goes_on_with_the_teachers_rows(
    settings: dict[str, Any], finished: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_run_config(config_file(settings, tmp_path))
    execute(config, only="prepare", say=lambda text: None)
    with monkeypatch.context() as patched:
        patched.setattr(selection, "reflect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute(config, only="reflect", say=lambda text: None)
    with monkeypatch.context() as patched:
        patched.setattr(build._Maker, "make", interrupted)
        patched.setattr(LiveTeacher, "rows", interrupted)
        execute(config, only="reflect", say=lambda text: None)
    whole = (tmp_path / "run" / "reflections.parquet").read_bytes()
    assert whole == (finished[0] / "reflections.parquet").read_bytes()


@pytest.mark.slow
def test_shards_run_the_teacher_on_their_own_samples(
    settings: dict[str, Any], finished: tuple[Path, int], tmp_path: Path
) -> None:
    config = load_run_config(config_file(settings, tmp_path))
    execute(config, only="prepare", say=lambda text: None)
    for shard in ("1/2", "2/2"):
        execute(config, only="reflect", say=lambda text: None, shard=shard)
    assert not (tmp_path / "run" / "teacher_cache").exists()
    execute(config, only="reflect", say=lambda text: None)
    assert column(tmp_path / "run", "gap") == pytest.approx(column(finished[0], "gap"), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mode": "sft"},
            "config: reflect.signals has 'teacher_cross_entropy', which compares with a teacher, and mode 'sft' has "
            "none; leave it out, or use mode kd",
        ),
        (
            {"curate": {"order": "gapp"}},
            "config: curate.order: unknown order 'gapp'; did you mean 'gap'?",
        ),
        (
            {"curate": {"order": "chrf"}},
            "config: curate.order: unknown order 'chrf'",
        ),
        (
            {"reflect": {"signals": ["rouge_l"]}},
            "config: curate.signals names 'gap', which reflect.signals does not make: it makes rouge_l",
        ),
    ],
)
def test_what_does_not_go_together_is_said_first(
    changes: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as e:
        execute(load_run_config(config_file(settings, tmp_path, **changes)), say=lambda text: None)
    assert message in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_run_from_before_orders_stays_valid() -> None:
    plain = RunConfig()
    assert "order" not in curate_inputs(plain)[0]
    seeds = [load_run_config(None, ["curate.order=shuffled", f"seed={n}"]) for n in (1, 2)]
    assert curate_inputs(seeds[0]) != curate_inputs(seeds[1])
