"""A run whose student is the best one by its answers: which it is, what is said of it, and that a kill changes nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from srd_fast.errors import UserError
from srd_fast.run.config import RunConfig
from srd_fast.run.pipeline import execute, fingerprints
from srd_fast.run.steps import training

METRIC = """
import zlib

def told(reflected):
    return [zlib.crc32(text.encode()) / 2**32 for text in reflected.generations]

told.higher_is_easier = True
"""


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(METRIC)
    return f"{file}:told"


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path, metric: str) -> dict[str, Any]:
    return {
        "teacher": str(tiny_teacher_folder),
        "max_rows": 16,
        "validation": 4,
        "dtype": "float32",
        "init_student": {"layers": 2, "warmup_steps": 0},
        "reflect": {"engine": "transformers", "max_new_tokens": 3, "batch_size": 8},
        "curate": {"stages": 2},
        "evaluate": {"max_new_tokens": 6, "metrics": [metric]},
        "distill": {
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "epochs_per_stage": 1, "eval_steps": 1,
            "save_steps": 2, "learning_rate": 1e-2, "eval_generate": True, "eval_metrics": ["rouge_l", metric],
            "eval_max_new_tokens": 6, "load_best_model_at_end": True, "metric_for_best_model": "told",
        },
    }  # fmt: skip


def run(settings: dict[str, Any], folder: Path, *steps: str | None) -> None:
    for step in steps:
        execute(RunConfig(**settings, output_dir=str(folder)), only=step, say=lambda text: None)


BEFORE = ("prepare", "reflect", "curate", "cache")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told_at(folder: Path) -> dict[int, float]:
    return {row["step"]: row["told"] for row in metrics(folder) if row["kind"] == "eval"}


@pytest.mark.slow
def test_the_student_of_a_run_is_the_best_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings, tmp_path, None)
    found = told_at(tmp_path)
    assert {"rouge_l", "kl", "cross_entropy"} < set(metrics(tmp_path)[0])
    assert len(set(found.values())) > 2, "the answers do not change"
    step = max((s for s in found if s), key=lambda s: found[s])
    assert step != max(found), "this test could not tell the best from the last; take another seed"
    best = {"step": step, "metric": "told", "value": found[step]}
    assert metrics(tmp_path)[-1] == {"kind": "best", **best}
    # The student answers as it did at that step.
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == best
    assert summary["evaluation"]["student"]["told"] == pytest.approx(found[step])
    assert summary["evaluation"]["start"]["told"] == pytest.approx(found[0])
    page = (tmp_path / "report.html").read_text()
    assert f"that of step {step}, the best by validation told ({found[step]:.3f})" in page
    assert f"The student that was kept is that of step {step}." in page
    assert "validation ROUGE-L from" in page
    assert re.search(r'<th scope="col">told</th>', page)
    assert f"the student is that of step {step}, the best by told" in capsys.readouterr().out
    # Killed when training had ended, and within it, it is the same.
    killed = tmp_path / "killed"
    run(settings, killed, *BEFORE)
    with monkeypatch.context() as patched:
        patched.setattr(training, "_keep_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, killed, "distill")
    newest = max((killed / "checkpoints").glob("checkpoint-*"), key=lambda f: int(f.name[11:]))
    (newest / "trainer_state.json").unlink()
    run(settings, killed, "distill")
    assert told_at(killed) == found
    assert metrics(killed)[-1] == {"kind": "best", **best}
    ours, theirs = (load_file(f / "student" / "model.safetensors") for f in (killed, tmp_path))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_code_of_a_metric_is_an_input_of_its_steps(settings: dict[str, Any], metric: str) -> None:
    file, config = Path(metric.rpartition(":")[0]), RunConfig(**settings)
    before = fingerprints(config)
    file.write_text(METRIC + "\n# another version\n")
    after = fingerprints(config)
    file.write_text(METRIC)
    assert before["cache"] == after["cache"]
    assert before["distill"] != after["distill"]
    assert before["evaluate"] != after["evaluate"]
    assert fingerprints(config) == before


def test_what_a_run_cannot_keep_is_said_first(settings: dict[str, Any], tmp_path: Path) -> None:
    again = {"curate": {"stages": 2, "reflect_again": True}}
    for changes, distill, words in (
        ({}, {"metric_for_best_model": "bleu"}, "unknown metric_for_best_model 'bleu'"),
        ({}, {"eval_metrics": ["rogue_l"]}, "config: distill: unknown metric 'rogue_l'; did you mean 'rouge_l'"),
        ({"evaluate": {"metrics": ["rogue_l"]}}, {}, "config: unknown metric 'rogue_l'"),
        ({"evaluate": {"metrics": ["rouge_l"]}}, {}, "two metrics are called 'rouge_l'"),
        (again, {"early_stopping_patience": 2}, "early_stopping_patience is 2, which may end training before one"),
        (again, {"save_total_limit": 1}, "save_total_limit is 1, which leaves the best one alone; set it to 2"),
        ({}, {"patience": 2}, "early_stopping_patience"),
    ):
        given = {**settings, **changes, "distill": {**settings["distill"], **distill}}
        with pytest.raises((UserError, ValueError), match=words):
            execute(RunConfig(**given, output_dir=str(tmp_path)), say=lambda text: None)
    assert not (tmp_path / "data").exists()
