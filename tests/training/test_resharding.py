"""A training in FSDP2 that goes on with another number of processes: two, then four, then one, against one alone.

This file is also the program of those processes, with the student and the trainer of `test_sharded.py`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import test_sharded as sharded
import torch
from tiny import assert_same

pytestmark = pytest.mark.slow
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "head gathered": {"head_in_shards": False, "architecture": "phi"},
    "adapters": {"lora": True, "architecture": "llama_untied"},
}
# Processes, and the step at which each start ends.
STARTS = ((2, 4), (4, 8), (1, sharded.STEPS))


def worker(folder: Path, begin: int, end: int) -> None:
    """Train each case from one checkpoint to the next, or to the end."""
    from transformers import TrainerCallback

    class Until(TrainerCallback):
        """Stops at a step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == end

    torch.set_num_threads(1)
    for name, case in CASES.items():
        trainer = sharded.made(folder / name, int(os.environ["WORLD_SIZE"]), "fsdp2", save_strategy="steps", **case)
        trainer.add_callback(Until())
        trainer.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{begin}") if begin else None)
        assert trainer.state.global_step == end
        if end == sharded.STEPS:
            trainer.save_student(folder / name / "student")
    torch.distributed.destroy_process_group()


def test_a_training_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    begin = 0
    for world, end in STARTS:
        processes = sharded.start_ranks(tmp_path, world, [str(begin), str(end)], __file__)
        try:
            statuses = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert statuses == [0] * world, "\n".join((tmp_path / f"rank{r}.txt").read_text()[-3000:] for r in range(world))
        begin = end
    for name, case in CASES.items():
        expected = sharded.train(tmp_path / "alone" / name, 1, engine="one", evaluate_first=False, **case)["student"]
        found = load_file(tmp_path / name / "student" / "model.safetensors")
        assert found.keys() == expected.keys()
        for weight, x in expected.items():
            assert_same(found[weight], x, 1e-5, weight)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
