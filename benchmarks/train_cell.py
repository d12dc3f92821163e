"""One cell of `benchmarks.train_gpu` in this process, which does nothing else; the answer goes to a file as JSON.

Out of memory is an answer, and so is that a side cannot; every other error is the exit status and a traceback.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .plan import OPTIMIZER
from .rows import device_name, set_threads, spread, version_of
from .sides import SIDES, import_files
from .step_trace import as_text
from .watch import StepWatch

FILLED = "filled.json"
# Losses of so many steps are kept: they depend least on the order of sums.
COMPARED_STEPS = 3


def about(device: str) -> dict[str, Any]:
    """What rows say of the machine, and of every side whether it reads a cache, its version, and why it is left out."""
    sides = {}
    for name, side in SIDES.items():
        reason = side.needs(device)
        sides[name] = {"cached": side.cached, "reason": reason, "version": reason or version_of(side.package)}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sides": sides,
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was what lacked, whoever says so: the allocator, cuBLAS, or a compiler that wraps either."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "STATUS_ALLOC_FAILED" in said


def fill(pair: str, count: int, device: str, folder: Path) -> None:
    """Teacher rows of the pair's first samples, on disk; its seconds and tokens beside them."""
    from srd_fast.teacher import build_teacher_cache

    from .pairs import PAIRS, random_model, samples

    teacher = random_model(PAIRS[pair].teacher, torch.bfloat16, device).eval()
    rows = samples(PAIRS[pair].student.vocab_size, count)
    known = json.loads((folder / FILLED).read_text("utf-8")) if (folder / FILLED).exists() else {"count": 0}
    began = time.perf_counter()
    build_teacher_cache(teacher, rows, folder / "cache", progress=False, batch_tokens=16384)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, rows["input_ids"][known["count"] :]))
    (folder / FILLED).write_text(json.dumps({"count": count, "seconds": seconds, "tokens": tokens}), "utf-8")


def measure(
    pair: str, batch: int, name: str, steps: tuple[int, int, int], device: str, cache: Path | None
) -> tuple[dict[str, float], str]:
    """Figures of a cell, and what a reader may want to know beyond. steps: of warm-up, timed, profiled."""
    from .pairs import PAIRS
    from .training import Setup

    side = SIDES[name]
    with tempfile.TemporaryDirectory() as folder:
        watch = StepWatch(device, *steps, Path(folder))
        setup = Setup(PAIRS[pair], batch, watch.steps, device, cache / "cache" if cache else None, Path(folder))
        trainer, losses = side.train(setup, watch)
        trace = watch.trace()
    figures: dict[str, float] = {"fits": 1}
    if watch.peak_bytes is not None:
        figures["peak_bytes"] = watch.peak_bytes
    figures |= {f"loss@{n + 1}": float(x) for n, x in enumerate(losses[:COMPARED_STEPS])}
    if not watch.timed:
        return figures, ""
    order, rows = list(trainer.curriculum.indices()), trainer.train_dataset
    size = [len(rows[i]["input_ids"]) for i in order]  # type: ignore[index]
    with_loss = [sum(x != -100 for x in rows[i]["labels"]) for i in order]  # type: ignore[index]
    timed = slice(batch * watch.warmup, batch * (watch.warmup + watch.timed))
    seconds = watch.seconds()
    figures |= spread("step_seconds", seconds)
    figures["tokens_per_second"] = sum(size[timed]) / sum(seconds)
    figures["loss_tokens_per_second"] = sum(with_loss[timed]) / sum(seconds)
    if cache is not None:
        filled = json.loads((cache / FILLED).read_text("utf-8"))
        figures["fill_seconds"] = filled["seconds"] / filled["tokens"] * sum(size)
    notes = [f"{OPTIMIZER}; tokens of the timed steps: {sum(size[timed])}, with loss {sum(with_loss[timed])}"]
    if trace is not None:
        # The profiled steps have other samples than the timed ones: a token's share is carried over.
        profiled = size[timed.stop :]
        busy = trace.busy_seconds * watch.profiled / sum(profiled) * sum(size[timed]) / watch.timed
        figures["gpu_busy_seconds"] = busy
        figures["gpu_busy_share"] = busy * watch.timed / sum(seconds)
        figures["kernels"] = trace.kernels
        figures["synchronisations"] = trace.synchronisations
        figures["allocations"] = trace.allocations
        notes.append(as_text(trace))
    return figures, "\n".join(notes)


def main() -> None:
    """Command line of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="JSON: what to do")
    parser.add_argument("answer", type=Path)
    args = parser.parse_args()
    task: dict[str, Any] = json.loads(args.task)
    set_threads()
    import_files(map(Path, task["imports"]))
    answer: dict[str, Any] = {}
    try:
        if task["do"] == "about":
            answer = about(task["device"])
        elif task["do"] == "fill":
            fill(task["pair"], task["count"], task["device"], Path(task["folder"]))
        else:
            cache = Path(task["folder"]) if SIDES[task["side"]].cached else None
            figures, notes = measure(task["pair"], task["batch"], task["side"], task["steps"], task["device"], cache)
            answer = {"figures": figures, "notes": notes}
    except NotImplementedError as reason:
        answer = {"reason": str(reason)}
    except Exception as error:
        if task["do"] != "measure" or not out_of_memory(error):
            raise
        answer = {"figures": {"fits": 0}, "notes": f"out of memory: {error}"}
    args.answer.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
