"""Chat rows are, token for token, what the chat template makes of them, up to the end of the answer's turn."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from srd_fast.data import Answers, PreparedData, Tokenisation, content_id, first_label, prepare_dataset, read_rows
from srd_fast.errors import UserError
from srd_fast.rouge import RougeL

Row = dict[str, Any]
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|call|>", "<|end|>", "<start_of_turn>", "<end_of_turn>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: an answer has a think block, empty or not, which earlier answers lose.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <|endoftext|>{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}<|endoftext|>{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.name %} {{ m.name }}{% endif %}{{ '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
TEXTUAL = "{% for m in messages %}<{{ m.role }}>{{ m.content }}[END]\n{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS_THOUGHTS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
DATED = "{{ strftime_now('%d %b %Y') }} " + CHATML


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """With the marks of many templates. Each test gives it the template that it needs."""
    made = tiny.tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return made


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


def prepare(rows: list[Row], tokenizer: PreTrainedTokenizerFast, chat: str, **options: Any) -> PreparedData:
    tokenizer.chat_template = chat
    return prepare_dataset(rows, Tokenisation(tokenizer, **options))


def parts(row: Row, tokenizer: PreTrainedTokenizerFast, chat: str, **options: Any) -> tuple[str, str, list[str]]:
    """Prompt and answer as they are trained, and the references."""
    sample = prepare([row], tokenizer, chat, **options).dataset[0]
    start = first_label(sample["labels"])
    assert sample["labels"][start:] == sample["input_ids"][start:]
    assert tokenizer.decode(sample["input_ids"][:start]) == sample["prompt"]
    return sample["prompt"], tokenizer.decode(sample["input_ids"][start:]), sample["references"]


@pytest.mark.parametrize(
    ("chat", "prompt", "answer"),
    [
        (CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", " red\n<|im_end|>"),
        (
            THINKING,
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\n red\n<|im_end|>",
        ),
        (GEMMA, "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n", "red<end_of_turn>"),
        (LLAMA2, "<s>[INST] hi [/INST]", "  red\n <|endoftext|>"),
        (PHI, "<user>hi<|end|><assistant>", " red\n<|end|>"),
        (TEXTUAL, "<user>hi[END]\n<assistant>", " red\n[END]<|endoftext|>"),
        (TEXTUAL.replace("[END]", ""), "<user>hi\n<assistant>", " red\n<|endoftext|>"),
    ],
    ids=["chatml", "thinking", "gemma", "llama 2", "phi", "end that is text", "no end"],
)
def test_an_answer_is_what_the_template_makes_of_it(
    chat: str, prompt: str, answer: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"messages": [user("hi"), assistant(" red\n")]}
    assert parts(row, tokenizer, chat) == (prompt, answer, [" red\n"])
    for same in ({"instruction": "hi", "output": " red\n"}, {"prompt": "hi", "completion": " red\n"}):
        assert parts(same, tokenizer, chat, template="chat") == (prompt, answer, [" red\n"])


def test_thoughts_of_the_answer_are_trained_and_those_before_are_as_the_template_has_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns = [user("hi"), assistant("<think>a</think>red"), user("more"), assistant("blue", reasoning_content="hm")]
    prompt, answer, references = parts({"messages": turns}, tokenizer, THINKING)
    assert prompt.endswith("assistant\nred<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n")
    assert (answer, references) == ("<think>\nhm\n</think>\n\nblue<|im_end|>", ["blue"])


def test_variables_of_the_template_are_settings(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": [user("hi"), assistant("red")]}
    prompt, answer, _ = parts(row, tokenizer, THINKING, chat_template_kwargs={"enable_thinking": False})
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert answer == "red<|im_end|>"
    for kwargs, complaint in (
        ({"tools": []}, "has 'tools'"),
        ({"messages": 1}, "has 'messages'"),
        ({"x": object()}, "what JSON can"),
        (["x"], "names with values"),
        ({"strftime_now": "today"}, "must be a date such as 2025-01-31"),
    ):
        with pytest.raises(UserError, match=complaint):
            Tokenisation(tokenizer, chat_template_kwargs=kwargs)  # type: ignore[arg-type]


def test_tools_and_their_calls_and_names_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "sky", "parameters": {}}}
    call = {"type": "function", "id": None, "function": {"name": "sky", "arguments": '{"day": 1, "at": null}'}}
    asked = [user("sun?"), assistant(None, tool_calls=[call])]
    whole = [*asked, {"role": "tool", "name": "sky", "content": "sun"}, assistant("sunny", tool_calls=None)]
    schema, called = json.dumps([tool]), '<tool_call>sky {"day": 1, "at": null}</tool_call>'
    for tools in ([tool], schema):
        prompt, answer, references = parts({"messages": asked, "tools": tools}, tokenizer, TOOLS)
        assert prompt == f"{schema}<|im_start|>user\nsun?<|im_end|><|im_start|>assistant\n"
        assert (answer, references) == (f"{called}<|call|>", [called])
        prompt, answer, references = parts({"messages": whole, "tools": tools}, tokenizer, TOOLS)
        assert f"{called}<|call|><|im_start|>tool sky\nsun<|im_end|>" in prompt
        assert (answer, references) == ("sunny<|im_end|>", ["sunny"])
    bare, _, _ = parts({"messages": asked, "tools": None}, tokenizer, TOOLS)
    assert bare.startswith("<|im_start|>user")


def test_rows_that_differ_in_their_tools_or_system_text_have_ids_of_their_own(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    turns = {"messages": [user("hi"), assistant("red")]}
    rows = [turns, {**turns, "tools": [{"name": "f"}]}, {**turns, "system": "Be brief."}, {**turns, "system": ""}]
    ids = prepare(rows, tokenizer, TOOLS).dataset["sample_id"][:]
    assert ids[0] == content_id(turns, ("messages",))
    assert ids[3] == f"{ids[0]}-1"
    assert len(set(ids)) == 4


def test_a_system_column_is_the_first_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    turns = [user("hi"), assistant("red")]
    own = [{"role": "system", "content": "Be brief."}, *turns]
    for row in (
        {"system": "Be brief.", "messages": turns},
        {"system": "Be brief.", "messages": own},
        {"system": None, "messages": own},
        {"system": "Be brief.", "instruction": "hi", "output": "red"},
    ):
        assert parts(row, tokenizer, CHATML, template="chat")[0] == expected
    reasons = [why for _, why in prepare([{"system": x, "messages": own} for x in ("", "Other", 3)],
                                         tokenizer, CHATML).rejected]  # fmt: skip
    assert "another text in the column system" in reasons[0]
    assert "system must be text, got int" in reasons[1]


def test_a_content_may_be_parts_of_text_and_a_template_may_want_them(tokenizer: PreTrainedTokenizerFast) -> None:
    listed = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]
    row = {"messages": [user(listed), assistant([{"type": "text", "text": "Hi."}])]}
    expected = parts({"messages": [user("Say hi."), assistant("Hi.")]}, tokenizer, CHATML)
    assert parts(row, tokenizer, CHATML) == expected
    wants = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    assert parts(row, tokenizer, wants) == expected
    good = {"messages": [user("hi"), assistant("red")]}
    image = {"messages": [user([{"type": "image", "url": "x"}]), assistant("red")]}
    assert (
        "turn 1 (user) of messages has a part of type 'image'"
        in prepare([good, image], tokenizer, CHATML).rejected[0][1]
    )


def test_keys_that_parquet_fills_with_nothing_count_as_absent(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    call = {"function": {"name": "sky", "arguments": '{"day": 1}'}}
    rows = [
        {"messages": [user("sun?"), assistant(None, tool_calls=[call])], "tools": [{"name": "sky"}]},
        {"messages": [user("hi"), assistant("red")], "tools": [{"of": {"x": 1}}, {"name": "a"}]},
    ]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    read = prepare(read_rows(tmp_path / "x.parquet"), tokenizer, TOOLS).dataset
    assert read["input_ids"][:] == prepare(rows, tokenizer, TOOLS).dataset["input_ids"][:]


def test_a_template_that_cannot_say_where_the_answer_begins_rejects_the_row(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    good = {"messages": [user("hi"), assistant("<think>\nx")]}
    bad = {"messages": [user("hi"), assistant("red")]}
    prepared = prepare([good, bad], tokenizer, OPENS_THOUGHTS)
    assert len(prepared.dataset) == 1
    assert "the chat template does not say where the answer begins: the prompt ends in" in prepared.rejected[0][1]
    rewrites = "{% if messages | length > 1 %}long{% endif %}" + CHATML
    with pytest.raises(UserError, match="does not say where the answer begins"):
        prepare([bad], tokenizer, rewrites)


def test_a_generation_prompt_that_spells_the_turn_otherwise_gives_way_to_the_turn(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    spelt = CHATML.replace("{{ m.role }}\n", "{{ m.role }} {{ m.name }}\n")
    prompt, answer, _ = parts({"messages": [user("hi"), assistant("red")]}, tokenizer, spelt)
    assert (prompt[-23:], answer) == ("<|im_start|>assistant \n", "red<|im_end|>")
    assert "prompts end in the latter" in caplog.text


@pytest.mark.parametrize(
    ("marked", "prompt", "answer"),
    [
        ("{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n", "assistant\n", "red<|im_end|>"),
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", "assistant\n", "red<|im_end|>"),
        (
            "<think></think>{%- generation -%}{{ m.content }}<|im_end|>{%- endgeneration -%}\n",
            "assistant\n<think></think>",
            "red<|im_end|>",
        ),
    ],
)
def test_generation_marks_say_where_the_answer_begins(
    marked: str, prompt: str, answer: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = CHATML.replace(
        "{{ m.content }}<|im_end|>\n",
        "{% if m.role == 'assistant' %}" + marked + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
    )
    turns = [user("hi"), assistant("a"), user("more"), assistant("red")]
    found = parts({"messages": turns}, tokenizer, chat)
    assert found[0].endswith("more<|im_end|>\n<|im_start|>" + prompt)
    assert found[1:] == (answer, ["red"])


def test_generation_marks_that_leave_the_answer_out_reject_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = CHATML.replace("{{ m.content }}", "{% if loop.first %}{% generation %}{{ m.content }}{% endgeneration %}"
                          "{% else %}{{ m.content }}{% endif %}")  # fmt: skip
    with pytest.raises(UserError, match="marks leave the answer out"):
        prepare([{"messages": [user("hi"), assistant("red")]}], tokenizer, chat)


def pretend(day: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Then":
            return cls(2031, 5, day, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


def test_prompts_are_the_same_tomorrow(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"messages": [user("hi"), assistant("red")]}
    tokenizer.chat_template = DATED
    prompts = []
    for day in (6, 7):
        pretend(day, monkeypatch)
        assert tokenizer.apply_chat_template(row["messages"], tokenize=False).startswith(f"0{day} May 2031 ")
        prompts.append(parts(row, tokenizer, DATED)[0])
    assert prompts[0] == prompts[1]
    assert prompts[0].startswith("01 Jan 2025 <|im_start|>user")
    for given in ("2026-11-27", datetime(2026, 11, 27).date()):
        prompt, _, _ = parts(row, tokenizer, DATED, chat_template_kwargs={"strftime_now": given})
        assert prompt.startswith("27 Nov 2026 <|im_start|>user")


# Long chats


def test_the_oldest_turns_go_first_and_neither_the_system_turn_nor_the_question(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    strict = (
        "{% set ns = namespace(turns=messages) %}{% if messages[0].role == 'system' %}"
        "{% set ns.turns = messages[1:] %}{% endif %}{% for m in ns.turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% endfor %}" + CHATML
    )
    system, question = {"role": "system", "content": "Be brief."}, user("And now the last question?")
    older = [t for n in range(20) for t in (user(f"question {n} " * 5), assistant(f"answer {n} " * 5))]
    row = {"messages": [system, *older, question, assistant("Yes.")]}
    prepared = prepare([row], tokenizer, strict, max_prompt_length=400)
    sample, dropped = prepared.dataset[0], prepared.cuts["turns_dropped"]
    assert dropped % 2 == 0
    assert 0 < dropped < 40
    kept = [system, *older[dropped:], question]
    assert sample["prompt"] == tokenizer.apply_chat_template(kept, tokenize=False, add_generation_prompt=True)
    more = [system, *older[dropped - 2 :], question]
    longer = tokenizer.apply_chat_template(more, tokenize=False, add_generation_prompt=True)
    assert first_label(sample["labels"]) <= 400 < len(tokenizer(longer).input_ids)
    assert (prepared.cuts["prompts_cut"], prepared.cuts["responses_cut"]) == (0, 0)
    assert f"0 prompts and 0 responses are cut, and {dropped} turns dropped" in caplog.text


def test_then_the_question_loses_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [user("first"), assistant("second"), user("long " * 200), assistant("x")]
    prepared = prepare([{"messages": turns}], tokenizer, CHATML, max_prompt_length=80)
    prompt = prepared.dataset[0]["prompt"]
    assert prompt.startswith("<|im_start|>user\nlong long")
    assert ("long " * 200).startswith(prompt.removesuffix("<|im_end|>\n<|im_start|>assistant\n").split("\n")[1])
    assert 70 <= first_label(prepared.dataset[0]["labels"]) <= 80
    assert prepared.cuts == {"prompts_cut": 1, "turns_dropped": 2}
    with pytest.raises(UserError, match="without its older turns and its question the chat is still longer"):
        prepare(
            [{"messages": [{"role": "system", "content": "x " * 99}, *turns]}], tokenizer, CHATML, max_prompt_length=80
        )


def test_what_a_question_led_to_stays_with_it(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"function": {"name": "sky", "arguments": {}}}
    step = [assistant("", tool_calls=[call]), {"role": "tool", "name": "sky", "content": "sun"}]
    turns = [user("old " * 30), *step, assistant("Sunny."), user("And now?"), *step, assistant("Still.")]
    prepared = prepare([{"messages": turns}], tokenizer, TOOLS, max_prompt_length=120)
    assert prepared.dataset[0]["prompt"].startswith(
        "<|im_start|>user\nAnd now?<|im_end|><|im_start|>assistant\n<tool_call>"
    )
    assert prepared.cuts == {"turns_dropped": 4, "prompts_cut": 0}


def test_an_answer_that_is_cut_has_no_end(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": [user("hi"), assistant("one two three four")]}
    whole = prepare([row], tokenizer, CHATML).dataset[0]
    size = len(whole["input_ids"]) - first_label(whole["labels"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert whole["input_ids"][-1] == end
    for limit in (1, size - 1, size):
        prepared = prepare([row], tokenizer, CHATML, max_response_length=limit)
        assert prepared.dataset[0]["input_ids"] == whole["input_ids"][: first_label(whole["labels"]) + limit]
        assert prepared.cuts["responses_cut"] == (limit < size)


# Answers of the student


def test_answers_end_where_the_template_ends_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    eos, end, thought = (tokenizer.convert_tokens_to_ids(t) for t in (tiny.EOS, "<|im_end|>", "</think>"))
    rows = [{"messages": [user("hi"), assistant(text)]} for text in ("red", "a b c d e f g", "")]
    samples = prepare(rows, tokenizer, THINKING, max_response_length=12).dataset
    assert Answers(samples, tokenizer).ends == {eos, end}
    plain = prepare([{"instruction": "a", "output": "b"}], tokenizer, CHATML).dataset
    assert Answers(plain, tokenizer).stop_ids == ()
    tokenised = [
        {"input_ids": [1, 2, end, 3, 4, thought, 5, end, 3], "labels": [-100, 2, end, -100, 4, thought, 5, end, -100]}
    ]
    assert Answers(prepare(tokenised, tokenizer, CHATML).dataset, tokenizer).stop_ids == (end,)


@pytest.mark.parametrize("chat", [CHATML, THINKING, GEMMA, LLAMA2, PHI])
def test_a_perfect_answer_scores_one(chat: str, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": [user("hi"), assistant(text)]} for text in ("red", "The <|im_end|> of it", "green and blue")]
    samples = prepare(rows, tokenizer, chat).dataset
    answers = Answers(samples, tokenizer)
    texts = [answers.text(i, [x for x in y if x != -100] + [70, 71]) for i, y in enumerate(samples["labels"])]
    assert RougeL().score_all(texts, samples["references"][:]) == [1.0] * 3
    assert texts[0] == "red"


@pytest.mark.parametrize(
    "turns",
    [
        [user("w?"), assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])],
        [user("w?"), assistant("so", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])],
        [user("w?"), {"role": "tool", "content": "SUNNY"}, assistant("fine")],
    ],
    ids=["a call", "a call beside words", "a result"],
)
def test_calls_and_results_that_the_template_leaves_out_reject_the_row(
    turns: list[Row], tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = (
        "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [{"messages": turns}, {"messages": [user("hi"), assistant("hello")]}]
    found = prepare(rows, tokenizer, plain)
    assert len(found.dataset) == 1
    assert "the chat template leaves out" in found.rejected[0][1]


def test_thoughts_that_the_template_takes_out_are_no_part_of_the_reference(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1].strip() }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = [{"messages": [user("a"), assistant(f"<think>\nhmm {i}\n</think>\n\nfour {i}")]} for i in range(3)]
    made = prepare(rows, tokenizer, chat).dataset
    assert made["references"][:] == [[f"four {i}"] for i in range(3)]
    answers = Answers(made, tokenizer)
    labels = [[x for x in row if x != -100] for row in made["labels"]]
    scores = [RougeL().score(answers.text(i, ids), made[i]["references"]) for i, ids in enumerate(labels)]
    assert scores == [1.0, 1.0, 1.0]
