"""Answers that replace the data's: the teacher's, or the student's own, made once or again before each later stage."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets

from ...curriculum import CurriculumPlan
from ...data import answer_ends, answered, end_of
from ...errors import UserError
from ...files import remove, write_text
from ..config import RunConfig
from ..modes import STUDENT, mode_of
from .data import tokenisation_of
from .run import ANSWERS, Run, json_text, read_samples, write_parquet
from .selection import PARTS, reflect_inputs, reflect_together

logger = logging.getLogger(__name__)

COUNTS = "counts.json"
# Number of seeds for a stage; a prompt has at most as many answers.
_SEEDS = 1000


def answer_inputs(config: RunConfig) -> Any:
    """What the answers depend on, besides the plan and the reflections: their number, and how they are generated."""
    again = ["again"] if config.answers_again else []
    return [mode_of(config).answers, config.answers_per_prompt, reflect_inputs(config), config.seed, *again]


def answer_step(run: Run) -> None:
    """Write the kept samples with other answers, their plan, and the numbers of answers.

    With `answers_again`, only the samples of the first stage are answered; those of a later stage are answered before
    it. Without, empty answers are dropped. An answer that was cut has no end token.
    """
    config, plan = run.config, CurriculumPlan.load(run.folder / "plan.json")
    names = _names(run, plan)
    samples = _samples_of(run, plan.stage_ids(0) if config.answers_again else plan.kept)
    made, counts = _answered(run, samples, names, _rounds(run, samples))
    if not counts["answers"]:
        raise UserError(
            f"mode {config.mode!r}: all {counts['empty']} answers are empty, and nothing is left to train on; "
            "raise init_student.warmup_steps, or give a student that answers"
        )
    folder = run.folder / ANSWERS
    folder.mkdir(exist_ok=True)
    write_parquet(made, folder / "train.parquet")
    if not config.answers_again:
        there = set(made["sample_id"])
        names = {sample_id: [x for x in of_prompt if x in there] for sample_id, of_prompt in names.items()}
    subsets = [[name for sample_id in subset for name in names[sample_id]] for subset in plan.subsets]
    weights = {name: plan.weights[x] for x, of_prompt in names.items() for name in of_prompt if plan.weights}
    first = next(k for k, subset in enumerate(subsets) if subset)
    # The number of stages stays, and the first stage must have rows.
    subsets[0], subsets[first] = subsets[first], subsets[0]
    plan.with_subsets(subsets, plan.dropped, weights).save(folder / "plan.json")
    write_text(folder / COUNTS, json_text(counts))
    remove(run.folder / PARTS)


def answer_again(run: Run, stage: int, student: Path) -> None:
    """Let the student before a stage answer that stage's prompts, unless it has done so already.

    Args:
        run: the run.
        stage: the stage's number, from 1 (the second stage).
        student: the checkpoint's folder.
    """
    if _is_answered(run, stage):
        return
    began, checkpoints = time.monotonic(), run.folder / "checkpoints"
    plan = CurriculumPlan.load(run.folder / "plan.json")
    samples = _samples_of(run, plan.stage_ids(stage))
    seeds = range(run.config.seed + stage * _SEEDS, run.config.seed + stage * _SEEDS + run.config.answers_per_prompt)
    rounds = (
        reflect_together(run, str(student), checkpoints / PARTS, samples, seed)["generated_ids"] for seed in seeds
    )
    made, counts = _answered(run, samples, _names(run, plan), rounds)
    write_parquet(made, _of_stage(run, stage))
    step = int(student.name.rpartition("-")[2])
    said = {"stage": stage + 1, "step": step, **counts, "seconds": round(time.monotonic() - began, 3)}
    write_text(_of_stage(run, stage).with_suffix(".json"), json_text(said))
    remove(checkpoints / PARTS)


def _is_answered(run: Run, stage: int) -> bool:
    return _of_stage(run, stage).with_suffix(".json").is_file()


def stage_answers(run: Run, stage: int) -> Dataset:
    """The samples with the answers that a stage (from 0) trains on."""
    return read_samples(_of_stage(run, stage)) if stage else run.trained_on


def trained_in(run: Run, stage: int) -> Dataset:
    """The samples of the run's plan, with the answers on which a stage (from 0) trains.

    Samples of later stages that have no answer yet have the tokens of another sample: a loader reads ahead, and the
    schedule needs their number.

    Args:
        run: the run.
        stage: the stage's number, from 0. The answers are those made before it.
    """
    made = stage_answers(run, stage)
    if not run.config.answers_again:
        return made
    there = set(made["sample_id"])
    later = [name for name in run.plan.kept if name not in there]
    lengths = [len(ids) for ids in made["input_ids"]]
    shortest = made[lengths.index(min(lengths))]
    columns = {name: [value] * len(later) for name, value in shortest.items()}
    stand_ins = Dataset.from_dict({**columns, "sample_id": later}, features=made.features)
    return concatenate_datasets([made, stand_ins]) if later else made


def answer_counts(run: Run) -> dict[str, int]:
    """How many answers there are, and how many were empty or cut; empty if the data's answers are trained on.

    With answers_again these are the first stage's, and its empty answers are "empty_kept": they are trained on.
    """
    file = run.folder / ANSWERS / COUNTS
    if not mode_of(run.config).makes_answers or not file.is_file():
        return {}
    counts = json.loads(file.read_text(encoding="utf-8"))
    return {"empty_kept" if n == "empty" and run.config.answers_again else n: count for n, count in counts.items()}


def answered_again(run: Run) -> list[dict[str, Any]]:
    """For each stage whose prompts were answered before it: the step, the number of answers, and the seconds."""
    stages = range(1, run.config.curate.stages if run.config.answers_again else 1)
    files = [_of_stage(run, stage).with_suffix(".json") for stage in stages if _is_answered(run, stage)]
    return [dict(json.loads(file.read_text(encoding="utf-8"))) for file in files]


def _of_stage(run: Run, stage: int) -> Path:
    return run.folder / "checkpoints" / f"answers-stage-{stage + 1}.parquet"


def _samples_of(run: Run, prompts: Iterable[str]) -> Dataset:
    train, wanted = run.data("train"), set(prompts)
    return train.select([i for i, sample_id in enumerate(train["sample_id"]) if sample_id in wanted])


def _answered(
    run: Run, samples: Dataset, names: Mapping[str, Sequence[str]], rounds: Iterable[Sequence[Sequence[int]]]
) -> tuple[Dataset, dict[str, int]]:
    """Samples with new answers, and how many answers there are, and were empty or cut.

    Args:
        run: the run.
        samples: tokenised samples.
        names: for each sample, the ids of its answers.
        rounds: for each answer to a prompt, the token ids of that answer to every sample.
    """
    train = run.data("train")
    ends, eos = answer_ends(train, run.tokenizer), int(run.tokenizer.eos_token_id)
    limit, again = run.config.max_response_length, run.config.answers_again
    counts = {"answers": 0, "empty": 0, "cut": 0}
    columns: dict[str, list[Any]] = {name: [] for name in samples.column_names}
    rows: Any = samples
    decode: Any = run.tokenizer.decode
    for number, answers in enumerate(rounds):
        for sample, ids in zip(rows, answers, strict=True):
            if not decode(ids, skip_special_tokens=True).strip():
                counts["empty"] += 1
                if not again:
                    continue
            made = answered(sample, ids, _end(run, ids, end_of(sample["labels"], ends, eos)), limit)
            counts["cut"] += made["labels"][-1] not in ends
            made["sample_id"] = names[sample["sample_id"]][number]
            for name, values in columns.items():
                values.append(made[name])
    counts["answers"] = len(columns["sample_id"])
    if counts["empty"] or counts["cut"]:
        logger.warning(
            "of %d answers %d are empty%s, and %d are cut at max_new_tokens %d",
            len(samples) * run.config.answers_per_prompt, counts["empty"], "" if again else " and are dropped",
            counts["cut"], run.config.reflect.max_new_tokens,
        )  # fmt: skip
    return Dataset.from_dict(columns, features=samples.features), counts


def _end(run: Run, ids: Sequence[int], end: int) -> int | None:
    """The token that ends an answer; None if its engine stopped at the limit."""
    return None if len(ids) >= run.config.reflect.max_new_tokens else end


def _names(run: Run, plan: CurriculumPlan) -> dict[str, list[str]]:
    """The ids of the answers to each kept sample. The first answer has the sample's own id."""
    kept = set(plan.kept)
    train: list[str] = list(run.data("train")["sample_id"])
    taken, names = set(train), {sample_id: [sample_id] for sample_id in train if sample_id in kept}
    for number in range(1, run.config.answers_per_prompt):
        for sample_id, of_prompt in names.items():
            name = next(n for k in count() if (n := f"{sample_id}#{number + 1}" + "'" * k) not in taken)
            taken.add(name)
            of_prompt.append(name)
    return names


def _rounds(run: Run, samples: Dataset) -> Iterator[list[list[int]]]:
    """For each answer to a prompt, the token ids of that answer to every sample."""
    rounds = range(run.config.answers_per_prompt)
    if mode_of(run.config).answers == STUDENT:
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
    """The ids of the samples' reflections, or of another attempt. Older files have only texts, which are tokenised."""
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
