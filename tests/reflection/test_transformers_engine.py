"""How `transformers` generates here: whose rows go on, and how tokens are drawn."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tiny import EOS, tiny_model, tiny_tokenizer

from srd_fast import UserError
from srd_fast.reflection import Sampling, TransformersEngine
from srd_fast.reflection.transformers_engine import _Draw

PROMPTS = [[3 + (11 * i + 3 * k) % 290 for k in range(1 + i % 7)] for i in range(80)]


def engine(batch_size: int = 80, **model: Any) -> TransformersEngine:
    return TransformersEngine(tiny_model("llama", width=32, **model), tiny_tokenizer(), batch_size)


def drawn(logits: Sequence[float], rows: int) -> torch.Tensor:
    """[V] how often each token was drawn."""
    scores, counts = torch.tensor([list(logits)]), torch.zeros(len(logits), dtype=torch.long)
    torch.manual_seed(0)
    for some in torch.arange(rows).split(1000):
        left = _Draw()(torch.zeros(len(some), 1, dtype=torch.long), scores.expand(len(some), -1))
        assert int((left == 0).sum()) == int((~left.isneginf()).sum()) == len(some)
        counts += torch.bincount(left.argmax(1), minlength=len(counts))
    return counts


# Drawing.


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    rows, probabilities = 50_000, torch.tensor([0.4, 0.0, 0.3, 0.2, 0.0999, 0.0001, 0.0])
    counts = drawn(probabilities.log().tolist(), rows)
    spread = (rows * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - rows * probabilities).abs() <= 5 * spread).all()
    assert counts[[1, 6]].tolist() == [0, 0]


def test_many_small_probabilities_are_not_lost_behind_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 1 << 16
    scores = torch.tensor([[0.0, *[math.log(1e-7)] * count]])  # of all, the small ones have 0.65 %
    large, small = scores.double().softmax(-1)[0, :2].tolist()
    for number in (0.9, 0.994, 0.996, 0.9999):
        monkeypatch.setattr(torch, "rand_like", partial(torch.full_like, fill_value=number))
        token = int(_Draw()(torch.zeros(1, 1, dtype=torch.long), scores).argmax())
        assert token == pytest.approx(max(0.0, 1 + (number - large) / small), abs=count / 1000)


def test_logits_that_are_not_finite_are_told() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    sampling = Sampling(max_new_tokens=2, temperature=1.0)
    with pytest.raises(UserError, match="the student's logits are not finite"):
        list(TransformersEngine(model, tiny_tokenizer()).generate(PROMPTS[:2], sampling))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_draws_without_a_choice_are_greedy_answers(options: dict[str, Any]) -> None:
    own = engine()
    greedy = dict(own.generate(PROMPTS, Sampling(max_new_tokens=6)))
    assert dict(own.generate(PROMPTS, Sampling(max_new_tokens=6, **{"temperature": 1.0, **options}))) == greedy
    assert len({tuple(x) for x in greedy.values()}) > 20


def test_filters_leave_out_tokens() -> None:
    own, prompt = engine(), [5, 6, 7]
    likeliest = own.model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
    some: dict[str, set[int]] = {}
    for name, options in {"all": {}, "top_k": {"top_k": 5}}.items():
        sampling = Sampling(max_new_tokens=1, temperature=3.0, stop_ids=(), **options)
        some[name] = {x for _, ids in own.generate([prompt] * 400, sampling) for x in ids}
    assert len(some["all"]) > 5
    assert some["top_k"] <= {*likeliest[:5]}


def test_a_temperature_is_that_of_the_draw() -> None:
    own, prompt, temperature = engine(400), [5, 6, 7], 0.5
    expected = (own.model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    seeds = [Sampling(max_new_tokens=1, temperature=temperature, seed=s) for s in range(25)]
    tokens = torch.tensor([(ids or [0])[0] for s in seeds for _, ids in own.generate([prompt] * 400, s)])
    counts = torch.bincount(tokens, minlength=len(expected))
    spread = (len(tokens) * expected * (1 - expected)).sqrt().clamp(min=1)
    assert ((counts - len(tokens) * expected).abs() <= 6 * spread).all()


# Whose rows go on.


def test_sampled_rows_that_go_on_are_drawn_from_their_own_logits() -> None:
    """Of each row that went on in a smaller batch: the likeliest token at a low temperature, as it would be alone."""
    own, cold = engine(), {"temperature": 1e-4, "stop_ids": tuple(range(1, 300, 4))}
    together = dict(own.generate(PROMPTS, Sampling(max_new_tokens=20, **cold)))
    alone = {i: dict(own.generate([p], Sampling(max_new_tokens=20, **cold)))[0] for i, p in enumerate(PROMPTS)}
    assert together == alone
    assert len({len(x) for x in alone.values()}) > 5


@pytest.mark.parametrize("option", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
def test_rows_that_go_on_remember_what_they_wrote(option: dict[str, Any]) -> None:
    own, stop = engine(), tuple(range(1, 300, 6))
    sampling = Sampling(max_new_tokens=24, stop_ids=stop, **option)
    together = dict(own.generate(PROMPTS, sampling))
    alone = {i: dict(own.generate([p], sampling))[0] for i, p in enumerate(PROMPTS)}
    assert together == alone
    assert together != dict(own.generate(PROMPTS, Sampling(max_new_tokens=24, stop_ids=stop)))


def test_no_answer_is_longer_than_wanted() -> None:
    found = dict(engine().generate(PROMPTS, Sampling(max_new_tokens=9, stop_ids=(5, 9))))
    assert sorted(found) == list(range(80))
    assert max(map(len, found.values())) == 9


def test_without_a_token_that_ends_answers_all_are_whole() -> None:
    own = engine()
    own.ends = set()
    assert {len(x) for _, x in own.generate(PROMPTS, Sampling(max_new_tokens=5))} == {5}


def test_the_tokenizers_end_ends_answers() -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_tokens_to_ids(EOS)
    own = TransformersEngine(tiny_model("llama"), tokenizer, 80)
    assert all(end not in x for _, x in own.generate(PROMPTS, Sampling(max_new_tokens=12, temperature=1.0)))
