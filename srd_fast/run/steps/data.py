"""The first step: rows of any source become tokenised samples, and some of them are held out."""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...data import (
    TRAIN_ON,
    Rows,
    Tokenisation,
    content_id,
    flat_lists,
    made_rows,
    prepare_dataset,
    prompt_lengths,
    read_source,
    source_files,
    source_path,
    teachers_samples,
    token_counts,
)
from ...data.prompts import PROMPTS_CUT, RESPONSES_CUT, TURNS_DROPPED
from ...data.quickstart import make_quickstart_splits
from ...errors import UserError
from ...files import content_digest, write_text
from ...models import (
    check_positions,
    fingerprint,
    is_encoder_decoder,
    load_config,
    load_tokenizer,
    tokenizer_digest,
)
from ...own_code import file_of
from ...reflection.signals import OF_ROWS, check_rows
from ...selection import ALL
from ..config import RunConfig
from ..modes import mode_of, privileged_template, reflects
from .run import PRUNE, QUICKSTART, Run, json_text, write_parquet

QUICKSTART_ROWS = 256
VALIDATION = "validation"
# File in the folder data: what was cut or dropped, and how many validation prompts are also training prompts.
COUNTS = "counts.json"
# Spaces and punctuation of prose. Signs of arithmetic and code are part of a question.
_BETWEEN_WORDS = re.compile(r"[\s.,;:!?'\"()\[\]\u00a1\u00ab\u00bb\u00bf\u2010-\u2027\u3001-\u3011]+")

logger = logging.getLogger(__name__)


def prepare_inputs(config: RunConfig) -> Any:
    """What the prepared data depends on: the source of the rows, the tokenizer's model, template and limits.

    max_bad_rows is not part of it: it decides only whether the step fails, never what it writes.
    """
    splits = ((config.data, config.data_split), (config.validation, VALIDATION))
    stamps = [[s, _file_stamp(s, split)] for s, split in splits if not isinstance(s, int)]
    limits = [config.template, config.max_prompt_length, config.max_response_length, config.max_rows, config.seed]
    speech = [config.chat_template_kwargs, config.parse_special_tokens]
    unlike: list[Any] = [speech] if speech != [{}, None] else []  # runs of versions without these settings stay valid
    unlike += _rows_made(config)
    unlike += _students_own(config)
    return [stamps, config.validation, config.data_split, limits, fingerprint(config.teacher), *unlike]


def _students_own(config: RunConfig) -> list[str]:
    """A digest of the student's tokenizer, if it may give other tokens than the teacher's."""
    if config.student == PRUNE:
        return []
    ours, theirs = (tokenizer_digest(load_tokenizer(source)) for source in (config.student, config.teacher))
    return [] if ours == theirs else [ours]


def _rows_made(config: RunConfig) -> list[Any]:
    """Settings that make the rows; empty for those with which older versions made the same rows."""
    made: dict[str, Any] = {}
    if config.columns:
        made["columns"] = config.columns
    if config.data_function is not None:
        file = file_of(config.data_function)
        made["data_function"] = [config.data_function, None if file is None else content_digest(file)]
    if config.train_on != TRAIN_ON[0]:
        made["train_on"] = config.train_on
    if privileged_template(config) is not None:
        made["privileged"] = [privileged_template(config), config.max_privileged_length]
    return [made] if made else []


def _file_stamp(source: Any, split: str) -> Any:
    """A digest of a source's file, or of each of its files; None for the hub."""
    if isinstance(source, str):
        path = source_path(source)
        if path is not None and path.is_file():
            return content_digest(path)
    return [[str(file), content_digest(file)] for file in source_files(source, split)] or None


def read_data(config: RunConfig, source: Any, name: str, split: str) -> Rows:
    """Rows of a source, made by the config's data_function if there is one."""
    return read_source(source, split) if config.data_function is None else made_rows(source, config.data_function, name)


def tokenisation_of(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenisation:
    """How a run's rows are tokenised."""
    return Tokenisation(
        tokenizer,
        config.template,
        config.max_prompt_length,
        config.max_response_length,
        config.chat_template_kwargs,
        config.parse_special_tokens,
        is_encoder_decoder(load_config(config.teacher)),
        config.train_on,
        privileged_template(config),
        config.max_privileged_length,
    )


def prepare(run: Run) -> None:
    """Read and tokenise the data. Validation rows are held out unless a source of them is given."""
    c = run.config
    tokenisation = tokenisation_of(c, run.tokenizer)
    train_rows: Any
    validation_rows: Any
    if c.data == QUICKSTART:
        held_out = c.validation if isinstance(c.validation, int) else 0
        try:
            train_rows, validation_rows = make_quickstart_splits(c.max_rows or QUICKSTART_ROWS, held_out, c.seed)
        except ValueError as e:
            raise UserError(f"config: max_rows and validation together: {e}") from e
    else:
        train_rows, validation_rows = read_data(c, c.data, "data", c.data_split).head(c.max_rows), []
    if not isinstance(c.validation, int):
        validation_rows = read_data(c, c.validation, VALIDATION, VALIDATION)
    train = prepare_dataset(train_rows, tokenisation, "data", c.max_bad_rows, c.columns)
    if validation_rows:
        validation = prepare_dataset(validation_rows, tokenisation, VALIDATION, c.max_bad_rows, c.columns)
        rejected, cuts = train.rejected + validation.rejected, train.cuts + validation.cuts
        train_set, validation_set = train.dataset, validation.dataset
    else:
        assert isinstance(c.validation, int)
        rejected, cuts = train.rejected, train.cuts
        train_set, validation_set = _hold_out(train.dataset, c.validation, c.seed)
    if c.curate.stages > len(train_set):
        raise UserError(f"config: curate.stages is {c.curate.stages} but the data has {len(train_set)} usable rows")
    _check_positions(c, train_set, validation_set)
    folder = run.folder / "data"
    folder.mkdir(exist_ok=True)
    for name, part in (("train", train_set), ("validation", validation_set)):
        write_parquet(part, folder / f"{name}.parquet")
    listed = [{"where": where, "reason": reason} for where, reason in rejected]
    write_text(folder / "rejected.json", json_text(listed))
    same, near = _overlap(_prompts(train_set), _prompts(validation_set))
    if same or near:
        logger.warning(
            "%d of %d validation prompts are also training prompts, and %d more except for case, spaces or punctuation",
            same, len(validation_set), near,
        )  # fmt: skip
    counts = {name: cuts[name] for name in (PROMPTS_CUT, RESPONSES_CUT, TURNS_DROPPED)}
    write_text(folder / COUNTS, json_text({**counts, "validation_in_training": same, "validation_near_training": near}))


def check_rows_of_run(run: Run) -> None:
    """Refuse settings that do not fit the prepared rows.

    Raises:
        UserError: no row has what a signal, a judge or a metric needs, or a row that is certainly trained on does not
            fit into a micro-batch. The message names the key.
    """
    c, args = run.config, run.args
    reflected = reflects(c)
    asked = {
        "reflect.signals": ("train", c.reflect.signals if reflected else ()),
        "reflect.judge": ("train", (c.reflect.judge,) if reflected and c.reflect.attempts > 1 else ()),
        "evaluate.metrics": (VALIDATION, c.evaluate.metrics),
        "distill.eval_metrics": (VALIDATION, args.answer_metrics if args.eval_generate else ()),
    }
    for key, (split, names) in asked.items():
        if OF_ROWS & {*names}:
            rows = run.data(split)
            try:
                check_rows(names, rows, f"the {len(rows)} {'training' if split == 'train' else split} rows")
            except UserError as e:
                raise UserError(f"config: {key}: {e}") from e
    if args.max_tokens_per_batch and not mode_of(c).makes_answers:
        _check_micro_batches(c, run.data("train"), args.max_tokens_per_batch)


def _check_micro_batches(config: RunConfig, train: Dataset, most: int) -> None:
    """Refuse more rows than the curriculum can drop that are longer than a micro-batch."""
    start = is_encoder_decoder(load_config(config.teacher))
    lengths = sorted(length + start for length in token_counts(train))
    c, certain = config.curate, 1
    if not c.band and not isinstance(c.keep, str) and config.distill.get("sample_selection", ALL) == ALL:
        certain = len(lengths) if c.method == "none" else max(1, int(len(lengths) * c.keep) - 1)
    if lengths[certain - 1] > most:
        raise UserError(
            f"config: distill.max_tokens_per_batch is {most}, and {sum(x > most for x in lengths)} of {len(lengths)} "
            f"training rows are longer, the longest has {lengths[-1]} tokens; raise it to that, or lower "
            "max_prompt_length or max_response_length"
        )


def _check_positions(config: RunConfig, train: Dataset, validation: Dataset) -> None:
    """Refuse rows that are too long for a model, in a forward pass or when it answers."""
    students = {} if config.student == PRUNE else {"student": config.student}
    way_out = "lower max_{}_length, max_response_length or max_new_tokens"
    of_teacher = way_out.format("prompt" if privileged_template(config) is None else "privileged")
    for samples, new_tokens in ((train, config.reflect.max_new_tokens), (validation, config.evaluate.max_new_tokens)):
        for seen, models, way in (
            (teachers_samples(samples), {"teacher": config.teacher}, of_teacher),
            (samples, students, way_out.format("prompt")),
        ):
            ids = seen["sample_id"]
            check_positions(token_counts(seen), prompt_lengths(seen), ids, models, way, new_tokens)


def _hold_out(samples: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off samples, chosen by a hash of their ids, so that added rows change the choice little.

    Samples with the same prompt stay together. If that makes `count` impossible, the nearest possible number is taken,
    with a warning.

    Args:
        samples: tokenised samples.
        count: how many to split off, at least 1 and fewer than there are.
        seed: seed of the hash.

    Returns:
        The samples that are left, and those split off, each in their order.

    Raises:
        UserError: the count is out of range, or all samples have the same prompt.
    """
    if not 1 <= count < len(samples):
        raise UserError(
            f"validation is {count} but the data has {len(samples)} usable rows; give a file, or a number from 1 to "
            f"{len(samples) - 1}"
        )
    keys = [content_id({"id": i, "seed": seed}, ("id", "seed")) for i in samples["sample_id"]]
    prompts = _prompt_digests(samples)
    groups: dict[bytes, list[int]] = {}
    for i in sorted(range(len(keys)), key=keys.__getitem__):
        groups.setdefault(prompts[i], []).append(i)
    if len(groups) == 1:
        raise UserError(f"validation is {count} but all {len(samples)} rows have one prompt; give a file of validation")
    chosen: set[int] = set()
    left: list[list[int]] = []
    for group in groups.values():
        if len(chosen) + len(group) <= count:
            chosen.update(group)
        else:
            left.append(group)
    smallest = min(left, key=len)
    lacking = count - len(chosen)
    if len(left) > 1 and (not chosen or len(smallest) - lacking < lacking):
        chosen.update(smallest)
    if len(chosen) != count:
        logger.warning(
            "validation: %d rows are held out, not %d, because rows with one prompt stay together", len(chosen), count
        )
    return samples.select([i for i in range(len(keys)) if i not in chosen]), samples.select(sorted(chosen))


def _prompt_digests(samples: Dataset) -> list[bytes]:
    """Digests of each sample's prompt; the prompts themselves may be gigabytes."""
    lengths = iter(prompt_lengths(samples))
    tables: Any = samples.select_columns(["input_ids"]).with_format("arrow")
    digests = []
    for table in tables.iter(10_000):
        ids, starts, _ = flat_lists(table["input_ids"])
        digests += [_digest(ids[start : start + next(lengths)].tobytes()) for start in starts]
    return digests


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _prompts(samples: Dataset) -> Iterator[str]:
    for batch in samples.select_columns(["prompt"]).iter(1000):
        yield from batch["prompt"]


def _overlap(train: Iterable[str], validation: Iterable[str]) -> tuple[int, int]:
    """Count validation prompts that are also training prompts.

    Args:
        train: the training prompts.
        validation: the validation prompts.

    Returns:
        How many are equal, and how many more are equal except for case, punctuation, spaces and Unicode variants of
        characters.
    """
    exact, near = set[bytes](), set[bytes]()
    for prompt in train:
        exact.add(_digest(prompt.encode()))
        near.add(_digest(_words(prompt).encode()))
    same = alike = 0
    for prompt in validation:
        same += _digest(prompt.encode()) in exact
        alike += _digest(_words(prompt).encode()) in near
    return same, alike - same


def _words(text: str) -> str:
    return _BETWEEN_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
