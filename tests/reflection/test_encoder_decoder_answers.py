"""Encoder-decoder students answer and are scored as their own generate() and loss do it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from encoder_decoders import NAMES, own_logits, plain_means, split, tiny_model, tiny_samples
from sacrebleu.metrics import BLEU, CHRF
from transformers import PreTrainedTokenizerBase

from srd_fast import Sampling, UserError, evaluate, reflect
from srd_fast.data import TOKENISED_FEATURES, Tokenisation, prepare_dataset
from srd_fast.reflection import TransformersEngine
from srd_fast.reflection.vllm_engine import VLLMEngine
from srd_fast.rouge import RougeL
from srd_fast.teacher import build_teacher_cache
from srd_fast.training.corpus_metrics import corpus_score

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs")
ROWS = [{"instruction": " ".join(WORDS[i % 3 : 3 + i]), "output": " ".join(WORDS[: 1 + i % 4])} for i in range(1, 8)]
SHORT = Sampling(max_new_tokens=6)
SAMPLES = tiny_samples(6)


@pytest.fixture(scope="module")
def tokenizers() -> Callable[[str], PreTrainedTokenizerBase]:
    found = {name: encoder_decoders.tiny_tokenizer(name) for name in ("t5", "bart", "mbart")}
    return lambda name: found[name if name in found else "t5"]


def own_answer(model: Any, prompt: list[int], **options: Any) -> list[int]:
    """What generate() says to one prompt, without the start token and from the end on."""
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, num_beams=1, **options)
    ids = out[0, 1:].tolist()
    end = model.generation_config.eos_token_id
    return ids[: ids.index(end)] if end in ids else ids


# Text becomes samples.


def test_prompt_and_response_are_texts_of_their_own(tokenizers: Any) -> None:
    for name, opening in (("t5", []), ("bart", [0]), ("mbart", "ro_RO")):
        tokenizer = tokenizers(name)
        opening = [tokenizer.convert_tokens_to_ids(opening)] if isinstance(opening, str) else opening
        tokenisation = Tokenisation(tokenizer, "{instruction}", encoder_decoder=True)
        for row, sample in zip(ROWS, prepare_dataset(ROWS, tokenisation).dataset):
            prompt, response = split(sample)
            assert prompt == tokenizer(row["instruction"]).input_ids, name
            assert prompt[-1] == tokenizer.eos_token_id
            assert response == tokenizer(text_target=row["output"]).input_ids
            assert response[: len(opening)] == opening
            assert response[-1] == tokenizer.eos_token_id


def test_limits_of_both_texts(tokenizers: Any) -> None:
    tokenizer = tokenizers("bart")
    tokenisation = Tokenisation(tokenizer, "{instruction}", 5, 4, encoder_decoder=True)
    (sample,) = prepare_dataset([{"instruction": "lazy brown fox", "output": "lazy brown fox"}], tokenisation).dataset
    prompt, response = split(sample)
    assert (len(prompt), prompt[0], prompt[-1]) == (5, 0, 2)
    assert len(response) == 4
    assert response[:3] == tokenizer("lazy brown fox").input_ids[:3]


def test_a_causal_models_prompt_still_ends_in_no_eos(tokenizers: Any) -> None:
    tokenizer = tokenizers("t5")
    (sample,) = prepare_dataset(ROWS[:1], Tokenisation(tokenizer, "{instruction}")).dataset
    assert split(sample)[0] == tokenizer(ROWS[0]["instruction"]).input_ids[:-1]


# Answers.


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_those_of_generate(name: str, tokenizers: Any) -> None:
    model = tiny_model(name)
    prompts = [split(s)[0] for s in tiny_samples(9, seed=1)]
    assert len(set(map(len, prompts))) > 3
    found = dict(TransformersEngine(model, tokenizers(name), batch_size=4).generate(prompts, SHORT))
    ends = {tokenizers(name).eos_token_id}
    for i, prompt in enumerate(prompts):
        expected = own_answer(model, prompt, forced_eos_token_id=None)
        assert found[i] == expected[: next((n for n, x in enumerate(expected) if x in ends), None)]
    assert len({tuple(x) for x in found.values()}) > 1


def test_other_settings_of_a_checkpoint_change_no_answer(tokenizers: Any) -> None:
    model, tokenizer = tiny_model("bart"), tokenizers("bart")
    prompts = [split(s)[0] for s in tiny_samples(4, seed=1)]
    expected = dict(TransformersEngine(model, tokenizer).generate(prompts, SHORT))
    shipped = {
        "num_beams": 3,
        "no_repeat_ngram_size": 2,
        "min_length": 5,
        "length_penalty": 2.0,
        "early_stopping": True,
    }
    for field, value in {**shipped, "forced_eos_token_id": 2, "max_length": 4}.items():
        setattr(model.generation_config, field, value)
    assert dict(TransformersEngine(model, tokenizer).generate(prompts, SHORT)) == expected


def test_answers_begin_in_the_language_that_is_forced(tokenizers: Any) -> None:
    model, tokenizer = tiny_model("mbart"), tokenizers("mbart")
    model.generation_config.forced_bos_token_id = 77
    answers = dict(TransformersEngine(model, tokenizer).generate([[5, 6, 2], [8, 2]], SHORT))
    assert [a[0] for a in answers.values()] == [77, 77]


def test_sampled_answers_repeat_with_their_seed(tokenizers: Any) -> None:
    engine = TransformersEngine(tiny_model("bart"), tokenizers("bart"))
    prompts = [[0, 40, 41, 2], [0, 50, 2]]
    hot = Sampling(max_new_tokens=6, temperature=2.0)
    first, again = (dict(engine.generate(prompts, hot)) for _ in range(2))
    other = dict(engine.generate(prompts, Sampling(max_new_tokens=6, temperature=2.0, seed=1)))
    assert first == again != other


# Scores.


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_cross_entropy_is_the_models_own_loss(name: str, tokenizers: Any) -> None:
    model, tokenizer = tiny_model(name), tokenizers(name)
    scores = reflect(model, ROWS, tokenizer, template="{instruction}", sampling=SHORT, batch_size=3, progress=False)
    for row, score in zip(ROWS, scores):
        inputs = tokenizer(row["instruction"], return_tensors="pt")
        labels = tokenizer(text_target=row["output"], return_tensors="pt").input_ids
        given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        with torch.no_grad():
            assert score["cross_entropy"] == pytest.approx(model(**given, labels=labels).loss.item(), rel=1e-5)
        answer = own_answer(model, inputs.input_ids[0].tolist(), forced_eos_token_id=None)
        ends = [n for n, x in enumerate(answer) if x == tokenizer.eos_token_id]
        text = tokenizer.decode(answer[: ends[0]] if ends else answer, skip_special_tokens=True).strip()
        assert score["generation"] == text
        assert score["rouge_l"] == pytest.approx(RougeL("auto").score(text, [row["output"]]))


def test_the_end_counts_only_if_asked_for(tokenizers: Any) -> None:
    model, tokenizer = tiny_model("t5"), tokenizers("t5")
    options = {"template": "{instruction}", "sampling": SHORT, "progress": False, "signals": ["cross_entropy"]}
    (found,) = reflect(model, ROWS[2:3], tokenizer, score_eos=False, **options)["cross_entropy"]
    (sample,) = prepare_dataset(ROWS[2:3], Tokenisation(tokenizer, "{instruction}", encoder_decoder=True)).dataset
    with torch.no_grad():
        z, labels = own_logits(model, [sample])
    losses = tiny.plain_cross_entropy(z, labels)
    assert found == pytest.approx(losses[:-1].mean().item(), rel=1e-5)


def test_a_student_by_name(tokenizers: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("bart"), tokenizers("bart")
    model.save_pretrained(tmp_path)
    options = {"template": "{instruction}", "sampling": SHORT, "progress": False}
    named = reflect(str(tmp_path), ROWS[:3], tokenizer, engine="transformers", **options)
    assert named.to_list() == reflect(model, ROWS[:3], tokenizer, **options).to_list()


def test_vllm_is_refused_for_what_has_an_encoder(tokenizers: Any, tmp_path: Path) -> None:
    model = tiny_model("t5")
    model.save_pretrained(tmp_path)
    for student in (model, str(tmp_path)):
        with pytest.raises(UserError, match=r"engine 'vllm' runs causal language models.*use transformers"):
            VLLMEngine(student, tokenizers("t5"))


# Evaluation.


@pytest.mark.parametrize("name", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_an_evaluation_is_that_of_full_logits_and_generate(name: str, tokenizers: Any, tmp_path: Path) -> None:
    model, teacher, tokenizer = tiny_model(name), tiny_model(name, seed=1, width=24), tokenizers(name)
    options: dict[str, Any] = {"template": "{instruction}", "sampling": SHORT, "batch_size": 3, "progress": False}
    found = evaluate(model, ROWS, tokenizer, teacher=teacher, metrics=["bleu", "chrf"], num_examples=7, **options)
    samples = prepare_dataset(ROWS, Tokenisation(tokenizer, "{instruction}", encoder_decoder=True)).dataset
    kl, cross_entropy = plain_means(model, teacher, list(samples))
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    answers = []
    for sample in samples:
        answer = own_answer(model, split(sample)[0], forced_eos_token_id=None)
        ends = [n for n, x in enumerate(answer) if x == tokenizer.eos_token_id]
        answers.append(tokenizer.decode(answer[: ends[0]] if ends else answer, skip_special_tokens=True).strip())
    outputs = [row["output"] for row in ROWS]
    assert [e["generation"] for e in found["examples"]] == answers
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(answers, [outputs]).score / 100)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(answers, [outputs]).score / 100)

    cache = build_teacher_cache(teacher, samples, tmp_path, progress=False)
    assert evaluate(model, samples, tokenizer, teacher=cache, **options)["kl"] == pytest.approx(kl, rel=1e-5)
    own = evaluate(teacher, samples, tokenizer, states=cache, **options)
    assert own["cross_entropy"] == pytest.approx(plain_means(teacher, teacher, list(samples))[1], rel=1e-5)


def test_an_evaluation_beside_the_other_kind_is_refused(tokenizers: Any) -> None:
    with pytest.raises(UserError, match="the student is an encoder-decoder model and the teacher a causal"):
        evaluate(tiny_model("t5"), SAMPLES, tokenizers("t5"), teacher=tiny.tiny_model("llama"), progress=False)


def test_corpus_scores_of_answers_and_references() -> None:
    answers = ["the cat sat on the mat", "a dog", "le chat est là"]
    references = [["the cat sat on the mat"], ["a dog", "the dog runs"], ["le chat était là"]]
    assert corpus_score("bleu", answers[:1], references[:1]) == pytest.approx(1.0)
    assert corpus_score("chrf", answers[:2], references[:2]) == pytest.approx(1.0)
    streams = [["the cat sat on the mat", "a dog", "le chat était là"], [None, "the dog runs", None]]
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        expected = metric.corpus_score(answers, streams).score / 100
        assert corpus_score(name, answers, references) == pytest.approx(expected)
        assert 0.3 < expected < 1
    assert corpus_score("bleu", ["nothing"], [[]]) == 0


def test_unknown_metrics_are_named(tokenizers: Any) -> None:
    with pytest.raises(UserError, match=r"metric 'blue'.*bleu"):
        evaluate(tiny_model("t5"), SAMPLES, tokenizers("t5"), metrics=["blue"], progress=False)


def test_samples_are_taken_as_they_are_stored(tokenizers: Any) -> None:
    tokenisation = Tokenisation(tokenizers("t5"), "{instruction}", encoder_decoder=True)
    samples = prepare_dataset(ROWS, tokenisation).dataset
    assert samples.features == TOKENISED_FEATURES
    assert prepare_dataset(samples, Tokenisation(tokenizers("t5"))).dataset.to_list() == samples.to_list()
