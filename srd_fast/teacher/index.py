"""The files of a teacher cache's folder: what it was made from, which files are finished, and what each must hold.

    meta.json               what made it: teacher, dtype, template, kind of store
    head.safetensors        the teacher's head (only for kind "hidden")
    rows-<hash>.safetensors keys [S, 16], num_rows [S] and the rows of S samples, one sample after the other
    lse-<hash>.safetensors  log-sum-exps of another file's rows, see below (kind "hidden", not always there)
    index.json              its finished files and the digest of each

A sample's key is a hash of its token ids and of which of them have loss. So the same text is stored only once, whatever
data set and order it comes in.

Log-sum-exps are in files of their own, so that files with hidden states do not depend on them and temperatures can be
added later. Such a file has `rows` [16], the digest of the file whose rows it belongs to; `classes` [1], over how many
of the first classes the sums are; and for each temperature T an [N] tensor "lse@T".
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from ..data import IGNORE_INDEX
from ..errors import DamagedFileError, StaleCacheError, UserError
from ..files import temporary_path
from . import shards

FORMAT = 1
KEY_BYTES = 16
# Tensors of a file whose first dimension is the sample, not the row.
OF_SAMPLES = ("keys", "num_rows")
META, HEAD, INDEX = "meta.json", "head.safetensors", "index.json"
_LSE = "lse@"
# Names of meta.json's fields in messages, in the order in which they are compared: the likeliest difference first.
_FIELDS = {
    "format": "format",
    "kind": "kind",
    "dtype": "dtype",
    "template": "template",
    "options": "options",
    "revision": "teacher's revision",
    "source": "teacher's files",
    "teacher": "teacher (weights or configuration)",
}


def sample_key(input_ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """A hash, 16 bytes, of a sample's token ids and of which of them have loss."""
    state = hashlib.blake2b(np.asarray(input_ids, dtype="<i4").tobytes(), digest_size=KEY_BYTES)
    state.update(np.packbits(np.asarray(labels) != IGNORE_INDEX).tobytes())
    return state.digest()


def compare_meta(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the meta.json of a cache with what is wanted. None in `wanted` is not compared.

    Raises:
        StaleCacheError: for the first field that differs.
    """
    for field, what in _FIELDS.items():
        if wanted.get(field) is not None and found.get(field) != wanted[field]:
            raise StaleCacheError(folder, what, found.get(field), wanted[field])


def json_text(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DamagedFileError(path, f"cannot be read: {e}") from e
    if not isinstance(content, dict):
        raise DamagedFileError(path, "it holds no object")
    return content


def read_meta(folder: Path, index: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of meta.json, after comparing its digest with the index."""
    if META in index and meta_digest(folder) != index[META]:
        raise DamagedFileError(folder / META, "its checksum is not the one in the index")
    return read_json(folder / META)


def read_index(folder: Path) -> dict[str, str]:
    """File -> digest of every finished file; empty as long as none is finished."""
    path = folder / INDEX
    if not path.exists():
        return {}
    content = read_json(path)
    files, own = content.get("files"), content.get("digest")
    if not isinstance(files, dict) or own != _index_digest(files):
        raise DamagedFileError(path, "its checksum is not that of its entries")
    return files


def _index_digest(files: Mapping[str, str]) -> str:
    return digest(json_text(files).encode())


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def meta_digest(folder: Path) -> str:
    try:
        return digest((folder / META).read_bytes())
    except OSError as e:
        raise DamagedFileError(folder / META, f"cannot be read: {e}") from e


def write_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Replace the index by the result of `change`, under a lock."""
    partial = temporary_path(folder / INDEX)
    with shards.locked(partial) as descriptor:
        assert descriptor is not None
        files = dict(sorted(change(read_index(folder)).items()))
        content = json_text({"files": files, "digest": _index_digest(files)})
        shards.publish(descriptor, partial, folder / INDEX, content.encode())


def verify_files(folder: Path, files: Mapping[str, str | None]) -> list[tuple[str, UserError]]:
    """Find files whose content is not what it should be.

    Args:
        folder: the cache's folder.
        files: name -> the digest that the file must have; None: the digest stored in the file itself.

    Returns:
        Name and error of each such file.
    """

    def check(name: str) -> UserError | None:
        path, told = folder / name, files[name]
        try:
            found = meta_digest(folder) if name == META else shards.checked_digest(path)
        except DamagedFileError as e:
            return e
        if told is not None and told != found:
            return DamagedFileError(path, f"its checksum is {found}, not {told} as the index says")
        return None

    with ThreadPoolExecutor() as pool:
        return [(name, error) for name, error in zip(files, pool.map(check, files)) if error is not None]


def lse_name(temperature: float) -> str:
    """The name of the tensor with log-sum-exps at a temperature."""
    return f"{_LSE}{temperature!r}"


def lse_at(temperature: float, names: Iterable[str]) -> str | None:
    """The one of `names` that stands for log-sum-exps at a temperature, or None."""
    of_lse = (name for name in names if name.startswith(_LSE))
    return next((name for name in of_lse if math.isclose(float(name[len(_LSE) :]), temperature, rel_tol=1e-9)), None)


def lse_files(folder: Path, index: Mapping[str, str]) -> dict[str, dict[int, dict[str, str]]]:
    """Where log-sum-exps are: digest of a file with rows -> number of classes -> name of a tensor -> file."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in index:
        if name.startswith("lse-"):
            with safe_open(folder / name, "pt") as f:
                of_rows, classes = f.get_tensor("rows").numpy().tobytes().hex(), int(f.get_tensor("classes"))
                names = list(f.keys())
            tensors = dict.fromkeys((x for x in names if x.startswith(_LSE)), name)
            found.setdefault(of_rows, {}).setdefault(classes, {}).update(tensors)
    return found


def contents(path: Path) -> list[tuple[bytes, int]]:
    """Key and number of rows of each sample in a file, in the file's order."""
    with safe_open(path, "pt") as f:
        keys, counts = f.get_tensor("keys").numpy(), f.get_tensor("num_rows").tolist()
    return [(key.tobytes(), count) for key, count in zip(keys, counts)]
