"""Rows that are longer than a model's positions are named before anything runs."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer, UserError, evaluate, reflect
from srd_fast.models.positions import check_positions, max_positions
from srd_fast.reflection import Sampling

WORDS = {"instruction": "a b c " * 20, "output": "x y z " * 20}
SHORT = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, 0]}
LONG = {"input_ids": [5] * 70, "labels": [-100] * 40 + [5] * 30}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("gpt2", (64, True)), ("opt", (64, True)), ("gptj", (64, True)), ("llama", (64, False)), ("gemma2", (64, False))],
)
def test_who_fails_beyond_its_positions_and_who_goes_on(architecture: str, expected: tuple[int, bool]) -> None:
    model = tiny.tiny_model(architecture)
    assert max_positions(model) == max_positions(model.config) == expected


@pytest.mark.parametrize("kind", ["mamba", "bloom", "xglm", "t5", "bart"])
def test_models_without_such_an_end_have_none(kind: str) -> None:
    assert max_positions(AutoConfig.for_model(kind)) == (None, False)
    assert max_positions(object()) == (None, False)


@pytest.mark.parametrize(
    ("name", "fails"),
    [("bart", True), ("pegasus", True), ("led", True), ("m2m_100", None), ("t5gemma", False), ("t5", None)],
)
def test_encoder_and_decoder_have_positions_of_their_own(name: str, fails: bool | None) -> None:
    model = encoder_decoders.tiny_model(name)
    for stack in ("encoder", "decoder"):
        assert max_positions(model, stack) == ((None, False) if fails is None else (64, fails))
    tokens = torch.full((1, 65), 5)
    with pytest.raises(IndexError) if fails else nullcontext():
        model(input_ids=tokens, decoder_input_ids=tokens)
    assert max_positions(tiny.tiny_model("gpt2"), "decoder") == (None, False)


def test_a_prompt_and_a_response_are_counted_apart() -> None:
    models = {"student": encoder_decoders.tiny_model("bart")}
    check_positions([64 + 63], [64], ["a"], models, "shorten them")
    with pytest.raises(
        UserError, match=r"1 of 1 rows do not fit the 64 positions of the student's encoder; .* needs 65"
    ):
        check_positions([66], [65], ["a"], models, "shorten them")
    with pytest.raises(
        UserError, match=r"1 of 1 rows do not fit the 64 positions of the student's decoder; .* needs 65"
    ):
        check_positions([65], [1], ["a"], models, "shorten them")


def test_the_longest_row_is_named(caplog: pytest.LogCaptureFixture) -> None:
    check_positions([64, 3], [2, 2], ["a", "b"], {"student": tiny.tiny_model("gpt2")}, "shorten them")
    message = "2 of 3 rows do not fit the 64 positions of the student; the longest, 'c', needs 70: shorten them"
    with pytest.raises(UserError, match=message):
        check_positions([65, 3, 70], [2, 2, 2], ["a", "b", "c"], {"student": tiny.tiny_model("gpt2")}, "shorten them")
    assert not caplog.records
    check_positions([65, 3, 70], [2, 2, 2], ["a", "b", "c"], {"teacher": tiny.tiny_model("llama")}, "shorten them")
    assert "2 of 3 rows do not fit the 64 positions of the teacher" in caplog.text


def _train(tmp_path: Path, tokenizer: Any, student: str, teacher: str, rows: list[Any], held_out: list[Any]) -> None:
    models = [tiny.tiny_model(a, vocab=len(tokenizer)) for a in (student, teacher)]
    args = SRDConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    SRDTrainer(*models, args, rows, eval_dataset=held_out, processing_class=tokenizer)


CALLS: dict[str, Callable[[Path, Any], Any]] = {
    "the student's training rows": lambda d, t: _train(d, t, "gpt2", "llama", [SHORT, LONG], [SHORT]),
    "the teacher's training rows": lambda d, t: _train(d, t, "llama", "opt", [SHORT, LONG], [SHORT]),
    "the validation rows": lambda d, t: _train(d, t, "gpt2", "llama", [SHORT], [SHORT, LONG]),
    "a reflection": lambda d, t: reflect(tiny.tiny_model("gpt2", vocab=len(t)), [SHORT, LONG], t, progress=False),
    "a reflection's new tokens": lambda d, t: reflect(
        tiny.tiny_model("opt", vocab=len(t)), [SHORT], t, sampling=Sampling(max_new_tokens=65), progress=False
    ),
    "an evaluation": lambda d, t: evaluate(tiny.tiny_model("gpt2", vocab=len(t)), [WORDS], t, progress=False),
    "an evaluation's teacher": lambda d, t: evaluate(
        tiny.tiny_model("llama", vocab=len(t)), [LONG], t, teacher=tiny.tiny_model("gpt2", vocab=len(t)),
        sampling=Sampling(max_new_tokens=4), progress=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_whatever_runs_a_model_looks_first(
    call: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(UserError, match="rows do not fit the 64 positions of the"):
        CALLS[call](tmp_path, tiny_tokenizer)


def test_new_tokens_that_just_fit_are_generated(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    student = tiny.tiny_model("gpt2", vocab=len(tiny_tokenizer))
    sampling = Sampling(max_new_tokens=64)  # the last one is never fed, and the prompt is one token
    reflect(student, [SHORT], tiny_tokenizer, sampling=sampling, engine="transformers", progress=False)
