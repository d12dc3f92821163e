"""docs/from_official.md: each key and value of ours beside a flag of the authors' is there, and does what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from srd_fast import UserError, distillation_loss_from_logits, divergence_names
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.steps.settings import lora_config, training_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from_official.md"
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)?")
WORD = re.compile(r'\S+="[^"]*"|\S+')
# What `key` of the table can be set to, where the table has no value of its own.
VALUES: dict[str, Any] = {
    "student": "some/model", "teacher": "some/model", "data": "rows.jsonl", "validation": 7, "output_dir": "runs/x",
    "seed": 3, "max_prompt_length": 99, "max_response_length": 88, "evaluate.batch_size": 5, "reflect.temperature": 0.3,
    "reflect.top_k": 9, "reflect.top_p": 0.4, "reflect.no_repeat_ngram_size": 2, "reflect.repetition_penalty": 1.5,
    "distill.divergence": "jsd", "distill.skew": 0.3, "distill.epochs_per_stage": 5, "distill.learning_rate": 0.003,
    "distill.min_learning_rate": 0.002, "distill.per_device_train_batch_size": 3, "distill.weight_decay": 0.7,
    "distill.gradient_accumulation_steps": 2, "distill.max_grad_norm": 0.9, "distill.warmup_steps": 4,
    "distill.save_steps": 11, "distill.eval_steps": 13, "distill.logging_steps": 17,
}  # fmt: skip


def table() -> list[tuple[list[str], list[str], str]]:
    """Of each row what stands in backticks in the first two columns, and the third."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert [cell.strip() for cell in rows[0]] == ["theirs", "here", ""]
    return [(re.findall("`([^`]+)`", a), re.findall("`([^`]+)`", b), c) for a, b, c in rows[2:]]


OURS = [token for _, here, _ in table() for token in here]
ASSIGNMENTS = [a for token in OURS if "=" in token and " -m " not in token for a in WORD.findall(token)]
KEYS = [token for token in OURS if KEY.fullmatch(token) and token not in divergence_names()]


def value(config: RunConfig, key: str) -> Any:
    """What the steps get: of distill, what the trainer is made with."""
    section, _, name = key.rpartition(".")
    if section == "distill":
        return getattr(training_config(config), name)
    return getattr(getattr(config, section) if section else config, name)


def loaded(*assignments: str) -> RunConfig:
    return load_run_config(None, [a.replace('"', "") for a in assignments])


def test_the_whole_table_is_understood() -> None:
    commands = [token for token in OURS if " -m " in token]
    assert commands == ["torchrun --nproc-per-node 4 -m srd_fast run CONFIG"]
    others = {*commands, *KEYS, *divergence_names(), "float32"}
    left = [token for token in OURS if token not in others and not set(WORD.findall(token)) <= set(ASSIGNMENTS)]
    assert left == []
    assert len(KEYS) > 25
    assert len(ASSIGNMENTS) > 10


@pytest.mark.parametrize("key", KEYS)
def test_each_key_of_ours_arrives_where_it_is_used(key: str) -> None:
    given = VALUES[key]
    assert value(loaded(), key) != given
    assert value(loaded(f"{key}={given}"), key) == given


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_each_value_of_ours_is_taken(assignment: str) -> None:
    """And what nearly is that key is refused, so that being taken means something."""
    config = loaded(assignment)
    key = assignment.partition("=")[0]
    if key == "lora":
        made = lora_config(config)
        assert (made.r, made.lora_alpha, made.lora_dropout) == (16, 64, 0.1)
    else:
        value(config, key)
    with pytest.raises(UserError, match="unknown key"):
        loaded(assignment.replace("=", "_x=", 1))


def test_the_preset_is_what_the_table_says_of_their_code() -> None:
    """preset=official, and the same in keys of the table."""
    preset = loaded("preset=official")
    of_code = [
        a
        for a in ASSIGNMENTS
        if a.startswith(('distill.temperature="', "distill.sft", "curate.", "distill.temperature_s"))
    ]
    assert len(of_code) == 6
    for assignment in of_code:
        key = assignment.partition("=")[0]
        assert value(preset, key) == value(loaded(assignment), key), key
    ratios = next(theirs for theirs, here, _ in table() if any("sft_weight" in token for token in here))
    assert ratios == ["--kd-ratio"]
    assert value(preset, "distill.sft_weight") == pytest.approx([1 - ratio for ratio in (0.8, 0.9, 1.0)])
    notes = {here[0]: note.strip() for _, here, note in table() if here}
    assert value(preset, "distill.epochs_per_stage") == int(notes["distill.epochs_per_stage"])
    names = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl")
    configs = {name: training_config(loaded("preset=official", f"distill.divergence={name}")) for name in names}
    scaled = {name for name, config in configs.items() if config.scales_with_temperature}
    assert notes["distill.temperature_scaling=official"] == "forward KL, JSD and skew reverse KL"
    assert scaled == {"forward_kl", "jsd", "skew_reverse_kl"}


def test_their_divergences_are_those_that_the_table_names() -> None:
    """As their code writes them, up to the entropy of the teacher in forward KL and skew forward KL."""
    theirs, ours, _ = next(row for row in table() if "--type tfkl" in row[0])
    names = dict(zip([theirs[0].split()[-1], *theirs[1:]], ours[1:7]))
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 13, generator=generator, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    half, skewed, reverse = 0.9 * q + 0.1 * p, 0.1 * p + 0.9 * q, 0.9 * p + 0.1 * q  # lam 0.9, and skew-alpha 0.1 twice
    expected = {
        "tfkl": -(p * q.log()).sum(-1) - entropy,
        "trkl": (q * (q / p).log()).sum(-1),
        "tjsd": 0.9 * (q * (q / half).log()).sum(-1) + 0.1 * (p * (p / half).log()).sum(-1),
        "ttvd": 0.5 * (p - q).abs().sum(-1),
        "tsfkl": -(p * skewed.log()).sum(-1) - entropy,
        "tsrkl": (q * (q / reverse).log()).sum(-1),
    }
    assert set(names) == set(expected)
    beta = next(float(a.partition("=")[2]) for a in ASSIGNMENTS if a.startswith("distill.beta"))
    labels = torch.zeros(5, dtype=torch.long)
    for flag, name in names.items():
        found = distillation_loss_from_logits(
            student, teacher, labels, divergence=name, temperature=1.0, sft_weight=0.0, skew=0.1, beta=beta,
            reduction="none",
        )  # fmt: skip
        assert torch.allclose(found.loss, expected[flag], atol=1e-10), flag
