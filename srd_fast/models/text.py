"""The text part of a model: the whole of a language model, one tower of a model that also sees or hears."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def text_config(config: Any) -> Any:
    """The configuration of the part that reads and writes text; `config` itself if there is no other part."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def text_tower(model: nn.Module) -> nn.Module:
    """The module that holds the layers of the text part.

    Args:
        model: a causal language model, or one with a vision or audio tower beside its text tower.

    Returns:
        The text tower; the whole body if there is no other tower.
    """
    whole: Any = model
    body, kind = whole.base_model, type(text_config(whole.config))
    if isinstance(whole.config, kind):
        return body
    towers = (m for m in body.modules() if isinstance(m, PreTrainedModel) and isinstance(m.config, kind))
    return next(towers, body)
