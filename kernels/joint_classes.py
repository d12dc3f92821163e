"""Rows whose classes are divided over several `ClassBlocks`: what each found, joined into what one would have found.

Shape letters: N rows, M maxima, S sums, K classes that a row's teacher is known at.

After `read`: the largest of all parts' `maxima_of`, then the sum of all parts' `sums_of`, which `take_sums` writes
back. After `weigh` and `write`, D and sum(w) are plain sums. How the parts reach each other is the caller's business.
"""

import math

import torch
from torch import Tensor

from .class_blocks import ClassBlocks


def maxima_of(loss: ClassBlocks, has_first: bool) -> Tensor:
    """What a part knows the largest of, once it has read its classes.

    Args:
        loss: the part.
        has_first: whether class 0 of the whole vocabulary is its first. One-read divergences measure from that class.

    Returns:
        [M, N]. -inf for what another part knows.
    """
    known = [loss.state[name] for name in dict.fromkeys(loss.read_sums.values())]
    if loss.crosses:
        origins = loss.state["origin_S"], loss.state["origin_T"]
        known += [x if has_first else torch.full_like(x, -math.inf) for x in origins]
    return torch.stack(known)


def sums_of(loss: ClassBlocks, maxima_MN: Tensor) -> Tensor:
    """Give a part the maxima of all parts.

    Args:
        loss: the part.
        maxima_MN: [M, N] the largest of what `maxima_of` gives.

    Returns:
        [S, N] the part's sums, relative to these, to be added to those of the others.
    """
    state = loss.state
    maxima = dict(zip(dict.fromkeys(loss.read_sums.values()), maxima_MN))
    lower = {name: state[name] - maximum for name, maximum in maxima.items()}
    if loss.crosses:
        of_S, of_T = maxima_MN[-2:]
        # The two differences first: they are equal where the two sides are, however large.
        moved = (state["origin_S"] - of_S) - (state["origin_T"] - of_T)
        state["cross"] += state["sum_T" if loss.side == "teacher" else "sum_K"] * moved
        state["origin_S"].copy_(of_S)
        state["origin_T"].copy_(of_T)
    state["product_S"] += state["sum_S"] * lower["max_S"]
    at_1 = "sum_S", "product_S"
    sums = [
        state[name] * (lower[maximum] if name in at_1 else lower[maximum] * loss.inverse_t).exp()
        for name, maximum in loss.read_sums.items()
    ]
    for name, maximum in maxima.items():
        state[name].copy_(maximum)
    return torch.cat((torch.stack((state["label"], *sums)), loss.kept_logits))


def take_sums(loss: ClassBlocks, sums_SN: Tensor) -> None:
    """Give a part the sums of all.

    Args:
        loss: the part.
        sums_SN: [S, N] the sum of what `sums_of` gives.
    """
    names = "label", *loss.read_sums
    for name, total in zip(names, sums_SN):
        loss.state[name].copy_(total)
    loss.kept_logits.copy_(sums_SN[len(names) :])


def terms_of(loss: ClassBlocks) -> Tensor:
    """What a part adds to D and, where there is a pass for it, to sum(w).

    Args:
        loss: the part, after `weigh`, or after `write` where D is found there.

    Returns:
        [1 or 2, N], to be added to those of the others.
    """
    return torch.stack([loss.state[name] for name in ("divergence", "weight")[: 1 + loss.weighs]])


def take_terms(loss: ClassBlocks, terms_SN: Tensor) -> None:
    """Give a part D and sum(w) of all.

    Args:
        loss: the part.
        terms_SN: the sum of what `terms_of` gives.
    """
    for name, total in zip(("divergence", "weight"), terms_SN):
        loss.state[name].copy_(total)
