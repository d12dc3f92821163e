"""The real vLLM engine takes new weights where it runs, on the CPU: the answers are those of transformers with them.

A process of its own, for vLLM's packages: see `test_vllm.py`.
"""

import os
import signal
from typing import Any

import psutil
import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.reflection import TransformersEngine
from srd_fast.reflection.vllm_engine import VLLMEngine
from srd_fast.workers.vllm import is_installed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_installed(), reason="vLLM is missing: see CONTRIBUTING, 'vLLM on a CPU'"),
]
GREEDY = Sampling(max_new_tokens=16)


def student(tokenizer: PreTrainedTokenizerFast, architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
    """Its heads are as wide as vLLM's kernels need."""
    return tiny.tiny_model(architecture, seed, width=64, vocab=len(tokenizer), max_position_embeddings=256)


def with_weights_of(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """The same model, trained a long way."""
    model.load_state_dict(other.state_dict())
    return model


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [list(tokenizer(row["instruction"]).input_ids) for row in make_quickstart_rows(8, seed=3)]


def answers(engine: Any, of: list[list[int]]) -> list[list[int]]:
    found = dict(engine.generate(of, GREEDY))
    return [found[i] for i in range(len(of))]


def opened(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> VLLMEngine:
    engine = VLLMEngine(model, tokenizer, kv_cache_memory_bytes=64 << 20, **options)
    engine.reserve(128, GREEDY)
    return engine


def children() -> list[psutil.Process]:
    return psutil.Process().children()


@pytest.mark.parametrize(("architecture", "processes"), [("llama", 1), ("llama_untied", 2)])
def test_answers_are_those_of_the_weights_taken_last(
    architecture: str, processes: int, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    model, given = student(tiny_tokenizer, architecture), prompts(tiny_tokenizer)
    engine = opened(model, tiny_tokenizer, data_parallel_size=processes)
    theirs = TransformersEngine(model, tiny_tokenizer)
    try:
        seen = [answers(engine, given)]
        assert seen[0] == answers(theirs, given)
        running = children()
        assert len(running) == processes
        for seed in (1, 2):
            engine.update_weights(with_weights_of(model, student(tiny_tokenizer, architecture, seed)))
            expected = answers(theirs, given)
            # One after the other, so that each process answers.
            seen += [answers(engine, given) for _ in range(processes)]
            assert all(found == expected for found in seen[-processes:])
        assert children() == running, "it was started anew"
        assert len({str(found) for found in seen}) == 3, "the weights make no difference"
        assert len(list(engine._folder.glob("weights-*"))) == 1
        if processes == 1:
            os.kill(running[0].pid, signal.SIGKILL)
            assert answers(engine, given) == expected
            assert caplog.text.count("died and is started again") == 1
    finally:
        engine.close()


def adapted(model: PreTrainedModel, **config: Any) -> Any:
    peft = pytest.importorskip("peft")
    given = {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **config}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **given)).eval()


def changed(model: Any, seed: int) -> None:
    """Train its adapter a long way."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_an_adapter_is_handed_over_as_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, given = adapted(student(tiny_tokenizer), use_rslora=True), prompts(tiny_tokenizer)
    engine = opened(model, tiny_tokenizer)
    theirs = TransformersEngine(model, tiny_tokenizer)
    try:
        seen = [answers(engine, given)]
        assert seen[0] == answers(theirs, given)
        running = children()
        for seed in (1, 2):
            changed(model, seed)
            engine.update_weights(model)
            seen.append(answers(engine, given))
            assert seen[-1] == answers(theirs, given)
        assert children() == running, "it was started anew"
        assert len({str(found) for found in seen}) == 3, "the adapters make no difference"
        files = {x.name for x in engine._folder.glob("weights-*/*.safetensors")}
        assert files == {"adapter_model.safetensors"}, "whole weights were written"
    finally:
        engine.close()


@pytest.mark.long
def test_an_adapter_that_vllm_does_not_take_is_merged(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a rank that it says it does not have."""
    model, given = adapted(student(tiny_tokenizer, "llama_untied"), r=16), prompts(tiny_tokenizer)
    engine = opened(model, tiny_tokenizer, max_lora_rank=8)
    theirs = TransformersEngine(model, tiny_tokenizer)
    try:
        assert answers(engine, given) == answers(theirs, given)
        assert "vLLM does not take the student's adapter as one, so it is merged" in caplog.text
        changed(model, 1)
        engine.update_weights(model)
        assert answers(engine, given) == answers(theirs, given)
    finally:
        engine.close()
