"""ROUGE-L of `srd_fast.rouge` beside the rouge-score package's on the same pairs, and what a second process brings.

    python -m benchmarks.rouge [--data FOLDER] [--pairs 11000]

Pairs: the references of the folder's json lines (default: the quickstart's rows), each with the answer of another row
(a quarter) or one of its own references with words left out, in capitals or shuffled. The two take turns, 500 pairs
each; ours starts without any stem in memory. Every value must be equal (`==`).
"""

import json
import os
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from rouge_score.rouge_scorer import RougeScorer

from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.rouge import RougeL

from .command_line import command_line
from .rows import make_rows, set_threads, write

Pairs = tuple[list[str], list[list[str]]]  # predictions, references


def read_references(folder: Path | None) -> list[list[str]]:
    """References of every row of the folder's json lines, or of the quickstart's rows."""
    if folder is None:
        return [[row["output"]] for row in make_quickstart_rows(2000, seed=9)]
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    given = [row.get("references") or row["output"] for row in rows]
    return [[texts] if isinstance(texts, str) else texts for texts in given]


def make_pairs(references: Sequence[list[str]], count: int, seed: int = 0) -> Pairs:
    """Predictions and references; the same for the same arguments."""
    draw = random.Random(seed)
    wanted = [references[n % len(references)] for n in range(count)]
    predictions = []
    for n, texts in enumerate(wanted):
        words = draw.choice(draw.choice(references) if n % 4 == 0 else texts).split()
        if n % 4:
            words = [w.upper() if draw.random() < 0.2 else w for w in words if draw.random() < 0.7]
        if n % 4 == 1:
            draw.shuffle(words)
        predictions.append(" ".join(words))
    return predictions, wanted


def seconds(pairs: Pairs, workers: int) -> tuple[float, float]:
    """Of one `score_all`: wall clock, and the CPU time of the busier process, which it is where each has its core."""

    def cpu(who: int) -> float:
        used = resource.getrusage(who)
        return used.ru_utime + used.ru_stime

    whos = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    start, before = time.perf_counter(), [cpu(who) for who in whos]
    RougeL("rouge").score_all(*pairs, workers=workers)
    return time.perf_counter() - start, max(cpu(who) - was for who, was in zip(whos, before))


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("SRD_FAST_DATA"), help="a folder of .jsonl files")
    parser.add_argument("--pairs", type=int, default=11_000)
    parser.add_argument("--processes-up-to", type=int, default=200_000, help="pairs of the last table; 0: no table")
    args = parser.parse_args()
    set_threads()
    source = "real" if args.data else "quickstart"
    references = read_references(args.data)
    predictions, wanted = make_pairs(references, args.pairs)
    theirs, ours = RougeScorer(["rougeL"], use_stemmer=True), RougeL("rouge")
    expected: list[float] = []
    found: list[float] = []
    time_of_theirs = time_of_ours = 0.0
    for first in range(0, args.pairs, 500):
        part = predictions[first : first + 500], wanted[first : first + 500]
        start = time.perf_counter()
        expected += [max(theirs.score(r, p)["rougeL"].fmeasure for r in texts) for p, texts in zip(*part)]
        time_of_theirs += time.perf_counter() - start
        start = time.perf_counter()
        found += ours.score_all(*part)
        time_of_ours += time.perf_counter() - start
    different = sum(a != b for a, b in zip(expected, found))
    if different:
        raise SystemExit(f"{different} of {args.pairs} values differ from rouge-score's")
    words = sum(len(p.split()) for p in predictions) / args.pairs
    print(f"{args.pairs} pairs, {words:.0f} words a prediction, mean {sum(found) / args.pairs:.3f}, all values equal")
    print(f"rouge-score {time_of_theirs:.2f} s, srd-fast {time_of_ours:.2f} s: {time_of_theirs / time_of_ours:.0f}x")
    figures = {
        "rouge-score": {"seconds": time_of_theirs},
        "srd-fast": {"seconds": time_of_ours, "different_values": different},
    }
    packages = {"rouge-score": "rouge-score", "srd-fast": "srd-fast"}
    shape = f"{args.pairs} pairs, {source}"
    write(make_rows("rouge", figures, shape=shape, dtype="", packages=packages), args.results)
    counts = [n for n in (25_000, 50_000, 100_000, 200_000) if n <= args.processes_up_to]
    if not counts:
        return
    print("| pairs | one process, s (CPU) | two, s (CPU of the busier) |\n|---|---|---|")
    for count in counts:
        pairs = make_pairs(references, count, seed=1)
        rounds = [(seconds(pairs, 1), seconds(pairs, 2)) for _ in range(3)]
        (one, cpu), (two, busier) = (map(min, zip(*column)) for column in zip(*rounds))
        print(f"| {count} | {one:.2f} ({cpu:.2f}) | {two:.2f} ({busier:.2f}) |", flush=True)
        figures = {
            "one process": {"seconds": one, "cpu_seconds": cpu},
            "two processes": {"seconds": two, "cpu_seconds": busier},
        }
        shape, packages = f"{count} pairs, {source}, score_all", dict.fromkeys(figures, "srd-fast")
        write(make_rows("rouge", figures, shape=shape, dtype="", packages=packages), args.results)


if __name__ == "__main__":
    main()
