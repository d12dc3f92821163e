"""Encoder-decoder models taken apart: the decoder's states and the head give the model's own logits; depth pruning."""

import json
import math
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from encoder_decoders import NAMES, RELATIVES, own_logits, tiny_model, tiny_samples
from tiny import assert_same
from transformers import AutoModelForSeq2SeqLM

from srd_fast.data import DistillationCollator
from srd_fast.errors import UserError
from srd_fast.models import (
    check_head,
    check_same_kind,
    common_prefix,
    decoder_start,
    enable_flattening,
    find_head,
    hidden_states,
    is_encoder_decoder,
    load_config,
    load_model,
    prune_depth,
    share_prefix,
)
from srd_fast.models.loading import make_model
from srd_fast.teacher import labels_with_loss, rows_with_loss

SAMPLES = tiny_samples(7)


def logits_of(model: Any, samples: list[dict[str, Any]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where a sample has a label, as training has them, and the labels."""
    batch = DistillationCollator(pad, decoder_start=decoder_start(model))(samples)
    head = find_head(model)
    z = head.project(rows_with_loss(hidden_states(model, batch), batch))
    return (z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)), labels_with_loss(batch)


@pytest.mark.parametrize("name", [*NAMES, *RELATIVES])
@torch.no_grad()
def test_logits_of_the_responses_are_the_models_own(name: str) -> None:
    model = tiny_model(name).double()
    check_head(model, "student")
    expected, labels = own_logits(model, SAMPLES)
    found, found_labels = logits_of(model, SAMPLES)
    assert torch.equal(found_labels, labels)
    assert_same(found, expected, 1e-6 if name == "t5gemma" else 1e-9)  # whose norms are in float32


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_padding_and_its_id_change_nothing(name: str) -> None:
    model = tiny_model(name).double()
    alone = torch.cat([logits_of(model, [s])[0] for s in SAMPLES])
    for pad in (0, 7):
        assert_same(logits_of(model, SAMPLES, pad)[0], alone, 1e-12)


def test_a_token_without_loss_inside_a_response_is_read_as_it_is() -> None:
    model, sample = tiny_model("t5").double(), dict(tiny_samples(1, seed=3)[0])
    prompt, response = encoder_decoders.split(sample)
    assert len(response) > 3
    labels = list(sample["labels"])
    labels[len(prompt) + 1] = tiny.IGNORE
    with torch.no_grad():
        found, found_labels = logits_of(model, [{**sample, "labels": labels}])
        decoder_ids = torch.tensor([[0, *response[:-1]]])
        expected = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_ids).logits[0]
    assert found_labels.tolist() == [response[0], *response[2:]]
    assert_same(found, torch.cat((expected[:1], expected[2:])), 1e-12)


def test_the_factor_is_that_of_the_checkpoint() -> None:
    assert find_head(tiny_model("t5")).scale == pytest.approx(1 / math.sqrt(16))
    assert find_head(tiny_model("umt5")).scale == pytest.approx(1 / math.sqrt(16))
    for name in ("t5_untied", "mt5", "bart"):
        assert find_head(tiny_model(name)).scale == 1.0


def test_a_factor_that_is_not_known_is_found_out() -> None:
    model = tiny_model("t5")
    model.model_dim = 25
    with pytest.raises(UserError, match=r"student T5For.*differ.*best single factor between them: 0\.8\)"):
        check_head(model, "student")


def test_a_decoder_that_sees_its_labels_is_found_out() -> None:
    model: Any = tiny_model("t5")

    def mix(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    model.decoder.register_forward_hook(mix)
    with pytest.raises(UserError, match="student T5ForConditionalGeneration is not causal"):
        check_head(model, "student")


def test_a_mask_of_the_prompt_that_does_nothing_is_found_out() -> None:
    model: Any = tiny_model("bart")
    forward = model.forward
    model.forward = lambda **given: forward(**{**given, "attention_mask": torch.ones_like(given["attention_mask"])})
    with pytest.raises(UserError, match="differ from its own logits"):
        check_head(model, "student")


@pytest.mark.parametrize("name", ["t5", "bart"])
@torch.no_grad()
def test_the_models_file_says_which_kind_it_is(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    assert is_encoder_decoder(load_config(str(tmp_path)))
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert is_encoder_decoder(loaded)
    assert not is_encoder_decoder(tiny.tiny_model("llama"))
    assert_same(logits_of(loaded, SAMPLES)[0], logits_of(model, SAMPLES)[0], 1e-6)


def test_the_decoder_alone_is_a_causal_language_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(tiny_model("bart").config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert type(model).__name__ == "BartForCausalLM"
    assert not is_encoder_decoder(model)
    assert decoder_start(model) is None


def test_where_the_decoder_starts() -> None:
    assert decoder_start(tiny_model("t5")) == 0
    assert decoder_start(tiny_model("bart")) == 2
    assert decoder_start(tiny.tiny_model("llama")) is None
    model: Any = tiny_model("mbart")
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 9
    assert decoder_start(model) == 9
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(UserError, match="MBartForConditionalGeneration has no decoder_start_token_id; set it"):
        decoder_start(model)


def test_two_kinds_do_not_go_together() -> None:
    seq2seq, causal = tiny_model("t5"), tiny.tiny_model("llama")
    with pytest.raises(UserError, match="the student is a causal language model and the teacher an encoder-decoder"):
        check_same_kind(causal, seq2seq)
    with pytest.raises(UserError, match="the student is an encoder-decoder model and the teacher a causal"):
        check_same_kind(seq2seq.config, causal.config)
    check_same_kind(tiny_model("bart"), seq2seq)
    check_same_kind(causal, causal.config)


def test_batches_are_padded_and_no_beginning_is_shared() -> None:
    model = tiny_model("t5")
    before = model.config._attn_implementation
    assert enable_flattening(model) == "it has an encoder and a decoder"
    assert model.config._attn_implementation == before
    rows = [[*range(20, 40), i] for i in range(3)]
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.ones(3, 21, dtype=torch.long)}
    assert share_prefix(model, common_prefix(rows), batch) is None


# Pruning.


def own_outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the responses, and greedy answers with a cache of keys."""
    prompts = torch.tensor([encoder_decoders.split(s)[0][:2] for s in SAMPLES])
    with torch.no_grad():
        answers = model.generate(input_ids=prompts, max_new_tokens=5, do_sample=False, num_beams=1, eos_token_id=None)
        return own_logits(model, SAMPLES)[0], answers


@pytest.mark.parametrize(
    ("name", "layers", "encoder_layers", "kept"),
    [
        *[(name, [1, 2], [1, 3], ([1, 3], [1, 2])) for name in NAMES],
        *[
            pytest.param(name, [1, 2], [1, 3], ([1, 3], [1, 2]), marks=() if name == "t5gemma" else pytest.mark.slow)
            for name in RELATIVES
        ],
        *[(name, 2, None, ([0, 3], [0, 2])) for name in ("t5", "bart")],
        *[(name, 1, 2, ([0, 3], [2])) for name in ("t5_untied", "mbart")],
    ],
)
def test_a_pruned_model_saves_reloads_and_generates(
    name: str, layers: Any, encoder_layers: Any, kept: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    model: Any = tiny_model(name, layers=(4, 3))
    whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    stacks = [next(m for m in s.children() if isinstance(m, torch.nn.ModuleList)) for s in _stacks(model)]
    layers_of = [list(stack) for stack in stacks]
    assert prune_depth(model, layers, encoder_layers) == kept[1]
    for stack, before, indices in zip(_stacks(model), layers_of, kept):
        (now,) = [m for m in stack.children() if isinstance(m, torch.nn.ModuleList)]
        assert list(now) == [before[i] for i in indices]
    for parameter in model.parameters():
        assert any(torch.equal(parameter, p) for p in whole.values() if p.shape == parameter.shape)

    model.save_pretrained(tmp_path)
    again, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for found, expected in zip(own_outputs(again.eval()), own_outputs(model)):
        assert_same(found.float(), expected.float(), 1e-5)
    check_head(again, "student")


def _stacks(model: Any) -> tuple[Any, Any]:
    return model.get_encoder(), model.get_decoder()


def test_t5_keeps_the_biases_of_its_positions() -> None:
    model: Any = tiny_model("t5", layers=(3, 3))
    biases = [s.block[0].layer[0].SelfAttention.relative_attention_bias for s in _stacks(model)]
    prune_depth(model, [1, 2])
    for stack, bias in zip(_stacks(model), biases):
        assert stack.block[0].layer[0].SelfAttention.relative_attention_bias is bias
        assert not stack.block[1].layer[0].SelfAttention.has_relative_attention_bias


def test_a_decoder_too_deep_for_transformers_is_refused() -> None:
    model: Any = tiny_model("t5", layers=(3, 3))
    with pytest.raises(UserError, match=r"encoder_layers leaves 1 layers and layers 2.*keep at least 2 layers"):
        prune_depth(model, 2, 1)
    assert [len(stack.block) for stack in _stacks(model)] == [3, 3]
    with pytest.raises(IndexError):  # else the refusal can go
        tiny_model("t5", layers=(1, 2)).generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2)
    bart: Any = tiny_model("bart", layers=(3, 3))
    prune_depth(bart, 2, 1)
    assert bart.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[0] == 1


def test_all_layers_is_the_same_model() -> None:
    model = tiny_model("t5", layers=(3, 3))
    before, answers = own_outputs(model)
    prune_depth(model, 3)
    assert torch.equal(own_outputs(model)[0], before)
    assert torch.equal(own_outputs(model)[1], answers)


def test_windows_in_the_config_follow_the_layers(tmp_path: Path) -> None:
    model: Any = tiny_model("led", layers=(4, 4), attention_window=[2, 4, 6, 8])
    prune_depth(model, 2, [1, 3])
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["attention_window"], saved["encoder_layers"], saved["decoder_layers"]) == ([4, 8], 2, 2)


@pytest.mark.parametrize(
    ("layers", "encoder_layers", "words"),
    [
        (4, None, "from 1 to the teacher's decoder's 3, got 4"),
        (2, 6, "from 1 to the teacher's encoder's 5, got 6"),
        ([0, 4], None, r"indices from 0 to 2 of the teacher's decoder's 3, got \[0, 4\]"),
        (0, 2, "from 1 to the teacher's decoder's 3, got 0"),
    ],
)
def test_layers_that_there_are_not_are_refused(layers: Any, encoder_layers: Any, words: str) -> None:
    model: Any = tiny_model("bart", layers=(5, 3))
    with pytest.raises(UserError, match=f"layers must be.*{words}"):
        prune_depth(model, layers, encoder_layers)
    assert (len(model.model.encoder.layers), len(model.model.decoder.layers)) == (5, 3)


def test_a_causal_model_has_no_encoder_to_cut() -> None:
    with pytest.raises(UserError, match="encoder_layers is 2, but LlamaForCausalLM has no encoder"):
        prune_depth(tiny.tiny_model("llama", layers=3), 2, 2)


def test_layers_whose_kind_follows_from_their_place_are_refused() -> None:
    from transformers import SwitchTransformersConfig

    sizes = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_experts": 2}
    config = SwitchTransformersConfig(**sizes, num_layers=6, num_decoder_layers=6, num_sparse_encoder_layers=3)
    model = make_model(config, torch.float32)
    with pytest.raises(UserError, match=r"cannot prune Switch.*follows from their places.*coder\.block"):
        prune_depth(model, [0, 2, 4])
    assert [len(stack.block) for stack in _stacks(model)] == [6, 6]
    assert (model.config.num_layers, model.config.num_decoder_layers) == (6, 6)
