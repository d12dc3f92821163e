"""Cross-entropy and entropy of each token under a model's head, without a loss to train on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import RowCoefficients, RowValues
from .chunked import PackedRows, Visitor, run_or_halve
from .head import Head
from .packing import autocast_dtype


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

    The products run in the head's dtype, or autocast's.

    Args:
        hidden_ND: [N, D] last hidden states of the rows to score.
        labels_N: [N] class indices.
        counts: rows of each sample; then every chunk has whole samples.
        visit: with counts, called with the samples and the rows of each chunk, its logits before the softcap, which are
            gone afterwards, and its values; should memory run out, again from the first chunk on, then smaller ones.
        logits_dtype: as in `distillation_loss`.

    Returns:
        cross_entropy and entropy, [N] in nats at temperature 1; divergence is 0.
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
    """Cross-entropy of `token_values`, [N] in nats."""
    return token_values(hidden_ND, head, labels_N, memory_budget).cross_entropy
