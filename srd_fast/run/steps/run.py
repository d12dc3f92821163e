"""A run: its folder and its config, as every step sees them."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...curriculum import CurriculumPlan
from ...data import IGNORE_INDEX, PRIVILEGED_FEATURES, PRIVILEGED_IDS, TOKENISED_FEATURES
from ...files import temporary_path
from ...models import check_head, head_of_files, load_model, load_tokenizer, quantisation_of
from ...rouge import choose_tokenizer
from ...teacher import LiveTeacher
from ...training.config import SRDConfig
from ..config import RunConfig
from ..group import Group
from ..ledger import News
from ..modes import PRUNE, mode_of
from .settings import training_config

QUICKSTART = "quickstart"
ANSWERS = "answers"
SPLITS = ("train", "validation")


@dataclass
class Run:
    """A run: its config and its folder.

    Args:
        config: the run's config.
        folder: the run folder.
        fingerprints: the fingerprint of every step, by name.
        ledger: the content of steps.json.
        group: the processes that do it together.
        say: prints a message about a step.
    """

    config: RunConfig
    folder: Path
    fingerprints: dict[str, str]
    ledger: dict[str, dict[str, Any]]
    group: Group = field(default_factory=Group)
    say: Callable[[News], None] = print

    def turn_to(
        self, config: RunConfig, folder: Path, fingerprints: dict[str, str], ledger: dict[str, dict[str, Any]]
    ) -> None:
        """Become another run with the same models and data, and keep the loaded models.

        Args:
            config: the other run's config.
            folder: its run folder.
            fingerprints: the fingerprints of its steps, by name.
            ledger: the content of its steps.json.
        """
        self.config, self.folder, self.fingerprints, self.ledger = config, folder, fingerprints, ledger
        vars(self).pop("args", None)

    @cached_property
    def device(self) -> torch.device:
        """The configured device; for "auto" a GPU if there is one. Each process of a group has a GPU of its own."""
        given = self.config.device
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if given == "auto" else given)
        if found.type == "cuda" and self.group.world > 1:
            found = torch.device("cuda", self.group.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(found)
            torch.cuda.init()  # from now on "cuda" is this device, even if other processes see others
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of teacher, reflection and evaluation. The student trains in float32, with autocast to this dtype."""
        if self.config.dtype == "auto":
            return torch.bfloat16 if has_fast_bfloat16(self.device) else torch.float32
        return torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32

    @cached_property
    def args(self) -> SRDConfig:
        """The training arguments, only for reading: a trainer changes its arguments, so it gets a copy.

        In a group, the batch sizes are those of all processes together; each process trains with `training_args`.
        """
        if self.group.world > 1:  # without the device, because transformers would take the first one
            return training_config(self.config, self.folder)
        return training_config(self.config, self.folder, self.device, self.dtype)

    def training_args(self) -> SRDConfig:
        """The arguments for a trainer in this process. In a group, to be called within its `training`."""
        if self.group.world == 1:
            return copy.copy(self.args)
        return training_config(self.config, self.folder, self.device, self.dtype, self.group.world)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer; the teacher's if the student is cut out of it."""
        return load_tokenizer(self.config.teacher if self.config.student == PRUNE else self.config.student)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """The teacher, loaded once in a process."""
        return load_model(self.config.teacher, self.dtype, self.device, quantised=True, **self.teacher_spread)

    @property
    def teacher_spread(self) -> dict[str, Any]:
        """Keywords of `load_model` that spread the teacher over devices; empty if it is not spread."""
        given = self.config.teacher_device_map
        return {} if given is None else {"device_map": given}

    def check_teacher(self) -> None:
        """Try the teacher before hours of work that do not need it yet.

        Not if the student is cut out of it: that has shown already that the teacher works.
        """
        if self.config.cache.engine == "vllm":
            head_of_files(self.config.teacher, self.dtype)  # vLLM itself starts when the cache is filled
        elif self.config.student != PRUNE:
            place = "cpu" if quantisation_of(self.config.teacher) is None else self.device
            model = load_model(self.config.teacher, self.dtype, place, quantised=True, **self.teacher_spread)
            if self.teacher_spread:
                LiveTeacher(model)
            else:
                check_head(model, "teacher")

    @property
    def start(self) -> str:
        """Folder or hub id of the starting student."""
        return str(self.folder / "start") if self.config.student == PRUNE else self.config.student

    @cached_property
    def rouge_tokenizer(self) -> str:
        """How every step cuts text into words for ROUGE-L: "auto" chooses by the references of both splits."""
        columns = [pq.read_table(self.split(name), columns=["references"])["references"] for name in SPLITS]
        references = (of_sample.as_py() for column in columns for of_sample in column)
        return choose_tokenizer(self.config.reflect.rouge_tokenizer, references)

    @property
    def rouge_stamp(self) -> list[str]:
        """A mark for scores of other scripts, which older versions computed differently; else empty."""
        chosen, given = self.rouge_tokenizer, self.config.reflect.rouge_tokenizer
        return [chosen] if (given, chosen) == ("auto", "unicode") else []

    def split(self, name: str) -> Path:
        """The file of a split."""
        return self.folder / "data" / f"{name}.parquet"

    def data(self, split: str) -> Dataset:
        """Tokenised samples of a split: "train" or "validation"."""
        return read_samples(self.split(split))

    @property
    def trained_on(self) -> Dataset:
        """The samples on which the student is trained: those of the data, or with new answers."""
        own = mode_of(self.config).makes_answers
        return read_samples(self.folder / ANSWERS / "train.parquet") if own else self.data("train")

    @property
    def plan(self) -> CurriculumPlan:
        """The plan of `trained_on`."""
        own = mode_of(self.config).makes_answers
        return CurriculumPlan.load((self.folder / ANSWERS if own else self.folder) / "plan.json")

    def expected_logits(self) -> float:
        """Estimate how many logits of the student the losses compute: rows with loss times classes; 0 without data.

        It depends only on config and data, so that every process of a run gets the same number.
        """
        paths = [self.split(name) for name in SPLITS]
        if not all(path.is_file() for path in paths):
            return 0.0
        labels = [pq.read_table(path, columns=["labels"])["labels"] for path in paths]
        rows, held_out = (pc.sum(pc.not_equal(pc.list_flatten(x), IGNORE_INDEX)).as_py() or 0 for x in labels)
        c, args, samples, stages = self.config, self.args, len(labels[0]), self.config.curate.stages
        keep = c.curate.keep if isinstance(c.curate.keep, float) else 1.0
        trained = keep * sum(n * stage / stages for stage, n in enumerate(args.of_stages(stages).epochs, 1))
        warm_up = (
            c.init_student.warmup_steps * c.init_student.warmup_batch_size / samples if c.student == PRUNE else 0.0
        )
        evaluations = 0.0
        if args.eval_strategy == "steps" and args.eval_steps:
            steps = trained * samples / (args.per_device_train_batch_size * args.gradient_accumulation_steps)
            evaluations = steps / args.eval_steps if args.eval_steps >= 1 else 1 / args.eval_steps
        # Reflection sees the training rows once; evaluation sees the others for three models and before the first step.
        return (rows * (1 + warm_up + trained) + held_out * (4 + evaluations)) * len(self.tokenizer)


def has_fast_bfloat16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    On a CPU it does with AMX, and with AMD's AVX512-BF16, which has twice the throughput of float32. Intel's has no
    more; where a virtual machine hides AMX, a training step in bfloat16 takes longer than in float32.

    Args:
        device: the device.
        cpuinfo: where Linux describes the CPU.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    amx, avx512 = (getattr(torch.cpu, f"_is_{n}_supported", lambda: False)() for n in ("amx_tile", "avx512_bf16"))
    return bool(amx or (avx512 and not (cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text())))


def read_samples(file: Path) -> Dataset:
    """Tokenised samples of a run's file."""
    features = PRIVILEGED_FEATURES if PRIVILEGED_IDS in pq.read_schema(file).names else TOKENISED_FEATURES
    return Dataset.from_parquet(str(file), features=features, keep_in_memory=True)


def json_text(content: Any) -> str:
    """JSON text in the layout of the run's files."""
    return json.dumps(content, indent=1, ensure_ascii=False)


def write_parquet(rows: Dataset, target: Path) -> None:
    """Write a data set in one step: readers see the old file or the new one."""
    rows.to_parquet(str(temporary_path(target)))
    os.replace(temporary_path(target), target)
