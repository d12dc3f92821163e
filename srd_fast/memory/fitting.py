"""What to change in a run's config so that its distillation fits in a memory limit."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..losses.buffers import budget_of
from ..models import is_encoder_decoder, load_config
from ..run.config import RunConfig
from ..run.steps import LIVE, Run
from ..training.config import SRDConfig
from .batches import read_lengths, train_batches
from .planner import MemoryPlan, plan

_EVALUATION = "distill.per_device_eval_batch_size"
_MICRO_BATCH = "distill.max_tokens_per_batch"
_ROUND = 32  # proposals are rounded up to a multiple of so many tokens
_SMALLEST_BUDGET = 32 << 20
_BUDGETS = (2 << 30, 1 << 30, 512 << 20, 256 << 20, 128 << 20, 64 << 20, _SMALLEST_BUDGET)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}{end}": 1000**i for i, letter in enumerate("kmgt", 1) for end in ("b",)}
_UNITS |= {f"{letter}{end}": 1024**i for i, letter in enumerate("kmgt", 1) for end in ("", "ib")}


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "8G" (both 2**30), "8GB" (10**9), "8192MB" or "123456".

    Raises:
        UserError: for any other text.

    >>> parse_bytes("1.5GiB"), parse_bytes("8192 MB")
    (1610612736, 8192000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or float(found[1]) <= 0:
        raise UserError(f"limit must be a size above 0 such as 8GiB, 8GB or 8192MB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """The config with keys such as `distill.skew` set."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    updates: dict[str, Any] = {}
    for section, values in sections.items():
        old = getattr(config, section)
        updates[section] = {**old, **values} if isinstance(old, dict) else old.model_copy(update=values)
    return config.model_copy(update=updates)


def _variants(config: RunConfig, args: SRDConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """Changes other than sizes, from those that cost no speed to those that change the result."""
    teachers: list[dict[str, Any]] = [{}]
    if config.cache.kind == LIVE:
        teachers.append({"cache.kind": "hidden"})
        spread = config.teacher_device_map is not None
        if device.type != "cpu" and not args.teacher_offload and not spread:
            teachers.append({"distill.teacher_offload": True})
    yield from teachers
    recompute = {} if args.gradient_checkpointing else {"distill.gradient_checkpointing": True}
    if recompute:
        yield from ({**teacher, **recompute} for teacher in teachers)
    if config.cache.kind in (LIVE, "hidden"):
        without = {"cache.log_sum_exp": False} if config.cache.log_sum_exp else {}
        yield {"cache.kind": "topk", **without, **recompute}


class _Search:
    """Makes plans of a config with different sizes, each only once."""

    def __init__(self, config: RunConfig, limit: int) -> None:
        self.config, self.limit = config, limit
        self.made: dict[str, MemoryPlan] = {}

    def plan(self, changes: dict[str, Any]) -> MemoryPlan:
        """The plan, with the changes as its overrides."""
        key = json.dumps(changes, sort_keys=True)
        if key not in self.made:
            listed = tuple(f"{name}={json.dumps(value)}" for name, value in changes.items())
            self.made[key] = replace(
                plan(_changed(self.config, changes)), overrides=tuple(x.replace('"', "") for x in listed)
            )
        return self.made[key]

    def fits(self, changes: dict[str, Any]) -> bool:
        """Whether the run fits in the limit with these changes."""
        return self.plan(changes).total <= self.limit

    def first(self, candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The first candidate that fits. Later candidates need less memory, and the last one fits."""
        low, high = 0, len(candidates) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.fits(candidates[middle]) else (middle + 1, high)
        return candidates[low]


def _longest(config: RunConfig, args: SRDConfig) -> int:
    """Tokens of the longest sample, which a micro-batch must be able to hold."""
    two = is_encoder_decoder(load_config(config.teacher))
    batches = train_batches(read_lengths(config, args), config, args.per_device_train_batch_size, two)
    return max(n for batch in batches for n, _ in batch) + two


def _smaller(whole: MemoryPlan, args: SRDConfig, longest: int) -> list[dict[str, Any]]:
    """Changes to smaller and smaller micro-batches, starting with no change."""
    sizes: list[dict[str, Any]] = [{}]
    tokens = whole.batch.tokens(whole.flattened)
    for parts in range(2, tokens + 1):
        most = max(longest, -(-tokens // parts // _ROUND) * _ROUND)
        if most < sizes[-1].get(_MICRO_BATCH, tokens):
            sizes.append({_MICRO_BATCH: most})
            evaluated = max(1, 2 * args.per_device_train_batch_size // parts)
            if args.per_device_eval_batch_size > evaluated:
                sizes[-1][_EVALUATION] = evaluated
        if most == longest:
            break
    return sizes


def fit(config: RunConfig, limit: int) -> MemoryPlan:
    """Predict the peak memory of a config, and change the config if it does not fit in `limit` bytes.

    Changes that cost the least speed come first: the loss's `memory_budget`; then `max_tokens_per_batch`, which divides
    a step's samples without changing its result; then a cache instead of a live teacher, or the teacher's body on the
    host; then recomputed activations; last a top-k cache, whose divergence is a little below the full one.

    Args:
        config: the run's config.
        limit: bytes.

    Returns:
        The plan that fits. `overrides` says what was changed.

    Raises:
        UserError: nothing fits. The message says the smallest need and its largest part.
    """
    search = _Search(config, limit)
    if search.fits({}):
        return search.plan({})
    run = Run(config, Path(config.output_dir), {}, {})
    args = run.args
    default = budget_of(run.device, None)
    budgets: list[dict[str, Any]] = [{}]
    most = args.memory_budget or default
    budgets += [{"distill.memory_budget": n} for n in _BUDGETS if n < most]
    sizes = _smaller(search.plan({}), args, _longest(config, args))
    # A budget below a quarter of the default makes products slow, so smaller batches are tried before it.
    good = [b for b in budgets if b.get("distill.memory_budget", default) >= default // 4]
    for variant in _variants(config, args, run.device):
        if not search.fits({**variant, **sizes[-1], **budgets[-1]}):
            continue
        usual = [{**variant, **sizes[0], **b} for b in good]
        if search.fits(usual[-1]):
            return search.plan(search.first(usual))
        smaller = [{**variant, **s, **good[-1]} for s in sizes]
        if search.fits(smaller[-1]):
            chosen = sizes[smaller.index(search.first(smaller))]
            found = search.first([{**variant, **chosen, **b} for b in good])
        else:
            found = search.first([{**variant, **sizes[-1], **b} for b in budgets])
        spared = {name: value for name, value in found.items() if name != _EVALUATION}
        return search.plan(spared if search.fits(spared) else found)
    least = min(search.made.values(), key=lambda p: p.total)
    raise UserError(
        f"nothing fits in {limit / 1e9:.2f} GB: the least is {least.total / 1e9:.2f} GB, of which {least.largest} "
        f"takes {least.parts[least.largest] / 1e9:.2f} GB (with {' '.join(least.overrides) or 'no overrides'})"
    )
