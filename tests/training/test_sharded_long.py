"""A student in shards for longer: on with another number of processes, and the quickstart's pair with real weights.

This file is also the program of those processes (`python test_sharded_long.py FOLDER WHAT...`), with the declarations
of `test_sharded.py`. The second half needs the quickstart's model, which is fetched once, and 6 GB; with deepspeed
installed (DS_ACCELERATOR=cpu) it has ZeRO-3 too.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import test_sharded as sharded
import torch
from ranks import Ranks
from tiny import assert_same

pytestmark = pytest.mark.long
RESUMED: dict[str, dict[str, Any]] = {
    "tied": {},
    "head gathered": {"head_in_shards": False, "architecture": "phi"},
    "adapters": {"lora": True, "architecture": "llama_untied"},
}
# Processes, and the step at which each start ends.
STARTS = ((2, 4), (4, 8), (1, sharded.STEPS))
NAME, LAYERS, STEPS = "smollm2-135m-instruct", 15, 4
PAIRS: dict[str, dict[str, Any]] = {
    "FSDP2, vocabulary in shards": {"engine": "fsdp2"},
    "FSDP2, head gathered": {"engine": "fsdp2", "head_in_shards": False},
    **({"ZeRO-3": {"engine": "zero3"}} if sharded.HAS_DEEPSPEED else {}),
}


def go_on(folder: Path, begin: int, end: int) -> None:
    """Train each case from one checkpoint to the next, or to the end."""
    from transformers import TrainerCallback

    class Until(TrainerCallback):
        """Stops at a step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == end

    for name, case in RESUMED.items():
        trainer = sharded.made(folder / name, int(os.environ["WORLD_SIZE"]), "fsdp2", save_strategy="steps", **case)
        trainer.add_callback(Until())
        trainer.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{begin}") if begin else None)
        assert trainer.state.global_step == end
        if end == sharded.STEPS:
            trainer.save_student(folder / name / "student")


def real(folder: Path, world: int, engine: str, **fields: Any) -> dict[str, Any]:
    """Some steps of the quickstart's pair on short samples: logs, evaluations, the saved student."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from safetensors.torch import load_file

    from srd_fast import SRDConfig, SRDTrainer
    from srd_fast.data.quickstart import make_quickstart_splits
    from srd_fast.models import load_model, load_tokenizer, prune_depth

    engine_fields = sharded.declare(engine)
    teacher, student = load_model(NAME), load_model(NAME)
    prune_depth(student, LAYERS)
    train, validation = make_quickstart_splits(4 * STEPS, 4, seed=0)
    args = SRDConfig(
        output_dir=str(folder),
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        report_to="none",
        save_strategy="no",
        optim="sgd",
        optim_args="momentum=0.9",
        max_grad_norm=1.0,
        learning_rate=0.001,
        max_prompt_length=32,
        max_response_length=24,
        logging_steps=1,
        disable_tqdm=True,
        epochs_per_stage=1,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=2,
        **engine_fields,
        **fields,
    )
    if engine_fields:
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    tokenizer = load_tokenizer(NAME)
    norms: list[float] = []

    class Measured(SRDTrainer):
        """Knows the norm in float64. torch adds up that of a tensor on the CPU in float32: seen 2e-5 to 3e-5 off."""

        def _clip_grad_norm(self, model: Any) -> Any:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(sum(float(g.double().square().sum()) for g in gradients) ** 0.5)
            return super()._clip_grad_norm(model)

    trained = Measured if world == 1 else SRDTrainer
    trainer = trained(student, teacher, args, train, eval_dataset=validation, processing_class=tokenizer)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_student(folder / "student")
    return {
        "in shards": trainer._place.in_shards,
        "logs": [{n: e[n] for n in ("loss", "grad_norm")} for e in trainer.state.log_history if "loss" in e],
        "exact_norms": norms,
        "metrics": {n: metrics[f"eval_{n}"] for n in ("kl", "cross_entropy")},
        "student": load_file(folder / "student" / "model.safetensors"),
    }


def worker(folder: Path, what: str, *numbers: str) -> None:
    """What one of these processes does."""
    torch.set_num_threads(1)
    if what == "resume":
        go_on(folder, *map(int, numbers))
    else:
        found = {name: real(folder / name, int(os.environ["WORLD_SIZE"]), **case) for name, case in PAIRS.items()}
        if os.environ["RANK"] == "0":
            torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def test_a_training_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    begin = 0
    for world, end in STARTS:
        Ranks(__file__, tmp_path, world, "resume", str(begin), str(end)).end(1200)
        begin = end
    for name, case in RESUMED.items():
        expected = sharded.train(tmp_path / "alone" / name, 1, engine="one", evaluate_first=False, **case)["student"]
        found = load_file(tmp_path / name / "student" / "model.safetensors")
        assert found.keys() == expected.keys()
        for weight, x in expected.items():
            assert_same(found[weight], x, 1e-5, weight)


def test_the_quickstarts_pair_in_shards_trains_as_in_one_process(tmp_path: Path) -> None:
    Ranks(__file__, tmp_path, 2, "pair").end(1200)
    expected = real(tmp_path / "alone", 1, "one")
    assert len(expected["logs"]) == STEPS
    for name, found in torch.load(tmp_path / "found.pt").items():
        assert found["in shards"] == (name == "FSDP2, vocabulary in shards")
        for ours, theirs, exact in zip(found["logs"], expected["logs"], expected["exact_norms"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6), name
            norm = exact if name == "ZeRO-3" else theirs["grad_norm"]
            assert ours["grad_norm"] == pytest.approx(norm, rel=1e-5), name
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6), name
        assert found["student"].keys() == expected["student"].keys()
        for weight, x in expected["student"].items():
            assert_same(found["student"][weight], x, 1e-5, f"{name}: {weight}")


if __name__ == "__main__":
    worker(Path(sys.argv[1]), *sys.argv[2:])
