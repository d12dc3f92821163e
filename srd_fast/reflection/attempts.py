"""Difficulty by attempts: the share of several sampled answers to a prompt that pass.

A judge, which is another signal, says which answers pass: by the final number (GSM8K), an exact match, tests, or a
user's function. From such a share p, `curate` can make the weights p(1 - p) of PACED (arXiv 2603.11178).
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .signals import Difficulty, Reflected

PASS_RATE = "pass_rate"
# A judge's value for an answer that passes.
FULL = 1.0
# The default judge.
JUDGE = "exact_match"


def pass_rate(reflected: "Reflected") -> list[float]:
    """The share of a sample's attempts to which the judge gives 1 (or more), 0..1; NaN if it gives one no value."""
    assert reflected.judge is not None
    judged = [reflected.judge.function(replace(reflected, generations=texts)) for texts in reflected.attempts]

    def share(values: Iterable[float]) -> float:
        passed = [math.nan if math.isnan(x) else float(x >= FULL) for x in values]
        return sum(passed) / len(passed)

    return [share(values) for values in zip(*judged, strict=True)]


def check_attempts(attempts: int, temperature: float, signals: Iterable[str], judge: "Difficulty") -> None:
    """Refuse settings with which all attempts would be equal, or would not be used.

    Args:
        attempts: number of answers to each prompt.
        temperature: the sampling temperature.
        signals: names of the signals that are computed.
        judge: the signal that judges the attempts.

    Raises:
        UserError: the settings do not fit each other.
    """
    if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
        raise UserError(f"attempts must be a whole number of at least 1, got {attempts!r}")
    looked_at = PASS_RATE in signals
    if looked_at and attempts < 2:
        raise UserError(f"signal {PASS_RATE!r} is a share of several attempts, and attempts is 1; set it to 8, say")
    if attempts > 1 and not looked_at:
        raise UserError(
            f"attempts is {attempts}, and no signal looks at them: add {PASS_RATE!r} to the signals, or set it to 1"
        )
    if attempts > 1 and not temperature:
        raise UserError(
            f"attempts is {attempts}, and temperature is 0, with which all of them would be the same; set it to 1"
        )
    if attempts == 1 and judge.name != JUDGE:
        raise UserError(
            f"judge is {judge.name!r}, and attempts is 1, so that there is nothing to judge; set attempts to 8, say, "
            "or leave judge out"
        )
    if not judge.of_answers or not judge.higher_is_easier:
        raise UserError(
            f"judge {judge.name!r} does not say of an answer whether it passes: take numeric_match, exact_match, "
            "execution, or a function of your own that gives 1 to an answer that passes"
        )
