"""Rows with their places, from a file, a folder, a pattern, the hub, or a Python object.

Rows are read again for each pass over them, and are never all in memory at once (except those of a JSON array, which is
one value). A line that is not a row is kept with the reason. `files.py` reads single files.
"""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset, load_from_disk
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

from ..errors import UserError, first_line
from .files import SUFFIXES, SourceRow, file_rows, shown, suffix_of
from .rows import Rows, rows_held_by, the_split

_HUB_KEYS = ("path", "name", "split", "revision")
_WAYS = f"give a file ({', '.join(SUFFIXES)}, also compressed), a folder of such, or a hub name"


def read_rows(source: Any, split: str = "train") -> list[dict[str, Any]]:
    """Read the rows of a source that `read_source` takes.

    Args:
        source: the file or name.
        split: which split to read, if there are several.

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
        split: which split to read, if there are several and the source does not name one.

    Returns:
        The rows and their places.

    Raises:
        UserError: the source is empty or cannot be read to its end. The message names it.
    """
    if isinstance(source, Mapping):
        return _of_mapping(source, split)
    if isinstance(source, (list, tuple)):
        _check_list(source)
        return _joined([(str(part), read_source(part, split)) for part in source])
    path = source_path(source)
    if path is None:
        return _not_here(str(source), split)
    if path.is_dir():
        return _folder_rows(path, split)
    if not path.is_file():
        raise UserError(f"data {str(source)!r} is a device or a pipe; {_WAYS}")
    return _file(path)


def _check_list(sources: Sequence[Any]) -> None:
    if not sources:
        raise UserError(f"data is an empty list; {_WAYS}")


def source_path(source: str | Path) -> Path | None:
    """The file or folder that a source names, or None if there is none.

    Raises:
        UserError: no file can have this name.
    """
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError) as e:  # too long, a user without a home, a NUL in it
        raise UserError(f"data {shown(str(source))!r} is not a file name: {shown(first_line(e), 200)}") from e


def source_files(source: Any, split: str = "train") -> list[Path]:
    """The local files that a source reads, in their order; none for the hub."""
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


def source_places(source: Any, name: str = "data") -> list[Path]:
    """The local files and folders that a source names, without reading them.

    Raises:
        UserError: the source names none.
    """
    if isinstance(source, Mapping) and "path" in source:
        return source_places(source["path"], name)
    if isinstance(source, (list, tuple)) and all(isinstance(part, (str, os.PathLike)) for part in source):
        return [path for part in source for path in source_places(part, name)]
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"{name} must be a file for a data_function of files, got {type(source).__name__}")
    path = source_path(os.fspath(source))
    if path is None and not _is_pattern(str(source)):
        raise UserError(f"{name}: file {str(source)!r} does not exist")
    return _matching(str(source)) if path is None else [path]


def check_source(source: Any, split: str = "train") -> None:
    """Refuse a local source that does not exist, without reading it.

    Raises:
        UserError: as `read_source` would raise it.
    """
    if isinstance(source, Mapping):
        _check_hub_keys(source)
        split, source = source.get("split") or split, source["path"]
    if isinstance(source, (list, tuple)):
        _check_list(source)
        for part in source:
            check_source(part, split)
        return
    path = source_path(source)
    if path is None:
        if _is_pattern(str(source)):
            _matching(str(source))
        elif _looks_like_file(str(source)):
            raise _missing(str(source))
    elif path.is_dir() and not _is_saved(path):
        _of_split(path, split)


def _missing(name: str) -> UserError:
    way = "; addresses are not read: download it" if "://" in name else ""
    return UserError(f"data file {name!r} does not exist{way}")


def rows_of(data: Any, name: str = "data", split: str = "train") -> Rows:
    """Rows of a source that `read_source` takes, given as text or path, or of a Python object.

    Args:
        data: a source; a data set of `datasets`, or a dict of its splits; a DataFrame or an Arrow table; a mapping of
            columns to lists; or an iterable of rows, which is read once.
        name: what messages call the data.
        split: which split to take, if there are several.

    Raises:
        UserError: the data is none of these.
    """
    if isinstance(data, (str, os.PathLike)):
        return read_source(os.fspath(data), split)
    return rows_held_by(data, name, split)


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
            f"data as a mapping has path and optionally {', '.join(_HUB_KEYS[1:])}, all of them text; got "
            f"{shown(repr(dict(source)))}"
        )


def _not_here(name: str, split: str) -> Rows:
    if _is_pattern(name):
        return _joined([(path.name, _file(path)) for path in _matching(name)])
    if _looks_like_file(name):
        raise _missing(name)
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
        raise UserError(f"data {pattern!r}: no local file has such a name")
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
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _folder_rows(folder: Path, split: str) -> Rows:
    if not _is_saved(folder):
        return _joined([(os.path.relpath(path, folder), _file(path)) for path in _of_split(folder, split)])
    try:
        data = load_from_disk(str(folder))
    except Exception as e:  # of many kinds; all mean that the folder is not usable
        raise UserError(f"data folder {str(folder)!r} cannot be loaded: {first_line(e)}") from e
    return rows_of(data, f"data folder {str(folder)!r}", split)


def _of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder. Names or subfolders say the split, as on the hub; if none does, all are train.

    Raises:
        UserError: the folder has no files of rows, or none of the split.
    """
    try:
        patterns = get_data_patterns(str(folder))
    except EmptyDatasetError:
        patterns = {}
    by_split: dict[str, list[Path]] = {}
    for name, some in patterns.items():
        paths = sorted({path for pattern in some for path in _resolved(pattern, folder)})
        files = [p for p in paths if suffix_of(p) in SUFFIXES and p.name != "dataset_info.json"]
        if files:
            by_split[str(name)] = files
    if not by_split:
        raise UserError(f"data {str(folder)!r} is a folder without files of rows; {_WAYS}")
    files = the_split(by_split, split, f"data folder {str(folder)!r}")
    return files


def _resolved(pattern: str, folder: Path) -> list[Path]:
    try:
        return [Path(path) for path in resolve_pattern(pattern, str(folder))]
    except FileNotFoundError:  # a split has several patterns, and only one of them finds files
        return []


def _hub_rows(path: str, name: str | None, split: str, revision: str | None = None) -> Rows:
    try:
        data = load_dataset(path, name, split=split, revision=revision)
    except Exception as e:  # network, hub and parsing errors of many kinds
        whole = f"{path}:{name}" if name else path
        raise UserError(f"data {whole!r} is not a local file, and as a hub name it fails: {first_line(e)}") from e
    if isinstance(data, IterableDataset):
        return rows_held_by(data)
    if not len(data):
        raise UserError(f"data {path!r}, split {split!r}, is empty")
    return rows_held_by(data)
