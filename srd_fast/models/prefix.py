"""Run tokens that many samples begin with, such as the first lines of a prompt template, through a model only once."""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from .encoder_decoder import is_encoder_decoder
from .heads import body_of, hidden_states, unwrap
from .placement import entry_device

logger = logging.getLogger(__name__)

# Fewer common tokens or rows than this are not worth a cache.
LEAST_TOKENS = 8
LEAST_ROWS = 16
# Most levels of branches: prompts of which each is the beginning of the next would make thousands.
_DEEPEST = 32
# The name of `past_key_values` in transformers 5.24 and later. Models from elsewhere may have the old name.
_NEW = "cache"
# Largest difference of hidden states that rounding can explain, relative to the largest of them.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    low, high = min(rows, default=[]), max(rows, default=[])
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high))]


def shared_starts(rows: Sequence[Sequence[int]], least_rows: int = LEAST_ROWS) -> list[tuple[list[int], list[int]]]:
    """Group rows that begin with the same tokens, so that running each beginning once saves the most tokens.

    A group has at least `least_rows` rows and a beginning of at least LEAST_TOKENS tokens. The last group has all rows
    that share too little, and an empty beginning. Within a group, rows keep their order.

    Args:
        rows: token ids.
        least_rows: the fewest rows of a group.

    Returns:
        The tokens of each beginning, and the indices of its rows.
    """

    def divide(members: list[int], depth: int = 0) -> tuple[int, list[tuple[list[int], list[int]]]]:
        """The number of tokens saved, and the groups."""
        if len(members) < least_rows or depth > _DEEPEST:
            return 0, []
        start = common_prefix([list(rows[i]) for i in members])
        spared = (len(members) - 1) * len(start) if len(start) >= LEAST_TOKENS else 0
        longer: dict[int, list[int]] = {}
        for i in members:
            if len(rows[i]) > len(start):
                longer.setdefault(rows[i][len(start)], []).append(i)
        parts = [divide(part, depth + 1) for part in longer.values()]
        if sum(n for n, _ in parts) > spared:
            return sum(n for n, _ in parts), [group for _, groups in parts for group in groups]
        return spared, [(start, members)] if spared else []

    groups = divide(list(range(len(rows))))[1]
    grouped = {i for _, members in groups for i in members}
    return [*groups, ([], [i for i in range(len(rows)) if i not in grouped])]


class SharedPrefix:
    """A causal language model after a fixed beginning, whose keys and values are kept.

    Args:
        model: its mode does not change, and its weights must not change while this is used.
        ids: the tokens of the beginning.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, ids: Sequence[int]) -> None:
        inner: Any = unwrap(model)
        self.model, self.length = inner, len(ids)
        device = entry_device(model)
        out = body_of(inner)(torch.tensor([list(ids)], device=device), use_cache=True, return_dict=True)
        self._cache = getattr(out, _NEW, None) or out.past_key_values

    @torch.no_grad()
    def hidden_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, L, D] after the final norm, for a padded batch of the tokens that follow the beginning."""
        mask = batch["attention_mask"]
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(mask))
        body = body_of(self.model)
        out = body(
            input_ids=batch["input_ids"],
            attention_mask=torch.cat((mask.new_ones(len(mask), self.length), mask), 1),
            use_cache=True,
            return_dict=True,
            **{_NEW if _NEW in inspect.signature(body.forward).parameters else "past_key_values": cache},
        )
        return out.last_hidden_state


@torch.no_grad()
def share_prefix(model: nn.Module, ids: Sequence[int], batch: Mapping[str, Tensor]) -> SharedPrefix | None:
    """Keep a shared beginning, if it is long enough and the model gives the same results with it.

    Args:
        model: a causal language model.
        ids: the tokens of the beginning.
        batch: a padded batch of whole samples that all begin with `ids`, on which the two ways are compared.

    Returns:
        The beginning, or None. An encoder never has one: its states of a prompt's first tokens depend on the last.
    """
    if len(ids) < LEAST_TOKENS or is_encoder_decoder(model):
        return None
    n = len(ids)
    try:
        shared = SharedPrefix(model, ids)
        rest = {name: batch[name][:, n:] for name in ("input_ids", "attention_mask")}
        found, expected = shared.hidden_states(rest), hidden_states(model, batch)[:, n:]
    # If a cache cannot be copied, repeated or passed on, each model fails in its own way; all mean the same.
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, NotImplementedError) as e:
        logger.info("%s runs whole samples, because its cache cannot be shared: %s", type(model).__name__, e)
        return None
    there = rest["attention_mask"].bool()
    found, expected = found[there].float(), expected[there].float()
    difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    dtype = shared.model.get_input_embeddings().weight.dtype
    if not difference <= _TOLERANCE.get(dtype, 5e-2):
        logger.info(
            "%s runs whole samples: with a shared beginning it differs by %.1e", type(model).__name__, difference
        )
        return None
    return shared
