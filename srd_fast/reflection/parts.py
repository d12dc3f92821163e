"""Generations of a data set in parts. Each part is computed as one piece of work, and written whole or not at all.

A part's prompts never change, whatever was finished before it, and an engine computes a part alone. An interrupted part
that is computed again therefore gives the same, even in dtypes in which a generation depends on its neighbours.
"""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import temporary_path

logger = logging.getLogger(__name__)

# Key of a part's own metadata: a hash of what it holds.
CONTENT = b"srd_fast.content"


def cut(lengths: Sequence[int], size: int, keys: Sequence[str]) -> list[list[int]]:
    """Indices of the samples of each part: similar lengths together, longest first, ties in the order of their keys."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], keys[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def part_name(settings: Mapping[str, Any], sample_ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> str:
    """File name of a part: a hash of everything that its generations depend on."""
    state = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for sample_id, prompt in zip(sample_ids, prompts):
        state.update(f"\0{sample_id}\0{len(prompt)}\0".encode())
        state.update(array("q", prompt).tobytes())
    return f"part-{state.hexdigest()}.parquet"


def read_part(path: Path, sample_ids: Sequence[str]) -> list[list[int]] | None:
    """Generated ids of each sample; None if the part is missing or damaged."""
    try:
        table = pq.read_table(path)
        generated: list[list[int]] = table["generated_ids"].to_pylist()
        digest = part_name({}, sample_ids, generated)
        if table["sample_id"].to_pylist() == list(sample_ids) and table.schema.metadata == {CONTENT: digest.encode()}:
            return generated
    except FileNotFoundError:
        return None
    except (OSError, LookupError, TypeError, ValueError, pa.ArrowException):
        pass
    logger.warning("%s is damaged and is made again", path)
    return None


def write_part(path: Path, sample_ids: Sequence[str], generated: Sequence[Sequence[int]]) -> None:
    """Write a part. It is on the disk when this returns, and never visible in part."""
    columns = {
        "sample_id": pa.array(sample_ids, pa.string()),
        "generated_ids": pa.array(list(generated), pa.list_(pa.int32())),
    }
    digest = part_name({}, sample_ids, generated)
    temporary = temporary_path(path)
    with temporary.open("wb") as f:
        pq.write_table(pa.table(columns, metadata={CONTENT: digest.encode()}), f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def compute_parts(
    compute: Callable[[list[list[int]]], Iterable[tuple[int, Any]]],
    parts: Sequence[Sequence[int]],
    ids: Callable[[Sequence[int]], list[list[int]]],
    parallel: int = 1,
) -> Iterator[tuple[int, list[Any]]]:
    """Compute parts, and yield each when it is finished.

    Args:
        compute: an engine's method: token ids of some samples -> pairs (index among them, result), in any order.
        parts: indices of the samples of each part.
        ids: indices of samples -> their token ids.
        parallel: calls of `compute` at once.

    Yields:
        The number of the part, and the results of its samples in their order.

    Raises:
        UserError: a result is missing. Other parts that are being computed are finished and yielded first.
    """

    def run(number: int) -> tuple[int, list[Any]]:
        given = ids(parts[number])
        found = dict(compute(given))
        missing = [i for i in range(len(given)) if i not in found]
        if missing:
            raise UserError(f"the engine gave nothing for {len(missing)} of {len(given)} samples")
        return number, [found[i] for i in range(len(given))]

    if parallel == 1:
        yield from map(run, range(len(parts)))
        return
    with ThreadPoolExecutor(parallel) as pool:
        todo, error = iter(range(len(parts))), None
        running: set[Future[tuple[int, list[Any]]]] = set()
        while True:
            while error is None and len(running) < parallel and (number := next(todo, None)) is not None:
                running.add(pool.submit(run, number))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if future.exception() is not None:
                    error = error or future.exception()
                else:
                    yield future.result()
        if error is not None:
            raise error
