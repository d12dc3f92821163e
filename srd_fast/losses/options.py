"""Options of the distillation losses: typed, and checked once, where they are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..kernels import RowCoefficients, RowDivergence
from ..suggest import unknown_name
from .backends import check_backend
from .divergences import get_divergence
from .order import ORDERS

REDUCTIONS = ("mean", "sum", "none")
# Limits of temperatures, softcaps and scales: beyond them, squares and products of these leave the range of float32.
RANGE = (1e-6, 1e6)


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def in_range(value: Any, low: float, high: float) -> bool:
    """Return whether `value` is a number from `low` to `high`."""
    return isinstance(value, (int, float)) and low <= value <= high


def check_in_range(name: str, value: Any) -> None:
    """Refuse a temperature, softcap or scale outside of RANGE."""
    require(
        in_range(value, *RANGE),
        f"{name} must be a finite number above 0, from {RANGE[0]:g} to {RANGE[1]:g}, got {value!r}",
    )


@dataclass(frozen=True)
class LossOptions:
    """The options of `distillation_loss` that are the same for every batch: what the loss computes, and how.

    Args:
        divergence: a name from `divergence_names()`.
        temperature: T, above 0, of both softmaxes in the divergence.
        skew: s of the skew divergences, 0 to 1.
        beta: beta of the JSD, 0 (forward KL) to 1 (reverse KL).
        sft_weight: weight of the cross-entropy on the labels, 0 to 1.
        temperature_scaling: multiply the divergence by T^2.
        reduction: "mean", "sum" or "none".
        ignore_index: the label that has no loss. None: every label has one.
        backend: "triton", "compile", "eager" or "auto".
        memory_budget: bytes that the loss may allocate beyond its inputs and gradients. None: the device's default.
        logits_dtype: torch.float32, or None for the dtype of the matrix products.
        order: "rows" or "classes", whichever the outer loop is over; "auto" for the faster one within the budget.
        standardize_logits: whether D is of logits minus their row's mean, divided by its standard deviation.

    Raises:
        UserError: an option is wrong. The message names it, its value and what it should be.
    """

    divergence: str = "skew_reverse_kl"
    temperature: float = 2.0
    skew: float = 0.1
    beta: float = 0.5
    sft_weight: float = 0.1
    temperature_scaling: bool = True
    reduction: str = "mean"
    ignore_index: int | None = -100
    backend: str = "auto"
    memory_budget: int | None = None
    logits_dtype: torch.dtype | None = None
    order: str = "auto"
    standardize_logits: bool = False

    def __post_init__(self) -> None:
        check_in_range("temperature", self.temperature)
        for name in ("skew", "beta", "sft_weight"):
            value = getattr(self, name)
            require(in_range(value, 0, 1), f"{name} must be a number from 0 to 1, got {value!r}")
        for name in ("temperature_scaling", "standardize_logits"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
        check_backend(self.backend)
        if self.reduction not in REDUCTIONS:
            raise UserError(unknown_name("reduction", self.reduction, REDUCTIONS))
        if self.order not in ORDERS:
            raise UserError(unknown_name("order", self.order, ORDERS))
        ignored, budget = self.ignore_index, self.memory_budget
        require(
            ignored is None or (isinstance(ignored, int) and -(2**31) <= ignored < 2**31),
            f"ignore_index must be a whole number of 32 bits, or None where every label counts, got {ignored!r}",
        )
        require(
            budget is None or (isinstance(budget, int) and budget > 0),
            f"memory_budget must be a number of bytes above 0, or None for the device's default, got {budget!r}",
        )
        require(
            self.logits_dtype in (None, torch.float32),
            f"logits_dtype must be torch.float32, or None for the dtype of the heads, got {self.logits_dtype!r}",
        )
        get_divergence(self.divergence)

    @property
    def row_divergence(self) -> RowDivergence:
        """The divergence with its parameters, as `srd_fast.kernels` takes it."""
        return get_divergence(self.divergence).bind(float(self.skew), float(self.beta))

    @property
    def coefficients(self) -> RowCoefficients:
        """Weights of cross-entropy and divergence, and the temperature, as `srd_fast.kernels` takes them."""
        sft, t = float(self.sft_weight), float(self.temperature)
        return RowCoefficients(sft, (1.0 - sft) * (t * t if self.temperature_scaling else 1.0), t)


def check_names(given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse the name of an option that does not exist."""
    for name in given:
        if name not in known:
            raise UserError(unknown_name("option", name, known))
