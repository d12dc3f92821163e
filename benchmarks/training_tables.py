"""The tables of training steps and whole runs."""

import re

from .markdown import Figures, Line, groups, table
from .plan import DISTILLATION, GKD, LIVE, PAIRS, PLAIN, SIDES, cell_of
from .rows import Row

OURS = "srd-fast"
KL_ALONE = "KL alone"


def train(rows: list[Row]) -> str:
    """A step and whole runs beside the plain loop."""
    body: list[Line] = []
    for (case, shape, dtype, machine), figures in groups(rows, "train").items():
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
        body.append((machine, [case, dtype, steps, *cells, apart]))
    head = ["", "dtype", "steps", "a step, s", "whole SRD, s", "plain distillation, s", "losses, weights apart"]
    return table(head, body)


def train_rivals(rows: list[Row]) -> str:
    """A step of plain distillation beside the plain loop and other trainers."""
    body: list[Line] = []
    every = groups(rows, "train")
    for group, figures in every.items():
        plain = figures.get("plain loop", {})
        if KL_ALONE not in group.case or "step_seconds" not in plain:
            continue
        memory = every.get(group._replace(case=f"{group.case.split(', learning')[0]}, memory"), {})
        for name, f in figures.items():
            if "step_seconds" in f:
                step = f"{f['step_seconds']:.2f} ({f['step_seconds'] / plain['step_seconds']:.2f}x)"
                peak = f"{memory[name]['peak_bytes'] / 1e6:,.0f}" if name in memory else ""
                apart = f"{f['loss_difference']:.1e}" if "loss_difference" in f else ""
                body.append((group.machine, [name, group.dtype, step, peak, apart]))
    return table(["", "dtype", "a step, s", "peak resident MB", "losses apart"], body)


def train_memory(rows: list[Row]) -> str:
    """Peak resident memory of whole processes."""
    body: list[Line] = []
    for (case, _, dtype, machine), figures in groups(rows, "train").items():
        peaks = {name: f["peak_bytes"] for name, f in figures.items() if "peak_bytes" in f}
        plain = peaks.get("plain loop")
        if plain and KL_ALONE not in case:
            body += [(machine, [case, dtype, n, f"{v / 1e6:,.0f} ({v / plain:.2f}x)"]) for n, v in peaks.items()]
    return table(["", "dtype", "process", "peak resident MB"], body)


def train_gpu(rows: list[Row]) -> str:
    """Each side at each batch of each pair; rows of runs in one process where there are no others."""
    found: dict[tuple[str, str, int], Figures] = {}
    for r in rows:
        if r.benchmark == "train_gpu" and (cell := cell_of(r)):
            found.setdefault((r.machine, cell.pair, cell.batch), {}).setdefault(cell.side, {})[r.metric] = r.value
    head = ["pair", "batch", "", "a step, ms", "of GKDTrainer's", "GPU busy", "kernels", "synchronisations"]
    head += ["peak GiB", "tokens/s", "losses apart", "largest batch"]
    body: list[Line] = []
    for (machine, pair, batch), figures in sorted(
        found.items(), key=lambda x: (x[0][0], PAIRS.index(x[0][1]), x[0][2])
    ):
        largest = found.get((machine, pair, 0), {})
        for name in sorted(figures, key=lambda n: (SIDES.index(n) if n in SIDES else len(SIDES), n)) if batch else ():
            cells = _step_cells(name, figures, largest)
            body.append((machine, [pair, str(batch), name, *cells]))
    if not body and any(r.benchmark == "train_gpu" for r in rows):
        return _train_gpu_in_turn(rows)
    return table(head, body)


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
    body: list[Line] = []
    for (case, shape, _, machine), figures in groups(rows, "train_gpu").items():
        plain = figures.get("plain loop")
        for name, f in figures.items() if plain else ():
            if name.startswith(OURS) or case.endswith("live teacher"):
                step = f"{1000 * f['step_seconds']:.0f} ({f['step_seconds'] / plain['step_seconds']:.2f}x)"
                peak = f"{f['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in f else ""
                body.append((machine, [shape.split(",")[0], name, step, peak, f"{f['loss_difference']:.1e}"]))
    return table(["pair", "", "a step, ms", "peak GiB", "losses apart"], body)
