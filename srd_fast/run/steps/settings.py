"""Sections of a run's config in the form in which the libraries behind them take them."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ...curriculum import per_stage
from ...data import IGNORE_INDEX
from ...errors import UserError
from ...models import is_encoder_decoder, load_config
from ...selection import ALL
from ...suggest import unknown_name
from ...training.config import SRDConfig
from ...training.student import trainer_basics
from ..config import RunConfig
from .run import PRUNE, Run


def training_config(config: RunConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> SRDConfig:
    """SRDConfig of a run: the run's own settings, replaced by those in `distill`."""
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
            chat_template_kwargs=config.chat_template_kwargs or None,
            parse_special_tokens=config.parse_special_tokens,
        )
    except Exception as e:  # transformers' own checks raise many kinds
        raise UserError(f"config: distill: {' '.join(str(e).split())[:500]}") from e


def lora_config(config: RunConfig) -> Any:
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
        task = "SEQ_2_SEQ_LM" if is_encoder_decoder(load_config(config.teacher)) else "CAUSAL_LM"
        return LoraConfig(**{"task_type": task, **config.lora})
    except (TypeError, ValueError) as e:
        raise UserError(f"config: lora: {e}") from e


def expected_logits(run: Run) -> float:
    """Estimate how many logits of the student a run's losses compute: rows with loss times classes; 0 without data.

    It follows from config and data alone, so that every process of a run gets the same number.
    """
    paths = [run.folder / "data" / f"{split}.parquet" for split in ("train", "validation")]
    if not all(path.is_file() for path in paths):
        return 0.0
    labels = [pq.read_table(path, columns=["labels"])["labels"] for path in paths]
    rows, held_out = (pc.sum(pc.not_equal(pc.list_flatten(x), IGNORE_INDEX)).as_py() or 0 for x in labels)
    c, samples, stages = run.config, len(labels[0]), run.config.curate.stages
    args = training_config(c, run.folder, run.device, run.dtype)
    epochs = per_stage("epochs_per_stage", args.epochs_per_stage, 0.0, 0.0, stages)
    keep = c.curate.keep if isinstance(c.curate.keep, float) else 1.0
    trained = keep * sum(n * stage / stages for stage, n in enumerate(epochs, 1))
    warm_up = c.init_student.warmup_steps * c.init_student.warmup_batch_size / samples if c.student == PRUNE else 0.0
    evaluations = 0.0
    if args.eval_strategy == "steps" and args.eval_steps:
        steps = trained * samples / (args.per_device_train_batch_size * args.gradient_accumulation_steps)
        evaluations = steps / args.eval_steps if args.eval_steps >= 1 else 1 / args.eval_steps
    # Reflection sees the training rows once; evaluation the others, for three models and before the first step.
    return (rows * (1 + warm_up + trained) + held_out * (4 + evaluations)) * len(run.tokenizer)
