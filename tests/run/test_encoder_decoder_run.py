"""The command with an encoder-decoder teacher: a whole run, its student, and what is refused before it."""

import json
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import yaml
from datasets import Dataset
from encoder_decoders import plain_means, split, tiny_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from srd_fast.cli import main
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.models import load_model
from srd_fast.run.config import load_run_config
from srd_fast.run.steps.settings import lora_config

CONFIG: dict[str, Any] = {
    "student": "prune",
    "max_rows": 14,
    "validation": 4,
    "dtype": "float32",
    "template": "{instruction} {input}",
    "init_student": {"layers": 1, "encoder_layers": 2, "warmup_steps": 2, "warmup_batch_size": 4},
    "reflect": {"engine": "transformers", "max_new_tokens": 4, "batch_size": 8},
    "evaluate": {"max_new_tokens": 4, "metrics": ["bleu", "chrf"]},
    "curate": {"stages": 2},
    "distill": {"per_device_train_batch_size": 4, "epochs_per_stage": 1, "learning_rate": 5e-3},
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit status of the command."""
    monkeypatch.setattr("sys.argv", ["srd-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "teacher"
    lines = [f"{row['instruction']} {row['input']} {row['output']}" for row in make_quickstart_rows(60, seed=5)]
    tokenizer = encoder_decoders.tiny_tokenizer("t5", lines)
    tiny_model("t5_untied", layers=(3, 3), vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config_file(teacher: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"teacher": str(teacher), **CONFIG}))
    return path


def test_a_whole_run(
    config_file: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "run"
    assert run(monkeypatch, "run", config_file, f"output_dir={folder}") == 0
    assert "batches are padded, because the student cannot go without" in capsys.readouterr().err
    start, student = (AutoModelForSeq2SeqLM.from_pretrained(folder / name).eval() for name in ("start", "student"))
    assert (student.config.num_layers, student.config.num_decoder_layers) == (2, 1)
    assert student.lm_head.weight is not student.shared.weight
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    samples = Dataset.from_parquet(str(folder / "data" / "validation.parquet"), keep_in_memory=True).to_list()
    for sample in samples:
        prompt, response = split(sample)
        assert prompt == tokenizer(sample["prompt"]).input_ids
        assert response == tokenizer(sample["references"][0]).input_ids
    summary = json.loads((folder / "summary.json").read_text())["evaluation"]
    taught = load_model(str(teacher))
    for name, model in (("teacher", taught), ("start", start), ("student", student)):
        kl, cross_entropy = plain_means(model, taught, samples)
        assert summary[name]["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-4), name
        assert name == "teacher" or summary[name]["kl"] == pytest.approx(kl, rel=1e-4), name
        assert {"bleu", "chrf", "rouge_l"} < set(summary[name])
    assert summary["student"]["kl"] < 0.98 * summary["start"]["kl"]
    assert "chrF <span" in (folder / "report.html").read_text()
    assert run(monkeypatch, "run", config_file, f"output_dir={folder}") == 0
    assert capsys.readouterr().out.count("unchanged, skipped") == 8


def test_a_student_cut_by_the_command(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cut = ("init-student", "--teacher", teacher, "--output", tmp_path / "student", "--layers", "0,2")
    assert run(monkeypatch, *cut, "--encoder-layers", 3) == 0
    student = load_model(str(tmp_path / "student"))
    assert (student.config.num_layers, student.config.num_decoder_layers) == (3, 2)
    assert run(monkeypatch, *cut, "--encoder-layers", "x") == 2
    assert "encoder-layers must be a number or a list of numbers, got 'x'" in capsys.readouterr().err


def test_adapters_are_made_for_two_stacks(config_file: Path, teacher: Path) -> None:
    pytest.importorskip("peft")
    config = load_run_config(config_file, ["lora={r: 2}"])
    assert lora_config(config).task_type == "SEQ_2_SEQ_LM"
    assert lora_config(load_run_config(config_file, ["lora={r: 2, task_type: FEATURE_EXTRACTION}"])).task_type != (
        "SEQ_2_SEQ_LM"
    )


@pytest.mark.slow
def test_a_run_with_adapters(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    quick = ("lora={r: 8}", "cache.kind=live", "init_student.warmup_steps=0")
    quick += ("distill.epochs_per_stage=10", "distill.learning_rate=0.02", "distill.sft_weight=0")
    assert run(monkeypatch, "run", config_file, f"output_dir={folder}", *quick) == 0
    summary = json.loads((folder / "summary.json").read_text())["evaluation"]
    assert summary["student"]["kl"] < summary["start"]["kl"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"student": "CAUSAL"}, "the student is a causal language model and the teacher an encoder-decoder model"),
        ({"init_student": {"layers": 9}}, "layers must be from 1 to the teacher's encoder's 3, got 9"),
        ({"evaluate": {"metrics": ["rouge"]}}, "evaluate.metrics"),
        ({"reflect": {"engine": "vllm"}}, "engine 'vllm' runs causal language models"),
    ],
)
def test_what_does_not_go_is_one_line(
    change: dict[str, Any], words: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("srd_fast.run.steps.inputs.find_spec", lambda package: package)  # as if vLLM were here
    if change.get("student") == "CAUSAL":
        change = {"student": str(tmp_path / "causal")}
        tiny.tiny_model("llama").save_pretrained(change["student"])
        AutoTokenizer.from_pretrained(teacher).save_pretrained(change["student"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"teacher": str(teacher), **CONFIG, **change}))
    assert run(monkeypatch, "run", path, f"output_dir={tmp_path / 'run'}", "init_student.warmup_steps=0") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert words in said[0]
