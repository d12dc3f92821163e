"""Two processes (DDP over gloo, on the CPU) end in the weights of one process with twice the batch.

This file is also the program of those processes: `python test_distributed.py FOLDER` with RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT set, as torchrun sets them. One pair of processes runs all cases.
"""

import gc
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from ranks import Ranks
from spies import products_of
from tiny import assert_same

# What a case changes; `rows` of a step are 8 in all of them.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "untied head with a bias": {"architecture": "phi"},
    "accumulation": {"architecture": "gpt2", "accumulation": 2},
    "adapters": {"architecture": "llama", "lora": True},
    "chosen positions": {
        "architecture": "llama",
        "accumulation": 2,
        "position_selection": "topk_student_entropy",
        "position_ratio": 0.3,
    },
    "encoder and decoder": {"architecture": "bart"},
    "frozen embeddings": {"architecture": "llama_untied", "freeze": "embed_tokens"},
    "micro-batches": {"architecture": "llama", "max_tokens_per_batch": 48},
    "compiled layers": {"architecture": "llama", "torch_compile": True, "torch_compile_backend": "eager"},
    "softcap, checkpointing": {"architecture": "gemma2", "divergence": "forward_kl", "gradient_checkpointing": True},
}
CASES["answers in evaluations"] = {
    "architecture": "llama",
    "eval_generate": True,
    "eval_metrics": ["rouge_l", f"{Path(__file__).resolve()}:told"],
    "eval_temperature": 1.0,
    "eval_max_new_tokens": 4,
}
CASES["towers beside the text's, checkpointing"] = {"architecture": "gemma3_vision", "gradient_checkpointing": True}
# Apart from the others: bfloat16 rounds another sum on each rank.
BFLOAT16: dict[str, Any] = {"architecture": "llama", "bf16": True}
STUDENT, TEACHER = tiny.VOCAB, tiny.VOCAB + 12  # classes of their heads
Results = dict[str, dict[str, Any]]
# Uneven on purpose: the two ranks have different numbers of tokens in each step, and different lengths.
SAMPLES = tiny.tiny_samples(20, seed=2, longest=24)
VALIDATION = tiny.tiny_samples(7, seed=5)


def train(
    folder: Path,
    world: int,
    architecture: str,
    accumulation: int = 1,
    lora: bool = False,
    freeze: str = "",
    **fields: Any,
) -> dict[str, Any]:
    """Three steps of 8 samples over all ranks: weights, logs and validation metrics before and after."""
    from srd_fast import CurriculumPlan, SRDConfig, SRDTrainer

    args = SRDConfig(
        output_dir=str(folder),
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        report_to="none",
        save_strategy="no",
        optim="sgd",
        max_grad_norm=0.5,
        learning_rate=0.3,
        temperature=2.0,
        logging_steps=1,
        disable_tqdm=True,
        epochs_per_stage=[0.5, 0.8],
        per_device_train_batch_size=8 // world // accumulation,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        **fields,
    )
    family: Any = encoder_decoders if architecture in encoder_decoders.NAMES else tiny
    student = family.tiny_model(architecture)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not freeze or freeze not in name)
    torch.manual_seed(0)  # of the adapters
    ids = [s["sample_id"] for s in SAMPLES]
    trainer = SRDTrainer(
        model=student,
        teacher_model=family.tiny_model(architecture, seed=1, width=24, vocab=TEACHER),
        args=args,
        train_dataset=SAMPLES,
        curriculum=CurriculumPlan(subsets=[ids[:16], ids[16:]]),
        eval_dataset=VALIDATION,
        processing_class=tiny.tiny_tokenizer(),
        peft_config=adapters() if lora else None,
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    first = trainer.evaluate()
    products = products_of(trainer.train, STUDENT, TEACHER)
    kept = ("loss", "divergence", "cross_entropy", "entropy", "stage", "temperature", "learning_rate", "grad_norm")
    return {
        "world": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
        "order": list(trainer.curriculum.indices()),
        "before": before,
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "logs": [{n: float(e[n]) for n in kept} for e in trainer.state.log_history if "loss" in e],
        "metrics": [first, trainer.evaluate()],
        "products": products.seen,
    }


def told(reflected: Any) -> list[float]:
    """A number of each answer that another answer does not have."""
    return [float(zlib.crc32(text.encode())) for text in reflected.generations]


told.higher_is_easier = True  # type: ignore[attr-defined]


def adapters() -> Any:
    """Adapters that change the model from the start."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def worker(folder: Path) -> None:
    """All cases on this rank; results in FOLDER/rankN.pt."""
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at each start
    cases = {**CASES, "bfloat16": BFLOAT16}
    results = {name: train(folder / "out", 2, **case) for name, case in cases.items()}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Results], Results]:
    """What each of two ranks saw, case by case, and what this process sees with the whole batch."""
    folder = tmp_path_factory.mktemp("ranks")
    with Ranks(__file__, folder, 2) as ranks:
        left_out = ("accumulation", "max_tokens_per_batch")
        cases = {name: {k: v for k, v in case.items() if k not in left_out} for name, case in CASES.items()}
        alone = {name: train(folder / "alone", 1, **case) for name, case in cases.items()}
        return ranks.results(), alone


def test_the_ranks_have_different_numbers_of_tokens(runs: tuple[list[Results], Results]) -> None:
    ranks, alone = runs
    order = alone["llama"]["order"]
    assert ranks[0]["llama"]["order"] == ranks[1]["llama"]["order"] == order
    assert len(order) == 24
    tokens = [sum(label != tiny.IGNORE for label in SAMPLES[i]["labels"]) for i in order]
    for start in (0, 8, 16):
        assert abs(sum(tokens[start : start + 4]) - sum(tokens[start + 4 : start + 8])) > 2


@pytest.mark.parametrize("case", CASES)
def test_two_processes_end_in_the_weights_of_one(case: str, runs: tuple[list[Results], Results]) -> None:
    ranks, alone = runs
    expected = alone[case]
    for rank in ranks:
        found = rank[case]
        assert (found["world"], found["wrapped"]) == (2, "DistributedDataParallel")
        assert set(found["weights"]) == set(expected["weights"])
        moved = 0
        for name, weight in expected["weights"].items():
            assert torch.equal(found["before"][name], expected["before"][name])
            change = weight - expected["before"][name]
            if change.abs().max() > 1e-4:
                moved += 1
                assert_same(found["weights"][name] - found["before"][name], change, 2e-3, name)
            assert_same(found["weights"][name], weight, 1e-5, name)
        trained = [n for n in expected["weights"] if "lora_" in n or not CASES[case].get("lora")]
        trained = [n for n in trained if "vision_tower" not in n and "multi_modal" not in n]
        assert moved >= 0.7 * len(trained)
    for name, weight in ranks[0][case]["weights"].items():
        assert torch.equal(weight, ranks[1][case]["weights"][name]), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_what_one_does(case: str, runs: tuple[list[Results], Results]) -> None:
    ranks, alone = runs
    assert len(alone[case]["logs"]) == 3
    assert [log["stage"] for log in alone[case]["logs"]] == [1, 2, 2]
    for rank in ranks:
        for found, expected in zip(rank[case]["logs"], alone[case]["logs"], strict=True):
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, rel=1e-3), name


def test_the_heads_products_run_in_the_dtype_of_training(runs: tuple[list[Results], Results]) -> None:
    """Three a step of the student, one of the teacher, on each of three steps and each rank."""
    for rank in runs[0]:
        narrow = (torch.bfloat16,) * 3
        assert rank["bfloat16"]["products"] == {STUDENT: {narrow: 9}, TEACHER: {narrow: 3}}
        assert set(rank["llama"]["products"][STUDENT]) == {(torch.float32,) * 3}


@pytest.mark.parametrize("case", ["llama", "adapters"])
def test_two_processes_evaluate_each_row_once(case: str, runs: tuple[list[Results], Results]) -> None:
    """7 rows in batches of 2 do not split evenly: none may count twice."""
    ranks, alone = runs
    for rank in ranks:
        for found, expected in zip(rank[case]["metrics"], alone[case]["metrics"], strict=True):
            for name in ("eval_kl", "eval_cross_entropy"):
                assert found[name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_processes_answer_as_one_does(runs: tuple[list[Results], Results]) -> None:
    """Before training to the bit; after it both ranks have the same metrics of new answers."""
    ranks, alone = ([x["answers in evaluations"]["metrics"] for x in of_runs] for of_runs in (runs[0], [runs[1]]))
    for before, after in ranks:
        for name in ("eval_told", "eval_rouge_l"):
            assert before[name] == alone[0][0][name]
        assert after["eval_told"] == ranks[0][1]["eval_told"] != before["eval_told"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
