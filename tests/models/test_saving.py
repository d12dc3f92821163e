"""What would keep a student from being saved shows before it is trained; what can be mended is mended, and said."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import UserError
from srd_fast.models import (
    load_model,
    mend_generation_config,
    model_without_weights,
    saving,
    try_hub,
    try_merging,
    try_saving,
    with_adapters,
)

ENDS = {"bos_token_id": 3, "eos_token_id": [0, 5], "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def brought(**fields: Any) -> PreTrainedModel:
    """A student with the generation config of a checkpoint."""
    model = tiny.tiny_model("llama", layers=1)
    model.generation_config = GenerationConfig(**ENDS)
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    return model


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    model.save_pretrained(folder)
    found = json.loads((folder / "generation_config.json").read_text())
    assert {name: found.pop(name) for name in ENDS} == ENDS
    del found["transformers_version"]
    return dict(found)


@pytest.mark.parametrize(
    ("fields", "kept", "said"),
    [
        (
            {"temperature": 0.9, "top_p": 0.6},
            {"do_sample": True},
            "do_sample=True, because of temperature=0.9, top_p=0.6",
        ),
        ({"top_k": 7, "max_length": 99}, {"do_sample": True}, "do_sample=True, because of top_k=7"),
        ({"typical_p": 0.5, "num_beams": 2}, {"do_sample": True}, "because of typical_p=0.5"),
        ({"temperature": 0.0}, {"temperature": None}, "without temperature=0.0"),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.95}, {"temperature": None, "top_p": None}, "without temp"),
        ({"length_penalty": 2.0, "repetition_penalty": 1.2}, {"length_penalty": None}, "without length_penalty=2.0"),
        (
            {"min_p": 0.1, "output_scores": True},
            {"do_sample": True, "output_scores": None},
            "do_sample=True, because of min_p=0.1; without output_scores=True",
        ),
        ({"num_return_sequences": 4}, {"do_sample": True}, "because of num_return_sequences=4"),
    ],
)
def test_a_config_that_contradicts_itself_is_mended(
    fields: dict[str, Any], kept: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As much of it stays as can be saved; without the mending, transformers refuses to."""
    with pytest.raises(ValueError, match=r"generation|Greedy|GenerationConfig"):
        brought(**fields).save_pretrained(tmp_path / "plain")
    model = brought(**fields)
    mend_generation_config(model, "student")
    wanted = {name: value for name, value in {**fields, **kept}.items() if value is not None}
    assert saved(model, tmp_path / "mended") == wanted
    assert said in caplog.text
    assert "the student's generation config could not be saved" in caplog.text
    caplog.clear()
    mend_generation_config(model, "student")
    again = load_model(str(tmp_path / "mended"))
    mend_generation_config(again, "student")
    assert saved(again, tmp_path / "again") == wanted
    assert not caplog.records


def test_a_sound_config_stays_the_object_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = brought(do_sample=True, temperature=0.7, repetition_penalty=1.1)
    config = model.generation_config
    mend_generation_config(model, "student")
    assert model.generation_config is config
    mend_generation_config(torch.nn.Linear(1, 1), "student")
    assert not caplog.records


def test_what_stands_in_the_models_own_config_is_moved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = brought()
    model.config.repetition_penalty = 1.3
    with pytest.raises(ValueError, match="generation parameters"):
        model.save_pretrained(tmp_path)
    mend_generation_config(model, "student")
    assert saved(model, tmp_path) == {"repetition_penalty": 1.3}
    assert "repetition_penalty moved" in caplog.text


# A trial


def test_a_trial_leaves_nothing_behind(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = brought(temperature=0.5)
    config = model.config.to_dict()
    try_saving(model, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())
    assert model.config.to_dict() == config
    assert model.generation_config.do_sample is None


def test_what_cannot_be_written_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be saved in .*missing' after training: the model: .*No such file"):
        try_saving(brought(), tokenizer, tmp_path / "missing")
    model = brought()
    model.config.extra = object()
    with pytest.raises(UserError, match="the student could not be saved after training: its config: "):
        try_saving(model, tokenizer)
    odd = tiny.tiny_tokenizer()
    odd.init_kwargs["extra"] = object()
    with pytest.raises(UserError, match="after training: the tokenizer: "):
        try_saving(brought(), odd)
    model = brought()
    model.hf_quantizer = type("Q", (), {"is_serializable": lambda self: False, "quantization_config": object()})()
    with pytest.raises(UserError, match="after training: the model: "):
        try_saving(model, tokenizer)


def test_a_student_without_weights_stands_for_the_one_on_disk(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    brought().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": 5}')
    (tmp_path / "model.safetensors").unlink()
    model: Any = model_without_weights(str(tmp_path))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.9, 5)
    try_saving(model, tokenizer)
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        model_without_weights(str(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    assert model_without_weights(str(tmp_path)) is None


def test_a_full_disk_is_no_fault_of_the_student(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left") as caught:
        try_saving(brought(), tokenizer)
    assert not isinstance(caught.value, UserError)


# Merging


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_adapters_that_merge_pass(device: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny.tiny_model("llama").to(device)
    model = with_adapters(
        plain, peft.LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    )
    before = {name: (x.device, x._version) for name, x in model.state_dict().items()}
    try_merging(model)
    assert {name: (x.device, x._version) for name, x in model.state_dict().items()} == before
    assert not any(getattr(m, "merged", False) for m in model.modules())


def test_adapters_that_cannot_be_merged_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"adapters \(LlamaForCausalLM\) cannot be merged"):
        try_merging(tiny.tiny_model("llama"))
    prefix = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="cannot be merged into its weights, which saving it needs; use LoRA"):
        try_merging(peft.get_peft_model(tiny.tiny_model("llama"), prefix))

    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("not for this kind")

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", refuse)
    model = with_adapters(tiny.tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"q_proj cannot be merged into its weights: not for this kind"):
        try_merging(model)


# The hub


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ConnectionError("no route to host"), r"push_to_hub is set, but .* \(no route to host\): log in with"),
        ({"name": "me", "auth": {"accessToken": {"role": "read"}}}, "your token of the model hub lets you only read"),
        ({"name": "me", "auth": {"accessToken": {"role": "write"}}}, None),
        ({"name": "me"}, None),
    ],
)
def test_the_hub_is_asked_before_anything_is_pushed(
    answer: Any, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            tokens.append(token)

        def whoami(self) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(saving, "HfApi", Hub)
    if said is None:
        try_hub("mine")
    else:
        with pytest.raises(UserError, match=said):
            try_hub("mine")
    assert tokens == ["mine"]
