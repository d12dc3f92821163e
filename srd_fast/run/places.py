"""Where a run may write: not over files of others, and not over what it reads."""

import os
from collections.abc import Iterable
from pathlib import Path

from ..data import source_path
from ..errors import UserError
from .config import RunConfig


def check_places(config: RunConfig, written: Iterable[str]) -> None:
    """Refuse a run that would write over files of others, or over what it reads.

    Args:
        config: the run's config.
        written: names of the files and folders that the run writes in its folder.

    Raises:
        UserError: the folder has files with the names of a run's, and no run has been there; or a model or data file is
            one of them.
    """
    folder, names = Path(config.output_dir), sorted(written)
    if not ((folder / "steps.json").exists() or any(folder.glob(".lock*"))):
        found = [name for name in names if os.path.lexists(folder / name)]
        if found:
            raise UserError(
                f"config: output_dir: {str(folder)!r} has {', '.join(found)}, which no run has made and this one would "
                "write over; give another folder"
            )
    for key in ("teacher", "student", "data", "validation"):
        value = getattr(config, key)
        read = source_path(value) if isinstance(value, str) else None
        if read is None:
            continue
        for name in names:
            # A start is made only where no student is given.
            if name != "start" and read.resolve().is_relative_to(folder.resolve() / name):
                raise UserError(
                    f"config: {key}: {str(value)!r} is inside of {str(folder / name)!r}, which the run writes; give "
                    "another output_dir"
                )
