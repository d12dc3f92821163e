"""`no_repeat_ngram_size` for vLLM, which lacks that option: the rule of transformers as a logits processor of vLLM."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class NoRepeatNgrams(AdapterLogitsProcessor):
    """Forbids every token that would complete an n-gram which prompt and generation already contain."""

    def is_argmax_invariant(self) -> bool:
        """False: greedy choices change."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[..., torch.Tensor] | None:
        """The processor for a request that asks for one in `extra_args`, else None."""
        size = (params.extra_args or {}).get("no_repeat_ngram_size")
        return _Forbid(size) if size else None


class _Forbid:
    """Remembers what followed each (n - 1)-gram so far, so that a step costs one look-up."""

    def __init__(self, size: int) -> None:
        self.size, self.done = size, 0
        self.after: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        ids = [*prompt_ids, *output_ids]
        for end in range(max(self.size, self.done + 1), len(ids) + 1):
            *before, token = ids[end - self.size : end]
            self.after.setdefault(tuple(before), []).append(token)
        self.done = len(ids)
        context = tuple(ids[len(ids) - self.size + 1 :]) if self.size > 1 else ()
        forbidden = self.after.get(context) if len(ids) + 1 >= self.size else None
        if forbidden:
            logits[torch.tensor(forbidden, device=logits.device)] = float("-inf")
        return logits
