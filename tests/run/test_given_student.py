"""A run with a given student uses that student's tokenizer, in the data and in what is saved."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_cli import srd_fast
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def given(
    make_tiny_model: Callable[[int], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    """A folder with a student whose tokenizer has another template and a token more, and rows."""
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "student")
    model = make_tiny_model(2)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "student")
    rows = [{"instruction": f"Name colour {i}.", "output": f"Red {i}."} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_the_students_template_and_tokens_go_all_the_way(given: Path, tiny_teacher_folder: Path) -> None:
    config = given / "config.yaml"
    config.write_text(
        f"{{teacher: {tiny_teacher_folder}, student: {given}/student, data: {given}/rows.jsonl, validation: 4, "
        f"template: chat, dtype: float32, output_dir: {given}/run, max_prompt_length: 64, max_response_length: 16, "
        "curate: {stages: 1}, reflect: {engine: transformers, max_new_tokens: 3}, evaluate: {max_new_tokens: 3}, "
        "distill: {epochs_per_stage: 1, per_device_train_batch_size: 4, padding_free: false}}"
    )
    assert "[PAD]" in srd_fast("run", config).error()
    result = srd_fast("run", config, "distill.shared_vocabulary=true")
    assert result.status == 0, result
    prompts = pq.read_table(given / "run" / "data" / "train.parquet")["prompt"].to_pylist()
    assert all(p.startswith("[user] Name colour") and p.endswith("\n[assistant] ") for p in prompts)
    saved = AutoTokenizer.from_pretrained(given / "run" / "student")
    assert saved.chat_template == TEMPLATE
    assert saved.pad_token == "[PAD]"
    # The template is part of what the data depends on.
    assert srd_fast("run", config, "distill.shared_vocabulary=true").steps("done in") == []
    tokenizer = AutoTokenizer.from_pretrained(given / "student")
    tokenizer.chat_template = TEMPLATE.replace("[{{", "({{")
    tokenizer.save_pretrained(given / "student")
    assert "prepare" in srd_fast("run", config, "distill.shared_vocabulary=true").steps("done in")
