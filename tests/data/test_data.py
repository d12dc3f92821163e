"""Rows of every format become the same samples, with ids that stay, and no row gets lost without a word."""

import copy
import gc
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from srd_fast.data import (
    IGNORE_INDEX,
    TOKENISED_FEATURES,
    DistillationCollator,
    PreparedData,
    Tokenisation,
    batches_by_length,
    content_id,
    first_label,
    pad_id,
    prepare_dataset,
    read_rows,
    read_source,
)
from srd_fast.data.encoding import TextEncoder
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError

Row = dict[str, Any]
ROWS: list[Row] = [
    {"instruction": "Say hi.", "input": "", "output": "Hi."},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Name the sea — 海?", "output": "Naïve\u2028sea"},
]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hi.\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
)


def prepare(rows: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> PreparedData:
    return prepare_dataset(rows, Tokenisation(tokenizer, **options))


def one(row: Row, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Row:
    return prepare([row], tokenizer, **options).dataset[0]


def response_of(sample: Row) -> list[int]:
    return [x for x in sample["labels"] if x != IGNORE_INDEX]


def json_lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# Files


def _parquet(path: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(str(path))
    return path


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "json lines": lambda d: _written(d / "x.jsonl", json_lines(ROWS).encode()),
    "json lines called json": lambda d: _written(d / "x.json", json_lines(ROWS).encode()),
    "json array": lambda d: _written(d / "x.json", ("\n " + json.dumps(ROWS, indent=2)).encode()),
    "gzip": lambda d: _written(d / "x.jsonl.gz", gzip.compress(json_lines(ROWS).encode())),
    "gzipped array": lambda d: _written(d / "x.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "byte order mark": lambda d: _written(d / "x.jsonl", b"\xef\xbb\xbf" + json_lines(ROWS).encode()),
    "CRLF": lambda d: _written(d / "x.jsonl", json_lines(ROWS).replace("\n", "\r\n").encode()),
    "blank lines": lambda d: _written(d / "x.jsonl", ("\n \n" + json_lines(ROWS).replace("\n", "\n\n\t\n")).encode()),
    "no end of line at the end": lambda d: _written(d / "x.jsonl", json_lines(ROWS).rstrip("\n").encode()),
    "parquet": lambda d: _parquet(d / "x.parquet"),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = read_rows(FILES[kind](tmp_path))
    assert [{k: v for k, v in row.items() if v is not None} for row in rows] == ROWS


DAMAGED = {
    "broken line": ("x.jsonl", b'{"a": 1}\n\n{"a": 2}\n{"a": \n{"a": 3}\n', r"x\.jsonl', line 4: not valid JSON"),
    "line with a list": ("x.jsonl", b'{"a": 1}\n[1]\n', r"line 2: expected an object, got list"),
    "array with a text": ("x.json", b'[{"a": 1}, "b"]', r"expected an object, got str"),
    "array without end": ("x.json", b'[{"a": 1},', r"x\.json' is not valid JSON"),
    "empty": ("x.jsonl", b"", r"x\.jsonl' is empty"),
    "only blanks": ("x.jsonl", b"\n \n", r"x\.jsonl' is empty"),
    "empty array": ("x.json", b"[]", r"x\.json' is empty"),
    "Latin-1": ("x.jsonl", b'{"a": "\xe9"}\n', r"x\.jsonl', line 1: not UTF-8: byte 7 is 0xe9"),
    "UTF-16": ("x.jsonl", '{"a": "é"}\n'.encode("utf-16"), r"x\.jsonl' is UTF-16 or UTF-32; write it as UTF-8"),
    "nested too deeply": ("x.jsonl", b'{"a": 1}\n' + b'{"a":' * 9999, r"line 2: not usable JSON: nested too deeply"),
    "array nested too deeply": ("x.json", b"[" * 9999, r"x\.json' is not usable JSON: nested too deeply"),
    "list in the first line": ("x.jsonl", b'[1]\n{"a": 1}\n', r"line 1: expected an object, got list"),
    "no parquet": ("x.parquet", b"PAR1 and then nothing", r"x\.parquet' is not readable parquet"),
    "no gzip": ("x.jsonl.gz", b"no gzip at all", r"x\.jsonl\.gz' cannot be read"),
    "gzip cut off": ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], r"x\.jsonl\.gz' cannot be read"),
    "gzip with wrong bits": ("x.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 40, r"x\.jsonl\.gz' cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_with_their_name(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        read_rows(_written(tmp_path / name, content))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl' does not exist"):
        read_rows("nowhere.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl' does not exist; addresses are not read: download it"):
        read_rows("https://example.org/rows.jsonl")
    with pytest.raises(UserError, match="is a folder without files of rows"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match=r"'someone/some-data' is not a local file, and as a hub name it fails"):
        read_rows("someone/some-data")


# Formats


def test_all_formats_of_one_dialogue_agree(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = "<user>Say hi.\n<assistant>"
    rows = [
        {"instruction": "Say hi.", "input": None, "output": "Hi."},
        {"prompt": "Say hi.", "completion": "Hi."},
        {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
    ]
    samples = [one(row, tiny_tokenizer, template="chat") for row in rows]
    ids = tiny_tokenizer(prompt).input_ids + tiny_tokenizer("Hi.").input_ids + [tiny_tokenizer.eos_token_id]
    for sample in samples:
        assert (sample["prompt"], sample["references"], sample["input_ids"]) == (prompt, ["Hi."], ids)
    tokenised = {"input_ids": samples[0]["input_ids"], "labels": samples[0]["labels"]}
    again = one(tokenised, tiny_tokenizer)
    assert {**again, "sample_id": ""} == {**samples[0], "sample_id": ""}


def test_labels_are_the_response_and_its_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = one(ROWS[1], tiny_tokenizer)
    start = first_label(sample["labels"])
    assert tiny_tokenizer.decode(sample["input_ids"][:start]) == sample["prompt"]
    assert sample["labels"] == [IGNORE_INDEX] * start + sample["input_ids"][start:]
    assert sample["input_ids"][start:] == [*tiny_tokenizer("3").input_ids, tiny_tokenizer.eos_token_id]


def test_the_first_of_several_references_is_trained_on(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = one({"instruction": "Greet.", "output": ["Hi.", "Hello."]}, tiny_tokenizer)
    assert sample["references"] == ["Hi.", "Hello."]
    assert tiny_tokenizer.decode(response_of(sample), skip_special_tokens=True) == "Hi."


def test_a_column_of_references_counts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "Greet.", "output": "Hi.", "references": ["Hi.", "Hello."]}
    assert one(row, tiny_tokenizer)["references"] == ["Hi.", "Hello."]


def test_a_prompt_is_taken_as_it_stands(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = one({"prompt": "Q: {x}\nA:", "completion": " {y}"}, tiny_tokenizer)
    assert sample["prompt"] == "Q: {x}\nA:"
    assert tiny_tokenizer.decode(sample["input_ids"], skip_special_tokens=True) == "Q: {x}\nA: {y}"


def test_several_turns_end_in_the_last_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
        {"role": "user", "content": "left over"},
    ]
    sample = one({"messages": turns}, tiny_tokenizer)
    assert sample["prompt"] == tiny_tokenizer.apply_chat_template(turns[:4], tokenize=False, add_generation_prompt=True)
    assert sample["prompt"].endswith("<user>Bye\n<assistant>")
    assert sample["references"] == ["See you"]


def test_files_of_turns_and_tokens_survive_parquet(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    turns = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    tokens = [{"input_ids": [5, 6, 0], "labels": [-100, 6, 0]}]
    for rows in (turns, tokens):
        Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
        read = read_rows(tmp_path / "x.parquet")
        assert list(prepare(read, tiny_tokenizer).dataset) == list(prepare(rows, tiny_tokenizer).dataset)


def test_tokenised_rows_keep_their_texts(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"input_ids": [5, 6, 0], "labels": [-100, 6, 0], "prompt": "P", "references": ["r", "s"]}
    sample = one(row, tiny_tokenizer)
    assert (sample["prompt"], sample["references"]) == ("P", ["r", "s"])


def test_prepared_data_passes_unchanged(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepare(ROWS, tiny_tokenizer).dataset
    assert data.features == TOKENISED_FEATURES
    assert prepare(data, tiny_tokenizer).dataset is data


def test_tokenised_data_of_older_versions_gets_the_column_of_tests(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = prepare(ROWS, tiny_tokenizer).dataset
    taken = prepare(data.remove_columns("tests"), tiny_tokenizer, max_prompt_length=1, max_response_length=1).dataset
    assert taken.features == TOKENISED_FEATURES
    assert list(taken) == list(data)


@pytest.mark.parametrize(
    ("tests", "kept"),
    [("assert f() == 1", ["assert f() == 1"]), (["a", "b"], ["a", "b"]), ([], []), ("", []), (None, [])],
)
def test_tests_are_kept_and_change_no_id(tests: Any, kept: list[str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for row in GOOD_ROWS:
        sample = one({**row, "tests": tests}, tiny_tokenizer)
        assert sample["tests"] == kept
        assert sample == {**one(row, tiny_tokenizer), "tests": kept}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"instruction": "a"}, r"columns \['instruction'\]; missing \['output'\] for instruction/output rows"),
        ({"prompt": "a", "id": "b"}, r"missing \['completion'\] for prompt/completion rows"),
        ({"input_ids": [1]}, r"missing \['labels'\]"),
        ({"body": "a"}, r"columns \['body'\], which fit no row format. A row needs two texts"),
    ],
)
def test_missing_columns_are_named(row: Row, complaint: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=complaint):
        prepare([row], tiny_tokenizer)


def test_no_rows_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="data is empty"):
        prepare([], tiny_tokenizer)
    with pytest.raises(UserError, match="data is empty"):
        prepare(prepare(ROWS, tiny_tokenizer).dataset.select([]), tiny_tokenizer)


def turn(role: Any, content: Any = "text") -> Row:
    return {"role": role, "content": content}


BAD_ROWS = [
    ({"instruction": 5, "output": "x"}, "instruction must be text, got int"),
    ({"instruction": None, "output": "x"}, "no value in instruction"),
    ({"instruction": "a"}, "no value in output"),
    ({"instruction": "a", "input": ["b"], "output": "x"}, "input must be text, got list"),
    ({"instruction": "a", "output": 3.5}, "output must be text or a list of texts, got float"),
    ({"instruction": "a", "output": []}, "output must be text or a list of texts"),
    ({"instruction": "a", "output": ["x", None]}, "output must be text or a list of texts"),
    ({"instruction": "lone \ud800", "output": "x"}, ""),
    ({"instruction": "a", "output": "lone \udfff"}, ""),
    ({"prompt": {"text": "a"}, "completion": "x"}, "prompt must be text, got dict"),
    ({"prompt": "", "completion": "x"}, "the prompt is empty"),
    ({"prompt": "a", "completion": True}, "completion must be text or a list of texts, got bool"),
    ({"messages": "Hi"}, "messages must be a list of"),
    ({"messages": [turn("user"), {"role": "assistant"}]}, "messages must be a list of"),
    ({"messages": [turn("user"), turn("assistant", None)]}, "messages must be a list of"),
    ({"messages": [turn("user")]}, "messages need an assistant turn"),
    ({"messages": [turn("assistant")]}, "messages need an assistant turn after a user turn"),
    ({"messages": []}, "messages need an assistant turn"),
    ({"input_ids": [1, 2, 3], "labels": [-100, 2]}, "lists of the same length"),
    ({"input_ids": "1 2", "labels": [-100, 2, 1]}, "lists of the same length"),
    ({"input_ids": [1, 2.0], "labels": [-100, 2]}, "must hold whole numbers"),
    ({"input_ids": [1, True], "labels": [-100, 1]}, "must hold whole numbers"),
    ({"input_ids": [1, 400], "labels": [-100, 5]}, "token id 400 is outside the tokenizer's 400"),
    ({"input_ids": [-1, 2], "labels": [-100, 2]}, "token id -1 is outside"),
    ({"input_ids": [1, 2], "labels": [-100, -1]}, "token id -1 is outside"),
    ({"input_ids": [1, 2], "labels": [-100, -100]}, "at least one token with loss"),
    ({"input_ids": [1, 2], "labels": [1, 2]}, "-100 over the prompt"),
    ({"input_ids": [], "labels": []}, "at least one token with loss"),
    ({"input_ids": [1] * 1025, "labels": [-100] + [1] * 1024}, "1025 tokens, above max_prompt_length"),
    ({"input_ids": [1, 2], "labels": [-100, 2], "references": "sea"}, "references"),
    ({"input_ids": [1, 2], "labels": [-100, 2], "references": [3]}, "references"),
    ({"input_ids": [1, 2], "labels": [-100, 2], "prompt": ["text"]}, "prompt"),
    ({"input_ids": [1, 2], "labels": [-100, 2], "tests": 3}, "tests must be text or a list of texts, got int"),
    ({"instruction": "a", "output": "x", "tests": False}, "tests must be text or a list of texts, got bool"),
    ({"instruction": "a", "output": "x", "tests": ["a", ["b"]]}, "tests must be text or a list of texts"),
    ({"prompt": "a", "completion": "x", "tests": ["a", None]}, "tests must be text or a list of texts"),
    ({"prompt": "a", "completion": "x", "tests": {"a": "b"}}, "tests must be text or a list of texts, got dict"),
    ({"messages": [turn("user"), turn("assistant")], "tests": "lone \ud800"}, "half of a surrogate pair"),
]
GOOD_ROWS = [
    {"instruction": "Say hi.", "output": "Hi."},
    {"prompt": "Say hi.", "completion": "Hi."},
    {"messages": [turn("user"), turn("assistant")]},
    {"input_ids": [5, 6], "labels": [-100, 6]},
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS, ids=[f"{i}-{r[1][:30]}" for i, r in enumerate(BAD_ROWS)])
def test_bad_rows_are_listed_with_number_and_reason(
    bad: Row, reason: str, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    good = max(GOOD_ROWS, key=lambda g: len(set(bad) & set(g)))
    rows = [good, bad, good, bad]
    prepared = prepare(rows, tiny_tokenizer)
    assert len(prepared.dataset) + len(prepared.rejected) == len(rows)
    assert [where.split(" (")[0] for where, _ in prepared.rejected] == ["row 2", "row 4"]
    assert all(reason in why for _, why in prepared.rejected)
    assert "2 of 4 rows rejected" in caplog.text


def test_no_usable_row_is_an_error_with_the_first_reason(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"none of 2 rows is usable; first: row 1 .*output must be text"):
        prepare([{"instruction": "a", "output": 1}] * 2, tiny_tokenizer)


def mixed(count: int) -> list[Row]:
    return [
        *({"prompt": "Say hi.", "completion": str(i)} for i in range(count)),
        ROWS[0],
        {"prompt": "a"},
        {"text": "b"},
    ]


def test_the_format_is_that_of_most_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for rows in (mixed(3), mixed(3)[::-1], Dataset.from_list(mixed(3))):
        prepared = prepare(rows, tiny_tokenizer)
        assert sorted(r[0] for r in prepared.dataset["references"]) == ["0", "1", "2"]
        assert len(prepared.rejected) == 3
    (_, first), (_, second), (_, third) = prepare(mixed(3), tiny_tokenizer).rejected
    other = "the columns of this row are ['input', 'instruction', 'output']"
    assert first == f"no value in prompt, completion; {other}"
    assert second == "no value in completion"
    assert third == "no value in prompt, completion; the columns of this row are ['text']"


def test_lines_of_the_file_are_the_places(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines = [b"", b"{", json.dumps(ROWS[0]).encode(), b" ", b"[1]", b'{"instruction": "\xff"}', b'{"output": "x"}']
    rows = read_source(_written(tmp_path / "x.jsonl", b"\n".join(lines)))
    prepared = prepare(rows, tiny_tokenizer)
    assert len(prepared.dataset) == 1
    assert [(where.split(" (")[0], why.split(" (")[0]) for where, why in prepared.rejected] == [
        ("line 2", "not valid JSON"),
        ("line 5", "expected an object, got list"),
        ("line 6", "not UTF-8: byte 17 is 0xff; save the file in UTF-8"),
        ("line 7", "no value in instruction"),
    ]
    assert [row.where for row in read_source(_parquet(tmp_path / "x.parquet"))] == ["row 1", "row 2", "row 3"]


def test_lines_may_end_in_carriage_returns(tmp_path: Path) -> None:
    text = json_lines(ROWS).replace("\n", "\r")
    assert read_rows(_written(tmp_path / "x.jsonl", text.encode())) == ROWS


@pytest.mark.parametrize(
    ("most", "stops"), [(0, True), (1, True), (2, False), (0.1, True), (0.2, False), (None, False)]
)
def test_more_bad_rows_than_allowed_are_an_error(
    most: int | float | None, stops: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"instruction": 5, "output": "x"}, *(ROWS * 3)[:8], {"instruction": "a"}]
    tokenisation = Tokenisation(tiny_tokenizer)
    if not stops:
        assert len(prepare_dataset(rows, tokenisation, "data", most).rejected) == 2
        return
    with pytest.raises(UserError) as error:
        prepare_dataset(rows, tokenisation, "data", most)
    message = str(error.value)
    assert f"data: 2 of 10 rows rejected, more than max_bad_rows={most}; mend them, or raise" in message
    assert "row 1 (" in message
    assert "): instruction must be text, got int; row 10 (" in message


@pytest.mark.parametrize("given", [[1], {"a": 1}, "\ud800"])
def test_ids_that_cannot_be_written_reject_their_row(given: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = prepare([{**ROWS[0], "sample_id": "a"}, {**ROWS[1], "sample_id": given}], tiny_tokenizer)
    assert prepared.dataset["sample_id"][:] == ["a"]
    assert "sample_id" in prepared.rejected[0][1]


def test_a_chat_template_that_refuses_a_row_rejects_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    core = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    strict = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    refuse = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    strict.chat_template = refuse + str(tiny_tokenizer.chat_template)
    good = [turn("user"), turn("assistant")]
    prepared = prepare([{"messages": good}, {"messages": [turn("system"), *good]}], strict)
    assert len(prepared.dataset) == 1
    assert prepared.rejected[0][1] == "the chat template fails: Roles must alternate"


# Ids


def test_ids_say_what_the_row_says_and_nothing_else(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[Row] = [dict(row) for row in make_quickstart_rows(40, seed=1)]
    expected = dict(zip((r["output"] + r["instruction"] + r["input"] for r in rows), ids_of(rows, tiny_tokenizer)))
    assert len(set(expected.values())) == 40
    shuffled = [{k: row[k] for k in random.Random(0).sample(sorted(row), len(row))} for row in rows]
    shuffled = [{**row, "topic": "another"} for row in random.Random(1).sample(shuffled, 40)]
    found = dict(zip((r["output"] + r["instruction"] + r["input"] for r in shuffled), ids_of(shuffled, tiny_tokenizer)))
    assert found == expected
    changed = [{**row, "output": row["output"] + "!"} for row in rows]
    assert not set(ids_of(changed, tiny_tokenizer)) & set(expected.values())
    of_inputs = ids_of([ROWS[1], {**ROWS[1], "input": "2 1"}, {**ROWS[1], "input": ""}], tiny_tokenizer)
    assert len({i.partition("-")[0] for i in of_inputs}) == 3


def ids_of(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return list(prepare(rows, tokenizer).dataset["sample_id"])


def test_ids_stay_the_same_between_versions() -> None:
    row = {"instruction": "Say hi.", "output": ["Hi.", "Ä"], "topic": "x"}
    assert content_id(row, ("instruction", "output", "input")) == "1ed44834844c9860"
    assert content_id({**row, "input": ""}, ("output", "input", "instruction")) == "1ed44834844c9860"
    assert content_id({**row, "input": "x"}, ("instruction", "output", "input")) != "1ed44834844c9860"


def test_repeated_content_is_numbered(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, third, other = ids_of([ROWS[0], ROWS[0], ROWS[0], ROWS[1]], tiny_tokenizer)
    assert [second, third] == [f"{first}-1", f"{first}-2"]
    assert other not in (first, second, third)


def test_ids_of_the_user_are_kept_or_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{**row, "sample_id": i} for row, i in zip(ROWS, ["b", 7, "a"])]
    assert ids_of(rows, tiny_tokenizer) == ["b", "7", "a"]
    with pytest.raises(UserError, match="sample_id 'b' is used by 2 rows"):
        prepare([*rows, {**ROWS[0], "sample_id": "b"}], tiny_tokenizer)
    with pytest.raises(UserError, match="row 4 has no sample_id while others have one"):
        prepare([*rows, ROWS[0]], tiny_tokenizer)


# Templates


def test_alpaca_is_the_known_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert one(ROWS[0], tiny_tokenizer)["prompt"] == ALPACA
    assert one(ROWS[1], tiny_tokenizer)["prompt"] == ALPACA_INPUT


def test_chat_is_the_tokenizers_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for row, text in ((ROWS[0], "Say hi."), (ROWS[1], "Add.\n\n1 2")):
        sample = one(row, tiny_tokenizer, template="chat")
        own = tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        assert sample["input_ids"][: first_label(sample["labels"])] == own


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Q: {instruction}\n{input}\nA:", "Q: Use {input} and {{y}}\n{instruction} %s\nA:"),
        ("{{json}} {instruction}", "{json} Use {input} and {{y}}\n{instruction} %s"),
    ],
)
def test_braces_in_the_data_are_only_text(
    template: str, expected: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    row = {"instruction": "Use {input} and {{y}}", "input": "{instruction} %s", "output": "{output}"}
    sample = one(row, tiny_tokenizer, template=template)
    assert sample["prompt"] == expected
    assert "Use {input} and {{y}}\n\n### Input:\n{instruction} %s\n" in one(row, tiny_tokenizer)["prompt"]
    assert tiny_tokenizer.decode(response_of(sample), skip_special_tokens=True) == "{output}"


@pytest.mark.parametrize("template", ["alpca", "{input}", "{instruction} {topic}", "{instruction} {}", "{instruction"])
def test_wrong_templates_are_refused(template: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="template"):
        Tokenisation(tiny_tokenizer, template)


def test_chat_needs_a_chat_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        Tokenisation(plain, "chat")
    prepared = prepare([GOOD_ROWS[0]], plain)
    assert len(prepared.dataset) == 1


# Lengths


def test_a_long_prompt_loses_the_end_of_its_input(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(f"word{i}" for i in range(300))
    row = {"instruction": "Keep all of me.", "input": text, "output": "x"}
    sample = one(row, tiny_tokenizer, max_prompt_length=250)
    head, tail = sample["prompt"].split("### Input:\n")
    assert "### Instruction:\nKeep all of me.\n" in head
    kept = tail.removesuffix("\n\n### Response:\n")
    assert kept != tail
    assert text.startswith(kept)
    assert 240 <= first_label(sample["labels"]) <= 250
    assert tiny_tokenizer.decode(sample["input_ids"][: first_label(sample["labels"])]) == sample["prompt"]


@pytest.mark.parametrize("limit", range(200, 210))
def test_no_character_is_cut_in_half(limit: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "漢字😀" * 60
    sample = one({"instruction": "Read.", "input": text, "output": "x"}, tiny_tokenizer, max_prompt_length=limit)
    kept = sample["prompt"].split("### Input:\n")[1].removesuffix("\n\n### Response:\n")
    assert text.startswith(kept)
    assert limit - 8 <= first_label(sample["labels"]) <= limit


def test_then_the_end_of_its_instruction(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = " ".join(f"word{i}" for i in range(300))
    sample = one({"instruction": text, "input": text, "output": "x"}, tiny_tokenizer, max_prompt_length=250)
    kept = sample["prompt"].split("### Instruction:\n")[1].removesuffix("\n\n### Response:\n")
    assert text.startswith(kept)
    assert "### Input:" not in sample["prompt"]
    assert 240 <= first_label(sample["labels"]) <= 250


@settings(max_examples=60, deadline=None)
@given(instruction=st.text(min_size=1, max_size=60), text=st.text(max_size=200), limit=st.integers(150, 260))
def test_any_text_is_cut_to_the_limit(instruction: str, text: str, limit: int, tiny_tokenizer: Any) -> None:
    if any(0xD800 <= ord(c) < 0xE000 for c in instruction + text):
        return
    prompt, ids = Tokenisation(tiny_tokenizer, max_prompt_length=limit).prompt_ids(
        {"instruction": instruction, "input": text}
    )
    assert len(ids) <= limit
    assert prompt.endswith("\n\n### Response:\n")
    assert ids == tiny_tokenizer(prompt).input_ids
    middle = prompt.split("### Instruction:\n", 1)[1].removesuffix("\n\n### Response:\n")
    whole = f"{instruction}\n\n### Input:\n{text}"
    assert whole.startswith(middle)


def test_a_template_that_is_too_long_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    size = len(tiny_tokenizer(ALPACA.replace("Say hi.", "")).input_ids)
    with pytest.raises(UserError, match=f"the prompt template alone is {size} tokens, above max_prompt_length 20"):
        prepare(ROWS, tiny_tokenizer, max_prompt_length=20)


def test_a_response_ends_in_eos_unless_it_is_cut(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    text = "one two three four five six seven"
    whole = [*tiny_tokenizer(text).input_ids, tiny_tokenizer.eos_token_id]
    for limit in (1, 2, 5, len(whole) - 1, len(whole), 1000):
        prepared = prepare([{"instruction": "a", "output": text}], tiny_tokenizer, max_response_length=limit)
        assert response_of(prepared.dataset[0]) == whole[:limit]
        assert prepared.cuts == ({"responses_cut": 1} if limit < len(whole) else {})
    assert "of 1 rows 0 prompts and 1 responses are cut" in caplog.text


@pytest.mark.parametrize("option", ["max_prompt_length", "max_response_length"])
def test_lengths_are_checked(option: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        Tokenisation(tiny_tokenizer, **{option: 0})


def test_a_tokenizer_without_eos_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no eos_token"):
        Tokenisation(plain)


# The boundary between prompt and response


def metaspace(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer like SentencePiece's: a space, written as a low line, goes before every text."""
    core = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    options: dict[str, Any] = {
        "vocab_size": 170,
        "special_tokens": ["<unk>", "</s>"],
        "initial_alphabet": [*(chr(c) for c in range(33, 127)), "\n", "é", "▁"],
        "show_progress": False,
    }
    trainer = (
        trainers.UnigramTrainer(unk_token="<unk>", **options) if kind == "unigram" else trainers.BpeTrainer(**options)
    )
    core.train_from_iterator(["a b c the cat sat on a mat and the dog"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def llama2() -> PreTrainedTokenizerFast:
    """Llama 2's way to the same: a normaliser that puts the space there, and bytes for what has no token."""
    merges = [("▁", "a"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *(chr(c) for c in range(33, 127))]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module", params=["byte level", "byte level with prefix space", "bpe", "unigram", "llama 2"])
def any_tokenizer(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if request.param == "byte level":
        return tiny_tokenizer
    if request.param == "byte level with prefix space":
        core = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    return llama2() if request.param == "llama 2" else metaspace(request.param)


def test_texts_together_are_tokenised_as_a_call_of_the_tokenizer_does(any_tokenizer: PreTrainedTokenizerFast) -> None:
    """Also where someone left truncation and padding switched on, and where a subclass does something else."""
    texts = ["the cat sat on a mat", "a", "", "</s> the <|endoftext|>"]
    tokenizer = copy.deepcopy(any_tokenizer)
    for special in (False, True):
        expected = tokenizer(texts, add_special_tokens=special).input_ids
        tokenizer.backend_tokenizer.enable_truncation(2)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        assert TextEncoder(tokenizer).ids_of_all(texts, special) == expected
    tokenizer.split_special_tokens = True
    assert TextEncoder(tokenizer).ids_of_all(texts) == tokenizer(texts, add_special_tokens=False).input_ids

    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus(
                [t.replace("a", "o") for t in text] if isinstance(text, list) else text, **options
            )

    shouting = Shouting(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    expected = shouting(texts, add_special_tokens=False).input_ids
    assert TextEncoder(shouting).ids_of_all(texts) == expected != TextEncoder(any_tokenizer).ids_of_all(texts)


def test_the_search_for_cycles_is_as_it_was_after_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="none of 1 rows"):
        prepare([{"instruction": 1, "output": "a"}], tiny_tokenizer)
    assert gc.isenabled()
    gc.disable()
    try:
        prepare(ROWS, tiny_tokenizer)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("response", ["a", " a", "the cat sat", "  x", "1", "é", "a\n\nb", ""])
@pytest.mark.parametrize("template", ["alpaca", "Q: {instruction} A:"])
def test_the_response_joins_the_prompt_of_generation(
    template: str, response: str, any_tokenizer: PreTrainedTokenizerFast
) -> None:
    sample = one({"instruction": "the cat", "output": response}, any_tokenizer, template=template)
    prompt_ids = any_tokenizer(sample["prompt"]).input_ids
    assert sample["input_ids"][: len(prompt_ids)] == prompt_ids
    assert first_label(sample["labels"]) == len(prompt_ids)
    assert response_of(sample) == sample["input_ids"][len(prompt_ids) :]
    assert response_of(sample)[-1] == any_tokenizer.eos_token_id
    spoken = any_tokenizer.decode(sample["input_ids"][:-1])
    assert spoken == any_tokenizer.decode(prompt_ids) + response


def test_a_response_gets_no_space_that_it_does_not_have() -> None:
    tokenizer = llama2()
    assert tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids) == ["▁a"]
    for text, pieces in (("a", ["a"]), (" a", ["▁a"]), ("\na", ["<0x0A>", "a"]), ("\n\n", ["<0x0A>", "<0x0A>"])):
        ids = Tokenisation(tokenizer).response_ids(text)
        assert tokenizer.convert_ids_to_tokens(ids) == [*pieces, "</s>"]


def test_special_tokens_come_once_and_only_before_the_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    core = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens(["<s>"])
    bos = core.token_to_id("<s>")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.chat_template = "{{ bos_token }}" + str(tiny_tokenizer.chat_template)
    for row in GOOD_ROWS[:3]:
        for template in ("alpaca", "chat"):
            sample = one(row, tokenizer, template=template)
            assert [i for i, x in enumerate(sample["input_ids"]) if x == bos] == [0]


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    core = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    eos = tiny_tokenizer.eos_token_id
    core.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.chat_template = tiny_tokenizer.chat_template
    assert tokenizer("a").input_ids[-1] == eos
    for row in GOOD_ROWS[:3]:
        sample, plain = (one(row, t, template="alpaca") for t in (tokenizer, tiny_tokenizer))
        assert sample == plain
        assert [i for i, x in enumerate(sample["input_ids"]) if x == eos] == [len(sample["input_ids"]) - 1]


# Batches


def test_collator_masks_by_length_even_where_pad_is_eos(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tiny_tokenizer.eos_token_id
    assert pad_id(tiny_tokenizer) == eos
    samples = [
        {"sample_id": "a", "input_ids": [7, 8, eos], "labels": [-100, 8, eos]},
        {"sample_id": "b", "input_ids": [eos, 5, 6, 7, eos], "labels": [-100, -100, 6, 7, eos]},
    ]
    batch = DistillationCollator(pad_id(tiny_tokenizer))(samples)
    assert batch["input_ids"].tolist() == [[7, 8, eos, eos, eos], [eos, 5, 6, 7, eos]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 8, eos, -100, -100], [-100, -100, 6, 7, eos]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_padding_is_eos_without_a_pad_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    core = tiny_tokenizer.backend_tokenizer
    assert pad_id(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")) == 0
    assert pad_id(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="!")) != 0


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 9))
def test_batches_take_every_row_once_and_the_longest_first(lengths: list[int], size: int) -> None:
    batches = list(batches_by_length(lengths, size))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == size for batch in batches[:-1])
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths, reverse=True)
