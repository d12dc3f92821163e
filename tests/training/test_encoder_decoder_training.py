"""Training encoder-decoder students: every step is that of a loop over the models' own logits."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from encoder_decoders import NAMES, own_logits, plain_means, tiny_model, tiny_samples
from tiny import assert_same, plain_loss
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.data import DistillationCollator
from srd_fast.models import load_model
from srd_fast.teacher import TeacherCache, build_teacher_cache, labels_with_loss
from srd_fast.training.batching import micro_batches

SAMPLES = tiny_samples(12)
pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return encoder_decoders.tiny_tokenizer("t5")


class Watched(SRDTrainer):
    """Keeps the loss and the gradients of each optimizer step, and the batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.batches.append(inputs)
        self.losses.append(loss.item())
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return loss


def config(**fields: Any) -> SRDConfig:
    usual: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    usual |= {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05, "logging_steps": 1, "disable_tqdm": True}
    usual |= {"per_device_train_batch_size": 4, "epochs_per_stage": 1, "divergence": "forward_kl"}
    return SRDConfig(**{**usual, "temperature": 2.0, "sft_weight": 0.3, **fields})


def make(tokenizer: Any, student: Any = None, teacher: Any = None, **fields: Any) -> Watched:
    options = {n: fields.pop(n) for n in ("peft_config", "eval_dataset", "train_dataset") if n in fields}
    return Watched(
        tiny_model("t5") if student is None else student,
        tiny_model("t5", seed=1, width=24, layers=(3, 3)) if teacher is None else teacher,
        config(**fields),
        **{"train_dataset": SAMPLES, **options},
        processing_class=tokenizer,
    )


def first_batch(trainer: SRDTrainer, size: int = 4) -> list[Mapping[str, Any]]:
    return [SAMPLES[i] for i in list(trainer.curriculum.indices())[:size]]


def naive_step(
    student: nn.Module, teacher: nn.Module, samples: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch from full logits."""
    z_S, labels = own_logits(student, samples)
    with torch.no_grad():
        z_T, _ = own_logits(teacher, samples)
    loss = plain_loss(z_S, z_T, labels, temperature=2.0, sft_weight=0.3, **options).mean()
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(wanted)
    whole = torch.stack([g.norm() for g in wanted.values()]).norm().item()
    assert whole > 1e-4
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm().item()
        assert error <= tolerance * max(gradient.norm().item(), 3e-3 * whole), f"{name}: {error:.1e}"
    assert sum(g.norm().item() > 1e-4 * whole for g in wanted.values()) > 0.8 * len(wanted)


# A step is the textbook's.


@pytest.mark.parametrize(
    ("name", "divergence", "options"),
    [
        *[(name, "forward_kl", {}) for name in NAMES],
        ("t5gemma", "skew_reverse_kl", {"skew": 0.2}),  # softcap, two configs
        ("bart", "jsd", {"beta": 0.3}),
    ],
)
def test_a_step_is_that_of_a_plain_loop(
    name: str, divergence: str, options: dict[str, float], tokenizer: PreTrainedTokenizerBase
) -> None:
    student = tiny_model(name).double()
    teacher = tiny_model(name, seed=1, width=24, layers=(3, 3), vocab=312).double()
    trainer = make(tokenizer, student, teacher, divergence=divergence, max_steps=1, **options)
    batch = first_batch(trainer)
    assert len({len(s["input_ids"]) for s in batch}) > 1
    loss, wanted = naive_step(copy.deepcopy(student), teacher, batch, divergence=divergence, **options)
    trainer.train()
    exact = name != "t5gemma"  # whose norms are in float32
    assert trainer.losses[0] == pytest.approx(loss.item(), rel=1e-9 if exact else 1e-6)
    assert_gradients(trainer.gradients[0], wanted, 1e-8 if exact else 1e-5)


def test_batches_are_padded_and_it_is_said_once(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "srd_fast"):
        trainer = make(tokenizer)
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "padded" in r.getMessage()]
    assert said == ["batches are padded, because the student cannot go without: it has an encoder and a decoder"]
    assert "cu_seq_lens" not in trainer.batches[0]
    with pytest.raises(UserError, match=r"padding_free is true but the student T5For.*: it has an encoder"):
        make(tokenizer, padding_free=True)


def test_rows_of_text_train_from_their_two_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"instruction": f"Name {n} dogs.", "output": f"the quick dogs, {n}"} for n in range(1, 5)]
    trainer = make(tokenizer, train_dataset=rows, template="{instruction}", max_steps=1, per_device_train_batch_size=1)
    trainer.train()
    (batch,) = micro_batches(trainer.batches[0])
    row = next(r for r in rows if tokenizer(r["instruction"]).input_ids == batch["input_ids"][0].tolist())
    response = tokenizer(row["output"]).input_ids
    assert batch["input_ids"][0, -1] == response[-1] == tokenizer.eos_token_id
    assert batch["decoder_input_ids"][0].tolist() == [0, *response]
    assert batch["labels"][0].tolist() == [tiny.IGNORE, *response]
    assert labels_with_loss(batch).tolist() == response


# Micro-batches.


@pytest.mark.parametrize("most", [22, pytest.param(60, marks=pytest.mark.slow)])
def test_micro_batches_count_prompts_and_responses(most: int, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = make(tokenizer, per_device_train_batch_size=12, max_steps=1)
    divided = make(tokenizer, per_device_train_batch_size=12, max_steps=1, max_tokens_per_batch=most)
    whole.train()
    divided.train()
    parts = micro_batches(divided.batches[0])
    assert len(parts) > 1
    for part in parts:
        assert part["input_ids"].numel() + part["decoder_input_ids"].numel() <= most
    assert divided.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)
    assert_gradients(divided.gradients[0], whole.gradients[0], 1e-4)


def test_a_sample_above_the_limit_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    longest = max(SAMPLES, key=lambda s: len(s["input_ids"]))
    length = len(longest["input_ids"])
    with pytest.raises(UserError, match=rf"max_tokens_per_batch is {length} but sample .* has {length + 1} tokens"):
        make(tokenizer, max_tokens_per_batch=length)


# The teacher's rows.


@pytest.mark.parametrize("name", NAMES)
def test_cached_rows_are_those_of_the_live_teacher(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = tiny_model(name, seed=1, width=24).double()
    cache = build_teacher_cache(teacher, SAMPLES, tmp_path, batch_tokens=40, progress=False)
    rows = cache.rows({"teacher": cache.collate(SAMPLES)}, 1.0)
    found = torch.cat([rows.head.project(rows.hidden_ND)])
    with torch.no_grad():
        expected = torch.cat([own_logits(teacher, [s])[0] for s in SAMPLES])
    assert_same(found, expected, 1e-9)


def test_training_from_a_cache_is_training_beside_the_teacher(tokenizer: PreTrainedTokenizerBase) -> None:
    live = make(tokenizer)
    cached = make(tokenizer, teacher_cache="rows")
    assert isinstance(cached.teacher, TeacherCache)
    live.train()
    cached.train()
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)


def test_a_cache_of_the_other_kind_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    build_teacher_cache(tiny_model("t5", seed=1), SAMPLES, "two", template="alpaca", progress=False)
    build_teacher_cache(tiny.tiny_model("llama"), SAMPLES, "one", template="alpaca", progress=False)
    with pytest.raises(UserError, match="the student is an encoder-decoder model and the teacher a causal"):
        Watched(tiny_model("t5"), None, config(teacher_cache="one"), SAMPLES, processing_class=tokenizer)
    with pytest.raises(UserError, match="the student is a causal language model and the teacher an encoder-decoder"):
        Watched(tiny.tiny_model("llama"), None, config(teacher_cache="two"), SAMPLES, processing_class=tokenizer)
    Watched(tiny_model("t5"), None, config(teacher_cache="two"), SAMPLES, processing_class=tokenizer)
    with pytest.raises(UserError, match="the student is an encoder-decoder model and the teacher a causal"):
        make(tokenizer, teacher=TeacherCache("one"))


def test_a_collator_of_ones_own_must_make_two_sequences(tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = Watched(
        tiny_model("t5"), tiny_model("t5", seed=1), config(), SAMPLES, processing_class=tokenizer,
        data_collator=DistillationCollator(0),
    )  # fmt: skip
    with pytest.raises(UserError, match="a batch for T5ForConditionalGeneration has no decoder_input_ids"):
        trainer.train()


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_of_the_other_kind_is_refused(
    cached: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    fields = {"teacher_cache": "rows"} if cached else {}
    with pytest.raises(UserError, match="the student is an encoder-decoder model and the teacher a causal"):
        make(tokenizer, teacher=tiny.tiny_model("llama"), **fields)
    tiny_model("t5").save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="the student is a causal language model and the teacher an encoder-decoder"):
        make(tokenizer, student=tiny.tiny_model("llama"), teacher=str(tmp_path / "teacher"), **fields)
    assert not Path("rows").exists()


# What a step may run in.


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    plain, checkpointed = (
        make(tokenizer, tiny_model(name), tiny_model(name, seed=1), max_steps=1, gradient_checkpointing=given)
        for given in (False, True)
    )
    plain.train()
    checkpointed.train()
    assert_gradients(checkpointed.gradients[0], plain.gradients[0], 1e-5)


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_mixed_precision_stays_near_float32(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    single, half = (
        make(tokenizer, tiny_model(name), tiny_model(name, seed=1), max_steps=1, bf16=given) for given in (False, True)
    )
    single.train()
    half.train()
    assert half.losses[0] == pytest.approx(single.losses[0], rel=0.05)
    assert half.losses[0] != single.losses[0]


@pytest.mark.parametrize(("name", "checkpointing"), [("t5", True), ("bart", False)])
def test_adapters_are_all_that_is_trained(
    name: str, checkpointing: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    student, teacher = tiny_model(name).double(), tiny_model(name, seed=1).double()
    options = {"gradient_checkpointing": checkpointing, "max_steps": 1}
    trainer = make(tokenizer, student, teacher, peft_config=adapters, **options)
    loss, wanted = naive_step(copy.deepcopy(trainer.model), teacher, first_batch(trainer), divergence="forward_kl")
    trainer.train()
    assert all("lora_" in n for n in wanted)
    assert any("encoder" in n for n in wanted)
    assert any("decoder" in n for n in wanted)
    assert trainer.losses[0] == pytest.approx(loss.item(), rel=1e-6)  # peft's adapters are float32
    assert_gradients({n: g.double() for n, g in trainer.gradients[0].items()}, wanted, 1e-4)
    merged: Any = trainer.model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = own_logits(merged, SAMPLES)[0]
        assert_same(own_logits(load_model(str(tmp_path), torch.float64), SAMPLES)[0], expected, 1e-9)


@pytest.mark.parametrize("name", ["t5_untied", pytest.param("bart", marks=pytest.mark.slow)])
def test_a_trained_student_is_saved_whole(name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trainer = make(tokenizer, tiny_model(name), tiny_model(name, seed=1))
    trainer.train()
    trainer.save_model(str(tmp_path))
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_same(own_logits(again, SAMPLES)[0], own_logits(trainer.model.eval(), SAMPLES)[0], 1e-6)


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_weights(tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    whole = make(tokenizer, **options, output_dir="whole")
    whole.train()
    cut = make(tokenizer, **options, output_dir="cut", max_steps=2)
    cut.train()
    again = make(tokenizer, **options, output_dir="cut")
    again.train(resume_from_checkpoint=True)
    assert len(again.losses) == len(whole.losses) - 2
    for (name, found), expected in zip(again.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    "fields",
    [
        {"position_selection": "topk_student_entropy", "position_ratio": 0.5},
        {"class_sampling": 8, "sft_weight": 0.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_selection_goes_with_two_parts(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = make(tokenizer, **fields)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(trainer.losses)))
    if "position_selection" in fields:
        entropies, chosen = trainer.positions_of(SAMPLES[0])
        response = encoder_decoders.split(SAMPLES[0])[1]
        with torch.no_grad():
            q = own_logits(trainer.model.eval(), SAMPLES[:1])[0].double().softmax(-1)
        assert entropies == pytest.approx((-(q * q.log()).sum(-1)).tolist(), rel=1e-5)
        assert sum(chosen) == -(-len(response) // 2)


def test_samples_are_chosen_by_their_own_cross_entropy(tokenizer: PreTrainedTokenizerBase) -> None:
    student = tiny_model("t5")
    trainer = make(tokenizer, student, sample_selection="topk_student_cross_entropy", sample_ratio=0.25)
    values = {s["sample_id"]: plain_means(student, student, [s])[1] for s in SAMPLES}
    kept = {SAMPLES[i]["sample_id"] for i in trainer.curriculum.indices()}
    assert kept == set(sorted(values, key=values.__getitem__)[-3:])


def test_noise_that_would_not_be_added_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"neftune_noise_alpha is 5\.0, but an encoder-decoder model"):
        make(tokenizer, neftune_noise_alpha=5.0)


def test_evaluation_in_training_is_that_of_full_logits(tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = make(tokenizer, eval_dataset=SAMPLES[:7], per_device_eval_batch_size=3)
    kl, cross_entropy = plain_means(trainer.model, trainer.teacher.model, SAMPLES[:7])
    found = trainer.evaluate()
    assert found["eval_kl"] == pytest.approx(kl, rel=1e-5)
    assert found["eval_cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("t5", marks=pytest.mark.long), "bart"])
def test_compiled_layers_train_as_uncompiled_ones(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain, compiled = (make(tokenizer, tiny_model(name), tiny_model(name, seed=1), **given) for given in ({}, options))
    kinds = {type(m).__name__ for m in compiled.model.modules() if hasattr(type(m), "compiled_from")}
    assert kinds == ({"T5Block"} if name == "t5" else {"BartEncoderLayer", "BartDecoderLayer"})
    plain.train()
    compiled.train()
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
