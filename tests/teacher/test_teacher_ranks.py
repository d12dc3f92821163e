"""Three processes (gloo, on the CPU): a teacher in shards, a cache filled by all, and a teacher on ranks of its own.

This file is also the program of those processes: `python test_teacher_ranks.py FOLDER` with RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT set, as torchrun sets them. One start runs all cases. Shards are made by `fully_shard` and
by `tp_plan`, as users make them; nothing is declared in place of accelerate.
"""

import gc
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import Ranks, free_ports
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from srd_fast.models import find_head, hidden_states, model_digest
from srd_fast.teacher import TeacherCache

WORLD = 3
SAMPLES = tiny.tiny_samples(26, seed=2, longest=20)
VALIDATION = tiny.tiny_samples(5, seed=5)
SHARD_BYTES = 4000
Results = dict[str, Any]
pytestmark = pytest.mark.long


def teacher(architecture: str = "llama_untied") -> PreTrainedModel:
    """Heads and vocabulary that three processes can divide."""
    sizes = {} if architecture == "gpt2" else {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8}
    return tiny.tiny_model(architecture, seed=1, width=24, **sizes)


def fully_sharded(model: PreTrainedModel, mesh: Any = None) -> Any:
    from torch.distributed.fsdp import fully_shard

    options = {} if mesh is None else {"mesh": mesh}
    for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batch_of(rank: int) -> dict[str, Tensor]:
    """Each rank has samples of its own, of other shapes than the others'."""
    return tiny.collate(SAMPLES[3 * rank : 3 * rank + 2 + rank])


def looked_at(model: Any) -> Results:
    from srd_fast.models import model_digest
    from srd_fast.teacher import LiveTeacher

    digest, live = model_digest(model), LiveTeacher(model)
    batches = batch_of(dist.get_rank()), batch_of(0)  # different on each rank, then alike
    states = [live.hidden_states(batch).clone() for batch in (*batches, batches[0])]
    return {"digest": digest, "states": states, "head": live.head.tensors(), "again": model_digest(model)}


def fill(model: Any, folder: Path, **options: Any) -> Any:
    from srd_fast.teacher import build_teacher_cache

    return build_teacher_cache(model, SAMPLES, folder, shard_bytes=SHARD_BYTES, progress=False, **options)


def train(source: Any, world: int, folder: Path, **fields: Any) -> list[float]:
    """Divergences of three steps of 6 samples over all students, and the validation's."""
    from srd_fast import SRDConfig, SRDTrainer

    args = SRDConfig(
        output_dir=str(folder),
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=0.01,
        max_steps=3,
        per_device_train_batch_size=6 // world,
        **fields,
    )
    student, tokenizer = tiny.tiny_model("llama", seed=3), tiny.tiny_tokenizer()
    trainer = SRDTrainer(student, source, args, SAMPLES, eval_dataset=VALIDATION, processing_class=tokenizer)
    trainer.train()
    logged = [e["divergence"] for e in trainer.state.log_history if "divergence" in e]
    return [*logged, trainer.evaluate()["eval_kl"]]


def sharded_and_filled(folder: Path) -> Results:
    """What needs one world of all ranks."""
    from srd_fast import UserError
    from srd_fast.models import load_model
    from srd_fast.teacher import open_teacher_cache

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    every = dist.group.WORLD
    tensor_parallel = {name: load_model(str(folder / name), tp_plan="auto") for name in ("untied", "tied")}
    seen = {
        "FSDP2": looked_at(fully_sharded(teacher())),
        "FSDP2, learned positions": looked_at(fully_sharded(teacher("gpt2"))),
        "tensor parallel": looked_at(tensor_parallel["untied"]),
        "tensor parallel, tied": looked_at(tensor_parallel["tied"]),
    }
    fill(teacher(), folder / "many", group=every)
    fill(teacher(), folder / "resumed", group=every)  # begun before, by one process that was stopped
    fill(fully_sharded(teacher()), folder / "FSDP2")
    fill(tensor_parallel["untied"], folder / "tensor parallel")
    name, options = str(folder / "untied"), {"progress": False, "group": every, "student": tiny.tiny_model("llama")}
    caches = [open_teacher_cache(folder / "opened", name, SAMPLES, log_sum_exp=x, **options) for x in (False, True)]
    seen["opened"] = [len(cache) for cache in caches]
    try:
        open_teacher_cache(folder / "opened", name, SAMPLES, template="another", **options)
    except UserError as e:
        seen["stale"] = type(e).__name__
    dist.barrier()
    if rank == 1:  # one rank sees the damage in its share; all make the file again
        with next((folder / "opened").glob("rows-*")).open("r+b") as f:
            f.seek(-8, os.SEEK_END)
            f.write(b"\xff" * 8)
    dist.barrier()
    seen["mended"] = len(open_teacher_cache(folder / "opened", name, SAMPLES, repair=True, log_sum_exp=True, **options))
    for name, model in (("FSDP2", fully_sharded(teacher())), ("tensor parallel", tensor_parallel["tied"])):
        seen[f"trained, {name}"] = train(model, WORLD, folder / "out")
    seen["trained, cache"] = train(teacher(), WORLD, folder / "out", teacher_cache=str(folder / "trainers"))
    end_world()
    return seen


def end_world() -> None:
    """Forget this world, also where accelerate remembers it."""
    from accelerate.state import AcceleratorState, PartialState

    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def beside(folder: Path, environment: dict[str, str], teacher_ranks: int, port: str) -> Results:
    """A student, or two, and a teacher on the other ranks; with two of these, in shards of both."""
    from srd_fast import RemoteTeacher, UserError, serve_teacher, split_ranks

    os.environ.update(environment, MASTER_PORT=port)
    roles, seen = split_ranks(teacher_ranks), Results()
    seen["role"] = (roles.teaches, roles.students, os.environ.get("WORLD_SIZE"))
    if roles.teaches:
        model: Any = teacher()
        if teacher_ranks > 1:
            dist.init_process_group("gloo")
            model = fully_sharded(model)
        seen["batches"] = serve_teacher(model, roles)
        with pytest.raises(UserError, match="runs the teacher"):
            RemoteTeacher(roles)
    else:
        source = RemoteTeacher(roles)
        world = roles.students
        seen["padded"] = train(source, world, folder / "out", padding_free=False)
        seen["micro-batches"] = train(source, world, folder / "out", max_tokens_per_batch=40)
        source.close()
        with pytest.raises(UserError, match="trains"):
            serve_teacher(teacher(), roles)
    end_world()
    return seen


def worker(folder: Path) -> None:
    """All cases on this rank; results in FOLDER/rankN.pt."""
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at each start
    environment = dict(os.environ)
    rank, ports = environment["RANK"], environment["PORTS"].split()
    results = {
        "one world": sharded_and_filled(folder),
        "one student": beside(folder, environment, 2, ports[0]),
        "two students": beside(folder, environment, 1, ports[1]),
    }
    torch.save(results, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    teacher().save_pretrained(folder / "untied")
    teacher("llama").save_pretrained(folder / "tied")
    fill(teacher(), folder / "alone")
    # As a process leaves it that is killed after two files.
    (folder / "resumed").mkdir()
    for path in (folder / "alone" / "meta.json", *sorted((folder / "alone").glob("rows-*"))[:2]):
        shutil.copy(path, folder / "resumed")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Results]:
    """What each rank saw, case by case."""
    more = {"PORTS": " ".join(free_ports(2)), "SRD_FAST_CACHE": str(folder / "cache")}
    with Ranks(__file__, folder, WORLD, **more) as ranks:
        return ranks.results()


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, list[float]]:
    """What one process sees, with the teacher beside the student."""
    kinds = {"untied": "llama_untied", "tied": "llama"}
    return {name: train(teacher(kind), 1, folder / "out") for name, kind in kinds.items()}


SHARDED = {
    "FSDP2": "llama_untied",
    "FSDP2, learned positions": "gpt2",
    "tensor parallel": "llama_untied",
    "tensor parallel, tied": "llama",
}


@pytest.mark.parametrize("case", SHARDED)
def test_a_teacher_in_shards_gives_what_the_whole_one_gives(case: str, ranks: list[Results]) -> None:
    """Its hidden states, of each rank's own batch and of one that all have; its head; its digest."""
    model = teacher(SHARDED[case])
    head = find_head(model).tensors()
    for rank, seen in enumerate(of_rank["one world"][case] for of_rank in ranks):
        assert seen["digest"] == seen["again"] == model_digest(model)
        assert all(torch.equal(seen["head"][name], x) for name, x in head.items())
        for batch, states in zip((batch_of(rank), batch_of(0), batch_of(rank)), seen["states"], strict=True):
            with torch.no_grad():
                expected = hidden_states(model, batch)
            assert not states.requires_grad
            tiny.assert_same(states, expected, 0 if case.startswith("FSDP2") else 1e-5)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", ["many", "resumed", "FSDP2"])
def test_all_ranks_fill_what_one_process_fills_to_the_byte(case: str, folder: Path, ranks: list[Results]) -> None:
    expected = bytes_of(folder / "alone")
    assert sum(name.startswith("rows-") for name in expected) > 2 * WORLD
    assert bytes_of(folder / case) == expected


def test_tensor_parallelism_fills_the_same_files_but_for_rounding(folder: Path, ranks: list[Results]) -> None:
    names = bytes_of(folder / "alone").keys()
    assert bytes_of(folder / "tensor parallel").keys() == names
    for name in (name for name in names if name.startswith("rows-")):
        found, expected = (load_file(folder / of / name) for of in ("tensor parallel", "alone"))
        assert torch.equal(found["keys"], expected["keys"])
        tiny.assert_same(found["hidden"], expected["hidden"], 1e-5)


def test_ranks_open_check_and_mend_a_cache_together(folder: Path, ranks: list[Results]) -> None:
    for seen in (of_rank["one world"] for of_rank in ranks):
        assert (seen["opened"], seen["mended"]) == ([len(SAMPLES)] * 2, len(SAMPLES))
        assert seen["stale"] == "StaleCacheError"
    opened, alone = bytes_of(folder / "opened"), bytes_of(folder / "alone")
    assert any(name.startswith("lse-") for name in opened)
    assert not [name for name in opened if name.startswith(".")]
    assert opened["head.safetensors"] == alone["head.safetensors"]
    TeacherCache(folder / "opened")


@pytest.mark.parametrize("case", ["FSDP2", "tensor parallel", "cache"])
def test_students_beside_it_learn_what_one_learns(
    case: str, ranks: list[Results], trained: dict[str, list[float]]
) -> None:
    expected = trained["tied" if case == "tensor parallel" else "untied"]
    for seen in (of_rank["one world"] for of_rank in ranks):
        assert seen[f"trained, {case}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", ["one student", "two students"])
def test_a_teacher_on_other_ranks_is_as_one_beside(
    case: str, ranks: list[Results], trained: dict[str, list[float]]
) -> None:
    """Padded and in micro-batches, with an evaluation in between; of two teachers each has shards."""
    students = {"one student": 1, "two students": 2}[case]
    for rank, seen in enumerate(of_rank[case] for of_rank in ranks):
        teaches, size = rank >= students, WORLD - students if rank >= students else students
        assert seen["role"] == (teaches, students, None if size == 1 else str(size))
        if teaches:
            assert seen["batches"] > 2 * 3 * students
        else:
            assert seen["padded"] == pytest.approx(trained["untied"], rel=1e-5)
            assert seen["micro-batches"] == pytest.approx(trained["untied"], rel=1e-5)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
