"""Finds the checkpoint that a run goes on from."""

import json
from pathlib import Path


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written completely, or None. The Trainer writes trainer_state.json last."""
    whole = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if _is_json(p)]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _is_json(path: Path) -> bool:
    """Whether a file is complete JSON. On a full disk it is cut short."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
