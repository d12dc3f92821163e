"""Adapters of the peft package: put into a model, read from a folder, merged into the weights they change."""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from ..errors import UserError, first_line
from .encoder_decoder import with_decoder
from .flattening import TOLERANCE, row_error
from .heads import unwrap

logger = logging.getLogger(__name__)

_WEIGHTS = "adapter_model.safetensors"
# Fields of a LoraConfig that may have any value in a plain LoRA: see `why_not_plain_lora`.
_PLAIN = {"r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"}
_PLAIN |= {"layers_pattern", "init_lora_weights", "task_type", "inference_mode", "base_model_name_or_path", "revision"}
_PLAIN |= {"auto_mapping", "peft_type", "peft_version"}


def _peft(wanted_by: str) -> Any:
    try:
        import peft
    except ImportError as e:
        raise UserError(f"{wanted_by} needs the peft package: pip install 'srd-fast[peft]' ({e})") from e
    return peft


def with_adapters(model: nn.Module, peft_config: Any, seed: int = 0) -> nn.Module:
    """Make a PEFT model. torch's own random numbers stay as they are.

    Args:
        model: a causal language model.
        peft_config: a configuration of the peft package, for adapters in the layers.
        seed: seed of the adapters' first weights.

    Returns:
        The model with adapters.

    Raises:
        UserError: peft is not installed, or the configuration is for trained prompts or does not fit the model.
    """
    peft = _peft("peft_config")
    _refuse_prompts(peft_config, "peft_config is")
    try:
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return peft.get_peft_model(model, peft_config)
    except (ValueError, TypeError, KeyError, NotImplementedError) as e:
        raise UserError(f"peft_config does not fit {type(model).__name__}: {first_line(e)}") from e


def untie_adapted_embeddings(model: nn.Module) -> None:
    """Untie input embeddings from the head if they are trained separately from it, by an adapter or as a whole.

    Training does not change. Without this, peft's own `merge_and_unload` would change the head with the embeddings.

    Args:
        model: a PEFT model; any other model stays as it is.
    """
    if hasattr(model, "merge_and_unload") and _untie_if_adapted(unwrap(model)):
        _set_tied(unwrap(model), False)


def why_not_plain_lora(model: nn.Module) -> str | None:
    """Say why the adapter of a PEFT model is not plain LoRA: products A B of one rank and scale, beside body layers.

    Engines that read adapters from files understand only plain LoRA, and some silently ignore everything else.

    Args:
        model: a PEFT model.

    Returns:
        The reason in a few words; None for plain LoRA.
    """
    peft = _peft("the student's adapter")
    configs: Any = model.peft_config
    config, *others = configs.values()
    if others or type(config) is not peft.LoraConfig:
        return "it is not one of LoRA alone"
    usual = peft.LoraConfig()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _PLAIN and value != getattr(usual, field.name):
            return f"its {field.name} is {value!r}"
    if config.init_lora_weights not in (True, False, "gaussian"):  # others are kinds of their own
        return f"its init_lora_weights is {config.init_lora_weights!r}"
    inner: Any = unwrap(model)
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and type(module) is not peft.tuners.lora.Linear:
            return f"{name} has a {type(module).__name__}"
    return "it is around the head" if hasattr(inner.get_output_embeddings(), "base_layer") else None


def save_base(model: nn.Module, folder: Path) -> None:
    """Save the base model of a PEFT model with plain LoRA (see `why_not_plain_lora`).

    Args:
        model: the PEFT model.
        folder: where the base weights go, which adapters do not change.
    """
    inner: Any = unwrap(model)
    state = {n.replace(".base_layer.", "."): x for n, x in inner.state_dict().items() if ".lora_" not in n}
    inner.save_pretrained(folder, state_dict=state)


def save_adapter(model: nn.Module, folder: Path, base: Path) -> None:
    """Save only the adapter of a PEFT model. Its config names the folder of the base model.

    Args:
        model: the PEFT model.
        folder: where the adapter goes.
        base: the folder in which `save_base` saved the base model.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
    described = folder / "adapter_config.json"
    config = json.loads(described.read_text(encoding="utf-8"))
    described.write_text(json.dumps({**config, "base_model_name_or_path": str(base)}), encoding="utf-8")


def refuse_trained_prompts(model: object, name: str) -> None:
    """Refuse a PEFT model whose adapter is a trained prompt or prefix: its hidden states are not those of its body.

    Args:
        model: any object; only PEFT models are checked.
        name: "student" or "teacher", for the message.

    Raises:
        UserError: the adapter is a trained prompt or prefix.
    """
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        _refuse_prompts(config, f"the {name} is a PEFT model with")


def _refuse_prompts(config: Any, begin: str) -> None:
    if getattr(config, "is_prompt_learning", False):
        raise UserError(
            f"{begin} {type(config).__name__}: trained prompts add positions that the other model does not have; use "
            "adapters in the layers, such as LoraConfig"
        )


def adapter_base(path: str) -> str | None:
    """The model that an adapter belongs to.

    Args:
        path: a folder or hub id.

    Returns:
        The folder or hub id in the adapter's configuration; None if `path` holds no adapter.

    Raises:
        UserError: the adapter's configuration cannot be read, names no model, or is for trained prompts.
    """
    if Path(path).is_dir() and not Path(path, "adapter_config.json").is_file():
        return None
    try:
        if find_adapter_config_file(path) is None:
            return None
    except (OSError, ValueError):  # perhaps no model either; loading it will say so
        return None
    peft = _peft(f"the adapter {path!r}")
    try:
        config = peft.PeftConfig.from_pretrained(path)
    except Exception as e:  # a damaged file may raise anything in the library
        raise UserError(f"adapter {path!r} has no configuration that can be read: {first_line(e)}") from e
    _refuse_prompts(config, f"adapter {path!r} is of")
    if not config.base_model_name_or_path:
        raise UserError(f"adapter {path!r} does not name its model: set base_model_name_or_path in adapter_config.json")
    return str(config.base_model_name_or_path)


def load_merged(base: PreTrainedModel, path: str) -> PreTrainedModel:
    """Load the adapter of a folder or hub id into its base model, and merge it.

    Args:
        base: the adapter's model, which changes.
        path: the adapter's folder or hub id.

    Returns:
        `base` with the adapter merged.

    Raises:
        UserError: the adapter does not fit the model, is not stored in safetensors, or cannot be merged.
    """
    peft = _peft(f"the adapter {path!r}")
    local = Path(path)
    if local.is_dir() and not (local / _WEIGHTS).is_file():
        raise UserError(
            f"adapter {path!r} has no weights in safetensors ({_WEIGHTS}), and pickled ones (.bin) are not read, "
            "because they can run code; save it again with save_pretrained"
        )
    try:
        model = peft.PeftModel.from_pretrained(base, path, use_safetensors=True)
    except Exception as e:  # damaged files raise errors of many libraries
        raise UserError(f"adapter {path!r} cannot be put into its model {base.name_or_path!r}: {first_line(e)}") from e
    if local.is_dir():
        _check_keys(peft.get_peft_model_state_dict(model), local / _WEIGHTS)
    merged = merge_adapters(model).requires_grad_(True)
    kind = next(iter(model.peft_config.values()))
    logger.info("merged the adapter %s (%s) into %s", path, type(kind).__name__, base.name_or_path)
    return merged


def _check_keys(wanted: dict[str, Tensor], file: Path) -> None:
    with safe_open(file, "pt") as weights:
        differing = wanted.keys() ^ set(weights.keys())
    if differing:
        raise UserError(f"adapter {str(file.parent)!r} does not fit its configuration: {_some(differing)}")


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def merge_adapters(model: nn.Module) -> PreTrainedModel:
    """Merge a PEFT model's adapters into the weights they change, and compare its logits before and after.

    Input embeddings that were tied to the head but trained separately from it, by an adapter or as `modules_to_save`,
    are untied, in the model and in its configuration.

    Args:
        model: a PEFT model, which is used up; any other model passes unchanged.

    Returns:
        The model inside, without adapters.

    Raises:
        UserError: the adapters cannot be merged, or the merged model gives other logits.
    """
    if not hasattr(model, "merge_and_unload"):
        return model  # type: ignore[return-value]
    inner: Any = unwrap(model)
    before = probe_logits(model)
    tied = _untie_if_adapted(inner)
    try:
        merged = model.merge_and_unload()  # type: ignore[operator]
    except Exception as e:  # each kind of adapter has its own refusals
        raise UserError(f"the adapters of {type(inner).__name__} cannot be merged: {first_line(e)}") from e
    if tied:
        head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
        same = torch.equal(head.weight, embedding.weight)
        if same:
            head.weight = embedding.weight
        _set_tied(merged, same)
    difference = row_error(probe_logits(merged).flatten(0, -2), before.flatten(0, -2))
    if not difference <= TOLERANCE.get(before.dtype, (0.1, 0.4))[0]:
        raise UserError(
            f"{type(inner).__name__} with its adapters merged gives other logits than with them beside its weights, by "
            f"{difference:.1e}: its adapters cannot be merged"
        )
    return merged


def _plain(module: Any) -> nn.Module:
    """The model's own layer inside peft's wrapper."""
    for name in ("original_module", "base_layer"):
        if isinstance(getattr(module, name, None), nn.Module):
            return _plain(getattr(module, name))
    return module


def _untie_if_adapted(inner: Any) -> bool:
    """Give a tied head a weight of its own if peft wraps it or the embeddings. Returns whether it did."""
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    plain, source = _plain(head), _plain(embedding)
    if (plain is head and source is embedding) or plain.weight is not source.weight:
        return False
    weight: Any = plain.weight
    plain.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return True


def _set_tied(model: Any, tied: bool) -> None:
    """Set in the configuration whether embeddings and head are tied; peft may have changed it either way."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    if hasattr(model, "get_expanded_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not tied:
        logger.info("its input embeddings are no longer tied to its head, as they were trained apart")


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    """[2, 6, V]: a model's own logits of a few tokens, in eval mode."""
    inner: Any = unwrap(model)
    device = next(inner.parameters()).device
    ids = (torch.arange(1, 13, device=device) * 7919 % inner.get_input_embeddings().weight.shape[0]).view(2, 6)
    batch = with_decoder(inner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        return inner(**batch, use_cache=False).logits
    finally:
        for module, training in modes:
            module.training = training
