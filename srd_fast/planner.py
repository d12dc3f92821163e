"""How much memory the step `distill` of a run will need at its peak, and the teacher cache on disk, before it runs.

Student, optimizer and a live teacher go through one step on fake tensors (see `live_bytes`), made from their configs
alone; the loss takes part with the buffers that its chunks would have. What lies outside of tensors is measured once
(the process after its imports) or allowed for (`_ALLOWANCE`).
"""

import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer

from .config import SRDConfig
from .curation import CurriculumPlan
from .curriculum import per_stage
from .data import IGNORE_INDEX, read_rows
from .errors import UserError, first_line
from .kernels import ALIGNMENT, EAGER_BUFFERS, block_bytes
from .live_bytes import LiveBytes
from .losses import get_divergence
from .losses.backends import row_backend
from .losses.buffers import chunk_rows
from .models import find_head, flattening, hidden_states, prune_depth, resolve_model, unwrap, varlen
from .run_config import RunConfig
from .steps import LIVE, PRUNE, Run
from .steps.data import QUICKSTART_ROWS
from .steps.run import QUICKSTART
from .steps.training import check_cache, lora_config, training_config
from .teacher.index import KEY_BYTES
from .teacher.stores import ProjectedStore, Store, make_store
from .trainer import make_curriculum

# What a process on CPU takes beyond the tensors that are alive at its peak, as a part of them: glibc's malloc keeps
# freed memory between tensors in use, and matrix products pack their operands. On CUDA: the caching allocator's blocks.
_ALLOWANCE = {"cpu": 0.10, "cuda": 0.10}
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
class Batch:
    """A micro-batch: its samples' lengths in tokens, and how many tokens have a loss."""

    lengths: tuple[int, ...]
    rows: int


@dataclass(frozen=True)
class MemoryPlan:
    """The peak memory of a run's distillation, in bytes.

    Attributes:
        device: the device that `parts` is of, "cpu" for the process as a whole (ru_maxrss).
        parts: bytes by name at the peak; the names are in `PARTS`, those of 0 bytes left out.
        moment: what the step is at then: "forward", "loss", "backward", "optimizer", "teacher" or "evaluation".
        disk: bytes of the teacher cache; 0 for a live teacher, None where the number of samples is not known yet.
        host: bytes in the host's memory of a teacher that is kept there beside a GPU; else 0.
        batch: the largest micro-batch.
        source: where its lengths come from.
        flattened: whether batches go without padding.
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
        lines.append(f"{'disk: teacher cache':{width}}  {self.disk / 1e9:9.3f} GB")
        if self.host:
            lines.append(f"{'host: teacher':{width}}  {self.host / 1e9:9.3f} GB")
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, int]]:
        """The parts and their total."""
        return [*self.parts.items(), ("total", self.total)]


# Data: which micro-batches there will be


@dataclass(frozen=True)
class _Lengths:
    """Of the prepared samples, in order: tokens, and tokens with loss. train_order: the run's sequence, if known."""

    train: list[tuple[int, int]]
    validation: list[tuple[int, int]]
    train_order: list[int] | None
    kept: list[int] | None
    source: str


_DATA_KEYS = ("teacher", "data", "data_split", "validation", "max_rows", "template", "seed")
_DATA_KEYS += ("max_prompt_length", "max_response_length")
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
    """From the run folder, if what is there was made from the same settings."""
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


def _largest(batches: Sequence[Sequence[tuple[int, int]]], flattened: bool) -> Batch:
    """The batch of the most tokens, padding included; its rows are the most of any batch."""
    lengths = [[n for n, _ in batch] for batch in batches]
    chosen = max(lengths, key=sum if flattened else lambda b: max(b) * len(b))
    return Batch(tuple(chosen), max(sum(rows for _, rows in batch) for batch in batches))


def _train_batch(lengths: _Lengths | None, config: RunConfig, size: int, flattened: bool) -> Batch:
    if lengths is None:
        longest = config.max_prompt_length + config.max_response_length
        return Batch((longest,) * size, size * config.max_response_length)
    if lengths.train_order is None:
        by_length, by_rows = (sorted(lengths.train, key=lambda x: -x[i])[:size] for i in (0, 1))
        return Batch(tuple(n for n, _ in by_length), sum(rows for _, rows in by_rows))
    order = [lengths.train[i] for i in lengths.train_order]
    return _largest([order[i : i + size] for i in range(0, len(order), size)], flattened)


def _evaluation_batch(lengths: _Lengths | None, config: RunConfig, size: int, flattened: bool) -> Batch:
    if lengths is None:
        if isinstance(config.validation, int):
            size = min(size, config.validation)
        return _train_batch(None, config, size, flattened)
    rows = lengths.validation
    return _largest([rows[i : i + size] for i in range(0, len(rows), size)], flattened)


# The models, without weights


def _load_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(resolve_model(source))
    except UserError:
        raise
    except Exception as e:  # damaged configs raise errors of many libraries
        raise UserError(f"model {source!r} has no config that can be read: {first_line(e)}") from e


def _make_model(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    config = _load_config(source)
    try:
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as e:
        raise UserError(f"model {source!r} is not a causal language model: {first_line(e)}") from e


def _make_student(config: RunConfig, device: torch.device, live: LiveBytes, args: SRDConfig) -> Any:
    with live.labelled("student weights"):
        source = config.teacher if config.student == PRUNE else config.student
        model = _make_model(source, torch.float32, device)
        if config.student == PRUNE:
            prune_depth(model, config.init_student.layers)
    peft_config = lora_config(config)
    if peft_config is not None:
        from peft import get_peft_model

        with live.labelled("adapters"):
            model = get_peft_model(model, peft_config)
    if args.gradient_checkpointing:
        options = {**(args.gradient_checkpointing_kwargs or {}), "preserve_rng_state": False}
        unwrap(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if peft_config is not None:
            unwrap(model).enable_input_require_grads()
    gc.collect()
    return model.train()


def _make_teacher(config: RunConfig, run: Run, student: Any, offload: bool) -> tuple[Any, list[Tensor]]:
    """The body if it runs, and whatever else of the teacher stays in memory."""
    kind = config.cache.kind
    if kind in ("topk", "sampled"):
        return None, []
    if kind == "projected":
        return None, [torch.empty_like(x) for x in find_head(student).tensors().values()]
    model = _make_model(config.teacher, run.dtype, torch.device("cpu") if offload else run.device)
    model.eval().requires_grad_(False)
    head = [x for x in find_head(model).tensors().values()]
    if kind == LIVE:
        return model, [torch.empty_like(x, device=run.device) for x in head] if offload else []
    return None, [torch.empty_like(x) for x in head]


def _flattens(models: Sequence[Any], wanted: Any) -> bool:
    """What `SRDTrainer` decides, short of running the models; switches their attention if so."""
    if not wanted or any(flattening._unfit(unwrap(m)) is not None for m in models):
        return False
    for model in models:
        if "flash" not in str(unwrap(model).config._attn_implementation):
            unwrap(model).set_attn_implementation(varlen.IMPLEMENTATION)
    return True


def _forward(model: Any, batch: Batch, device: torch.device, flattened: bool) -> Tensor:
    """The hidden states that `srd_fast.models.hidden_states` would give."""
    if not flattened:
        ids = torch.zeros(len(batch.lengths), max(batch.lengths), dtype=torch.long, device=device)
        return hidden_states(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    inner, lengths = unwrap(model), list(batch.lengths)
    text = inner.config.get_text_config()
    if getattr(text, "sliding_window", None) is None:
        # Without windows only the sum of the lengths matters, and equal lengths are one call of the kernel.
        lengths = [-(-sum(lengths) // len(lengths))] * len(lengths)
    total = sum(lengths)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    keywords: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    keywords |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    if inner.config._attn_implementation == varlen.IMPLEMENTATION:
        keywords["sample_lengths"] = lengths
    ids = torch.zeros(1, total, dtype=torch.long, device=device)
    with varlen.flattened_forward():
        out = inner.base_model(
            input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False, return_dict=True, **keywords
        )
    return out.last_hidden_state


# The loss


@dataclass(frozen=True)
class _LossSizes:
    """What `ChunkedLoss` allocates; see `losses.chunked.run_chunks`. Bytes, but for classes.

    kept: the workspace. working: casts of heads, eager temporaries and slices of products.
    """

    kept: int
    working: int


def _loss_sizes(
    config: RunConfig, args: SRDConfig, run: Run, student: Any, teacher_classes: int, rows: int, training: bool
) -> _LossSizes:
    head = find_head(student).weight
    assert head is not None
    classes, width = head.shape
    autocast = args.bf16 or args.fp16
    # The products run in autocast's dtype; a float32 loss gets a teacher in float32.
    gemm = run.dtype if autocast else head.dtype
    sides = [classes, *([teacher_classes] if config.cache.kind in (LIVE, "hidden") else [])]
    compact = len(sides) == 1
    divergence = None if compact else get_divergence(args.divergence).bind(args.skew, args.beta)
    if compact and args.backend == "auto" and run.device.type != "cpu":
        backend = "eager"
    else:
        backend = row_backend(args.backend, run.device, gemm, max(sides), divergence, True)[1]
    temporary = EAGER_BUFFERS * max(sides) * 4 if backend == "eager" else 0
    strides = [-(-s // ALIGNMENT) * ALIGNMENT for s in sides]
    chunk = chunk_rows(rows, sum(sides) * gemm.itemsize, temporary, run.device, args.memory_budget)
    casts = classes * width * gemm.itemsize if gemm != head.dtype else 0
    working = casts + (min(chunk * temporary, block_bytes(run.device)) if temporary else 0)
    if training and head.requires_grad and gemm != head.dtype:
        working += min(classes, 8192) * width * (gemm.itemsize + 4)
    if run.device.type == "cpu":
        working += max(classes, *sides) * width * gemm.itemsize  # the head as the product packs it
    return _LossSizes(chunk * sum(strides) * gemm.itemsize, working)


class _Loss(torch.autograd.Function):
    """Allocates what `ChunkedLoss` does."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, working: int) -> Tensor:
        grads = [torch.empty_like(x) if n else None for x, n in zip((hidden_ND, weight, bias), ctx.needs_input_grad)]
        scratch = torch.empty(working, dtype=torch.uint8, device=hidden_ND.device)
        ctx.grads = grads
        del scratch
        ctx.save_for_backward(hidden_ND, weight, bias)
        return hidden_ND.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*grads, None)


# One step


@dataclass
class _Step:
    """A distillation step on fake tensors."""

    config: RunConfig
    args: SRDConfig
    run: Run
    live: LiveBytes
    student: Any
    teacher: Any
    teacher_classes: int
    flattened: bool

    def autocast(self) -> Any:
        """As accelerate sets it up."""
        if not (self.args.bf16 or self.args.fp16):
            return nullcontext()
        return torch.autocast(self.run.device.type, torch.bfloat16 if self.args.bf16 else torch.float16)

    @contextmanager
    def at(self, moment: str, label: str) -> Iterator[None]:
        """Name the moment, and what is allocated in it."""
        self.live.moment = moment
        with self.live.labelled(label, {"student weights": "cast weights", "adapters": "cast weights"}):
            yield

    def teacher_rows(self, batch: Batch) -> Tensor | None:
        """The live teacher's hidden states."""
        if self.teacher is None:
            return None
        with torch.inference_mode(False), torch.no_grad(), self.at("teacher", "activations"):
            device = next(self.teacher.parameters()).device
            hidden_BLD = _forward(self.teacher, batch, device, self.flattened)
            return self.rows(hidden_BLD, batch)

    @staticmethod
    def rows(hidden_BLD: Tensor, batch: Batch) -> Tensor:
        """[N, D], as `rows_with_loss` takes them."""
        index = torch.zeros(batch.rows, dtype=torch.long, device=hidden_BLD.device)
        return hidden_BLD[:, :-1][index, index]

    def evaluate(self, batch: Batch, loss: _LossSizes) -> None:
        """`measure_batch`."""
        teacher_ND = self.teacher_rows(batch)
        with torch.no_grad(), self.autocast(), self.at("evaluation", "activations"):
            hidden_ND = self.rows(_forward(self.student, batch, self.run.device, self.flattened), batch)
            with self.at("evaluation", "loss"):
                torch.empty(loss.working, dtype=torch.uint8, device=self.run.device)
        del teacher_ND, hidden_ND

    def train(self, batch: Batch, loss: _LossSizes) -> None:
        """`SRDTrainer.training_step` of a micro-batch."""
        teacher_ND = self.teacher_rows(batch)
        with self.at("forward", "activations"):
            with self.autocast():
                hidden_BLD = _forward(self.student, batch, self.run.device, self.flattened)
            hidden_ND = self.rows(hidden_BLD, batch)
            head = find_head(self.student)
            with self.at("loss", "loss"):
                value = _Loss.apply(hidden_ND, head.weight, head.bias, loss.working)  # type: ignore[no-untyped-call]
        with self.at("backward", "backward"):
            value.backward()
        del teacher_ND, hidden_BLD, hidden_ND

    def optimise(self, optimizer: Any) -> None:
        """The optimizer's step; its state counts as such from then on."""
        with self.at("optimizer", "optimizer"):
            optimizer.step()


def _optimizer(args: SRDConfig, model: Any) -> Any:
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, RuntimeError, ValueError) as e:
        raise UserError(f"config: distill.optim: {first_line(e)}") from e
    return kind([p for p in model.parameters() if p.requires_grad], **options)


@dataclass(frozen=True)
class _Simulated:
    """parts, moment: of the peak. row_bytes, head_bytes: of the cache on disk."""

    parts: dict[str, int]
    moment: str
    batch: Batch
    flattened: bool
    host: int
    row_bytes: int
    head_bytes: int


def _store(config: RunConfig, args: SRDConfig, student: Any, classes: int) -> Store:
    kind, stages = config.cache.kind, config.curate.stages
    of_stages = per_stage("temperature", args.temperature, args.temperature_start, args.temperature_end, stages)
    temperatures = tuple(sorted({1.0, *map(float, of_stages)}))
    if kind == "projected":
        return ProjectedStore(find_head(student), "", temperatures)
    return make_store(kind, classes, config.cache.k, temperatures)


def _simulate(config: RunConfig, args: SRDConfig, lengths: _Lengths | None) -> _Simulated:
    run = Run(config, Path(config.output_dir), {}, {})
    device, live = run.device, LiveBytes()
    offload = args.teacher_offload and device.type != "cpu" and config.cache.kind == LIVE
    with live:
        student = _make_student(config, device, live, args)
        with live.labelled("host" if offload else "teacher"):
            teacher, held = _make_teacher(config, run, student, offload)
            gc.collect()
        for x in held:
            live.relabel(x, "teacher")
        host = live.live.pop("host", 0)
        teacher_classes = _load_config(config.teacher).get_text_config().vocab_size
        flattened = _flattens([student, *([teacher] if teacher is not None else [])], args.padding_free)
        sizes = args.per_device_train_batch_size, args.per_device_eval_batch_size
        batch = _train_batch(lengths, config, sizes[0], flattened)
        evaluation = _evaluation_batch(lengths, config, sizes[1], flattened)
        # Fake masks are never whole unless no batch needs padding.
        live.masks_are_whole = len(set(batch.lengths)) == 1
        evaluates = args.eval_strategy != "no"
        loss = _loss_sizes(config, args, run, student, teacher_classes, batch.rows, True)
        of_evaluation = _loss_sizes(config, args, run, student, teacher_classes, evaluation.rows, False)
        step = _Step(config, args, run, live, student, teacher, teacher_classes, flattened)
        with live.labelled("loss"):
            kept = max(loss.kept, of_evaluation.kept if evaluates else 0)
            workspace = torch.empty(kept, dtype=torch.uint8, device=device)
        trained = [p for p in student.parameters() if p.requires_grad]
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: live.relabel(p.grad, "gradients"))
        with step.at("optimizer", "gradients"):
            for p in trained:
                p.grad = torch.empty_like(p)
        optimizer = _optimizer(args, student)
        step.optimise(optimizer)
        optimizer.zero_grad()
        if evaluates:
            student.eval()
            step.evaluate(evaluation, of_evaluation)
            student.train()
        for _ in range(min(2, args.gradient_accumulation_steps)):
            step.train(batch, loss)
        step.optimise(optimizer)
        row_bytes = head_bytes = 0
        if config.cache.kind != LIVE:
            head_T = find_head(_make_model(config.teacher, run.dtype, device))
            common = min(teacher_classes, find_head(student).num_classes(workspace))
            row_bytes = _store(config, args, student, common).bytes_per_row(head_T, run.dtype)
            if config.cache.kind == "hidden":
                head_bytes = sum(x.numel() * x.element_size() for x in head_T.tensors().values())
    return _Simulated(live.peak, live.peak_moment, batch, flattened, host, row_bytes, head_bytes)


def _disk(config: RunConfig, lengths: _Lengths | None, made: _Simulated) -> int | None:
    """Bytes of the cache; None where the number of samples is not known yet."""
    if config.cache.kind == LIVE:
        return 0
    if lengths is not None:
        kept = range(len(lengths.train)) if lengths.kept is None else lengths.kept
        share = config.curate.keep if lengths.kept is None and config.curate.method != "none" else 1.0
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
    return len(read_rows(config.data, config.data_split)[: config.max_rows])


# The whole


_PROBE = """
import resource, sys
import srd_fast.cli
srd_fast.cli._quiet()
import srd_fast.pipeline, torch._dynamo, torch._inductor.compile_fx
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


@cache
def _process_bytes() -> int:
    """ru_maxrss of a process that has imported what a run imports, measured once; `_BASE` where that fails."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=True, timeout=300)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return _BASE


def plan(config: RunConfig) -> MemoryPlan:
    """The peak memory of the step `distill` of this run, as a process of its own, and the disk of its cache.

    Reads the models' configs and, where the run folder holds them for these settings, the samples' lengths; else every
    sample counts as max_prompt_length + max_response_length tokens. Takes seconds, and no weights are read.

    Raises:
        UserError for a config that `srd-fast run` would refuse, or a model whose config cannot be read.
    """
    run = Run(config, Path(config.output_dir), {}, {})
    args = training_config(config, run.folder, run.device, run.dtype)
    check_cache(config, args)
    lengths = _read_lengths(config, args)
    made = _simulate(config, args, lengths)
    parts = {**made.parts, "process": _CUDA_BASE if run.device.type == "cuda" else _process_bytes()}
    parts["cache rows"] = 2 * made.batch.rows * made.row_bytes
    parts["allocator"] = int(_ALLOWANCE.get(run.device.type, 0.1) * sum(made.parts.values()))
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


_SMALLEST_BUDGET = 32 << 20
_BUDGETS = (512 << 20, 256 << 20, 128 << 20, 64 << 20, _SMALLEST_BUDGET)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**i for i, letter in enumerate("kmgt", 1) for end in ("b",)}
_UNITS |= {f"{letter}{end}": 1024**i for i, letter in enumerate("kmgt", 1) for end in ("", "ib")}


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "8G" (both 2**30), "8GB" (10**9), "8192MB", "123456". UserError for anything else.

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
    """What may change beside sizes, from what costs no speed to what changes the result."""
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
    """Plans of a config with other sizes, each made once."""

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
        """Whether the limit is enough."""
        return self.plan(changes).total <= self.limit

    def first(self, candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The first candidate that fits, where those after it need less and the last one fits."""
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(candidates[middle]) else (middle + 1, high)
        return candidates[low]


def fit(config: RunConfig, limit: int) -> MemoryPlan:
    """The plan of the config, changed where it does not fit in `limit` bytes; `overrides` says how.

    Changed first is what costs least speed: the loss's `memory_budget`; then the micro-batch, with as many more
    accumulation steps, so that training stays the same; then a cache instead of a live teacher, or its body on the
    host; then recomputed activations; last a top-k cache, whose divergence is a little below the full one.

    Raises:
        UserError that says the smallest need and its largest part, if nothing fits.
    """
    search = _Search(config, limit)
    if search.fits({}):
        return search.plan({})
    run = Run(config, Path(config.output_dir), {}, {})
    args = training_config(config, run.folder, run.device, run.dtype)
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    default = (1 << 30) if run.device.type == "cuda" else 512 << 20
    budgets: list[dict[str, Any]] = [{}]
    budgets += [{"distill.memory_budget": b} for b in _BUDGETS if b < (args.memory_budget or default)]
    sizes: list[dict[str, Any]] = [{}]
    for size in range(batch - 1, 0, -1):
        if batch * accumulation % size == 0:
            steps = {"distill.gradient_accumulation_steps": batch * accumulation // size}
            sizes.append({"distill.per_device_train_batch_size": size, **steps})
            if args.per_device_eval_batch_size > 2 * size:
                sizes[-1]["distill.per_device_eval_batch_size"] = 2 * size
    # A budget below a quarter of the usual one makes products slow, so it comes after smaller batches.
    good = [b for b in budgets if b.get("distill.memory_budget", default) >= default // 4] or [{}]
    for variant in _variants(config, args, run.device):
        if not search.fits({**variant, **sizes[-1], **budgets[-1]}):
            continue
        usual = [{**variant, **sizes[0], **b} for b in good]
        if search.fits(usual[-1]):
            return search.plan(search.first(usual))
        smaller = [{**variant, **s, **good[-1]} for s in sizes]
        if search.fits(smaller[-1]):
            size = sizes[smaller.index(search.first(smaller))]
            return search.plan(search.first([{**variant, **size, **b} for b in good]))
        return search.plan(search.first([{**variant, **sizes[-1], **b} for b in budgets]))
    least = min(search.made.values(), key=lambda p: p.total)
    raise UserError(
        f"nothing fits in {limit / 1e9:.2f} GB: the least is {least.total / 1e9:.2f} GB, of which {least.largest} takes "
        f"{least.parts[least.largest] / 1e9:.2f} GB (with {' '.join(least.overrides) or 'no overrides'})"
    )
