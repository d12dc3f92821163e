"""Top-k files as DistillKit and axolotl store them, beside the cache that the teacher itself would have filled."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer, UserError, build_teacher_cache, model_distillation_loss
from srd_fast.integrations import cache_from_top_k
from srd_fast.teacher import make_store

SAMPLES = tiny.tiny_samples(6)


def rows(names: tuple[str, str], k: int = 12) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """A teacher, and its k likeliest classes at each position that has a token after it."""
    teacher = tiny.tiny_model(seed=2)
    made = []
    for sample in SAMPLES:
        with torch.no_grad():
            log_p = teacher(torch.tensor([sample["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
        best = log_p.topk(k)
        # In no order: not every library sorts.
        turned = {names[0]: best.indices.flip(1).tolist(), names[1]: best.values.flip(1).tolist()}
        made.append({"input_ids": sample["input_ids"], "labels": sample["labels"], **turned})
    return teacher, made


@pytest.mark.parametrize("names", [("token_ids", "top_values"), ("target_token_ids", "target_logprobs"), ("a", "b")])
def test_the_loss_is_that_of_the_teachers_own_cache(names: tuple[str, str], tmp_path: Path) -> None:
    """From rows, from a file, and from a form of one's own; in several shards, and with one row twice."""
    teacher, given = rows(names)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (*given, given[0])), encoding="utf-8")
    decode = (lambda row: (row["a"], row["b"])) if names == ("a", "b") else None
    source = given if decode else file
    found = cache_from_top_k(source, tmp_path / "read", num_classes=tiny.VOCAB, k=8, decode=decode, shard_bytes=300)
    assert len(found.files) > 1
    assert len(found) == len(SAMPLES)
    store = make_store("topk", tiny.VOCAB, 8)
    own = build_teacher_cache(teacher, SAMPLES, tmp_path / "own", kind="topk", store=store, progress=False)
    student, batch = tiny.tiny_model(seed=1), tiny.collate(SAMPLES)
    for divergence in ("forward_kl", "jsd"):
        options = {"divergence": divergence, "temperature": 1.0, "sft_weight": 0.0}
        mine, theirs = (model_distillation_loss(student, cache, batch, **options).loss for cache in (found, own))
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-3)
    with pytest.raises(UserError, match="temperatures 1, not 2"):
        model_distillation_loss(student, found, batch, divergence="forward_kl", temperature=2.0)


def test_a_trainer_takes_it_without_a_teacher(
    make_tiny_model: Callable[[int], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    _, given = rows(("token_ids", "top_values"))
    cache_from_top_k(given, tmp_path / "cache", num_classes=len(tiny_tokenizer), k=8)
    args = SRDConfig(
        str(tmp_path / "out"), divergence="forward_kl", temperature=1.0, teacher_cache=str(tmp_path / "cache"),
        teacher_cache_kind="topk", teacher_cache_k=8, epochs_per_stage=1, per_device_train_batch_size=2,
        save_strategy="no", report_to="none", use_cpu=True, logging_steps=1,
    )  # fmt: skip
    data = [{name: row[name] for name in ("input_ids", "labels")} for row in given]
    trainer = SRDTrainer(make_tiny_model(1), None, args, data, processing_class=tiny_tokenizer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(x["divergence"] > 0 for x in trainer.state.log_history if "divergence" in x)


def changed(change: Mapping[str, Any]) -> list[dict[str, Any]]:
    row = {"input_ids": [1, 2, 3], "token_ids": [[1, 2], [3, 4]], "top_values": [[-1.0, -2.0], [-1.5, -1.0]]}
    return [{name: x for name, x in {**row, **change}.items() if x is not None}]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"token_ids": None}, {}, "row 1 has the columns input_ids, top_values"),
        ({"input_ids": None}, {}, "row 1 has no input_ids"),
        ({"labels": [1, 2]}, {}, "labels has 2 numbers and input_ids 3"),
        ({"top_values": [[-1.0, -2.0]]}, {}, "a top-k for 1 positions"),
        ({}, {"k": 3}, "2 classes at one position, fewer than k, 3"),
        ({}, {"k": 9}, "k must be at least 1 and below num_classes, 9"),
        ({"token_ids": [[1, 2], [3, 9]]}, {}, "ids must be from 0 to 8, got 9"),
        ({"token_ids": [[1, 2], [3, 3]]}, {}, "the ids of one position repeat"),
        ({"top_values": [[3.0, 2.0], [-1.0, -1.0]]}, {}, "add up to 27"),
        ({"top_values": [[-1.0, float("-inf")], [-1.0, -1.0]]}, {}, "padding of -inf"),
        ({"labels": [-100, -100, -100]}, {}, "no sample with a loss"),
    ],
)
def test_what_is_no_distribution_is_refused(
    change: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        cache_from_top_k(changed(change), tmp_path / "cache", **{"num_classes": 9, "k": 2, **options})
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    cache_from_top_k(changed({}), tmp_path / "cache", num_classes=9, k=2)
    with pytest.raises(UserError, match="has a teacher cache already"):
        cache_from_top_k(changed({}), tmp_path / "cache", num_classes=9, k=2)
