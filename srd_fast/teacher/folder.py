"""A teacher cache's folder while it is filled: its start, the removal of damaged and unfinished files, its index."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DamagedFileError, UserError
from ..files import temporary_path
from . import shards
from .index import (
    INDEX,
    META,
    compare_meta,
    digest,
    json_text,
    meta_digest,
    read_index,
    read_meta,
    verify_files,
    write_index,
)

logger = logging.getLogger(__name__)


def begin(folder: Path, meta: dict[str, Any]) -> dict[str, str]:
    """Write meta.json, or compare it with the existing one; return the index."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"teacher_cache {str(folder)!r} cannot be made: {e}") from e
    index, path, content = _usable_index(folder), folder / META, json_text(meta).encode()
    if META in index or path.exists():
        try:
            compare_meta(folder, read_meta(folder, index), meta)
            return index
        except DamagedFileError as e:
            if index.get(META) != digest(content):
                raise
            _say_again(e)
    with shards.locked(temporary_path(path)) as descriptor:
        assert descriptor is not None
        shards.publish(descriptor, temporary_path(path), path, content)
    return index


def _usable_index(folder: Path) -> dict[str, str]:
    """The index; an empty one if it is damaged, in which case the files themselves are read."""
    try:
        return read_index(folder)
    except DamagedFileError as e:
        _say_again(e)
        (folder / INDEX).unlink(missing_ok=True)
        return {}


def _say_again(error: UserError) -> None:
    logger.warning("%s; making it again", error)


def drop_damaged(folder: Path, index: dict[str, str]) -> None:
    """Delete files with wrong content, listed in the index or left by a killed process."""
    named = {name: index.get(name) for name in (*index, *(p.name for p in folder.glob("*.safetensors")))}
    named.pop(META, None)
    damaged = verify_files(folder, named)
    for name, error in damaged:
        _say_again(error)
        (folder / name).unlink(missing_ok=True)
        index.pop(name, None)
    drop_from_index(folder, dict(damaged))


def drop_from_index(folder: Path, names: Collection[str]) -> None:
    """Remove deleted files from the index."""
    if names:
        write_index(folder, lambda files: {n: d for n, d in files.items() if n not in names})


def write_all(
    folder: Path,
    makers: Mapping[str, Callable[[], Mapping[str, Tensor]]],
    done: Callable[[str], None],
    threads: int = 1,
) -> None:
    """Write files that do not exist. At the end, wait for files that other processes are writing.

    Args:
        folder: the cache's folder.
        makers: file name -> the function that makes its tensors.
        done: called with each finished file's name.
        threads: number of threads that make files at once.
    """

    def write(name: str) -> bool:
        return shards.write_once(folder / name, makers[name], wait=False)

    waiting = []
    with ThreadPoolExecutor(threads) as pool:
        for name, is_there in zip(makers, map(write, makers) if threads == 1 else pool.map(write, makers)):
            if is_there:
                done(name)
            else:
                waiting.append(name)
    for name in waiting:
        shards.write_once(folder / name, makers[name], wait=True)
        done(name)


def drop_unfinished(folder: Path) -> None:
    """Delete the hidden files of killed processes. Files that are being written are locked, and stay."""
    for partial in folder.glob(temporary_path(Path("*")).name):
        with shards.locked(partial, wait=False) as descriptor:
            if descriptor is not None:
                partial.unlink(missing_ok=True)


def add_to_index(folder: Path, digests: Mapping[str, str]) -> None:
    """Add finished files to the index.

    Args:
        folder: the cache's folder.
        digests: the digest of each file's content.
    """
    write_index(folder, lambda files: {**digests, **files, META: meta_digest(folder)})


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digest of each file, after comparing it with the file's content."""
    return {name: shards.checked_digest(folder / name) for name in names}
