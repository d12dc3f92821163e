"""Reflections: the right prompts go in, every answer comes out once, and the scores are what the definitions say."""

import dataclasses
import json
import math
import random
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
from srd_fast.errors import UserError
from srd_fast.quickstart_data import make_quickstart_rows
from srd_fast.reflection import Reflected, RougeL, TransformersEngine, difficulty_names, engine_names
from srd_fast.reflection import engines as engines_module
from srd_fast.reflection import signals as signals_module
from srd_fast.reflection.signals import cross_entropy

ROWS: list[dict[str, Any]] = [dict(row) for row in make_quickstart_rows(11, seed=2)]


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines_module, "_ENGINES", dict(engines_module._ENGINES))
    monkeypatch.setattr(signals_module, "_REGISTRY", dict(signals_module._REGISTRY))


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


# ROUGE-L


def real_texts(folder: Path | None) -> list[tuple[str, list[str]]]:
    """(text, references) of real rows where there are any, else of the quickstart rows."""
    if folder is None:
        rows: list[dict[str, Any]] = [dict(row) for row in make_quickstart_rows(1000, seed=9)]
    else:
        names = ("sinst_3-6_valid.jsonl", "llms_from_scratch_train.jsonl")
        rows = [json.loads(line) for name in names for line in (folder / name).read_text("utf-8").splitlines()]
    return [(" ".join(r["output"].split()[:60]), r.get("references") or [r["output"]]) for r in rows]


def perturbed(text: str, draw: random.Random) -> str:
    words = text.split()
    kept = [w.upper() if draw.random() < 0.2 else w for w in words if draw.random() < 0.7]
    if draw.random() < 0.3:
        draw.shuffle(kept)
    return " ".join(kept)


def test_rouge_l_is_that_of_the_rouge_score_package(data_folder: Path | None) -> None:
    texts, draw = real_texts(data_folder), random.Random(0)
    theirs, ours = RougeScorer(["rougeL"], use_stemmer=True), RougeL("rouge")
    found, expected = [], []
    for n in range(2000):
        text, references = texts[n % len(texts)]
        other = draw.choice(texts)[0]
        references = [" ".join(r.split()[:60]) for r in references[: draw.randint(1, 3)]]
        if draw.random() < 0.3:
            references = [*references, other, perturbed(text, draw)]
        prediction = other if n % 4 == 0 else perturbed(text, draw)
        found.append(ours.score(prediction, references))
        expected.append(max(theirs.score(r, prediction)["rougeL"].fmeasure for r in references))
    assert found == expected
    assert 0.2 < sum(expected) / 2000 < 0.9
    assert len({round(e, 6) for e in expected}) > 50


def test_auto_is_rouge_for_latin_text(data_folder: Path | None) -> None:
    auto, rouge = RougeL("auto"), RougeL("rouge")
    for text, references in real_texts(data_folder)[:100]:
        assert auto.score(text, references) == rouge.score(text, references)


OTHER_SCRIPTS = [
    ("巴黎是法国的首都", ["法国的首都是巴黎"]),
    ("это красная машина", ["Это КРАСНАЯ книга"]),
    ("{ } ( ) ;", ["{ ( ) ; }"]),
    ("สวัสดีครับ", ["สวัสดี"]),
]


@pytest.mark.parametrize(("prediction", "references"), OTHER_SCRIPTS)
def test_text_that_rouges_tokenizer_empties_scores_all_the_same(prediction: str, references: list[str]) -> None:
    auto, rouge = RougeL(), RougeL("rouge")
    assert 0 < auto.score(prediction, references) < 1
    assert auto.score(references[0], references) == 1
    assert rouge.score(prediction, references) == 0
    assert (auto.emptied, rouge.emptied) == (2, 1)
    assert RougeL("unicode").score(prediction, references) == auto.score(prediction, references)


def test_unicode_counts_characters_of_scripts_without_spaces() -> None:
    # The longest common subsequence of the two is 法国的首都, 5 of 8 characters each.
    assert RougeL().score("巴黎是法国的首都", ["法国的首都是巴黎"]) == pytest.approx(5 / 8)
    assert RougeL("unicode").score("The cat sat", ["the dog sat"]) == pytest.approx(2 / 3)


def test_one_latin_reference_keeps_rouges_tokenizer() -> None:
    scorer = RougeL()
    assert scorer.score("Paris", ["巴黎", "Paris"]) == 1
    assert scorer.score("巴黎", ["巴黎", "Paris"]) == 0
    assert scorer.emptied == 0


def test_blank_references_are_not_counted_as_emptied() -> None:
    scorer = RougeL()
    assert scorer.score("a", [""]) == scorer.score("a", ["  \n"]) == 0
    assert scorer.emptied == 0


@pytest.mark.parametrize(("mode", "words"), [("auto", "scored with the Unicode tokenizer"), ("rouge", "scored 0")])
def test_emptied_references_are_counted_in_a_warning(
    mode: str,
    words: str,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [{"prompt": f"p{i}", "completion": text} for i, text in enumerate(["海", "sea", "+ -", "one"])]
    answers = dict(zip(("p0", "p1", "p2", "p3"), ("海", "sea", "+", "two")))
    register_engine("scripted", Scripted(lambda ids: tiny_tokenizer(answers[tiny_tokenizer.decode(ids)]).input_ids))
    scores = reflect(tiny_model, rows, tiny_tokenizer, engine="scripted", rouge_tokenizer=mode, progress=False)
    assert f"leaves nothing of 2 of 4 references: {words}" in caplog.text
    assert list(scores["rouge_l"]) == ([1, 1, pytest.approx(2 / 3), 0] if mode == "auto" else [0, 1, 0, 0])


def test_an_unknown_rouge_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="unknown ROUGE tokenizer 'unicod'; did you mean 'unicode'"):
        RougeL("unicod")


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
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_size=batch_size, progress=False)
    found = dict(engine.generate(prompts, Sampling(max_new_tokens=12)))
    assert [found[i] for i in range(len(prompts))] == expected
    assert len({len(e) for e in expected}) > 1
    assert len({tuple(e) for e in expected}) > 5
    assert all(stop not in e for e in expected)


def test_sampling_follows_its_seed_and_leaves_the_random_state(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset
) -> None:
    engine = TransformersEngine(tiny_model, tiny_tokenizer, batch_size=3, progress=False)
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
    engine = TransformersEngine(tiny_model, tiny_tokenizer, progress=False)
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
        assert engine.prompts == [tiny_tokenizer(prompt).input_ids for prompt in data["prompt"]]
        assert engine.prompts == [ids[: len(p)] for ids, p in zip(data["input_ids"], engine.prompts)]


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
    runs = [
        reflect(tiny_model, ROWS, tiny_tokenizer, batch_size=n, sampling=Sampling(max_new_tokens=8), progress=False)
        for n in (1, 3, 32)
    ]
    for run in runs[1:]:
        for column in ("sample_id", "generation", "rouge_l", "reason"):
            assert list(run[column]) == list(runs[0][column])
        assert list(run["cross_entropy"]) == pytest.approx(list(runs[0]["cross_entropy"]), rel=1e-5)


def test_a_folder_is_a_student(tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(max_new_tokens=2)
    scores = reflect(str(tiny_teacher_folder), ROWS[:2], tiny_tokenizer, sampling=sampling, progress=False)
    assert len(scores) == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_student_keeps_its_mode(
    training: bool, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.train(training)
    next(tiny_model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in tiny_model.parameters()]
    reflect(tiny_model, ROWS[:2], tiny_tokenizer, sampling=Sampling(max_new_tokens=2), progress=False)
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


# Going on after an interruption


def test_generations_that_are_there_are_not_made_again(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset, tmp_path: Path
) -> None:
    partial = tmp_path / "partial.jsonl"
    engine = Scripted(end_of_prompt)
    register_engine("scripted", engine)

    def run() -> list[dict[str, Any]]:
        engine.prompts.clear()
        return list(
            reflect(tiny_model, samples, tiny_tokenizer, engine="scripted", partial_file=partial, progress=False)
        )

    whole = run()
    assert len(engine.prompts) == len(ROWS)
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == len(ROWS)

    foreign = json.dumps({"sample_id": "of another data set", "generation": "x"}) + "\n"
    partial.write_text("".join([*lines[:5], foreign, "\n", lines[5][:-9]]))
    assert run() == whole
    there = {json.loads(line)["sample_id"] for line in lines[:5]}
    assert sorted(engine.prompts) == sorted(
        p for p, i in zip(prompts_of(samples), samples["sample_id"]) if i not in there
    )
    rows = [json.loads(line) for line in partial.read_text().splitlines()]
    assert sorted(r["sample_id"] for r in rows) == sorted(samples["sample_id"])

    assert run() == whole
    assert engine.prompts == []


def test_an_interrupted_run_leaves_what_it_had(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset, tmp_path: Path
) -> None:
    partial = tmp_path / "partial.jsonl"

    def stops_at_the_fifth(ids: list[int]) -> list[int]:
        if len(engine.prompts) == 5:
            raise KeyboardInterrupt
        return end_of_prompt(ids)

    engine = Scripted(stops_at_the_fifth)
    register_engine("scripted", engine)
    options: dict[str, Any] = {"engine": "scripted", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        reflect(tiny_model, samples, tiny_tokenizer, partial_file=partial, **options)
    assert len(partial.read_text().splitlines()) == 4
    engine.prompts = [[]] * 9
    rest = reflect(tiny_model, samples, tiny_tokenizer, partial_file=partial, **options)
    assert len(engine.prompts) == 9 + len(ROWS) - 4
    engine.prompts = [[]] * 9
    assert list(rest) == list(reflect(tiny_model, samples, tiny_tokenizer, **options))


def test_every_generation_is_in_the_file_before_the_next_one(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset, tmp_path: Path
) -> None:
    partial = tmp_path / "partial.jsonl"

    def counts_lines(ids: list[int]) -> list[int]:
        assert len(partial.read_text().splitlines()) == len(engine.prompts) - 1
        return end_of_prompt(ids)

    engine = Scripted(counts_lines)
    register_engine("scripted", engine)
    reflect(tiny_model, samples, tiny_tokenizer, engine="scripted", partial_file=partial, progress=False)
    assert len(engine.prompts) == len(ROWS)


# Registries


def test_unknown_names_come_with_the_list(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"unknown engine 'transformer'; did you mean 'transformers'\? Known: .*"):
        reflect(tiny_model, ROWS, tiny_tokenizer, engine="transformer")
    with pytest.raises(UserError, match=r"signal 'rougel'; did you mean 'rouge_l'\? Known: cross_entropy, .*rouge_l"):
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
    with pytest.raises(UserError, match="engine 'lazy' gave no generation for 2 samples"):
        reflect(tiny_model, ROWS[:3], tiny_tokenizer, engine="lazy", progress=False)


def test_sampling_is_a_value() -> None:
    assert dataclasses.replace(Sampling(), seed=4) == Sampling(seed=4)
