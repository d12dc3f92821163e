"""Cross-entropy and entropy of each token under a model's head, without a loss to train on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import RowCoefficients, RowValues
from .chunked import run_or_halve
from .head import Head
from .packed import PackedRows
from .packing import autocast_dtype
from .row_order import Visitor


@torch.no_grad()
def token_values(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    memory_budget: int | None = None,
    counts: Sequence[int] | None = None,
    visit: Visitor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> RowValues:
    """Cross-entropy and entropy of each row under a model's head, without a [N, V] tensor and without gradient.

    Matrix products run in the head's dtype, or autocast's where that is on.

    Args:
        hidden_ND: [N, D] last hidden states of the rows to score.
        head: turns them into logits.
        labels_N: [N] int64 class indices.
        memory_budget: bytes that it may allocate. Default: that of `distillation_loss`.
        counts: number of rows of each sample, N in all. No sample is then divided between chunks.
        visit: with `counts`, called after each chunk with the chunk's samples, its rows, its logits before the softcap
            (the next chunk overwrites them) and its values. If memory runs out, the chunks are halved and `visit` is
            called again from the first one on.
        logits_dtype: dtype of the logits: None for that of the matrix products, or torch.float32.

    Returns:
        cross_entropy and entropy, each [N] in nats at temperature 1; divergence is 0.
    """
    coefficients = RowCoefficients(1.0, 0.0, 1.0)
    dtype = autocast_dtype(hidden_ND)
    rows = PackedRows(
        None, None, labels_N, None, None, coefficients,
        gemm_dtype=dtype, logits_dtype=logits_dtype, memory_budget=memory_budget,
    )  # fmt: skip
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return run_or_halve(hidden_ND, head, rows, None, counts=counts, visit=visit)[0]


def token_cross_entropy(hidden_ND: Tensor, head: Head, labels_N: Tensor, memory_budget: int | None = None) -> Tensor:
    """Cross-entropy of each row under a model's head, [N] in nats: `token_values` without the rest."""
    return token_values(hidden_ND, head, labels_N, memory_budget).cross_entropy
