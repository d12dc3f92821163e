"""Mistakes that can be found before any work is done: names, settings, missing files, tokenizers."""

import errno
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from ...curriculum import RANKED, SHUFFLED, check_band, per_stage
from ...data import check_made, check_source, data_function_of
from ...errors import Fault, Faults, FaultsError, UserError, first_line
from ...files import disk_trouble
from ...models import (
    check_same_kind,
    check_tokenizers,
    is_encoder_decoder,
    load_config,
    load_tokenizer,
    model_without_weights,
    prune_depth,
    quantisation_of,
    try_hub,
    try_merging,
    try_saving,
    with_adapters,
)
from ...reflection import get_difficulties, get_difficulty
from ...reflection.attempts import check_attempts
from ...reflection.engines import ENGINES, check_engine_options
from ...reflection.signals import column_of
from ...selection import SAMPLE_POLICIES
from ...suggest import unknown_name
from ...training.answer_metrics import ROUGE_L, get_metrics
from ...training.arguments import PACKAGES
from ...training.config import SRDConfig
from ...training.measure import check_best_metric
from ...workers.vllm import INSTALL
from ..config import RunConfig
from ..group import Group
from ..modes import check_mode, check_signals, mode_of
from .cache import check_cache
from .controls import check_controls
from .data import VALIDATION, tokenisation_of
from .run import PRUNE, QUICKSTART
from .selection import sample_policy
from .settings import OWN_KEYS, lora_config, share_of_batch, training_config

R = TypeVar("R")
Checks = Sequence[Callable[[RunConfig], None]]


def check_inputs(config: RunConfig, faults: Faults | None = None, also: Checks = ()) -> None:
    """Check a config before its run.

    Args:
        config: the run's config, without the keys that are known to be wrong.
        faults: the faults found so far. Everything that does not depend on a wrong key is checked and reported too.
        also: further checks, for a config without faults.

    Raises:
        FaultsError: something is wrong. The error has all of it.
    """
    faults = Faults() if faults is None else faults
    faults.check("output_dir", _try_folder, Path(config.output_dir))
    faults.check("device", _check_device, config.device)
    args = _training_args(config, faults)
    stages = config.curate.stages
    for name in ("epochs_per_stage", "temperature", "sft_weight", "stage_learning_rates"):
        faults.check((f"distill.{name}", "curate.stages"), _check_stages, name, config.distill.get(name), stages)
    faults.check(("distill.sample_selection", "preset"), lambda: SAMPLE_POLICIES.check(sample_policy(config)[0]))
    if args is not None:
        check_mode(config, args, faults)
        check_cache(config, args, faults)
        for names, needs in PACKAGES.items():
            faults.check((f"distill.{name}" for name in names), _of_distill, needs, args)
        metric = ("distill.metric_for_best_model", "distill.eval_metrics")
        faults.check((*metric, "mode"), _of_distill, _check_best, args, mode_of(config).teacher)
        if args.push_to_hub:
            faults.check("distill.push_to_hub", try_hub, args.hub_token, "distill.push_to_hub")
    _check_reflection(config, faults)
    faults.check("curate", _check_reflect_again, config)
    saving = ["save_strategy", "save_only_model", "save_total_limit"]
    saving += ["early_stopping_patience", "metric_for_best_model"]
    at_borders = ("curate", "answers_again", *(f"distill.{name}" for name in saving))
    faults.check(at_borders, _check_checkpoints, config, args)
    faults.check(("controls", "curate.method"), check_controls, config)
    faults.check("evaluate.metrics", _of_config, "evaluate.metrics", get_metrics, (ROUGE_L, *config.evaluate.metrics))
    if config.data_function is not None:
        faults.check("data_function", data_function_of, config.data_function)
    if not isinstance(config.validation, int):
        faults.check(("validation", "data_function"), _must_exist, config, VALIDATION, config.validation, VALIDATION)
    if config.data != QUICKSTART:
        keys = ("data", "data_split", "data_function")
        faults.check(keys, _must_exist, config, "data", config.data, config.data_split)
    _check_models(config, faults)
    if not faults.found:
        for look in also:
            faults.check((), look, config)
    faults.tell()


def _training_args(config: RunConfig, faults: Faults) -> SRDConfig | None:
    """The training arguments; of a config with faults in them, what is left without these keys."""
    try:
        return training_config(config)
    except FaultsError as e:
        faults.take(e)
        faults.doubt(name for fault in e.faults for name in fault.names)
        if any(not fault.names for fault in e.faults):
            return None
    doubted = {name.partition(".")[2] for name in faults.wrong if name.startswith("distill.")}
    rest = {name: value for name, value in config.distill.items() if name not in doubted}
    own = {name: field.default for name, field in RunConfig.model_fields.items() if name in OWN_KEYS & {*faults.wrong}}
    try:
        return training_config(config.model_copy(update={"distill": rest, **own}))
    except UserError:
        return None  # of fields that go together: they are told


def _of_config(key: str, look: Callable[..., R], *given: Any) -> R:
    try:
        return look(*given)
    except UserError as e:
        raise UserError(f"config: {key}: {e}") from e


def _of_distill(look: Callable[..., Any], *given: Any) -> None:
    try:
        look(*given)
    except FaultsError as e:
        raise FaultsError([Fault(fault.names, f"config: distill: {fault.text}") for fault in e.faults]) from e
    except UserError as e:
        raise UserError(f"config: distill: {e}") from e


def _check_best(args: SRDConfig, teacher: bool) -> None:
    of_answers = get_metrics(args.answer_metrics) if args.eval_generate else None
    check_best_metric(args.metric_for_best_model, of_answers=of_answers, teacher=teacher)


def _check_stages(name: str, value: Any, stages: int) -> None:
    if isinstance(value, list):
        _of_distill(per_stage, name, value, 0.0, 0.0, stages)


def _check_reflection(config: RunConfig, faults: Faults) -> None:
    reflect, engine = config.reflect, config.reflect.engine
    faults.check("reflect.engine", ENGINES.check, engine)
    faults.check("reflect.engine", _check_engine, engine)
    faults.check("reflect.engine_options", check_engine_options, reflect.engine_options)
    made: dict[str, Any] = {}
    for name in reflect.signals:
        found = faults.check((), get_difficulties, [*made.values(), name])
        if found is None:
            faults.doubt(["reflect.signals"])
        else:
            made[next(reversed(found))] = name
    asked = ("reflect.attempts", "reflect.temperature", "reflect.signals", "reflect.judge")
    faults.check(asked, _check_attempts, config, made)
    curate = config.curate
    weighed = [] if curate.weight_by is None else [curate.weight_by]
    for key, names in (("signals", curate.signals or ()), ("band", curate.band), ("weight_by", weighed)):
        for name in names:
            faults.check(("reflect.signals", f"curate.{key}"), _check_made, name, made, key)
    for name, given in curate.band.items():
        faults.check("curate.band", _of_config, "curate.band", check_band, name, given)
    faults.check(("reflect.signals", "curate.order"), _check_order, curate.order, made)
    faults.check(("reflect.signals", "mode", "curate.method"), check_signals, config)


def _check_attempts(config: RunConfig, made: Mapping[str, Any]) -> None:
    c = config.reflect
    try:
        check_attempts(c.attempts, c.temperature, made, get_difficulty(c.judge))
    except UserError as e:
        raise UserError(f"config: reflect: {e}") from e


def _check_made(name: str, made: Mapping[str, Any], key: str) -> None:
    if column_of(name) not in made:
        raise UserError(
            f"config: curate.{key} names {name!r}, which reflect.signals does not make: it makes {', '.join(made)}"
        )


def _check_order(order: str, made: Mapping[str, Any]) -> None:
    if order not in (RANKED, SHUFFLED, *made):
        known = [RANKED, SHUFFLED, *made]
        raise UserError("config: curate.order: " + unknown_name("order", order, known) + ", or a signal of reflect's")


def _check_engine(name: str) -> None:
    install = {"vllm": INSTALL, "ray": "pip install 'srd-fast[ray]'"}.get(name)
    if install is not None and find_spec(name) is None:
        raise UserError(
            f"config: reflect.engine is {name!r}, which needs the package {name}: {install}; or set it to auto"
        )


def _check_reflect_again(config: RunConfig) -> None:
    if config.curate.reflect_again and config.curate.method != "srd":
        raise UserError(
            f"config: curate.reflect_again ranks by reflection, but curate.method is {config.curate.method!r}"
        )


def _check_checkpoints(config: RunConfig, args: SRDConfig | None) -> None:
    asked = "curate.reflect_again" if config.curate.reflect_again else "answers_again"
    if not (config.curate.reflect_again or config.answers_again) or args is None:
        return
    said = f"config: {asked} goes on from a checkpoint at the border of each stage, and"
    if args.save_strategy == "no":
        raise UserError(f"{said} distill.save_strategy is 'no'; set it to 'steps'")
    if args.save_only_model:
        raise UserError(f"{said} distill.save_only_model is true, which leaves out its optimizer; set it to false")
    if args.early_stopping_patience:
        raise UserError(
            f"{said} distill.early_stopping_patience is {args.early_stopping_patience}, which may end training before "
            "one; set it to 0"
        )
    if args.metric_for_best_model is not None and args.save_total_limit == 1:
        raise UserError(f"{said} distill.save_total_limit is 1, which would keep only the best one; set it to 2")


def _check_models(config: RunConfig, faults: Faults) -> None:
    """Check teacher and student without their weights, and try to save the student as at the end of the run."""
    teachers = faults.check("teacher", _of_config, "teacher", load_tokenizer, config.teacher)
    faults.check(("teacher", "student"), _check_weights, config)
    tokenizer = teachers
    if config.student != PRUNE:
        tokenizer = faults.check("student", _of_config, "student", load_tokenizer, config.student)
        pair = ("teacher", "student", "distill.shared_vocabulary")
        if tokenizer is not None and teachers is not None:
            shared = config.distill.get("shared_vocabulary", False)
            faults.check(pair, _of_config, "student", check_tokenizers, tokenizer, teachers, shared)
            faults.check(pair, lambda: check_same_kind(load_config(config.student), load_config(config.teacher)))
    else:
        faults.check("init_student.encoder_layers", _check_encoder_layers, config, teachers)
    faults.check(("teacher", "lora"), lora_config, config)
    if tokenizer is not None:
        lengths = ("max_prompt_length", "max_response_length", "max_privileged_length")
        speech = ("template", "chat_template_kwargs", "train_on", "privileged_template", *lengths)
        faults.check(speech, tokenisation_of, config, tokenizer)
        faults.check(("teacher", "student", "lora", "init_student"), _try_the_end, config, tokenizer)


def _check_weights(config: RunConfig) -> None:
    kind = quantisation_of(config.teacher) if config.student == PRUNE else quantisation_of(config.student)
    if kind is not None:
        which = "teacher, out of which the student is cut," if config.student == PRUNE else "student"
        raise UserError(f"config: the {which} is quantised ({kind}); it needs full weights")


def _check_encoder_layers(config: RunConfig, teachers: Any) -> None:
    if teachers is None:
        return  # it cannot be read
    if config.init_student.encoder_layers is not None and not is_encoder_decoder(load_config(config.teacher)):
        raise UserError("config: init_student.encoder_layers is given, but the teacher has no encoder; leave it out")


def _try_folder(folder: Path) -> None:
    """Try to write in a run's folder, or in the nearest existing folder above it."""
    there = next((x for x in (folder, *folder.absolute().parents) if x.exists()), Path("/"))
    if not there.is_dir():
        raise UserError(f"config: output_dir: {str(folder)!r} cannot be made: {str(there)!r} is a file")
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as e:
        if disk_trouble(e, there) is not None and e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"config: output_dir: {str(folder)!r} cannot be written: {first_line(e)}") from e


def check_group(config: RunConfig, group: Group, shard: str | None = None) -> None:
    """Check that the processes of a group can do a run together.

    Raises:
        UserError: they cannot. The message has the first reason.
    """
    if group.world == 1:
        return
    if shard is not None:
        raise UserError(
            f"--shard {shard} is for machines that work separately, and {group.world} processes were started "
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


def student_without_weights(config: RunConfig) -> Any:
    """The student that a run trains, on the device "meta"; None if that can be known only by loading it.

    Args:
        config: the run's config.

    Raises:
        UserError: the teacher cannot be pruned to `init_student`'s layers, or a model's config cannot be read.
    """
    if config.student != PRUNE:
        return model_without_weights(config.student)
    student: Any = model_without_weights(config.teacher)
    layers = config.init_student
    if student is not None:
        try:
            prune_depth(student, layers.layers, layers.encoder_layers)
        except UserError as e:
            raise UserError(f"config: init_student: {e}") from e
    return student


def _try_the_end(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Try to merge and save a student without weights, as at the end of the run."""
    student = student_without_weights(config)
    adapters = lora_config(config)
    if student is None:
        return
    if adapters is not None:
        try:
            student = with_adapters(student, adapters)
        except Exception as e:  # of many kinds
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
