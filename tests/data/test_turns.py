"""Loss on all answers of a conversation: each has its labels, and the ids are those of the whole rendering."""

from typing import Any

import pytest
from test_data import prepare
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from srd_fast.data import IGNORE_INDEX, Answers, Tokenisation, first_label
from srd_fast.errors import UserError

Row = dict[str, Any]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Un."},
    {"role": "user", "content": "Two and three?"},
    {"role": "assistant", "content": "Deux, trois."},
    {"role": "user", "content": "Four?"},
    {"role": "assistant", "content": "Quatre."},
]
ENDING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Drops what stands before </think> in all answers but the last, as Qwen 3's does.
THINKING = ENDING.replace("{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}")


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    made.chat_template = template
    return made


def spans(sample: Row, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of the stretches of labels."""
    found: list[list[int]] = [[]]
    for label in sample["labels"]:
        if label != IGNORE_INDEX:
            found[-1].append(label)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(ids) for ids in found if ids]


def test_all_answers_have_loss_and_the_ids_are_those_of_the_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, ENDING)
    (sample,) = prepare([{"messages": TURNS}], tokenizer, train_on="all").dataset
    assert spans(sample, tokenizer) == ["Un.<|im_end|>", "Deux, trois.<|im_end|>", "Quatre.<|im_end|>"]
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(sample["input_ids"]) == text.removesuffix("\n")
    prompt = tokenizer.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert (sample["prompt"], sample["references"]) == (prompt, ["Un."])
    assert sample["input_ids"][: first_label(sample["labels"])] == tokenizer(prompt).input_ids
    assert all(y in (x, IGNORE_INDEX) for x, y in zip(sample["input_ids"], sample["labels"]))
    (last,) = prepare([{"messages": TURNS}], tokenizer).dataset
    assert spans(last, tokenizer) == ["Quatre.<|im_end|>"]
    assert last["input_ids"] == sample["input_ids"]
    assert last["sample_id"] == sample["sample_id"]


def test_without_a_token_that_ends_turns_the_last_answer_ends_in_eos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = prepare([{"messages": TURNS}], tiny_tokenizer, train_on="all").dataset
    assert spans(sample, tiny_tokenizer) == ["Un.", "Deux, trois.", "Quatre.<|endoftext|>"]
    assert tiny_tokenizer.decode(sample["input_ids"]) == (
        "<system>Be brief.\n<user>One?\n<assistant>Un.\n<user>Two and three?\n<assistant>Deux, trois.\n"
        "<user>Four?\n<assistant>Quatre.<|endoftext|>"
    )


def test_what_has_one_answer_is_the_same_with_both(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[list[Row]] = [
        [{"messages": TURNS[:3]}, {"messages": [*TURNS[:3], TURNS[3]]}],
        [{"instruction": "a", "output": "b"}],
        [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}],
    ]
    for some in rows:
        last, both = (prepare(some, tiny_tokenizer, train_on=which).dataset.to_list() for which in ("last", "all"))
        assert last == both


@pytest.mark.parametrize("limit", [1, 3, 12, 20, 30])
def test_all_that_follows_the_first_question_is_cut_together(
    limit: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (whole,) = prepare([{"messages": TURNS}], tiny_tokenizer, train_on="all").dataset
    prepared = prepare([{"messages": TURNS}], tiny_tokenizer, train_on="all", max_response_length=limit)
    (cut,), start = prepared.dataset, first_label(whole["labels"])
    assert cut["input_ids"] == whole["input_ids"][: start + limit]
    assert cut["labels"] == whole["labels"][: start + limit]
    assert prepared.cuts == {"responses_cut": 1}


def test_a_first_question_that_is_too_long_is_cut_in_all_that_follows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "word " * 200}, *TURNS[2:]]
    prepared = prepare([{"messages": turns}], tiny_tokenizer, train_on="all", max_prompt_length=60)
    (sample,) = prepared.dataset
    assert first_label(sample["labels"]) <= 60
    assert tiny_tokenizer.decode(sample["input_ids"]).startswith(sample["prompt"] + "Un.\n<user>Two and three?")
    assert prepared.cuts["prompts_cut"] == 1


def test_a_template_that_rewrites_earlier_answers_rejects_the_row(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, THINKING)
    thought = [*TURNS[:2], {"role": "assistant", "content": "hm</think>Un."}, *TURNS[3:]]
    prepared = prepare([{"messages": thought}, {"messages": TURNS}], tokenizer, train_on="all")
    assert len(prepared.dataset) == 1
    assert "writes the first answer differently once others follow; train_on 'last'" in prepared.rejected[0][1]
    later = [*TURNS[:4], {"role": "assistant", "content": "hm</think>Deux."}, *TURNS[5:]]
    prepared = prepare([{"messages": later}, {"messages": TURNS}], tokenizer, train_on="all")
    assert "writes turn 5 differently once others follow" in prepared.rejected[0][1]
    assert not prepare([{"messages": later}], tokenizer).rejected


def test_answers_are_read_as_the_first_turn_says(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, ENDING)
    samples = prepare([{"messages": TURNS}], tokenizer, train_on="all").dataset
    answers = Answers(samples, tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answers.ends == {tokenizer.eos_token_id, end}
    assert answers.text(0, [*tokenizer("Un.").input_ids, end, 7, 8]) == "Un."


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"train_on": "first"}, "unknown train_on 'first'"),
        ({"train_on": "al"}, "did you mean 'all'"),
        ({"train_on": "all", "encoder_decoder": True}, "train_on 'all' needs a causal language model"),
    ],
)
def test_other_turns_are_refused(options: Row, complaint: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=complaint):
        Tokenisation(tiny_tokenizer, **options)
