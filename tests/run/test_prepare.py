"""The step prepare: no prompt on both sides of a split, what was cut is counted, no row that a model cannot take."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from srd_fast.data import content_id
from srd_fast.errors import UserError
from srd_fast.files import content_digest
from srd_fast.report.page import _facts
from srd_fast.report.read import read_run
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.pipeline import execute, fingerprints
from srd_fast.run.steps.data import _hold_out, _overlap, prepare_inputs
from srd_fast.run.steps.run import read_samples


def samples_of(groups: list[int]) -> Dataset:
    """Samples of which so many share each prompt; every second response of a group is a copy too."""
    rows = [(g, k // 2) for g, size in enumerate(groups) for k in range(size)]
    return Dataset.from_list(
        [
            {"sample_id": f"{n}", "prompt": f"Name {g}.", "input_ids": [5, g, k], "labels": [-100, -100, k]}
            for n, (g, k) in enumerate(rows)
        ]
    )


@settings(max_examples=25, deadline=None)
@given(groups=st.lists(st.integers(1, 5), min_size=2, max_size=12), count=st.integers(1, 30), seed=st.integers(0, 3))
def test_a_prompt_lies_on_one_side_and_the_count_is_near(groups: list[int], count: int, seed: int) -> None:
    samples = samples_of(groups)
    count = min(count, len(samples) - 1)
    train, held_out = _hold_out(samples, count, seed)
    assert sorted([*train["sample_id"], *held_out["sample_id"]]) == sorted(samples["sample_id"])
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert 0 < len(held_out) < len(samples)
    assert abs(len(held_out) - count) < max(groups)
    if max(groups) == 1:
        assert len(held_out) == count


def test_without_copies_the_choice_is_what_it_was() -> None:
    samples = samples_of([1] * 40)
    for seed in (0, 7):
        key = {i: content_id({"id": i, "seed": seed}, ("id", "seed")) for i in samples["sample_id"]}
        train, held_out = _hold_out(samples, 11, seed)
        assert set(held_out["sample_id"]) == set(sorted(key, key=key.__getitem__)[:11])
        assert held_out["sample_id"][:] == [i for i in samples["sample_id"] if i in set(held_out["sample_id"])]
        assert train["sample_id"][:] == [i for i in samples["sample_id"] if i not in set(held_out["sample_id"])]


def test_a_count_that_copies_make_impossible_is_said(caplog: pytest.LogCaptureFixture) -> None:
    _, held_out = _hold_out(samples_of([3] * 6), 9, 0)
    assert (len(held_out), caplog.text) == (9, "")
    for count, nearest in ((10, 9), (11, 12), (1, 3)):
        assert len(_hold_out(samples_of([3] * 6), count, 0)[1]) == nearest
        assert f"{nearest} rows are held out, not {count}, because rows with one prompt stay together" in caplog.text
    with pytest.raises(UserError, match="all 5 rows have one prompt; give a file"):
        _hold_out(samples_of([5]), 2, 0)


def test_prompts_that_are_nearly_the_same_are_counted() -> None:
    train = ["What is 3 + 4?", "Name a sea.", "Ｗｈｏ are you"]
    assert _overlap(train, ["what is 3 + 4", " name A  sea!", "who are you?", "Name a sea.", "Name a lake."]) == (1, 3)
    assert _overlap(train, ["What is 3 - 4?", "What is 34?", "What is 3 + 40?"]) == (0, 0)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def config_of(folder: Path, teacher: Path, rows: list[dict[str, Any]], *overrides: str) -> Any:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = [f"teacher={teacher}", f"data={folder / 'rows.jsonl'}", f"output_dir={folder / 'run'}", "validation=2"]
    wanted += ["init_student.layers=2"]
    return load_run_config(None, [*wanted, "curate.stages=1", *overrides])


def test_what_is_cut_and_what_both_sides_share_is_counted_and_shown(
    tiny_teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = chat("old " * 40, "older")["messages"] + chat("new", "x " * 90)["messages"]
    rows = [{"messages": long}, chat("long " * 90, "y"), *(chat(f"row {n}", "z") for n in range(6))]
    (tmp_path / "dev.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in (chat("row 1", "z"), chat("Row 2!", "z")))
    )
    limits = ("max_prompt_length=60", "max_response_length=40")
    config = config_of(tmp_path, tiny_teacher_folder, rows, *limits, f"validation={tmp_path / 'dev.jsonl'}")
    with caplog.at_level(logging.WARNING):
        folder = execute(config, only="prepare", say=lambda _: None)
    counts = json.loads((folder / "data" / "counts.json").read_text())
    assert counts == {
        "prompts_cut": 1, "responses_cut": 1, "turns_dropped": 2,
        "validation_in_training": 1, "validation_near_training": 1,
    }  # fmt: skip
    assert "of 8 rows 1 prompts and 1 responses are cut, and 2 turns dropped" in caplog.text
    assert "1 of 2 validation prompts are also training prompts, and 1 more except for" in caplog.text
    (folder / "summary.json").write_text(json.dumps({"data": {"train": 8, "validation": 2, "rejected": 0, **counts}}))
    facts = dict(_facts(read_run(folder)))
    assert (facts["turns dropped from long chats"], facts["responses cut"]) == ("2", "1")
    assert facts["validation prompts trained on"] == "1"


def test_variables_of_the_chat_template_are_part_of_what_the_data_is_made_from(
    tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    def made(*overrides: str) -> dict[str, str]:
        return fingerprints(config_of(tmp_path, tiny_teacher_folder, [chat("a", "b")] * 3, *overrides))

    plain = config_of(tmp_path, tiny_teacher_folder, [chat("a", "b")] * 3)
    assert len(prepare_inputs(plain)) == 5  # as in versions without these settings
    prints = [made(), made("chat_template_kwargs={enable_thinking: false}"), made("parse_special_tokens=true")]
    prints += [
        made("chat_template_kwargs={enable_thinking: true}"),
        made("chat_template_kwargs.strftime_now=2031-05-06"),
    ]
    assert len({x["prepare"] for x in prints}) == len({x["distill"] for x in prints}) == len(prints)
    with pytest.raises(UserError, match="config: chat_template_kwargs: chat_template_kwargs has 'tools'"):
        made("chat_template_kwargs.tools=1")


def test_rows_that_a_model_cannot_take_stop_the_run_at_its_first_step(
    tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny.tiny_model("gpt2", vocab=len(tiny_tokenizer)).save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    rows = [chat(f"row {n}", "z") for n in range(4)]
    student, new = f"student={tmp_path / 'student'}", ("reflect.max_new_tokens=8", "evaluate.max_new_tokens=8")
    execute(config_of(tmp_path, tiny_teacher_folder, rows, student, *new), only="prepare", say=lambda _: None)
    long = [*rows, chat("row " * 40, "z")]
    with pytest.raises(UserError, match="do not fit the 64 positions of the student"):
        execute(config_of(tmp_path, tiny_teacher_folder, long, student, *new), only="prepare", say=lambda _: None)
    shutil.rmtree(tmp_path / "run")  # else the step is done, and reflect would say it
    with pytest.raises(UserError, match=r"2 of 2 rows do not fit .* or max_new_tokens"):
        execute(config_of(tmp_path, tiny_teacher_folder, rows, student), only="prepare", say=lambda _: None)


MINE = """
def rows(row):
    return {"question": row["q"], "answer": row["a"]}
"""


@pytest.mark.parametrize("way", ["columns", "data_function", "csv", "folder"])
def test_rows_of_other_names_and_places_make_the_same_data(way: str, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    rows = [{"q": f"What is {i}?", "a": f"It is {i}."} for i in range(6)]
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    (tmp_path / "some.csv").write_text("\n".join(["q,a", *(f"{row['q']},{row['a']}" for row in rows)]))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "folder" / "train.parquet"))
    Dataset.from_list(rows[:2]).to_parquet(str(tmp_path / "folder" / "validation.parquet"))
    mapping = "columns={instruction: q, output: a}"
    overrides = {
        "columns": [mapping],
        "data_function": [f"data_function={mine}:rows"],
        "csv": [mapping, f"data={tmp_path / 'some.csv'}"],
        "folder": [mapping, f"data={{path: {tmp_path / 'folder'}, split: train}}"],
    }[way]
    config = config_of(tmp_path, tiny_teacher_folder, rows, *overrides)
    plain = config_of(tmp_path, tiny_teacher_folder, [{"instruction": r["q"], "output": r["a"]} for r in rows])
    made = []
    for each, source in ((config, rows), (plain, [{"instruction": r["q"], "output": r["a"]} for r in rows])):
        config_of(tmp_path, tiny_teacher_folder, source)  # writes the rows of that config
        folder = execute(each, only="prepare", say=lambda _: None) / "data"
        made.append([(folder / f"{split}.parquet").read_bytes() for split in ("train", "validation")])
        shutil.rmtree(folder.parent)
    assert made[0] == made[1]


def test_how_rows_are_made_is_part_of_what_the_data_is_made_from(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine.py", tmp_path / "folder"
    mine.write_text(MINE)
    Dataset.from_list([chat("a", "b")]).to_parquet(str(folder / "train.parquet"))

    def made(*overrides: str) -> str:
        return fingerprints(config_of(tmp_path, tiny_teacher_folder, [chat("a", "b")] * 3, *overrides))["prepare"]

    prints = [made(), made("columns={messages: m}"), made("train_on=all"), made(f"data_function={mine}:rows")]
    mine.write_text(MINE + "# changed")
    prints += [made(f"data_function={mine}:rows"), made(f"data={folder}")]
    Dataset.from_list([chat("a", "c")]).to_parquet(str(folder / "train.parquet"))
    prints.append(made(f"data={folder}"))
    assert len(set(prints)) == len(prints)
    assert made("columns={}", "data_function=null", "train_on=last") == prints[0]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("columns={instrucion: q}", "config: columns: columns: unknown column of a row format 'instrucion'"),
        ("columns=q", "config: columns: "),
        ("train_on=first", "config: train_on: "),
        ("data_function=mine.py", "data_function 'mine.py' must be package.module:function"),
        ("data_function=absent.py:rows", "data_function 'absent.py:rows': file 'absent.py' does not exist"),
        ("data={path: absent.jsonl}", "config: data: data file 'absent.jsonl' does not exist"),
        ("data=[]", "config: data: data is an empty list"),
        ("validation={name: x}", "config: validation: data as a mapping has path"),
        ("data='absent/*.parquet'", "config: data: data 'absent/*.parquet': no local file has such a name"),
    ],
)
def test_mistakes_in_what_makes_rows_are_found_before_a_step(
    override: str, complaint: str, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        execute(config_of(tmp_path, tiny_teacher_folder, [chat("a", "b")] * 3, override))
    assert complaint in str(error.value)
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("name", ["student", "data", "checkpoints", "plan.json", "start", "report.html"])
def test_a_folder_with_files_of_others_is_left_alone(name: str, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    settings = {**tiny.tiny_run(tiny_teacher_folder), "output_dir": str(tmp_path)}
    (tmp_path / "config.yaml").touch()  # as `srd-fast init` may write it there
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"output_dir: .* has {re.escape(name)}, which no run has made and this one"):
        execute(RunConfig(**settings), say=lambda text: None)
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted(["config.yaml", name])
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("key", ["teacher", "student", "data", "validation"])
def test_a_run_does_not_write_over_what_it_reads(key: str, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {**tiny.tiny_run(tiny_teacher_folder), "output_dir": str(folder)}
    execute(RunConfig(**settings), only="prepare", say=lambda text: None)
    own = folder / "data" / "train.parquet"
    if key in ("teacher", "student"):
        own = folder / "student"
        shutil.copytree(tiny_teacher_folder, own)
    before = content_digest(own)
    with pytest.raises(UserError, match=rf"config: {key}: .* is inside of .*, which the run writes; give another"):
        execute(RunConfig(**{**settings, key: str(own)}), say=lambda text: None)
    assert content_digest(own) == before
    assert "start" not in {x.name for x in folder.iterdir()}


@pytest.mark.usefixtures("own_folder")
def test_a_folder_of_files_may_be_given_by_a_relative_path(tiny_teacher_folder: Path) -> None:
    Path("rows").mkdir()
    rows = [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(12)]
    for name, some in (("train", rows[:8]), ("train-2", rows[8:10]), ("validation", rows[10:])):
        Path("rows", f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings = {**tiny.tiny_run(tiny_teacher_folder), "data": "rows", "validation": "rows", "max_rows": None}
    execute(RunConfig(**settings, output_dir="run"), only="prepare", say=lambda text: None)
    counts = [len(read_samples(Path("run", "data", f"{name}.parquet"))) for name in ("train", "validation")]
    assert counts == [10, 2]
