"""Predict how much memory the step `distill` of a run needs at its peak, and its teacher cache on disk.

The tensors' bytes come from a step on fake tensors (`dry_step`). Everything else in a process is measured (its imports)
or estimated (`_KEPT`).
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..data import read_source, source_files
from ..losses import expect_logits
from ..models import is_encoder_decoder, load_config
from ..run.config import RunConfig
from ..run.modes import LIVE, answers_anew, has_cache, mode_of
from ..run.steps import Run
from ..run.steps.cache import check_cache
from ..run.steps.data import QUICKSTART_ROWS
from ..run.steps.run import QUICKSTART
from ..teacher.index import KEY_BYTES
from .batch import Batch
from .batches import Lengths, evaluation_batch, read_lengths, train_batch
from .dry_step import Simulated, simulate

# What allocators hold in addition to tensors in use, as a share of activations and cast weights. On Linux, glibc's
# malloc takes blocks of up to 32 MB from a heap, whose gaps are only partly reused: 0.52 to 0.68 was measured
# (SmolLM2-135M with 15 layers, batches of 8 and 16, hidden and live), 0 with MALLOC_MMAP_THRESHOLD_ set. For CUDA it is
# an assumption.
_KEPT = {"cpu": 0.6, "cuda": 0.1}
# Bytes of a CUDA context with cuBLAS on the device.
_CUDA_BASE = 600 << 20
# Bytes of a process after the imports, if no process can be started to measure it: Linux, torch 2.13 for CPU,
# transformers 5.
_BASE = 620 << 20

PARTS = (
    "process",
    "student weights",
    "adapters",
    "gradients",
    "optimizer",
    "teacher",
    "activations",
    "cast weights",
    "loss",
    "backward",
    "cache rows",
    "allocator",
)


_SPREAD = (
    "the live teacher's body, which teacher_device_map or teacher_tp_plan spreads out: how much of it is on this "
    "device is decided when it is loaded"
)


@dataclass(frozen=True)
class MemoryPlan:
    """The peak memory of a run's distillation, in bytes.

    Attributes:
        device: the device of `parts`; "cpu" stands for the whole process (ru_maxrss).
        parts: bytes by name at the peak. Names are in `PARTS`; parts of 0 bytes are left out.
        moment: what the step does at the peak: "forward", "loss", "backward", "optimizer", "teacher" or "evaluation".
        disk: bytes of the teacher cache; 0 with a live teacher, None if the number of samples is not known yet.
        host: bytes of a teacher that a GPU run keeps in the host's memory; else 0.
        batch: the largest micro-batch.
        source: where its lengths come from, in words.
        flattened: whether batches have no padding.
        overrides: what `fit` changed in the config, as `key=value`.
        not_counted: further needs whose sizes are unknown, in words.
    """

    device: str
    parts: dict[str, int]
    moment: str
    disk: int | None
    host: int
    batch: Batch
    source: str
    flattened: bool
    overrides: tuple[str, ...] = ()
    not_counted: str | None = None

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.parts, key=lambda name: self.parts[name])

    def __str__(self) -> str:
        width = max(map(len, (*self.parts, "disk: teacher cache")))
        lines = [f"{name:{width}}  {size / 1e9:9.3f} GB  {size / self.total:6.1%}" for name, size in self.rows()]
        known = "  unknown until the data is prepared" if self.disk is None else f"  {self.disk / 1e9:9.3f} GB"
        lines.append(f"{'disk: teacher cache':{width}}{known}")
        if self.host:
            lines.append(f"{'host: teacher':{width}}  {self.host / 1e9:9.3f} GB")
        b, how = self.batch, "without padding" if self.flattened else "padded"
        lines.append(f"peak in: {self.moment}")
        lines.append(f"largest batch: {len(b.lengths)} samples, {sum(b.lengths)} tokens, {b.rows} with loss, {how}")
        lines.append(f"lengths from: {self.source}")
        if self.not_counted:
            lines.append(f"not counted: {self.not_counted}")
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, int]]:
        """The parts and their total."""
        return [*self.parts.items(), ("total", self.total)]


def _disk(config: RunConfig, lengths: Lengths | None, made: Simulated) -> int | None:
    """Bytes of the cache; None if the number of samples is not known yet."""
    if not has_cache(config):
        return 0
    if lengths is not None:
        c, everything = config.curate, range(len(lengths.train))
        kept = everything if lengths.kept is None or c.reflect_again else lengths.kept
        known = lengths.kept is not None or c.reflect_again or c.method == "none"
        share = 1.0 if known or isinstance(c.keep, str) else c.keep
        share *= _answers_held(config)
        samples = share * len(kept) + len(lengths.validation)
        rows = share * sum(lengths.train[i][1] for i in kept) + sum(n for _, n in lengths.validation)
    else:
        count = _count_rows(config)
        if count is None:
            return None
        samples = count * _answers_held(config)
        rows = samples * config.max_response_length
    return int(rows * made.row_bytes + samples * (KEY_BYTES + 8)) + made.head_bytes


def _answers_held(config: RunConfig) -> float:
    """The most answers to a kept prompt in the cache; with answers_again, those of the first stage are added."""
    of_first = 1.0 if config.curate.method == "none" else 1 / config.curate.stages
    return config.answers_per_prompt * (1 + of_first if config.answers_again else 1.0)


def _count_rows(config: RunConfig) -> int | None:
    if config.data == QUICKSTART:
        return config.max_rows or QUICKSTART_ROWS
    if config.data_function is not None or not source_files(config.data, config.data_split):
        return None
    return len(read_source(config.data, config.data_split).head(config.max_rows))


# On Linux, ru_maxrss includes the memory of the process before exec, that of its parent; VmHWM does not.
_PROBE = """
import srd_fast.cli
srd_fast.cli._quiet()
import srd_fast.run.pipeline, torch._dynamo, torch._inductor.compile_fx
try:
    with open("/proc/self/status") as f:
        print(next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM")))
except (OSError, StopIteration):
    import resource, sys
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@cache
def _process_bytes() -> int:
    """Peak resident memory, in bytes, of a process after a run's imports, measured once; `_BASE` if that fails."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=300)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return _BASE


def in_a_step(config: RunConfig) -> RunConfig:
    """A config of mode kd whose steps need the same memory as the largest steps of a run's mode.

    Args:
        config: the run's config.
    """
    mode, cache = mode_of(config), config.cache
    if mode.teacher and (answers_anew(config) or not has_cache(config)):  # the teacher runs, even if there is a cache
        cache = cache.model_copy(update={"kind": LIVE})
    elif not mode.teacher:  # each label stands in for the teacher, as one draw: see `NoTeacher`
        cache = cache.model_copy(update={"kind": "sampled", "k": 1})
    return config.model_copy(update={"cache": cache})


def _not_counted(config: RunConfig, run: Run) -> Iterator[str]:
    if run.teacher_spread and in_a_step(config).cache.kind == LIVE:
        yield _SPREAD
    if answers_anew(config):
        yield "the generation of fresh answers"
    if mode_of(config).itself and not has_cache(config):
        yield "the longer prompts of the teacher"


def plan(config: RunConfig) -> MemoryPlan:
    """Predict the peak memory of the step `distill` in a process of its own, and the disk space of its cache.

    It reads the models' configs, and the samples' lengths if the run folder has them for these settings; otherwise
    every sample counts as max_prompt_length + max_response_length tokens. This takes seconds and reads no weights.

    Args:
        config: the run's config.

    Returns:
        The peak and its parts.

    Raises:
        UserError: `srd-fast run` would refuse the config, or a model's config cannot be read.
    """
    run = Run(config, Path(config.output_dir), {}, {})
    args = run.args
    check_cache(config, args)
    encoder_decoder = is_encoder_decoder(load_config(config.teacher))
    lengths = read_lengths(config, args)

    def largest(training: bool, flattened: bool) -> Batch:
        if training:
            return train_batch(lengths, config, args, flattened, encoder_decoder)
        return evaluation_batch(lengths, config, args.per_device_eval_batch_size, flattened, encoder_decoder)

    with expect_logits(run.expected_logits() or math.inf):
        made = simulate(in_a_step(config), args, largest)
        kept_rows = simulate(config, args, largest) if answers_anew(config) and has_cache(config) else made
    parts = {**made.parts, "process": _CUDA_BASE if run.device.type == "cuda" else _process_bytes()}
    parts["cache rows"] = 2 * made.batch.rows * made.row_bytes
    kept = (
        0.0 if "MALLOC_MMAP_THRESHOLD_" in os.environ and run.device.type == "cpu" else _KEPT.get(run.device.type, 0.1)
    )
    parts["allocator"] = int(kept * (parts.get("activations", 0) + parts.get("cast weights", 0)))
    return MemoryPlan(
        device=run.device.type,
        parts={name: parts[name] for name in PARTS if parts.get(name)},
        moment=made.moment,
        disk=_disk(config, lengths, kept_rows),
        host=made.host,
        batch=made.batch,
        source="the limits of the config" if lengths is None else lengths.source,
        flattened=made.flattened,
        not_counted=" and ".join(_not_counted(config, run)) or None,
    )
