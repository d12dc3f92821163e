"""Sections of a run's config, converted to the objects of the libraries behind them."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from ...errors import Fault, Faults, FaultsError, UserError, first_line
from ...models import is_encoder_decoder, load_config
from ...selection import ALL
from ...suggest import unknown_name
from ...training.config import SRDConfig
from ...training.student import trainer_basics
from ..config import RunConfig
from ..modes import mode_fields, mode_of, privileged_template

# Keys of the config that are fields of SRDConfig.
OWN_KEYS = {"seed", "template", "max_prompt_length", "max_response_length", "chat_template_kwargs"}
OWN_KEYS |= {"parse_special_tokens", "train_on", "teacher_device_map", "privileged_template", "max_privileged_length"}
# Defaults of the section `distill` that differ from those of SRDConfig.
RUN_DEFAULTS: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 50,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 25,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
}


def training_config(
    config: RunConfig,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    processes: int = 1,
) -> SRDConfig:
    """The SRDConfig of a run: the run's own settings, overridden by those in `distill`.

    Args:
        config: the run's config.
        folder: the run folder. Default: the config's output_dir.
        device: the training device. The default is for reading settings that do not depend on it.
        dtype: the run's dtype; bfloat16 switches `bf16` on.
        processes: number of processes that train together. The batch of a step, from `distill`, is divided among them.

    Returns:
        The training arguments.

    Raises:
        FaultsError: keys of `distill`, or other keys of the config, are wrong.
        UserError: the batch cannot be divided.
    """
    basics = {**trainer_basics(torch.device(device), dtype), **RUN_DEFAULTS}
    given = {
        **basics,
        **mode_fields(mode_of(config), config.distill),
        "sample_selection": ALL,
    }  # the plan holds those samples alone
    if processes > 1:
        size, accumulation = given["per_device_train_batch_size"], given.get("gradient_accumulation_steps", 1)
        given |= share_of_batch(size, accumulation, processes)
        given = {"log_on_each_node": False, **({"ddp_backend": "gloo"} if given["use_cpu"] else {}), **given}
    try:
        return SRDConfig(
            **given,
            output_dir=str((folder or Path(config.output_dir)) / "checkpoints"),
            seed=config.seed,
            template=config.template,
            max_prompt_length=config.max_prompt_length,
            max_response_length=config.max_response_length,
            chat_template_kwargs=config.chat_template_kwargs or None,
            parse_special_tokens=config.parse_special_tokens,
            train_on=config.train_on,
            privileged_template=privileged_template(config),
            max_privileged_length=config.max_privileged_length,
            teacher_device_map=config.teacher_device_map,
        )
    except FaultsError as e:
        raise FaultsError([_of_config(fault) for fault in e.faults]) from e
    except Exception as e:  # transformers' own checks raise many kinds
        raise UserError(f"config: distill: {' '.join(str(e).split())[:500]}") from e


def _of_config(fault: Fault) -> Fault:
    names = tuple(name if name in OWN_KEYS else f"distill.{name}" for name in fault.names)
    return Fault(names, f"config: {'' if names and names[0] in OWN_KEYS else 'distill: '}{fault.text}")


def share_of_batch(size: int, steps: int, processes: int) -> dict[str, int]:
    """Divide the samples of an optimizer step among processes.

    Accumulation steps are divided first, so that a device's batch stays as it was given, if possible.

    Args:
        size: per_device_train_batch_size of one process.
        steps: its gradient_accumulation_steps.
        processes: how many there are.

    Returns:
        These two fields of SRDConfig for each of them.

    Raises:
        UserError: the samples cannot be divided.
    """
    shared = math.gcd(steps, processes)
    parts = processes // shared
    if size % parts:
        near = [n for n in (size // parts * parts, -(-size // parts) * parts) if n]
        raise UserError(
            f"config: distill.per_device_train_batch_size is {size} with gradient_accumulation_steps {steps}: the "
            f"{size * steps} samples of a step cannot be divided among {processes} processes; set it to "
            f"{' or '.join(map(str, near))}, or start another number of processes"
        )
    return {"per_device_train_batch_size": size // parts, "gradient_accumulation_steps": steps // shared}


def lora_config(config: RunConfig) -> Any:
    """A `peft.LoraConfig` from the section `lora`, or None for full training."""
    if config.lora is None:
        return None
    try:
        from peft import LoraConfig
    except ImportError as e:
        raise UserError(f"config: lora needs the peft package: pip install 'srd-fast[peft]' ({e})") from e
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    faults = Faults()
    for name in config.lora:
        if name not in known:
            faults.add((f"lora.{name}",), "config: " + unknown_name("key in lora", name, known, listed=False))
    faults.tell()
    try:
        task = "SEQ_2_SEQ_LM" if is_encoder_decoder(load_config(config.teacher)) else "CAUSAL_LM"
        return LoraConfig(**{"task_type": task, **config.lora})
    except (TypeError, ValueError) as e:
        raise UserError(f"config: lora: {first_line(e)}") from e
