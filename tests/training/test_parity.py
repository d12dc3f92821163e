"""What users of a Trainer expect of one: predictions, metrics of their own, several data sets, progress."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import EvalPrediction, PreTrainedTokenizerFast, TrainerCallback

from srd_fast import SRDConfig, SRDTrainer, UserError, reflect
from srd_fast.showing import progress_bar, show_as
from srd_fast.training.prediction import named_sets

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def make(tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any] | None = None, **options: Any) -> SRDTrainer:
    usual: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    usual |= {"per_device_train_batch_size": 4, "epochs_per_stage": 1, "logging_steps": 1, "max_steps": 2}
    usual |= {"per_device_eval_batch_size": 2}
    given: dict[str, Any] = {
        "model": tiny.tiny_model("llama", layers=1),
        "teacher_model": tiny.tiny_model("llama", layers=1, seed=1),
        "train_dataset": tiny.tiny_samples(8),
        "eval_dataset": tiny.tiny_samples(5, seed=3),
        "processing_class": tokenizer,
        "teacher_tokenizer": tokenizer,
    }
    return SRDTrainer(args=SRDConfig(**{**usual, **(fields or {})}), **{**given, **options})


def likeliest(trainer: SRDTrainer, sample: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
    """By the whole logits of one sample: classes, labels and losses of its tokens with loss."""
    ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])[1:]
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(input_ids=ids).logits[0, :-1]
    rows = labels != -100
    losses = torch.nn.functional.cross_entropy(logits[rows], labels[rows], reduction="none")
    return logits[rows].argmax(-1).tolist(), labels[rows].tolist(), losses.tolist()


# Predictions


@pytest.mark.parametrize("padding_free", [True, False])
def test_predictions_are_the_likeliest_classes(padding_free: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer, rows = make(tokenizer, {"padding_free": padding_free}), tiny.tiny_samples(5, seed=8)
    found = trainer.predict(rows)
    assert found.predictions.shape == found.label_ids.shape
    for row, classes, labels in zip(rows, found.predictions, found.label_ids):
        wanted, right, _ = likeliest(trainer, row)
        assert classes.tolist() == wanted + [-100] * (len(classes) - len(wanted))
        assert labels.tolist() == right + [-100] * (len(labels) - len(right))
    measured = trainer.evaluate(rows, metric_key_prefix="test")
    assert found.metrics == {name: measured[name] for name in ("test_loss", "test_kl", "test_cross_entropy")}


def test_predictions_beside_a_cache_need_no_teacher(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make(tokenizer, {"teacher_cache": "cache"})
    metrics = trainer.predict(tiny.tiny_samples(3, seed=8), metric_key_prefix="new").metrics
    assert set(metrics) == {"new_loss", "new_cross_entropy"}
    assert metrics["new_loss"] == metrics["new_cross_entropy"]


# Metrics of one's own


def test_metrics_of_ones_own_get_classes_instead_of_logits(tokenizer: PreTrainedTokenizerFast) -> None:
    given: list[EvalPrediction] = []

    def accuracy(found: EvalPrediction) -> dict[str, Any]:
        given.append(found)
        seen = found.label_ids != -100
        return {"accuracy": (found.predictions == found.label_ids)[seen].mean(), "eval_rows": len(found.label_ids)}

    rows = tiny.tiny_samples(5, seed=3)
    fields = {"include_for_metrics": ["inputs", "loss"], "metric_for_best_model": "accuracy"}
    trainer = make(tokenizer, fields, compute_metrics=accuracy)
    metrics = trainer.evaluate()
    found = given[0]
    for i, row in enumerate(rows):
        classes, labels, losses = likeliest(trainer, row)
        assert found.predictions[i][: len(classes)].tolist() == classes
        assert found.label_ids[i][: len(labels)].tolist() == labels
        np.testing.assert_allclose(found.losses[i][: len(losses)], losses, rtol=1e-4)
        assert np.isnan(found.losses[i][len(losses) :]).all()
        assert found.inputs[i][: len(row["input_ids"])].tolist() == row["input_ids"]
    tokens = [pair for row in rows for pair in zip(*likeliest(trainer, row)[:2])]
    assert metrics["eval_accuracy"] == pytest.approx(sum(a == b for a, b in tokens) / len(tokens))
    assert metrics["eval_rows"] == 5
    assert trainer.state.log_history[-1]["eval_accuracy"] == metrics["eval_accuracy"]
    mean = np.nanmean(found.losses[~np.isnan(found.losses)])
    assert metrics["eval_cross_entropy"] == pytest.approx(mean, rel=1e-5)


def test_what_metrics_do_not_get_is_not_there(tokenizer: PreTrainedTokenizerFast) -> None:
    given: list[EvalPrediction] = []
    make(tokenizer, compute_metrics=lambda found: given.append(found) or {}).evaluate()
    assert given[0].inputs is given[0].losses is None
    quiet = make(tokenizer, {"prediction_loss_only": True}, compute_metrics=lambda found: given.append(found) or {})
    assert set(quiet.evaluate()) == {"eval_loss", "eval_kl", "eval_cross_entropy"}
    assert len(given) == 1
    with pytest.raises(UserError, match="compute_metrics must return a dictionary of metrics, got float"):
        make(tokenizer, compute_metrics=lambda found: 0.5).evaluate()
    with pytest.raises(UserError, match="include_for_metrics has 'logits'; it may be inputs and loss"):
        make(tokenizer, {"include_for_metrics": ["logits"]}, compute_metrics=lambda found: {})
    with pytest.raises(UserError, match=r"include_for_metrics is \['loss'\], but there is no compute_metrics"):
        make(tokenizer, {"include_for_metrics": ["loss"]})


# Several data sets


def test_several_data_sets_are_measured_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    sets = {"one": tiny.tiny_samples(3, seed=3), "two": tiny.tiny_samples(4, seed=4)}
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    fields |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_two_kl", "max_steps": -1}
    trainer = make(tokenizer, fields, eval_dataset=sets)
    before = trainer.evaluate()
    for name, rows in sets.items():
        alone = trainer.evaluate(rows)
        for metric in ("loss", "kl", "cross_entropy"):
            assert before[f"eval_{name}_{metric}"] == alone[f"eval_{metric}"]
    assert trainer.evaluate("two").keys() == alone.keys()
    trainer.train()
    assert trainer.state.best_metric == min(x["eval_two_kl"] for x in trainer.state.log_history if "eval_two_kl" in x)
    with pytest.raises(UserError, match=r"unknown metric_for_best_model 'kl'.*one_kl"):
        make(tokenizer, {"metric_for_best_model": "kl"}, eval_dataset=sets)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ({"en": "en.jsonl", "de": "de.jsonl"}, True),
        ({"en": [{"prompt": "a", "completion": "b"}]}, True),
        ({"instruction": ["a", "b"], "output": ["c", "d"]}, False),
        ({"input_ids": [[1, 2]], "labels": [[-100, 2]]}, False),
        ([{"instruction": "a", "output": "b"}], False),
        ({}, False),
        (None, False),
    ],
)
def test_names_of_data_sets_are_no_columns(rows: Any, named: bool) -> None:
    assert named_sets(rows) is named


def test_models_by_their_folders(tokenizer: PreTrainedTokenizerFast) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.tiny_model("llama", layers=1, seed=seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    by_name, given = make(tokenizer, model="student", teacher_model="teacher"), make(tokenizer)
    assert by_name.evaluate() == given.evaluate()


def test_reflection_has_a_longest_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = tiny.tiny_model("llama", layers=1), tiny.tiny_samples(3)
    answers = [
        [x["generation"] for x in reflect(model, rows, tokenizer, max_new_tokens=most, progress=False)]
        for most in (1, 8)
    ]
    for short, long in zip(*answers):
        assert len(short) < len(long)
        assert long.startswith(short)
    with pytest.raises(UserError, match="max_new_tokens must be a whole number of at least 1, got 0"):
        reflect(model, rows, tokenizer, max_new_tokens=0)


def test_tensorboard_writes_below_the_output_folder(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    folders: list[str] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            folders.append(log_dir)

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer  # type: ignore[attr-defined]
    make(tokenizer, {"output_dir": "boards", "report_to": "tensorboard", "max_steps": 1}).train()
    assert folders
    assert all(Path("boards") in Path(folder).parents for folder in folders)


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(trainer: SRDTrainer, monkeypatch: pytest.MonkeyPatch, terminal: bool = False) -> tuple[str, str]:
    out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        trainer.train()
    return out.getvalue(), err.getvalue()


def test_a_training_in_a_file_is_a_line_for_each_log(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"eval_strategy": "steps", "eval_steps": 2}
    out, err = shown(make(tokenizer, fields), monkeypatch)
    lines = out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 1/2  ETA 00:0")
    assert "  loss " in lines[0]
    assert lines[2].startswith("step 2/2  ETA 00:00  eval_loss ")
    assert all(len(line) < 120 and "{" not in line for line in lines)
    assert err == ""
    show_as("quiet")
    assert shown(make(tokenizer, fields), monkeypatch) == ("", "")
    show_as("json")
    events = [json.loads(line) for line in shown(make(tokenizer, fields), monkeypatch)[0].splitlines()]
    assert [(e["event"], e["step"], e["total"]) for e in events[:2]] == [("log", 1, 2), ("log", 2, 2)]
    assert math.isfinite(events[0]["loss"])
    assert "eval_kl" in events[2]


def test_a_training_on_a_terminal_is_a_bar(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = shown(make(tokenizer), monkeypatch, terminal=True)
    assert out == ""
    assert "2/2" in err
    assert "loss " in err
    assert "{" not in err
    lines, _ = shown(make(tokenizer, {"disable_tqdm": True}), monkeypatch, terminal=True)
    assert lines.startswith("step 1/2")


def test_a_long_training_in_a_file_is_a_few_hundred_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from srd_fast.training.progress import ProgressLine

    line, out, args = ProgressLine(), io.StringIO(), SimpleNamespace(disable_tqdm=False)
    state: Any = SimpleNamespace(global_step=0, max_steps=10_000, is_world_process_zero=True)
    monkeypatch.setattr(sys, "stdout", out)
    line.on_train_begin(args, state, None)  # type: ignore[arg-type]
    for step in range(1, 10_001):
        state.global_step = step
        line.on_log(args, state, None, {"loss": 1.0})  # type: ignore[arg-type]
    monkeypatch.undo()
    lines = out.getvalue().splitlines()
    assert 200 <= len(lines) <= 202
    assert lines[0].startswith("step 1/10000")
    assert lines[-1].startswith("step 10000/10000")


@pytest.mark.parametrize(
    ("style", "words"),
    [
        ("auto", ("generate: 3/3 samples", "")),
        ("json", ("", '{"event": "progress", "what": "generate", "done": 3, "total": 3}')),
        ("quiet", ("", "")),
    ],
)
def test_other_work_says_so_now_and_then(style: str, words: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = io.StringIO(), io.StringIO()
    show_as(style)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with progress_bar(what="generate", total=3, unit="sample", shown=True) as bar:
            bar.update(3)
        with progress_bar(what="hidden", total=3, unit="sample", shown=False) as bar:
            bar.update(3)
    assert err.getvalue().partition(", ETA")[0] == words[0]
    assert out.getvalue().strip() == words[1]
    with pytest.raises(UserError, match="style must be one of auto, lines, json, quiet, got 'loud'"):
        show_as("loud")


def test_callbacks_of_transformers_do_not_print_too(tokenizer: PreTrainedTokenizerFast) -> None:
    names = [type(callback).__name__ for callback in make(tokenizer).callback_handler.callbacks]
    assert names.count("ProgressLine") == 1
    assert not {"PrinterCallback", "ProgressCallback"} & set(names)
    assert all(isinstance(x, TrainerCallback) for x in make(tokenizer).callback_handler.callbacks)
