"""Which checkpoint a training goes on from, and which engines can go on from it.

`test_sharded.py` and `test_sharded_long.py` resume real ones. The names here are
those that accelerate and DeepSpeed write.
"""

from pathlib import Path

import pytest
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.constants import FSDP_MODEL_NAME

from srd_fast.errors import UserError
from srd_fast.training.checkpoints import check_engine, last_whole_checkpoint, saved_ranks

FILES = {
    "none": [],
    "FSDP in shards": [f"{FSDP_MODEL_NAME}_0/__0_0.distcp"],
    "FSDP whole": [f"{FSDP_MODEL_NAME}.bin"],
    "DeepSpeed": ["latest", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt"],
}


def checkpoint(folder: Path, saved_by: str, ranks: int = 2) -> Path:
    for name in [*FILES[saved_by], *(f"rng_state_{i}.pth" for i in range(ranks))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def plugin(kind: str) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)


IN_SHARDS, WHOLE = "SHARDED_STATE_DICT", "FULL_STATE_DICT"


@pytest.mark.parametrize(
    ("saved_by", "fsdp", "deepspeed", "ranks"),
    [
        ("none", None, False, 2),
        ("none", None, False, 1),
        ("FSDP in shards", IN_SHARDS, False, 2),
        ("FSDP in shards", IN_SHARDS, False, 4),
        ("FSDP in shards", IN_SHARDS, False, 1),
        ("FSDP whole", WHOLE, False, 4),
        ("DeepSpeed", None, True, 2),
    ],
)
def test_a_checkpoint_of_the_same_engine_goes_on(
    saved_by: str, fsdp: str | None, deepspeed: bool, ranks: int, tmp_path: Path
) -> None:
    check_engine(checkpoint(tmp_path, saved_by), None if fsdp is None else plugin(fsdp), deepspeed, ranks)


@pytest.mark.parametrize(
    ("saved_by", "fsdp", "deepspeed", "ranks", "said"),
    [
        ("none", IN_SHARDS, False, 2, "without FSDP or DeepSpeed on 2 processes, and this training runs by FSDP"),
        ("none", None, True, 2, "without FSDP or DeepSpeed on 2 processes, and this training runs by DeepSpeed"),
        ("FSDP in shards", None, False, 1, "was saved by FSDP on 2 processes, and this training runs without it"),
        ("FSDP whole", None, True, 2, "was saved by FSDP on 2 processes, and this training runs by DeepSpeed"),
        ("DeepSpeed", IN_SHARDS, False, 2, "was saved by DeepSpeed on 2 processes, and this training runs by FSDP"),
        ("DeepSpeed", None, False, 2, "was saved by DeepSpeed on 2 processes, and this training runs without it"),
        ("FSDP in shards", WHOLE, False, 2, "as SHARDED_STATE_DICT: set fsdp_config's state_dict_type to that"),
        ("FSDP whole", IN_SHARDS, False, 2, "as FULL_STATE_DICT: set fsdp_config's state_dict_type to that"),
        ("DeepSpeed", None, True, 4, "by DeepSpeed on 2 processes, and cannot go on with 4: start as many"),
    ],
)  # fmt: skip
def test_another_engine_or_number_is_refused_with_the_way_out(
    saved_by: str, fsdp: str | None, deepspeed: bool, ranks: int, said: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, saved_by)
    with pytest.raises(UserError) as told:
        check_engine(folder, None if fsdp is None else plugin(fsdp), deepspeed, ranks)
    assert str(told.value).startswith(f"resume_from_checkpoint: {str(folder)!r} ")
    assert said in str(told.value)


def test_what_is_no_folder_is_left_to_the_trainer(tmp_path: Path) -> None:
    check_engine(tmp_path / "nothing", None, True, 4)


def test_the_last_checkpoint_that_was_written_completely(tmp_path: Path) -> None:
    """Numbers are compared as numbers. One whose last file is missing or cut short, or of weights alone, does not
    count."""
    assert last_whole_checkpoint(tmp_path) is None
    for step, state, kept in (
        (9, "{}", "rng_state.pth"), (10, "{}", "rng_state_0.pth"), (11, '{"global_', "rng_state.pth"),
        (12, None, "rng_state.pth"), (13, "{}", "model.safetensors"),
    ):  # fmt: skip
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / kept).touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_one_process_leaves_one_state_of_random_numbers(tmp_path: Path) -> None:
    assert saved_ranks(checkpoint(tmp_path, "none", ranks=0)) == 1
    assert saved_ranks(checkpoint(tmp_path, "none", ranks=3)) == 3
