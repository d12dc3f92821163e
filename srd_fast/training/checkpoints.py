"""Find the checkpoint to resume from, and check that this training can resume from it."""

import json
from pathlib import Path
from typing import Any

from ..errors import UserError

# The names under which the Trainer and accelerate save an FSDP model: a folder of shards, or one file.
_SHARDS, _WHOLE = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin"


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written completely and from which training can resume, or None.

    The Trainer writes trainer_state.json last, and with `save_only_model` leaves out the states of the random number
    generators and the optimizer. Resuming from weights alone would give another student.
    """
    written = [p.parent for p in folder.glob("checkpoint-*/trainer_state.json") if _is_json(p)]
    whole = [p for p in written if any(p.glob("rng_state*.pth"))]
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def check_engine(checkpoint: Path, fsdp: Any, deepspeed: bool, ranks: int) -> None:
    """Refuse a checkpoint of another engine (FSDP, DeepSpeed, none), or one for another number of processes.

    FSDP's shards and checkpoints without an engine can be resumed with any number of processes.

    Args:
        checkpoint: the folder.
        fsdp: accelerate's FSDP plugin, or None.
        deepspeed: whether DeepSpeed trains.
        ranks: the number of processes.

    Raises:
        UserError: this training cannot resume from the checkpoint.
    """
    if not checkpoint.is_dir():
        return
    saved = saved_ranks(checkpoint)
    of_fsdp = (checkpoint / _SHARDS).is_dir() or (checkpoint / _WHOLE).is_file()
    of_deepspeed = (checkpoint / "latest").is_file()
    engine = "FSDP" if fsdp is not None else "DeepSpeed" if deepspeed else None
    found = "FSDP" if of_fsdp else "DeepSpeed" if of_deepspeed else None
    where = f"resume_from_checkpoint: {str(checkpoint)!r} was saved"
    if engine != found:
        raise UserError(
            f"{where} {f'by {found}' if found else 'without FSDP or DeepSpeed'} on {saved} processes, and this training"
            f" runs {f'by {engine}' if engine else 'without it'}: go on as it began, or start from the saved student"
        )
    if found == "FSDP":
        kind = "SHARDED_STATE_DICT" if (checkpoint / _SHARDS).is_dir() else "FULL_STATE_DICT"
        wanted = getattr(fsdp.state_dict_type, "name", str(fsdp.state_dict_type))
        if ("SHARDED" in kind) != ("SHARDED" in wanted):
            raise UserError(f"{where} as {kind}: set fsdp_config's state_dict_type to that instead of {wanted}")
    if found == "DeepSpeed" and saved != ranks:
        raise UserError(
            f"{where} by DeepSpeed on {saved} processes, and cannot go on with {ranks}: start as many, or take FSDP2, "
            "whose SHARDED_STATE_DICT goes on with any number"
        )


def saved_ranks(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint: each saves the state of its random number generators."""
    return max(1, len(list(checkpoint.glob("rng_state_*.pth"))))


def _is_json(path: Path) -> bool:
    """Whether a file is complete JSON. On a full disk it is cut short."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
