"""Prepare the models for the first step: batches without padding, shared beginnings, compiled layers."""

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from datasets import Dataset, concatenate_datasets
from torch import nn

from ..curriculum import Curriculum
from ..data import template_key
from ..errors import UserError
from ..models import (
    check_same_kind,
    classes_of,
    compile_layers,
    enable_flattening,
    hidden_states,
    load_config,
    load_model,
    router_loss,
    text_tower,
    unfit_for_shared_prefix,
    unwrap,
    with_decoder,
)
from ..teacher import (
    CacheBesideTeacher,
    LiveTeacher,
    NoTeacher,
    OwnTeacher,
    RowsOfSamples,
    StepCollator,
    TeacherCache,
    TeacherElsewhere,
    TeacherSource,
    VLLMTeacher,
    at_work,
    open_teacher_cache,
)
from .config import SRDConfig
from .pair import Teacher, is_self

logger = logging.getLogger(__name__)

# An H100 saved 40 to 100 ms a step (Qwen2.5 1.5B to 0.5B, batches of 8 and 16) and took half a minute to compile.
_COMPILE_FROM_STEPS = 1000


@dataclass(frozen=True)
class Layout:
    """How samples are put into a batch.

    Args:
        flattened: whether samples follow each other in one row, without padding.
        share_prefix: whether tokens with which several samples begin are in the batch only once.
    """

    flattened: bool = False
    share_prefix: bool = False


def teacher_source(
    teacher: Teacher,
    student: nn.Module,
    args: SRDConfig,
    curriculum: Curriculum,
    train: Dataset,
    evaluation: Dataset | None,
) -> TeacherSource:
    """Open the source of the teacher's rows. A cache is first filled with the rows of the curriculum and evaluation.

    Args:
        teacher: a model, its folder or hub id, a source of rows, "self", or None to read an existing cache, or to train
            without a teacher.
        student: the student, for caches that project the teacher's rows, and for "self".
        args: the training's config.
        curriculum: the schedule of `train`.
        train: tokenised samples, as the teacher sees them.
        evaluation: tokenised samples, as the teacher sees them, or None.

    Returns:
        The source.

    Raises:
        UserError: the teacher is not of the student's kind, or the cache cannot be used.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    if is_self(teacher):
        return OwnTeacher(student, args.device, dtype, args.self_ema_decay)
    if isinstance(teacher, (str, nn.Module, TeacherCache, TeacherElsewhere)):
        check_same_kind(student, load_config(teacher) if isinstance(teacher, str) else teacher)
    if teacher is None and args.teacher_cache is None:
        return NoTeacher(classes_of(student, "student"))
    given, cache = teacher, None
    if args.teacher_cache is not None:
        kept = sorted({i for stage in curriculum.stages for i in stage.samples.tolist()})
        wanted = [train.select(kept)]
        wanted += [] if evaluation is None else [evaluation]
        teacher = cache = open_teacher_cache(
            args.teacher_cache,
            cast("nn.Module | VLLMTeacher | str | None", given),
            concatenate_datasets(wanted),
            kind=args.teacher_cache_kind,
            k=args.teacher_cache_k,
            temperatures=[1.0, *(stage.temperature for stage in curriculum.stages)],
            student=student,
            template=template_key(args.template, args.chat_template_kwargs),
            dtype=dtype,
            device=args.device,
            progress=not args.disable_tqdm and args.process_index == 0,
            device_map=args.teacher_device_map,
            tp_plan=args.teacher_tp_plan,  # type: ignore[arg-type]
            group=dist.group.WORLD if dist.is_available() and dist.is_initialized() and args.world_size > 1 else None,
        )
    if cache is not None and args.answers_anew:
        alone = copy.copy(args)
        alone.teacher_cache = None
        live = teacher_source(given, student, alone, curriculum, train, evaluation)
        return CacheBesideTeacher(cache.for_student(student).to(args.device), live)
    if isinstance(teacher, str):
        place = "cpu" if args.teacher_offload else args.device
        spread: Any = {"device_map": args.teacher_device_map, "tp_plan": args.teacher_tp_plan}
        teacher = load_model(teacher, dtype, place, quantised=True, **spread)
    if isinstance(teacher, nn.Module):
        return LiveTeacher(teacher, args.device, offload=args.teacher_offload)
    if isinstance(teacher, TeacherCache):
        teacher = teacher.for_student(student)
    assert teacher is not None  # with no teacher there is a cache
    return teacher.to(args.device) if isinstance(teacher, RowsOfSamples) else teacher


def freeze_what_text_never_reaches(student: nn.Module) -> None:
    """Freeze weights that a step on text does not use, such as those of a vision tower.

    Without this, processes that train together would wait for these gradients. Only weights outside of the text part
    are considered, so nothing happens to a plain language model.

    Args:
        student: the model that is trained.
    """
    inner: Any = unwrap(student)
    used = {id(p) for part in (text_tower(inner), inner.get_output_embeddings()) for p in part.parameters()}
    beside = {n: p for n, p in student.named_parameters() if p.requires_grad and id(p) not in used}
    if not beside:
        return
    ids = torch.zeros(1, 2, dtype=torch.long, device=next(iter(beside.values())).device)
    with torch.enable_grad():
        batch = with_decoder(inner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        states = hidden_states(student, batch)
        found = torch.autograd.grad(states.float().sum(), list(beside.values()), allow_unused=True)
    never = [name for name, gradient in zip(beside, found) if gradient is None]
    for name in never:
        beside[name].requires_grad_(False)
    if never:
        logger.info("%d weights that text never reaches are not trained, such as %s", len(never), never[0])


def layout_of(
    collate: Callable[..., Any], sample: Mapping[str, Any], student: nn.Module, teacher: TeacherSource
) -> Layout:
    """Find out how a user's own collator puts samples into a batch, and prepare the models' attention for it.

    Args:
        collate: the collator.
        sample: a tokenised sample to try it on.
        student: the model that is trained.
        teacher: any source; only a live one has a model.

    Returns:
        The layout.

    Raises:
        UserError: batches have no padding, and a model needs it.
    """
    if "cu_seq_lens" not in StepCollator(collate, None)([{name: sample[name] for name in ("input_ids", "labels")}]):
        return Layout()
    for name, model in _running(student, teacher).items():
        if (reason := enable_flattening(model)) is not None:
            raise UserError(
                f"data_collator {type(collate).__name__} makes batches without padding, but the {name} "
                f"{type(model).__name__} cannot go without: {reason}"
            )
    return Layout(flattened=True)


def batch_layout(student: nn.Module, teacher: TeacherSource, args: SRDConfig) -> Layout:
    """Decide how samples are put into a batch, and prepare the attention of models that need no padding.

    Args:
        student: the model that is trained.
        teacher: any source; only a live one has a model.
        args: the training's config.

    Returns:
        The best layout that every model of a step can take.

    Raises:
        UserError: padding_free is true, but a model needs padding.
    """
    if not args.padding_free:
        return Layout()
    known = isinstance(teacher, (LiveTeacher, RowsOfSamples, NoTeacher))  # a user's own source may need padded batches
    if not known and args.padding_free == "auto":
        return Layout()
    running = _running(student, teacher)
    for name, model in running.items():
        reason = enable_flattening(model)
        if reason is not None and args.padding_free is True:
            raise UserError(f"padding_free is true but the {name} {type(model).__name__} cannot: {reason}")
        if reason is not None:
            logger.warning("batches are padded, because the %s cannot go without: %s", name, reason)
            return Layout()
    noise_of_its_own = args.neftune_noise_alpha is not None
    # The tokens of a shared beginning would count only once in a router's balancing loss.
    apart = noise_of_its_own or router_loss(student) is not None
    shares = known and not apart and all(unfit_for_shared_prefix(m) is None for m in running.values())
    return Layout(flattened=True, share_prefix=shares)


def _running(student: nn.Module, teacher: TeacherSource) -> dict[str, Any]:
    """The models that run in a step, by name."""
    live = at_work(teacher)
    return {"student": student, **({"teacher": live.model} if isinstance(live, LiveTeacher) else {})}


def compiles(args: SRDConfig, total_steps: int) -> bool:
    """The value of `torch_compile`; if unset, whether the run is on a GPU and long enough to repay compilation."""
    if args.torch_compile is not None:
        return bool(args.torch_compile)
    steps = args.max_steps if args.max_steps > 0 else total_steps
    return args.device.type == "cuda" and steps >= _COMPILE_FROM_STEPS


def compile_models(
    student: nn.Module,
    teacher: TeacherSource,
    args: SRDConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
    flattened: bool,
) -> None:
    """Compile the layers of every model that runs in a step. A warning says which are not compiled, and why.

    Args:
        student: the student, in the dtype of training.
        teacher: any source; only a live one has a model.
        args: the training's config.
        autocast: makes the autocast context in which the student runs.
        flattened: whether batches are flattened.
    """
    options: dict[str, Any] = {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode}
    reasons: dict[str, str | None] = {"student": "its balancing loss looks at the routers inside of them"}
    if router_loss(student) is None:
        reasons["student"] = compile_layers(student, autocast, flattened=flattened, **options)
    if isinstance(teacher, LiveTeacher):
        reasons["teacher"] = teacher.compile(flattened=flattened, **options)
    for name, reason in reasons.items():
        if reason is not None:
            logger.warning("layers of the %s are not compiled: %s", name, reason)
