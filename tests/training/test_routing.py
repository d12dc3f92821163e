"""The balancing loss of a mixture of experts is the one that its own model computes, in every kind of batch."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from test_trainer import Watched, assert_gradients, config, naive_step
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from srd_fast import UserError, evaluate, reflect
from srd_fast.models import router_loss
from srd_fast.reflection import Sampling

SAMPLES = tiny.tiny_samples(8)
SIZES: dict[str, Any] = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "intermediate_size": 16, "max_position_embeddings": 64, "pad_token_id": 0}
SIZES |= {"eos_token_id": 0, "bos_token_id": 0, "num_experts_per_tok": 2, "output_router_logits": True}
MIXTURES = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
    "olmoe": (OlmoeConfig, {"num_experts": 4}),
    "granite": (GraniteMoeConfig, {"num_local_experts": 4}),
}
pytestmark = pytest.mark.usefixtures("own_folder")


def mixture(name: str = "mixtral", coefficient: float = 0.5, **more: Any) -> PreTrainedModel:
    kind, own = MIXTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **own, **more}, router_aux_loss_coef=coefficient))
    with torch.no_grad():
        for module in model.modules():
            if "Router" in type(module).__name__ or "TopK" in type(module).__name__:
                for p in module.parameters():
                    p.normal_(0, 1)  # so that the experts are not in balance
    return model.eval()


def trained(student: PreTrainedModel, samples: Sequence[Any] = SAMPLES, **fields: Any) -> Watched:
    trainer = Watched(
        model=student,
        teacher_model=tiny.tiny_model("llama_untied", seed=1, width=24),
        args=config(**{"per_device_train_batch_size": 8, "max_steps": 1, **fields}),
        train_dataset=list(samples),
        processing_class=tiny.tiny_tokenizer(),
    )
    trainer.train()
    return trainer


def own_balance(student: PreTrainedModel, samples: Sequence[Any]) -> torch.Tensor:
    batch = tiny.collate(samples)
    out = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    return student.router_aux_loss_coef * out.aux_loss


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_loss_is_the_models_own(name: str, padding_free: bool) -> None:
    student = mixture(name)
    wanted = copy.deepcopy(student)
    teacher = tiny.tiny_model("llama_untied", seed=1, width=24)
    loss, gradients = naive_step(
        wanted, teacher, SAMPLES, divergence="skew_reverse_kl", temperature=1.0, sft_weight=0.3
    )
    balance = own_balance(wanted, SAMPLES)
    parameters = dict(wanted.named_parameters())
    added = torch.autograd.grad(balance, list(parameters.values()), allow_unused=True)
    gradients = {
        n: gradients[n] + (0 if g is None else g) for (n, _), g in zip(parameters.items(), added) if n in gradients
    }
    trainer = trained(student, padding_free=padding_free)
    assert trainer.losses[0] == pytest.approx((loss + balance).item(), rel=1e-5)
    assert trainer.logs[0]["router_loss"] == pytest.approx(balance.item(), rel=1e-5)
    assert balance > 0.5
    assert_gradients(trainer.gradients[0], gradients)


@pytest.mark.parametrize(
    "fields",
    [{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"max_tokens_per_batch": 40}],
    ids=["accumulated", "divided"],
)
def test_micro_batches_count_by_their_tokens(fields: dict[str, Any]) -> None:
    student = mixture()
    wanted = copy.deepcopy(student)
    trainer = trained(student, **fields)
    assert len(trainer.rows[0]) == 8
    by_ids = {tuple(s["input_ids"]): s for s in SAMPLES}
    parts: list[list[Any]] = []
    if "max_tokens_per_batch" in fields:
        left = [by_ids[tuple(r)] for r in trainer.rows[0]]
        assert trainer.logs[0]["router_loss"] > 0
        from srd_fast.data import divide_by_tokens

        lengths = [len(s["input_ids"]) for s in left]
        parts = [[left[i] for i in part] for part in divide_by_tokens(lengths, 40, True)]
        assert len(parts) > 1
    else:
        rows = [by_ids[tuple(r)] for r in trainer.rows[0]]
        parts = [rows[i : i + 2] for i in range(0, 8, 2)]
    items = [sum(x != -100 for s in part for x in s["labels"][1:]) for part in parts]
    with torch.no_grad():
        balance = sum(own_balance(wanted, part) * n / sum(items) for part, n in zip(parts, items))
    assert trainer.logs[0]["router_loss"] == pytest.approx(float(balance), rel=1e-5)


def test_recomputed_activations_change_nothing() -> None:
    plain, again = mixture(), mixture()
    first, second = trained(plain), trained(again, gradient_checkpointing=True)
    assert second.losses == pytest.approx(first.losses, rel=1e-6)
    assert_gradients(second.gradients[0], first.gradients[0])


def test_without_it_nothing_is_added() -> None:
    off, zero = mixture(output_router_logits=False), mixture(coefficient=0.0)
    assert router_loss(off) is None
    assert router_loss(zero) is None
    first, second = trained(off), trained(zero)
    assert first.losses == second.losses
    assert "router_loss" not in first.logs[0]
    on = trained(mixture(coefficient=10.0))
    assert not torch.equal(next(on.model.parameters()), next(off.parameters()))


@pytest.mark.parametrize("name", MIXTURES)
def test_such_a_student_answers_and_is_measured_as_without_it(name: str) -> None:
    options: dict[str, Any] = {"sampling": Sampling(max_new_tokens=3), "progress": False}
    found = []
    for asked in (True, False):
        student = mixture(name, output_router_logits=asked)
        scores = reflect(student, SAMPLES, tiny.tiny_tokenizer(), engine="transformers", **options).to_list()
        found.append((scores, evaluate(student, SAMPLES, tiny.tiny_tokenizer(), **options)))
        assert student.config.output_router_logits is asked
    assert found[0] == found[1]


def test_its_layers_are_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = trained(mixture(), torch_compile=True, torch_compile_backend="eager")
    assert "its balancing loss looks at the routers" in caplog.text
    assert trainer.logs[0]["router_loss"] > 0


def test_a_balancing_loss_that_is_not_known_is_refused() -> None:
    student = tiny.tiny_model("llama")
    student.config.output_router_logits, student.router_aux_loss_coef = True, 0.1
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*balancing loss is not known.*output_router_logits=False"):
        trained(student)
