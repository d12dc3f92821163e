"""Adapters: read from a folder, merged, and saved as the model that was trained."""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import make_architecture
from torch import Tensor
from transformers import PreTrainedModel

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.models import (
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    save_adapter,
    save_base,
    save_student,
    try_merging,
    why_not_plain_lora,
)
from srd_fast.training.student import prune_and_warm_up

peft = pytest.importorskip("peft")

IDS = torch.arange(1, 25).view(2, 12)
PLACES: dict[str, dict[str, Any]] = {
    "layers": {"target_modules": ["q_proj", "down_proj"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 7]},
    "DoRA": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def adapted(base: PreTrainedModel, **config: Any) -> Any:
    """A PEFT model in which all that can be trained has moved."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base with its tokenizer, and an adapter of it without one."""
    base = tiny.tiny_model("llama", layers=3, max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = adapted(load_model(str(tmp_path / "base")), **PLACES["layers"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["llama", "llama_untied"])
@pytest.mark.parametrize("place", PLACES)
def test_a_saved_student_is_the_trained_one(place: str, architecture: str, tmp_path: Path) -> None:
    base = tiny.tiny_model(architecture)
    model = adapted(copy.deepcopy(base), **PLACES[place])
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.1
    save_student(model, tiny.tiny_tokenizer(), tmp_path)
    student = load_model(str(tmp_path))
    tiny.assert_same(logits(student), expected, 1e-4)
    assert student.config.model_type == "llama"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("place", "tied"), [("layers", True), ("single tokens", True), ("embeddings", False), ("head as a whole", False)]
)
def test_embeddings_stay_tied_where_they_are_one(place: str, tied: bool, tmp_path: Path) -> None:
    save_student(adapted(tiny.tiny_model("llama"), **PLACES[place]), tiny.tiny_tokenizer(), tmp_path)
    student = load_model(str(tmp_path))
    assert (student.get_input_embeddings().weight is student.get_output_embeddings().weight) == tied
    assert student.config.tie_word_embeddings == tied


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["embed_tokens"]], ids="+".join)
@pytest.mark.parametrize("made_by", ["the trainer", "the user"])
def test_a_trained_model_merges_by_pefts_own_method(made_by: str, targets: list[str], tmp_path: Path) -> None:
    args = SRDConfig(output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
                     save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)  # fmt: skip
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets)
    student: Any = tiny.tiny_model("llama")
    given = {"peft_config": config} if made_by == "the trainer" else {}
    student = student if given else peft.get_peft_model(student, config)
    trainer = SRDTrainer(student, tiny.tiny_model("llama", seed=3), args, tiny.tiny_samples(16),
                         processing_class=tiny.tiny_tokenizer(), **given)  # fmt: skip
    trainer.train()
    expected = logits(trainer.model)
    merged = trainer.model.merge_and_unload()
    tiny.assert_same(logits(merged), expected, 1e-5)
    merged.save_pretrained(tmp_path / "merged")
    tiny.assert_same(logits(load_model(str(tmp_path / "merged"))), expected, 1e-5)


def test_training_tied_embeddings_saves_what_was_measured(tmp_path: Path) -> None:
    args = SRDConfig(output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
                     save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)  # fmt: skip
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"])
    options = {"processing_class": tiny.tiny_tokenizer(), "peft_config": config}
    trainer = SRDTrainer(
        tiny.tiny_model("llama"), tiny.tiny_model("llama", seed=3), args, tiny.tiny_samples(16), **options
    )
    trainer.train()
    expected = logits(trainer.model)
    save_student(trainer.model, tiny.tiny_tokenizer(), tmp_path / "student")
    tiny.assert_same(logits(load_model(str(tmp_path / "student"))), expected, 1e-5)


def test_an_adapter_folder_is_the_merged_model(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = folders
    monkeypatch.setattr(logging.getLogger("srd_fast"), "propagate", True)
    with caplog.at_level(logging.INFO, "srd_fast"):
        model = load_model(str(adapter))
    assert f"merged the adapter {adapter} (LoraConfig) into {base}" in caplog.text
    assert type(model) is type(load_model(str(base)))
    assert all(p.requires_grad for p in model.parameters())
    expected = logits(peft.PeftModel.from_pretrained(load_model(str(base)), adapter))
    tiny.assert_same(logits(model), expected, 1e-5)
    assert (expected - logits(load_model(str(base)))).abs().max() > 0.1
    assert load_config(str(adapter)).model_type == "llama"


def test_the_tokenizer_is_the_adapters_or_else_the_bases(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    assert load_tokenizer(str(adapter)).get_vocab() == load_tokenizer(str(base)).get_vocab()
    more = tiny.tiny_tokenizer()
    more.add_tokens(["<extra>"])
    more.save_pretrained(adapter)
    assert "<extra>" in load_tokenizer(str(adapter)).get_vocab()


def test_an_adapter_is_pruned_merged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prune_and_warm_up(str(folders[1]), tmp_path / "student", layers=[0, 1, 2])
    tiny.assert_same(logits(load_model(str(tmp_path / "student"))), logits(load_model(str(folders[1]))), 1e-6)


def test_another_base_is_another_fingerprint(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    before = fingerprint(str(adapter))
    tiny.tiny_model("llama", seed=7, layers=3).save_pretrained(base)
    assert fingerprint(str(adapter)) != before


def test_adapters_that_cannot_be_used_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no weights in safetensors .*pickled ones \(.bin\) are not read"):
        load_model(str(adapter))
    (adapter / "adapter_model.bin").unlink()

    other = adapted(load_model(str(base)), target_modules=["q_proj"])
    other.save_pretrained(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not fit its configuration: base_model.*down_proj.*and 3 more"):
        load_model(str(adapter))

    weights.write_bytes(whole)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"{base}"', '"/nowhere/at/all"'))
    with pytest.raises(UserError, match="model folder '/nowhere/at/all' does not exist"):
        load_model(str(adapter))
    config.write_text("{")
    with pytest.raises(UserError, match="no configuration that can be read"):
        load_model(str(adapter))


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_trained_prompts_are_refused(kind: str, side: str, tmp_path: Path) -> None:
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    given = peft.get_peft_model(tiny.tiny_model("llama"), config)
    models = (given, tiny.tiny_model("llama")) if side == "student" else (tiny.tiny_model("llama"), given)
    args = SRDConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(UserError, match=rf"the {side} is a PEFT model with {kind}: trained prompts add positions"):
        SRDTrainer(*models, args, tiny.tiny_samples(4), processing_class=tiny.tiny_tokenizer())
    given.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=rf"is of {kind}: trained prompts"):
        load_model(str(tmp_path / "adapter"))


def test_adapters_of_layers_that_share_weights_are_refused_before_training() -> None:
    """Each hybrid layer of Zamba 2 would add its own change to the one block that all of them have."""
    model = make_architecture("zamba2")
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["gate_up_proj"])
    with pytest.raises(UserError, match="layers of Zamba2ForCausalLM share weights"):
        try_merging(peft.get_peft_model(model, adapters))


PLAIN = {"layers", "rsLoRA"}
NOT_PLAIN = {
    "embeddings": "model.embed_tokens has a Embedding",
    "head": "it is around the head",
    "embeddings as a whole": r"its modules_to_save is \['embed_tokens'\]",
    "head as a whole": r"its modules_to_save is \['lm_head'\]",
    "both as a whole": "its modules_to_save is",
    "single tokens": "its trainable_token_indices is",
    "DoRA": "its use_dora is True",
    "rank_pattern": "its rank_pattern is",
    "alpha_pattern": "its alpha_pattern is",
    "bias": "its bias is 'all'",
    "lora_bias": "its lora_bias is True",
}
OTHERS: dict[str, dict[str, Any]] = {
    "rank_pattern": {**PLACES["layers"], "rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {**PLACES["layers"], "alpha_pattern": {"q_proj": 2}},
    "bias": {**PLACES["layers"], "bias": "all"},
    "lora_bias": {**PLACES["layers"], "lora_bias": True},
}


@pytest.mark.parametrize("kind", [*PLACES, *OTHERS])
def test_an_adapter_that_is_more_than_a_product_beside_a_layer_is_none_for_engines(kind: str) -> None:
    assert PLACES.keys() | OTHERS.keys() == PLAIN | NOT_PLAIN.keys()
    base = tiny.tiny_model("llama_untied", attention_bias=True)
    model = adapted(base, **(PLACES | OTHERS)[kind])
    reason = why_not_plain_lora(model)
    if kind in PLAIN:
        assert reason is None
    else:
        assert re.search(NOT_PLAIN[kind], reason or ""), reason


def test_two_adapters_or_another_kind_are_none_either() -> None:
    model = adapted(tiny.tiny_model(), **PLACES["layers"])
    model.add_adapter("second", peft.LoraConfig(r=4, **PLACES["layers"]))
    assert why_not_plain_lora(model) == "it is not one of LoRA alone"
    assert why_not_plain_lora(peft.get_peft_model(tiny.tiny_model(), peft.LoHaConfig(target_modules=["q_proj"])))
    odd = peft.get_peft_model(tiny.tiny_model(), peft.LoraConfig(init_lora_weights="pissa", **PLACES["layers"]))
    assert why_not_plain_lora(odd) == "its init_lora_weights is 'pissa'"


@pytest.mark.parametrize("architecture", ["llama", "llama_untied"])
def test_base_and_adapter_in_two_folders_are_the_model(architecture: str, tmp_path: Path) -> None:
    plain = tiny.tiny_model(architecture)
    model = adapted(copy.deepcopy(plain), **PLACES["rsLoRA"])
    before, expected = logits(plain), logits(model)
    save_base(model, tmp_path / "base")
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert torch.equal(logits(load_model(str(tmp_path / "base"))), before)
    tiny.assert_same(logits(load_model(str(tmp_path / "adapter"))), expected, 1e-5, "logits")
    assert torch.equal(logits(model), expected), "saving changed it"
    assert not (before - expected).abs().max() < 0.1
