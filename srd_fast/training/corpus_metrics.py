"""BLEU and chrF of all answers together, as translations and summaries are compared (sacrebleu's)."""

import importlib.util
from collections.abc import Sequence
from itertools import zip_longest

from ..errors import UserError

CORPUS_METRICS = ("bleu", "chrf")


def check_sacrebleu(name: str) -> None:
    """Refuse a metric of sacrebleu if that package is not installed.

    Raises:
        UserError: the package is missing.
    """
    if importlib.util.find_spec("sacrebleu") is None:
        raise UserError(f"metric {name!r} needs the sacrebleu package: pip install 'srd-fast[metrics]'")


def corpus_score(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Score all answers together.

    Args:
        name: "bleu" (BLEU-4 of 13a tokens) or "chrf" (chrF2 of characters, for languages without spaces too).
        answers: one a sample.
        references: of each sample, at least one.

    Returns:
        0 to 1.
    """
    from sacrebleu.metrics import BLEU, CHRF

    metric = BLEU() if name == "bleu" else CHRF()
    # Stream i has reference i of each sample; None if a sample has fewer.
    streams = [list(stream) for stream in zip_longest(*(r or [""] for r in references))]
    return float(metric.corpus_score(list(answers), streams).score) / 100
