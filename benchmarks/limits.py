"""The largest batch whose loss and gradients fit under a limit of memory: ours and its rivals'.

    python -m benchmarks.limits                                  # 4, 6 and 8 GiB, V = 49,152 and 262,144, bfloat16
    python -m benchmarks.limits --limits 4 --shapes smollm2
    python -m benchmarks.limits --device cuda --most 131072 --jobs 8

The limit is on the address space of a process (RLIMIT_AS, as `ulimit -v`), on a GPU on what PyTorch's allocator may
take there, of a process that imports PyTorch and the provider, makes hidden states and both heads, and runs forward and
backward of the JSD: models and optimizer would come on top. Rows are powers of two times 64; `--most` ends the search,
so a provider at that number may well take more. 0 says that not even 64 rows fit. A provider that fits under one limit
fits under a larger one and is not run again.
"""

import argparse
import json
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from .command_line import command_line
from .problem import LOSSES, SHAPES, Loss, Problem, Shape
from .providers import NOT_THE_LOSS, PACKAGES, PROVIDERS
from .rows import make_rows, set_threads, write

LEAST = 64
NOT_INSTALLED = 3


def run_once(name: str, shape: Shape, dtype: torch.dtype, device: str, loss: Loss, limit: int) -> None:
    """One step in this process under the limit."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    p = Problem.make(shape, dtype, device, loss)
    try:
        step = PROVIDERS[name](p)
    except (ImportError, NotImplementedError) as error:
        print(" ".join(str(error).split()))
        sys.exit(NOT_INSTALLED)
    step()


def fits(name: str, shape: Shape, dtype: str, device: str, loss: Loss, limit: int) -> bool:
    """Whether a fresh process gets through. Raises LookupError where the provider does not take part."""
    arguments = json.dumps([name, vars(shape), dtype, device, vars(loss), limit])
    command = [sys.executable, "-m", "benchmarks.limits", "--once", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == NOT_INSTALLED:
        raise LookupError(done.stdout.strip())
    return done.returncode == 0


def largest(name: str, shape: Shape, dtype: str, device: str, loss: Loss, limit: int, least: int, most: int) -> int:
    """The largest number of rows that fits: `least` is known to (or 0). Raises LookupError as `fits`."""
    sizes = [n for n in (LEAST << k for k in range(20)) if least < n <= most]
    while sizes:
        middle = len(sizes) // 2
        if fits(name, replace(shape, N=sizes[middle]), dtype, device, loss, limit):
            least, sizes = sizes[middle], sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return least


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--limits", type=float, nargs="+", default=[4, 6, 8], help="GiB, ascending")
    parser.add_argument("--shapes", nargs="+", default=["smollm2", "gemma3"], choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="providers tried side by side, where memory allows")
    parser.add_argument("--loss", default="jsd", choices=list(LOSSES))
    parser.add_argument("--most", type=int, default=8192, help="rows at which the search ends")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS))
    parser.add_argument("--once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_threads()
    if args.once:
        name, sizes, dtype, device, loss, limit = json.loads(args.once)
        run_once(name, Shape(**sizes), getattr(torch, dtype), device, Loss(**loss), int(limit))
        return
    names = args.providers or [n for n in PROVIDERS if n not in NOT_THE_LOSS]
    loss = LOSSES[args.loss]
    for shape_name in args.shapes:
        shape, known = SHAPES[shape_name], dict.fromkeys(names, 0)
        left_out: dict[str, str] = {}
        sizes = f"{shape_name} V={shape.V} D={shape.D_S}/{shape.D_T}, {loss}"
        for gib in args.limits:
            search = partial(largest, shape=shape, dtype=args.dtype, device=args.device, loss=loss, most=args.most)
            with ThreadPoolExecutor(args.jobs) as pool:
                tried = {n: pool.submit(search, n, limit=int(gib * 2**30), least=rows) for n, rows in known.items()}
            known = {}
            for name, done in tried.items():
                try:
                    known[name] = done.result()
                except LookupError as error:
                    left_out[name] = str(error)
            figures = {name: {"largest_rows": rows, "searched_to": args.most} for name, rows in known.items()}
            for name, rows in known.items():
                print(f"{sizes}, {args.dtype}, {gib:g} GiB, {name}: {rows} rows", flush=True)
            for name, reason in left_out.items():
                print(f"{sizes}, {args.dtype}, {gib:g} GiB, {name} left out: {reason}", flush=True)
            options = {"case": f"{gib:g} GiB", "shape": sizes, "dtype": args.dtype, "device": args.device}
            benchmark = "limits_gpu" if args.device == "cuda" else "limits"
            write(make_rows(benchmark, figures, packages=PACKAGES, left_out=left_out, **options), args.results)


if __name__ == "__main__":
    main()
