"""Rows that can be read several times, from Python objects: lists, data sets, tables, DataFrames, streams."""

import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict

from ..errors import UserError
from .files import SourceRow, source_row

_AT_ONCE = 1000


class Rows:
    """Rows that can be read several times.

    Args:
        read: starts reading them from the first one.
        count: how many there are; None: they are counted when the number is needed.
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
        """The rows with changed columns. Entries that are not rows stay as they are."""

        def read() -> Iterator[SourceRow]:
            for row in self:
                yield row if row.columns is None else SourceRow(row.where, change(row.columns))

        return Rows(read, self._count)


def rows_held_by(data: Any, name: str = "data", split: str = "train") -> Rows:
    """Rows of a Python object.

    Args:
        data: `Rows`; a data set of `datasets`, or a dict of its splits; a DataFrame or an Arrow table; a mapping of
            columns to lists; or an iterable of rows, which is read once.
        name: what messages call the data.
        split: which split to take, if there are several.

    Raises:
        UserError: the object is none of these.
    """
    if isinstance(data, Rows):
        return data
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        return rows_held_by(the_split(data, split, name), name)
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
        return spooled(iter(data))
    raise UserError(f"{name} must be rows, a data set, a DataFrame or a source of rows, got {type(data).__name__}")


def the_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    """One of several splits. If "train" is wanted and there is only one split, that one, whatever it is called."""
    if split in splits:
        return splits[split]
    if len(splits) == 1 and split == "train":
        return next(iter(splits.values()))
    raise UserError(
        f"{name} has the splits {', '.join(map(str, splits))} and no {split!r}; name one: "
        f"{{path: ..., split: {next(iter(splits), '...')}}}"
    )


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
    """A cell as a plain Python value: None instead of a number that marks a missing value, and lists for arrays."""
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


def spooled(values: Iterator[Any]) -> Rows:
    """Keep rows, or other values, that can be read only once in a file, until they are no longer needed."""
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
