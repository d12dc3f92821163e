"""What each step of a run does: files of the run folder in, files of the run folder out."""

import dataclasses
import importlib.metadata
import json
import logging
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .config import SRDConfig
from .curation import CurriculumPlan, Signal, curate
from .curriculum import per_stage
from .data import TOKENISED_FEATURES, Tokenisation, content_id, prepare_dataset, read_rows
from .errors import UserError, first_line
from .evaluation import evaluate
from .files import content_digest, replace_folder, temporary_path, write_text
from .models import check_tokenizers, fingerprint, load_model, load_tokenizer
from .quickstart_data import make_quickstart_splits
from .reflection import Sampling, get_difficulty, reflect
from .reflection.engines import engine_names
from .report import write_report
from .student import prune_and_warm_up, trainer_basics
from .suggest import unknown_name
from .trainer import SRDTrainer

logger = logging.getLogger(__name__)

QUICKSTART = "quickstart"
QUICKSTART_ROWS = 256
PRUNE = "prune"


@dataclass
class Run:
    """A run folder under a config. `fingerprints`: of every step; `ledger`: what steps.json holds."""

    config: Any
    folder: Path
    fingerprints: dict[str, str]
    ledger: dict[str, dict[str, Any]]

    @cached_property
    def device(self) -> torch.device:
        """The configured device, or the accelerator that there is."""
        if self.config.device != "auto":
            return torch.device(self.config.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of teacher, reflection and evaluation; the student trains in float32 with autocast to it."""
        if self.config.dtype == "auto":
            return torch.bfloat16 if has_fast_bfloat16(self.device) else torch.float32
        return torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that teacher and student share."""
        return load_tokenizer(self.config.teacher)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, loaded once a process."""
        return load_model(self.config.teacher, self.dtype, self.device)

    @property
    def start(self) -> str:
        """Where the starting student is."""
        return str(self.folder / "start") if self.config.student == PRUNE else self.config.student

    def data(self, split: str) -> Dataset:
        """Tokenised samples: "train" or "validation"."""
        path = self.folder / "data" / f"{split}.parquet"
        return Dataset.from_parquet(str(path), features=TOKENISED_FEATURES, keep_in_memory=True)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(check() for check in checks if check is not None)


def check_inputs(config: Any) -> None:
    """Everything that can be told to be wrong before any work: names, settings, missing files, tokenizers."""
    _check_device(config.device)
    args = training_config(config, Path(config.output_dir), torch.device("cpu"), torch.float32)
    for name in ("epochs_per_stage", "temperature", "sft_weight", "stage_learning_rates"):
        per_stage(name, getattr(args, name), 0.0, 0.0, config.curate.stages)
    lora_config(config)
    if config.reflect.engine not in engine_names():
        raise UserError(unknown_name("engine", config.reflect.engine, engine_names()))
    for name in (*config.reflect.signals, *(config.curate.signals or ())):
        get_difficulty(name)
    extra = set(config.curate.signals or ()) - set(config.reflect.signals)
    if extra:
        raise UserError(f"curate.signals names {sorted(extra)}, which reflect.signals does not make")
    if isinstance(config.validation, str):
        _must_exist("validation", config.validation)
    if config.data != QUICKSTART:
        _must_exist("data", config.data)
    tokenizer = load_tokenizer(config.teacher)
    if config.student != PRUNE:
        check_tokenizers(load_tokenizer(config.student), tokenizer)
    Tokenisation(tokenizer, config.template, config.max_prompt_length, config.max_response_length)


def _check_device(name: str) -> None:
    if name == "auto":
        return
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"config: device: {name!r} cannot be used: {first_line(e)}") from e


def _must_exist(key: str, source: str) -> None:
    if source.endswith((".jsonl", ".json", ".parquet", ".gz")) and not Path(source).expanduser().is_file():
        raise UserError(f"{key}: file {source!r} does not exist")


def prepare_inputs(config: Any) -> Any:
    """What the prepared data depends on: the rows' source, the tokenizer's model, template and limits."""
    sources = [s for s in (config.data, config.validation) if isinstance(s, str)]
    stamps = [[s, _file_stamp(Path(s).expanduser())] for s in sources]
    limits = [config.template, config.max_prompt_length, config.max_response_length, config.max_rows, config.seed]
    return [stamps, config.validation, config.data_split, limits, fingerprint(config.teacher)]


def _file_stamp(path: Path) -> str | None:
    return content_digest(path) if path.is_file() else None


def prepare(run: Run) -> None:
    """Read and tokenise the data; hold out validation rows if no file of them is given."""
    c = run.config
    tokenisation = Tokenisation(run.tokenizer, c.template, c.max_prompt_length, c.max_response_length)
    if c.data == QUICKSTART:
        held_out = c.validation if isinstance(c.validation, int) else 0
        try:
            train_rows, validation_rows = make_quickstart_splits(c.max_rows or QUICKSTART_ROWS, held_out, c.seed)
        except ValueError as e:
            raise UserError(f"config: max_rows and validation together: {e}") from e
    else:
        train_rows, validation_rows = read_rows(c.data, c.data_split)[: c.max_rows], []
    if isinstance(c.validation, str):
        validation_rows = read_rows(c.validation, "validation")
    train = prepare_dataset(train_rows, tokenisation, "data")
    if validation_rows:
        validation = prepare_dataset(validation_rows, tokenisation, "validation")
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
        _write_parquet(part, folder / f"{name}.parquet")
    listed = [{"where": where, "reason": reason} for where, reason in rejected]
    write_text(folder / "rejected.json", _json(listed))


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False)


def _write_parquet(rows: Dataset, target: Path) -> None:
    rows.to_parquet(str(temporary_path(target)))
    os.replace(temporary_path(target), target)


def _hold_out(samples: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `count` samples chosen by a hash of their id, so that adding rows moves few others."""
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


def student_inputs(config: Any) -> Any:
    """What the starting student depends on: how it is cut and warmed up, or the model that is given."""
    if config.student == PRUNE:
        return [config.init_student.model_dump(), config.dtype, config.seed]
    return fingerprint(config.student)


def init_student(run: Run) -> None:
    """Cut the student out of the teacher and warm it up; nothing to do for a student that is given."""
    if run.config.student != PRUNE:
        return
    c = run.config.init_student
    prune_and_warm_up(
        run.config.teacher,
        run.folder / "start",
        layers=c.layers,
        rows=run.data("train") if c.warmup_steps else None,
        warmup_steps=c.warmup_steps,
        learning_rate=c.warmup_learning_rate,
        batch_size=c.warmup_batch_size,
        dtype=run.dtype,
        device=run.device,
        seed=run.config.seed,
    )


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
            **{**basics, **config.distill},
            output_dir=str(folder / "checkpoints"),
            seed=config.seed,
            template=config.template,
            max_prompt_length=config.max_prompt_length,
            max_response_length=config.max_response_length,
        )
    except (ValueError, TypeError) as e:
        raise UserError(f"config: distill: {' '.join(str(e).split())}") from e


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


def reflect_step(run: Run) -> None:
    """The starting student answers the training prompts. Interrupted, it goes on where it was."""
    c = run.config.reflect
    partial = run.folder / f"reflections.partial-{run.fingerprints['reflect'][:12]}.jsonl"
    for old in run.folder.glob("reflections.partial-*.jsonl"):
        if old != partial:
            old.unlink()
    scores = reflect(
        load_model(run.start, run.dtype, run.device),
        run.data("train"),
        run.tokenizer,
        engine=c.engine,
        sampling=Sampling(
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            no_repeat_ngram_size=c.no_repeat_ngram_size,
            seed=run.config.seed,
        ),
        signals=c.signals,
        batch_size=c.batch_size,
        rouge_tokenizer=c.rouge_tokenizer,
        score_eos=c.score_eos,
        partial_file=partial,
    )
    _write_parquet(scores, run.folder / "reflections.parquet")
    partial.unlink(missing_ok=True)


def curate_step(run: Run) -> None:
    """Scores to plan.json."""
    c = run.config.curate
    scores = Dataset.from_parquet(str(run.folder / "reflections.parquet"), keep_in_memory=True)
    weights = c.signals or dict.fromkeys(run.config.reflect.signals, 1.0)
    plan = curate(
        scores,
        keep=c.keep,
        stages=c.stages,
        rrf_k=c.rrf_k,
        signals={n: Signal(get_difficulty(n).higher_is_easier, w) for n, w in weights.items()},
        method=c.method,
        seed=run.config.seed,
        floor_subsets=c.floor_subsets,
    )
    plan.save(run.folder / "plan.json")


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
    resume = stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == wanted
    if resume:
        _drop_torn_line(metrics)
    else:
        shutil.rmtree(checkpoints, ignore_errors=True)
        metrics.unlink(missing_ok=True)
        checkpoints.mkdir(parents=True)
        stamp.write_text(wanted + "\n", encoding="utf-8")
    trainer = SRDTrainer(
        load_model(run.start, torch.float32, run.device),
        run.teacher,
        training_config(run.config, run.folder, run.device, run.dtype),
        run.data("train"),
        curriculum=CurriculumPlan.load(run.folder / "plan.json"),
        eval_dataset=run.data("validation"),
        processing_class=run.tokenizer,
        callbacks=[_MetricsFile(metrics)],
        peft_config=lora_config(run.config),
    )
    if not resume and trainer.args.eval_strategy != "no":
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    finished = temporary_path(run.folder / "student")
    shutil.rmtree(finished, ignore_errors=True)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if run.config.lora is not None:
        model = model.merge_and_unload()
    model.config.use_cache = True
    model.save_pretrained(finished)
    run.tokenizer.save_pretrained(finished)
    replace_folder(finished, run.folder / "student")


def evaluate_step(run: Run) -> None:
    """Teacher, starting and distilled student side by side, and the run's figures: summary.json."""
    config = run.config
    rejected = json.loads((run.folder / "data" / "rejected.json").read_text(encoding="utf-8"))
    summary = {
        "srd_fast_version": importlib.metadata.version("srd-fast"),
        "teacher": config.teacher,
        "student": config.student if config.student != PRUNE else f"{config.teacher}, pruned",
        "divergence": config.distill.get("divergence", SRDConfig.divergence),
        "data": {
            "train": len(run.data("train")),
            "validation": len(run.data("validation")),
            "rejected": len(rejected),
        },
        "evaluation": _evaluations(run),
        "timings": {name: entry["seconds"] for name, entry in run.ledger.items() if "seconds" in entry},
        "training": _training_figures(run),
        "environment": {
            "device": str(run.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(run.dtype).removeprefix("torch."),
        },
    }
    write_text(run.folder / "summary.json", _json(summary))


def _evaluations(run: Run) -> dict[str, Any]:
    """Results by model. evaluation.json keeps each with what it was made from, so that only changed ones are redone."""
    path, c = run.folder / "evaluation.json", run.config.evaluate
    try:
        kept: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError):
        kept = {}
    models = {
        "teacher": ("prepare", run.config.teacher),
        "start": ("init-student", run.start),
        "student": ("distill", str(run.folder / "student")),
    }
    for name, (made_by, source) in models.items():
        settings = [c.model_dump(), run.config.reflect.rouge_tokenizer, run.config.dtype]
        key = json.dumps([run.fingerprints[made_by], run.fingerprints["prepare"], settings])
        if kept.get(name, {}).get("key") == key:
            continue
        is_teacher = name == "teacher"
        result = evaluate(
            run.teacher if is_teacher else load_model(source, run.dtype, run.device),
            run.data("validation"),
            run.tokenizer,
            teacher=None if is_teacher else run.teacher,
            sampling=Sampling(max_new_tokens=c.max_new_tokens, temperature=c.temperature if c.seeds else 0.0),
            seeds=c.seeds,
            batch_size=c.batch_size,
            rouge_tokenizer=run.config.reflect.rouge_tokenizer,
        )
        kept[name] = {"key": key, **result}
        write_text(path, _json(kept))
    return {name: {k: v for k, v in kept[name].items() if k != "key"} for name in models}


def _drop_torn_line(path: Path) -> None:
    """Remove a last line that a kill cut off, so that appending goes on behind whole lines."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        write_text(path, text[: text.rfind("\n") + 1])


def _training_figures(run: Run) -> dict[str, Any]:
    rows = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    train = {r["step"]: r for r in rows if r["kind"] == "train"}
    args = training_config(run.config, run.folder, run.device, run.dtype)
    steps = max(train)
    spent = sorted(r["tokens_per_second"] for r in train.values())
    return {
        "steps": steps,
        "sample_passes": steps * args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "tokens_per_second": spent[len(spent) // 2],
        "peak_memory_mb": max(r["memory_mb"] for r in train.values()),
    }


def report(run: Run) -> None:
    """report.html."""
    write_report(run.folder)
