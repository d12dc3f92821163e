"""Generate answers for a data set in parts. Each part is computed in one piece, and written completely or not at all.

A part's prompts never change, whatever was finished before, and an engine computes each part separately. So a part that
is computed again after an interruption has the same result, even in dtypes in which an answer depends on its batch.
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

# Key in a part's metadata: a hash of its content.
CONTENT = b"srd_fast.content"


def cut(lengths: Sequence[int], size: int, keys: Sequence[str]) -> list[list[int]]:
    """Indices of the samples of each part: similar lengths together, longest first, ties ordered by their keys."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], keys[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def part_name(settings: Mapping[str, Any], sample_ids: Sequence[str], prompts: Sequence[Sequence[int]]) -> str:
    """File name of a part: a hash of everything on which its generations depend."""
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
    """Write a part. It is on the disk when this returns, and never visible half-written."""
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
        compute: an engine's method: token ids of samples -> pairs (index among them, result), in any order.
        parts: the indices of the samples of each part.
        ids: indices of samples -> their token ids.
        parallel: how many calls of `compute` run at once.

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
