"""The tables of README, made from committed rows.

    python -m benchmarks.tables                    # rewrite README's
    python -m benchmarks.tables --print FOLDER     # those of other results

In README a table stands between `<!-- table: NAME -->` and `<!-- end -->`; nobody edits it there. A figure that has no
row leaves its cell empty.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from .plan import DISTILLATION, GKD, LIVE, PAIRS, PLAIN, SIDES, cell_of
from .providers import NOT_THE_LOSS, PROVIDERS
from .rows import RESULTS, Row, read

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
OURS = "srd-fast"
KL_ALONE = "KL alone"
NATS = ("cross_entropy", "kl")
UNITS = {"s": 1, "ms": 1000}  # in a second
# provider -> metric -> value
Figures = dict[str, dict[str, float]]


def groups(rows: Iterable[Row], benchmark: str, **wanted: str) -> dict[tuple[str, ...], Figures]:
    """Figures of each group of a benchmark, by (case, shape, dtype), where the wanted fields are as given."""
    found: dict[tuple[str, ...], Figures] = {}
    for r in rows:
        if r.benchmark == benchmark and all(getattr(r, k) == v for k, v in wanted.items()):
            found.setdefault((r.case, r.shape, r.dtype), {}).setdefault(r.provider, {})[r.metric] = r.value
    return found


def table(head: list[str], body: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)) + "\n"


def _present(found: dict[tuple[str, ...], Figures], metric: str) -> list[str]:
    """Providers that have a figure anywhere, in the order of `PROVIDERS`, others last."""
    names = {name for figures in found.values() for name, of in figures.items() if metric in of}
    order = {name: i for i, name in enumerate(PROVIDERS)}
    return sorted(names, key=lambda n: (order.get(n, len(order)), n))


def _short(shape: str) -> str:
    """ "smollm2 N=1024 V=49152 D=576/960" as "SmolLM2 1,024 x 49,152"."""
    name, *sizes = shape.split(",")[0].split()
    given = dict(x.split("=") for x in sizes)
    counts = " x ".join(f"{int(given[k]):,}" for k in ("N", "V") if k in given)
    return f"{name} {counts}"


def _where(key: tuple[str, ...]) -> list[str]:
    case, shape, dtype = key
    return [_short(shape), dtype, case]


def loss_time(rows: list[Row], benchmark: str = "loss", unit: str = "s") -> str:
    """Times, and how many times the bare products."""
    found = {k: v for k, v in groups(rows, benchmark).items() if any("seconds" in of for of in v.values())}
    per_second = UNITS[unit]
    names = [n for n in _present(found, "seconds") if n not in ("gemms", "se-kd")]
    body = []
    for key, figures in sorted(found.items(), key=lambda x: _order(x[0])):
        floor = figures.get("gemms", {}).get("seconds")
        cells = []
        for name in names:
            s = figures.get(name, {}).get("seconds")
            of = "" if s is None or floor is None else f" ({s / floor:.2f}x)"
            cells.append("" if s is None else f"{s * per_second:.2f}{of}")
        body.append([*_where(key), "" if floor is None else f"{floor * per_second:.2f}", *cells])
    return table(["N x V", "dtype", "loss", f"GEMMs alone, {unit}", *names], body)


def _order(key: tuple[str, ...]) -> tuple[int, str, str]:
    case, shape, dtype = key
    return int(re.search(r"V=(\d+)", shape)[1]), dtype != "float32", case  # type: ignore[index, return-value]


def _metric(
    rows: list[Row], benchmark: str, metric: str, show: Callable[[float], str], skip: tuple[str, ...]
) -> tuple[list[str], list[list[str]]]:
    found = {k: v for k, v in groups(rows, benchmark).items() if any(metric in of for of in v.values())}
    names = [n for n in _present(found, metric) if n not in skip]
    body = []
    for key, figures in sorted(found.items(), key=lambda x: _order(x[0])):
        body.append([*_where(key), *(show(figures[n][metric]) if metric in figures.get(n, {}) else "" for n in names)])
    return ["N x V", "dtype", "loss", *names], body


def loss_memory(rows: list[Row], benchmark: str = "loss") -> str:
    """Extra peak in MB."""
    return table(*_metric(rows, benchmark, "extra_peak_bytes", lambda v: f"{v / 2**20:,.0f}", ("gemms", "se-kd")))


def loss_error(rows: list[Row], benchmark: str = "loss") -> str:
    """Gradient against float64."""
    return table(*_metric(rows, benchmark, "gradient_error", lambda v: f"{v:.1e}", NOT_THE_LOSS))


def selection(rows: list[Row]) -> str:
    """The loss on the fifth of the positions, of the loss on all."""
    body = []
    for key, figures in sorted(groups(rows, "loss").items(), key=lambda x: _order(x[0])):
        if "se-kd" not in figures or "seconds" not in figures["se-kd"]:
            continue
        some, every = figures["se-kd"], figures[OURS]
        cells = [f"{some['seconds']:.2f} of {every['seconds']:.2f} ({some['seconds'] / every['seconds']:.2f}x)"]
        if "extra_peak_bytes" in some:
            cells.append(f"{some['extra_peak_bytes'] / 2**20:.0f} of {every['extra_peak_bytes'] / 2**20:.0f}")
        body.append([*_where(key), *cells, *[""] * (2 - len(cells))])
    return table(["N x V", "dtype", "loss", "seconds", "extra peak MB"], body)


def reflect(rows: list[Row]) -> str:
    """Engines beside the script; the group with the most rows first."""
    found = groups(rows, "reflect")
    body = []
    for (_, shape, dtype), figures in sorted(found.items(), key=lambda x: -int(re.search(r"(\d+) rows", x[0][1])[1])):  # type: ignore[index]
        script = figures["script"]
        for name, f in figures.items():
            speed = f"{f['tokens_per_second']:.0f} ({f['tokens_per_second'] / script['tokens_per_second']:.1f}x)"
            parts = [f"{f[k]:.0f}" for k in ("start_seconds", "generate_seconds", "score_seconds")]
            whole = f"{f['seconds']:.0f} ({f['seconds'] / script['seconds']:.2f}x)"
            equal = f"{f['equal_answers']:.0%}".replace("%", " %")
            rows_of = re.search(r"(\d+) rows", shape)[1]  # type: ignore[index]
            body.append([rows_of, dtype, name, speed, *parts, whole, equal])
    head = ["rows", "dtype", "engine", "tokens/s", "start, s", "generate, s", "score, s", "all, s"]
    return table([*head, "answers as the script's"], body)


def train(rows: list[Row]) -> str:
    """A step and whole runs beside the plain loop."""
    body = []
    for (case, shape, dtype), figures in groups(rows, "train").items():
        ours, plain = figures.get(OURS, {}), figures.get("plain loop", {})
        if "step_seconds" not in ours or KL_ALONE in case:
            continue
        steps = re.search(r"(\d+) steps", shape)[1]  # type: ignore[index]
        step = f"{ours['step_seconds']:.2f} of {plain['step_seconds']:.2f}"
        cells = [f"{step} ({ours['step_seconds'] / plain['step_seconds']:.2f}x)"]
        for other in ("plain loop", "plain loop, plain distillation"):
            theirs = figures.get(other, {}).get("whole_seconds")
            whole = case.startswith("cache") and theirs
            of = f"{ours['whole_seconds']:.0f} of {theirs:.0f} ({ours['whole_seconds'] / theirs:.2f}x)" if whole else ""
            cells.append(of)
        apart = f"{ours['loss_difference']:.1e}, {ours['weight_difference']:.1e}" if dtype == "float32" else ""
        body.append([case, dtype, steps, *cells, apart])
    head = ["", "dtype", "steps", "a step, s", "whole SRD, s", "plain distillation, s", "losses, weights apart"]
    return table(head, body)


def train_rivals(rows: list[Row]) -> str:
    """A step of plain distillation beside the plain loop and other trainers."""
    body, every = [], groups(rows, "train")
    for (case, shape, dtype), figures in every.items():
        plain = figures.get("plain loop", {})
        if KL_ALONE not in case or "step_seconds" not in plain:
            continue
        memory = every.get((f"{case.split(', learning')[0]}, memory", shape, dtype), {})
        for name, f in figures.items():
            if "step_seconds" in f:
                step = f"{f['step_seconds']:.2f} ({f['step_seconds'] / plain['step_seconds']:.2f}x)"
                peak = f"{memory[name]['peak_bytes'] / 1e6:,.0f}" if name in memory else ""
                apart = f"{f['loss_difference']:.1e}" if "loss_difference" in f else ""
                body.append([name, dtype, step, peak, apart])
    return table(["", "dtype", "a step, s", "peak resident MB", "losses apart"], body)


def train_memory(rows: list[Row]) -> str:
    """Peak resident memory of whole processes."""
    body = []
    for (case, _, dtype), figures in groups(rows, "train").items():
        peaks = {name: f["peak_bytes"] for name, f in figures.items() if "peak_bytes" in f}
        plain = peaks.get("plain loop")
        if plain and KL_ALONE not in case:
            body += [[case, dtype, n, f"{v / 1e6:,.0f} ({v / plain:.2f}x)"] for n, v in peaks.items()]
    return table(["", "dtype", "process", "peak resident MB"], body)


def train_gpu(rows: list[Row]) -> str:
    """Each side at each batch of each pair; rows of runs in one process where there are no others."""
    found: dict[tuple[str, str, int], Figures] = {}
    for r in rows:
        if r.benchmark == "train_gpu" and (cell := cell_of(r)):
            found.setdefault((r.device, cell.pair, cell.batch), {}).setdefault(cell.side, {})[r.metric] = r.value
    head = ["pair", "batch", "", "a step, ms", "of GKDTrainer's", "GPU busy", "kernels", "synchronisations"]
    head += ["peak GiB", "tokens/s", "losses apart", "largest batch"]
    several = len({device for device, *_ in found}) > 1
    body = []
    for (device, pair, batch), figures in sorted(found.items(), key=lambda x: (x[0][0], PAIRS.index(x[0][1]), x[0][2])):
        largest = found.get((device, pair, 0), {})
        for name in sorted(figures, key=lambda n: (SIDES.index(n) if n in SIDES else len(SIDES), n)) if batch else ():
            cells = _step_cells(name, figures, largest)
            body.append([*([device] if several else []), pair, str(batch), name, *cells])
    if not body and any(r.benchmark == "train_gpu" for r in rows):
        return _train_gpu_in_turn(rows)
    return table(["GPU"] * several + head, body)


def _step_cells(name: str, figures: Figures, largest: Figures) -> list[str]:
    """Of one side beside the others of its pair and batch. largest: of the searches, by side."""
    f, most = figures[name], largest.get(name, {})
    at_end = most.get("largest_batch") == most.get("searched_to")
    fitting = f"{most['largest_batch']:.0f}{' or more' if at_end else ''}" if "largest_batch" in most else ""
    if "step_seconds" not in f:
        return ["out of memory" if f.get("fits") == 0 else "failed", *[""] * 7, fitting]
    gkd = figures.get(GKD, {}).get("step_seconds")
    reference = next((figures[n] for n in (PLAIN, GKD, DISTILLATION, LIVE) if "loss@1" in figures.get(n, {})), f)
    losses = [m for m in f if m.startswith("loss@") and m in reference]
    losses = losses[:1] if "LoRA" in name else losses  # which then trains other weights
    apart = max((abs(f[m] - reference[m]) / abs(reference[m]) for m in losses), default=None)
    times = f"{1e3 * f['step_seconds_p20']:.0f} to {1e3 * f['step_seconds_p80']:.0f}"
    return [
        f"{1e3 * f['step_seconds']:.0f} ({times})",
        f"{f['step_seconds'] / gkd:.2f}x" if gkd else "",
        f"{100 * f['gpu_busy_share']:.0f} %" if "gpu_busy_share" in f else "",
        f"{f['kernels']:,.0f}" if "kernels" in f else "",
        f"{f['synchronisations']:.1f}" if "synchronisations" in f else "",
        f"{f['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in f else "",
        f"{f['tokens_per_second']:,.0f}",
        "" if apart is None or f is reference else f"{apart:.1e}",
        fitting,
    ]


def _train_gpu_in_turn(rows: list[Row]) -> str:
    """Sides that took turns in one process: ours from each run, the others from that with a live teacher."""
    body = []
    for (case, shape, _), figures in groups(rows, "train_gpu").items():
        plain = figures.get("plain loop")
        for name, f in figures.items() if plain else ():
            if name.startswith(OURS) or case.endswith("live teacher"):
                step = f"{1000 * f['step_seconds']:.0f} ({f['step_seconds'] / plain['step_seconds']:.2f}x)"
                peak = f"{f['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in f else ""
                body.append([shape.split(",")[0], name, step, peak, f"{f['loss_difference']:.1e}"])
    return table(["pair", "", "a step, ms", "peak GiB", "losses apart"], body)


def large_vocabulary(rows: list[Row]) -> str:
    """Peaks of whole processes."""
    body = [
        [name, f"{f['resident_bytes'] / 2**30:.1f}", f"{f['address_bytes'] / 2**30:.1f}"]
        for figures in groups(rows, "large_vocabulary").values()
        for name, f in figures.items()
    ]
    return table(["", "peak resident GiB", "peak address space GiB"], sorted(body, reverse=True))


def stores(rows: list[Row]) -> str:
    """Bytes a token and errors of compact stores."""
    found = groups(rows, "stores")
    cases = sorted(found)
    head = ["store", "bytes a token", *(f"{case}: loss, gradient" for case, *_ in cases)]
    names = list(next(iter(found.values()), {}))
    body = []
    for name in names:
        size = next(f[name]["bytes_per_token"] for f in found.values() if name in f)
        errors = [f"{found[c][name]['loss_error']:.1e}, {found[c][name]['gradient_error']:.1e}" for c in cases]
        body.append([name, f"{size:.0f}", *errors])
    return table(head, body)


def quality(rows: list[Row]) -> str:
    """Methods over seeds."""

    def spread(f: dict[str, float], metric: str, digits: int, factor: float = 1.0) -> str:
        sd = f.get(f"{metric}_sd")
        return f"{f[metric] * factor:.{digits}f}" + ("" if sd is None else f" ± {sd * factor:.{digits}f}")

    def cost(f: dict[str, float], metric: str, factor: float = 1.0, digits: int = 0) -> str:
        return f"{f[metric] * factor:.{digits}f}" if metric in f else ""

    body = []
    for (case, *_), figures in groups(rows, "quality").items():
        first = next(iter(figures.values()))
        begin = [case, "starting student", f"{first['start_kl']:.3f}", "", f"{100 * first['start_rouge_l']:.1f}"]
        body.append([*begin, *[""] * 4])
        for name, f in figures.items():
            scores = [spread(f, "kl", 3), spread(f, "cross_entropy", 3), spread(f, "rouge_l", 1, 100)]
            costs = [cost(f, "step_seconds", digits=2), cost(f, "cache_seconds"), cost(f, "peak_memory_mb")]
            body.append(["", name, *scores, *costs, cost(f, "cache_bytes", 1e-6, 1)])
    head = ["", "", "KL, nats", "cross-entropy, nats", "ROUGE-L", "a step, s", "cache, s", "peak MB", "cache MB"]
    return table(head, body)


def limits(rows: list[Row], benchmark: str = "limits") -> str:
    """Largest batches."""
    found = groups(rows, benchmark)
    names = _present(found, "largest_rows")
    body = []
    for (case, shape, dtype), figures in sorted(found.items(), key=lambda x: (_order(x[0])[0], x[0][0])):
        cells = []
        for name in names:
            f = figures.get(name)
            at_end = f is not None and f["largest_rows"] == f["searched_to"]
            cells.append("" if f is None else f"{f['largest_rows']:,.0f}{' or more' if at_end else ''}")
        body.append([_short(shape).replace(" ", " V = "), dtype, case, *cells])
    return table(["head", "dtype", "limit", *names], body)


def scale(rows: list[Row]) -> str:
    """Growth."""
    body = []
    for (case, shape, _), figures in groups(rows, "scale").items():
        f = figures[OURS]
        sizes = [m.removeprefix("seconds@") for m in f if m.startswith("seconds@")]
        seconds = ", ".join(f"{int(s):,}: {f[f'seconds@{s}']:.2f}" for s in sizes)
        peaks = ", ".join(f"{f[f'extra_peak_bytes@{s}'] / 2**20:.0f}" for s in sizes if f"extra_peak_bytes@{s}" in f)
        body.append([case, shape, seconds, f"{f['r_squared']:.4f}", peaks])
    return table(["grows", "fixed", "size: seconds", "R²", "extra peak MB"], body)


def rivals(rows: list[Row]) -> str:
    """Errors of gradients on small examples."""
    found = groups(rows, "rivals")
    metrics = list(dict.fromkeys(m for f in found.values() for of in f.values() for m in of))
    names = [n for n in PROVIDERS if any(n in f for f in found.values())]

    def show(f: dict[str, float], metric: str) -> str:
        value = f.get(metric)
        return (
            "" if value is None else "error" if value == float("inf") else "NaN" if value != value else f"{value:.0e}"
        )

    body = []
    for (case, *_), figures in found.items():
        body += [[case, m.split(", ")[1], *(show(figures.get(n, {}), m) for n in names)] for m in metrics]
    return table(["loss", "example", *names], body)


def scores(rows: list[Row]) -> str:
    """ROUGE-L and curation."""
    body = []
    for (_, shape, _), figures in groups(rows, "rouge").items():
        if "rouge-score" in figures:
            ours, theirs = figures[OURS]["seconds"], figures["rouge-score"]["seconds"]
            body.append([f"ROUGE-L, {shape}", f"{ours:.2f} ({theirs:.1f} with rouge-score, {theirs / ours:.0f}x)", ""])
    for (case, shape, _), figures in groups(rows, "curate").items():
        f = figures[OURS]
        body.append([f"curate, {case}, {shape}", f"{f['seconds']:.1f}", f"{f['peak_bytes'] / 2**30:.2f}"])
    return table(["", "seconds", "peak GiB"], body)


def quickstart(rows: list[Row]) -> str:
    """Three models of the quickstart."""
    names = {"teacher": "teacher", "start": "starting student", "student": "distilled student"}
    body = []
    for figures in groups(rows, "quickstart").values():
        for name, words in names.items():
            f = figures[name]
            body.append([words, f"{100 * f['rouge_l']:.1f}", *(f"{f[k]:.3f}" if k in f else "" for k in NATS)])
    return table(["", "ROUGE-L", "cross-entropy, nats/token", "KL to the teacher, nats/token"], body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "quickstart": quickstart,
    "loss-time": loss_time,
    "loss-memory": loss_memory,
    "loss-error": loss_error,
    "limits": limits,
    "loss-time-gpu": partial(loss_time, benchmark="loss_gpu", unit="ms"),
    "loss-memory-gpu": partial(loss_memory, benchmark="loss_gpu"),
    "limits-gpu": partial(limits, benchmark="limits_gpu"),
    "train-gpu": train_gpu,
    "rivals": rivals,
    "scale": scale,
    "reflect": reflect,
    "scores": scores,
    "train": train,
    "train-rivals": train_rivals,
    "train-memory": train_memory,
    "large-vocabulary": large_vocabulary,
    "stores": stores,
    "selection": selection,
    "quality": quality,
}


def all_rows(folder: Path) -> list[Row]:
    """Rows of every benchmark in a folder, but of those that write others."""
    return [r for path in sorted(folder.glob("*.csv")) if path.stem != "roofline" for r in read(path)]


def render(text: str, rows: list[Row]) -> str:
    """A text with its tables made from these rows."""
    return BLOCK.sub(lambda m: f"<!-- table: {m[1]} -->\n{TABLES[m[1]](rows)}<!-- end -->", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", dest="folder", type=Path, help="print the tables of these results instead")
    args = parser.parse_args()
    if args.folder:
        rows = all_rows(args.folder)
        for name, make in TABLES.items():
            print(f"\n{name}\n\n{make(rows)}", end="")
        return
    README.write_text(render(README.read_text(encoding="utf-8"), all_rows(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
