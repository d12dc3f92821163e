"""How the page writes numbers, and how it says that a file is missing."""

import math

from srd_fast.report.read import Run

NOTHING = "–"
# Metrics of answers from 0 to 1, of which more is better. Others are the user's own.
TITLES = {
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "numeric_match": "final number",
    "execution": "tests passed",
    "bleu": "BLEU",
    "chrf": "chrF",
}
_NATS = {"kl": "KL to the teacher", "cross_entropy": "cross-entropy", "loss": "loss"}

# Files of a run folder -> the field of Run, and what writes the file.
_WRITTEN_BY = {
    "data/train.parquet": ("train", "the prepare step of `srd-fast run`"),
    "reflections.parquet": ("reflections", "`srd-fast reflect`"),
    "plan.json": ("plan", "`srd-fast curate`"),
    "metrics.jsonl": ("metrics", "`srd-fast distill`"),
    "summary.json": ("summary", "`srd-fast evaluate`"),
    "config.yaml": ("config", "`srd-fast run`"),
}


def missing(run: Run, *files: str) -> str:
    """One sentence that says which of the files the run folder lacks; empty if it has them all."""
    absent = [name for name in files if getattr(run, _WRITTEN_BY[name][0]) is None]
    if not absent:
        return ""
    if len(absent) == 1:
        return f"{absent[0]} is missing; {_WRITTEN_BY[absent[0]][1]} writes it."
    return f"{' and '.join(f'{name} (written by {_WRITTEN_BY[name][1]})' for name in absent)} are missing."


def points(rouge_l: float) -> str:
    """ROUGE-L from 0..1 as points from 0 to 100."""
    return NOTHING if math.isnan(rouge_l) else f"{100 * rouge_l:.1f}"


def title_of(metric: str) -> str:
    """The title of a metric on a page; the name itself for a user's own metric."""
    return TITLES.get(metric) or _NATS.get(metric, metric)


def value_of(metric: str, value: float) -> str:
    """A metric's value; in points if the metric is from 0 to 1."""
    return points(value) if metric in TITLES else number(value)


def number(value: float) -> str:
    """Nats per token, three decimals."""
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return NOTHING if math.isnan(value) else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds, in a readable unit."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def rows(n: int) -> str:
    """``1 row``, ``12,000 rows``."""
    return f"{n:,} row{'' if n == 1 else 's'}"
