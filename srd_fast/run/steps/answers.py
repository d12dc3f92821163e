"""Answers in place of the data's: those that the teacher gives, or the starting student's own reflections."""

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset

from ...curriculum import CurriculumPlan
from ...data import TOKENISED_FEATURES, answer_ends, answered, end_of
from ...errors import UserError
from ...files import remove, write_text
from ..config import RunConfig
from ..modes import MODES, STUDENT
from .data import tokenisation_of
from .run import ANSWERS, Run, json_text, write_parquet
from .selection import PARTS, reflect_inputs, reflect_together

logger = logging.getLogger(__name__)

COUNTS = "counts.json"


def answer_inputs(config: RunConfig) -> Any:
    """What the answers depend on, besides the plan and the reflections: how many there are, and how they are made."""
    return [MODES.get(config.mode).answers, config.answers_per_prompt, reflect_inputs(config), config.seed]


def answer_step(run: Run) -> None:
    """Write the kept samples with other answers, the plan of them, and how many there are.

    Empty answers are dropped. A cut answer has no label that ends it.
    """
    train, plan = run.data("train"), CurriculumPlan.load(run.folder / "plan.json")
    kept = set(plan.kept)
    samples = train.select([i for i, sample_id in enumerate(train["sample_id"]) if sample_id in kept])
    ends, eos = answer_ends(train, run.tokenizer), int(run.tokenizer.eos_token_id)
    limit = run.config.max_response_length
    taken, counts = set(train["sample_id"]), {"answers": 0, "empty": 0, "cut": 0}
    columns: dict[str, list[Any]] = {name: [] for name in TOKENISED_FEATURES}
    names: dict[str, list[str]] = {sample_id: [] for sample_id in samples["sample_id"]}
    rows: Any = samples
    decode: Any = run.tokenizer.decode
    for number, answers in enumerate(_rounds(run, samples)):
        for sample, ids in zip(rows, answers, strict=True):
            if not decode(ids, skip_special_tokens=True).strip():
                counts["empty"] += 1
                continue
            made = answered(sample, ids, _end(run, ids, end_of(sample["labels"], ends, eos)), limit)
            counts["cut"] += made["labels"][-1] not in ends
            made["sample_id"] = _name(sample["sample_id"], number, taken)
            names[sample["sample_id"]].append(made["sample_id"])
            for name, values in columns.items():
                values.append(made[name])
    counts["answers"] = len(columns["sample_id"])
    if not counts["answers"]:
        raise UserError(
            f"mode {run.config.mode!r}: all {counts['empty']} answers are empty, and nothing is left to train on; "
            "raise init_student.warmup_steps, or give a student that answers"
        )
    if counts["empty"] or counts["cut"]:
        logger.warning(
            "of %d answers %d are empty and are dropped, and %d are cut at max_new_tokens %d",
            counts["answers"] + counts["empty"], counts["empty"], counts["cut"], run.config.reflect.max_new_tokens,
        )  # fmt: skip
    folder = run.folder / ANSWERS
    folder.mkdir(exist_ok=True)
    write_parquet(Dataset.from_dict(columns, features=TOKENISED_FEATURES), folder / "train.parquet")
    subsets = [[name for sample_id in subset for name in names[sample_id]] for subset in plan.subsets]
    weights = {name: plan.weights[x] for x, of_prompt in names.items() for name in of_prompt if plan.weights}
    first = next(k for k, subset in enumerate(subsets) if subset)
    subsets[0], subsets[first] = (
        subsets[first],
        subsets[0],
    )  # all stages stay; the first needs rows
    plan.with_subsets(subsets, plan.dropped, weights).save(folder / "plan.json")
    write_text(folder / COUNTS, json_text(counts))
    remove(run.folder / PARTS)


def answer_counts(run: Run) -> dict[str, int]:
    """How many answers there are, and were empty or cut; nothing where the data's are trained on."""
    file = run.folder / ANSWERS / COUNTS
    own = MODES.get(run.config.mode).makes_answers
    return dict(json.loads(file.read_text(encoding="utf-8"))) if own and file.is_file() else {}


def _end(run: Run, ids: Sequence[int], end: int) -> int | None:
    """What ends an answer; None where its engine gave up at the limit."""
    return None if len(ids) >= run.config.reflect.max_new_tokens else end


def _name(sample_id: str, number: int, taken: set[str]) -> str:
    """The id of a sample's answer: of the first the sample's own."""
    if number == 0:
        return sample_id
    name = next(n for k in count() if (n := f"{sample_id}#{number + 1}" + "'" * k) not in taken)
    taken.add(name)
    return name


def _rounds(run: Run, samples: Dataset) -> Iterator[list[list[int]]]:
    """Token ids of one answer to each sample, as often as there are answers a prompt."""
    rounds = range(run.config.answers_per_prompt)
    if MODES.get(run.config.mode).answers == STUDENT:
        made_already = rounds[: run.config.reflect.attempts]
        for number in made_already:
            yield _reflections(run, samples["sample_id"], number)
        rounds = rounds[len(made_already) :]
        model = run.start
    else:
        model = run.config.teacher
    for number in rounds:
        made = reflect_together(run, model, run.folder / PARTS, samples, run.config.seed + number)
        yield made["generated_ids"]


def _reflections(run: Run, sample_ids: Sequence[str], number: int = 0) -> list[list[int]]:
    """The reflections of samples, or another attempt. Those from before their ids were kept are tokenised again."""
    table = pq.read_table(run.folder / "reflections.parquet")
    place = {sample_id: i for i, sample_id in enumerate(table["sample_id"].to_pylist())}
    texts = table["generation"].to_pylist()
    kept = table["generated_ids"].to_pylist() if "generated_ids" in table.column_names else [None] * len(texts)
    if number:
        kept = [attempts[number] for attempts in table["attempt_ids"].to_pylist()]
    tokenisation = tokenisation_of(run.config, run.tokenizer)
    guard = tokenisation.encoder.guard

    def ids(i: int) -> list[int]:
        given: list[int] | None = kept[i]
        return tokenisation.response_ids(guard(texts[i], False), ended=True) if given is None else given

    return [ids(place[sample_id]) for sample_id in sample_ids]
