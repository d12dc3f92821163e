"""Mistakes that can be found before any work is done: names, settings, missing files, tokenizers."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data import check_made, check_source, data_function_of
from ...errors import UserError, first_line
from ...models import (
    check_same_kind,
    check_tokenizers,
    is_encoder_decoder,
    load_config,
    load_tokenizer,
    model_without_weights,
    quantisation_of,
    try_hub,
    try_merging,
    try_saving,
    with_adapters,
)
from ...reflection import get_difficulties
from ...reflection.engines import ENGINES, check_engine_options
from ...selection import SAMPLE_POLICIES
from ...training.measure import check_best_metric
from ...training.preparation import check_optimizer
from ..config import RunConfig
from ..group import Group
from ..modes import check_mode
from .cache import check_cache
from .data import VALIDATION, tokenisation_of
from .run import PRUNE, QUICKSTART
from .selection import sample_policy
from .settings import lora_config, share_of_batch, training_config


def check_inputs(config: RunConfig) -> None:
    """Check a config before its run.

    Raises:
        UserError: for the first mistake found.
    """
    _check_device(config.device)
    args = training_config(config)
    check_optimizer(args)
    check_mode(config, args)
    args.of_stages(config.curate.stages)
    lora_config(config)
    SAMPLE_POLICIES.check(sample_policy(config)[0])
    check_cache(config, args)
    ENGINES.check(config.reflect.engine)
    check_engine_options(config.reflect.engine_options)
    if config.curate.reflect_again and config.curate.method != "srd":
        raise UserError(
            f"config: curate.reflect_again ranks by reflection, but curate.method is {config.curate.method!r}"
        )
    if config.curate.reflect_again and args.save_strategy == "no":
        raise UserError(
            "config: curate.reflect_again goes on from a checkpoint at the border of each stage, and "
            "distill.save_strategy is 'no'; set it to 'steps'"
        )
    made = get_difficulties(config.reflect.signals)
    extra = set(get_difficulties(config.curate.signals or ())) - set(made)
    if extra:
        raise UserError(f"curate.signals names {sorted(extra)}, which reflect.signals does not make")
    if config.data_function is not None:
        data_function_of(config.data_function)
    if not isinstance(config.validation, int):
        _must_exist(config, VALIDATION, config.validation, VALIDATION)
    if config.data != QUICKSTART:
        _must_exist(config, "data", config.data, config.data_split)
    kind = quantisation_of(config.teacher) if config.student == PRUNE else quantisation_of(config.student)
    if kind is not None:
        which = "teacher, out of which the student is cut," if config.student == PRUNE else "student"
        raise UserError(f"config: the {which} is quantised ({kind}); it needs full weights")
    tokenizer = load_tokenizer(config.teacher)
    if config.student != PRUNE:
        tokenizer, teachers = load_tokenizer(config.student), tokenizer
        check_tokenizers(tokenizer, teachers, args.shared_vocabulary)
        check_same_kind(load_config(config.student), load_config(config.teacher))
    elif config.init_student.encoder_layers is not None and not is_encoder_decoder(load_config(config.teacher)):
        raise UserError("config: init_student.encoder_layers is given, but the teacher has no encoder; leave it out")
    tokenisation_of(config, tokenizer)
    check_best_metric(args.metric_for_best_model)
    if args.push_to_hub:
        try_hub(args.hub_token, "distill.push_to_hub")
    _try_the_end(config, tokenizer)


def check_group(config: RunConfig, group: Group, shard: str | None = None) -> None:
    """Check whether the processes of a group can do a run together.

    Raises:
        UserError: for the first reason why not.
    """
    if group.world == 1:
        return
    if shard is not None:
        raise UserError(
            f"--shard {shard} is for machines that do not know of each other, and {group.world} processes were started "
            "together: leave it out, they share the samples"
        )
    device = torch.device("cpu" if config.device == "auto" else config.device)
    if device.index is not None:
        raise UserError(
            f"config: device is {config.device!r}, and each of {group.world} processes needs one of its own: leave it "
            f"out, or set it to {device.type!r}"
        )
    if config.teacher_device_map is not None:
        raise UserError(
            f"config: teacher_device_map is {config.teacher_device_map!r}, and each of {group.world} processes would "
            "spread a teacher of its own over all devices: set it to null, or start one process"
        )
    args = training_config(config)
    share_of_batch(args.per_device_train_batch_size, args.gradient_accumulation_steps, group.world)


def _try_the_end(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save and merge, as at the end of the run, a student without weights."""
    student = model_without_weights(config.teacher if config.student == PRUNE else config.student)
    adapters = lora_config(config)
    if student is None:
        return
    if adapters is not None:
        try:
            student = with_adapters(student, adapters)
        except ValueError as e:
            raise UserError(f"config: lora: {first_line(e)}") from e
        try_merging(student)
    try_saving(student, tokenizer)


def _check_device(name: str) -> None:
    if name == "auto":
        return
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"config: device: {name!r} cannot be used: {first_line(e)}") from e


def _must_exist(config: RunConfig, key: str, source: Any, split: str) -> None:
    try:
        if config.data_function is None:
            check_source(source, split)
        else:
            check_made(source, config.data_function, key, split)
    except UserError as e:
        raise UserError(f"config: {key}: {e}") from e
