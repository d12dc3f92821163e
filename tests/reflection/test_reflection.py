"""Reflections: the right prompts go in, every answer comes out once, and the scores are what the definitions say."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, reflect, register_difficulty, register_engine
from srd_fast.data import Tokenisation, first_label, prepare_dataset
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.reflection import Reflected, TransformersEngine, difficulty_names, engine_names
from srd_fast.reflection.signals import cross_entropy

ROWS: list[dict[str, Any]] = [dict(row) for row in make_quickstart_rows(11, seed=2)]


pytestmark = pytest.mark.usefixtures("own_registries")


@pytest.fixture
def samples(tiny_tokenizer: PreTrainedTokenizerFast) -> Dataset:
    return prepare_dataset(ROWS, Tokenisation(tiny_tokenizer)).dataset


class Scripted:
    """An engine that answers by a function of the prompt's ids, in a mixed order; remembers the prompts it got."""

    def __init__(self, answer: Callable[[list[int]], list[int]], in_order: bool = False) -> None:
        self.answer, self.in_order = answer, in_order
        self.prompts: list[list[int]] = []

    def __call__(self, student: Any, tokenizer: Any, **options: Any) -> "Scripted":
        return self

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        for i in sorted(range(len(prompts)), key=lambda i: i if self.in_order else i * 4 % 11):
            self.prompts.append(list(prompts[i]))
            yield i, self.answer(list(prompts[i]))


def end_of_prompt(ids: list[int]) -> list[int]:
    """An answer that tells the prompts apart: what stands before their common end, backwards."""
    return ids[-40:-14][::-1]


# Cross-entropy


def plain_cross_entropy(model: PreTrainedModel, sample: dict[str, Any], score_eos: bool) -> float:
    logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
    wanted = [(i, label) for i, label in enumerate(sample["labels"][1:]) if label != -100]
    if not score_eos:
        wanted = wanted[:-1]
    return -sum(torch.log_softmax(logits[i], -1)[label].item() for i, label in wanted) / len(wanted)


@pytest.mark.parametrize("score_eos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_cross_entropy_is_the_mean_over_the_response(
    score_eos: bool,
    batch_size: int,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    samples: Dataset,
) -> None:
    reflected = Reflected(samples, [], tiny_model, tiny_tokenizer, batch_size, score_eos=score_eos, progress=False)
    with torch.no_grad():
        expected = [plain_cross_entropy(tiny_model, sample, score_eos) for sample in samples]
    assert cross_entropy(reflected) == pytest.approx(expected, rel=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_cross_entropy_takes_gaps_in_the_labels(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 0], "labels": [-100, -100, 7, -100, 9, 0]},
        {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
    ]
    data = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    with torch.no_grad():
        expected = [plain_cross_entropy(tiny_model, sample, True) for sample in data]
    assert cross_entropy(Reflected(data, [], tiny_model, tiny_tokenizer, progress=False)) == pytest.approx(expected)


def test_without_eos_only_an_eos_is_left_out(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    data = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    with torch.no_grad():
        expected = [plain_cross_entropy(tiny_model, sample, True) for sample in data]
    reflected = Reflected(data, [], tiny_model, tiny_tokenizer, score_eos=False, progress=False)
    assert cross_entropy(reflected) == pytest.approx(expected)


# Generation


def prompts_of(samples: Dataset) -> list[list[int]]:
    return [s["input_ids"][: first_label(s["labels"])] for s in samples]


def plain_greedy(model: PreTrainedModel, prompt: list[int], new: int, eos: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
    generated = out[0, len(prompt) :].tolist()
    return generated[:-1] if generated and generated[-1] in eos else generated


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_greedy_batches_equal_generate_row_by_row(
    batch_size: int, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset
) -> None:
    prompts = prompts_of(samples)
    # A token that some answers hold serves as the model's second end-of-sequence id, so that lengths differ.
    free = [plain_greedy(tiny_model, p, 12, [0]) for p in prompts]
    stop = next(x for x in free[0][3:] if x)
    tiny_model.generation_config.eos_token_id = [0, stop]
    expected = [plain_greedy(tiny_model, p, 12, [0, stop]) for p in prompts]
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_size=batch_size)
    found = dict(engine.generate(prompts, Sampling(max_new_tokens=12)))
    assert [found[i] for i in range(len(prompts))] == expected
    assert len({len(e) for e in expected}) > 1
    assert len({tuple(e) for e in expected}) > 5
    assert all(stop not in e for e in expected)


def test_sampling_follows_its_seed_and_leaves_the_random_state(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset
) -> None:
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_size=3)
    before = torch.random.get_rng_state()
    runs = [
        sorted(engine.generate(prompts_of(samples), Sampling(max_new_tokens=6, temperature=1.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_ngram_comes_twice(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset
) -> None:
    engine = TransformersEngine(tiny_model, tiny_tokenizer)
    for _, ids in engine.generate(prompts_of(samples), Sampling(max_new_tokens=30, no_repeat_ngram_size=2)):
        pairs = list(pairwise(ids))
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}],
)
def test_sampling_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong)).split('_')[-1]} must be"):
        Sampling(**wrong)


def test_the_engine_is_asked_with_the_prompts_of_training(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset
) -> None:
    for template in ("alpaca", "chat"):
        engine = Scripted(lambda ids: [], in_order=True)
        register_engine("scripted", engine, replace=True)
        reflect(tiny_model, ROWS, tiny_tokenizer, engine="scripted", template=template, progress=False)
        data = prepare_dataset(ROWS, Tokenisation(tiny_tokenizer, template)).dataset
        longest_first = sorted(data, key=lambda s: (-first_label(s["labels"]), s["sample_id"]))
        assert engine.prompts == [tiny_tokenizer(s["prompt"]).input_ids for s in longest_first]
        assert engine.prompts == [s["input_ids"][: len(p)] for s, p in zip(longest_first, engine.prompts)]


# reflect


def test_columns_and_order(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**row, "sample_id": f"r{i}"} for i, row in enumerate(ROWS)]
    register_engine("scripted", Scripted(end_of_prompt))
    scores = reflect(tiny_model, rows, tiny_tokenizer, engine="scripted", progress=False)
    assert scores.column_names == ["sample_id", "generation", "rouge_l", "cross_entropy", "reason"]
    assert list(scores["sample_id"]) == [f"r{i}" for i in range(len(ROWS))]
    data = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    answers = [tiny_tokenizer.decode(end_of_prompt(p), skip_special_tokens=True).strip() for p in prompts_of(data)]
    assert list(scores["generation"]) == answers
    assert len(set(answers)) == len(ROWS)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(row["output"], answer)["rougeL"].fmeasure for row, answer in zip(ROWS, answers)]
    assert list(scores["rouge_l"]) == expected
    assert list(scores["reason"]) == [None] * len(ROWS)


def test_greedy_scores_do_not_depend_on_the_batch_size(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    options: dict[str, Any] = {"engine": "transformers", "sampling": Sampling(max_new_tokens=8), "progress": False}
    runs = [reflect(tiny_model, ROWS, tiny_tokenizer, batch_size=n, **options) for n in (1, 3, 32)]
    for run in runs[1:]:
        for column in ("sample_id", "generation", "rouge_l", "reason"):
            assert list(run[column]) == list(runs[0][column])
        assert list(run["cross_entropy"]) == pytest.approx(list(runs[0]["cross_entropy"]), rel=1e-5)


def test_a_folder_is_a_student(tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    options: dict[str, Any] = {"engine": "transformers", "sampling": Sampling(max_new_tokens=2), "progress": False}
    scores = reflect(str(tiny_teacher_folder), ROWS[:2], tiny_tokenizer, **options)
    assert len(scores) == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_student_keeps_its_mode(
    training: bool, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.train(training)
    next(tiny_model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in tiny_model.parameters()]
    options: dict[str, Any] = {"engine": "transformers", "sampling": Sampling(max_new_tokens=2), "progress": False}
    reflect(tiny_model, ROWS[:2], tiny_tokenizer, **options)
    assert tiny_model.training is training
    assert [p.requires_grad for p in tiny_model.parameters()] == flags


def test_an_empty_answer_scores_zero(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tiny_tokenizer.eos_token_id
    register_engine("silent", Scripted(lambda ids: [eos] if len(ids) % 2 else []))
    scores = reflect(tiny_model, ROWS, tiny_tokenizer, engine="silent", progress=False)
    assert list(scores["generation"]) == [""] * len(ROWS)
    assert list(scores["rouge_l"]) == [0.0] * len(ROWS)
    assert list(scores["reason"]) == [None] * len(ROWS)
    assert all(math.isfinite(c) for c in scores["cross_entropy"])


def test_an_empty_reference_is_unscored_and_says_so(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    outputs: list[Any] = ["", " \n", ["", " "], ["", "words"], "words"]
    rows = [{"instruction": f"i{n}", "output": output} for n, output in enumerate(outputs)]
    register_engine("scripted", Scripted(lambda ids: tiny_tokenizer("words").input_ids))
    scores = reflect(tiny_model, rows, tiny_tokenizer, engine="scripted", progress=False)
    assert list(scores["reason"]) == ["empty reference"] * 3 + [None] * 2
    for column in ("rouge_l", "cross_entropy"):
        assert [math.isnan(v) for v in scores[column]] == [True] * 3 + [False] * 2
    assert list(scores["rouge_l"])[3:] == [1, 1]
    assert "3 of 5 samples cannot be scored" in caplog.text


# Registries


def test_unknown_names_come_with_the_list(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"unknown engine 'transformer'; did you mean 'transformers'\? Known: .*"):
        reflect(tiny_model, ROWS, tiny_tokenizer, engine="transformer")
    with pytest.raises(UserError, match=r"signal 'rougel'; did you mean 'rouge_l'\? Known: .*cross_entropy, .*rouge_l"):
        reflect(tiny_model, ROWS, tiny_tokenizer, signals=["rougel"])


def test_names_are_taken_once() -> None:
    engine = Scripted(end_of_prompt)
    register_engine("mine", engine)
    assert "mine" in engine_names()
    with pytest.raises(UserError, match="engine 'mine' exists already; pass replace=True"):
        register_engine("mine", engine)
    register_engine("mine", engine, replace=True)

    def function(reflected: Reflected) -> list[float]:
        return [0.0] * len(reflected.generations)

    register_difficulty("mine", function, higher_is_easier=False)
    assert "mine" in difficulty_names()
    with pytest.raises(UserError, match="difficulty signal 'mine' exists already; pass replace=True"):
        register_difficulty("mine", function, higher_is_easier=True)
    register_difficulty("mine", function, higher_is_easier=True, replace=True)
    for name in ("sample_id", "generation", "reason"):
        with pytest.raises(UserError, match=f"'{name}': `reflect` has another column of that name"):
            register_difficulty(name, function, higher_is_easier=True)


def test_a_registered_signal_makes_a_column(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: list[Reflected] = []

    def words(reflected: Reflected) -> list[float]:
        seen.append(reflected)
        return [math.inf if i == 1 else len(g.split()) for i, g in enumerate(reflected.generations)]

    register_engine("scripted", Scripted(lambda ids: tiny_tokenizer("one two").input_ids))
    register_difficulty("words", words, higher_is_easier=False)
    signals = ("words", "rouge_l")
    scores = reflect(tiny_model, ROWS[:3], tiny_tokenizer, engine="scripted", signals=signals, progress=False)
    assert scores.column_names == ["sample_id", "generation", "words", "rouge_l", "reason"]
    assert list(scores["reason"]) == [None, "words is inf, not a finite number", None]
    assert [scores["words"][0], scores["words"][2]] == [2, 2]
    assert math.isnan(scores["words"][1])
    assert math.isnan(scores["rouge_l"][1])
    assert seen[0].student is tiny_model
    assert seen[0].dataset["sample_id"] == scores["sample_id"]


def test_a_signal_must_give_one_number_a_sample(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    register_engine("scripted", Scripted(end_of_prompt))
    register_difficulty("short", lambda reflected: [1.0], higher_is_easier=True)
    with pytest.raises(UserError, match="difficulty signal 'short' gave 1 values for 3 samples"):
        reflect(tiny_model, ROWS[:3], tiny_tokenizer, engine="scripted", signals=["short"], progress=False)


def test_an_engine_must_answer_every_prompt(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    class Lazy(Scripted):
        def generate(self, prompts: Any, sampling: Any) -> Iterator[tuple[int, list[int]]]:
            yield 1, [5]

    register_engine("lazy", Lazy(end_of_prompt))
    with pytest.raises(UserError, match="the engine gave nothing for 2 of 3 samples"):
        reflect(tiny_model, ROWS[:3], tiny_tokenizer, engine="lazy", progress=False)


def test_sampling_is_a_value() -> None:
    assert dataclasses.replace(Sampling(), seed=4) == Sampling(seed=4)
