"""A student's answer ends where the data's answers end, whatever generates it, and is scored without its end."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import evaluate, reflect
from srd_fast.data import IGNORE_INDEX, Tokenisation, prepare_dataset
from srd_fast.reflection import Sampling, TransformersEngine, register_engine
from srd_fast.reflection.engines import engine_settings

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": f"Say {x}."}, {"role": "assistant", "content": x}]}
    for x in ("red", "green sea", "one two three")
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = tiny.tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="module")
def student(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny.tiny_model(vocab=len(tokenizer), max_position_embeddings=512)


def test_generation_stops_at_the_ids_it_is_given(student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    engine, prompts = TransformersEngine(student, tokenizer), [[5, 6, 7], [8, 9]]
    sampling = Sampling(max_new_tokens=12)
    free = dict(engine.generate(prompts, sampling))
    stop = next(x for x in free[0][2:] if x not in free[0][:2])
    found = dict(engine.generate(prompts, replace(sampling, stop_ids=(stop,))))
    for i, ids in free.items():
        assert found[i] == ids[: ids.index(stop)] if stop in ids else ids
    assert len(found[0]) < len(free[0])


def test_parts_of_runs_without_such_ids_keep_their_names(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = TransformersEngine(student, tokenizer)
    before = {"engine": "TransformersEngine", **asdict(Sampling())}
    del before["stop_ids"]
    assert engine_settings(engine, Sampling()) == before
    assert engine_settings(engine, Sampling(stop_ids=(3,)))["stop_ids"] == (3,)


def test_reflection_and_evaluation_stop_and_score_at_the_templates_end_of_turn(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    samples = prepare_dataset(ROWS, Tokenisation(tokenizer)).dataset
    labels = [[x for x in y if x != IGNORE_INDEX] for y in samples["labels"]]
    told: list[Sampling] = []

    class Perfect:
        def __init__(self, student: Any, tokenizer: Any, batch_size: int = 32) -> None:
            self.model = student

        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
            told.append(sampling)
            for i, prompt in enumerate(prompts):
                of = next(n for n, x in enumerate(samples["input_ids"]) if x[: len(prompt)] == prompt)
                yield i, [*labels[of], 70, 71, 72]

    register_engine("perfect", Perfect)
    scores = reflect(student, ROWS, tokenizer, engine="perfect", progress=False)
    assert scores["generation"][:] == ["red", "green sea", "one two three"]
    assert scores["rouge_l"][:] == [1.0, 1.0, 1.0]
    found = evaluate(student, ROWS, tokenizer, engine="perfect", progress=False)
    assert found["rouge_l"] == 1.0
    assert {s.stop_ids for s in told} == {(end,)}


def test_score_eos_is_about_every_end_of_an_answer(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = prepare_dataset(ROWS, Tokenisation(tokenizer)).dataset
    open_ended = samples.map(lambda s: {"labels": [*s["labels"][:-1], IGNORE_INDEX]})
    options: dict[str, Any] = {"signals": ["cross_entropy"], "engine": "transformers", "progress": False}
    options["sampling"] = Sampling(max_new_tokens=1)
    whole, without, expected = (
        reflect(student, s, tokenizer, score_eos=eos, **options)["cross_entropy"][:]
        for s, eos in ((samples, True), (samples, False), (open_ended, True))
    )
    assert without == pytest.approx(expected, rel=1e-6)
    assert all(not math.isclose(a, b, rel_tol=1e-3) for a, b in zip(whole, without))
