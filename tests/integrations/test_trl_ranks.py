"""`srd_fast.integrations.trl` in two processes (DDP over gloo, on the CPU), beside one process and beside TRL's own.

This file is also the program of those processes, see `ranks.py`. One pair of processes runs all cases.
"""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import Ranks

from srd_fast.data.quickstart import make_quickstart_rows

pytest.importorskip("trl.experimental.gkd", reason="TRL's GKDTrainer is missing: pip install 'srd-fast[trl]'")

pytestmark = pytest.mark.long

# Trainer, library, and fields. A case of one process has all rows of a step in its batch.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "ours", {}),
    "sft, TRL's": ("sft", "trl", {}),
    "sft, accumulation": ("sft", "ours", {"gradient_accumulation_steps": 2}),
    "sft, accumulation, TRL's": ("sft", "trl", {"gradient_accumulation_steps": 2}),
    "sft, teacher": ("sft", "ours", {"teacher": True, "divergence_temperature": 2.0}),
    "sft, cache": ("sft", "ours", {"cache": True, "divergence_temperature": 2.0}),
    "gkd": ("gkd", "ours", {"beta": 0.3}),
    "gkd, TRL's": ("gkd", "trl", {"beta": 0.3}),
    "gkd, accumulation": ("gkd", "ours", {"gradient_accumulation_steps": 2}),
    "gkd, accumulation, TRL's": ("gkd", "trl", {"gradient_accumulation_steps": 2}),
    "gkd, cache": ("gkd", "ours", {"beta": 0.3, "cache": True}),
}
# GKD in TRL divides by the tokens of all processes, and DDP then averages what is a sum: half a step on two of them.
HALVED = 2


def train(folder: Path, world: int, kind: str, library: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Three steps of 4 rows (8 with accumulation) over all processes: losses, norms and weights."""
    import test_trl
    from transformers import set_seed

    rows = make_quickstart_rows(60, seed=5)
    tokenizer = tiny.tiny_tokenizer([f"{r['instruction']} {r['input']} {r['output']}" for r in rows], vocab_size=400)

    def models(layers: int) -> Any:
        return tiny.tiny_model(
            "llama_untied", layers=layers, width=32, vocab=len(tokenizer), max_position_embeddings=1024
        )

    fields = dict(fields)
    has_teacher, has_cache = fields.pop("teacher", False), fields.pop("cache", False)
    accumulation = fields.pop("gradient_accumulation_steps", 1)
    fields |= {"per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": accumulation}
    fields |= {"max_grad_norm": 0.0, "learning_rate": 1e-2 * (HALVED if kind == "gkd" and world == 2 else 1)}
    fields |= {"ddp_backend": "gloo"} if world > 1 else {}
    fields |= {"teacher_cache": str(folder / f"cache-{kind}-{world}")} if has_cache else {}
    made = test_trl.Made(models, tokenizer, folder)
    where = test_trl.ours if library == "ours" else getattr(test_trl, "trl" if kind == "sft" else "gkd")
    more = {"teacher_model": models(2)} if has_teacher or (has_cache and kind == "sft") else {}
    set_seed(5)
    trainer = made.sft(where, more=more, **fields) if kind == "sft" else made.gkd(where, **fields)
    found = test_trl.steps(trainer)
    weights = {name: w.clone() for name, w in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}
    before = models(1).state_dict()
    wrapped = type(trainer.model_wrapped).__name__
    return {"steps": found, "weights": weights, "before": before, "wrapped": wrapped}


def worker(folder: Path) -> None:
    """All cases on this rank; results in FOLDER/rankN.pt."""
    torch.set_num_threads(1)
    results = {name: train(folder, 2, *case) for name, case in CASES.items()}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


Runs = tuple[list[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each of two processes saw, case by case, and what this process sees with the whole batch."""
    folder = tmp_path_factory.mktemp("ranks")
    with Ranks(__file__, folder, 2) as ranks:
        alone = {name: train(folder, 1, *case) for name, case in CASES.items() if case[1] == "ours"}
        return ranks.results(900), alone


@pytest.mark.parametrize("case", [name for name, (_, library, _) in CASES.items() if library == "ours"])
def test_two_processes_end_in_the_weights_of_one(case: str, runs: Runs) -> None:
    ranks, alone = runs
    kind, expected = CASES[case][0], alone[case]
    assert expected["wrapped"] != "DistributedDataParallel"
    assert len(expected["steps"]) == 3
    share = HALVED if kind == "gkd" else 1
    for rank in ranks:
        found = rank[case]
        assert found["wrapped"] == "DistributedDataParallel"
        assert [loss * share for loss, _ in found["steps"]] == pytest.approx(
            [x for x, _ in expected["steps"]], rel=1e-6
        )
        norms = [norm * share for _, norm in found["steps"]]
        assert norms == pytest.approx([norm for _, norm in expected["steps"]], rel=1e-4)
        for name, weight in expected["weights"].items():
            assert (found["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name
    moved = [(w - expected["before"][name]).abs().max() > 1e-4 for name, w in expected["weights"].items()]
    assert sum(moved) > len(moved) / 2
    for name, weight in ranks[0][case]["weights"].items():
        assert torch.equal(weight, ranks[1][case]["weights"][name]), name


@pytest.mark.parametrize("case", [name for name in CASES if f"{name}, TRL's" in CASES])
def test_two_processes_train_as_trls_two(case: str, runs: Runs) -> None:
    for rank in runs[0]:
        found, expected = rank[case], rank[f"{case}, TRL's"]
        assert found["steps"] == [pytest.approx(pair, rel=1e-5) for pair in expected["steps"]]
        for name, weight in expected["weights"].items():
            assert (found["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
