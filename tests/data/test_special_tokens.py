"""The text of a special token is text in the data, a token in rows that are rendered already, and never there twice."""

from typing import Any

import pytest
import tiny
from test_data import llama2, metaspace, one, prepare, response_of
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from srd_fast.data import Answers, Tokenisation, first_label
from srd_fast.rouge import RougeL

Row = dict[str, Any]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """With a BOS that it puts before every text, and ChatML."""
    made = tiny.tiny_tokenizer()
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    made.chat_template = CHATML
    return made


def special_ids(sample: Row, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [t for t in tokenizer.convert_ids_to_tokens(sample["input_ids"]) if t in tokenizer.all_special_tokens]


MENTIONS = [
    "<|endoftext|> ends it",
    "It ends in <|endoftext|>",
    "<s><s>",
    "a<|im_end|>\n<|im_start|>user\nb",
    "<|endoftext|>",
]


@pytest.mark.parametrize("text", MENTIONS)
def test_the_name_of_a_special_token_is_no_special_token(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = one({"instruction": "What?", "output": "x"}, tokenizer)
    sample = one({"instruction": text, "input": text, "output": text}, tokenizer)
    assert special_ids(plain, tokenizer) == special_ids(sample, tokenizer) == ["<s>", tiny.EOS]
    assert tokenizer.decode(sample["input_ids"][1:-1]) == sample["prompt"] + text
    assert sample["references"] == [text]
    marks = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    for row in ({"messages": turns}, {"instruction": text, "output": text}, {"prompt": text, "completion": text}):
        sample = one(row, tokenizer, template="chat")
        assert special_ids(sample, tokenizer) == marks
        assert tokenizer.decode(sample["input_ids"]) == (
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>"
        )
        assert sample["references"] == [text]


def test_a_template_may_write_what_the_data_may_not(tokenizer: PreTrainedTokenizerFast) -> None:
    own = "<s><|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
    sample = one({"instruction": "<|im_end|>", "output": "red"}, tokenizer, template=own)
    assert special_ids(sample, tokenizer) == ["<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", tiny.EOS]
    assert sample["prompt"] == own.format(instruction="<|im_end|>")


@pytest.mark.parametrize("kind", ["unigram", "bpe", "llama 2"])
def test_other_tokenizers_keep_it_as_text_too(kind: str) -> None:
    tokenizer = llama2() if kind == "llama 2" else metaspace(kind)
    sample = one({"instruction": "the cat", "output": "a</s>b"}, tokenizer)
    assert response_of(sample).index(tokenizer.eos_token_id) == len(response_of(sample)) - 1
    assert tokenizer.decode(response_of(sample)[:-1]).strip() == "a</s>b"


@pytest.mark.parametrize(
    ("prompt", "completion", "marks", "said"),
    [
        ("<s>[INST] name a colour [/INST]", "red<|endoftext|>", ["<s>", tiny.EOS], "red"),
        ("<s>[INST] name a colour [/INST]", "red<|endoftext|>\n", ["<s>", tiny.EOS], "red"),
        ("[INST] name a colour [/INST]", "red", ["<s>", tiny.EOS], "red"),
        ("<|im_start|>user\nhi", "red<|im_end|>\n", ["<s>", "<|im_start|>", "<|im_end|>"], "red"),
        ("<s>hi", "a<|im_end|>\n<|im_start|>user\nb", ["<s>", "<|im_end|>", "<|im_start|>", tiny.EOS], "a\nuser\nb"),
    ],
)
def test_a_row_that_is_rendered_already_is_parsed_and_gets_nothing_twice(
    prompt: str, completion: str, marks: list[str], said: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared = prepare([{"prompt": prompt, "completion": [completion, said]}], tokenizer)
    sample = prepared.dataset[0]
    assert special_ids(sample, tokenizer) == marks
    assert sample["prompt"] == prompt
    assert sample["references"] == [said, said]
    answer = Answers(prepared.dataset, tokenizer).text(0, response_of(sample))
    assert RougeL().score(answer, sample["references"]) == 1.0


def test_what_is_parsed_can_be_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = {"prompt": "<s>hi", "completion": "red<|endoftext|>"}
    as_text = one(rendered, tokenizer, parse_special_tokens=False)
    assert special_ids(as_text, tokenizer) == ["<s>", tiny.EOS]
    assert tokenizer.decode(as_text["input_ids"]) == "<s><s>hired<|endoftext|><|endoftext|>"
    assert as_text["references"] == ["red<|endoftext|>"]
    row = {"instruction": "a<|im_end|>b", "output": "red<|endoftext|>"}
    parsed = one(row, tokenizer, parse_special_tokens=True)
    assert special_ids(parsed, tokenizer) == ["<s>", "<|im_end|>", tiny.EOS]
    assert parsed["references"] == ["red"]
    chat = one(row, tokenizer, parse_special_tokens=True, template="chat")
    marks = ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert (special_ids(chat, tokenizer), chat["references"]) == (marks, ["red"])
    with pytest.raises(ValueError, match="parse_special_tokens must be true, false or null, got 'yes'"):
        Tokenisation(tokenizer, parse_special_tokens="yes")  # type: ignore[arg-type]


def test_texts_without_special_tokens_keep_every_character(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("\ufdd0", "a\ufdd0\ufdd0b", "<\ufdd0|im_end|>", "\ufdd0<s>\ufdd0"):
        sample = one({"instruction": text, "output": text}, tokenizer)
        assert special_ids(sample, tokenizer) == ["<s>", tiny.EOS]
        assert tokenizer.decode(sample["input_ids"][1:-1]) == sample["prompt"] + text
        assert f"### Instruction:\n{text}\n" in sample["prompt"]


# Several turns that are tokenised already


def spans(tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]) -> Row:
    ids: list[int] = []
    labels: list[int] = []
    for question, answer in turns:
        asked, said = (tokenizer(x, add_special_tokens=False).input_ids for x in (question, answer))
        ids, labels = ids + asked + said, labels + [-100] * len(asked) + said
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("end", ["", "<|endoftext|>", "<|im_end|>"])
def test_the_first_of_several_turns_is_answered_and_scored(end: str, tokenizer: PreTrainedTokenizerFast) -> None:
    row = spans(tokenizer, [("Q: a colour\nA:", f" red{end}"), ("\nQ: another\nA:", f" blue{end}")])
    prepared = prepare([row], tokenizer)
    sample = prepared.dataset[0]
    assert tokenizer.decode(sample["input_ids"][: first_label(sample["labels"])]) == "Q: a colour\nA:"
    assert sample["references"] == [" red"]
    assert (sample["input_ids"], sample["labels"]) == (row["input_ids"], row["labels"])
    answers = Answers(prepared.dataset, tokenizer)
    assert answers.stop_ids == ((tokenizer.convert_tokens_to_ids(end),) if end == "<|im_end|>" else ())
    assert answers.text(0, tokenizer(f" red{end} blue", add_special_tokens=False).input_ids) == (
        "red" if end else "red blue"
    )
    given = {**row, "references": ["crimson"]}
    assert one(given, tokenizer)["references"] == ["crimson"]
