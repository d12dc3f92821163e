"""Data sets that are made part by part: the same in memory and in a file, and nothing is left of the file."""

import mmap
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_data import ROWS, prepare
from transformers import PreTrainedTokenizerFast

from srd_fast.data import IGNORE_INDEX, first_label, prepare_dataset, prompt_lengths, tables, tokenisation
from srd_fast.errors import UserError

MANY = [{**ROWS[i % 3], "output": f"{i} {i}"} for i in range(1200)]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_large_data_set_is_the_same_in_a_file(
    temporary: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = prepare(MANY, tiny_tokenizer).dataset
    made: list[int] = []
    mapped = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *args, **kwargs: (made.append(args[0]), mapped(*args, **kwargs))[1])
    for most in (0, 1, 1_100_000):  # from the first part on, or from a later one
        monkeypatch.setattr(tables, "_MOST_BYTES", most)
        in_file = prepare(MANY, tiny_tokenizer).dataset
        assert in_file.features == in_memory.features
        assert in_file._fingerprint == in_memory._fingerprint
        assert in_file.to_list() == in_memory.to_list()
        assert pickle.loads(pickle.dumps(in_file)).to_list() == in_memory.to_list()
        assert in_file.select(range(7, 900)).map(lambda row: row)[5] == in_memory[12]
    assert len(made) == 3
    assert not list(temporary.iterdir())


def test_the_fingerprint_is_that_of_the_content(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prints = [prepare(rows, tiny_tokenizer).dataset._fingerprint for rows in (MANY, MANY, MANY[1:], MANY[::-1])]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_full_disk_is_told(
    temporary: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_MOST_BYTES", 0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa.ipc, "new_stream", full)
    with pytest.raises(UserError, match=r"do not fit on the disk of temporary files: .*No space left.*; set TMPDIR"):
        prepare(ROWS, tiny_tokenizer)
    assert not list(temporary.iterdir())


def test_rows_tokenised_together_are_rows_tokenised_one_by_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    odd = [
        {"instruction": "a <|endoftext|> b", "output": "c <|endoftext|>"},
        {"instruction": "word " * 90, "output": "x " * 90},
    ]
    rows = [*MANY[:20], {"instruction": 5, "output": "x"}, *odd, {"instruction": "", "output": ""}]
    for template in ("alpaca", "chat", "{instruction}"):
        for encoder_decoder in (False, True):
            limits = {"max_prompt_length": 100, "max_response_length": 50, "encoder_decoder": encoder_decoder}
            made = tokenisation.Tokenisation(tiny_tokenizer, template, **limits)
            kind = ("instruction", "output")
            together = made.samples([(row, kind) for row in rows])
            for row, sample in zip(rows, together):
                if isinstance(sample, UserError):
                    with pytest.raises(UserError) as error:
                        made.sample(row, kind)
                    assert str(error.value) == str(sample)
                else:
                    assert sample == made.sample(row, kind)
            assert len(prepare_dataset(rows, made).dataset) == sum(isinstance(x, dict) for x in together)


@given(
    st.lists(st.lists(st.sampled_from([IGNORE_INDEX, 3, 4]), max_size=5), min_size=1, max_size=12), st.integers(0, 4)
)
def test_prompts_end_at_the_first_label(labels: list[list[int]], skipped: int) -> None:

    samples = Dataset.from_dict({"labels": labels * 2}).select(range(min(skipped, len(labels)), 2 * len(labels)))
    assert prompt_lengths(samples) == [first_label(x) for x in samples["labels"]]
    assert np.asarray(prompt_lengths(samples)).min() >= 0
