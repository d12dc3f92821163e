"""Weights of a plan's samples in the loss: value and gradient against a plain loop over full logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from tiny import IGNORE, plain_cross_entropy, plain_divergence
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from srd_fast import CurriculumPlan, SRDConfig, SRDTrainer, UserError, attach_curriculum
from srd_fast.training.replay import ReplayBuffer

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")
ROWS = tiny.tiny_samples(5, longest=6)
IDS = [row["sample_id"] for row in ROWS]
RAW = {"s00": 0.09, "s01": 0.25, "s02": 0.16, "s03": 0.1}
# Over the mean of the four that are kept.
WEIGHTS = {i: x / 0.15 for i, x in RAW.items()}
PLAN = CurriculumPlan([IDS[:4]], weight_by="pass_rate", weights={**RAW, "s04": 7.0})
SFT = 0.3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        self.found.append({n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None})


def make(
    tokenizer: PreTrainedTokenizerFast,
    plan: CurriculumPlan = PLAN,
    fields: dict[str, Any] | None = None,
    **options: Any,
) -> SRDTrainer:
    usual: dict[str, Any] = {
        "output_dir": "out", "optim": "sgd", "max_grad_norm": 1e9, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.1, "epochs_per_stage": 1,
        "per_device_train_batch_size": 4, "temperature": 1.5, "sft_weight": SFT, "divergence": "forward_kl",
    }  # fmt: skip
    given: dict[str, Any] = {
        "model": tiny.tiny_model("llama", seed=1), "teacher_model": tiny.tiny_model("llama", seed=2, layers=3),
        "train_dataset": ROWS, "curriculum": plan, "processing_class": tokenizer,
    }  # fmt: skip
    return SRDTrainer(args=SRDConfig(**{**usual, **(fields or {})}), **{**given, **options})


def plain(trainer: SRDTrainer, weights: dict[str, float]) -> tuple[float, dict[str, Tensor]]:
    """The weighted sum of the losses of all tokens over their number, whatever they weigh."""
    student: Any = copy.deepcopy(trainer.model).double()
    teacher: Any = copy.deepcopy(trainer.teacher.model).double()  # type: ignore[attr-defined]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS[:4]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        kept = labels != IGNORE
        ours, theirs = student(ids).logits[0, :-1][kept], teacher(ids).logits[0, :-1][kept].detach()
        divergence = plain_divergence("forward_kl", theirs, ours, 1.5, 0.1, 0.5)
        losses = SFT * plain_cross_entropy(ours, labels[kept]) + (1 - SFT) * 1.5**2 * divergence
        total, count = total + weights[row["sample_id"]] * losses.sum(), count + int(kept.sum())
    loss = total / count
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"padding_free": False},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 24},
        {"teacher_cache": "cache"},
    ],
    ids=["flattened", "padded", "accumulated", "micro-batches", "cache"],
)
def test_loss_and_gradient_are_those_of_a_plain_loop(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    gradients = Gradients()
    trainer = make(tokenizer, fields=fields, callbacks=[gradients])
    expected, gradient = plain(make(tokenizer), WEIGHTS)
    trainer.train()
    (log,) = [x for x in trainer.state.log_history if "loss" in x]
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - plain(make(tokenizer), dict.fromkeys(IDS, 1.0))[0]) > 1e-3 * expected
    (found,) = gradients.found
    largest = max(float(x.abs().max()) for x in gradient.values())
    for name, value in gradient.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-5 * largest)


def test_weights_go_with_chosen_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each sample is a step, whose gradient is the weight times that without one, of the same positions."""
    fields = {"position_selection": "topk_student_entropy", "position_ratio": 0.5, "per_device_train_batch_size": 1}
    norms = []
    for weights in ({"s00": 1.0, "s01": 1.0}, {"s00": 0.2, "s01": 1.8}):
        gradients = Gradients()
        plan = CurriculumPlan([["s00", "s01"]], weights=weights)
        trainer = make(tokenizer, plan, {**fields, "learning_rate": 1e-12}, callbacks=[gradients])
        order = [IDS[i] for i in trainer.curriculum.indices()]
        trainer.train()
        norms.append(dict(zip(order, (x["model.embed_tokens.weight"].norm().item() for x in gradients.found))))
    assert norms[1]["s00"] == pytest.approx(0.2 * norms[0]["s00"], rel=1e-4)
    assert norms[1]["s01"] == pytest.approx(1.8 * norms[0]["s01"], rel=1e-4)


def test_evaluation_and_plans_without_weights_know_none(tokenizer: PreTrainedTokenizerFast) -> None:
    weighed, plain_plan = make(tokenizer), make(tokenizer, CurriculumPlan([IDS[:4]]))
    assert weighed.evaluate(ROWS) == pytest.approx(plain_plan.evaluate(ROWS))
    assert "weight" in weighed.train_dataset.column_names
    assert "weight" not in plain_plan.train_dataset.column_names


def test_fresh_answers_weigh_what_their_prompts_do(tokenizer: PreTrainedTokenizerFast) -> None:
    fields = {
        "lmbda": 1.0,
        "max_new_tokens": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-12,
        "generation_temperature": 0.0,
    }
    losses = []
    for factor in (1.0, 3.0):
        plan = CurriculumPlan([["s00", "s01"]], weights={"s00": factor, "s01": 1.0})
        trainer = make(tokenizer, plan, fields)
        order = [IDS[i] for i in trainer.curriculum.indices()]
        trainer.train()
        losses.append(dict(zip(order, (x["loss"] for x in trainer.state.log_history if "loss" in x))))
    assert losses[1]["s00"] == pytest.approx(1.5 * losses[0]["s00"], rel=1e-3)
    assert losses[1]["s01"] == pytest.approx(0.5 * losses[0]["s01"], rel=1e-3)


def test_a_buffer_keeps_weights(tmp_path: Path) -> None:
    buffer, again = ReplayBuffer(2), ReplayBuffer(2)
    buffer.add([{"sample_id": "a", "input_ids": [1, 2], "labels": [IGNORE, 2], "weight": 0.5}])
    buffer.save(tmp_path / "buffer.parquet")
    again.load(tmp_path / "buffer.parquet")
    assert again.draw(1, 0) == buffer.draw(1, 0) == [{"input_ids": [1, 2], "labels": [IGNORE, 2], "weight": 0.5}]


def test_weights_that_cannot_be_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="none of sample 's03', which it keeps"):
        make(tokenizer, CurriculumPlan([IDS[:4]], weights=dict.fromkeys(IDS[:3], 1.0)))
    with pytest.raises(UserError, match="weights are 0 for all samples"):
        make(tokenizer, CurriculumPlan([IDS[:2]], weights=dict.fromkeys(IDS[:2], 0.0)))
    others = Trainer(
        tiny.tiny_model("llama", layers=1),
        TrainingArguments("out", use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_list(ROWS),
    )
    with pytest.raises(UserError, match="the plan weighs samples by 'pass_rate', and a trainer's own loss takes no"):
        attach_curriculum(others, PLAN)
