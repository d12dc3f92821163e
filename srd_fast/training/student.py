"""Make a starting student: cut it out of its teacher and warm it up."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..files import replace_folder, temporary_path
from ..models import (
    check_head,
    load_model,
    load_tokenizer,
    mend_generation_config,
    prune_depth,
    save_student,
    try_saving,
)
from ..teacher import TeacherSource
from .config import SRDConfig
from .trainer import SRDTrainer

logger = logging.getLogger(__name__)


def trainer_basics(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Training arguments that follow from the device and the dtype of a run.

    Args:
        device: where the models are.
        dtype: the run's dtype; bfloat16 switches `bf16` on.

    Returns:
        Fields of SRDConfig.
    """
    return {
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "report_to": [],
        "dataloader_pin_memory": device.type != "cpu",
    }


def prune_and_warm_up(
    teacher: str,
    output: Path,
    *,
    layers: int | list[int],
    encoder_layers: int | list[int] | None = None,
    rows: Dataset | None = None,
    warmup_steps: int = 0,
    learning_rate: float = 4e-4,
    batch_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    template: str = "alpaca",
    source: TeacherSource | None = None,
) -> None:
    """Cut a student out of `teacher` by keeping some layers, and optionally train it a little with the forward KL.

    Without that warm-up, a pruned student answers with noise, and scores of noise cannot rank samples.

    Args:
        teacher: a model's folder or hub id.
        output: the student's folder; it is replaced.
        layers: how many layers to keep, or the indices to keep; of an encoder-decoder model, in the decoder.
        encoder_layers: the same for its encoder. Default: as `layers`.
        rows: tokenised samples of the warm-up.
        warmup_steps: optimizer steps of the warm-up; 0: none.
        learning_rate: peak of the warm-up.
        batch_size: samples a step.
        dtype: bfloat16 trains in mixed precision, float32 does not. The student is saved in float32.
        device: where the warm-up runs.
        seed: seed of the order of the samples.
        template: prompt template of the rows.
        source: source of the teacher's rows. Default: the teacher itself, in `dtype` on `device`.
    """
    tokenizer = load_tokenizer(teacher)
    student = load_model(teacher, torch.float32, device)
    check_head(student, "teacher")
    mend_generation_config(student, "student")
    kept = prune_depth(student, layers, encoder_layers)
    logger.info("kept layers %s", kept)
    work = temporary_path(output)
    shutil.rmtree(work, ignore_errors=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    try_saving(student, tokenizer, work.parent)
    if warmup_steps and rows is not None:
        args = SRDConfig(
            output_dir=str(work / "trainer"),
            divergence="forward_kl",
            temperature=1.0,
            sft_weight=0.0,
            learning_rate=learning_rate,
            epochs_per_stage=warmup_steps * batch_size / len(rows),
            per_device_train_batch_size=batch_size,
            save_strategy="no",
            seed=seed,
            template=template,
            **trainer_basics(torch.device(device), dtype),
        )
        args._n_gpu = min(args.n_gpu, 1)  # a few steps do not need several GPUs
        live_or_cache = load_model(teacher, dtype, device, quantised=True) if source is None else source
        SRDTrainer(student, live_or_cache, args, rows, processing_class=tokenizer).train()
    save_student(student, tokenizer, work / "model")
    replace_folder(work / "model", output)
    shutil.rmtree(work, ignore_errors=True)
