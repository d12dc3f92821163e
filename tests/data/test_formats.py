"""Rows of every usual format are samples of a standard one under other names; what is refused says what to type."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_data import prepare
from transformers import PreTrainedTokenizerFast

from srd_fast.data import ROW_FORMATS, register_row_format
from srd_fast.errors import UserError

Row = dict[str, Any]
Q, A = "Which sea is red?", "The Red Sea."
BRIEF = {"role": "system", "content": "Be brief."}
ASK, SAY = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
CHAT = {"messages": [ASK, SAY]}
ASKED = {"instruction": Q, "input": "", "output": A}
TOLD = {"instruction": Q, "input": "A map.", "output": A}
AS_IT_IS = {"prompt": Q, "completion": A}
LAST = {"system": "", "input": Q, "output": A}
HUMAN, GPT = {"from": "human", "value": Q}, {"from": "gpt", "value": A}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n{}"
)

# A row as people have it, and the standard row that makes the same sample.
SAME: dict[str, tuple[Row, Row]] = {
    "Alpaca with null": ({"instruction": Q, "input": None, "output": A, "text": "all", "history": []}, ASKED),
    "Dolly": ({"instruction": Q, "context": "", "response": A, "category": "open_qa"}, ASKED),
    "Dolly with context": ({"instruction": Q, "context": "A map.", "response": A, "category": "qa"}, TOLD),
    "question/answer": ({"id": 7, "question": Q, "answer": A}, ASKED),
    "GSM8K's references": ({"question": Q, "answer": [A, "Red"]}, {**ASKED, "output": [A, "Red"]}),
    "SQuAD": (
        {"title": "t", "context": "A map.", "question": Q, "answers": {"text": [A], "answer_start": [0]}},
        {**TOLD, "output": [A]},
    ),
    "OpenOrca": ({"system_prompt": "Be brief.", "question": Q, "response": A}, {**ASKED, "system": "Be brief."}),
    "prompt/response": ({"prompt": Q, "response": A}, AS_IT_IS),
    "query/response": ({"query": Q, "response": A}, ASKED),
    "input/output": ({"input": Q, "output": A}, ASKED),
    "FLAN": ({"inputs": Q, "targets": A, "task": "t"}, ASKED),
    "NuminaMath": ({"source": "s", "problem": Q, "solution": A}, ASKED),
    "summaries": ({"article": Q, "highlights": A, "id": "x"}, ASKED),
    "ShareGPT": ({"id": "x", "conversations": [HUMAN, GPT]}, CHAT),
    "ShareGPT in columns": ({"conversations": {"from": ["human", "gpt"], "value": [Q, A]}}, CHAT),
    "ShareGPT's system": (
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]},
        {"messages": [BRIEF, ASK, SAY]},
    ),
    "a column system": ({"system": "Be brief.", "conversations": [HUMAN, GPT]}, {"system": "Be brief.", **CHAT}),
    "role and content": ({"conversations": [ASK, SAY]}, CHAT),
    "LMSYS": ({"conversation_id": "x", "conversation": [ASK, SAY], "model": "m"}, CHAT),
    "messages of ShareGPT": ({"messages": [{"from": "user", "value": Q}, {"from": "Assistant", "value": A}]}, CHAT),
    "messages of a model": ({"messages": [{"role": "human", "content": Q}, {"role": "model", "content": A}]}, CHAT),
    "messages as text": ({"messages": json.dumps([ASK, SAY])}, CHAT),
    "Gemini": (
        {"contents": [{"role": "user", "parts": [{"text": Q}]}, {"role": "model", "parts": [A]}]},
        {"messages": [{**ASK, "content": [{"text": Q}]}, {**SAY, "content": [A]}]},
    ),
    "UltraChat": ({"id": "1", "data": [Q, A]}, CHAT),
    "pairs": (
        {"turns": [["Hi", "Ho"], [Q, A]]},
        {"messages": [{**ASK, "content": "Hi"}, {**SAY, "content": "Ho"}, ASK, SAY]},
    ),
    "MOSS": (
        {"conversation": [{"human": "Hi", "assistant": "Ho"}, {"human": Q, "assistant": A}]},
        {"messages": [{**ASK, "content": "Hi"}, {**SAY, "content": "Ho"}, ASK, SAY]},
    ),
    "XTuner": (
        {"conversation": [{"system": "Be brief.", "input": "Hi", "output": "Ho"}, LAST]},
        {"messages": [BRIEF, {**ASK, "content": "Hi"}, {**SAY, "content": "Ho"}, ASK, SAY]},
    ),
    "a side an entry": ({"turns": [{"User": Q}, {"Assistant": A}]}, CHAT),
    "turns and an answer": ({"prompt": [BRIEF, ASK], "response": A}, {"messages": [BRIEF, ASK, SAY]}),
    "a question and turns": ({"question": Q, "answer": [SAY]}, CHAT),
    "TRL's conversations": ({"prompt": [BRIEF, ASK], "completion": [SAY]}, {"messages": [BRIEF, ASK, SAY]}),
    "TRL's, an answer of text": ({"prompt": [ASK], "completion": A}, {"prompt": [ASK], "completion": [SAY]}),
    "a preference": ({"prompt": Q, "chosen": A, "rejected": "No."}, AS_IT_IS),
    "a preference of turns": ({"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "No."}]}, CHAT),
    "a preference, whole": ({"prompt": Q, "chosen": [ASK, SAY], "rejected": [ASK], "score": 1.0}, CHAT),
    "a preference without prompt": ({"chosen": [ASK, SAY], "rejected": [ASK]}, CHAT),
    "two voices": (
        {"chosen": f"\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": "\n\nHuman: Hi"},
        {"prompt": f"\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: {Q}\n\nAssistant:", "completion": f" {A}"},
    ),
    "Intel's preferences": ({"system": "Be.", "question": Q, "chosen": A, "rejected": "N"}, {**ASKED, "system": "Be."}),
}  # fmt: skip


def sample(row: Row, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Row:
    prepared = prepare([row], tokenizer, **options)
    assert not prepared.rejected
    return prepared.dataset[0]


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize(("row", "standard"), SAME.values(), ids=SAME)
def test_a_format_is_a_standard_one_under_other_names(
    row: Row, standard: Row, template: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = sample(row, tiny_tokenizer, template=template)
    assert found == sample(standard, tiny_tokenizer, template=template)
    assert found["references"][0].strip() == A


def test_what_every_row_may_have_is_kept(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    more = {"sample_id": "mine", "references": ["r", "s"], "tests": "assert f()"}
    for row in ({"question": Q, "answer": A}, {"conversations": [HUMAN, GPT]}, {"prompt": Q, "chosen": A}):
        found = sample({**row, **more}, tiny_tokenizer)
        assert [found[c] for c in more] == ["mine", ["r", "s"], ["assert f()"]]


FIRST = [
    ({"instruction": Q, "output": A}, {"question": "x", "answer": "y", "response": "z", "text": "t", "chosen": "c"}),
    ({"prompt": Q, "completion": A}, {"chosen": "x", "rejected": "y", "response": "z", "query": "q"}),
    (CHAT, {"conversations": [GPT], "prompt": "x", "chosen": [ASK], "rejected": [ASK], "text": "y"}),
    ({"question": Q, "answer": A}, {"solution": "x", "text": "y", "input": "", "output": "z"}),
]


@pytest.mark.parametrize(("row", "more"), FIRST, ids=["instruction", "prompt", "messages", "question"])
def test_further_columns_change_nothing(row: Row, more: Row, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [sample(r, tiny_tokenizer)["input_ids"] for r in (row, {**row, **more}, {**more, **row})]
    assert ids[0] == ids[1] == ids[2]


def test_one_odd_row_does_not_change_the_format_of_the_others(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    dolly = [{"instruction": f"{Q} {i}", "context": "", "response": A} for i in range(9)]
    for rows in ([*dolly, AS_IT_IS], [AS_IT_IS, *dolly], Dataset.from_list([*dolly, ASKED])):
        prepared = prepare(rows, tiny_tokenizer)
        assert len(prepared.dataset) == 9
        assert len(prepared.rejected) == 1
    # A missing answer rejects its row, also where further columns of another format have values.
    rows = [{**ASKED, "output": A if i else None, "question": "x", "answer": "y"} for i in range(3)]
    assert [reason for _, reason in prepare(rows, tiny_tokenizer).rejected] == ["no value in output"]


TEXTS = [
    ("alpaca", ALPACA.format(Q, A), "### Response:\n", A),
    ("alpaca", ALPACA.format(Q, A).replace("Response:\n", "Response: "), "### Response:", f" {A}"),
    ("### Human: {instruction}\n### Assistant: ", f"### Human: Hi### Assistant: Ho### Human: {Q}### Assistant: {A}",
     "### Assistant:", f" {A}"),
    ("[INST] {instruction} [/INST]", f"[INST] {Q} [/INST] {A}", "[/INST]", f" {A}"),
    ("chat", f"<user>{Q}\n<assistant>{A}", "<assistant>", A),
]  # fmt: skip


@pytest.mark.parametrize(("template", "text", "end", "answer"), TEXTS, ids=[x[0][:12] + x[2] for x in TEXTS])
def test_a_template_parts_texts_that_it_made(
    template: str, text: str, end: str, answer: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = sample({"text": text}, tiny_tokenizer, template=template)
    before = text[: text.rindex(end) + len(end)]
    assert {**found, "sample_id": ""} == {
        **sample({"prompt": before, "completion": answer}, tiny_tokenizer, template="alpaca"),
        "sample_id": "",
    }


def test_a_text_that_ends_in_a_special_token_ends_there_once(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    found = sample({"text": ALPACA.format(Q, A) + "<|endoftext|>"}, tiny_tokenizer)
    assert found["input_ids"] == sample({"text": ALPACA.format(Q, A)}, tiny_tokenizer)["input_ids"]
    assert found["references"] == [A]


REFUSED = [
    ({"text": f"### Human: {Q}### Assistant: {A}"}, r'such as template: "### Human: \{instruction\}\\n### Assistant:"'),
    ({"text": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}"}, 'such as template: "chat"'),
    ({"text": Q}, r'such as template: "Q: \{instruction\}\\nA:", or the columns prompt and completion'),
    ({"Question": Q, "Answer": A}, r"columns: \{instruction: Question, output: Answer\}"),
    ({"answer_text": A, "meta": {}, "user query": Q}, r"columns: \{instruction: 'user query', output: answer_text\}"),
    ({"thePrompt": Q, "botReply": A, "id": "x"}, r"columns: \{prompt: thePrompt, completion: botReply\}"),
    ({"frage": Q, "antwort": A}, r"columns: \{instruction: frage, output: antwort\}"),
    ({"translation": {"en": Q, "de": A}}, r"columns: \{instruction: translation.en, output: translation.de\}"),
    ({"thread": [ASK, SAY]}, r"columns: \{messages: thread\}"),
    ({"instruction": Q, "antwort": A}, r"missing \['output'\] for instruction/output rows. .*output: antwort\}"),
    ({"body": Q}, "A row needs two texts.*data_function: FILE.py:FUNCTION"),
    ({"conversations": [{"von": "wem", "value": Q}]}, "turn 1 of conversations does not say who speaks"),
    (
        {"conversations": [{"instruction": Q, "input": "", "output": A}]},
        "turn 1 of conversations does not say who speaks",
    ),
    ({"sql": A, "sql_context": "CREATE TABLE x", "sql_prompt": Q}, r"columns: \{prompt: sql_prompt, completion: sql\}"),
    ({"question": Q, "choices": [A, "Red"], "answer": 1}, "answer must be text or a list of texts, got int"),
    ({"conversations": [{"from": "human"}]}, r"turn 1 of conversations \(human\) says nothing"),
    (
        {"conversations": [HUMAN, {"from": "function_call", "value": "no JSON"}]},
        "turn 2 of conversations calls a",
    ),
    ({"conversations": "Hi"}, "conversations must be a list of .* got str"),
    ({"conversations": [HUMAN]}, "messages need an assistant turn"),
    ({"question": 3, "answer": A}, "question must be text, got int"),
    ({"question": Q, "context": ["a"], "answer": A}, "context must be text, got list"),
    ({"question": Q, "answers": {"text": []}}, "answers must be text or a list of texts, got list"),
    ({"chosen": "Just an answer.", "rejected": "x"}, "chosen is text, and neither a column prompt"),
]


@pytest.mark.parametrize(("row", "complaint"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_a_refusal_says_what_to_type(row: Row, complaint: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        prepare([row, row], tiny_tokenizer)
    assert "\n" not in str(error.value)
    assert "data_function: FILE.py:FUNCTION" in str(error.value)


@pytest.mark.usefixtures("own_registries")
def test_a_registered_format_goes_first(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    register_row_format("mine", ["q", "a"], lambda row: {"instruction": row["q"], "output": row["a"]})
    assert sample({"q": Q, "a": A, **AS_IT_IS, "completion": "x"}, tiny_tokenizer) == sample(ASKED, tiny_tokenizer)
    with pytest.raises(UserError, match="'mine' exists already"):
        register_row_format("mine", ["q"], dict)
    register_row_format("half", ["only"], lambda row: {"instruction": row["only"]})
    with pytest.raises(UserError, match=r"the row format only makes \['instruction'\], which is not a standard"):
        prepare([{"only": Q}], tiny_tokenizer)


def test_columns_that_only_chats_have_a_place_for_are_told(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    sample({**ASKED, "system": "Be brief."}, tiny_tokenizer)
    assert "the column system is not used: only the chat template has a place for it" in caplog.text
    caplog.clear()
    sample({**ASKED, "system": "", "tools": None}, tiny_tokenizer)
    sample({**ASKED, "system": "Be brief."}, tiny_tokenizer, template="chat")
    assert not caplog.text


def test_the_page_names_every_format() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = [set(re.findall("`([a-z_]+)`", line)) for line in page.splitlines() if line.startswith("| ")]
    for each in ROW_FORMATS.things():
        assert any(set(each.columns) <= line for line in lines), each


def test_one_question_needs_no_chat_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    found = sample({"conversations": [HUMAN, GPT]}, plain)
    assert {**found, "sample_id": ""} == {**sample(ASKED, plain), "sample_id": ""}
    more = [{"messages": [BRIEF, ASK, SAY]}, {"messages": [ASK, SAY, ASK, SAY]}, {"system": "Be brief.", **CHAT}]
    for row in more:
        ((_, reason),) = prepare([CHAT, row], plain).rejected
        assert reason.startswith(
            "the tokenizer has no chat template, and a prompt template has place for only one question"
        )
