"""Fields of `transformers.TrainingArguments` that have no meaning with a curriculum or its loss, and ranges of others.

transformers checks few of its numbers before it uses them, which may be hours later.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations import integration_utils
from transformers.utils.logging import get_log_levels_dict

from ..errors import Fault, Faults, UserError, first_line
from ..suggest import unknown_name


class Refused(NamedTuple):
    """A field that may have only some of its values here.

    Attributes:
        accepted: the values that it may have.
        reason: why it may have no other, and the way out.
    """

    accepted: tuple[Any, ...]
    reason: str


_ONE_SCHEDULE = (
    "the learning rate of a curriculum is a cosine from learning_rate to min_learning_rate; for a constant one set "
    "min_learning_rate to learning_rate, for any other give SRDTrainer optimizers=(optimizer, scheduler)"
)
_BY_BATCHES = "predictions are token numbers, which leave the device batch by batch and are measured once; leave it out"
_NO_WIDE_EVALUATION = "evaluation computes in the dtype of training; leave it out, or set bf16 or fp16"
REFUSED = {
    "num_train_epochs": Refused((1,), "each stage has passes of its own; set epochs_per_stage"),
    "lr_scheduler_type": Refused(("cosine",), _ONE_SCHEDULE),
    "lr_scheduler_kwargs": Refused((None, {}), _ONE_SCHEDULE),
    "train_sampling_strategy": Refused(
        ("random",), "the curriculum orders the samples; length_buckets sorts neighbouring batches by length"
    ),
    "length_column_name": Refused(("length",), "length_buckets counts the tokens itself; leave it out"),
    "label_smoothing_factor": Refused(
        (0,),
        "which the distillation loss does not have; set it to 0 (the teacher's probabilities are soft labels already)",
    ),
    "auto_find_batch_size": Refused(
        (False,), "another batch would change the curriculum's steps in mid-run; set it to false"
    ),
    "ignore_data_skip": Refused(
        (False,), "a step's samples follow from its number, so a resumed run skips in no time; set it to false"
    ),
    "dataloader_in_order": Refused((True,), "the curriculum's steps have an order; set it to true"),
    "label_names": Refused((None, ["labels"]), "the labels are made of the rows and called so; leave it out"),
    "use_cache": Refused((False,), "a step of training reads no keys and values of earlier ones; set it to false"),
    "bf16_full_eval": Refused((False,), _NO_WIDE_EVALUATION),
    "fp16_full_eval": Refused((False,), _NO_WIDE_EVALUATION),
    "eval_do_concat_batches": Refused((True,), _BY_BATCHES),
    "eval_use_gather_object": Refused((False,), _BY_BATCHES),
    "eval_accumulation_steps": Refused((None, 1), _BY_BATCHES),
    "batch_eval_metrics": Refused((False,), _BY_BATCHES),
}
# Lowest and highest value of fields that transformers does not check; None: no limit.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "max_steps": (-1, None),
    "warmup_steps": (0, None),
    "weight_decay": (0, None),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, None),
    "max_grad_norm": (0, None),
    "neftune_noise_alpha": (0, None),
    "logging_steps": (0, None),
    "eval_steps": (0, None),
    "eval_delay": (0, None),
    "save_steps": (0, None),
    "save_total_limit": (1, None),
    "torch_empty_cache_steps": (1, None),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, None),
    "dataloader_prefetch_factor": (1, None),
    "ddp_bucket_cap_mb": (1, None),
    "ddp_timeout": (1, None),
}
# Fields with a fixed set of values that are not numbers.
CHOICES: dict[str, tuple[Any, ...]] = {
    "temperature_scaling": (True, False, "official"),
    "torch_compile": (True, False, None),
    "torch_compile_mode": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "padding_free": (True, False, "auto"),
    "logits_dtype": (None, "float32"),
    "standardize_logits": (True, False),
    "head_in_shards": (True, False, "auto"),
    "seq_kd": (True, False),
    "eval_generate": (True, False),
    "log_level": (*get_log_levels_dict(), "passive"),
    "log_level_replica": (*get_log_levels_dict(), "passive"),
    "include_num_input_tokens_seen": (True, False, "all", "non_padding", "no"),
    "dataloader_multiprocessing_context": (None, "fork", "spawn", "forkserver"),
}
# Settings of accelerate that change which of a step's samples a process gets.
_OF_ACCELERATE = {
    "split_batches": ((False,), "every process takes a batch of its own; lower per_device_train_batch_size"),
    "dispatch_batches": ((False, None), "every process reads its samples itself; leave it out"),
    "even_batches": ((True,), "all processes have batches of one size; set it to true"),
}
_DIVIDES_A_SAMPLE = ("tp_size", "cp_size", "sp_size")


def check_fits(args: TrainingArguments, name: str) -> None:
    """Refuse a value that transformers accepts but that does nothing here, or breaks the curriculum.

    Args:
        args: the training's config.
        name: the field's name.

    Raises:
        UserError: the field has such a value.
    """
    value = getattr(args, name)
    value = getattr(value, "value", value)
    if value not in REFUSED[name].accepted:
        raise UserError(f"{name} is {value!r}, but {REFUSED[name].reason}")


def check_processes(args: TrainingArguments) -> None:
    """Refuse settings that would give a process other samples than the curriculum assumes.

    Args:
        args: the training's config, after `__post_init__`.

    Raises:
        UserError: there is such a setting. The message names it.
    """
    for name, (accepted, reason) in _OF_ACCELERATE.items():
        value = getattr(args.accelerator_config, name, accepted[0])
        if value not in accepted:
            raise UserError(f"accelerator_config: {name} is {value!r}, but {reason}")
    sizes = {name: getattr(args.parallelism_config, name, 1) for name in _DIVIDES_A_SAMPLE}
    for name, size in sizes.items():
        if size and size > 1:
            raise UserError(
                f"parallelism_config: {name} is {size}, but every process trains on samples of its own; leave it out, "
                "and put a large student in shards with fsdp or deepspeed"
            )


# Two errors of transformers that begin with the same characters, this many, count as the same error.
_OPENING = 60


def faults_of_transformers(args: TrainingArguments, error: Exception) -> Iterator[Fault]:
    """Find the fields that transformers refused: its errors name few of them, and stop at the first.

    Args:
        args: the config whose `__post_init__` failed.
        error: what it raised.

    Yields:
        Each error with the field whose default value makes it go away.
    """
    plain = TrainingArguments(output_dir="unused", use_cpu=args.use_cpu)
    known = [f.name for f in fields(TrainingArguments) if f.init and f.name not in ("output_dir", "use_cpu")]
    given = {"use_cpu": args.use_cpu, "output_dir": "unused"}
    given |= {name: value for name in known if (value := getattr(args, name)) != getattr(plain, name)}
    said: str | None = _whole(error)
    while said is not None:
        for name in [n for n in given if n not in ("use_cpu", "output_dir")]:
            without = _refusal({k: v for k, v in given.items() if k != name})
            # An error that only quotes another value is the same one.
            if without is None or without[:_OPENING] != said[:_OPENING]:
                value = given.pop(name)
                text = said if said.startswith(name) else f"{name} is {getattr(value, 'value', value)!r}: {said}"
                yield Fault((name,), " ".join(text.split())[:500])
                said = without
                break
        else:
            yield Fault((), " ".join(said.split())[:500])
            return


def _refusal(given: dict[str, Any]) -> str | None:
    try:
        TrainingArguments(**given)
    except Exception as e:  # of many kinds
        return _whole(e)
    return None


def _whole(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def check_packages(args: TrainingArguments, optimizer_given: bool = False) -> None:
    """Refuse settings whose packages are not installed, and an optimizer that cannot be made from its settings.

    Args:
        args: the training's config.
        optimizer_given: whether the user passes an optimizer, so that `optim` is not used.

    Raises:
        FaultsError: a package is missing, or an optimizer's settings are wrong.
    """
    faults = Faults()
    for names, look in PACKAGES.items():
        if not optimizer_given or "optim" not in names:
            faults.check(names, look, args)
    faults.tell()


def _check_installed(setting: str, module: str, package: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"{setting}, which needs the package {package}: pip install {package}, or leave it out")


def _check_liger(args: TrainingArguments) -> None:
    if args.use_liger_kernel:
        _check_installed("use_liger_kernel is true", "liger_kernel", "liger-kernel")


def _check_reports(args: TrainingArguments) -> None:
    faults = Faults()
    for name in args.report_to or ():
        faults.check((), _check_report, name)
    faults.tell()


def _check_report(name: Any) -> None:
    known = integration_utils.INTEGRATION_TO_CALLBACK
    if name not in known:
        raise UserError(unknown_name("report_to", name, ["none", "all", *known]))
    # The callback would raise an error too, but some callbacks also print tracebacks when they are deleted.
    for spelt in (name, name.removesuffix("_ml"), name.replace("_", "")):
        is_there = getattr(integration_utils, f"is_{spelt}_available", None)
        if is_there is not None and not is_there():
            package = name.replace("_", "-")
            raise UserError(f"report_to is {name!r}, which needs a package: pip install {package}, or set it to none")


def _check_optimizer(args: TrainingArguments) -> None:
    name = f"optim is {getattr(args.optim, 'value', args.optim)!r}"
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as e:
        raise UserError(f"{name}: {first_line(e)}") from e
    except ValueError as e:  # other errors are about the model, which does not exist yet
        if args.optim_args or any(word in str(e) for word in ("install", "import", "optim_target_modules")):
            raise UserError(f"{name}: {first_line(e)}") from e
        return
    plain = copy.copy(args)
    plain.optim_args = None
    if args.optim_args and settings == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
        raise UserError(f"optim_args is {args.optim_args!r}, none of which is for this optimizer: {name}; leave it out")
    if args.optim_target_modules:  # an optimizer that uses it would have asked for the model
        raise UserError(f"optim_target_modules is given, but {name}, which trains all weights alike; leave it out")
    if kind.__module__.startswith("torch.optim"):
        try:
            kind([torch.nn.Parameter(torch.zeros(1))], **settings)
        except (TypeError, ValueError, RuntimeError) as e:
            raise UserError(f"{name}, with optim_args {args.optim_args!r}: {first_line(e)}") from e


# Fields -> the function that checks their packages.
PACKAGES: dict[tuple[str, ...], Callable[[TrainingArguments], None]] = {
    ("optim", "optim_args", "optim_target_modules"): _check_optimizer,
    ("report_to",): _check_reports,
    ("use_liger_kernel",): _check_liger,
}
