"""Options that several benchmarks share."""

import argparse
import os
from pathlib import Path

from .rows import RESULTS


def command_line(text: str | None, data: bool = False) -> argparse.ArgumentParser:
    """Make the parser of a benchmark, with the folder of its results.

    Args:
        text: the benchmark's docstring, which becomes its help.
        data: with the rows that it runs on, `--data` and `--rows`.

    Returns:
        The parser, for further options.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        given = os.environ.get("SRD_FAST_DATA")
        parser.add_argument("--data", type=Path, default=given, help="default: quickstart's rows")
        parser.add_argument("--rows", type=int, help="only the first so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    return parser
