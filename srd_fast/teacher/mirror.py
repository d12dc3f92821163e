"""A teacher cache at an address that fsspec knows (s3://, gs://, hf://, memory://): a local copy is read and filled.

Whole files are downloaded once, several at a time, before the cache is opened. New files are uploaded when all are
made, the index last, so that a reader finds either the old cache or the new one.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..errors import DamagedFileError, UserError, first_line
from ..files import temporary_path
from ..models import cache_folder
from . import shards
from .index import INDEX, META, digest, meta_digest, read_index
from .ranks import Ranks

_AT_A_TIME = 8
F = TypeVar("F", bound=Callable[..., Any])


class Mirror:
    """A local copy of the cache at an address.

    Args:
        address: an address such as "s3://bucket/cache".

    Raises:
        UserError: fsspec does not know the address, or lacks the package for it.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with self._naming("opened"):
            fs, self.root = fsspec.core.url_to_fs(address)
        self.fs: Any = fs
        is_here = isinstance(fs, LocalFileSystem)
        self.folder = Path(self.root) if is_here else cache_folder() / "teacher_caches" / digest(address.encode())
        self._is_copy = not is_here

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors name the address, not the copy."""
        try:
            yield
        except UserError as e:
            e.args = (str(e).replace(str(self.folder), self.address),)
            raise

    @contextmanager
    def _naming(self, done: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as e:  # each kind of address has errors of its own
            raise UserError(f"teacher_cache {self.address!r} cannot be {done}: {first_line(e)}") from e

    def _there(self) -> tuple[dict[str, str], bytes]:
        """The entries of the index at the address, and the index itself; both empty if there is none."""
        try:
            content = self.fs.cat_file(f"{self.root}/{INDEX}")
        except FileNotFoundError:
            return {}, b""
        return dict(json.loads(content)["files"]), content

    def fetch(self) -> None:
        """Download what the copy lacks. Any number of processes may call this at once; each file is downloaded once.

        Raises:
            UserError: the address cannot be read, or a downloaded file is not the one in the index.
        """
        if not self._is_copy:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._naming("read"):
            there, index = self._there()
            if not there:
                return
            with ThreadPoolExecutor(_AT_A_TIME) as pool:
                list(pool.map(self._fetch_file, there.items()))
            self._write(INDEX, index)

    def _fetch_file(self, entry: tuple[str, str]) -> None:
        name, told = entry
        if (self.folder / name).exists() and self._digest(name) == told:
            return
        self._write(name, self.fs.cat_file(f"{self.root}/{name}"))
        if self._digest(name) != told:
            raise UserError(f"teacher_cache {self.address!r}: {name} is not the one that its index says; make it again")

    def _digest(self, name: str) -> str | None:
        try:
            return meta_digest(self.folder) if name == META else shards.checked_digest(self.folder / name)
        except DamagedFileError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        partial = temporary_path(self.folder / name)
        with shards.locked(partial) as descriptor:
            assert descriptor is not None
            shards.publish(descriptor, partial, self.folder / name, content)

    def publish(self) -> None:
        """Upload what the address lacks, the index last.

        Raises:
            UserError: the address cannot be written.
        """
        if not self._is_copy:
            return
        with self._naming("written"):
            here, (there, _) = read_index(self.folder), self._there()
            if here == there:
                return
            new = [name for name in here if there.get(name) != here[name]]
            self.fs.makedirs(self.root, exist_ok=True)
            with ThreadPoolExecutor(_AT_A_TIME) as pool:
                list(pool.map(self._send, new))
            self._send(INDEX)

    def _send(self, name: str) -> None:
        self.fs.put_file(str(self.folder / name), f"{self.root}/{name}")


def mirror_of(folder: str | Path) -> Mirror | None:
    """The local copy of a cache at an address; None for a folder."""
    return Mirror(folder) if isinstance(folder, str) and "://" in folder else None


def at_addresses(run: F) -> F:
    """Decorate a function that fills the cache in its argument `folder`, so that it takes an address too."""
    signature = inspect.signature(run)

    @wraps(run)
    def on_a_copy(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        mirror = mirror_of(given.arguments["folder"])
        if mirror is None:
            return run(*args, **kwargs)
        ranks = Ranks(given.arguments.get("group"))
        with ranks.together():
            mirror.fetch()
        given.arguments["folder"] = mirror.folder
        with mirror.named():
            cache = run(*given.args, **given.kwargs)
        ranks.first(mirror.publish)
        return cache

    return cast(F, on_a_copy)
