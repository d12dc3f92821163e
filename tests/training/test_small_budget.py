"""`SRDTrainer` with so small a memory budget that the loss has its classes outside: the same training, less memory."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import srd_fast.losses.chunked
from srd_fast import SRDConfig, SRDTrainer
from srd_fast.losses.order import LossPlan, LossWork, plan_loss

VOCAB = 4096
# Four rows of two models' logits.
BUDGET = 128 << 10


def trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> tuple[dict[str, torch.Tensor], list[float], list[LossPlan]]:
    """Weights, losses of the steps and what the loss planned, of four steps of eight samples."""
    plans: list[LossPlan] = []

    def planned(work: LossWork, budget: int, order: str = "auto") -> LossPlan:
        plans.append(plan_loss(work, budget, order))
        return plans[-1]

    args = SRDConfig(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=8, learning_rate=1e-2, report_to="none",
        save_strategy="no", logging_steps=1, max_steps=4, disable_tqdm=True, temperature=2.0, sft_weight=0.25, seed=3,
        backend="eager", **fields,
    )  # fmt: skip
    student = tiny.tiny_model("llama_untied", seed=1, vocab=VOCAB)
    trainer = SRDTrainer(
        student, tiny.tiny_model("llama", seed=2, width=24, vocab=VOCAB), args, tiny.tiny_samples(24, longest=24),
        processing_class=tiny.tiny_tokenizer(),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(srd_fast.losses.chunked, "plan_loss", planned)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {n: p.detach() for n, p in student.named_parameters()}, losses, plans


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_in_little_memory_is_the_same(
    divergence: str, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = trained(tmp_path / "roomy", monkeypatch, divergence=divergence, bf16=bf16)
    small = trained(tmp_path / "small", monkeypatch, divergence=divergence, bf16=bf16, memory_budget=BUDGET)
    assert {plan.order for plan in roomy[2]} == {"rows"}
    assert {plan.order for plan in small[2]} == {"classes"}
    assert all(plan.bytes <= BUDGET for plan in small[2])
    # bfloat16 rounds the logits of both, and has 2^-8 of a number; sums over blocks differ by that.
    assert small[1] == pytest.approx(roomy[1], rel=2.0**-8 if bf16 else 1e-6)
    for name, weight in roomy[0].items():
        apart = (small[0][name] - weight).norm() / weight.norm()
        assert apart < (1e-2 if bf16 else 1e-5), name
    assert small[1][-1] < small[1][0]
