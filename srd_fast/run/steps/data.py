"""The first step: rows of any source become tokenised samples, and some of them are held out."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ...data import content_id, prepare_dataset, read_source, source_path
from ...data.quickstart import make_quickstart_splits
from ...errors import UserError
from ...files import content_digest, write_text
from ...models import fingerprint
from ..config import RunConfig
from .run import QUICKSTART, Run, json_text, write_parquet

QUICKSTART_ROWS = 256


def prepare_inputs(config: RunConfig) -> Any:
    """What the prepared data depends on: the source of the rows, the tokenizer's model, template and limits.

    max_bad_rows is not among them: it decides only whether the step fails, never what it writes.
    """
    sources = [s for s in (config.data, config.validation) if isinstance(s, str)]
    stamps = [[s, _file_stamp(s)] for s in sources]
    limits = [config.template, config.max_prompt_length, config.max_response_length, config.max_rows, config.seed]
    return [stamps, config.validation, config.data_split, limits, fingerprint(config.teacher)]


def _file_stamp(source: str) -> str | None:
    path = source_path(source)
    return content_digest(path) if path is not None and path.is_file() else None


def prepare(run: Run) -> None:
    """Read and tokenise the data. Validation rows are held out if no file of them is given."""
    c = run.config
    train_rows: Sequence[Any]
    validation_rows: Sequence[Any]
    if c.data == QUICKSTART:
        held_out = c.validation if isinstance(c.validation, int) else 0
        try:
            train_rows, validation_rows = make_quickstart_splits(c.max_rows or QUICKSTART_ROWS, held_out, c.seed)
        except ValueError as e:
            raise UserError(f"config: max_rows and validation together: {e}") from e
    else:
        train_rows, validation_rows = read_source(c.data, c.data_split)[: c.max_rows], []
    if isinstance(c.validation, str):
        validation_rows = read_source(c.validation, "validation")
    train = prepare_dataset(train_rows, run.tokenisation, "data", c.max_bad_rows)
    if validation_rows:
        validation = prepare_dataset(validation_rows, run.tokenisation, "validation", c.max_bad_rows)
        rejected = train.rejected + validation.rejected
        train_set, validation_set = train.dataset, validation.dataset
    else:
        rejected = train.rejected
        train_set, validation_set = _hold_out(train.dataset, int(c.validation), c.seed)
    if c.curate.stages > len(train_set):
        raise UserError(f"config: curate.stages is {c.curate.stages} but the data has {len(train_set)} usable rows")
    folder = run.folder / "data"
    folder.mkdir(exist_ok=True)
    for name, part in (("train", train_set), ("validation", validation_set)):
        write_parquet(part, folder / f"{name}.parquet")
    listed = [{"where": where, "reason": reason} for where, reason in rejected]
    write_text(folder / "rejected.json", json_text(listed))


def _hold_out(samples: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `count` samples, chosen by a hash of their ids, so that added rows change the choice little."""
    if not 1 <= count < len(samples):
        raise UserError(
            f"validation is {count} but the data has {len(samples)} usable rows; give a file, or a number from 1 to "
            f"{len(samples) - 1}"
        )
    keys = [content_id({"id": i, "seed": seed}, ("id", "seed")) for i in samples["sample_id"]]
    chosen = set(sorted(range(len(keys)), key=lambda i: keys[i])[:count])
    return (
        samples.select([i for i in range(len(keys)) if i not in chosen]),
        samples.select(sorted(chosen)),
    )
