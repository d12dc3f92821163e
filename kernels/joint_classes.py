"""Rows whose classes are divided over several `ClassBlocks`: join the parts' results into those of a single one.

Shape letters: N rows, F numbers of a row, P parts.

Every part joins the numbers of all parts itself, in the same order for every number and row. So all parts have the same
results, bit for bit, and equal rows of student and teacher have equal sums. The caller sends the numbers to the parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .class_blocks import ClassBlocks


def _names(loss: ClassBlocks) -> list[str]:
    """The fields that a part knows after `read`."""
    origins = ["origin_S", "origin_T"] if loss.crosses else []
    return ["label", *origins, *dict.fromkeys(loss.read_sums.values()), *loss.read_sums]


def state_of(loss: ClassBlocks) -> Tensor:
    """A part's numbers after it has read its classes.

    Args:
        loss: the part.

    Returns:
        [F, N].
    """
    return torch.stack([loss.state[name] for name in _names(loss)])


def join_states(loss: ClassBlocks, states_PFN: Tensor, first: int) -> None:
    """Replace a part's numbers by those of all parts together.

    Args:
        loss: the part.
        states_PFN: the result of `state_of` in each part.
        first: the part that has class 0, from which one-read divergences measure.
    """
    known = dict(zip(_names(loss), states_PFN.unbind(1)))
    if loss.crosses:
        of_S, of_T = known["origin_S"], known["origin_T"]
        # The two differences come first: if the two sides are equal, so are these, however large.
        moved_PN = (of_S - of_S[first]) - (of_T - of_T[first])
        known["cross"] = known["cross"] + known["sum_T" if loss.side == "teacher" else "sum_K"] * moved_PN
        loss.state["origin_S"].copy_(of_S[first])
        loss.state["origin_T"].copy_(of_T[first])
    lower = {}
    for name in dict.fromkeys(loss.read_sums.values()):
        maximum_N = known[name].amax(0)
        lower[name] = known[name] - maximum_N
        loss.state[name].copy_(maximum_N)
    known["product_S"] = known["product_S"] + known["sum_S"] * lower["max_S"]
    # A label's logit is in one part, and 0 in the others.
    moved = [known["label"]]
    for name, maximum in loss.read_sums.items():
        scale = 1.0 if name in ("sum_S", "product_S") else loss.inverse_t
        moved.append(known[name] * (lower[maximum] * scale).exp())
    for name, total_N in zip(("label", *loss.read_sums), _total(torch.stack(moved, 1))):
        loss.state[name].copy_(total_N)


def terms_of(loss: ClassBlocks) -> Tensor:
    """A part's share of D and, if there is a pass for it, of sum(w).

    Args:
        loss: the part, after `weigh`, or after `write` if that one computes D.

    Returns:
        [1 or 2, N].
    """
    return sums_of(loss, ("divergence", "weight")[: 1 + loss.weighs])


def join_terms(loss: ClassBlocks, terms_PFN: Tensor) -> None:
    """Set a part's D and sum(w) to those of all parts together.

    Args:
        loss: the part.
        terms_PFN: the result of `terms_of` in each part.
    """
    join_sums(loss, terms_PFN, ("divergence", "weight"))


def join_sums(loss: ClassBlocks, sums_PFN: Tensor, names: Sequence[str]) -> None:
    """Set some plain sums of a part to those of all parts together.

    Args:
        loss: the part.
        sums_PFN: the result of `sums_of` in each part.
        names: the fields' names.
    """
    for name, total in zip(names, _total(sums_PFN)):
        loss.state[name].copy_(total)


def sums_of(loss: ClassBlocks, names: Sequence[str]) -> Tensor:
    """A part's share of some plain sums.

    Args:
        loss: the part.
        names: the fields' names.

    Returns:
        [F, N].
    """
    return torch.stack([loss.state[name] for name in names])


def _total(parts: Tensor) -> Tensor:
    """Sum over the first dimension, in the same order for all columns, which `Tensor.sum` does not guarantee."""
    while len(parts) > 1:
        half = len(parts) // 2
        parts = torch.cat((parts[:half] + parts[half : 2 * half], parts[2 * half :]))
    return parts[0]
