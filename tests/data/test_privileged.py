"""What the teacher alone reads: in every row format, beside cut prompts and answers, and rows that do not say it."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from srd_fast.data import (
    IGNORE_INDEX,
    PRIVILEGED_FEATURES,
    TOKENISED_FEATURES,
    Tokenisation,
    first_label,
    prepare_dataset,
    seen_by_teacher,
    teachers_samples,
)
from srd_fast.errors import UserError

HINT = "It is a colour."
COMPLETION = {"prompt": "Sky?", "completion": "Blue."}
INSTRUCTION = {"instruction": "Name it.", "input": "Sky", "output": ["Blue.", "Azure."]}
CHAT = {
    "messages": [
        {"role": "user", "content": "Grass?"},
        {"role": "assistant", "content": "Green."},
        {"role": "user", "content": "Sky?"},
        {"role": "assistant", "content": "Blue."},
    ]
}


def prompts(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any) -> tuple[str, str, str]:
    """What the student and the teacher read, and the answer that both see behind it."""
    (sample,) = prepare_dataset([row], Tokenisation(tokenizer, **options)).dataset
    seen = seen_by_teacher(sample)
    start, theirs = first_label(sample["labels"]), first_label(seen["labels"])
    assert seen["input_ids"][theirs:].tolist() == sample["input_ids"][start:]
    assert seen["labels"][theirs:].tolist() == sample["labels"][start:]
    assert theirs == len(sample["privileged_ids"])
    parts = sample["input_ids"][:start], seen["input_ids"][:theirs], sample["input_ids"][start:]
    return tuple(tokenizer.decode(x) for x in parts)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("row", "template", "ours", "theirs"),
    [
        (COMPLETION, "{privileged}", "Sky?", f"{HINT}\n\nSky?"),
        (COMPLETION, "{prompt} ({response})", "Sky?", "Sky? (Blue.)"),
        (COMPLETION, "Think of {{it}}.", "Sky?", "Think of {it}.\n\nSky?"),
        (CHAT, "{privileged}", "<user>Sky?\n<assistant>", f"<system>{HINT}\n<user>Grass?"),
        (CHAT, "{prompt} {privileged}", "<user>Sky?\n<assistant>", f"<user>Sky? {HINT}\n<assistant>"),
        ({**CHAT, "system": "Be brief."}, "Be kind.", "<system>Be brief.\n", "<system>Be kind.\n\nBe brief.\n"),
        (INSTRUCTION, "{prompt} Such as {response}", "Name it.\n\n###", "Name it. Such as Blue.\n\n###"),
    ],
)
def test_the_teacher_reads_what_the_template_says(
    row: dict[str, Any], template: str, ours: str, theirs: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    made = prompts(tiny_tokenizer, {**row, "privileged": HINT}, privileged_template=template)
    assert ours in made[0]
    assert theirs in made[1]
    assert theirs not in made[0]
    assert made[2].startswith("Blue.")
    if row is INSTRUCTION:
        assert all(text.endswith("### Input:\nSky\n\n### Response:\n") for text in made[:2])


def test_rows_of_every_format_have_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    as_dolly = {"instruction": "Sky?", "response": "Blue.", "hints": {"first": HINT}}
    data = prepare_dataset(
        [as_dolly],
        Tokenisation(tiny_tokenizer, "{instruction}", privileged_template="{privileged}"),
        columns={"privileged": "hints.first"},
    ).dataset
    assert data.features == PRIVILEGED_FEATURES
    assert tiny_tokenizer.decode(data[0]["privileged_ids"]) == f"{HINT}\n\nSky?"
    # The id is that of the row without it, as the curriculum's is.
    plain = prepare_dataset([as_dolly], Tokenisation(tiny_tokenizer, "{instruction}")).dataset
    assert plain.features == TOKENISED_FEATURES
    assert plain[0]["sample_id"] == data[0]["sample_id"]
    # Samples go through as they are, and rows may be tokenised already.
    again = prepare_dataset(data, Tokenisation(tiny_tokenizer, privileged_template="{privileged}")).dataset
    assert again is data
    ids = {"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX, 6, 7], "privileged_ids": [9, 9, 5]}
    (own,) = prepare_dataset([ids], Tokenisation(tiny_tokenizer, privileged_template="{privileged}")).dataset
    assert seen_by_teacher(own)["input_ids"].tolist() == [9, 9, 5, 6, 7]
    with pytest.raises(UserError, match=r"privileged_ids must be a list of token ids below 400, got \[400\]"):
        prepare_dataset([{**ids, "privileged_ids": [400]}], Tokenisation(tiny_tokenizer, privileged_template="x"))


@pytest.mark.parametrize(("row", "limit"), [(COMPLETION, 60), (INSTRUCTION, 150), (CHAT, 60)])
def test_the_students_limits_are_not_the_teachers(
    row: dict[str, Any], limit: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    long = {
        **row,
        **{name: "word " * 60 for name in ("prompt", "input") if name in row},
        "privileged": HINT,
    }
    if row is CHAT:
        long["messages"] = [{"role": "user", "content": "word " * 60}, *CHAT["messages"][1:]]
    options: dict[str, Any] = {
        "max_prompt_length": limit,
        "max_response_length": 2,
        "privileged_template": "{privileged}",
    }
    ours, theirs, answer = prompts(tiny_tokenizer, long, **options)
    assert ours.count("word") < theirs.count("word") == 60
    assert len(tiny_tokenizer.encode(answer)) == 2, "the answer is cut for both"
    with pytest.raises(UserError, match="the prompt of the teacher is longer than max_privileged_length 70; raise"):
        prepare_dataset([long], Tokenisation(tiny_tokenizer, **options, max_privileged_length=70))


def test_all_answers_of_a_conversation_are_the_teachers_too(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ours, theirs, behind = prompts(
        tiny_tokenizer, CHAT, train_on="all", privileged_template="{prompt} Hint: {response}"
    )
    assert ours == "<user>Grass?\n<assistant>"
    assert theirs == "<user>Grass? Hint: Green.\n<assistant>"
    assert "<user>Sky?\n<assistant>Blue." in behind


def test_rows_that_do_not_say_it_are_named(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**COMPLETION, "privileged": HINT}, {**COMPLETION, "privileged": ""}, COMPLETION]
    tokenisation = Tokenisation(tiny_tokenizer, privileged_template="{prompt} {privileged}")
    with pytest.raises(UserError, match=r"mine: 2 rows have nothing that only the teacher could read: row 2, row 3;"):
        prepare_dataset(rows, tokenisation, "mine")
    assert len(prepare_dataset(rows, tokenisation.without_privileged()).dataset) == 3
    # The answer is always there.
    assert len(prepare_dataset(rows, Tokenisation(tiny_tokenizer, privileged_template="{response}")).dataset) == 3
    samples = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    with pytest.raises(UserError, match="3 rows have nothing that only the teacher could read"):
        prepare_dataset(samples, tokenisation)
    with pytest.raises(UserError, match="privileged must be text, got int"):
        prepare_dataset([{**COMPLETION, "privileged": 3}], tokenisation)


@pytest.mark.parametrize("template", ["", "{prompt}", " {prompt}\n", "{answer}", "{privileged", "{}"])
def test_a_template_that_says_nothing_or_something_else_is_refused(
    template: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="privileged_template"):
        Tokenisation(tiny_tokenizer, privileged_template=template)


def test_samples_as_the_teacher_sees_them(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**COMPLETION, "completion": "word " * n, "privileged": HINT * n} for n in range(1, 5)]
    samples = prepare_dataset(rows, Tokenisation(tiny_tokenizer, privileged_template="{privileged}")).dataset
    seen = teachers_samples(samples)
    assert seen.features == TOKENISED_FEATURES
    assert list(seen["sample_id"]) == list(samples["sample_id"])
    assert [row["input_ids"] for row in seen] == [seen_by_teacher(row)["input_ids"].tolist() for row in samples]
    assert teachers_samples(seen) is seen
    # An answer of the student's own, an empty one, and a batch without any.
    for answer in ([7, 8], []):
        ids, labels = np.array([1, 2, *answer]), np.array([-100, -100, *answer])
        sample = {"input_ids": ids, "labels": labels, "privileged_ids": [3]}
        assert seen_by_teacher(sample)["input_ids"].tolist() == [3, *answer]
    nothing = {"input_ids": [1, 2], "labels": [-100, -100], "privileged_ids": [3]}
    assert seen_by_teacher(nothing)["labels"].tolist() == [-100]
