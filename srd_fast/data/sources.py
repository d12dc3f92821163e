"""Rows with their places, from a file, a folder, a pattern, the hub, or what Python holds.

Rows are read again for each pass over them, and are never all in memory at once (but those of a JSON array, which is
one value). A line that is no row is kept with the reason. `files.py` reads single files.
"""

import glob
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

from ..errors import UserError, first_line
from .files import SUFFIXES, SourceRow, file_rows, shown, source_row, suffix_of

_AT_ONCE = 1000
_HUB_KEYS = ("path", "name", "split", "revision")
_WAYS = f"give a file ({', '.join(SUFFIXES)}, also compressed), a folder of such, or a hub name"


class Rows:
    """Rows that can be read several times.

    Args:
        read: begins to read them.
        count: how many there are; None: they are counted when it is asked for.
    """

    def __init__(self, read: Callable[[], Iterator[SourceRow]], count: int | None = None) -> None:
        self._read, self._count = read, count

    def __iter__(self) -> Iterator[SourceRow]:
        return self._read()

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self)
        return self._count

    def head(self, count: int | None) -> "Rows":
        """The first rows, or all of them for None."""
        if count is None:
            return self
        return Rows(lambda: islice(self._read(), count), None if self._count is None else min(count, self._count))

    def mapped(self, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> "Rows":
        """The rows with changed columns; what is no row stays as it is."""

        def read() -> Iterator[SourceRow]:
            for row in self:
                yield row if row.columns is None else SourceRow(row.where, change(row.columns))

        return Rows(read, self._count)


def read_rows(source: Any, split: str = "train") -> list[dict[str, Any]]:
    """Read the rows of a source that `read_source` takes.

    Args:
        source: the file or name.
        split: of a source that has several.

    Returns:
        The rows.

    Raises:
        UserError: the file cannot be read, or has something other than rows. The message names the file and line.
    """
    rows = list(read_source(source, split))
    for row in rows:
        if row.columns is None:
            raise UserError(f"data file {str(source)!r}, {row.where}: {row.reason}")
    return [dict(row.columns) for row in rows if row.columns is not None]


def read_source(source: Any, split: str = "train") -> Rows:
    """Read rows, each with its place; a line that is not a row is kept with the reason.

    Args:
        source: a file of json lines, a JSON array, CSV, TSV, parquet or Arrow, also compressed (.gz, .bz2, .xz, .zst);
            a folder of such files, or one that `save_to_disk` wrote; a pattern such as `data/*.jsonl`; a hub name,
            `name` or `name:config`; a mapping with `path`, `name`, `split` and `revision`, as `datasets.load_dataset`
            takes them; or a list of these.
        split: of a source that has several, where the source does not say it.

    Returns:
        The rows and their places.

    Raises:
        UserError: the source is empty or cannot be read to its end. The message names it.
    """
    if isinstance(source, Mapping):
        return _of_mapping(source, split)
    if isinstance(source, (list, tuple)):
        if not source:
            raise UserError(f"data is an empty list; {_WAYS}")
        return _joined([(str(part), read_source(part, split)) for part in source])
    path = source_path(source)
    if path is None:
        return _not_here(str(source), split)
    if path.is_dir():
        return _folder_rows(path, split)
    if not path.is_file():
        raise UserError(f"data {str(source)!r} is a device or a pipe; {_WAYS}")
    return _file(path)


def source_path(source: str | Path) -> Path | None:
    """The file or folder that a source names, or None if there is none.

    Raises:
        UserError: no file can have this name.
    """
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as e:  # too long, a user without a home, a NUL in it
        raise UserError(f"data {shown(str(source))!r} is no name of a file: {shown(first_line(e), 200)}") from e


def source_files(source: Any, split: str = "train") -> list[Path]:
    """The files here that a source reads, in their order; none for the hub."""
    if isinstance(source, Mapping):
        split, source = source.get("split") or split, source.get("path", "")
    if isinstance(source, (list, tuple)):
        return [file for part in source for file in source_files(part, split)]
    path = source_path(source)
    if path is None:
        return _matching(str(source)) if _is_pattern(str(source)) else []
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file()) if _is_saved(path) else _of_split(path, split)
    return [path]


def check_source(source: Any, split: str = "train") -> None:
    """Refuse a source that is meant to be here and is not, without reading it.

    Raises:
        UserError: as `read_source` would raise it.
    """
    if isinstance(source, Mapping):
        _check_hub_keys(source)
        split, source = source.get("split") or split, source["path"]
    if isinstance(source, (list, tuple)):
        for part in source:
            check_source(part, split)
        return
    path = source_path(source)
    if path is None:
        if _is_pattern(str(source)):
            _matching(str(source))
        elif _looks_like_file(str(source)):
            raise UserError(f"data file {str(source)!r} does not exist")
    elif path.is_dir() and not _is_saved(path):
        _of_split(path, split)


def rows_of(data: Any, name: str = "data", split: str = "train") -> Rows:
    """Rows of whatever holds them: a source that `read_source` takes as text or path, or an object of Python.

    Args:
        data: a source; a data set of `datasets`, or a dict of its splits; a DataFrame or an Arrow table; a mapping of
            columns to lists; or an iterable of rows, which is read once.
        name: of the data, for messages.
        split: of several.

    Raises:
        UserError: it is none of these.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, (str, os.PathLike)):
        return read_source(os.fspath(data), split)
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        return rows_of(_the_split(data, split, name), name)
    if isinstance(data, Dataset):
        return _dataset_rows(data)
    if hasattr(data, "to_batches"):  # an Arrow table
        return _numbered(lambda: (row for part in data.to_batches(_AT_ONCE) for row in part.to_pylist()))
    if hasattr(data, "iter_rows") and hasattr(data, "columns"):  # a DataFrame of polars
        return _numbered(lambda: data.iter_rows(named=True), len(data))
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a DataFrame of pandas
        return _numbered(lambda: _frame_rows(data), len(data))
    if isinstance(data, Mapping):
        return _columns_of_lists(data, name)
    if isinstance(data, (list, tuple)):
        return _numbered(lambda: iter(data), len(data))
    if isinstance(data, Iterable) and not isinstance(data, (bytes, bytearray)):
        return _spooled(iter(data))
    raise UserError(f"{name} must be rows, a data set, a DataFrame or a source of rows, got {type(data).__name__}")


def _numbered(values: Callable[[], Iterator[Any]], count: int | None = None) -> Rows:
    def read() -> Iterator[SourceRow]:
        for number, value in enumerate(values(), 1):
            yield value if isinstance(value, SourceRow) else source_row(f"row {number}", value)

    return Rows(read, count)


def _dataset_rows(data: Dataset) -> Rows:
    def values() -> Iterator[Any]:
        for start in range(0, len(data), _AT_ONCE):
            yield from data.select(range(start, min(len(data), start + _AT_ONCE))).to_list()

    return _numbered(values, len(data))


def _frame_rows(frame: Any) -> Iterator[dict[str, Any]]:
    for start in range(0, len(frame), _AT_ONCE):
        for row in frame.iloc[start : start + _AT_ONCE].to_dict("records"):
            yield {str(name): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """A cell as Python has it: no number stands for a missing value, and arrays are lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and value != value:
        return None
    return [_plain(v) for v in value] if isinstance(value, list) else value


def _columns_of_lists(data: Mapping[str, Any], name: str) -> Rows:
    lengths = {len(values) if isinstance(values, (list, tuple)) else -1 for values in data.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise UserError(f"{name} is a mapping, and its values are not lists of one length; give a list of rows")
    return _numbered(lambda: (dict(zip(data, row)) for row in zip(*data.values())), lengths.pop())


def _spooled(values: Iterator[Any]) -> Rows:
    """Rows of what can be read only once, kept in a file until they are no longer needed."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115
    count = 0
    for count, value in enumerate(values, 1):  # noqa: B007
        pickle.dump(value, spool)

    def read() -> Iterator[Any]:
        spool.seek(0)
        place = 0
        for _ in range(count):
            spool.seek(place)
            value = pickle.load(spool)
            place = spool.tell()
            yield value

    return _numbered(read, count)


def _of_mapping(source: Mapping[str, Any], split: str) -> Rows:
    _check_hub_keys(source)
    split = source.get("split") or split
    if source.get("name") is None and source.get("revision") is None and not _only_on_hub(source["path"]):
        return read_source(source["path"], split)
    return _hub_rows(source["path"], source.get("name"), split, source.get("revision"))


def _only_on_hub(path: str) -> bool:
    return source_path(path) is None and not _is_pattern(path) and not _looks_like_file(path)


def _check_hub_keys(source: Mapping[str, Any]) -> None:
    wrong = [k for k, v in source.items() if k not in _HUB_KEYS or not (v is None or isinstance(v, str))]
    if wrong or not source.get("path"):
        raise UserError(
            f"data as a mapping has path and, where wanted, {', '.join(_HUB_KEYS[1:])}, all of them text; got "
            f"{shown(repr(dict(source)))}"
        )


def _not_here(name: str, split: str) -> Rows:
    if _is_pattern(name):
        return _joined([(path.name, _file(path)) for path in _matching(name)])
    if _looks_like_file(name):
        raise UserError(f"data file {name!r} does not exist")
    path, _, config = name.partition(":")
    return _hub_rows(path, config or None, split)


def _is_pattern(name: str) -> bool:
    return any(c in name for c in "*?[")


def _looks_like_file(name: str) -> bool:
    return name.endswith((*SUFFIXES, ".gz", ".zst")) or name.startswith((".", "/", "~"))


def _matching(pattern: str) -> list[Path]:
    found = sorted(Path(p) for p in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in found if path.is_file()]
    if not files:
        raise UserError(f"data {pattern!r}: no file here has such a name")
    return files


def _file(path: Path) -> Rows:
    read, count = file_rows(path)
    if not count:
        raise UserError(f"data file {str(path)!r} is empty")
    return Rows(read, count)


def _joined(parts: list[tuple[str, Rows]]) -> Rows:
    if len(parts) == 1:
        return parts[0][1]

    def read() -> Iterator[SourceRow]:
        for name, rows in parts:
            for row in rows:
                yield SourceRow(f"{shown(name)} {row.where}", row.columns, row.reason)

    return Rows(read, sum(len(rows) for _, rows in parts))


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _folder_rows(folder: Path, split: str) -> Rows:
    if not _is_saved(folder):
        return _joined([(str(path.relative_to(folder)), _file(path)) for path in _of_split(folder, split)])
    try:
        data = load_from_disk(str(folder))
    except Exception as e:  # of many kinds; all mean that the folder is not usable
        raise UserError(f"data folder {str(folder)!r} cannot be loaded: {first_line(e)}") from e
    return rows_of(data, f"data folder {str(folder)!r}", split)


def _of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder: names or subfolders say the split, as on the hub; without any, all are train's.

    Raises:
        UserError: the folder has no files of rows, or none of the split.
    """
    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:
        patterns = {}
    by_split: dict[str, list[Path]] = {}
    for name, some in patterns.items():
        paths = sorted({Path(p) for pattern in some for p in resolve_pattern(pattern, str(folder))})
        files = [p for p in paths if suffix_of(p) in SUFFIXES and p.name != "dataset_info.json"]
        if files:
            by_split[str(name)] = files
    if not by_split:
        raise UserError(f"data {str(folder)!r} is a folder without files of rows; {_WAYS}")
    files = _the_split(by_split, split, f"data folder {str(folder)!r}")
    return files


def _the_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    """One of several splits. Where there is just one, that; for train too where it is called otherwise."""
    if split in splits:
        return splits[split]
    if len(splits) == 1 and split == "train":
        return next(iter(splits.values()))
    raise UserError(
        f"{name} has the splits {', '.join(map(str, splits))} and no {split!r}; name one: "
        f"{{path: ..., split: {next(iter(splits), '...')}}}"
    )


def _hub_rows(path: str, name: str | None, split: str, revision: str | None = None) -> Rows:
    try:
        data = load_dataset(path, name, split=split, revision=revision)
    except Exception as e:  # network, hub and parsing errors of many kinds
        whole = f"{path}:{name}" if name else path
        raise UserError(f"data {whole!r} is no file here, and as a hub name it fails: {first_line(e)}") from e
    if isinstance(data, IterableDataset):
        return rows_of(data)
    if not len(data):
        raise UserError(f"data {path!r}, split {split!r}, is empty")
    return rows_of(data)
