"""How many positions a model has, and rows that are longer."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from ..errors import UserError
from .encoder_decoder import is_encoder_decoder
from .loading import load_config

logger = logging.getLogger(__name__)

# Models that compute further positions when they need them.
_GROWING = {"xglm", "m2m_100", "nllb-moe", "pegasus_x"}
STACKS = ("encoder", "decoder")


def max_positions(model: object, stack: str | None = None) -> tuple[int | None, bool]:
    """Positions of a causal language model, or of a stack of an encoder-decoder model.

    Args:
        model: the model, its configuration, or its folder or hub id.
        stack: "encoder" or "decoder"; None for a causal language model.

    Returns:
        How many tokens it has positions for, None if that is unknown or unlimited; and whether it fails on longer rows,
        as models with a table of positions do. Models with rotary embeddings run on, although untrained for it.
    """
    config = _config(model)
    if config is None or is_encoder_decoder(config) != (stack is not None):
        return None, False
    text: Any = config.get_text_config() if stack is None else getattr(config, stack, config)
    names = (f"max_{stack}_position_embeddings", "max_position_embeddings", "max_seq_len")
    count = next((n for n in (getattr(text, name, None) for name in names) if n), None)
    if not isinstance(count, int) or count < 1 or text.model_type in _GROWING:
        return None, False
    return count, not (getattr(text, "rope_parameters", None) or getattr(text, "rope_theta", None))


def _config(model: object) -> PretrainedConfig | None:
    if isinstance(model, str):
        try:
            return load_config(model)
        except UserError:  # an adapter has none; loading the model will say what else is wrong
            return None
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    return config if isinstance(config, PretrainedConfig) else None


def check_positions(
    counts: Sequence[int],
    prompts: Sequence[int],
    ids: Sequence[str],
    models: Mapping[str, object],
    way_out: str,
    new_tokens: int = 0,
) -> None:
    """Refuse rows that need more positions than a model has, before anything runs.

    Args:
        counts: number of tokens of each row.
        prompts: number of tokens of each row's prompt.
        ids: ids of the rows.
        models: what `max_positions` takes, by the name that messages use. Other objects, such as a cache, are skipped.
        way_out: what the user can do.
        new_tokens: how many tokens are generated after each prompt; the last one needs no position.

    Raises:
        UserError: a model would fail on such rows. If it only was not trained for them, a warning is logged instead.
    """
    needed = [max(n, prompt + new_tokens - 1) for n, prompt in zip(counts, prompts)]
    of_decoder = [1 + n - prompt for n, prompt in zip(needed, prompts)]
    demands: list[tuple[str | None, Sequence[int]]] = [(None, needed), *zip(STACKS, (prompts, of_decoder))]
    for name, model in models.items():
        for stack, tokens in demands:
            most, fails = max_positions(model, stack)
            longer = [i for i, n in enumerate(tokens) if most is not None and n > most]
            if not longer:
                continue
            longest = max(longer, key=tokens.__getitem__)
            whose = name if stack is None else f"{name}'s {stack}"
            message = (
                f"{len(longer)} of {len(needed)} rows do not fit the {most} positions of the {whose}; the longest, "
                f"{ids[longest]!r}, needs {tokens[longest]}: {way_out}"
            )
            if fails:
                raise UserError(message)
            logger.warning("%s. The model was not trained for more", message)
