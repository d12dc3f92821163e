"""Predict how much memory the step `distill` of a run needs at its peak, and its teacher cache on disk.

The tensors come from a step on fake ones (`dry_step`). What a process takes besides is measured (its imports) or
estimated (`_KEPT`).
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from ..curriculum import CurriculumPlan
from ..data import IGNORE_INDEX, divide_by_tokens, read_source
from ..errors import UserError
from ..losses import expect_logits
from ..run.config import RunConfig
from ..run.steps import LIVE, Run, expected_logits
from ..run.steps.cache import check_cache
from ..run.steps.data import QUICKSTART_ROWS
from ..run.steps.run import QUICKSTART
from ..run.steps.settings import training_config
from ..teacher.index import KEY_BYTES
from ..training.batching import make_curriculum
from ..training.config import SRDConfig
from .dry_step import Batch, Simulated, simulate

# What allocators keep beside tensors in use, as a part of activations and cast weights. On Linux glibc's malloc takes
# blocks of up to 32 MB from a heap whose gaps later tensors fill only in part: 0.52 to 0.68 measured (SmolLM2-135M at
# 15 layers, batches of 8 and 16, hidden and live), 0 with MALLOC_MMAP_THRESHOLD_ set. On CUDA an assumption.
_KEPT = {"cpu": 0.6, "cuda": 0.1}
# A CUDA context with cuBLAS, bytes on the device.
_CUDA_BASE = 600 << 20
# After the imports, where no process can be started to measure it: Linux, torch 2.13 for CPU, transformers 5.
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


@dataclass(frozen=True)
class MemoryPlan:
    """The peak memory of a run's distillation, in bytes.

    Attributes:
        device: the device that `parts` are on; "cpu" for the process as a whole (ru_maxrss).
        parts: bytes by name at the peak. Names are in `PARTS`; parts of 0 bytes are left out.
        moment: what the step does then: "forward", "loss", "backward", "optimizer", "teacher" or "evaluation".
        disk: bytes of the teacher cache; 0 with a live teacher, None if the number of samples is not known yet.
        host: bytes of a teacher that is kept in the host's memory beside a GPU; else 0.
        batch: the largest micro-batch.
        source: where its lengths come from.
        flattened: whether batches have no padding.
        overrides: what `fit` changed in the config, as `key=value`.
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
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, int]]:
        """The parts and their total."""
        return [*self.parts.items(), ("total", self.total)]


# Data: which micro-batches there will be


@dataclass(frozen=True)
class _Lengths:
    """Tokens, and tokens with loss, of each prepared sample, in order. train_order: the run's sequence, if known."""

    train: list[tuple[int, int]]
    validation: list[tuple[int, int]]
    train_order: list[int] | None
    kept: list[int] | None
    source: str


_LIMITS = ("max_prompt_length", "max_response_length")
_DATA_KEYS = ("teacher", "data", "data_split", "validation", "max_rows", "template", "seed", *_LIMITS)
_PLAN_KEYS = ("student", "init_student", "reflect", "curate")


def _same(config: RunConfig, folder: Path, keys: Sequence[str]) -> bool:
    """Whether the run folder was made with the same values of these keys."""
    try:
        there = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    wanted = config.model_dump()
    return isinstance(there, dict) and all(k in there and there[k] == wanted[k] for k in keys)


def _read_lengths(config: RunConfig, args: SRDConfig) -> _Lengths | None:
    """Lengths of the samples in the run folder, if they were made with the same settings; else None."""
    folder = Path(config.output_dir)
    if not (folder / "data" / "validation.parquet").is_file() or not _same(config, folder, _DATA_KEYS):
        return None
    run = Run(config, folder, {}, {})
    samples = {split: run.data(split) for split in ("train", "validation")}
    sizes = {
        split: [
            (len(ids), sum(x != IGNORE_INDEX for x in labels[1:]))
            for ids, labels in zip(rows["input_ids"], rows["labels"])
        ]
        for split, rows in samples.items()
    }
    order = kept = None
    source = f"the longest samples of {folder / 'data'}"
    if (folder / "plan.json").is_file() and _same(config, folder, _PLAN_KEYS):
        try:
            curriculum = make_curriculum(CurriculumPlan.load(folder / "plan.json"), samples["train"], args)
        except UserError:
            pass  # a plan of other data
        else:
            steps = curriculum.total_steps if args.max_steps < 0 else min(args.max_steps, curriculum.total_steps)
            order = list(curriculum.indices())[: steps * curriculum.batch_size]
            kept = sorted({i for stage in curriculum.stages for i in stage.samples.tolist()})
            source = f"every batch of {folder / 'plan.json'}"
    return _Lengths(sizes["train"], sizes["validation"], order, kept, source)


_Sizes = Sequence[tuple[int, int]]  # of samples: tokens, and tokens with loss


def _tokens(batch: _Sizes, flattened: bool) -> int:
    """Tokens of a batch, padding included."""
    lengths = [n for n, _ in batch]
    return sum(lengths) if flattened else max(lengths) * len(lengths)


def _largest(batches: Sequence[_Sizes], flattened: bool) -> Batch:
    """The batch with the most tokens, padding included, and with the most rows of any batch."""
    chosen = max(batches, key=lambda batch: _tokens(batch, flattened))
    return Batch(tuple(n for n, _ in chosen), max(sum(rows for _, rows in batch) for batch in batches))


def _divided(batch: _Sizes, most: int, flattened: bool) -> list[_Sizes]:
    """The micro-batches that `max_tokens_per_batch` makes of a batch. A longer sample is a micro-batch of its own."""
    if not most:
        return [batch]
    lengths = [n for n, _ in batch]
    return [[batch[i] for i in part] for part in divide_by_tokens(lengths, max(most, *lengths), flattened)]


def _train_batches(lengths: _Lengths | None, config: RunConfig, size: int) -> list[_Sizes]:
    """The batches of the run, or the largest that are possible."""
    if lengths is None:
        return [[(config.max_prompt_length + config.max_response_length, config.max_response_length)] * size]
    if lengths.train_order is None:
        longest = sorted(lengths.train, key=lambda x: -x[0])[:size]
        most_rows = sorted((rows for _, rows in lengths.train), reverse=True)
        return [[(n, rows) for (n, _), rows in zip(longest, most_rows)]]
    order = [lengths.train[i] for i in lengths.train_order]
    return [order[i : i + size] for i in range(0, len(order), size)]


def _train_batch(lengths: _Lengths | None, config: RunConfig, args: SRDConfig, flattened: bool) -> Batch:
    batches = _train_batches(lengths, config, args.per_device_train_batch_size)
    most = args.max_tokens_per_batch
    return _largest([part for batch in batches for part in _divided(batch, most, flattened)], flattened)


def _evaluation_batch(lengths: _Lengths | None, config: RunConfig, size: int, flattened: bool) -> Batch:
    if lengths is None:
        if isinstance(config.validation, int):
            size = min(size, config.validation)
        return _largest(_train_batches(None, config, size), flattened)
    rows = lengths.validation
    return _largest([rows[i : i + size] for i in range(0, len(rows), size)], flattened)


def _disk(config: RunConfig, lengths: _Lengths | None, made: Simulated) -> int | None:
    """Bytes of the cache; None if the number of samples is not known yet."""
    if config.cache.kind == LIVE:
        return 0
    if lengths is not None:
        c, everything = config.curate, range(len(lengths.train))
        kept = everything if lengths.kept is None or c.reflect_again else lengths.kept
        known = lengths.kept is not None or c.reflect_again or c.method == "none"
        share = 1.0 if known or isinstance(c.keep, str) else c.keep
        samples = share * len(kept) + len(lengths.validation)
        rows = share * sum(lengths.train[i][1] for i in kept) + sum(n for _, n in lengths.validation)
    else:
        count = _count_rows(config)
        if count is None:
            return None
        samples, rows = count, count * config.max_response_length
    return int(rows * made.row_bytes + samples * (KEY_BYTES + 8)) + made.head_bytes


def _count_rows(config: RunConfig) -> int | None:
    if config.data == QUICKSTART:
        return config.max_rows or QUICKSTART_ROWS
    if not Path(config.data).expanduser().is_file():
        return None
    return len(read_source(config.data, config.data_split)[: config.max_rows])


# The whole


# On Linux ru_maxrss counts what a process was before exec as well, its parent, and VmHWM does not.
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
    """Peak resident memory of a process after a run's imports, measured once; `_BASE` where that fails."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=300)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return _BASE


def plan(config: RunConfig) -> MemoryPlan:
    """Predict the peak memory of the step `distill`, as a process of its own, and the disk space of its cache.

    The models' configs are read, and the samples' lengths if the run folder holds them for these settings; otherwise
    every sample counts as max_prompt_length + max_response_length tokens. This takes seconds and reads no weights.

    Args:
        config: of the run.

    Returns:
        The peak and its parts.

    Raises:
        UserError: `srd-fast run` would refuse the config, or a model's config cannot be read.
    """
    run = Run(config, Path(config.output_dir), {}, {})
    args = training_config(config, run.folder, run.device, run.dtype)
    check_cache(config, args)
    lengths = _read_lengths(config, args)

    def largest(training: bool, flattened: bool) -> Batch:
        if training:
            return _train_batch(lengths, config, args, flattened)
        return _evaluation_batch(lengths, config, args.per_device_eval_batch_size, flattened)

    with expect_logits(expected_logits(run) or math.inf):
        made = simulate(config, args, largest)
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
        disk=_disk(config, lengths, made),
        host=made.host,
        batch=made.batch,
        source="the limits of the config" if lengths is None else lengths.source,
        flattened=made.flattened,
    )


# What fits in a limit


_EVALUATION = "distill.per_device_eval_batch_size"
_MICRO_BATCH = "distill.max_tokens_per_batch"
_ROUND = 32  # tokens, to a multiple of which a proposal is rounded up
_SMALLEST_BUDGET = 32 << 20
_BUDGETS = (512 << 20, 256 << 20, 128 << 20, 64 << 20, _SMALLEST_BUDGET)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**i for i, letter in enumerate("kmgt", 1) for end in ("b",)}
_UNITS |= {f"{letter}{end}": 1024**i for i, letter in enumerate("kmgt", 1) for end in ("", "ib")}


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "8G" (both 2**30), "8GB" (10**9), "8192MB" or "123456".

    Raises:
        UserError: for any other text.

    >>> parse_bytes("1.5GiB"), parse_bytes("8192 MB")
    (1610612736, 8192000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise UserError(f"limit must be a size above 0 such as 8GiB, 8GB or 8192MB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with keys such as `distill.skew` set."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    updates: dict[str, Any] = {}
    for section, values in sections.items():
        old = getattr(config, section)
        updates[section] = {**old, **values} if isinstance(old, dict) else old.model_copy(update=values)
    return config.model_copy(update=updates)


def _variants(config: RunConfig, args: SRDConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """What may change besides sizes, from changes that cost no speed to changes of the result."""
    teachers: list[dict[str, Any]] = [{}]
    if config.cache.kind == LIVE:
        teachers.append({"cache.kind": "hidden"})
        if device.type != "cpu" and not args.teacher_offload:
            teachers.append({"distill.teacher_offload": True})
    yield from teachers
    recompute = {} if args.gradient_checkpointing else {"distill.gradient_checkpointing": True}
    if recompute:
        yield from ({**teacher, **recompute} for teacher in teachers)
    if config.cache.kind in (LIVE, "hidden"):
        yield {"cache.kind": "topk", **recompute}


class _Search:
    """Plans of a config with different sizes, each made once."""

    def __init__(self, config: RunConfig, limit: int) -> None:
        self.config, self.limit = config, limit
        self.made: dict[str, MemoryPlan] = {}

    def plan(self, changes: dict[str, Any]) -> MemoryPlan:
        """The plan, with the changes as its overrides."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self.made:
            listed = tuple(f"{name}={json.dumps(value)}" for name, value in changes.items())
            self.made[key] = replace(
                plan(_changed(self.config, changes)), overrides=tuple(x.replace('"', "") for x in listed)
            )
        return self.made[key]

    def fits(self, changes: dict[str, Any]) -> bool:
        """Whether the limit is enough with these changes."""
        return self.plan(changes).total <= self.limit

    def first(self, candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The first candidate that fits. Later candidates need less memory, and the last one fits."""
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(candidates[middle]) else (middle + 1, high)
        return candidates[low]


def _longest(config: RunConfig, args: SRDConfig) -> int:
    """Tokens of the longest sample, the least that a micro-batch must hold."""
    batches = _train_batches(_read_lengths(config, args), config, args.per_device_train_batch_size)
    return max(n for batch in batches for n, _ in batch)


def _smaller(whole: MemoryPlan, args: SRDConfig, longest: int) -> list[dict[str, Any]]:
    """Changes to smaller and smaller micro-batches, beginning with none."""
    sizes: list[dict[str, Any]] = [{}]
    tokens = _tokens([(n, 0) for n in whole.batch.lengths], whole.flattened)
    for parts in range(2, tokens + 1):
        most = max(longest, -(-tokens // parts // _ROUND) * _ROUND)
        if most < sizes[-1].get(_MICRO_BATCH, tokens):
            sizes.append({_MICRO_BATCH: most})
            evaluated = max(1, 2 * args.per_device_train_batch_size // parts)
            if args.per_device_eval_batch_size > evaluated:
                sizes[-1][_EVALUATION] = evaluated
        if most == longest:
            break
    return sizes


def fit(config: RunConfig, limit: int) -> MemoryPlan:
    """Predict the peak memory of a config, and change the config if it does not fit in `limit` bytes.

    What costs least speed is changed first: the loss's `memory_budget`; then `max_tokens_per_batch`, which divides a
    step's samples and does not change its result; then a cache instead of a live teacher, or the teacher's body on the
    host; then recomputed activations; last a top-k cache, whose divergence is a little below the full one.

    Args:
        config: of the run.
        limit: bytes.

    Returns:
        The plan that fits. `overrides` says what was changed.

    Raises:
        UserError: nothing fits. The message says the smallest need and its largest part.
    """
    search = _Search(config, limit)
    if search.fits({}):
        return search.plan({})
    run = Run(config, Path(config.output_dir), {}, {})
    args = training_config(config, run.folder, run.device, run.dtype)
    default = (1 << 30) if run.device.type == "cuda" else 512 << 20
    budgets: list[dict[str, Any]] = [{}]
    most = args.memory_budget or default
    budgets += [{"distill.memory_budget": n} for n in _BUDGETS if n < most]
    sizes = _smaller(search.plan({}), args, _longest(config, args))
    # A budget below a quarter of the usual one makes products slow, so it comes after smaller batches.
    good = [b for b in budgets if b.get("distill.memory_budget", default) >= default // 4]
    for variant in _variants(config, args, run.device):
        if not search.fits({**variant, **sizes[-1], **budgets[-1]}):
            continue
        usual = [{**variant, **sizes[0], **b} for b in good]
        if search.fits(usual[-1]):
            return search.plan(search.first(usual))
        smaller = [{**variant, **s, **good[-1]} for s in sizes]
        if search.fits(smaller[-1]):
            chosen = sizes[smaller.index(search.first(smaller))]
            found = search.first([{**variant, **chosen, **b} for b in good])
        else:
            found = search.first([{**variant, **sizes[-1], **b} for b in budgets])
        spared = {name: value for name, value in found.items() if name != _EVALUATION}
        return search.plan(spared if search.fits(spared) else found)
    least = min(search.made.values(), key=lambda p: p.total)
    raise UserError(
        f"nothing fits in {limit / 1e9:.2f} GB: the least is {least.total / 1e9:.2f} GB, of which {least.largest} "
        f"takes {least.parts[least.largest] / 1e9:.2f} GB (with {' '.join(least.overrides) or 'no overrides'})"
    )
