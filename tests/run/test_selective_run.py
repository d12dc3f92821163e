"""SE-KD through `srd-fast run`: what is chosen is in the plan, in selection.json and on the page."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from srd_fast.curriculum import CurriculumPlan
from srd_fast.errors import UserError
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.pipeline import execute


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path) -> dict[str, Any]:
    return {
        "teacher": str(tiny_teacher_folder),
        "max_rows": 24,
        "validation": 6,
        "dtype": "float32",
        "init_student": {"layers": 2, "warmup_steps": 2, "warmup_batch_size": 4},
        "reflect": {"engine": "transformers", "max_new_tokens": 4, "batch_size": 8},
        "evaluate": {"max_new_tokens": 4},
        "distill": {
            "per_device_train_batch_size": 4, "epochs_per_stage": 2, "eval_strategy": "no", "save_strategy": "no",
            "divergence": "forward_kl", "position_selection": "topk_student_entropy", "position_ratio": 0.25,
            "sample_selection": "topk_student_entropy", "sample_ratio": 0.5, "class_sampling": 8,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selective") / "run"
    return execute(RunConfig(**settings, output_dir=str(folder)), say=lambda text: None)


@pytest.mark.slow
def test_the_plan_and_the_cache_hold_the_selected_samples(finished: Path) -> None:
    plan = CurriculumPlan.load(finished / "plan.json")
    assert list(map(len, plan.subsets)) == [3, 3, 3]  # half of 6 each
    unsure = [row for row in plan.dropped if row["reason"].startswith("student entropy ")]
    assert len(unsure) == 9
    assert all("beyond the 3 highest of its subset" in row["reason"] for row in unsure)
    index = json.loads((finished / "teacher_cache" / "index.json").read_text())
    assert index, "no cache"
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 + 3 + 5  # two passes over 3, 6 and 9 samples, batch 4
    assert all(0.2 < row["selected_share"] < 0.4 for row in steps)
    assert all(0 < row["saved_head_work"] < 0.7 for row in steps)


def test_the_file_says_what_was_chosen(finished: Path) -> None:
    found = json.loads((finished / "selection.json").read_text())
    histogram = found["histogram"]
    assert (found["policy"], found["ratio"]) == ("topk_student_entropy", 0.25)
    assert 0 < found["saved_head_work"] < 0.7
    assert 0.2 < sum(histogram["chosen"]) / sum(histogram["candidates"]) < 0.4
    assert all(chosen <= candidates for chosen, candidates in zip(histogram["chosen"], histogram["candidates"]))
    assert found["samples"]
    for sample in found["samples"]:
        chosen = [e for e, seen in zip(sample["entropy"], sample["chosen"]) if seen]
        left = [e for e, seen in zip(sample["entropy"], sample["chosen"]) if not seen]
        assert len(chosen) == math.ceil(0.25 * len(sample["tokens"]))
        assert min(chosen) >= max(left)


def test_the_page_marks_the_tokens_and_escapes_them(finished: Path) -> None:
    from srd_fast.report import write_report

    page = (finished / "report.html").read_text()
    assert "Selected tokens" in page
    assert page.count("<mark") == sum(
        sum(s["chosen"]) for s in json.loads((finished / "selection.json").read_text())["samples"]
    )
    changed = json.loads((finished / "selection.json").read_text())
    changed["samples"][0]["tokens"][0] = "<script>alert(1)</script>"
    original = (finished / "selection.json").read_text()
    try:
        (finished / "selection.json").write_text(json.dumps(changed))
        write_report(finished)
        assert "<script>alert" not in (finished / "report.html").read_text()
        assert "&lt;script&gt;alert" in (finished / "report.html").read_text()
    finally:
        (finished / "selection.json").write_text(original)
        write_report(finished)


def test_another_share_of_samples_redoes_the_plan_and_a_policy_must_exist(
    settings: dict[str, Any], finished: Path
) -> None:
    said: list[str] = []
    changed = {**settings, "output_dir": str(finished), "distill": {**settings["distill"], "sample_ratio": 1.0}}
    execute(RunConfig(**changed), only="curate", say=said.append)
    assert any("curate: done" in line for line in said)
    assert list(map(len, CurriculumPlan.load(finished / "plan.json").subsets)) == [6, 6, 6]
    bad = RunConfig(**{**changed, "distill": {**settings["distill"], "sample_selection": "topk_entropy"}})
    with pytest.raises(UserError, match="unknown sample_selection 'topk_entropy'; did you mean"):
        execute(bad, say=said.append)


def test_the_presets_are_plans_without_a_curriculum(tmp_path: Path) -> None:
    for preset in ("SE-KD", "SE-KD3X"):
        config = load_run_config(None, [f"preset={preset}", f"output_dir={tmp_path}"])
        assert (config.curate.method, config.curate.stages) == ("none", 1)
        assert config.distill["position_selection"] == "topk_student_entropy"
        assert ("class_sampling" in config.distill) == (preset == "SE-KD3X")
    with pytest.raises(UserError, match="unknown preset 'SE-KD2'; did you mean 'SE-KD'"):
        load_run_config(None, ["preset=SE-KD2"])
