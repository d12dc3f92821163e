"""`SRDTrainer` against a plain loop over full logits: losses, gradients, samples, schedules, checkpoints."""

import copy
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import assert_same, plain_cross_entropy, plain_divergence, plain_loss
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from srd_fast import CurriculumPlan, SRDConfig, SRDTrainer, UserError
from srd_fast.models import call_through, find_head, hidden_states, load_model
from srd_fast.teacher import HiddenRows
from srd_fast.teacher import rows_with_loss as states_with_loss

SAMPLES = tiny.tiny_samples(15)
THREE_DIVERGENCES = (("forward_kl", {}), ("skew_reverse_kl", {"skew": 0.2}), ("jsd", {"beta": 0.3}))


class Watched(SRDTrainer):
    """Keeps what each step saw and gave: rows and losses of its micro-batches, gradients, size of optimizer state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[list[list[int]]] = []
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.state_sizes: list[int] = []
        self._step = -1
        self.add_callback(_BeforeStep(self))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step != self._step:
            self._step = self.state.global_step
            self.rows.append([])
            self.losses.append(0.0)
        ids = inputs["input_ids"]
        if "cu_seq_lens" in inputs:
            self.rows[-1] += [x.tolist() for x in ids[0].split(inputs["cu_seq_lens"].diff().tolist())]
        else:
            self.rows[-1] += [x[mask].tolist() for x, mask in zip(ids, inputs["attention_mask"].bool())]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses[-1] += loss.item()
        return loss

    @property
    def logs(self) -> list[dict[str, float]]:
        """One dictionary for each training log."""
        return [entry for entry in self.state.log_history if "loss" in entry]


class _BeforeStep(TrainerCallback):
    def __init__(self, trainer: Watched) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = self.trainer.model.named_parameters()
        self.trainer.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        optimizer = kwargs["optimizer"]
        self.trainer.state_sizes.append(len(getattr(optimizer, "optimizer", optimizer).state))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")


def config(**fields: Any) -> SRDConfig:
    """Plain SGD without clipping, so that weights follow from gradients; every step logged, nothing saved."""
    usual: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    usual |= {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05, "logging_steps": 1, "disable_tqdm": True}
    usual |= {"per_device_train_batch_size": 4, "epochs_per_stage": 1}
    return SRDConfig(**{**usual, **fields})


def make(
    tokenizer: PreTrainedTokenizerFast,
    student: PreTrainedModel | None = None,
    teacher: Any = None,
    samples: Sequence[Mapping[str, Any]] = SAMPLES,
    plan: CurriculumPlan | None = None,
    args: SRDConfig | None = None,
    **options: Any,
) -> Watched:
    return Watched(
        model=tiny.tiny_model("llama") if student is None else student,
        teacher_model=tiny.tiny_model("llama_untied", seed=1, width=24) if teacher is None else teacher,
        args=args or config(),
        train_dataset=list(samples),
        curriculum=plan,
        processing_class=tokenizer,
        **options,
    )


def three_stages() -> CurriculumPlan:
    """Subsets of 6, 5 and 4 samples, out of the order of the data."""
    ids = [s["sample_id"] for s in SAMPLES][::-1]
    return CurriculumPlan(subsets=[ids[:6], ids[6:11], ids[11:]])


def rows_with_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The model's own logits that predict a label, and the labels."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return logits[labels != tiny.IGNORE], labels[labels != tiny.IGNORE]


def naive_step(
    student: nn.Module, teacher: nn.Module, samples: Sequence[Mapping[str, Any]], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch from full logits."""
    batch = tiny.collate(samples)
    z_S, labels = rows_with_loss(student, batch)
    with torch.no_grad():
        z_T, _ = rows_with_loss(teacher, batch)
    loss = plain_loss(z_S, z_T, labels, **options).mean()
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    return loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every parameter's, relative to its own norm; below 3e-3 of the whole norm rounding has the say."""
    assert set(found) == set(wanted)
    whole = torch.stack([g.norm() for g in wanted.values()]).norm().item()
    assert whole > 1e-4
    for name, g in wanted.items():
        difference = (found[name] - g).norm().item()
        assert difference <= tolerance * max(g.norm().item(), 3e-3 * whole), f"{name}: {difference:.1e}, {g.norm():.1e}"
    assert sum(g.norm().item() > 1e-4 * whole for g in wanted.values()) > 0.8 * len(wanted)


def in_order(trainer: SRDTrainer) -> list[Mapping[str, Any]]:
    """The samples in the order that the curriculum promises."""
    return [SAMPLES[i] for i in trainer.curriculum.indices()]


# A step is the textbook's.


@pytest.mark.parametrize(
    ("architecture", "divergence", "options"),
    [
        *[(a, d, o) for a in ("llama", "gpt2", "gemma2", "phi", "granite") for d, o in THREE_DIVERGENCES],
        ("llama_untied", "reverse_kl", {}),
        ("gptj", "tvd", {}),
        ("cohere", "skew_forward_kl", {"skew": 0.2}),
        ("qwen2", "skew_reverse_kl", {"skew": 0.2}),
        ("opt", "jsd", {"beta": 0.5}),
        ("llama", "csd_ts", {}),
        ("llama", "adaptive_kl", {}),
        ("llama", "forward_kl", {"standardize_logits": True}),
    ],
)
def test_a_step_is_that_of_a_plain_loop(
    architecture: str, divergence: str, options: dict[str, float], tokenizer: PreTrainedTokenizerFast
) -> None:
    student = tiny.tiny_model(architecture)
    teacher = tiny.tiny_model(architecture, seed=1, width=24, layers=3, vocab=312)
    args = config(divergence=divergence, temperature=2.0, sft_weight=0.3, **options)
    trainer = make(tokenizer, student, teacher, args=args)
    batch = in_order(trainer)[:4]
    assert len({len(s["input_ids"]) for s in batch}) > 1
    loss, wanted = naive_step(
        copy.deepcopy(student), teacher, batch, divergence=divergence, temperature=2.0, sft_weight=0.3, **options
    )
    trainer.train()
    assert trainer.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    assert trainer.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert_gradients(trainer.gradients[0], wanted)


@pytest.mark.parametrize(
    ("divergence", "temperature_scaling", "scaled"),
    [
        ("reverse_kl", True, True),
        ("reverse_kl", False, False),
        ("reverse_kl", "official", False),
        ("skew_reverse_kl", "official", True),
        ("skew_forward_kl", "official", False),
        ("tvd", "official", False),
        ("forward_kl", "official", True),
    ],
)
def test_scaling_with_the_temperature(
    divergence: str, temperature_scaling: Any, scaled: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    args = config(divergence=divergence, temperature=2.0, sft_weight=0.3, temperature_scaling=temperature_scaling)
    trainer = make(tokenizer, args=args)
    expected, wanted = naive_step(
        copy.deepcopy(trainer.model),
        trainer.teacher.model,
        in_order(trainer)[:4],
        divergence=divergence,
        temperature=2.0,
        sft_weight=0.3,
        temperature_scaling=scaled,
    )
    trainer.train()
    assert trainer.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    assert_gradients(trainer.gradients[0], wanted)


def test_a_run_is_that_of_a_plain_loop(tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights after three stages of SGD, each with its temperature, weight and learning rate."""
    args = config(stage_learning_rates=[0.2, 0.1, 0.05], min_learning_rate=0.01)
    trainer = make(tokenizer, plan=three_stages(), args=args)
    curriculum, student = trainer.curriculum, copy.deepcopy(trainer.model)
    samples, wanted = in_order(trainer), []
    for step in range(curriculum.total_steps):
        options = {"temperature": curriculum.temperature(step), "sft_weight": curriculum.sft_weight(step)}
        batch = samples[4 * step : 4 * step + 4]
        _, gradient = naive_step(student, trainer.teacher.model, batch, divergence="skew_reverse_kl", **options)
        wanted.append(gradient)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter -= curriculum.learning_rate(step) * gradient[name]
    trainer.train()
    assert trainer.state.global_step == curriculum.total_steps == 9
    for found, gradient in zip(trainer.gradients, wanted):
        assert_gradients(found, gradient, 1e-4)
    for (name, found), expected in zip(trainer.model.named_parameters(), student.parameters()):
        assert_same(found, expected, 1e-5, name)


def test_logged_values_are_means_over_the_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make(tokenizer, args=config(temperature=3.0, sft_weight=0.25, divergence="forward_kl"))
    batch = tiny.collate(in_order(trainer)[:4])
    with torch.no_grad():
        z_S, labels = rows_with_loss(trainer.model, batch)
        z_T, _ = rows_with_loss(trainer.teacher.model, batch)
    trainer.train()
    log = trainer.logs[0]
    divergence = plain_divergence("forward_kl", z_T, z_S, 3.0, 0.1, 0.5).mean().item()
    cross_entropy = plain_cross_entropy(z_S, labels).mean().item()
    log_q = torch.log_softmax(z_S, -1)
    assert log["divergence"] == pytest.approx(divergence, rel=1e-5)
    assert log["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)
    assert log["entropy"] == pytest.approx(-(log_q.exp() * log_q).sum(-1).mean().item(), rel=1e-5)
    assert log["loss"] == pytest.approx(0.25 * cross_entropy + 0.75 * 9 * divergence, rel=1e-3)
    assert log["tokens_per_second"] > 0
    assert log["memory_mb"] > 10


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logs_over_several_steps_are_their_mean(accumulation: int, tokenizer: PreTrainedTokenizerFast) -> None:
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "epochs_per_stage": 2}
    each = make(tokenizer, args=config(**fields))
    each.train()
    rare = make(tokenizer, args=config(**fields, logging_steps=4))
    rare.train()
    assert len(rare.logs) == len(each.logs) // 4 >= 1
    for i, log in enumerate(rare.logs):
        for name in ("loss", "divergence", "cross_entropy", "entropy"):
            expected = sum(x[name] for x in each.logs[4 * i : 4 * i + 4]) / 4
            assert log[name] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("last", [8, 10])
def test_accumulated_gradients_are_those_of_the_whole_batch(last: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """4 x 2 against 8 x 1, uneven responses; with 10 samples the last step takes up from one more shuffle."""
    samples = tiny.tiny_samples(last, seed=3, longest=20)
    fields: dict[str, Any] = {"epochs_per_stage": 2, "temperature": 2.0}
    whole = make(tokenizer, samples=samples, args=config(per_device_train_batch_size=8, **fields))
    parts_args = config(per_device_train_batch_size=2, gradient_accumulation_steps=4, **fields)
    parts = make(tokenizer, samples=samples, args=parts_args)
    whole.train()
    parts.train()
    assert whole.state.global_step == parts.state.global_step == (2 if last == 8 else 3)
    assert [len(rows) for rows in parts.rows] == [8] * parts.state.global_step
    for one, other in zip(parts.gradients, whole.gradients):
        assert_gradients(one, other, 1e-5 if one is parts.gradients[0] else 1e-4)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name in ("loss", "divergence", "cross_entropy", "entropy"):
        assert [x[name] for x in parts.logs] == pytest.approx([x[name] for x in whole.logs], rel=1e-3), name


def test_a_label_on_the_first_token_has_nothing_that_predicts_it(tokenizer: PreTrainedTokenizerFast) -> None:
    def collator(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = tiny.collate(samples)
        batch["labels"][:, 0] = batch["input_ids"][:, 0]
        return batch

    usual = make(tokenizer, args=config(padding_free=False))
    first = make(tokenizer, data_collator=collator)
    first.train()
    usual.train()
    assert first.losses == usual.losses
    assert_gradients(first.gradients[-1], usual.gradients[-1], 0.0)


def test_tokens_per_second_count_labels_in_steps(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves on by a second whenever it is read: once a step, none of it in logging or evaluation."""
    ticks = itertools.count()
    monkeypatch.setattr("srd_fast.training.callbacks.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    args = config(per_device_train_batch_size=2, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = make(tokenizer, args=args, eval_dataset=SAMPLES[:2])
    trainer.train()
    samples = in_order(trainer)
    for step, log in enumerate(trainer.logs):
        labels = [x for s in samples[4 * step : 4 * step + 4] for x in s["labels"] if x != tiny.IGNORE]
        assert log["tokens_per_second"] == len(labels)


def test_a_teacher_is_any_source_of_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.tiny_model("phi", seed=1, width=24)

    class Own:
        num_classes = 300

        @torch.no_grad()
        def rows(self, batch: dict[str, Tensor], temperature: float) -> HiddenRows:
            states = hidden_states(model, {n: batch[n] for n in ("input_ids", "attention_mask")})
            return HiddenRows(states_with_loss(states, batch), find_head(model))

    own, live = make(tokenizer, teacher=Own()), make(tokenizer, teacher=model)
    own.train()
    live.train()
    assert_gradients(own.gradients[-1], live.gradients[-1], 3e-6)  # padded against flattened


def test_the_teacher_stays_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = tiny.tiny_model("gpt2", seed=1, resid_pdrop=0.5, embd_pdrop=0.5).train()
    before = copy.deepcopy(teacher.state_dict())
    trainer = make(tokenizer, teacher=teacher)
    trainer.train()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_training_closes_in_on_the_teacher(tokenizer: PreTrainedTokenizerFast) -> None:
    args = config(optim="adamw_torch", learning_rate=2e-2, epochs_per_stage=15, divergence="forward_kl", sft_weight=0.0)
    trainer = make(tokenizer, args=args, eval_dataset=SAMPLES)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert trainer.evaluate()["eval_kl"] < 0.5 * before


def test_rows_of_text_train_too(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"instruction": f"Count to {i}.", "output": " ".join("1234"[:i])} for i in range(1, 5)]
    trainer = make(tokenizer, samples=rows, student=tiny.tiny_model("llama", max_position_embeddings=512))
    trainer.train()
    assert trainer.state.global_step == 1
    texts = [tokenizer.decode(row) for row in trainer.rows[0]]
    assert any(text.endswith("### Response:\n1 2 3 4" + tiny.EOS) for text in texts)


# The curriculum.


def test_logs_follow_the_curriculum(tokenizer: PreTrainedTokenizerFast) -> None:
    args = config(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        epochs_per_stage=2,
        learning_rate=0.02,
        stage_learning_rates=[0.02, 0.04, 0.01],
        min_learning_rate=0.001,
        warmup_steps=2,
    )
    trainer = make(tokenizer, plan=three_stages(), args=args)
    trainer.train()
    c = trainer.curriculum
    assert [s.steps for s in c.stages] == [3, 6, 8]
    assert len(trainer.logs) == trainer.state.global_step == trainer.state.max_steps == 17
    for step, log in enumerate(trainer.logs):
        assert log["step"] == step + 1
        assert log["stage"] == c.stage_of(step) + 1
        assert log["temperature"] == c.temperature(step)
        assert log["sft_weight"] == c.sft_weight(step)
        assert log["learning_rate"] == pytest.approx(c.learning_rate(step), rel=1e-9)
    assert [x["stage"] for x in trainer.logs] == [1] * 3 + [2] * 6 + [3] * 8
    assert [trainer.logs[i]["temperature"] for i in (0, 2, 3, 8, 9, 16)] == [1.0, 1.0, 1.5, 1.5, 2.0, 2.0]
    assert [trainer.logs[i]["sft_weight"] for i in (0, 2, 3, 9)] == pytest.approx([0.3, 0.3, 0.2, 0.1])
    rates = [x["learning_rate"] for x in trainer.logs]
    assert rates[:3] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])
    assert rates[3:6] == pytest.approx([0.04 / 3, 0.08 / 3, 0.04])
    assert rates[11] == pytest.approx(0.01)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("seed", [0, 7])
def test_each_step_sees_the_samples_of_the_curriculum(
    accumulation: int, seed: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    fields = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make(tokenizer, plan=three_stages(), args=config(**fields, seed=seed, epochs_per_stage=2))
    trainer.train()
    expected = [s["input_ids"] for s in in_order(trainer)]
    assert [row for rows in trainer.rows for row in rows] == expected
    assert [len(rows) for rows in trainer.rows] == [4] * trainer.curriculum.total_steps
    easiest = [SAMPLES[i]["input_ids"] for i in range(14, 8, -1)]
    assert all(row in easiest for rows in trainer.rows[:3] for row in rows)
    assert {tuple(row) for row in trainer.rows[9][:4]} != {tuple(row) for row in trainer.rows[0][:4]}


@pytest.mark.parametrize(("field", "changes"), [("seed", False), ("data_seed", True)])
def test_data_seed_decides_the_order(field: str, changes: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    orders = []
    for value in (1, 2):
        args = config(**{"data_seed": 5, **{field: value}})
        trainer = make(tokenizer, args=args)
        orders.append(list(trainer.curriculum.indices()))
    assert (orders[0] != orders[1]) == changes


def test_dropped_samples_are_never_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    plan = CurriculumPlan(subsets=[["s03", "s01"], ["s07"]], dropped=[{"sample_id": "s00", "reason": "hard"}])
    trainer = make(tokenizer, plan=plan, args=config(epochs_per_stage=6))
    trainer.train()
    seen = {tuple(row) for rows in trainer.rows for row in rows}
    assert seen == {tuple(SAMPLES[i]["input_ids"]) for i in (1, 3, 7)}


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_optimizer_state_at_stage_borders(reset: bool, accumulation: int, tokenizer: PreTrainedTokenizerFast) -> None:
    fields = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = make(tokenizer, plan=three_stages(), args=config(**fields, optim="adamw_torch", reset_optimizer=reset))
    trainer.train()
    assert [s.first_step for s in trainer.curriculum.stages] == [0, 2, 5]
    empty = [step for step, size in enumerate(trainer.state_sizes) if size == 0]
    assert empty == ([0, 2, 5] if reset else [0])
    assert set(trainer.state_sizes) == {0, len(list(trainer.model.parameters()))}


# Checkpoints.


class StopAt(TrainerCallback):
    """Saves and stops after a step, as an interrupted run would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def resumable(
    tokenizer: PreTrainedTokenizerFast, folder: Path, callbacks: list[TrainerCallback], **fields: Any
) -> Watched:
    """Dropout, AdamW, accumulation, three stages of 2, 4 and 6 steps: all that a checkpoint has to bring back."""
    plan = CurriculumPlan(subsets=[[s["sample_id"] for s in SAMPLES[i : i + 4]] for i in (0, 4, 8)])
    args = config(
        output_dir=str(folder),
        optim="adamw_torch",
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        epochs_per_stage=2,
        max_grad_norm=1.0,
        **fields,
    )
    student = tiny.tiny_model("gpt2", resid_pdrop=0.2, embd_pdrop=0.2)
    return make(tokenizer, student, plan=plan, args=args, callbacks=callbacks)


@pytest.mark.parametrize("reset", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_in_the_same_weights(
    reset: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Stopped in the middle of a stage, at a border, and one step behind it."""
    whole = resumable(tokenizer, tmp_path / "whole", [], reset_optimizer=reset)
    whole.train()
    assert whole.state.global_step == 12
    assert [s.first_step for s in whole.curriculum.stages] == [0, 2, 6]
    for stop in (5, 6, 7):
        folder = tmp_path / str(stop)
        first = resumable(tokenizer, folder, [StopAt(stop)], reset_optimizer=reset)
        first.train()
        assert first.state.global_step == stop
        second = resumable(tokenizer, folder, [], reset_optimizer=reset)
        second.train(resume_from_checkpoint=True)
        assert second.state.global_step == 12
        assert [row for rows in second.rows for row in rows] == [row for rows in whole.rows[stop:] for row in rows]
        for (name, found), expected in zip(second.model.named_parameters(), whole.model.parameters()):
            assert torch.equal(found, expected), f"{name} after stopping at {stop}"
        for log, expected_log in zip(second.logs, whole.logs):
            shared = ("loss", "divergence", "learning_rate", "stage", "temperature", "sft_weight", "step")
            assert {n: log[n] for n in shared} == {n: expected_log[n] for n in shared}


def test_resuming_without_a_checkpoint_starts_at_the_beginning(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("srd_fast"), "propagate", True)  # the command line turns it off
    fresh = resumable(tokenizer, tmp_path / "a", [])
    fresh.train()
    with caplog.at_level(logging.WARNING, logger="srd_fast"):
        resumed = resumable(tokenizer, tmp_path / "never" / "made", [])
        resumed.train(resume_from_checkpoint=True)
    assert "starting from the beginning" in caplog.text
    assert resumed.state.global_step == 12
    for found, expected in zip(resumed.model.parameters(), fresh.model.parameters()):
        assert torch.equal(found, expected)


def test_resuming_passes_over_a_checkpoint_cut_short(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    resumable(tokenizer, tmp_path, [StopAt(9)], save_strategy="steps", save_steps=4).train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8", "checkpoint-9"}
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-9" / "model.safetensors").unlink()
    resumed = resumable(tokenizer, tmp_path, [])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert len(resumed.rows) == 4


# Options of the Trainer.


def test_adapters_are_all_that_is_trained(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    student, teacher = tiny.tiny_model("llama"), tiny.tiny_model("llama_untied", seed=1, width=24)
    before = copy.deepcopy(student.state_dict())
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    fields: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 0.03, "epochs_per_stage": 12}
    fields |= {"divergence": "forward_kl", "temperature": 2.0, "sft_weight": 0.1}
    args = config(output_dir=str(tmp_path), save_strategy="steps", save_steps=20, **fields)
    trainer = make(tokenizer, student, teacher, args=args, peft_config=adapters)
    options = {"divergence": "forward_kl", "temperature": 2.0, "sft_weight": 0.1}
    _, wanted = naive_step(copy.deepcopy(trainer.model), teacher, in_order(trainer)[:4], **options)
    trainer.train()

    assert all("lora_" in name for name in trainer.gradients[0])
    assert len(trainer.gradients[0]) == 8
    assert_gradients(trainer.gradients[0], wanted)
    assert not find_head(trainer.model).weight.requires_grad
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.replace("base_layer.", "")]), name
    assert sum(trainer.losses[-6:]) < 0.93 * sum(trainer.losses[:6])

    folder = tmp_path / "checkpoint-20"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    resumed = make(tokenizer, tiny.tiny_model("llama"), teacher, args=args, peft_config=adapters)
    resumed.train(resume_from_checkpoint=str(folder))
    for (name, found), expected in zip(resumed.model.named_parameters(), trainer.model.parameters()):
        assert torch.equal(found, expected), name


def test_adapters_on_the_head_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Their part of the logits would be lost without a word, and they would get no gradient."""
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match="adapter"):
        make(tokenizer, tiny.tiny_model("llama_untied"), peft_config=adapters)


@pytest.mark.parametrize("batch_size", [3, 8])
@pytest.mark.parametrize(("student", "teacher"), [("gpt2", "llama_untied"), ("gemma2", "gemma2"), ("phi", "granite")])
def test_evaluation_is_that_of_full_logits(
    student: str, teacher: str, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = tiny.tiny_samples(7, seed=4)
    trainer = make(
        tokenizer,
        tiny.tiny_model(student, resid_pdrop=0.3),
        tiny.tiny_model(teacher, seed=1, width=24),
        args=config(per_device_eval_batch_size=batch_size, temperature=3.0),
        eval_dataset=rows,
    )
    batch = tiny.collate(rows)
    with torch.no_grad():
        z_S, labels = rows_with_loss(trainer.model, batch)
        z_T, _ = rows_with_loss(trainer.teacher.model, batch)
    trainer.model.train()
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == pytest.approx(
        plain_divergence("forward_kl", z_T, z_S, 1.0, 0, 0).mean().item(), rel=1e-5
    )
    assert metrics["eval_cross_entropy"] == pytest.approx(plain_cross_entropy(z_S, labels).mean().item(), rel=1e-5)
    assert metrics["eval_loss"] == metrics["eval_kl"]
    assert trainer.model.training
    assert all(p.grad is None for p in trainer.model.parameters())


def test_other_rows_and_another_prefix_can_be_evaluated(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make(tokenizer, eval_dataset=SAMPLES[:5])
    whole = trainer.evaluate()
    again = trainer.evaluate(SAMPLES[:5], metric_key_prefix="test")
    assert again["test_kl"] == whole["eval_kl"]


def test_evaluation_during_training_changes_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    student = {"student": tiny.tiny_model("gpt2"), "plan": three_stages()}
    alone = make(tokenizer, **copy.deepcopy(student))
    alone.train()
    args = config(eval_strategy="steps", eval_steps=2)
    beside = make(tokenizer, **student, args=args, eval_dataset=SAMPLES[:4])
    beside.train()
    evaluations = [entry for entry in beside.state.log_history if "eval_kl" in entry]
    assert [entry["step"] for entry in evaluations][:4] == [2, 4, 6, 8]
    assert all(entry["eval_loss"] == entry["eval_kl"] > 0 for entry in evaluations)
    for found, expected in zip(beside.model.parameters(), alone.model.parameters()):
        assert torch.equal(found, expected)
    assert [x["divergence"] for x in beside.logs] == [x["divergence"] for x in alone.logs]


@pytest.mark.parametrize("metric", ["loss", "eval_kl", "cross_entropy"])
def test_the_best_model_is_the_closest_to_the_teacher(
    metric: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    fields |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "epochs_per_stage": 3}
    args = config(
        output_dir=str(tmp_path), optim="adamw_torch", learning_rate=0.3, restart_learning_rate=False, **fields
    )
    trainer = make(tokenizer, args=args, eval_dataset=SAMPLES)
    trainer.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    values = [e[name] for e in trainer.state.log_history if name in e]
    assert min(values) < 0.99 * max(values)
    assert trainer.state.best_metric == min(values)
    assert trainer.evaluate()[name] == pytest.approx(min(values), rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_mixed_precision_stays_near_float32(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    steps = []
    for bf16 in (False, True):
        trainer = make(tokenizer, tiny.tiny_model(architecture), args=config(bf16=bf16), eval_dataset=SAMPLES)
        trainer.train()
        steps.append(trainer)
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        assert {g.dtype for g in trainer.gradients[0].values()} == {torch.float32}
    full, mixed = steps
    assert mixed.losses[0] != full.losses[0]
    assert mixed.losses == pytest.approx(full.losses, rel=0.03)
    assert_gradients(mixed.gradients[0], full.gradients[0], 0.2)
    assert mixed.evaluate()["eval_kl"] == pytest.approx(full.evaluate()["eval_kl"], rel=0.05)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    lora: bool, architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    peft = pytest.importorskip("peft")
    target = ["q_proj"] if architecture == "llama" else ["c_attn"]
    adapters = peft.LoraConfig(target_modules=target, init_lora_weights=False) if lora else None
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = tiny.tiny_model(architecture)
        trainer = make(tokenizer, student, args=config(gradient_checkpointing=checkpointing), peft_config=adapters)
        trainer.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in student.modules()) == checkpointing
        runs.append(trainer)
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-6)
    for found, wanted in zip(runs[1].gradients, runs[0].gradients):
        assert_gradients(found, wanted, 1e-5)


def test_nothing_is_reported_to_unless_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.entries: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.entries.append(dict(logs))

    reporter = Reporter()
    trainer = make(tokenizer, callbacks=[reporter], args=config(report_to="none"))
    trainer.train()
    assert config().report_to == []
    homes = {type(c).__module__ for c in trainer.callback_handler.callbacks}
    assert not any("integration" in home for home in homes)
    wanted = {"loss", "divergence", "cross_entropy", "entropy", "stage", "temperature", "sft_weight"}
    assert wanted <= set(reporter.entries[0])
    assert all(isinstance(v, (int, float)) for v in reporter.entries[0].values())


def test_saved_settings_are_json(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = make(tokenizer, args=config(temperature=[1.0], epochs_per_stage=2.0))
    trainer.train()
    trainer.save_state()
    settings = json.loads(trainer.args.to_json_string())
    assert settings["divergence"] == "skew_reverse_kl"
    assert settings["temperature"] == [1.0]
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 8


# Under a wrapper (DDP and its like).


class Wrapper(nn.Module):
    """Counts its calls, as DDP must be called to prepare for the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.inner(*args)


def test_the_wrapper_is_called_and_the_model_left_as_it_was() -> None:
    inner = nn.Linear(3, 2)
    wrapper, x = Wrapper(inner), torch.ones(1, 3)
    own = inner(x)
    out, beside = call_through(wrapper, inner, lambda v: (inner(v) * 2, "beside"), x)
    assert (wrapper.calls, beside) == (1, "beside")
    assert torch.equal(out, own * 2)
    assert torch.equal(wrapper(x), own)
    assert "forward" not in vars(inner)
    with torch.no_grad():
        assert call_through(wrapper, inner, lambda v: len(v), x) == 1
    assert wrapper.calls == 3
    assert torch.equal(call_through(inner, inner, lambda v: v + 1, x), x + 1)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    inner = nn.Linear(3, 2)

    def fail(x: Tensor) -> None:
        raise RuntimeError("out of memory")

    for wrapper in (Wrapper(inner), nn.Sequential(nn.Linear(7, 3), inner)):
        with pytest.raises(RuntimeError, match=r"out of memory|shapes"):
            call_through(wrapper, inner, fail, torch.ones(1, 3))
        assert inner(torch.ones(1, 3)).shape == (1, 2)


# A user's mistakes.


def test_missing_and_wrong_arguments_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="processing_class is missing"):
        make(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="args must be an SRDConfig, got TrainingArguments"):
        make(tokenizer, args=TrainingArguments(output_dir="out", use_cpu=True))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="train_dataset is empty"):
        make(tokenizer, samples=[])


def test_models_that_do_not_fit_together_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="300 and 500 classes"):
        make(tokenizer, teacher=tiny.tiny_model("llama", vocab=500))
    other = tiny.tiny_tokenizer(["another text"], vocab_size=270)
    with pytest.raises(UserError, match="different tokenizers"):
        make(tokenizer, teacher_tokenizer=other)
    tiny.tiny_model("llama").save_pretrained(tmp_path / "teacher")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="different tokenizers"):
        make(tokenizer, teacher=load_model(str(tmp_path / "teacher")))


def test_a_tokenizer_in_the_current_folder_is_not_the_teachers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A teacher made in code was loaded from no folder at all."""
    tiny.tiny_tokenizer(["another text"], vocab_size=270).save_pretrained(tmp_path)
    assert Path.cwd() == tmp_path
    make(tokenizer)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_heads_that_are_not_understood_are_refused(side: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.tiny_model("llama", final_logit_softcapping=1.0)
    with pytest.raises(UserError, match=f"{side} LlamaForCausalLM: its hidden states times its head differ"):
        make(tokenizer, **{side: model})


def test_a_plan_for_other_data_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="plan keeps 1 samples that the data does not have, the first is 'x9'"):
        make(tokenizer, plan=CurriculumPlan(subsets=[["s00", "x9"]]))


@pytest.mark.parametrize("field", ["temperature", "sft_weight", "epochs_per_stage", "stage_learning_rates"])
def test_a_list_for_another_number_of_stages_is_refused(field: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=f"{field} has 2 values for 3 stages"):
        make(tokenizer, plan=three_stages(), args=config(**{field: [0.5, 1.0]}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("temperature", x) for x in (0, -1.0, float("nan"), [1.0, 0.0], "2")],
        *[(f, -0.1) for f in ("temperature_start", "temperature_end", "learning_rate", "epochs_per_stage")],
        *[(f, x) for f in ("sft_weight", "sft_weight_start", "sft_weight_end", "skew", "beta") for x in (-0.1, 1.1)],
        ("sft_weight", [0.5, float("nan")]),
        ("stage_learning_rates", [1e-3, 0.0]),
        ("max_prompt_length", 0),
        ("max_response_length", 0),
        ("temperature_scaling", "sometimes"),
        ("divergence", "forward_lk"),
        ("min_learning_rate", -1.0),
        ("label_smoothing_factor", 0.1),
        ("auto_find_batch_size", True),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=field):
        config(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("backend", "cuda"), ("memory_budget", 0)])
def test_settings_of_the_loss_are_checked_before_training(
    field: str, value: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=field):
        make(tokenizer, args=config(**{field: value}))


def test_a_model_cannot_teach_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny.tiny_model("llama")
    with pytest.raises(UserError, match="teacher_model is the model that is trained"):
        make(tokenizer, student=model, teacher=model)


def test_trained_prompts_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    peft = pytest.importorskip("peft")
    given = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="peft_config is PromptTuningConfig"):
        make(tokenizer, peft_config=given)


def test_presets() -> None:
    paper = SRDConfig.from_preset("paper", output_dir="out", use_cpu=True, learning_rate=3e-4)
    assert (paper.temperature_start, paper.temperature_end) == (1.0, 2.0)
    assert (paper.sft_weight_start, paper.sft_weight_end, paper.epochs_per_stage) == (0.3, 0.1, 8)
    assert paper.learning_rate == 3e-4
    official = SRDConfig.from_preset("official", output_dir="out", use_cpu=True)
    assert (official.temperature, official.sft_weight) == ([1.0, 1.5, 2.0], pytest.approx([0.2, 0.1, 0.0]))
    assert (official.learning_rate, official.min_learning_rate) == (1e-4, 1e-7)
    assert official.temperature_scaling == "official"
    with pytest.raises(UserError, match="unknown preset 'offical'; did you mean 'official'"):
        SRDConfig.from_preset("offical")
    warmer = SRDConfig.from_preset("official", output_dir="out", use_cpu=True, temperature_end=3.0)
    assert (warmer.temperature, warmer.temperature_end, warmer.sft_weight) == (None, 3.0, official.sft_weight)
