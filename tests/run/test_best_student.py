"""A run whose student is the best one by its answers: which it is, what is said of it, what a kill changes."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from safetensors.torch import load_file

from srd_fast import Sampling, register_engine
from srd_fast.errors import UserError
from srd_fast.run.config import RunConfig
from srd_fast.run.pipeline import execute, fingerprints
from srd_fast.run.steps import training
from srd_fast.run.stopping import stoppable

pytestmark = pytest.mark.usefixtures("own_registries")
METRIC = """
def told(reflected):
    return [float(len(text)) for text in reflected.generations]

told.higher_is_easier = True
"""


class Scripted:
    """Gives the references of the first so many validation rows: a number for each state of the weights."""

    def __init__(self, folder: Path, right: Sequence[int]) -> None:
        self.folder, self.right = folder, iter(right)
        self.known: dict[float, int] = {}
        self.hooks: dict[int, Callable[[], Any]] = {}
        register_engine("scripted", self.of, replace=True)

    def of(self, student: Any, tokenizer: Any, batch_size: int = 1) -> "Scripted":
        weights = float(sum(p.detach().double().abs().sum() for p in student.parameters()))
        if weights not in self.known:
            self.hooks.get(len(self.known), str)()
            self.known[weights] = next(self.right)
        self.now = self.known[weights]
        return self

    def before_answers(self, state: int, do: Callable[[], Any]) -> None:
        """Do something before the answers of a state of the weights; the starting student's is 0."""
        self.hooks[state] = do

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        rows = pq.read_table(self.folder / "data" / "validation.parquet").to_pylist()
        answers = {}
        for row in rows[: self.now]:
            prompt = row["labels"].count(-100)
            answers[tuple(row["input_ids"][:prompt])] = row["input_ids"][prompt:]
        yield from ((i, answers.get(tuple(prompt), [])) for i, prompt in enumerate(prompts))


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(METRIC)
    return f"{file}:told"


@pytest.fixture(scope="module")
def settings(tiny_teacher_folder: Path, metric: str) -> dict[str, Any]:
    return {
        **tiny.tiny_run(tiny_teacher_folder),
        "reflect": {"engine": "transformers", "max_new_tokens": 3, "batch_size": 8},
        "curate": {"stages": 2},
        "evaluate": {"max_new_tokens": 6, "metrics": [metric]},
        "distill": {
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "epochs_per_stage": 1, "eval_steps": 1,
            "save_steps": 2, "learning_rate": 1e-2, "eval_generate": True, "generation_engine": "scripted",
            "load_best_model_at_end": True, "metric_for_best_model": "exact_match",
        },
    }  # fmt: skip


def run(settings: dict[str, Any], folder: Path, *steps: str | None) -> None:
    for step in steps:
        execute(RunConfig(**settings, output_dir=str(folder)), only=step, say=lambda text: None)


BEFORE = ("prepare", "reflect", "curate", "cache")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def matches(folder: Path) -> dict[int, float]:
    return {row["step"]: row["exact_match"] for row in metrics(folder) if row["kind"] == "eval"}


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_the_student_of_a_run_is_the_best_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Scripted(tmp_path, [4, 1, 2, 3, 3, 0])
    run(settings, tmp_path, None)
    assert {"rouge_l", "exact_match", "kl", "cross_entropy"} < set(metrics(tmp_path)[0])
    assert matches(tmp_path) == {0: 1.0, 1: 0.25, 2: 0.5, 3: 0.75, 4: 0.75, 5: 0.0}
    best = {"step": 3, "metric": "exact_match", "value": 0.75}
    assert metrics(tmp_path)[-1] == {"kind": "best", **best}
    student, last = (weights(tmp_path / f) for f in ("student", "checkpoints/checkpoint-5"))
    assert all(x.equal(student[n]) for n, x in weights(tmp_path / "checkpoints" / "checkpoint-3").items())
    assert not all(x.equal(student[n]) for n, x in last.items())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == best
    assert summary["evaluation"]["student"]["told"] != summary["evaluation"]["start"]["told"]
    page = (tmp_path / "report.html").read_text()
    assert "that of step 3, the best by validation exact match (75.0)" in page
    assert "The student that was kept is that of step 3." in page
    assert "validation exact match from 1.000 to 0.000" in page
    assert re.search(r'<th scope="col">told</th>', page)
    assert "the student is that of step 3, the best by exact_match (0.75)" in capsys.readouterr().out
    # Killed when training had ended, and with its last checkpoint damaged, it is the same.
    killed = tmp_path / "killed"
    engine.folder = killed
    run(settings, killed, *BEFORE)
    with monkeypatch.context() as patched:
        patched.setattr(training, "_keep_student", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings, killed, "distill")
    newest = max((killed / "checkpoints").glob("checkpoint-*"), key=lambda f: int(f.name[11:]))
    (newest / "trainer_state.json").unlink()
    run(settings, killed, "distill")
    assert matches(killed) == matches(tmp_path)
    assert metrics(killed)[-1] == {"kind": "best", **best}
    assert all(x.equal(student[n]) for n, x in weights(killed / "student").items())


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
def test_checkpoints_of_weights_alone_lose_nothing(settings: dict[str, Any], tmp_path: Path, saved: bool) -> None:
    """A run that is asked to stop saves the optimizer too and goes on; of one that was killed training begins anew."""
    light = {**settings, "distill": {**settings["distill"], "save_only_model": True, "save_total_limit": 1}}
    right = [4, 1, 2, 3, 3, 0]
    Scripted(tmp_path / "whole", right)
    run(light, tmp_path / "whole", None)
    folder = tmp_path / "stopped"
    run(light, folder, *BEFORE)
    Scripted(folder, right[:5]).before_answers(3, partial(os.kill, os.getpid(), SIGTERM) if saved else interrupted)
    with pytest.raises(KeyboardInterrupt), stoppable():
        run(light, folder, "distill")
    there = {f.name for f in (folder / "checkpoints").glob("checkpoint-*/optimizer.pt")}
    assert len(there) == saved
    Scripted(folder, right[5:] if saved else right)
    run(light, folder, "distill")
    assert metrics(folder)[-1] == metrics(tmp_path / "whole")[-1] == {
        "kind": "best", "step": 3, "metric": "exact_match", "value": 0.75,
    }  # fmt: skip
    assert matches(folder) == matches(tmp_path / "whole")
    student = weights(tmp_path / "whole" / "student")
    assert all(x.equal(student[n]) for n, x in weights(folder / "student").items())


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_code_of_a_metric_is_an_input_of_its_steps(settings: dict[str, Any], metric: str) -> None:
    distill = {**settings["distill"], "eval_metrics": ["exact_match", metric]}
    file, config = Path(metric.rpartition(":")[0]), RunConfig(**{**settings, "distill": distill})
    before = fingerprints(config)
    file.write_text(METRIC + "\n# another version\n")
    after = fingerprints(config)
    file.write_text(METRIC)
    assert before["cache"] == after["cache"]
    assert before["distill"] != after["distill"]
    assert before["evaluate"] != after["evaluate"]
    assert fingerprints(config) == before


def test_what_a_run_cannot_keep_is_said_first(settings: dict[str, Any], tmp_path: Path) -> None:
    Scripted(tmp_path, [])
    again = {"curate": {"stages": 2, "reflect_again": True}}
    for changes, distill, words in (
        ({}, {"metric_for_best_model": "bleu"}, "unknown metric_for_best_model 'bleu'"),
        ({}, {"eval_metrics": ["rogue_l"]}, "config: distill: unknown metric 'rogue_l'; did you mean 'rouge_l'"),
        ({"evaluate": {"metrics": ["rogue_l"]}}, {}, "config: evaluate.metrics: unknown metric 'rogue_l'"),
        ({"evaluate": {"metrics": ["rouge_l"]}}, {}, "two metrics are called 'rouge_l'"),
        (again, {"early_stopping_patience": 2}, "early_stopping_patience is 2, which may end training before one"),
        (again, {"save_only_model": True}, "save_only_model is true, which leaves out its optimizer; set it to false"),
        (again, {"save_total_limit": 1}, "save_total_limit is 1, which would keep only the best one; set it to 2"),
        ({}, {"patience": 2}, "early_stopping_patience"),
    ):
        given = {**settings, **changes, "distill": {**settings["distill"], **distill}}
        with pytest.raises((UserError, ValueError), match=words):
            execute(RunConfig(**given, output_dir=str(tmp_path)), say=lambda text: None)
    assert not (tmp_path / "data").exists()
