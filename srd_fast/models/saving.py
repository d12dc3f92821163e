"""Find out before training what would keep a student from being saved: configs, tokenizer, adapters, the hub."""

import copy
import errno
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..errors import UserError, first_line
from .heads import unwrap
from .loading import load_config, make_model, resolve_model

logger = logging.getLogger(__name__)

# Fields on which it depends whether transformers accepts the others.
_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")


def mend_generation_config(model: nn.Module, name: str) -> None:
    """Make a model's generation config one that transformers saves; a warning says what that changes.

    transformers loads any config, but refuses to save one whose fields contradict each other, such as a temperature
    without sampling.

    Args:
        model: a transformers model, or a PEFT model around one; others are not changed.
        name: "student" or "teacher", for the warning.
    """
    inner: Any = unwrap(model)
    own = getattr(inner, "generation_config", None)
    if own is None:
        return
    config = inner.config
    misplaced: dict[str, Any] = getattr(config, "_get_generation_parameters", dict)()
    for field, value in misplaced.items():
        if getattr(own, field, None) is None:
            setattr(own, field, value)
        delattr(config, field)
    mended, changes = _mended(own)
    inner.generation_config = mended
    if misplaced:
        changes = [f"{', '.join(misplaced)} moved there from the model's config", *changes]
    if changes:
        logger.warning("the %s's generation config could not be saved, so it is mended: %s", name, "; ".join(changes))


def _mended(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """The config itself if it can be saved; else one that keeps as much of it as possible, and the changes."""
    if _can_be_saved(config):
        return config, []
    values = {k: v for k, v in vars(config).items() if not k.startswith("_") and k != "transformers_version"}
    made, dropped = _rebuilt(config, values)
    # If do_sample is not set, fields that only sampling reads show that it is meant, except a temperature of 0.
    if values.get("do_sample") is None and values.get("temperature") != 0:
        sampling, of_sampling = _rebuilt(config, {**values, "do_sample": True})
        if len(of_sampling) < len(dropped):
            kept = ", ".join(f"{name}={values[name]}" for name in dropped if name not in of_sampling)
            return sampling, [f"do_sample=True, because of {kept}", *_without(values, of_sampling)]
    return made, _without(values, dropped)


def _without(values: dict[str, Any], names: list[str]) -> list[str]:
    return [f"without {', '.join(f'{name}={values[name]}' for name in names)}"] if names else []


def _rebuilt(config: GenerationConfig, values: dict[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """A config of those values, and the names of those that were left out, because they contradict earlier ones."""
    made, dropped = type(config)(), []
    for name in sorted(values, key=lambda n: n not in _MODES):
        before = getattr(made, name, None)
        setattr(made, name, values[name])
        if not _can_be_saved(made):
            setattr(made, name, before)
            dropped.append(name)
    return made, dropped


def _can_be_saved(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def try_saving(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> None:
    """Try to write a student's configs and tokenizer to a temporary folder, which is removed again.

    Args:
        model: the student, which may be a PEFT model or have no weights ("meta").
        tokenizer: saved with it.
        folder: where the temporary folder is made; the student will be saved there. Default: the system's place.

    Raises:
        UserError: something cannot be written, or the model is of a kind that cannot be saved.
    """
    inner: Any = unwrap(model)
    quantizer = getattr(inner, "hf_quantizer", None)
    what = "the model"
    try:
        if quantizer is not None and not getattr(model, "peft_config", None) and not quantizer.is_serializable():
            raise ValueError(f"it is quantised with {quantizer.quantization_config.quant_method}")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".trial-") as trial:
            if hasattr(inner, "config"):
                what = "its config"
                copy.deepcopy(inner.config).save_pretrained(trial)
            if getattr(inner, "generation_config", None) is not None:
                what = "its generation config"
                _mended(inner.generation_config)[0].save_pretrained(trial)
            for adapter in getattr(model, "peft_config", {}).values():
                what = "the config of its adapter"
                copy.deepcopy(adapter).save_pretrained(trial)
            what = "the tokenizer"
            tokenizer.save_pretrained(trial)
    except Exception as e:  # any error of libraries and disks
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # not the student's fault: with more disk space it would work
        place = "" if folder is None else f" in {str(folder)!r}"
        raise UserError(f"the student could not be saved{place} after training: {what}: {first_line(e)}") from e


@torch.no_grad()
def try_merging(model: nn.Module) -> None:
    """Merge a copy of one adapter layer of each kind into its weights, as saving a whole student does at the end.

    Args:
        model: a PEFT model, which may have no weights ("meta").

    Raises:
        UserError: its adapters cannot be merged.
    """
    adapters: dict[str, Any] = {
        n: m for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")
    }
    if not hasattr(model, "merge_and_unload") or not adapters:
        raise UserError(
            f"the student's adapters ({type(model).__name__}) cannot be merged into its weights, which saving it "
            "needs; use LoRA"
        )
    changed = Counter(id(getattr(m.base_layer, "weight", m)) for m in adapters.values())
    if changed.most_common(1)[0][1] > 1:
        raise UserError(
            f"the student's adapters cannot be merged into its weights, which saving it needs: layers of "
            f"{type(unwrap(model)).__name__} share weights, and each has an adapter of its own; leave those layers out "
            "of target_modules (exclude_modules), or train without lora"
        )
    for name, layer in {type(m): (n, m) for n, m in adapters.items()}.values():
        try:
            copy.deepcopy(layer).merge()
        except Exception as e:  # each kind of adapter has its own errors
            raise UserError(f"the student's adapter {name} cannot be merged into its weights: {first_line(e)}") from e


def try_hub(token: str | None, name: str = "push_to_hub") -> None:
    """Ask the model hub who is logged in, and whether they may write.

    Args:
        token: the hub's access token; None: the stored one.
        name: name of the setting that needs the hub, for the message.

    Raises:
        UserError: the hub cannot be reached, does not know the user, or allows them only to read.
    """
    way = f"log in with `hf auth login`, set HF_TOKEN, or leave {name} out"
    try:
        user = HfApi(token=token).whoami()
    except Exception as e:  # of the network, or the hub's own
        raise UserError(f"{name} is set, but the model hub does not answer for you ({first_line(e)}): {way}") from e
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"{name} is set, but your token of the model hub lets you only read: {way}")


def model_without_weights(source: str) -> nn.Module | None:
    """The model of a folder or hub id on the device "meta", with its generation config: no weights are read.

    Args:
        source: a folder or hub id.

    Returns:
        The model; None if that can be known only by loading it.

    Raises:
        UserError: its config or its generation config cannot be read.
    """
    path = resolve_model(source)
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        return None  # an adapter
    try:
        with torch.device("meta"):
            model: Any = make_model(load_config(source), torch.float32)
    except UserError:
        raise
    except Exception:  # the error from loading the model will be clearer
        return None
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:
        pass  # it has none; the one made from its config stays
    except ValueError as e:
        raise UserError(f"model {source!r}: its generation_config.json cannot be read: {first_line(e)}") from e
    return model
