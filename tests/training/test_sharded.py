"""A student in shards on two and four processes (gloo, on the CPU) against one process with the whole batch.

accelerate takes its FSDP and DeepSpeed paths only where a rank has an accelerator. Here each rank says that it has one
(`MULTI_GPU` in accelerate's state, with the CPU as its device), and all else is as on GPUs: the Trainer and accelerate
wrap the model, make the optimizer, save and load. FSDP1 is not resumed here: on a CPU its whole checkpoints end in a
segmentation fault of torch, and those in shards come back without the optimizer's state.

This file is also the program of those processes: `python test_sharded.py FOLDER CASES`, as `test_distributed.py` is.
With `deepspeed` installed (DS_ACCELERATOR=cpu) its cases run too; they are skipped without it.
"""

import gc
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import Ranks
from spies import Largest
from tiny import assert_same

pytestmark = pytest.mark.long
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
SAMPLES = tiny.tiny_samples(20, seed=2, longest=24)
VALIDATION = tiny.tiny_samples(7, seed=5)
STEPS, MIDDLE = 10, 4
SHARDS = {"state_dict_type": "SHARDED_STATE_DICT"}
Results = dict[str, dict[str, Any]]

# Fresh answers in steps, the same in any process; of five validation prompts one process has a batch more.
ANSWERS: dict[str, Any] = {
    "lmbda": 1.0,
    "generation_temperature": 0.0,
    "max_new_tokens": 5,
    "eval_generate": True,
    "eval_generate_rows": 5,
    "eval_max_new_tokens": 4,
    "eval_metrics": [f"{Path(__file__).parent / 'test_distributed.py'}:told"],
}

# engine: what shards the student; the others are of the student and the training.
CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {"engine": "fsdp2", "resume": True},
    "fsdp2, head gathered": {"engine": "fsdp2", "head_in_shards": False},
    "fsdp2, its own head gathered": {"engine": "fsdp2", "architecture": "phi", "head_in_shards": False},
    "fsdp2, head with a bias": {"engine": "fsdp2", "architecture": "phi", "accumulation": 2, "evaluate_first": False},
    "fsdp2, embedding with a factor": {"engine": "fsdp2", "architecture": "gemma2"},
    "fsdp2, adapters": {"engine": "fsdp2", "lora": True, "resume": True},
    "fsdp2, mixture of experts": {"engine": "fsdp2", "architecture": "mixtral"},
    "fsdp2, chosen positions": {
        "engine": "fsdp2",
        "architecture": "gpt2",
        "position_selection": "topk_student_entropy",
        "position_ratio": 0.3,
        "sample_selection": "topk_student_entropy",
        "sample_ratio": 0.8,
    },
    "fsdp2, answers": {"engine": "fsdp2", **ANSWERS},
    "fsdp2, head gathered, adapters, answers": {"engine": "fsdp2", "lora": True, "head_in_shards": False, **ANSWERS},
    "fsdp1": {"engine": "fsdp1"},
    "fsdp1, head with a bias": {"engine": "fsdp1", "architecture": "phi", "evaluate_first": False},
    "fsdp1, adapters": {"engine": "fsdp1", "lora": True},
    "ddp": {"engine": "ddp", "resume": True},
    "by transformers": {"engine": "transformers", "load": True},
    "by transformers, accumulation": {"engine": "transformers", "load": True, "accumulation": 2, "architecture": "phi"},
}
WITH_DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero3 while loading": {"engine": "zero3", "load": True},
    "zero3": {"engine": "zero3", "resume": True},
    "zero3, head with a bias": {"engine": "zero3", "architecture": "phi", "accumulation": 2},
    "zero3, adapters": {"engine": "zero3", "lora": True},
    "zero2": {"engine": "zero2", "resume": True},
    "zero1, adapters": {"engine": "zero1", "lora": True},
}
# Trainings whose tensors are looked at.
WATCH, WIDE = "watch", 4096
# A student whose layers are split.
DIVIDED = "divided"
WATCHED: dict[str, dict[str, Any]] = {
    "gathered": {"head_in_shards": False},
    "tied": {},
    "its own head": {"architecture": "llama_untied"},
    "adapters": {"lora": True, "architecture": "llama_untied"},
}
ON_FOUR = ("fsdp2", "fsdp2, adapters", "fsdp1")


def tiny_student(architecture: str, seed: int = 0, **sizes: Any) -> Any:
    """One of `tiny`, or a mixture of experts."""
    if architecture != "mixtral":
        return tiny.tiny_model(architecture, seed, **sizes)
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(seed)
    width, vocab = sizes.get("width", 16), sizes.get("vocab", tiny.VOCAB)
    config = MixtralConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def declare(engine: str) -> dict[str, Any]:
    """Forget what accelerate knows of the last case; the arguments of the engine."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state()
    PartialState._shared_state.clear()
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    if engine == "fsdp1":
        return {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False, **SHARDS}}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, **SHARDS}}
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        return {
            "deepspeed": {
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                **dict.fromkeys(names, "auto"),
            }
        }
    return {}


def made(
    folder: Path,
    world: int,
    engine: str,
    architecture: str = "llama",
    accumulation: int = 1,
    lora: bool = False,
    load: bool = False,
    vocab: int = tiny.VOCAB,
    **fields: Any,
) -> Any:
    """A trainer of ten steps of 8 samples, whose student is sharded by the engine."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from srd_fast import CurriculumPlan, SRDConfig, SRDTrainer

    engine_fields = declare(engine)
    student = tiny_student(architecture, vocab=vocab)
    teacher = tiny_student(architecture, seed=1, width=24, vocab=vocab + 12)
    weights = folder / f"weights-{os.environ.get('RANK')}"
    if load:
        save_here(student, weights)
    args = SRDConfig(
        output_dir=str(folder),
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        report_to="none",
        save_steps=MIDDLE,
        optim="sgd",
        optim_args="momentum=0.9",
        max_grad_norm=0.5,
        learning_rate=0.03,
        temperature=2.0,
        logging_steps=1,
        disable_tqdm=True,
        epochs_per_stage=[1.0, 5.0],
        max_steps=STEPS,
        per_device_train_batch_size=8 // world // accumulation,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        **engine_fields,
        **fields,
    )
    if engine_fields:
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    if load:
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        sharded = {"distributed_config": DistributedConfig(fsdp_size=world)} if engine == "transformers" else {}
        student = AutoModelForCausalLM.from_pretrained(weights, **sharded)
    torch.manual_seed(0)  # of the adapters
    ids = [s["sample_id"] for s in SAMPLES]
    return SRDTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=SAMPLES,
        curriculum=CurriculumPlan(subsets=[ids[:16], ids[16:]]),
        eval_dataset=VALIDATION,
        processing_class=tiny.tiny_tokenizer(),
        peft_config=adapters() if lora else None,
    )


def save_here(model: Any, folder: Path) -> None:
    """In every process: `save_pretrained` writes in the first one alone."""
    from safetensors.torch import save_model

    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def adapters() -> Any:
    """Adapters that change the model from the start."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def train(folder: Path, world: int, resume: bool = False, evaluate_first: bool = True, **case: Any) -> dict[str, Any]:
    """What a training of a case gives: logs, metrics before, amid and after it, weights after one step and the last."""
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    from srd_fast.models import is_sharded, whole_student

    save = {"save_strategy": "steps" if resume else "no"}
    trainer = made(folder, world, **save, **case)
    early: dict[str, Any] = {}

    class AfterFirst(TrainerCallback):
        """Measures in mid-run, and keeps the weights after one step, which show the gradients."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                wrapped = trainer.model_wrapped
                early["metrics"] = trainer.evaluate()
                student = trainer.accelerator.unwrap_model(wrapped)
                whole = whole_student(wrapped, student) if is_sharded(wrapped) else student
                early["weights"] = {} if whole is None else copied(whole)

    trainer.add_callback(AfterFirst())
    metrics = [trainer.evaluate()] if evaluate_first else []
    trainer.train()
    found = {
        "sharded": is_sharded(trainer.model_wrapped),
        "in shards": trainer._place.in_shards,
        "metrics": [*metrics, early["metrics"], trainer.evaluate()],
        "logs": [{n: e[n] for n in ("loss", "grad_norm")} for e in trainer.state.log_history if "loss" in e],
        "first": early["weights"],
        "positions": trainer.positions_of(SAMPLES[0]) if "position_selection" in case else None,
    }
    trainer.save_student(folder / "student")
    found["student"] = load_file(folder / "student" / "model.safetensors")
    if resume:
        again = made(folder / "again", world, **save, **case)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{MIDDLE}"))
        again.save_student(folder / "resumed")
        found["resumed"] = load_file(folder / "resumed" / "model.safetensors")
    return found


def divided(folder: Path) -> dict[str, Any]:
    """A student whose layers are split over all processes: what the trainer says, what a loop of one's own gives."""
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from srd_fast import model_distillation_loss
    from srd_fast.errors import UserError
    from srd_fast.training.placing import check_not_divided

    found: dict[str, Any] = {}
    batch = tiny.collate(tiny.tiny_samples(4, seed=3))
    for architecture in ("llama", "llama_untied"):
        student = tiny.tiny_model(architecture, num_key_value_heads=2)
        if "RANK" in os.environ:
            weights = folder / f"{architecture}-{os.environ['RANK']}"
            save_here(student, weights)
            student = AutoModelForCausalLM.from_pretrained(
                weights, distributed_config=DistributedConfig(tp_plan="auto")
            )
        try:
            check_not_divided(student)
            said = ""
        except UserError as e:
            said = str(e)
        out = model_distillation_loss(student, tiny.tiny_model("llama", seed=1, width=24), batch)
        out.loss.backward()
        gradients = {n: p.grad for n, p in student.named_parameters()}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
        split = sum(isinstance(g, DTensor) for g in gradients.values())
        found[architecture] = {"said": said, "loss": out.loss.item(), "gradients": whole, "split": split}
    return found


def largest(folder: Path, world: int, **case: Any) -> int:
    """Elements of the largest tensor that a training makes in a step, with the optimizer's."""
    from transformers import TrainerCallback

    trainer = made(folder, world, "fsdp2", vocab=WIDE, memory_budget=1 << 17, save_strategy="no", **case)
    watch = Largest()

    class OneStep(TrainerCallback):
        """Watches the second step, when all buffers are there that stay."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                watch.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                watch.__exit__(None, None, None)
                control.should_training_stop = True

    trainer.add_callback(OneStep())
    trainer.train()
    return watch.elements


def copied(model: Any) -> dict[str, torch.Tensor]:
    """Its trained weights, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def worker(folder: Path, names: list[str]) -> None:
    """Cases on this rank; results in FOLDER/rankN.pt."""
    torch.set_num_threads(1)
    gc.freeze()
    rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    results: dict[str, Any] = {}
    for i, (name, case) in enumerate(WATCHED.items() if WATCH in names else ()):
        results[name] = largest(folder / f"watched-{i}", world, **case)
    for i, name in enumerate(n for n in names if n not in (WATCH, DIVIDED)):
        case = {**CASES, **WITH_DEEPSPEED}[name]
        if world == 4:
            case = {k: v for k, v in case.items() if k != "resume"}
        results[name] = train(folder / str(i), world, **case)
        torch.distributed.barrier()
    if DIVIDED in names:
        results[DIVIDED] = divided(folder)
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def alone(folder: Path, name: str) -> dict[str, Any]:
    """A case in this process, with the whole batch."""
    case = {**CASES, **WITH_DEEPSPEED}[name]
    left_out = ("accumulation", "resume", "load")
    return train(folder, 1, **{**{k: v for k, v in case.items() if k not in left_out}, "engine": "one"})


def results_of(folder: Path, world: int, names: list[str]) -> tuple[list[Results], Results]:
    """What each rank saw, case by case, and what this process sees with the whole batch."""
    with Ranks(__file__, folder, world, *names) as ranks:
        named = [name for name in names if name not in (WATCH, DIVIDED)]
        expected = {name: alone(folder / f"alone-{i}", name) for i, name in enumerate(named)}
        return ranks.results(400), expected


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Results], Results]:
    return results_of(tmp_path_factory.mktemp("two"), 2, [*CASES, WATCH, DIVIDED])


def check(name: str, ranks: list[Results], alone: Results) -> None:
    """Every value of every rank is that of one process."""
    expected = alone[name]
    assert len(expected["logs"]) == STEPS
    for number, rank in enumerate(ranks):
        found = rank[name]
        case = {**CASES, **WITH_DEEPSPEED}[name]
        engine = case["engine"]
        assert found["in shards"] == (engine == "fsdp2" and case.get("head_in_shards", True))
        assert found["sharded"] == (engine not in ("ddp", "zero1", "zero2"))
        for ours, theirs in zip(found["logs"], expected["logs"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
            for value in ("eval_kl", "eval_cross_entropy"):
                assert ours[value] == pytest.approx(theirs[value], rel=1e-5), value
            assert ours.get("eval_told") == theirs.get("eval_told")
        if expected["positions"] is not None:
            assert found["positions"][0] == pytest.approx(expected["positions"][0], rel=1e-4)
            assert found["positions"][1] == expected["positions"][1]
        if number == 0:
            assert found["first"].keys() == expected["first"].keys()
        for weight, x in found["first"].items():
            assert_same(x, expected["first"][weight], 1e-6, weight)
        assert found["student"].keys() == expected["student"].keys()
        for weight, x in expected["student"].items():
            assert_same(found["student"][weight], x, 1e-5, weight)
            if "resumed" in found:
                assert_same(found["resumed"][weight], found["student"][weight], 1e-6, weight)


@pytest.mark.parametrize("name", CASES)
def test_a_student_in_shards_is_trained_measured_saved_and_resumed_as_in_one_process(
    name: str, two: tuple[list[Results], Results]
) -> None:
    check(name, *two)


def test_no_process_makes_a_tensor_of_the_size_of_a_head_in_shards(two: tuple[list[Results], Results]) -> None:
    """Not of its weight, its gradient or the embedding; with a gathered head there is one."""
    for rank in two[0]:
        made_in_a_step = {name: rank[name] for name in WATCHED}
        assert made_in_a_step.pop("gathered") >= WIDE * 16  # type: ignore[operator]
        for name, elements in made_in_a_step.items():
            assert elements <= WIDE * 16 // 2, name  # type: ignore[operator]


def test_a_student_whose_layers_are_split_is_for_loops_of_ones_own(
    two: tuple[list[Results], Results], tmp_path: Path
) -> None:
    """The trainer refuses it; `model_distillation_loss` gives loss and gradients of one process, tied or not."""
    for architecture, expected in divided(tmp_path).items():
        assert expected["said"] == ""
        for rank in two[0]:
            found = rank[DIVIDED][architecture]
            assert "divided over processes (tp_size 2), but every process trains on samples" in found["said"]
            assert found["split"] >= 15
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert found["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                assert_same(found["gradients"][name], gradient, 1e-5, name)


@pytest.fixture(scope="module")
def with_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Results], Results]:
    return results_of(tmp_path_factory.mktemp("deepspeed"), 2, list(WITH_DEEPSPEED))


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
@pytest.mark.parametrize("name", WITH_DEEPSPEED)
def test_zero_is_trained_measured_saved_and_resumed_as_one_process(name: str, request: pytest.FixtureRequest) -> None:
    check(name, *request.getfixturevalue("with_deepspeed"))


def test_four_processes_train_as_one(tmp_path: Path) -> None:
    ranks, alone = results_of(tmp_path, 4, list(ON_FOUR))
    for name in ON_FOUR:
        check(name, ranks, alone)


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2:])
