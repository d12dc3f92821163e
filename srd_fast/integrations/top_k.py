"""Convert top-k files of other libraries to a teacher cache of kind "topk".

In all of them, row j of a sample's top-k is the teacher's distribution over token j + 1:

    token_ids, top_values                          DistillKit, not compressed
    compressed_logprobs, bytepacked_indices        DistillKit, compressed: its own decompressor reads them
    target_token_ids, target_logprobs              axolotl, after its preprocessing

Shape letters: N rows with loss, K classes of a row.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import IGNORE_INDEX, read_rows, template_key
from ..errors import UserError
from ..kernels import LOGIT_FLOOR
from ..teacher import TeacherCache, make_store, shards
from ..teacher.folder import add_to_index, begin, digests_of
from ..teacher.index import FORMAT, KEY_BYTES, read_index, sample_key
from ..teacher.stores import bits_for, pack_ids

Row = Mapping[str, Any]
Decode = Callable[[Row], tuple[Any, Any]]
_COLUMNS = (("token_ids", "top_values"), ("target_token_ids", "target_logprobs"))
# The probabilities of a row may add up to a little more than 1, because of rounding in the library that wrote them.
_EXCESS = 1e-2


def cache_from_top_k(
    rows: str | Path | Iterable[Row],
    folder: str | Path,
    *,
    num_classes: int,
    k: int,
    decode: Decode | None = None,
    template: str = "alpaca",
    shard_bytes: int = 64 << 20,
) -> TeacherCache:
    """Write a teacher cache of kind "topk" from the log-probabilities that another library has stored.

    The remaining probability becomes the bucket of all other classes. Such files have only temperature 1, and so has
    the
    cache: train with `temperature=1`. The samples to train on are the rows' own input_ids and labels.

    Args:
        rows: files that `read_rows` reads, or rows: input_ids, labels (-100: no loss; default: a loss on every token),
            and the top-k of each position.
        folder: where the cache will be.
        num_classes: V of the teacher's head, above every id.
        k: classes to keep of each row, at least 1, at most as many as the rows have, below `num_classes`.
        decode: a function that returns ids and log-probabilities, each [tokens - 1 or more, at least k], of a row in
            another format, such as a compressed one.
        template: the `template` of the training, with which the cache will be compared.
        shard_bytes: bytes of rows in one file.

    Returns:
        The cache, open for reading.

    Raises:
        UserError: the folder already has a cache, or a row has no top-k, too few classes, or numbers that are not a
            distribution. The message names the row.
    """
    folder = Path(folder)
    if not 1 <= k < num_classes:
        raise UserError(f"k must be at least 1 and below num_classes, {num_classes}, got {k}")
    if folder.exists() and read_index(folder):
        raise UserError(f"{str(folder)!r} has a teacher cache already: name another folder, or delete it")
    store = make_store("topk", num_classes, k, (1.0,))
    meta = {"format": FORMAT, "kind": "topk", "options": store.options, "teacher": "top-k files", "source": None}
    meta |= {"revision": None, "dtype": "float32", "template": template_key(template, None)}
    meta |= {"num_classes": num_classes, "softcap": None, "scale": 1.0}
    given: Iterable[Row] = read_rows(str(rows)) if isinstance(rows, (str, Path)) else rows
    samples = _encoded(given, num_classes, k, decode)
    first = next(samples, None)
    if first is None:
        raise UserError(f"rows has no sample with a loss, so there is nothing to write into {str(folder)!r}")
    begin(folder, meta)
    names, group, size = [], [first], _bytes(first)
    for sample in samples:
        if size + _bytes(sample) > shard_bytes:
            names.append(_written(folder, group))
            group, size = [], 0
        group.append(sample)
        size += _bytes(sample)
    names.append(_written(folder, group))
    add_to_index(folder, digests_of(folder, names))
    return TeacherCache(folder, store, verify=False)


def _encoded(rows: Iterable[Row], num_classes: int, k: int, decode: Decode | None) -> Iterator[dict[str, Tensor]]:
    """The tensors of each sample with loss, in the form of the cache's files."""
    seen: set[bytes] = set()
    for number, row in enumerate(rows, 1):
        where = f"row {number}"
        ids = _list(row, "input_ids", where)
        labels = _list(row, "labels", where) if row.get("labels") is not None else ids
        if len(labels) != len(ids):
            raise UserError(f"{where}: labels has {len(labels)} numbers and input_ids {len(ids)}: they must be equal")
        key = sample_key(ids, labels)
        places = [i - 1 for i, label in enumerate(labels) if i and label != IGNORE_INDEX]
        if key in seen or not places:
            continue
        seen.add(key)
        ids_NK, log_p_NK = _top_k(row, where, places, k, decode)
        _check(ids_NK, log_p_NK, num_classes, where)
        top_N1 = log_p_NK[:, :1]
        rest_N = 1 - log_p_NK.exp().sum(1)
        log_rest_N = torch.where(rest_N > 0, rest_N.log(), torch.full_like(rest_N, -math.inf)) - top_N1[:, 0]
        yield {
            "ids": pack_ids(ids_NK, bits_for(num_classes)),
            "logits": (log_p_NK - top_N1).half(),
            "log_rest": log_rest_N.clamp(min=LOGIT_FLOOR).float()[:, None],
            "keys": torch.frombuffer(bytearray(key), dtype=torch.uint8).view(1, KEY_BYTES),
            "num_rows": torch.tensor([len(places)]),
        }


def _top_k(row: Row, where: str, places: Sequence[int], k: int, decode: Decode | None) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [N, K] of the positions that predict a label, the likeliest first."""
    if decode is not None:
        ids, log_p = decode(row)
    else:
        names = next((pair for pair in _COLUMNS if row.get(pair[0]) is not None and row.get(pair[1]) is not None), None)
        if names is None:
            known = "; ".join(" with ".join(pair) for pair in _COLUMNS)
            raise UserError(
                f"{where} has the columns {', '.join(map(str, row))}: it needs {known}; or give decode, such as "
                "DistillKit's LogprobCompressor.decompress_to_sparse for its compressed rows"
            )
        ids, log_p = (row[name] for name in names)
    if len(ids) <= places[-1] or len(log_p) <= places[-1]:
        raise UserError(
            f"{where} has a top-k for {min(len(ids), len(log_p))} positions, and label {places[-1] + 1} needs more"
        )
    chosen = [(ids[i], log_p[i]) for i in places]
    if any(len(a) < k or len(b) < k for a, b in chosen):
        least = min(min(len(a), len(b)) for a, b in chosen)
        raise UserError(f"{where} has {least} classes at one position, fewer than k, {k}: lower k to that")
    ids_NK = torch.stack([torch.as_tensor(np.asarray(a), dtype=torch.int64) for a, _ in chosen])
    log_p_NK = torch.stack([torch.as_tensor(np.asarray(b), dtype=torch.float64) for _, b in chosen])
    best = log_p_NK.topk(k, dim=1)
    return ids_NK.gather(1, best.indices), best.values


def _check(ids_NK: Tensor, log_p_NK: Tensor, num_classes: int, where: str) -> None:
    """Refuse numbers that cannot be part of a distribution."""
    low, high = int(ids_NK.min()), int(ids_NK.max())
    if low < 0 or high >= num_classes:
        raise UserError(f"{where}: ids must be from 0 to {num_classes - 1}, got {low if low < 0 else high}")
    if (ids_NK.sort(1).values.diff(dim=1) == 0).any():
        raise UserError(f"{where}: the ids of one position repeat")
    total = log_p_NK.exp().sum(1).max().item()
    if not log_p_NK.isfinite().all() or total > 1 + _EXCESS:
        raise UserError(
            f"{where}: the values must be finite log-probabilities at temperature 1, and their probabilities add up to "
            f"{total:.4g} at one position; logits and padding of -inf are not (lower k if padding is the reason)"
        )


def _list(row: Row, name: str, where: str) -> list[int]:
    value = row.get(name)
    if value is None or isinstance(value, (str, Mapping)) or not len(value):
        raise UserError(f"{where} has no {name}, a list of token ids")
    return [int(x) for x in value]


def _bytes(sample: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in sample.values())


def _written(folder: Path, group: Sequence[Mapping[str, Tensor]]) -> str:
    """Write a file of samples, and return its name."""
    made = {name: torch.cat([sample[name] for sample in group]) for name in group[0]}
    content = hashlib.blake2b(b"".join(x.numpy().tobytes() for x in made.values()), digest_size=8).hexdigest()
    name = f"rows-{content}.safetensors"
    shards.write_once(folder / name, lambda: made, wait=True)
    return name
