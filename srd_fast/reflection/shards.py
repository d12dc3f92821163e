"""One data set on several machines: which samples belong to which machine, and how their scores are joined."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from ..errors import UserError, first_line
from ..files import temporary_path

# Key of a shard file's own metadata: what its scores were made from.
MADE_FROM = b"srd_fast.made_from"


def parse_shard(given: str) -> tuple[int, int]:
    """Read "k/n", k from 1, as (k, n).

    Raises:
        UserError: the text has another form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", given.strip())
    k, n = (int(x) for x in match.groups()) if match else (0, 0)
    if not 1 <= k <= n:
        raise UserError(f"shard must be k/n with k from 1 to n, such as 3/16, got {given!r}")
    return k, n


def samples_of_shard(sample_ids: Sequence[str], shard: str) -> list[int]:
    """Indices of the samples of shard "k/n": every n-th by a hash of the id, whatever the order of the rows."""
    k, n = parse_shard(shard)

    def place(index: int) -> bytes:
        return hashlib.blake2b(sample_ids[index].encode(), digest_size=8).digest()

    return sorted(sorted(range(len(sample_ids)), key=place)[k - 1 :: n])


def shard_file(folder: Path, shard: str) -> Path:
    """The file, in a run folder, for the scores of shard "k/n"."""
    k, n = parse_shard(shard)
    return folder / f"reflections-{k:05d}-of-{n:05d}.parquet"


def shard_files(folder: Path) -> list[Path]:
    """The files with the scores of all shards in a run folder."""
    return sorted(folder.glob("reflections-*-of-*.parquet"))


def merge_shards(files: Sequence[Path], sample_ids: Sequence[str], made_from: str) -> Dataset:
    """Join the scores of all shards, in the order of the samples.

    Args:
        files: the files with the scores of each shard.
        sample_ids: the ids of the whole data set.
        made_from: what the scores must have been made from.

    Returns:
        The scores of all samples.

    Raises:
        UserError: a file was made from something else, shards or samples are missing, or samples occur twice. The
            message names them.
    """
    tables, counts = [], set()
    for file in files:
        try:
            table = pq.read_table(file, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as e:
            raise UserError(f"{str(file)!r} cannot be read ({first_line(e)}): reflect that shard again") from e
        metadata: dict[bytes, Any] = table.schema.metadata or {}
        if metadata.get(MADE_FROM) != made_from.encode():
            raise UserError(
                f"{str(file)!r} was made from another student, other data or other settings than this run's: "
                "delete it, or reflect that shard again"
            )
        counts.add(int(file.stem.rpartition("-")[2]))
        tables.append(table.replace_schema_metadata(None))
    if len(counts) != 1:
        raise UserError(f"shards of different splits lie side by side ({sorted(counts)} shards): delete one sort")
    n = counts.pop()
    missing = sorted(set(range(1, n + 1)) - {int(f.stem.split("-")[1]) for f in files})
    if missing:
        raise UserError(
            f"{len(missing)} of {n} shards are missing, the first is {missing[0]}/{n}: srd-fast reflect CONFIG "
            f"--shard {missing[0]}/{n}, or delete the others to do everything here"
        )
    merged = pa.concat_tables(tables, promote_options="default")  # `reason` has type null in a file without reasons
    place = pc.index_in(pa.array(sample_ids, pa.string()), merged["sample_id"].combine_chunks())
    if place.null_count:
        lost = sample_ids[place.is_null().to_pylist().index(True)]
        raise UserError(f"{place.null_count} samples are in no shard, the first is {lost!r}: reflect the shards again")
    if len(merged) != len(sample_ids):
        raise UserError(f"the shards hold {len(merged)} rows for {len(sample_ids)} samples: some are there twice")
    return Dataset(merged.take(place))


def write_shard(scores: Dataset, target: Path, made_from: str) -> None:
    """Write a shard's scores, with what they were made from."""
    table = scores.data.table.replace_schema_metadata({MADE_FROM: made_from.encode()})
    pq.write_table(table, temporary_path(target), write_page_checksum=True)
    temporary_path(target).replace(target)
