"""From a plan to a trained student: cache, distill."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from transformers import PreTrainedModel, TrainerCallback

from ..config import SRDConfig, check_cache_kind
from ..curation import CurriculumPlan, replan
from ..curriculum import per_stage
from ..data import IGNORE_INDEX
from ..errors import UserError
from ..files import remove, replace_folder, temporary_path, write_text
from ..models import load_model
from ..selection import ALL
from ..stopping import stopping_later
from ..student import trainer_basics
from ..suggest import unknown_name
from ..teacher import StaleCacheError, TeacherCache, open_teacher_cache
from ..trainer import SRDTrainer, last_whole_checkpoint, make_curriculum
from .run import LIVE, Run, json_text, write_parquet
from .selection import PARTS, reflect_with

logger = logging.getLogger(__name__)

SELECTION = "selection.json"
SHOWN_SAMPLES = 6


def training_config(config: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> SRDConfig:
    """SRDConfig of a run: the run's own settings, under what `distill` gives."""
    basics = {
        **trainer_basics(device, dtype),
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 25,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 32,
    }
    try:
        return SRDConfig(
            **{**basics, **config.distill, "sample_selection": ALL},  # the plan holds those samples alone
            output_dir=str(folder / "checkpoints"),
            seed=config.seed,
            template=config.template,
            max_prompt_length=config.max_prompt_length,
            max_response_length=config.max_response_length,
        )
    except Exception as e:  # transformers' own checks raise many kinds
        raise UserError(f"config: distill: {' '.join(str(e).split())[:500]}") from e


def lora_config(config: Any) -> Any:
    """A `peft.LoraConfig` from the section `lora`, or None for full training."""
    if config.lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as e:
        raise UserError(f"config: lora needs the peft package: pip install 'srd-fast[peft]' ({e})") from e
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    for name in config.lora:
        if name not in known:
            raise UserError("config: " + unknown_name("key in lora", name, known, listed=False))
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **config.lora})
    except (TypeError, ValueError) as e:
        raise UserError(f"config: lora: {e}") from e


def check_cache(config: Any, args: SRDConfig) -> None:
    """Refuse kinds of teacher cache that the rest of the config does not go with."""
    kind = config.cache.kind
    if kind != LIVE:
        check_cache_kind(kind, args.divergence, ("config: cache.kind", "distill.divergence"))
    if kind == "projected" and config.lora is None:
        raise UserError("config: cache.kind 'projected' needs a student whose head is frozen: set lora, or use hidden")


def cache_inputs(config: Any) -> Any:
    """What the cache depends on, besides the plan."""
    c = config.cache
    if c.kind in (LIVE, "hidden"):
        return [c.kind, config.dtype]  # what is kept, and reflect_again, come with the plan
    args = training_config(config, Path(config.output_dir), torch.device("cpu"), torch.float32)
    return [c.kind, config.dtype, c.k, cache_temperatures(config, args)]


def cache_temperatures(config: Any, args: SRDConfig) -> list[float]:
    """What a compact cache must hold rows for: evaluation's, then that of every stage."""
    stages = config.curate.stages
    return [1.0, *per_stage("temperature", args.temperature, args.temperature_start, args.temperature_end, stages)]


def cache_teacher(run: Run) -> None:
    """Run the teacher once over the kept and the validation samples; nothing to do with a live teacher."""
    open_cache(run)


def open_cache(run: Run, student: PreTrainedModel | None = None) -> TeacherCache | None:
    """The run's cache, whole: what is missing or damaged is made, what is of another teacher is replaced.

    student: the starting student if it is loaded already; compact kinds look at its head.
    """
    c = run.config.cache
    if c.kind == LIVE:
        return None
    folder, train = run.folder / "teacher_cache", run.data("train")
    samples = [train, run.data("validation")]
    if not run.config.curate.reflect_again:  # then a dropped sample may come back
        kept = set(CurriculumPlan.load(run.folder / "plan.json").kept)
        samples[0] = train.select([i for i, sample_id in enumerate(train["sample_id"]) if sample_id in kept])

    if c.kind != "hidden" and student is None:
        student = load_model(run.start, torch.float32)
    args = training_config(run.config, run.folder, run.device, run.dtype)

    def opened() -> TeacherCache:
        return open_teacher_cache(
            folder,
            run.config.teacher,
            concatenate_datasets(samples),
            kind=c.kind,
            k=c.k,
            temperatures=cache_temperatures(run.config, args),
            student=student,
            template=run.config.template,
            dtype=run.dtype,
            device=run.device,
            repair=True,
        )

    try:
        return opened().to(run.device)
    except StaleCacheError as e:
        logger.warning("%s: making it again", str(e).partition(";")[0])
        remove(folder)
        return opened().to(run.device)


class _MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            row = {"kind": "train", "step": state.global_step, **logs}
        elif "eval_kl" in logs:
            kl, cross_entropy = logs["eval_kl"], logs["eval_cross_entropy"]
            row = {"kind": "eval", "step": state.global_step, "kl": kl, "cross_entropy": cross_entropy}
        else:
            return
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


def distill(run: Run) -> None:
    """Train along the plan, from the last checkpoint of the same inputs if there is one."""
    checkpoints, metrics = run.folder / "checkpoints", run.folder / "metrics.jsonl"
    stamp, wanted = checkpoints / "fingerprint.txt", run.fingerprints["distill"]
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").strip() != wanted:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        stamp.write_text(wanted + "\n", encoding="utf-8")
    if last_whole_checkpoint(checkpoints) is None:
        metrics.unlink(missing_ok=True)
    else:
        _drop_torn_line(metrics)
    plan = CurriculumPlan.load(run.folder / "plan.json")
    if run.config.curate.reflect_again:
        for stage in range(1, len(plan.subset_columns)):
            plan = _plan_from(run, plan, stage)
    trainer = _train(run, plan)
    remove(run.folder / SELECTION)
    if trainer.selection.policy is not None:
        write_text(run.folder / SELECTION, json_text(selected_positions(trainer)))
    finished = temporary_path(run.folder / "student")
    shutil.rmtree(finished, ignore_errors=True)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if run.config.lora is not None:
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(finished)
    run.tokenizer.save_pretrained(finished)
    replace_folder(finished, run.folder / "student")


def selected_positions(trainer: SRDTrainer) -> dict[str, Any]:
    """What the position policy chose: by entropy over the whole run, and in some samples, by the finished student."""
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
    saved = {"saved_head_work": selected.saved_head_work}
    return {**policy, **saved, "histogram": selected.histogram(), "samples": shown}


def _train(run: Run, plan: CurriculumPlan, until: int | None = None) -> SRDTrainer:
    """Train along a plan, from the last checkpoint there is, to the end or to a checkpoint at step `until`."""
    checkpoints = run.folder / "checkpoints"
    args = training_config(run.config, run.folder, run.device, run.dtype)
    if until is not None:
        args.max_steps = until
    student = load_model(run.start, torch.float32, run.device)
    trainer = SRDTrainer(
        student,
        open_cache(run, student) or run.teacher,
        args,
        run.data("train"),
        curriculum=plan,
        eval_dataset=run.data("validation"),
        processing_class=run.tokenizer,
        callbacks=[_MetricsFile(run.folder / "metrics.jsonl")],
        peft_config=lora_config(run.config),
    )
    begun = last_whole_checkpoint(checkpoints) is not None
    if not begun and args.eval_strategy != "no":
        trainer.evaluate()
    with stopping_later() as save_and_stop:
        trainer.add_callback(save_and_stop)
        trainer.train(resume_from_checkpoint=begun)
    return trainer


def _plan_from(run: Run, plan: CurriculumPlan, stage: int) -> CurriculumPlan:
    """The plan from stage `stage` on (counted from 0): what is left is ranked anew by the student at that border."""
    checkpoints = run.folder / "checkpoints"
    path = checkpoints / f"plan-stage-{stage + 1}.json"
    if path.is_file():
        return CurriculumPlan.load(path)
    train = run.data("train")
    args = training_config(run.config, run.folder, run.device, run.dtype)
    border = make_curriculum(plan, train, args).stages[stage].first_step
    if 0 < args.max_steps <= border:
        return plan
    student = checkpoints / f"checkpoint-{border}"
    if last_whole_checkpoint(checkpoints) != str(student):
        _train(run, plan, until=border)
    scores = reflect_with(run, str(student), checkpoints / PARTS)
    made = replan(plan, stage, scores)
    write_parquet(scores, checkpoints / f"reflections-stage-{stage + 1}.parquet")
    made.save(path)
    remove(checkpoints / PARTS)
    return made


def _drop_torn_line(path: Path) -> None:
    """Remove a last line that a kill cut off, so that appending goes on behind whole lines."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        write_text(path, text[: text.rfind("\n") + 1])
