"""The figures of a finished quickstart as rows: `srd-fast run examples/quickstart.yaml`, then

python -m benchmarks.quickstart [runs/quickstart]
"""

import json
from pathlib import Path

from .command_line import command_line
from .rows import make_rows, set_threads, write


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/quickstart"))
    args = parser.parse_args()
    set_threads()
    summary = json.loads((args.folder / "summary.json").read_text(encoding="utf-8"))
    metrics = ("rouge_l", "cross_entropy", "kl")
    figures = {
        name: {m: found[m] for m in metrics if found[m] is not None} for name, found in summary["evaluation"].items()
    }
    figures["run"] = {"seconds": sum(summary["timings"].values())}
    data = summary["data"]
    shape = f"{data['train']} rows, {data['validation']} held out"
    packages = dict.fromkeys(figures, "srd-fast")
    dtype = summary["environment"]["dtype"]
    write(make_rows("quickstart", figures, shape=shape, dtype=dtype, packages=packages), args.results)


if __name__ == "__main__":
    main()
