"""From a plan to a trained student: distill."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from ...curriculum import CurriculumPlan, replan
from ...data import IGNORE_INDEX
from ...files import content_digest, remove, replace_folder, temporary_path, write_text
from ...models import load_model
from ...reflection.signals import signal_files
from ...sharing import ALONE, Sharing
from ...teacher import SELF, CacheBesideTeacher, LiveTeacher, TeacherSource
from ...training.batching import make_curriculum
from ...training.best import best_of
from ...training.checkpoints import last_whole_checkpoint
from ...training.trainer import SRDTrainer
from ..config import RunConfig
from ..modes import KD, answers_anew, mode_of, shares_weights
from ..stopping import stopping_later
from .answers import answer_again, stage_answers, trained_in
from .cache import drop_rows_beside, open_cache
from .run import Run, json_text, write_parquet
from .selection import PARTS, reflect_together
from .settings import lora_config

SELECTION = "selection.json"
SHOWN_SAMPLES = 6


def distill_inputs(config: RunConfig) -> Any:
    """What training depends on, besides plan, start and cache: its settings, and the code of a user's own metrics."""
    mode = [] if config.mode == KD else [config.mode]
    own = [content_digest(file) for file in signal_files(config.distill.get("eval_metrics") or ())]
    return [config.distill, config.lora, config.dtype, config.seed, *mode, *own]


class _MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl when it is made."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            row = {"kind": "train", "step": state.global_step, **logs}
        elif "eval_cross_entropy" in logs:
            measured = {n.removeprefix("eval_"): x for n, x in logs.items() if n.startswith("eval_")}
            row = {"kind": "eval", "step": state.global_step, **measured}
            del row["loss"]  # the same as the KL, or without a teacher as the cross-entropy
        else:
            return
        add_line(self.path, row)


def add_line(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a file of json lines."""
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")


def distill(run: Run) -> None:
    """Train along the plan, from the last checkpoint with the same inputs if there is one."""
    checkpoints, metrics = run.folder / "checkpoints", run.folder / "metrics.jsonl"
    stamp, wanted = checkpoints / "fingerprint.txt", run.fingerprints["distill"]
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").strip() != wanted:
        remove(checkpoints)
        checkpoints.mkdir(parents=True)
        stamp.write_text(wanted + "\n", encoding="utf-8")
    if last_whole_checkpoint(checkpoints) is None:
        metrics.unlink(missing_ok=True)
        for weights_alone in checkpoints.glob("checkpoint-*"):
            shutil.rmtree(weights_alone)
    else:
        _drop_torn_line(metrics)
    plan = run.plan
    if run.config.curate.reflect_again:
        for stage in range(1, len(plan.subset_columns)):
            plan = _plan_from(run, plan, stage)
    answers = _answered_until(run, plan) if run.config.answers_again else 0
    _train(run, plan, answers=answers)
    if answers:
        drop_rows_beside(run)


def _keep_student(run: Run, trainer: SRDTrainer) -> None:
    """Write the finished student, and what its training chose of the positions."""
    positions = None if trainer.selection.policy is None else selected_positions(trainer, run.group)
    best = best_of(trainer.args, trainer.state)
    finished = temporary_path(run.folder / "student")
    if run.group.rank == 0:
        remove(run.folder / SELECTION)
        if positions is not None:
            write_text(run.folder / SELECTION, json_text(positions))
        shutil.rmtree(finished, ignore_errors=True)
    trainer.save_student(finished)  # the first process writes; where the student is in shards, all gather it
    if run.group.rank == 0:
        replace_folder(finished, run.folder / "student")
        if best is not None:
            add_line(run.folder / "metrics.jsonl", {"kind": "best", **best._asdict()})


def selected_positions(trainer: SRDTrainer, sharing: Sharing = ALONE) -> dict[str, Any]:
    """What the position policy selected: by entropy over the run, and in a few samples with the finished student."""
    train: Any = trainer.train_dataset
    first = list(dict.fromkeys(trainer.curriculum.stages[0].samples.tolist()))[:SHOWN_SAMPLES]
    decode = trainer.processing_class.decode  # type: ignore[union-attr]
    shown = []
    for index in first:
        sample = train[index]
        values, chosen = trainer.positions_of(sample)
        ids = [x for x in sample["labels"][1:] if x != IGNORE_INDEX]
        shown.append(
            {
                "sample_id": sample["sample_id"],
                "prompt": sample["prompt"],
                "tokens": [decode([x]) for x in ids],
                "entropy": values,
                "chosen": chosen,
            }
        )
    policy = {"policy": trainer.args.position_selection, "ratio": trainer.args.position_ratio}
    selected = trainer.selection.selected
    for other in sharing.gather(selected.counts())[1:]:
        selected.add_counts(other)
    saved = {"saved_head_work": selected.saved_head_work}
    return {**policy, **saved, "histogram": selected.histogram(), "samples": shown}


def _train(run: Run, plan: CurriculumPlan, until: int | None = None, answers: int = 0) -> None:
    """Train along a plan, from the last checkpoint if there is one.

    Args:
        run: the run.
        plan: the plan of its samples.
        until: a step, to train only up to a checkpoint there. Default: to the end.
        answers: with answers_again, the stage (from 0) before which the answers were made.
    """
    checkpoint = last_whole_checkpoint(run.folder / "checkpoints")
    run.group.everywhere(_train_together, run, plan, until, answers, checkpoint)


def _train_together(run: Run, plan: CurriculumPlan, until: int | None, answers: int, checkpoint: str | None) -> None:
    with run.group.training():
        trainer = _trained(run, plan, until, answers, checkpoint)
        if until is None:
            _keep_student(run, trainer)


def _trained(run: Run, plan: CurriculumPlan, until: int | None, answers: int, checkpoint: str | None) -> SRDTrainer:
    args = run.training_args()
    if until is not None:
        args.max_steps = until
    student = load_model(run.start, torch.float32, run.device)
    trainer = SRDTrainer(
        student,
        _teacher(run, student, stage_answers(run, answers) if answers else None),
        args,
        trained_in(run, answers),
        curriculum=plan,
        eval_dataset=run.data("validation"),
        processing_class=run.tokenizer,
        callbacks=[_MetricsFile(run.folder / "metrics.jsonl")] if run.group.rank == 0 else [],
        peft_config=lora_config(run.config),
    )
    if until is not None:
        trainer.args.load_best_model_at_end = False  # the best is kept, but training continues from the last
    if checkpoint is None and args.eval_strategy != "no":
        trainer.evaluate()
    with stopping_later(run.group.any_of) as save_and_stop:
        trainer.add_callback(save_and_stop)
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _teacher(run: Run, student: nn.Module, answers: Dataset | None = None) -> nn.Module | TeacherSource | str | None:
    """The trainer's `teacher_model`, which also covers new answers; None if the loss has no teacher."""
    if not mode_of(run.config).teacher:
        return None
    if shares_weights(run.config):
        return SELF
    cache = open_cache(run, student, beside=answers)
    if cache is None:
        return run.teacher
    if not answers_anew(run.config):
        return cache
    return CacheBesideTeacher(cache.for_student(student), LiveTeacher(run.teacher, run.device))


def _plan_from(run: Run, plan: CurriculumPlan, stage: int) -> CurriculumPlan:
    """The plan from a stage (from 0) on, after the student before that stage has ranked the remaining samples again."""
    checkpoints = run.folder / "checkpoints"
    path = checkpoints / f"plan-stage-{stage + 1}.json"
    if path.is_file():
        return CurriculumPlan.load(path)
    student = _student_before(run, plan, stage)
    if student is None:
        return plan
    scores = reflect_together(run, str(student), checkpoints / PARTS)
    made = replan(plan, stage, scores, run.config.seed)
    write_parquet(scores, checkpoints / f"reflections-stage-{stage + 1}.parquet")
    made.save(path)
    remove(checkpoints / PARTS)
    return made


def _answered_until(run: Run, plan: CurriculumPlan) -> int:
    """Train all stages but the last, with each stage's prompts answered before it, and return the last stage's number.

    If `max_steps` ends training earlier, that is the stage in which it ends.
    """
    for stage in range(1, len(plan.subset_columns)):
        student = _student_before(run, plan, stage, answers=stage - 1)
        if student is None:
            return stage - 1
        answer_again(run, stage, student)
    return len(plan.subset_columns) - 1


def _student_before(run: Run, plan: CurriculumPlan, stage: int, answers: int = 0) -> Path | None:
    """Train up to a stage (from 0), and return the checkpoint; None if `max_steps` ends training before it."""
    checkpoints = run.folder / "checkpoints"
    # Outside of a group's training, batch sizes are those of all processes together.
    border = make_curriculum(plan, trained_in(run, answers), run.args, processes=1).stages[stage].first_step
    if 0 < run.args.max_steps <= border:
        return None
    last = last_whole_checkpoint(checkpoints)
    if last is None or int(last.rpartition("-")[2]) < border:
        _train(run, plan, until=border, answers=answers)
    return checkpoints / f"checkpoint-{border}"


def _drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line, left by a kill, so that new lines follow whole ones."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        write_text(path, text[: text.rfind("\n") + 1])
