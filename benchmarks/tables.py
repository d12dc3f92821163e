"""The tables of README and of docs/benchmarks.md, made from committed rows.

    python -m benchmarks.tables                    # rewrite theirs
    python -m benchmarks.tables --print FOLDER     # those of other results

In a page a table stands between `<!-- table: NAME -->` and `<!-- end -->`; nobody edits it there. A figure that has no
row leaves its cell empty.
"""

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .claims import claims
from .evidence_grid import FULL, LEARNABLE, RANDOM, REFERENCES, SRD
from .markdown import Figures, Group, Line, groups, reasons, table
from .providers import NOT_THE_LOSS, PROVIDERS
from .rows import LEFT_OUT, PRODUCTS, RESULTS, Row, natural, read
from .training_tables import OURS, train, train_gpu, train_memory, train_rivals

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("method", "benchmarks")))
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)
NATS = ("cross_entropy", "kl")
UNITS = {"s": 1, "ms": 1000}  # in a second


def _present(found: dict[Group, Figures], *metrics: str) -> list[str]:
    """Providers that have a figure anywhere, or were left out, in the order of `PROVIDERS`, others last."""
    wanted = {LEFT_OUT, *metrics}
    names = {name for figures in found.values() for name, of in figures.items() if wanted & of.keys()}
    order = {name: i for i, name in enumerate(PROVIDERS)}
    return sorted(names, key=lambda n: (order.get(n, len(order)), n))


def _short(shape: str) -> str:
    """ "smollm2 N=1024 V=49152 D=576/960" as "SmolLM2 1,024 x 49,152"."""
    name, *sizes = shape.split(",")[0].split()
    given = dict(x.split("=") for x in sizes)
    counts = " x ".join(f"{int(given[k]):,}" for k in ("N", "V") if k in given)
    return f"{name} {counts}"


def _where(key: Group) -> list[str]:
    return [_short(key.shape), key.dtype, key.case]


def _order(key: Group) -> tuple[int, str, str, str]:
    return _sizes(key)[0], str(key.dtype != "float32"), key.case, key.machine


def _sizes(key: Group) -> tuple[int, int]:
    """V and N, 0 where a shape has none."""
    found = dict(re.findall(r"\b([VN])=(\d+)", key.shape))
    return int(found.get("V", 0)), int(found.get("N", 0))


def _in_order(rows: list[Row], benchmark: str, metric: str) -> dict[Group, Figures]:
    """Groups in which somebody has the metric, in the order of a table's lines."""
    found = {k: v for k, v in groups(rows, benchmark).items() if any(metric in of for of in v.values())}
    return dict(sorted(found.items(), key=lambda x: _order(x[0])))


def loss_time(rows: list[Row], benchmark: str = "loss", unit: str = "s") -> str:
    """Times, and how many times the bare products."""
    found, why = _in_order(rows, benchmark, "seconds"), reasons(rows, benchmark)
    per_second = UNITS[unit]
    names = [n for n in _present(found, "seconds") if n not in ("gemms", "se-kd")]
    body: list[Line] = []
    for key, figures in found.items():
        floor = figures.get("gemms", {}).get("seconds")
        cells = []
        for name in names:
            s = figures.get(name, {}).get("seconds")
            of = "" if s is None or floor is None else f" ({s / floor:.2f}x)"
            cells.append(why.get((key, name), "") if s is None else f"{s * per_second:.2f}{of}")
        body.append((key.machine, [*_where(key), "" if floor is None else f"{floor * per_second:.2f}", *cells]))
    return table(["N x V", "dtype", "loss", f"GEMMs alone, {unit}", *names], body)


def _metric(rows: list[Row], benchmark: str, metric: str, show: Callable[[float], str], skip: tuple[str, ...]) -> str:
    found, why = _in_order(rows, benchmark, metric), reasons(rows, benchmark)
    names = [n for n in _present(found, metric) if n not in skip]
    body: list[Line] = []
    for key, figures in found.items():
        cells = [show(of[metric]) if metric in (of := figures.get(n, {})) else why.get((key, n), "") for n in names]
        body.append((key.machine, [*_where(key), *cells]))
    return table(["N x V", "dtype", "loss", *names], body)


def loss_memory(rows: list[Row], benchmark: str = "loss") -> str:
    """Extra peak in MB."""
    return _metric(rows, benchmark, "extra_peak_bytes", lambda v: f"{v / 2**20:,.0f}", ("gemms", "se-kd"))


def loss_error(rows: list[Row], benchmark: str = "loss") -> str:
    """Gradient against float64."""
    return _metric(rows, benchmark, "gradient_error", lambda v: f"{v:.1e}", NOT_THE_LOSS)


def selection(rows: list[Row]) -> str:
    """The loss on the fifth of the positions, of the loss on all."""
    body: list[Line] = []
    for key, figures in _in_order(rows, "loss", "seconds").items():
        some, every = figures.get("se-kd", {}), figures.get(OURS, {})
        if "seconds" not in some or "seconds" not in every:
            continue
        cells = [f"{some['seconds']:.2f} of {every['seconds']:.2f} ({some['seconds'] / every['seconds']:.2f}x)"]
        if "extra_peak_bytes" in some:
            cells.append(f"{some['extra_peak_bytes'] / 2**20:.0f} of {every['extra_peak_bytes'] / 2**20:.0f}")
        body.append((key.machine, [*_where(key), *cells, *[""] * (2 - len(cells))]))
    return table(["N x V", "dtype", "loss", "seconds", "extra peak MB"], body)


def reflect(rows: list[Row]) -> str:
    """Engines beside the script; the group with the most rows first."""
    found = groups(rows, "reflect")
    body: list[Line] = []
    for (_, shape, dtype, machine), figures in sorted(
        found.items(), key=lambda x: -int(re.search(r"(\d+) rows", x[0][1])[1])
    ):  # type: ignore[index]
        script = figures["script"]
        for name, f in figures.items():
            speed = f"{f['tokens_per_second']:.0f} ({f['tokens_per_second'] / script['tokens_per_second']:.1f}x)"
            parts = [f"{f[k]:.0f}" for k in ("start_seconds", "generate_seconds", "score_seconds")]
            whole = f"{f['seconds']:.0f} ({f['seconds'] / script['seconds']:.2f}x)"
            equal = f"{f['equal_answers']:.0%}".replace("%", " %")
            rows_of = re.search(r"(\d+) rows", shape)[1]  # type: ignore[index]
            body.append((machine, [rows_of, dtype, name, speed, *parts, whole, equal]))
    head = ["rows", "dtype", "engine", "tokens/s", "start, s", "generate, s", "score, s", "all, s"]
    return table([*head, "answers as the script's"], body)


def on_policy(rows: list[Row]) -> str:
    """Steps on fresh answers, each side beside the other that it took turns with."""
    body: list[Line] = []
    for (_, _, dtype, machine), figures in groups(rows, "on_policy").items():
        (ours, f), (_, theirs) = figures.items()
        whole, made = (f"{f[m] / theirs['step_seconds']:.2f}x" for m in ("step_seconds", "generation_seconds"))
        their_share = f"{theirs['generation_seconds'] / theirs['step_seconds']:.2f}x"
        body.append((machine, [ours, dtype, f"{theirs['step_seconds']:.1f}", their_share, whole, made]))
    head = ["", "dtype", "a step of TRL's beside it, s", "of it generation", "a step", "of it generation"]
    return table(head, body)


def large_vocabulary(rows: list[Row]) -> str:
    """Peaks of whole processes."""
    body: list[Line] = [
        (group.machine, [name, f"{f['resident_bytes'] / 2**30:.1f}", f"{f['address_bytes'] / 2**30:.1f}"])
        for group, figures in groups(rows, "large_vocabulary").items()
        for name, f in figures.items()
    ]
    return table(["", "peak resident GiB", "peak address space GiB"], sorted(body, reverse=True))


def stores(rows: list[Row]) -> str:
    """Bytes a token and errors of compact stores."""
    found = groups(rows, "stores")
    cases = sorted({group.case for group in found})
    head = ["store", "bytes a token", *(f"{case}: loss, gradient" for case in cases)]
    body: list[Line] = []
    for machine in dict.fromkeys(group.machine for group in found):
        here = {group.case: figures for group, figures in found.items() if group.machine == machine}
        for name in next(iter(here.values())):
            size = next(f[name]["bytes_per_token"] for f in here.values() if name in f)
            errors = [
                f"{f['loss_error']:.1e}, {f['gradient_error']:.1e}" if (f := here.get(c, {}).get(name)) else ""
                for c in cases
            ]
            body.append((machine, [name, f"{size:.0f}", *errors]))
    return table(head, body)


def _over_seeds(f: dict[str, float], metric: str, digits: int = 3, factor: float = 1.0) -> str:
    """Mean and deviation; empty if it was not measured."""
    sd = f.get(f"{metric}_sd")
    mean = "" if metric not in f else f"{f[metric] * factor:.{digits}f}"
    return mean + ("" if sd is None else f" ± {sd * factor:.{digits}f}")


def _apart(f: dict[str, float], metric: str, digits: int = 3, factor: float = 1.0) -> str:
    """A difference with its interval; none where the interval holds 0."""
    ends = [f.get(f"{metric}_{end}") for end in ("low", "high")]
    low, high = (None if x is None else x * factor for x in ends)
    if low is None or high is None:
        return ""
    apart = "none" if low <= 0 <= high else f"{f[metric] * factor:+.{digits}f}"
    return f"{apart} [{low:+.{digits}f}, {high:+.{digits}f}]"


# What is compared -> its metric, digits and factor.
_WORTH = {"KL": ("kl", 3, 1.0), "cross-entropy": ("cross_entropy", 3, 1.0), "ROUGE-L": ("rouge_l", 1, 100.0)}


def _all_apart(f: dict[str, float], reference: str) -> list[str]:
    """The differences of a cell from a reference, with their intervals."""
    return [_apart(f, f"{m}_vs_{REFERENCES[reference]}", digits, factor) for m, digits, factor in _WORTH.values()]


def _first_sampled(figures: Figures) -> str:
    """The metric of answers sampled on the first validation set."""
    return next((m for f in figures.values() for m in f if re.fullmatch(r"sampled_rouge_l@[^:]*?(?<!_sd)", m)), "")


def evidence(rows: list[Row]) -> str:
    """Students of every cell over seeds, and what they cost."""

    def cost(f: dict[str, float], metric: str, factor: float = 1.0, digits: int = 0) -> str:
        return f"{f[metric] * factor:.{digits}f}" if metric in f else ""

    body: list[Line] = []
    for (case, shape, _, machine), figures in groups(rows, "evidence").items():
        first = next(iter(figures.values()))
        begin = [f"{shape}, {case}", "starting student", "", _over_seeds(first, "start_kl"), ""]
        body.append((machine, [*begin, _over_seeds(first, "start_rouge_l", 1, 100), *[""] * 7]))
        sampled = _first_sampled(figures)
        for name, f in figures.items():
            worth = [_over_seeds(f, "kl"), _over_seeds(f, "cross_entropy"), _over_seeds(f, "rouge_l", 1, 100)]
            worth += [_over_seeds(f, sampled, 1, 100), _over_seeds(f, "numeric_match", 1, 100)]
            costs = [
                cost(f, "step_seconds", digits=2),
                *(cost(f, m) for m in ("train_seconds", "cache_seconds", "peak_memory_mb")),
            ]
            body.append((machine, ["", name, cost(f, "seeds"), *worth, *costs, cost(f, "cache_bytes", 1e-6, 1)]))
    head = ["", "", "seeds", "KL, nats", "cross-entropy, nats", "ROUGE-L", "ROUGE-L, sampled", "final number"]
    head += ["a step, s", "training, s", "cache, s", "peak MB", "cache MB"]
    used = [i for i in range(len(head)) if not body or i < 2 or any(cells[i] for _, cells in body)]
    return table([head[i] for i in used], [(machine, [cells[i] for i in used]) for machine, cells in body])


def evidence_differences(rows: list[Row]) -> str:
    """Every cell against full KD and against random dropping."""
    body: list[Line] = []
    for (case, shape, _, machine), figures in groups(rows, "evidence").items():
        where = f"{shape}, {case}"
        for name, f in figures.items():
            cells = [cell for x in REFERENCES for cell in _all_apart(f, x)]
            if any(cells):
                body.append((machine, [where, name, *cells]))
                where = ""
    return table(["", "", *(f"{title}, from {x}" for x in REFERENCES for title in _WORTH)], body)


# What the method page calls cells, of which it shows the differences from random dropping.
_ANSWERS = {
    SRD: "SRD: the hardest 25 % dropped, then easy to hard",
    LEARNABLE: "`preset=learnable`: what the student knows dropped, in random order",
    FULL: "all rows",
}


def curriculum(rows: list[Row]) -> str:
    """SRD, learnable and all rows against random dropping, where all three were trained."""
    body: list[Line] = []
    for (*_, machine), figures in groups(rows, "evidence").items():
        cells = {name: _all_apart(figures.get(name, {}), RANDOM) for name in _ANSWERS}
        if all(map(any, cells.values())):
            body += [(machine, [_ANSWERS[name], *apart]) for name, apart in cells.items()]
    return table(["", "KL, nats", "cross-entropy, nats", "ROUGE-L"], body)


def limits(rows: list[Row], benchmark: str = "limits") -> str:
    """Largest batches."""
    found, why = groups(rows, benchmark), reasons(rows, benchmark)
    names = _present(found, "largest_rows")
    body: list[Line] = []
    for key, figures in sorted(found.items(), key=lambda x: (_order(x[0])[0], x[0].case, x[0].machine)):
        cells = []
        for name in names:
            f = figures.get(name, {})
            at_end = "largest_rows" in f and f["largest_rows"] == f["searched_to"]
            text = f"{f['largest_rows']:,.0f}{' or more' if at_end else ''}" if "largest_rows" in f else ""
            cells.append(text or why.get((key, name), ""))
        body.append((key.machine, [_short(key.shape).replace(" ", " V = "), key.dtype, key.case, *cells]))
    return table(["head", "dtype", "limit", *names], body)


def scale(rows: list[Row]) -> str:
    """Growth."""
    body: list[Line] = []
    for (case, shape, _, machine), figures in groups(rows, "scale").items():
        f = figures[OURS]
        sizes = [m.removeprefix("seconds@") for m in f if m.startswith("seconds@")]
        seconds = ", ".join(f"{int(s):,}: {f[f'seconds@{s}']:.2f}" for s in sizes)
        peaks = ", ".join(f"{f[f'extra_peak_bytes@{s}'] / 2**20:.0f}" for s in sizes if f"extra_peak_bytes@{s}" in f)
        body.append((machine, [case, shape, seconds, f"{f['r_squared']:.4f}", peaks]))
    return table(["grows", "fixed", "size: seconds", "R²", "extra peak MB"], body)


def rivals(rows: list[Row]) -> str:
    """Errors of gradients on small examples."""
    found, why = groups(rows, "rivals"), reasons(rows, "rivals")
    metrics = list(dict.fromkeys(m for f in found.values() for of in f.values() for m in of if m != LEFT_OUT))
    names = [n for n in _present(found, *metrics) if n in PROVIDERS]

    def show(value: float | None) -> str:
        if value is None:
            return ""
        return "error" if value == float("inf") else "NaN" if value != value else f"{value:.0e}"

    body: list[Line] = []
    for key, figures in found.items():
        for m in metrics:
            cells = [show(figures.get(n, {}).get(m)) or why.get((key, n), "") for n in names]
            body.append((key.machine, [key.case, m.split(", ")[1], *cells]))
    return table(["loss", "example", *names], body)


def scores(rows: list[Row]) -> str:
    """ROUGE-L and curation."""
    body: list[Line] = []
    for (_, shape, _, machine), figures in groups(rows, "rouge").items():
        if "rouge-score" in figures:
            ours, theirs = figures[OURS]["seconds"], figures["rouge-score"]["seconds"]
            cell = f"{ours:.2f} ({theirs:.1f} with rouge-score, {theirs / ours:.0f}x)"
            body.append((machine, [f"ROUGE-L, {shape}", cell, ""]))
    for (case, shape, _, machine), figures in groups(rows, "curate").items():
        f = figures[OURS]
        cells = [f"curate, {case}, {shape}", f"{f['seconds']:.1f}", f"{f['peak_bytes'] / 2**30:.2f}"]
        body.append((machine, cells))
    return table(["", "seconds", "peak GiB"], body)


def quickstart(rows: list[Row]) -> str:
    """Three models of the quickstart."""
    names = {"teacher": "teacher", "start": "starting student", "student": "distilled student"}
    body: list[Line] = []
    for group, figures in groups(rows, "quickstart").items():
        for name, words in names.items():
            f = figures[name]
            nats = [f"{f[k]:.3f}" if k in f else "" for k in NATS]
            body.append((group.machine, [words, f"{100 * f['rouge_l']:.1f}", *nats]))
    return table(["", "ROUGE-L", "cross-entropy, nats/token", "KL to the teacher, nats/token"], body)


def orders(rows: list[Row], benchmark: str = "orders", unit: str = "s") -> str:
    """Both orders of the loss's work in several budgets."""
    why = reasons(rows, benchmark)
    body: list[Line] = []
    for key, figures in sorted(groups(rows, benchmark).items(), key=lambda x: (_sizes(x[0]), *_order(x[0])[1:])):
        floor = figures.get(PRODUCTS, {}).get("seconds")
        where = [_short(key.shape), key.dtype, key.case, "" if floor is None else f"{floor * UNITS[unit]:.2f}"]
        for name in sorted(figures.keys() - {PRODUCTS}, key=natural):
            f = figures[name]
            cells = [why.get((key, name), ""), "", "", ""]
            if floor and "seconds" in f:
                ratios = [f"{f['seconds'] / x:.2f}x" for x in (f["own_products_seconds"], floor)]
                peak = f"{f['extra_peak_bytes'] / 2**20:,.0f}" if "extra_peak_bytes" in f else ""
                cells = [f"{f['seconds'] * UNITS[unit]:.2f}", *ratios, peak]
            body.append((key.machine, [*where, name, *cells]))
    head = ["N x V", "dtype", "loss", f"its four products, {unit}", "order, memory_budget"]
    return table([*head, unit, "of its own products", "of the four", "extra peak MB"], body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "claims": claims,
    "quickstart": quickstart,
    "loss-time": loss_time,
    "loss-memory": loss_memory,
    "loss-error": loss_error,
    "limits": limits,
    "orders": orders,
    "loss-time-gpu": partial(loss_time, benchmark="loss_gpu", unit="ms"),
    "loss-memory-gpu": partial(loss_memory, benchmark="loss_gpu"),
    "limits-gpu": partial(limits, benchmark="limits_gpu"),
    "train-gpu": train_gpu,
    "rivals": rivals,
    "scale": scale,
    "reflect": reflect,
    "on-policy": on_policy,
    "scores": scores,
    "train": train,
    "train-rivals": train_rivals,
    "train-memory": train_memory,
    "large-vocabulary": large_vocabulary,
    "stores": stores,
    "selection": selection,
    "evidence": evidence,
    "evidence-differences": evidence_differences,
    "curriculum": curriculum,
}

# Of benchmarks whose rows no page shows.
OTHER_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "claims": claims,
    "orders-gpu": partial(orders, benchmark="orders_gpu", unit="ms"),
}


def all_rows(folder: Path) -> list[Row]:
    """Rows of every benchmark in a folder, but of those that write others."""
    return [r for path in sorted(folder.glob("*.csv")) if path.stem != "roofline" for r in read(path)]


def render(text: str, rows: list[Row]) -> str:
    """A text with its tables made from these rows."""
    made = {**TABLES, **OTHER_TABLES}
    return BLOCK.sub(lambda m: f"<!-- table: {m[1]} -->\n{made[m[1]](rows)}<!-- end -->", text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", dest="folder", type=Path, help="print the tables of these results instead")
    args = parser.parse_args()
    if args.folder:
        rows = all_rows(args.folder)
        for name, make in {**TABLES, **OTHER_TABLES}.items():
            print(f"\n{name}\n\n{make(rows)}", end="")
        return
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8"), all_rows(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
