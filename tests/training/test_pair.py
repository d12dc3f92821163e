"""What student and teacher must be for each other, through the real `SRDTrainer`."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_trainer import config
from torch import nn
from torch.optim import SGD
from transformers import DataCollatorWithFlattening, PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer, UserError, evaluate, reflect
from srd_fast.data import DistillationCollator
from srd_fast.models import load_model
from srd_fast.reflection import Sampling
from srd_fast.teacher import LiveTeacher, build_teacher_cache
from srd_fast.training.pair import ready_pair

SAMPLES = tiny.tiny_samples(12)
pytestmark = pytest.mark.usefixtures("own_folder")


def make(student: nn.Module, teacher: Any, args: SRDConfig | None = None, **options: Any) -> SRDTrainer:
    given: dict[str, Any] = {"train_dataset": SAMPLES, "processing_class": tiny.tiny_tokenizer()} | options
    return SRDTrainer(student, teacher, args or config(), **given)


def with_pad() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def resized(model: PreTrainedModel, tokens: int) -> PreTrainedModel:
    model.resize_token_embeddings(tokens)
    return model


# Tokenizers and ids.


def test_an_added_pad_token_trains_as_without_it() -> None:
    losses = []
    for tokenizer, tokens, fields in (
        (tiny.tiny_tokenizer(), 300, {}),
        (with_pad(), 300, {"shared_vocabulary": True}),
        (with_pad(), 301, {"shared_vocabulary": True}),
    ):
        args = config(divergence="forward_kl", sft_weight=0.0, padding_free=False, **fields)
        student = resized(tiny.tiny_model("llama", seed=3), tokens)
        trainer = make(
            student,
            tiny.tiny_model("llama", layers=4),
            args,
            processing_class=tokenizer,
            teacher_tokenizer=tiny.tiny_tokenizer(),
        )
        trainer.train()
        losses.append([entry["divergence"] for entry in trainer.state.log_history if "divergence" in entry])
    assert losses[1] == losses[0]
    # The divergence is over the classes that both have, so one more class of the student's is not seen.
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_an_added_pad_token_names_the_way_out() -> None:
    student = resized(tiny.tiny_model("llama"), 301)
    options = {"processing_class": with_pad(), "teacher_tokenizer": tiny.tiny_tokenizer()}
    with pytest.raises(UserError, match=r"\[PAD\].*shared_vocabulary=True"):
        make(student, tiny.tiny_model("llama", seed=1), **options)


@pytest.mark.parametrize("who", ["student", "teacher", "teacher given by name", "teacher of a cache"])
def test_a_token_without_embedding_is_named_before_the_first_step(who: str, tmp_path: Path) -> None:
    few = {"student": 300, "teacher": 300} | {who.split()[0]: 290}
    student, teacher = (tiny.tiny_model("llama_untied", seed=i, vocab=few[n]) for i, n in enumerate(few))
    samples = [*SAMPLES, {"sample_id": "high", "input_ids": [3, 295, 5], "labels": [-100, 295, 5]}]
    samples = [s for s in samples if s["sample_id"] == "high" or max(s["input_ids"]) < 290]
    assert len(samples) > 3
    given: Any = teacher
    if "name" in who:
        teacher.save_pretrained(tmp_path / "t")
        tiny.tiny_tokenizer().save_pretrained(tmp_path / "t")
        given = str(tmp_path / "t")
    args = config(teacher_cache=str(tmp_path / "cache")) if "cache" in who else config()
    message = f"sample 'high' has token 295, and the {who.split()[0]} has embeddings for 290 tokens"
    with pytest.raises(UserError, match=message):
        make(student, given, args, train_dataset=samples)
    with pytest.raises(UserError, match=message):
        make(student, given, args, train_dataset=samples[:3], eval_dataset=samples)
    make(student, given, args, train_dataset=samples[:3])


@pytest.mark.parametrize("who", ["reflect", "evaluate", "teacher"])
def test_reflection_and_evaluation_name_it_too(who: str) -> None:
    samples = [s for s in SAMPLES if max(s["input_ids"]) < 298][:3]
    samples.append({"sample_id": "high", "input_ids": [3, 299, 5], "labels": [-100, 299, 5]})
    full, few = tiny.tiny_model("llama_untied"), tiny.tiny_model("llama_untied", vocab=298)
    options: dict[str, Any] = {"sampling": Sampling(max_new_tokens=2)}
    name = {"reflect": "student", "evaluate": "model", "teacher": "teacher"}[who]
    tokenizer = tiny.tiny_tokenizer()
    ways: dict[str, Callable[[], Any]] = {
        "reflect": lambda: reflect(few, samples, tokenizer, engine="transformers", **options),
        "evaluate": lambda: evaluate(few, samples, tokenizer, **options),
        "teacher": lambda: evaluate(full, samples, tokenizer, teacher=few, **options),
    }
    with pytest.raises(UserError, match=f"sample 'high' has token 299, and the {name} has embeddings for 298 tokens"):
        ways[who]()


def test_an_added_pad_token_without_embedding_pads_nothing_that_is_seen() -> None:
    student, options = tiny.tiny_model("llama"), {"sampling": Sampling(max_new_tokens=3)}
    both = [tiny.tiny_tokenizer(), with_pad()]
    scores = [reflect(student, SAMPLES, t, engine="transformers", **options).to_list() for t in both]
    assert scores[0] == scores[1]
    found = [evaluate(student, SAMPLES, t, teacher=tiny.tiny_model("llama", seed=1), **options) for t in both]
    assert found[0] == found[1]


def test_a_loaded_teacher_is_compared_with_the_tokenizer_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = tiny.tiny_model("llama", seed=1)
    with caplog.at_level(logging.WARNING):
        make(tiny.tiny_model("llama"), teacher)
    assert "the teacher's tokenizer is not known" in caplog.text
    caplog.clear()
    teacher.save_pretrained(tmp_path)
    with_pad().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="different tokenizers"):
        make(tiny.tiny_model("llama"), load_model(str(tmp_path)))
    with caplog.at_level(logging.WARNING):
        make(tiny.tiny_model("llama"), teacher, teacher_tokenizer=tiny.tiny_tokenizer())
    assert "is not known" not in caplog.text


def test_a_student_may_be_a_folder(tmp_path: Path) -> None:
    student, teacher = tiny.tiny_model("llama"), tiny.tiny_model("llama", seed=1)
    student.bfloat16().save_pretrained(tmp_path)
    trainer = make(str(tmp_path), teacher)  # type: ignore[arg-type]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.train().training_loss == make(load_model(str(tmp_path)), teacher).train().training_loss


# Weights.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_are_trained_in_float32(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    teacher = tiny.tiny_model("llama", seed=1, layers=4)
    given = tiny.tiny_model("llama").to(dtype)
    wide = copy.deepcopy(given).float()
    args = config(bf16=True, learning_rate=1e-5, optim="adamw_torch")
    with caplog.at_level(logging.WARNING):
        make(given, teacher, args).train()
    assert f"the student's {str(dtype)[6:]} weights are trained in float32" in caplog.text
    make(wide, teacher, args).train()
    assert {p.dtype for p in given.parameters()} == {torch.float32}
    for (name, found), wanted in zip(given.named_parameters(), wide.parameters()):
        assert torch.equal(found, wanted), name


def test_narrow_weights_without_mixed_precision_are_refused_unless_asked_for() -> None:
    student, teacher = tiny.tiny_model("llama").bfloat16(), tiny.tiny_model("llama", seed=1)
    with pytest.raises(UserError, match=r"weights are bfloat16, .* set bf16=True"):
        make(student, teacher)
    for fields in ({}, {"bf16": True}):
        trainer = make(student, teacher, config(keep_student_dtype=True, max_steps=1, **fields))
        trainer.train()
        assert student.dtype == torch.bfloat16


def test_frozen_narrow_weights_stay_beside_adapters() -> None:
    peft = pytest.importorskip("peft")
    student = tiny.tiny_model("llama").bfloat16()
    adapters = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["norm"])
    trainer = make(student, tiny.tiny_model("llama", seed=1), config(bf16=True), peft_config=adapters)
    trainer.train()
    found = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert found == {(False, torch.bfloat16), (True, torch.float32)}


def test_adapters_start_from_the_seed_alone() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for before, seed in ((1, 0), (2, 0), (1, 5)):
        adapters = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
        models = tiny.tiny_model("llama"), tiny.tiny_model("llama", seed=1)
        torch.manual_seed(before)
        drawn = torch.get_rng_state()
        trained, _ = ready_pair(*models, config(seed=seed), tiny.tiny_tokenizer(), None, adapters)
        assert torch.get_rng_state().equal(drawn)
        found.append({n: x for n, x in trained.named_parameters() if "lora_A" in n})
    first, again, other = found
    assert all(x.equal(again[n]) and not x.equal(other[n]) for n, x in first.items())
    assert first


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_not_missing_from_a_checkpoint(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda text, *_: said.append(text))
    args = config(output_dir=str(tmp_path), save_strategy="steps", save_steps=1, max_steps=1)
    student, teacher = tiny.tiny_model("llama", tie_word_embeddings=tied), tiny.tiny_model("llama", seed=1)
    make(student, teacher, args).train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(file)
    assert ("lm_head.weight" in weights) != tied
    again = make(tiny.tiny_model("llama", seed=3, tie_word_embeddings=tied), teacher, args)
    again._load_from_checkpoint(str(file.parent))
    assert not [x for x in said if "missing keys" in x]
    assert all(x.equal(again.model.state_dict()[n]) for n, x in student.state_dict().items())
    save_file({n: x for n, x in weights.items() if n != "model.norm.weight"}, file, {"format": "pt"})
    again._load_from_checkpoint(str(file.parent))
    assert "missing keys in the checkpoint model loaded: ['model.norm.weight']" in said[-1]


def taken_over(how: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher, student = tiny.tiny_model("llama", layers=4), tiny.tiny_model("llama", seed=3)
    if how == "modules":
        student.model.layers = nn.ModuleList([teacher.model.layers[0], teacher.model.layers[3]])
    elif how == "tensors":
        student.model.layers[0].load_state_dict(teacher.model.layers[0].state_dict(), assign=True)
    else:
        student.set_input_embeddings(teacher.get_input_embeddings())
    return student, teacher


@pytest.mark.parametrize("how", ["modules", "tensors", "embeddings"])
@pytest.mark.parametrize("live", [False, True], ids=["model", "source"])
def test_a_student_that_would_train_its_teacher_is_refused(how: str, live: bool) -> None:
    student, teacher = taken_over(how)
    name = "model.embed_tokens" if how == "embeddings" else "model.layers.0"
    with pytest.raises(UserError, match=rf"share \d+ of the weights that are trained, such as {name}.*copy.deepcopy"):
        make(student, LiveTeacher(teacher) if live else teacher)
    student = copy.deepcopy(student).requires_grad_()
    before = [p.clone() for p in student.parameters()]
    make(student, teacher).train()
    assert not any(torch.equal(a, b) for a, b in zip(before, student.parameters()))


def test_weights_that_are_not_trained_may_be_shared() -> None:
    student, teacher = taken_over("embeddings")
    student.get_input_embeddings().requires_grad_(False)
    kept = teacher.get_input_embeddings().weight.clone()
    make(student, teacher).train()
    assert torch.equal(teacher.get_input_embeddings().weight, kept)


# What comes wrapped, or in a form of its own.


def test_a_model_that_is_compiled_already_trains_as_it_would_without(caplog: pytest.LogCaptureFixture) -> None:
    plain, teacher = tiny.tiny_model("llama"), tiny.tiny_model("llama", seed=1)
    wrapped, wrapped_teacher = (torch.compile(copy.deepcopy(m), backend="eager") for m in (plain, teacher))
    make(plain, teacher).train()
    with caplog.at_level(logging.WARNING):
        make(wrapped, wrapped_teacher).train()
    assert "the student came compiled" in caplog.text
    assert "the teacher came compiled" in caplog.text
    for found, wanted in zip(wrapped.parameters(), plain.parameters()):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("source", ["live", "cache"])
def test_flattened_batches_of_another_library(source: str, tmp_path: Path) -> None:
    teacher = tiny.tiny_model("llama_untied", seed=1)
    losses = []
    for collate in (DistillationCollator(flatten=True), DataCollatorWithFlattening()):
        given: Any = teacher
        if source == "cache":
            given = build_teacher_cache(teacher, SAMPLES, tmp_path / "cache", progress=False)
        trainer = make(tiny.tiny_model("llama"), given, data_collator=collate, eval_dataset=SAMPLES[:5])
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e] + [trainer.evaluate()["eval_kl"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_flattened_batches_for_a_model_that_needs_padding_are_refused() -> None:
    with pytest.raises(UserError, match="DataCollatorWithFlattening makes batches without padding, but the teacher"):
        make(
            tiny.tiny_model("llama"),
            tiny.tiny_model("gemma2"),
            data_collator=DataCollatorWithFlattening(),
        )


def test_a_collator_without_mask_or_positions_has_no_padding() -> None:
    alike = [{**s, "input_ids": s["input_ids"][:4], "labels": [-100, -100, *s["input_ids"][2:4]]} for s in SAMPLES]

    def stacked(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        assert all(isinstance(s["labels"], list) for s in samples)
        return {name: torch.tensor([s[name] for s in samples]) for name in ("input_ids", "labels")}

    found = []
    for collate in (stacked, None):
        trainer = make(
            tiny.tiny_model("llama"),
            tiny.tiny_model("llama", seed=1),
            config(padding_free=False),
            train_dataset=alike,
            data_collator=collate,
        )
        found.append(trainer.train().training_loss)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# Optimizers.


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "schedule_free_adamw", "grokadamw", "lomo", "adamw_anyprecision"])
def test_an_optimizer_without_its_package_is_refused_with_its_name(optim: str) -> None:
    with pytest.raises(UserError, match=rf"optim is .*{optim}.*nstall"):
        make(tiny.tiny_model("llama"), tiny.tiny_model("llama", seed=1), config(optim=optim))


class ScheduleFree(SGD):
    """Schedule-free SGD (arXiv 2405.15682): gradients at y, the weights that count are x, their mean over steps."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, lr=lr)
        self.beta, self.count, self.training = beta, 0, True
        self.z = {p: p.detach().clone() for p in self.param_groups[0]["params"]}
        self.x = {p: p.detach().clone() for p in self.z}

    @torch.no_grad()
    def _place(self, training: bool) -> None:
        self.training = training
        for p in self.z:
            p.copy_(torch.lerp(self.z[p], self.x[p], self.beta) if training else self.x[p])

    def train(self) -> None:
        self._place(True)

    def eval(self) -> None:
        self._place(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert self.training
        self.count += 1
        for p in self.z:
            self.z[p] -= self.param_groups[0]["lr"] * p.grad
            self.x[p] = torch.lerp(self.x[p], self.z[p], 1 / self.count)
        self._place(True)


def test_a_schedule_free_optimizer_shows_its_weights_for_evaluation_checkpoints_and_the_end(tmp_path: Path) -> None:
    student, teacher = tiny.tiny_model("llama"), tiny.tiny_model("llama", seed=1)
    optimizer = ScheduleFree(student.parameters(), lr=0.05)
    args = config(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, max_steps=3, eval_strategy="steps")
    args.eval_steps = 1
    trainer = make(student, teacher, args, eval_dataset=SAMPLES[:4], optimizers=(optimizer, None))
    seen: dict[int, list[torch.Tensor]] = {}

    def keep(*_: Any, **__: Any) -> Any:
        seen[optimizer.count] = [x.clone() for x in optimizer.x.values()]
        return original(*_, **__)

    original, optimizer.step = optimizer.step, keep  # type: ignore[method-assign]
    trainer.train()
    for found, wanted in zip(student.parameters(), optimizer.x.values()):
        assert torch.equal(found, wanted)
    saved = load_model(str(tmp_path / "checkpoint-2"))
    for found, wanted in zip(saved.parameters(), seen[2]):
        assert torch.equal(found, wanted)
    logged = [e["eval_kl"] for e in trainer.state.log_history if "eval_kl" in e]
    assert trainer.evaluate()["eval_kl"] == logged[-1]
    assert len(set(logged)) == len(logged)


def test_towers_that_text_never_reaches_are_not_trained_and_stay_as_they_are(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    student = tiny.tiny_model("gemma3_vision")
    before = {n: p.clone() for n, p in student.named_parameters()}
    trainer = make(student, tiny.tiny_model("llama", seed=1))
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trained} == {"language_model"}
    assert {n.split(".")[1] for n in before} == {"language_model", "vision_tower", "multi_modal_projector"}
    trainer.train()
    assert {n for n, p in student.named_parameters() if not torch.equal(p, before[n])} == trained
    student.save_pretrained(tmp_path)
    assert all(
        torch.equal(p, dict(student.named_parameters())[n]) for n, p in load_model(str(tmp_path)).named_parameters()
    )
    adapters = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = make(tiny.tiny_model("gemma3_vision"), tiny.tiny_model("llama", seed=1), peft_config=adapters).model
    assert all("language_model" in n for n, p in adapted.named_parameters() if p.requires_grad)
