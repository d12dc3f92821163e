"""A beginning that all samples share is run once, and nothing changes but the time."""

import random
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.models import common_prefix, share_prefix, shared_starts
from srd_fast.models.heads import hidden_states
from srd_fast.reflection import Reflected, signals
from srd_fast.reflection.signals import common_start, cross_entropy

BEGINNING = [7, 3, 9, 4, 250, 11, 12, 8, 101, 5]


def whole_samples(count: int = 5) -> dict[str, torch.Tensor]:
    draw = random.Random(0)
    rows = [[*BEGINNING, *(draw.randrange(1, 300) for _ in range(draw.randint(2, 20)))] for _ in range(count)]
    return tiny.collate([{"input_ids": r, "labels": r} for r in rows])


def test_the_common_prefix_of_rows() -> None:
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == [1, 2]
    assert common_prefix([[1], [2, 1]]) == []
    assert common_prefix([[5, 6]]) == [5, 6]
    assert common_prefix([]) == common_prefix([[], [1]]) == []


def test_rows_are_grouped_by_what_spares_most() -> None:
    def rows(start: list[int], count: int) -> list[list[int]]:
        return [[*start, 1000 + i, 7] for i in range(count)]

    one, other = [*BEGINNING, 21, 22, 23], [*BEGINNING, 31, 32]
    mixed = [row for pair in zip(rows(one, 20), rows(other, 20)) for row in pair] + rows([50], 3)
    assert shared_starts(mixed) == [(one, list(range(0, 40, 2))), (other, list(range(1, 40, 2))), ([], [40, 41, 42])]
    # Apart, the few would have no beginning at all.
    assert shared_starts(rows(one, 20) + rows(other, 8)) == [(BEGINNING, list(range(28))), ([], [])]
    assert shared_starts(rows(one, 15)) == [([], list(range(15)))]
    assert shared_starts(rows(one[:7], 20)) == [([], list(range(20)))]
    nested = [list(range(n)) for n in range(2000)]
    assert sorted(i for _, members in shared_starts(nested) for i in members) == list(range(2000))


# gemma2's window is shorter than the beginning.
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_states_behind_a_shared_beginning_are_those_of_whole_samples(architecture: str) -> None:
    model, batch = tiny.tiny_model(architecture), whole_samples()
    shared = share_prefix(model, BEGINNING, batch)
    assert shared is not None
    n = len(BEGINNING)
    rest = {k: v[:, n:] for k, v in batch.items()}
    there = rest["attention_mask"].bool()
    for _ in range(2):  # the kept cache does not change
        tiny.assert_same(shared.hidden_states(rest)[there], hidden_states(model, batch)[:, n:][there], 1e-5)
    fewer = {k: v[1:3] for k, v in rest.items()}
    tiny.assert_same(shared.hidden_states(fewer)[there[1:3]], hidden_states(model, batch)[1:3, n:][there[1:3]], 1e-5)


def test_a_beginning_that_is_not_shared_shows() -> None:
    model, batch = tiny.tiny_model("llama"), whole_samples()
    assert share_prefix(model, [*BEGINNING[:-1], BEGINNING[-1] + 1], batch) is None
    assert share_prefix(model, BEGINNING[:7], batch) is None  # too short to pay


def test_a_model_without_a_cache_runs_whole_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny_model("llama")
    forward = model.base_model.forward

    def without(*args: Any, **options: Any) -> Any:
        if options.get("use_cache"):
            raise TypeError("this model keeps nothing")
        return forward(*args, **options)

    monkeypatch.setattr(model.base_model, "forward", without)
    assert share_prefix(model, BEGINNING, whole_samples()) is None


@pytest.mark.parametrize("score_eos", [True, False])
def test_cross_entropy_is_the_same_with_and_without(
    score_eos: bool,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [dict(row) for row in make_quickstart_rows(24, seed=6)]
    samples = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    start = common_start(samples)
    assert len(start) > 20
    reflected = Reflected(samples, [], tiny_model, tiny_tokenizer, 4, score_eos=score_eos, progress=False)
    made: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(signals, "share_prefix", lambda *a: made.append(share_prefix(*a)) or made[-1])
        found = cross_entropy(reflected)
        patched.setattr(signals, "share_prefix", lambda *a: None)
        expected = cross_entropy(reflected)
    assert made[0].length == len(start)
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_a_prompt_that_is_all_beginning_keeps_the_state_that_predicts_its_first_label(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"prompt": "Name a colour that begins like this one:", "completion": c} for c in ("red", "blue", "green", "x")
    ]
    samples = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    prompt = sum(y == -100 for y in samples[0]["labels"])
    assert len(common_start(samples)) == prompt - 1
    few = Reflected(samples, [], tiny_model, tiny_tokenizer, 1, progress=False)
    alone = [cross_entropy(Reflected(samples.select([i]), [], tiny_model, tiny_tokenizer, 1, progress=False))[0]
             for i in range(4)]  # fmt: skip
    assert cross_entropy(few) == pytest.approx(alone, rel=1e-5)
