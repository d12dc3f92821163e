"""A run: its folder and its config, as every step sees them."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data import TOKENISED_FEATURES
from ...files import temporary_path
from ...models import load_model, load_tokenizer
from ..config import RunConfig

QUICKSTART = "quickstart"
PRUNE = "prune"
LIVE = "live"


@dataclass
class Run:
    """A run: its config and its folder.

    Args:
        config: of the run.
        folder: where its files are.
        fingerprints: of every step, by name.
        ledger: the content of steps.json.
    """

    config: RunConfig
    folder: Path
    fingerprints: dict[str, str]
    ledger: dict[str, dict[str, Any]]

    @cached_property
    def device(self) -> torch.device:
        """The configured device; for "auto" a GPU if there is one."""
        if self.config.device != "auto":
            return torch.device(self.config.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of teacher, reflection and evaluation. The student trains in float32 with autocast to it."""
        if self.config.dtype == "auto":
            return torch.bfloat16 if has_fast_bfloat16(self.device) else torch.float32
        return torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that teacher and student share."""
        return load_tokenizer(self.config.teacher)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, loaded once in a process."""
        return load_model(self.config.teacher, self.dtype, self.device)

    @property
    def start(self) -> str:
        """Folder or hub id of the starting student."""
        return str(self.folder / "start") if self.config.student == PRUNE else self.config.student

    def data(self, split: str) -> Dataset:
        """Tokenised samples of a split: "train" or "validation"."""
        path = self.folder / "data" / f"{split}.parquet"
        return Dataset.from_parquet(str(path), features=TOKENISED_FEATURES, keep_in_memory=True)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(check() for check in checks if check is not None)


def json_text(content: Any) -> str:
    """JSON text in the layout of the run's files."""
    return json.dumps(content, indent=1, ensure_ascii=False)


def write_parquet(rows: Dataset, target: Path) -> None:
    """Write a data set in one step: readers see the old file or the new one."""
    rows.to_parquet(str(temporary_path(target)))
    os.replace(temporary_path(target), target)
