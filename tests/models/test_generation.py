"""Answers of a batch whose rows leave when they have ended are those of a batch whose rows stay."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from architectures import NAMES, VOCAB, make_architecture
from packaging import version

from srd_fast.reflection import Sampling, TransformersEngine, transformers_engine

TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
PROMPTS = [[3 + (7 * i + 5 * k * k) % (VOCAB - 10) for k in range(2 + i % 5)] for i in range(24)]
# Models whose rows stay: their caches, or what else they keep, cannot be divided. Before transformers 5.24 some could.
WHOLE = {
    *("bamba", "bloom", "falcon_h1", "falcon_mamba", "gemma3", "gemma3n_text", "gemma4", "gemma4_text"),
    *("granitemoehybrid", "jamba", "lfm2", "llava", "mamba", "mamba2", "minimax", "mistral3"),
    *("nemotron_h", "olmo_hybrid", "phi3", "phi3_longrope", "phi4_multimodal", "phimoe", "qwen2_5_vl", "qwen2_vl"),
    *("qwen3_5_text", "qwen3_next", "qwen3_vl", "recurrent_gemma", "rwkv", "xlnet", "zamba2"),
}


@contextmanager
def rows_of_steps(model: Any) -> Iterator[list[int]]:
    """How many rows each call of the model has."""
    seen: list[int] = []

    def look(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", given[0] if given else None)
        seen.append(len(ids))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# The test of kimi_linear, whose rows stay, would take 40 s.
@pytest.mark.parametrize("name", [x for x in NAMES if x != "kimi_linear"])
def test_rows_that_have_ended_leave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "_FEW_ROWS", 2)
    model = make_architecture(name)
    engine = TransformersEngine(model, TOKENIZER, batch_size=24)
    # A third of all tokens ends an answer, so that answers have many lengths.
    sampling = Sampling(max_new_tokens=8, stop_ids=tuple(range(1, VOCAB, 3)))
    with rows_of_steps(model) as steps:
        found = dict(engine.generate(PROMPTS, sampling))
    with monkeypatch.context() as whole, rows_of_steps(model) as all_steps:
        whole.setattr(transformers_engine, "_empty_cache", lambda _: None)
        expected = dict(engine.generate(PROMPTS, sampling))
    assert found == expected
    assert set(all_steps) == {24}
    assert min(steps) < 24 or name in WHOLE
    if version.parse(transformers.__version__) >= version.parse("5.24"):
        assert min(steps) == 24 or name not in WHOLE


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_on_a_gpu_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_engine, "_FEW_ROWS", 2)
    engine = TransformersEngine(make_architecture(name).cuda(), TOKENIZER, batch_size=24)
    stop = tuple(range(1, VOCAB, 3))
    # At so low a temperature a draw has no choice.
    cold, greedy = (dict(engine.generate(PROMPTS, Sampling(8, temperature=t, stop_ids=stop))) for t in (1e-4, 0.0))
    monkeypatch.setattr(transformers_engine, "_empty_cache", lambda _: None)
    assert cold == greedy == dict(engine.generate(PROMPTS, Sampling(8, stop_ids=stop)))


def test_in_bfloat16_tokens_are_the_likeliest_of_their_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers differ where two logits are nearly equal, so each token is judged by float32's logits."""
    monkeypatch.setattr(transformers_engine, "_FEW_ROWS", 2)
    model = make_architecture("llama")
    exact = copy.deepcopy(model)
    engine = TransformersEngine(model.to(torch.bfloat16), TOKENIZER, batch_size=24)
    with rows_of_steps(model) as steps:
        found = dict(engine.generate(PROMPTS, Sampling(max_new_tokens=8, stop_ids=tuple(range(1, VOCAB, 3)))))
    assert min(steps) < 24
    behind: list[float] = []
    for row, prompt in enumerate(PROMPTS):
        if not found[row]:
            continue
        ids = torch.tensor([*prompt, *found[row]])
        logits_LV = exact(ids[None]).logits[0, len(prompt) - 1 : -1]
        chosen_L = logits_LV.gather(1, ids[len(prompt) :, None])[:, 0]
        behind += ((logits_LV.amax(1) - chosen_L) / logits_LV.std(1)).tolist()
    # Rounding moves a logit by some hundredths of a row's deviation; a token of another row is whole ones behind.
    assert len(behind) > 30
    assert max(behind) < 0.5
