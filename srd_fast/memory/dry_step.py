"""The distillation step of a run on fake tensors: student, optimizer and live teacher, made only from their configs.

The loss is represented by the buffers of its chunks.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import Trainer

from ..errors import UserError, first_line
from ..losses import Head
from ..models import (
    body_of,
    find_head,
    flattening,
    hidden_states,
    is_encoder_decoder,
    load_config,
    make_model,
    prune_depth,
    resolve_model,
    text_tower,
    unwrap,
    varlen,
)
from ..run.config import RunConfig
from ..run.modes import shares_weights
from ..run.steps import LIVE, PRUNE, Run
from ..run.steps.cache import cache_temperatures
from ..run.steps.settings import lora_config
from ..teacher.stores import HiddenStore, ProjectedStore, Store, make_store
from ..training.batching import casts_kept
from ..training.config import SRDConfig
from .batch import Batch
from .dry_loss import AllocatedLoss, LossSizes, loss_sizes
from .live_bytes import LiveBytes

# The models, without weights


def _make_model(source: str, dtype: torch.dtype, device: torch.device) -> Any:
    config = load_config(source)
    try:
        with device:
            model = make_model(config, dtype)
            if is_encoder_decoder(model) and _has_own_head(source):
                head: Any = model.get_output_embeddings()
                head.weight = nn.Parameter(torch.empty_like(head.weight))
            return model
    except ValueError as e:
        raise UserError(f"model {source!r} is not a language model: {first_line(e)}") from e


def _has_own_head(source: str) -> bool:
    """Whether a folder's files have a head beside T5's embeddings, which its configuration calls tied in any case."""
    names = {name for file in Path(resolve_model(source)).glob("*.safetensors") for name in _names_in(file)}
    return {"lm_head.weight", "shared.weight"} <= names


def _names_in(file: Path) -> list[str]:
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _make_student(config: RunConfig, device: torch.device, live: LiveBytes, args: SRDConfig) -> Any:
    with live.labelled("student weights"):
        source = config.teacher if config.student == PRUNE else config.student
        model = _make_model(source, torch.float32, device)
        if config.student == PRUNE:
            prune_depth(model, config.init_student.layers, config.init_student.encoder_layers)
    peft_config = lora_config(config)
    inner: Any = unwrap(model)
    if peft_config is not None:
        from peft import get_peft_model

        # Parameters that are fake cannot change place; they are where and what they shall be.
        stay = mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self)
        with live.labelled("adapters"), device, stay:
            model = get_peft_model(model, peft_config)
    if args.gradient_checkpointing:
        given: Any = args.gradient_checkpointing_kwargs or {}
        _recompute_layers(inner, given)
        if peft_config is not None:
            inner.enable_input_require_grads()
    gc.collect()
    return model.train()


def _recompute_layers(model: Any, given: Mapping[str, Any]) -> None:
    """Switch activation checkpointing on, as the Trainer does."""
    options = {"use_reentrant": False, **given, "preserve_rng_state": False}
    if not hasattr(model, "activation_checkpointing_enable"):  # before transformers 5.24
        return model.gradient_checkpointing_enable(options)
    which = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    model.activation_checkpointing_enable(options, **which)


def _make_teacher(config: RunConfig, run: Run, student: Any, offload: bool) -> tuple[Any, list[Tensor], Head]:
    """The teacher's body if it runs, its other tensors that stay in memory, and its head."""
    kind = config.cache.kind
    if shares_weights(config) and config.lora is not None:  # it shares all weights but the adapters
        return student, [], find_head(student).on("meta")
    dtype = torch.float32 if shares_weights(config) else run.dtype
    model = _make_model(config.teacher, dtype, torch.device("cpu") if offload else run.device)
    model.eval().requires_grad_(False)
    head = find_head(model)
    apart = head if offload or run.teacher_spread else Head(None)
    copied = {"hidden": head, "projected": find_head(student), LIVE: apart}.get(kind)
    held = [] if copied is None else [torch.empty_like(x, device=run.device) for x in copied.tensors().values()]
    # A head of which only the shape is used takes no memory.
    return (model if kind == LIVE and not run.teacher_spread else None), held, head.on("meta")


def _flattens(models: Sequence[Any], wanted: Any) -> bool:
    """Guess what `SRDTrainer` would find out by running the models. Switch their attention if batches are flattened."""
    inners: list[Any] = [unwrap(m) for m in models]
    if not wanted or any(flattening.unfit(m) is not None or flattening.mixes_elsewhere(m) for m in inners):
        return False
    for model in models:
        inner: Any = unwrap(model)
        if "flash" not in str(inner.config._attn_implementation):
            inner.set_attn_implementation(varlen.IMPLEMENTATION)
    return True


def _forward(model: Any, batch: Batch, device: torch.device, flattened: bool) -> Tensor:
    """Hidden states such as `srd_fast.models.hidden_states` would give."""
    if not flattened:
        names = ("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")
        padded: dict[str, Tensor] = {}
        for (of_ids, of_mask), longest in zip(names, map(max, zip(*batch.sequences))):
            ids = torch.zeros(len(batch.lengths), longest, dtype=torch.long, device=device)
            padded |= {of_ids: ids, of_mask: torch.ones_like(ids)}
        return hidden_states(model, padded)
    inner: Any = unwrap(model)
    lengths = list(batch.lengths)
    text = inner.config.get_text_config()
    if getattr(text, "sliding_window", None) is None:
        # Without windows only the sum of the lengths matters, and equal lengths need only one call of the kernel.
        lengths = [-(-sum(lengths) // len(lengths))] * len(lengths)
    total = sum(lengths)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    keywords: dict[str, Any] = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    keywords |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    if inner.config._attn_implementation == varlen.IMPLEMENTATION:
        keywords["sample_lengths"] = lengths
    ids = torch.zeros(1, total, dtype=torch.long, device=device)
    with varlen.flattened_forward():
        out = body_of(inner)(
            input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False, return_dict=True, **keywords
        )
    return out.last_hidden_state


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
    flattened: bool

    def autocast(self) -> Any:
        """Autocast as accelerate sets it up."""
        if not (self.args.bf16 or self.args.fp16):
            return nullcontext()
        return torch.autocast(self.run.device.type, torch.bfloat16 if self.args.bf16 else torch.float16)

    @contextmanager
    def at(self, moment: str, label: str) -> Iterator[None]:
        """Set the name of the moment, and the label of what is allocated in the block."""
        self.live.moment = moment
        with self.live.labelled(label, {"student weights": "cast weights", "adapters": "cast weights"}):
            yield

    def teacher_rows(self, batch: Batch) -> Tensor | None:
        """Hidden states of the live teacher."""
        if self.teacher is None:
            return None
        with torch.inference_mode(False), torch.no_grad(), self.at("teacher", "activations"):
            device = next(self.teacher.parameters()).device
            hidden_BLD = _forward(self.teacher, batch, device, self.flattened)
            return self.rows(hidden_BLD, batch)

    @staticmethod
    def rows(hidden_BLD: Tensor, batch: Batch) -> Tensor:
        """[N, D], selected as `rows_with_loss` does."""
        index = torch.zeros(batch.rows, dtype=torch.long, device=hidden_BLD.device)
        return hidden_BLD[:, :-1][index, index]

    def evaluate(self, batch: Batch, loss: LossSizes) -> None:
        """Do what `measure_batch` does."""
        teacher_ND = self.teacher_rows(batch)
        with torch.no_grad(), self.autocast(), self.at("evaluation", "activations"):
            hidden_ND = self.rows(_forward(self.student, batch, self.run.device, self.flattened), batch)
            with self.at("evaluation", "loss"):
                torch.empty(loss.working, dtype=torch.uint8, device=self.run.device)
        del teacher_ND, hidden_ND

    def train(self, batch: Batch, loss: LossSizes) -> None:
        """Do what `SRDTrainer.training_step` does for a micro-batch."""
        teacher_ND = self.teacher_rows(batch)
        with self.at("forward", "activations"):
            with self.autocast():
                hidden_BLD = _forward(self.student, batch, self.run.device, self.flattened)
                hidden_ND = self.rows(hidden_BLD, batch)
            head = find_head(self.student)
            with self.at("loss", "loss"):
                value = AllocatedLoss.apply(hidden_ND, head.weight, head.bias, loss.working)
        with self.at("backward", "backward"):
            value.backward()
        del teacher_ND, hidden_BLD, hidden_ND

    def optimise(self, optimizer: Any) -> None:
        """Do the optimizer's step. Its state is labelled as such from then on."""
        with self.at("optimizer", "optimizer"):
            optimizer.step()


def _optimizer(args: SRDConfig, model: Any) -> Any:
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, RuntimeError, ValueError) as e:
        raise UserError(f"config: distill.optim: {first_line(e)}") from e
    return kind([p for p in model.parameters() if p.requires_grad], **options)


@dataclass(frozen=True)
class Simulated:
    """The result of a simulated step.

    parts, moment: bytes by part at the peak, and when the peak is. row_bytes, head_bytes: bytes of a row and of the
    head in the cache on disk.
    """

    parts: dict[str, int]
    moment: str
    batch: Batch
    flattened: bool
    host: int
    row_bytes: int
    head_bytes: int


def _reached(student: Any) -> set[int]:
    """Ids of the parameters that can get a gradient from text, which those of other towers cannot."""
    inner: Any = unwrap(student)
    tower = text_tower(inner)
    parts = [inner] if tower is inner.base_model else [tower, inner.get_output_embeddings()]
    return {id(p) for part in parts for p in part.parameters()}


def _store(config: RunConfig, args: SRDConfig, student: Any, classes: int) -> Store:
    kind, temperatures = config.cache.kind, tuple(sorted(set(cache_temperatures(config, args))))
    if kind == "projected":
        return ProjectedStore(find_head(student), "", temperatures)
    return make_store(kind, classes, config.cache.k, temperatures, log_sum_exp=config.cache.log_sum_exp)


def simulate(config: RunConfig, args: SRDConfig, largest: Callable[[bool, bool], Batch]) -> Simulated:
    """Find the peak of evaluation and of a training step in the steady state: optimizer state exists, gradients do not.

    Args:
        config: the run's config.
        args: the training's config.
        largest: (training?, are batches flattened?) -> the largest micro-batch.

    Returns:
        The peak and its parts.
    """
    run = Run(config, Path(config.output_dir), {}, {})
    device, live = run.device, LiveBytes()
    offload = args.teacher_offload and device.type != "cpu" and config.cache.kind == LIVE
    with live:
        student = _make_student(config, device, live, args)
        with live.labelled("host" if offload else "teacher"):
            teacher, held, head_T = _make_teacher(config, run, student, offload)
            gc.collect()
        for x in held:
            live.relabel(x, "teacher")
        host = live.live.pop("host", 0)
        assert head_T.weight is not None
        teacher_classes = head_T.weight.shape[0]
        flattened = _flattens([student, *([teacher] if teacher is not None else [])], args.padding_free)
        batch, evaluation = largest(True, flattened), largest(False, flattened)
        # Fake masks are never whole unless no batch needs padding.
        live.masks_are_whole = len(set(batch.sequences)) == 1
        evaluates = args.eval_strategy != "no"
        loss = loss_sizes(config, args, run, student, head_T, batch.rows, True)
        of_evaluation = loss_sizes(config, args, run, student, head_T, evaluation.rows, False)
        step = _Step(config, args, run, live, student, teacher, flattened)
        with live.labelled("loss"):
            kept = max(loss.kept, of_evaluation.kept if evaluates else 0)
            workspace = torch.empty(kept, dtype=torch.uint8, device=device)
        reached = _reached(student)
        trained = [p for p in student.parameters() if p.requires_grad and id(p) in reached]
        for p in trained:
            p.register_post_accumulate_grad_hook(lambda p: live.relabel(p.grad, "gradients"))
        with step.at("optimizer", "gradients"):
            for p in trained:
                p.grad = torch.empty_like(p)
        with step.at("optimizer", "optimizer"):
            optimizer = _optimizer(args, student)
        step.optimise(optimizer)
        optimizer.zero_grad()
        if evaluates:
            student.eval()
            step.evaluate(evaluation, of_evaluation)
            student.train()
        divided = args.max_tokens_per_batch > 0
        with casts_kept() if divided else nullcontext():
            for _ in range(2 if divided or args.gradient_accumulation_steps > 1 else 1):
                step.train(batch, loss)
        step.optimise(optimizer)
        row_bytes = head_bytes = 0
        if config.cache.kind != LIVE:
            common = min(teacher_classes, find_head(student).num_classes(workspace))
            store = _store(config, args, student, common)
            beside = store.bytes_beside(head_T) if isinstance(store, HiddenStore) else 0
            row_bytes = store.bytes_per_row(head_T, run.dtype) + beside
            if config.cache.kind == "hidden":
                head_bytes = sum(x.numel() * x.element_size() for x in head_T.tensors().values())
    return Simulated(live.peak, live.peak_moment, batch, flattened, host, row_bytes, head_bytes)
