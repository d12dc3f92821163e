"""Figures in long form: one CSV file for each benchmark, a row for each figure.

A *group* is what one interleaved run compares: a benchmark's rows of one case, shape, dtype, device and number of
threads. Writing a group takes the place of what was there of it, so no ratio is ever of figures from two runs.

Who was asked and could not take part has a row too, `left_out`, whose note is the reason.
"""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
LEFT_OUT = "left_out"
PRODUCTS = "products"  # a provider: the bare products, nothing else


@dataclass(frozen=True)
class Row:
    """One figure. case: what is done, such as a divergence. provider: who does it. metric: what was measured, with
    its unit where that is not in the name. note: in words, what no number says."""

    benchmark: str
    case: str
    shape: str
    dtype: str
    device: str
    threads: int
    provider: str
    version: str
    metric: str
    value: float
    torch: str
    date: str
    note: str = ""

    @property
    def group(self) -> tuple[str, ...]:
        """What identifies the run that the row comes from."""
        return (self.benchmark, self.case, self.shape, self.dtype, self.device, str(self.threads))

    @property
    def machine(self) -> str:
        """Where it was measured."""
        return f"{self.device}, {self.threads} thread{'s' * (self.threads != 1)}"


COLUMNS = tuple(f.name for f in fields(Row))


def device_name(device: str = "cpu") -> str:
    """The processor's or the GPU's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def set_threads() -> int:
    """As many threads as OMP_NUM_THREADS says, else as there are cores; how many that is."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    return torch.get_num_threads()


def version_of(package: str | None) -> str:
    """Of an installed package, empty for None."""
    return importlib.metadata.version(package) if package else ""


def _version_if_there(package: str) -> str:
    try:
        return version_of(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def natural(text: str) -> str:
    """A sort key: numbers by size, shapes by their vocabulary."""
    return re.sub(r"\d+", lambda m: m[0].zfill(12), re.sub(r".*(?=V=\d)", "", text))


def make_rows(
    benchmark: str,
    figures: Mapping[str, Mapping[str, float]],
    *,
    case: str = "",
    shape: str = "",
    dtype: str = "float32",
    device: str = "cpu",
    packages: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of a group. figures: metric -> value by provider; packages: whose version a provider has, else torch's;
    left_out: provider -> why it has no figures."""
    today, found = datetime.date.today().isoformat(), []
    where = (benchmark, case, shape, dtype, device_name(device), torch.get_num_threads())
    for provider, values in figures.items():
        who = (*where, provider, version_of((packages or {}).get(provider, "torch")))
        found += [Row(*who, metric, value, torch.__version__, today) for metric, value in values.items()]
    for provider, reason in (left_out or {}).items():
        who = (*where, provider, _version_if_there((packages or {}).get(provider, "torch")))
        found.append(Row(*who, LEFT_OUT, 1.0, torch.__version__, today, reason))
    return found


def read(path: Path) -> list[Row]:
    """Rows of a file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as f:
        return [Row(**{**x, "threads": int(x["threads"]), "value": float(x["value"])}) for x in csv.DictReader(f)]


def write(rows: Sequence[Row], folder: Path | None = None) -> None:
    """Put rows in their benchmarks' files, in the place of older ones of the same groups."""
    _replace(rows, folder or RESULTS, lambda r: r.group)


def write_providers(rows: Sequence[Row], folder: Path | None = None) -> None:
    """As `write` for benchmarks that run each provider by itself: only older rows of the same providers go."""
    _replace(rows, folder or RESULTS, lambda r: (*r.group, r.provider))


def _replace(rows: Sequence[Row], folder: Path, key: Callable[[Row], tuple[str, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for benchmark in dict.fromkeys(r.benchmark for r in rows):
        mine, path = [r for r in rows if r.benchmark == benchmark], folder / f"{benchmark}.csv"
        keys = {key(r) for r in mine}
        with_others = [r for r in read(path) if key(r) not in keys] + mine
        # Whoever is killed here leaves the old file whole.
        unfinished = path.with_suffix(".csv.new")
        with unfinished.open("w", newline="", encoding="utf-8") as f:
            out = csv.writer(f, lineterminator="\n")
            out.writerow(COLUMNS)
            out.writerows([getattr(r, c) for c in COLUMNS] for r in sorted(with_others, key=lambda r: r.group))
        unfinished.replace(path)


def spread(metric: str, values: Iterable[float]) -> dict[str, float]:
    """Median, 20 % and 80 % quantile of repeats."""
    ordered = sorted(values)
    at = {share: ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)}
    return {metric: statistics.median(ordered), f"{metric}_p20": at[0.2], f"{metric}_p80": at[0.8]}
