"""For a GPU that one has for some minutes: the steps, losses and limits that no row has yet, ended in time.

    python -m benchmarks.gpu_session --seconds 840 --results OUT                # call again: it goes on
    python -m benchmarks.gpu_session --seconds 290 --results OUT --only orders limits loss      # the loss alone
    python -m benchmarks.gpu_session --seconds 840 --results OUT --tests 180    # `pytest -m gpu` before
    python -m benchmarks.gpu_session --seconds 300 --results OUT --only steps --batches 8 16

What it does not know goes to `benchmarks.train_gpu`. Each part is a process with a limit. Copy the committed rows to
OUT first where they are of the same GPU. The checkout need not be installed.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from .child import ROOT, run_limited
from .rows import Row, read

LOSSES = ("forward_kl, T = 1", "jsd", "skew_reverse_kl + CE")
DTYPES = ("bfloat16", "float32")
SHAPES = ("qwen2.5", "gemma3", "llama3", "smollm2")
# GiB under which the largest number of rows is searched.
LIMITED = {"gemma3-4b": (4, 6, 8), "gemma3": (4, 6), "smollm2": (4, 6)}
GIB = (4, 6)  # of a shape that is not among these
PARTS = ["orders", "steps", "loss", "limits"]
# To end what runs and to leave.
LAST_SECONDS = 15.0
# Of a process of losses and of limits, before one was run.
FIRST_SECONDS = {"loss": 60.0, "limits": 150.0}
ABOUT = "import json, sys, torch; from benchmarks.rows import device_name, set_threads; "
ABOUT += "print(json.dumps([device_name(sys.argv[1]), set_threads(), torch.__version__]))"


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Let child processes know the version of a checkout that is not installed."""
    with contextlib.ExitStack() as stack:
        try:
            importlib.metadata.version("srd-fast")
        except importlib.metadata.PackageNotFoundError:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]  # type: ignore[index]
            about = Path(folder) / f"srd_fast-{version}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: srd-fast\nVersion: {version}\n", "utf-8")
            path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
            stack.enter_context(mock.patch.dict(os.environ, {"PYTHONPATH": path}))
        yield


class Session:
    """Parts one after the other, none beyond the end."""

    def __init__(self, args: argparse.Namespace, rest: list[str]) -> None:
        self.args, self.rest, self.results = args, rest, args.results.resolve()
        self.end = time.monotonic() + args.seconds - LAST_SECONDS
        self.results.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def run(self, module: str, *options: str, most: float = float("inf"), log: Path | None = None) -> None:
        """A module in a process of its own, until it is done or the time is up."""
        began, limit = time.monotonic(), min(most, self.left)
        print(f"\n[{self.args.seconds - LAST_SECONDS - self.left:.0f} s] {module} {' '.join(options)}", flush=True)
        status = run_limited([sys.executable, "-m", module, *options], limit, log)
        how = {0: "done", None: "ended, its time was up"}.get(status, f"exit status {status}")
        print(f"{module}: {how} after {time.monotonic() - began:.0f} s", flush=True)

    def tests(self) -> None:
        """The tests that need a GPU; what they print goes to a file beside the rows."""
        log = self.results / "tests.txt"
        workers = str(min(15, os.cpu_count() or 1))
        self.run("pytest", "-q", "-n", workers, "-m", "gpu", most=self.args.tests, log=log)
        print("\n".join(log.read_text("utf-8", errors="replace").splitlines()[-5:]))

    def steps(self) -> None:
        """`benchmarks.train_gpu`, which ends in time by itself."""
        options = ["--seconds", f"{self.left - LAST_SECONDS:.0f}", "--device", self.args.device]
        self.run("benchmarks.train_gpu", *options, "--results", str(self.results), *self.rest)

    def orders(self) -> None:
        """`benchmarks.orders`, which ends in time by itself and writes its rows as they come."""
        options = ["--seconds", f"{self.left - LAST_SECONDS:.0f}", "--device", self.args.device]
        shapes = ["--shapes", *self.args.shapes] if self.args.shapes else []
        self.run("benchmarks.orders", *options, *shapes, "--results", str(self.results))

    def rows(self, benchmark: str) -> list[Row]:
        """Of this device, as many threads, and this version of torch."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "about"
            run_limited([sys.executable, "-c", ABOUT, self.args.device], self.left, log)
            said = log.read_text("utf-8")
        try:
            here = tuple(json.loads(said.splitlines()[-1]))
        except (IndexError, ValueError):
            raise SystemExit(f"the device does not answer: {said[-1000:]}") from None
        name = f"{benchmark}_gpu" if self.args.device == "cuda" else benchmark
        return [r for r in read(self.results / f"{name}.csv") if (r.device, r.threads, r.torch) == here]

    def each(self, benchmark: str, missing: list[list[str]]) -> None:
        """A process for each part that is missing, as long as one like it would end in time."""
        expected = FIRST_SECONDS[benchmark]
        for i, options in enumerate(missing):
            if self.left < expected:
                print(f"{benchmark}: no time for {len(missing) - i} more; call again for them", flush=True)
                return
            began = time.monotonic()
            common = ["--device", self.args.device, "--results", str(self.results)]
            self.run(f"benchmarks.{benchmark}", *options, *common)
            expected = max(expected if i else 0.0, time.monotonic() - began)

    def loss(self) -> None:
        """Every loss, dtype and shape by itself."""
        known = {(r.shape.split()[0], r.dtype, r.case) for r in self.rows("loss")}
        wanted = [(s, d, x) for d in DTYPES for s in self.args.shapes or SHAPES for x in LOSSES]
        missing = [["--shapes", s, "--dtypes", d, "--losses", x] for s, d, x in wanted if (s, d, x) not in known]
        self.each("loss", missing)

    def limits(self) -> None:
        """Every shape with the limits that are missing."""
        known = {(r.shape.split()[0], r.case) for r in self.rows("limits")}
        missing = []
        for shape in self.args.shapes or LIMITED:
            gib = [str(g) for g in LIMITED.get(shape, GIB) if (shape, f"{g:g} GiB") not in known]
            if gib:
                missing.append(["--shapes", shape, "--limits", *gib, "--most", str(self.args.most), "--jobs", "8"])
        self.each("limits", missing)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="everything has ended by then")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tests", type=float, default=0.0, help="seconds for `pytest -m gpu`; 0: none")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to try this out")
    parser.add_argument("--shapes", nargs="+", help="of losses and limits, instead of the usual ones")
    parser.add_argument("--most", type=int, default=131072, help="rows at which the search for limits ends")
    args, rest = parser.parse_known_args()
    # Whoever ends this process ends the part that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    session = Session(args, rest)
    with importable():
        if args.tests:
            session.tests()
        for part in args.only:
            if session.left > LAST_SECONDS:
                getattr(session, part)()
    print(f"\nended with {session.left + LAST_SECONDS:.0f} s to spare", flush=True)


if __name__ == "__main__":
    main()
