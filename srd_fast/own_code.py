"""Functions of the user's own, named by where they are: `package.module:function` or `path/to/file.py:function`."""

import importlib
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError, first_line
from .suggest import unknown_name


def function_of(name: str, kind: str) -> Callable[..., Any]:
    """Import a function by its name.

    Args:
        name: `package.module:function` or `path/to/file.py:function`.
        kind: what messages call it.

    Raises:
        UserError: there is no such file, module or function, or its code has an error.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError(f"{kind} {name!r} must be package.module:function or path/to/file.py:function")
    module = _module(place, f"{kind} {name!r}")
    if not hasattr(module, attribute):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UserError(f"{kind} {name!r}: {unknown_name('function', attribute, own)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise UserError(f"{kind} {name!r} is not a function but of type {type(function).__name__}")
    return function


def file_of(name: str) -> Path | None:
    """The file of a name such as `path/to/file.py:function`; None for a name with a module."""
    place = name.rpartition(":")[0]
    return Path(place).expanduser().resolve() if place.endswith(".py") else None


def _module(place: str, who: str) -> ModuleType:
    path = Path(place).expanduser().resolve() if place.endswith(".py") else None
    if path is not None and not path.is_file():
        raise UserError(f"{who}: file {place!r} does not exist")
    try:
        return importlib.import_module(place) if path is None else _module_of_file(path, path.stat().st_mtime_ns)
    except Exception as e:  # the code may raise anything
        if isinstance(e, ModuleNotFoundError) and path is None and f"{place}.".startswith(f"{e.name}."):
            way = "install it, put its folder on PYTHONPATH, or write path/to/file.py:function"
            raise UserError(f"{who}: there is no module {e.name!r}; {way}") from e
        raise UserError(f"{who}: importing {place} failed with {type(e).__name__}: {first_line(e)}") from e


@lru_cache
def _module_of_file(path: Path, modified_ns: int) -> ModuleType:
    """Run the file as a module of its own. It runs once, and again after it has changed."""
    name = re.sub(r"\W", "_", str(path))  # from the whole path, so that it hides no other module
    module = sys.modules[name] = ModuleType(name)  # where dataclasses and pickle look for it
    module.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), vars(module))
    return module
