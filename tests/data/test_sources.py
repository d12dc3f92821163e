"""Rows come the same out of every container, and one that cannot be read is refused with its name."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from test_data import prepare
from transformers import PreTrainedTokenizerFast

from srd_fast.data import check_source, read_rows, read_source, rows_of, source_files
from srd_fast.errors import UserError

Row = dict[str, Any]
ROWS: list[Row] = [{"instruction": f'Say {i},\n"twice" — 海.', "output": f"{i}\t{i}"} for i in range(5)]
OTHERS: list[Row] = [{"instruction": "Validate.", "output": "Yes."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def table(rows: list[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parquet(path: Path, rows: list[Row] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(path))
    return path


def arrow_file(path: Path) -> Path:
    rows = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    return path


def saved(path: Path, data: Dataset | DatasetDict) -> Path:
    data.save_to_disk(str(path))
    return path


def several(folder: Path) -> Path:
    written(folder / "a.jsonl", LINES[: LINES.index(b"\n") + 1])
    parquet(folder / "b" / "c.parquet", ROWS[1:])
    written(folder / "README.md", b"# About")
    return folder


def of_splits(folder: Path) -> Path:
    parquet(folder / "data" / "train-00000-of-00002.parquet", ROWS[:2])
    parquet(folder / "data" / "train-00001-of-00002.parquet", ROWS[2:])
    parquet(folder / "data" / "validation-00000-of-00001.parquet", OTHERS)
    return folder


SPLITS = DatasetDict({"train": Dataset.from_list(ROWS), "validation": Dataset.from_list(OTHERS)})
ON_DISK: dict[str, Callable[[Path], Any]] = {
    "CSV": lambda d: written(d / "x.csv", table(ROWS)),
    "CSV with a byte order mark": lambda d: written(d / "x.csv", b"\xef\xbb\xbf" + table(ROWS)),
    "CSV with semicolons": lambda d: written(d / "x.csv", table(ROWS, ";")),
    "CSV, compressed": lambda d: written(d / "x.csv.gz", gzip.compress(table(ROWS))),
    "TSV": lambda d: written(d / "x.tsv", table(ROWS, "\t")),
    "zstd": lambda d: written(d / "x.jsonl.zst", pa.Codec("zstd").compress(LINES, asbytes=True)),
    "bzip2": lambda d: written(d / "x.jsonl.bz2", bz2.compress(LINES)),
    "xz": lambda d: written(d / "x.json.xz", lzma.compress(json.dumps(ROWS).encode())),
    "ndjson": lambda d: written(d / "x.ndjson", LINES),
    "Arrow file": lambda d: arrow_file(d / "x.arrow"),
    "Arrow stream": lambda d: next(saved(d / "x", Dataset.from_list(ROWS)).glob("*.arrow")),
    "save_to_disk": lambda d: saved(d / "x", Dataset.from_list(ROWS)),
    "save_to_disk of splits": lambda d: saved(d / "x", SPLITS),
    "a folder of files": lambda d: several(d / "x"),
    "a folder of splits": lambda d: of_splits(d / "x"),
    "a pattern": lambda d: str(of_splits(d / "x") / "**" / "train-*.parquet"),
    "a list": lambda d: [parquet(d / "x.parquet", ROWS[:2]), written(d / "y.csv", table(ROWS[2:]))],
    "a mapping": lambda d: {"path": str(of_splits(d / "x")), "split": "train"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ON_DISK)
def test_every_container_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    source = ON_DISK[kind](tmp_path)
    check_source(source)
    rows = read_source(source)
    assert [dict(row.columns or {}) for row in rows] == [dict(row.columns or {}) for row in rows] == ROWS
    assert len(rows) == 5
    assert [row.columns for row in rows.head(2)] == ROWS[:2]
    assert source_files(source)
    assert len({row.where for row in rows}) == 5


@pytest.mark.parametrize("make", [of_splits, lambda d: saved(d, SPLITS)], ids=["files", "save_to_disk"])
def test_a_split_is_found_by_its_name(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    assert read_rows(folder, "validation") == read_rows({"path": str(folder), "split": "validation"}) == OTHERS
    with pytest.raises(UserError, match=r"has the splits train, validation and no 'test'; name one: \{path: "):
        read_source(folder, "test")


def test_places_name_the_file_where_there_are_several(tmp_path: Path) -> None:
    rows = list(read_source(several(tmp_path / "x")))
    assert [row.where for row in rows[:2]] == ["a.jsonl line 1", "b/c.parquet row 1"]


def test_rows_of_a_table_that_are_too_long_are_told(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = written(tmp_path / "x.csv", b'instruction,output,topic\n"a\nb",c\n\nd,e,f,g\n')
    prepared = prepare(read_source(path), tiny_tokenizer)
    assert prepared.dataset["references"][:] == [["c"]]
    assert prepared.rejected == [("line 5", "4 values for 3 columns; put a text with ',' in it in quotes")]


DAMAGED = {
    "zstd cut off": ("x.jsonl.zst", pa.Codec("zstd").compress(LINES * 9, asbytes=True)[:-9], "cannot be read: "),
    "no zstd": ("x.jsonl.zst", b"no zstd at all", "cannot be read: "),
    "no xz": ("x.csv.xz", b"no xz at all", "cannot be read: "),
    "no Arrow": ("x.arrow", b"no Arrow", "is not readable Arrow"),
    "an empty table": ("x.csv", b"a,b\n", "is empty"),
    "Latin-1": ("x.csv", b"a,b\nc,\xe9\n", "line 2: not UTF-8: byte 2 is 0xe9"),
    "UTF-16": ("x.csv", "a,b\n".encode("utf-16"), "is UTF-16 or UTF-32"),
    "a column twice": ("x.csv", b"a,b,a\n1,2,3\n", "has two columns called 'a'"),
    "parquet in gzip": ("x.parquet.gz", gzip.compress(b"PAR1"), "unpack it"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(UserError, match=complaint) as error:
        read_source(path)
    assert name in str(error.value)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    for source, complaint in [
        (str(tmp_path / "*.jsonl"), "no local file has such a name"),
        (str(tmp_path / "x.csv"), r"x\.csv' does not exist"),
        ({"path": str(tmp_path / "x.csv.zst")}, r"x\.csv\.zst' does not exist"),
        ({"path": "x", "splits": "train"}, "data as a mapping has path and optionally name, split, revision"),
        ({"split": "train"}, "data as a mapping has path"),
        ([str(tmp_path / "y.jsonl")], r"y\.jsonl' does not exist"),
    ]:
        for read in (check_source, read_source):
            with pytest.raises(UserError, match=complaint):
                read(source)
    with pytest.raises(UserError, match="an empty list"):
        read_source([])


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("someone/some", ("someone/some", None, "train", None)),
        ("someone/some:main", ("someone/some", "main", "train", None)),
        ({"path": "someone/some", "name": "main", "split": "test"}, ("someone/some", "main", "test", None)),
        ({"path": "some", "revision": "abc"}, ("some", None, "train", "abc")),
    ],
)
def test_the_hub_is_asked_for_config_and_split(source: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def load(path: str, name: str | None, split: str, revision: str | None) -> Dataset:
        asked_for.append((path, name, split, revision))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("srd_fast.data.sources.load_dataset", load)
    check_source(source)
    assert read_rows(source) == ROWS
    assert asked_for == [asked]


def generated() -> Iterator[Row]:
    yield from (dict(row) for row in ROWS)


IN_PYTHON: dict[str, Callable[[Path], Any]] = {
    "a list": lambda d: ROWS,
    "a generator": lambda d: generated(),
    "a data set": lambda d: Dataset.from_list(ROWS).with_format("torch"),
    "splits": lambda d: SPLITS,
    "one split": lambda d: DatasetDict({"all": SPLITS["train"]}),
    "a stream": lambda d: IterableDataset.from_generator(generated),
    "a shuffled selection": lambda d: Dataset.from_list([*ROWS[::-1], *OTHERS]).select(range(4, -1, -1)),
    "pandas": lambda d: pd.DataFrame(ROWS),
    "pandas with numbers as index": lambda d: pd.DataFrame(ROWS, index=[3, 3, 1, 0, 2]),
    "columns": lambda d: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "Arrow": lambda d: pa.Table.from_pylist(ROWS),
    "a path": lambda d: written(d / "x.jsonl", LINES),
    "a name": lambda d: str(written(d / "x.csv", table(ROWS))),
}


@pytest.mark.parametrize("kind", IN_PYTHON)
def test_whatever_holds_rows_in_python_gives_the_same_samples(
    kind: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert prepare(IN_PYTHON[kind](tmp_path), tiny_tokenizer).dataset.to_list() == (
        prepare(ROWS, tiny_tokenizer).dataset.to_list()
    )


def test_cells_without_a_value_are_missing() -> None:
    frame = pd.DataFrame({"a": ["x", None], "b": [[1, 2], None], "c": [1.5, float("nan")]})
    assert [row.columns for row in rows_of(frame)] == [
        {"a": "x", "b": [1, 2], "c": 1.5},
        {"a": None, "b": None, "c": None},
    ]


def test_a_generator_is_read_once_and_its_rows_again() -> None:
    read = []
    rows = rows_of(read.append(i) or {"a": i} for i in range(3))
    for one, two in zip(rows, rows):
        assert one == two
    assert read == [0, 1, 2]
    assert [row.where for row in rows] == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize("data", [5, None, b"x.jsonl", {"a": 1}, {"a": [1], "b": [1, 2]}])
def test_what_holds_no_rows_is_refused(data: Any) -> None:
    with pytest.raises(UserError, match="train_dataset"):
        rows_of(data, "train_dataset")


def test_nothing_is_written_to_a_cache_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for kind in ("CSV", "save_to_disk", "a folder of splits"):
        assert len(read_source(ON_DISK[kind](tmp_path / kind.replace(" ", "_")))) == 5
    assert not (tmp_path / "cache").exists()
