"""`Sampling` alone says how a student answers, whatever generation config its checkpoint brings along."""

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import WatermarkingConfig

from srd_fast.reflection import Sampling, TransformersEngine

PROMPTS = [[5, 17, 60, 33, 8], [9, 9, 41], [100, 7, 7, 250, 12, 3, 77]]
GREEDY = Sampling(max_new_tokens=10)

# A value of each field that a checkpoint may bring along. Beside it, greedy answers are the same.
BROUGHT: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 3,
    "bad_words_ids": "an answer's first token",
    "begin_suppress_tokens": "an answer's first token",
    "bos_token_id": 5,
    "cache_config": {"nbits": 4},
    "cache_implementation": "static",
    "compile_config": {"fullgraph": True},
    "constraints": ["none"],
    "continuous_batching_config": {"page_size": 8},
    "decoder_start_token_id": 3,
    "disable_compile": True,
    "diversity_penalty": 2.0,
    "do_sample": True,
    "dola_layers": "high",
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "exponential_decay_length_penalty": (1, 4.0),
    "force_words_ids": [[4]],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "guidance_scale": 2.0,
    "is_assistant": True,
    "length_penalty": -3.0,
    "low_memory": True,
    "max_cache_len": 4,
    "max_length": 4,
    "max_matching_ngram_size": 1,
    "max_new_tokens": 2,
    "max_time": 1e-6,
    "min_length": 100,
    "min_new_tokens": 100,
    "min_p": 0.9,
    "no_repeat_ngram_size": 1,
    "num_assistant_tokens": 2,
    "num_assistant_tokens_schedule": "heuristic",
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 9,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 3.0,
    "return_dict_in_generate": True,
    "sequence_bias": "against an answer's first token",
    "speculation_type": "none",
    "stop_strings": ["a", "e", " "],
    "suppress_tokens": "an answer's first token",
    "target_lookbehind": 2,
    "temperature": 5.0,
    "token_healing": True,
    "top_h": 0.3,
    "top_k": 1,
    "top_p": 0.1,
    "typical_p": 0.2,
    "use_cache": False,
    "use_mtp": True,
    "watermarking_config": WatermarkingConfig(bias=20.0),
}
NOT_OF_GENERATION = {"transformers_version", "eos_token_id"}  # the second says where answers end


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture
def student() -> PreTrainedModel:
    model = tiny.tiny_model("llama", layers=1)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return model


def answers(
    student: Any, tokenizer: PreTrainedTokenizerFast, sampling: Sampling = GREEDY, **brought: Any
) -> dict[int, list[int]]:
    own = student.generation_config
    student.generation_config = copy.deepcopy(own)
    for name, value in brought.items():
        setattr(student.generation_config, name, value)
    before = student.generation_config
    found = dict(TransformersEngine(student, tokenizer).generate(PROMPTS, sampling))
    assert student.generation_config is before
    assert all(getattr(before, name) == value for name, value in brought.items())
    student.generation_config = own
    return found


def test_every_field_of_transformers_is_known_here() -> None:
    """A field that a new version adds must be looked at: it may change answers."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - NOT_OF_GENERATION
    assert fields <= set(BROUGHT)


def test_no_field_changes_greedy_answers(student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(max_new_tokens=4)
    plain = answers(student, tokenizer, sampling)
    assert len({tuple(a) for a in plain.values()}) == 3
    firsts = sorted({a[0] for a in plain.values()})
    resolved = {
        "bad_words_ids": [[i] for i in firsts],
        "begin_suppress_tokens": firsts,
        "suppress_tokens": firsts,
        "sequence_bias": [[[i], -50.0] for i in firsts],
    }
    for name, value in {**BROUGHT, **resolved}.items():
        assert answers(student, tokenizer, sampling, **{name: value}) == plain, name
    together = ("repetition_penalty", "num_beams", "stop_strings", "min_new_tokens", "return_dict_in_generate")
    assert answers(student, tokenizer, sampling, **{name: BROUGHT[name] for name in together}) == plain


@pytest.mark.parametrize(
    "brought",
    [{"typical_p": 0.2}, {"eta_cutoff": 0.5}, {"top_k": 1}, {"top_p": 0.01, "temperature": 9.0}, {"min_p": 1}],
)
def test_drawn_answers_are_those_of_the_sampling(
    brought: dict[str, Any], student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=1.0, seed=3)
    plain = answers(student, tokenizer, sampling)
    assert plain != answers(student, tokenizer)
    assert answers(student, tokenizer, sampling, **brought) == plain


def test_what_the_sampling_asks_for_is_done_whatever_is_shipped(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    asked = Sampling(max_new_tokens=20, no_repeat_ngram_size=1, repetition_penalty=1.3)
    found = answers(student, tokenizer, asked, no_repeat_ngram_size=0, repetition_penalty=1.0)
    assert found == answers(student, tokenizer, asked, no_repeat_ngram_size=4)
    assert found != answers(student, tokenizer, Sampling(max_new_tokens=20))
    assert all(len(set(a)) == len(a) for a in found.values())


def test_answers_end_where_the_checkpoint_says(student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = answers(student, tokenizer)
    stop = plain[0][4]
    for ends in (stop, [0, stop]):
        found = answers(student, tokenizer, eos_token_id=ends)
        assert found[0] == plain[0][: plain[0].index(stop)]


def test_a_student_with_adapters_brings_nothing_along_either(tokenizer: PreTrainedTokenizerFast) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapters = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    student = peft.get_peft_model(tiny.tiny_model("llama"), adapters)
    inner = student.get_base_model()
    plain = answers(inner, tokenizer)
    inner.generation_config.repetition_penalty = 3.0
    assert dict(TransformersEngine(student, tokenizer).generate(PROMPTS, GREEDY)) == plain
    assert inner.generation_config.repetition_penalty == 3.0
