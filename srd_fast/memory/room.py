"""Check before a run that its training and its files fit on this machine.

First comes an upper bound that takes no time. Only if that does not fit, the planner is used, which takes seconds.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from ..errors import UserError
from ..models import model_without_weights
from ..run.config import RunConfig
from ..run.steps import LIVE, Run, control_folder, student_without_weights
from .planner import in_a_step, plan

logger = logging.getLogger(__name__)

# Upper bounds of what was measured: numbers that a layer stores for each token, in multiples of the widths of its outer
# and inner states; bytes of the loss and of the imports.
_WIDTHS, _INNER = 40, 8
_BESIDES = 4 << 30
_FLOAT = 4
# Numbers for each trained weight: itself, its gradient, and two of the optimizer; a checkpoint lacks the gradient.
_TRAINED, _IN_CHECKPOINT = 4, 3


def check_room(config: RunConfig) -> None:
    """Compare what a run needs with what this machine has.

    Args:
        config: the run's config, without faults.

    Raises:
        UserError: the training needs more memory than there is, or its checkpoints more disk than is free.
    """
    student = student_without_weights(config)
    if student is None:
        return
    run = Run(config, Path(config.output_dir), {}, {})
    _check_disk(run, student)
    total, free = _memory(run.device)
    if _bound(run, student) < free:
        return
    needed = plan(config).total
    what = f"the step distill needs about {needed / 1e9:.1f} GB at its peak, and {run.device} has {total / 1e9:.1f} GB"
    way_out = "srd-fast memory CONFIG --limit SIZE says which batch, accumulation and memory_budget fit"
    if needed > total:
        raise UserError(f"config: distill: {what}; {way_out}")
    if needed > free:
        logger.warning("%s, of which %.1f GB are free; %s", what, free / 1e9, way_out)


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a device's memory, and how many of them are free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _bound(run: Run, student: Any) -> int:
    """An upper bound of the bytes that the training needs."""
    config, args = run.config, run.args
    text: Any = student.config.get_text_config()
    tokens = args.per_device_train_batch_size * (config.max_prompt_length + config.max_response_length)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    kept = text.num_hidden_layers * (_WIDTHS * text.hidden_size + _INNER * inner)
    own = _TRAINED * _size(student)
    teacher: Any = model_without_weights(config.teacher) if in_a_step(config).cache.kind == LIVE else None
    return _FLOAT * (own + (0 if teacher is None else _size(teacher)) + 2 * tokens * kept) + _BESIDES


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _check_disk(run: Run, student: nn.Module) -> None:
    """Refuse a run whose checkpoints need more disk than is free.

    Existing checkpoints are overwritten, or kept instead of new ones, so they do not count.

    If the student exists, its training is over or frees enough space for it. Controls are trainings too.
    """
    args, folder = run.args, run.folder
    folders = [folder, *(control_folder(run.config, name) for name in run.config.controls)]
    ahead = [f for f in folders if not (f / "student").is_dir()]
    if not ahead:
        return
    there = next((x for x in (folder, *folder.absolute().parents) if x.is_dir()), Path("/"))
    if run.config.lora is not None:
        needed = _FLOAT * _size(student)
    else:
        # A new checkpoint is written before an old one is deleted.
        checkpoints = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
        states = 1 if args.save_only_model else _IN_CHECKPOINT
        needed = _FLOAT * _size(student) * (1 + checkpoints * states)
    needed *= len(ahead)
    free = shutil.disk_usage(there).free
    held = sum(f.stat().st_size for x in ahead for f in (x / "checkpoints").rglob("*") if f.is_file())
    if needed > free + held:
        controls = f", with its {len(folders) - 1} controls," if run.config.controls else ""
        raise UserError(
            f"config: output_dir: the student and its checkpoints{controls} take about {needed / 1e9:.3g} GB, and the "
            f"disk of {str(there)!r} has {free / 1e9:.3g} GB free; lower distill.save_total_limit, set "
            "distill.save_only_model, or name a folder on another disk"
        )
