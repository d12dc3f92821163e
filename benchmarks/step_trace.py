"""What a GPU did in some training steps, from the trace that `torch.profiler` exports."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Calls in which the host waits for the device. Copies without "Async" in their names wait too; those to pageable
# memory that PyTorch waits for are followed by cudaStreamSynchronize.
WAITS = frozenset(
    {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpy2D"}
    | {"cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"}
)
ALLOCATIONS = frozenset({"cudaMalloc", "cudaFree", "cuMemCreate", "cuMemRelease"})
CALLS = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class StepTrace:
    """Means of a step. busy_seconds: some kernel was running. most_expensive: (name, seconds, kernels) by seconds."""

    busy_seconds: float
    kernels: float
    waits: Mapping[str, float]
    allocations: float
    most_expensive: Sequence[tuple[str, float, float]]

    @property
    def synchronisations(self) -> float:
        """All waits."""
        return sum(self.waits.values())


def union_length(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the line the spans (begin, end) cover."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def summarise(events: Iterable[Mapping[str, Any]], steps: int, top: int = 10) -> StepTrace:
    """Of the `traceEvents` of a trace of so many steps."""
    timed = [e for e in events if e.get("ph") == "X"]
    kernels = [e for e in timed if e.get("cat") == "kernel"]
    calls = [e for e in timed if e.get("cat") in CALLS]
    # The profiler itself waits for the device before it begins and when it stops.
    work = [e["ts"] for e in calls if "Launch" in e["name"] or "Async" in e["name"]]
    first, last = min(work, default=0.0), max(work, default=0.0)
    own = [e for e in calls if e["name"] != "cudaDeviceSynchronize" or first <= e["ts"] <= last]
    waits = Counter(e["name"] for e in own if e["name"] in WAITS)
    seconds: Counter[str] = Counter()
    for e in kernels:
        seconds[e["name"]] += e["dur"] * 1e-6
    counts = Counter(e["name"] for e in kernels)
    return StepTrace(
        busy_seconds=union_length((e["ts"], e["ts"] + e["dur"]) for e in kernels) * 1e-6 / steps,
        kernels=len(kernels) / steps,
        waits={name: n / steps for name, n in waits.most_common()},
        allocations=sum(e["name"] in ALLOCATIONS for e in calls) / steps,
        most_expensive=[(name, s / steps, counts[name] / steps) for name, s in seconds.most_common(top)],
    )


def as_text(trace: StepTrace) -> str:
    """For a reader."""
    lines = [f"a step: GPU busy {1e3 * trace.busy_seconds:.2f} ms, {trace.kernels:.0f} kernels"]
    lines.append(f"waits: {', '.join(f'{name} {n:.1f}' for name, n in trace.waits.items()) or 'none'}")
    lines.append(f"calls of cudaMalloc and cudaFree: {trace.allocations:.1f}\n")
    lines += [f"{1e3 * s:9.3f} ms {n:8.1f} x  {name}" for name, s, n in trace.most_expensive]
    return "\n".join(lines) + "\n"
