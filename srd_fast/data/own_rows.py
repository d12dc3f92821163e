"""Rows that a user's function makes, from each row or from a file."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..own_code import function_of
from .files import SourceRow, shown, source_row
from .rows import Rows, spooled
from .sources import check_source, rows_of, source_places

logger = logging.getLogger(__name__)

DataFunction = Callable[..., Any]
# If the function's first parameter has one of these names, it gets a file; otherwise a row.
_FILE_NAMES = ("path", "file", "filename")


def data_function_of(given: str | DataFunction) -> DataFunction:
    """The given function, or the one that `path/to/file.py:function` or `package.module:function` names.

    Raises:
        UserError: there is no such function, or it takes no argument.
    """
    function = function_of(given, "data_function") if isinstance(given, str) else given
    if not callable(function):
        raise UserError(f"data_function must be FILE.py:FUNCTION or a function, got {type(function).__name__}")
    _takes_files(function)
    return function


def made_rows(data: Any, given: str | DataFunction, name: str = "data", split: str = "train") -> Rows:
    """Make rows with a user's function.

    Args:
        data: what `rows_of` takes; for a function of files, one file or several.
        given: `function(row)` -> a row, or several, or None to leave it out; or `function(path)` -> rows of the file.
        name: what messages call the data.
        split: which split to read, if there are several.

    Raises:
        UserError: the function cannot be imported, fails on a file, or returns something else.
    """
    function = data_function_of(given)
    if _takes_files(function):
        return spooled(_of_files(function, source_places(data, name)))
    return spooled(_of_rows(function, rows_of(data, name, split), name))


def check_made(source: Any, given: str | DataFunction, name: str = "data", split: str = "train") -> None:
    """Refuse a local source for a user's function that does not exist, without reading it.

    Raises:
        UserError: as `made_rows` would raise it.
    """
    if _takes_files(data_function_of(given)):
        source_places(source, name)
    else:
        check_source(source, split)


def _takes_files(function: DataFunction) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # one that is not written in Python
        return False
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise UserError(f"data_function {_called(function)} must take a row, or a file as `path`")
    return parameters[0].name in _FILE_NAMES


def _called(function: DataFunction) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _of_files(function: DataFunction, paths: list[Path]) -> Iterator[SourceRow]:
    for path in paths:
        try:
            made = iter(function(path))
        except Exception as e:  # the code may raise anything
            raise _failed(function, f"on {str(path)!r}", e) from e
        number = 0
        while True:
            try:
                row = next(made)
            except StopIteration:
                break
            except Exception as e:  # as above
                raise _failed(function, f"on {str(path)!r}, behind row {number}", e) from e
            number += 1
            yield source_row(f"row {number}" if len(paths) == 1 else f"{path.name} row {number}", row)


def _of_rows(function: DataFunction, rows: Rows, name: str) -> Iterator[SourceRow]:
    left_out = 0
    for row in rows:
        if row.columns is None:
            yield row
            continue
        try:
            made = function(dict(row.columns))
            several = [made] if isinstance(made, Mapping) else [] if made is None else list(made)
        except Exception as e:  # as above
            yield SourceRow(row.where, None, str(_failed(function, "", e)))
            continue
        left_out += not several
        for number, one in enumerate(several, 1):
            yield source_row(row.where if len(several) == 1 else f"{row.where}, made row {number}", one)
    if left_out:
        logger.info("%s: data_function %s left out %d rows", name, _called(function), left_out)


def _failed(function: DataFunction, where: str, error: Exception) -> UserError:
    what = f"{type(error).__name__}: {shown(first_line(error), 200)}"
    return UserError(f"data_function {_called(function)} fails {where} with {what}".replace("  ", " "))
