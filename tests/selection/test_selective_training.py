"""`SRDTrainer` with chosen positions, drawn classes and chosen samples, against a plain loop over full logits."""

import copy
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_selection import ceiling, plain_signal
from test_trainer import (
    SAMPLES,
    StopAt,
    Watched,
    assert_gradients,
    config,
    in_order,
    make,
    naive_step,
    resumable,
    rows_with_loss,
    three_stages,
)
from tiny import DIVERGENCES, assert_same, plain_loss
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from srd_fast import CurriculumPlan, SRDConfig, UserError
from srd_fast.losses import Sampled
from srd_fast.models import find_head, hidden_states
from srd_fast.selection import (
    Candidates,
    TopPositions,
    batch_generator,
    make_position_policy,
    position_policy_names,
    register_position_policy,
)
from srd_fast.teacher import HiddenRows, LiveTeacher
from srd_fast.teacher import rows_with_loss as states_with_loss

POLICIES = [name for name in position_policy_names() if name != "all"]
# Those of which the loss is the mean over what they chose.
MEANS = [name for name in POLICIES if name.startswith("topk_") or name == "curriculum"]
SEED = 42


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")


def counts_of(samples: Sequence[Mapping[str, Any]]) -> list[int]:
    return [sum(x != tiny.IGNORE for x in s["labels"][1:]) for s in samples]


def plain_step(
    student: nn.Module,
    teacher: nn.Module,
    micro_batches: Sequence[Sequence[Mapping[str, Any]]],
    policy: Any,
    step: int = 0,
    **options: Any,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step from full logits, at positions that the policy chooses by float64 signals."""
    total, divisor, chosen = torch.zeros(()), 0, 0
    for micro, samples in enumerate(micro_batches):
        batch, counts = tiny.collate(samples), torch.tensor(counts_of(samples))
        z_S, labels = rows_with_loss(student, batch)
        with torch.no_grad():
            z_T, _ = rows_with_loss(teacher, batch)
        seen = (z_S.detach(), z_T, labels, options["temperature"])
        generator = batch_generator(torch.device("cpu"), SEED, step, micro, 0)
        found = policy.select(Candidates(counts, lambda name: plain_signal(name, *seen), step, generator))  # noqa: B023
        weights = 1.0 if found.weights_K is None else found.weights_K
        total = total + (plain_loss(z_S, z_T, labels, **options)[found.indices_K] * weights).sum()
        divisor += int(policy.num_items(counts))
        chosen += len(found.indices_K)
    if isinstance(policy, TopPositions):
        assert divisor == chosen, "the loss is not the mean over the chosen"
    loss = total / divisor
    trained = dict(student.named_parameters())
    return loss.item(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values()))))


def in_micro_batches(trainer: Watched, step: int) -> list[list[Mapping[str, Any]]]:
    """The samples of a step, one list for each micro-batch."""
    size, parts = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    samples = in_order(trainer)[step * size * parts :]
    return [samples[i * size : (i + 1) * size] for i in range(parts)]


# A step is the textbook's.


@pytest.mark.parametrize(
    ("policy", "divergence", "architecture"),
    [
        *[(policy, "skew_reverse_kl", "llama") for policy in POLICIES],
        *[("topk_student_entropy", divergence, "llama_untied") for divergence in DIVERGENCES],
        *[("topk_student_entropy", "forward_kl", a) for a in ("gpt2", "gemma2", "phi", "granite", "cohere")],
        ("topk_student_confidence_gap", "forward_kl", "gemma2"),
        ("topk_teacher_entropy", "jsd", "granite"),
        ("topk_reverse_kl", "jsd", "phi"),
    ],
)
def test_a_step_is_that_of_a_plain_loop_over_the_chosen(
    policy: str, divergence: str, architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """In two micro-batches, which share one denominator; a teacher with more classes."""
    student = tiny.tiny_model(architecture)
    teacher = tiny.tiny_model(architecture, seed=1, width=24, layers=3, vocab=312)
    args = config(
        divergence=divergence, temperature=2.0, sft_weight=0.3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, position_selection=policy, position_ratio=0.35, position_steps=3,
    )  # fmt: skip
    trainer = make(tokenizer, copy.deepcopy(student), teacher, args=args)
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "sft_weight": 0.3}
    chosen_by = make_position_policy(policy, 0.35, 3)
    loss, wanted = plain_step(student, teacher, in_micro_batches(trainer, 0), chosen_by, **options)
    whole, _ = naive_step(student, teacher, in_order(trainer)[:4], **options)
    assert abs(loss / whole.item() - 1) > 1e-3, "the choice makes no difference"
    trainer.train()
    assert trainer.losses[0] == pytest.approx(loss, rel=1e-5)
    assert trainer.logs[0]["loss"] == pytest.approx(loss, rel=1e-3)
    assert_gradients(trainer.gradients[0], wanted, 2e-5)


@pytest.mark.parametrize("policy", ["topk_student_entropy", "topk_forward_kl", "curriculum", "stochastic"])
def test_a_run_of_several_stages_is_that_of_a_plain_loop(policy: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights after three stages of SGD; the window of `curriculum` moves on with the steps."""
    args = config(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, stage_learning_rates=[0.2, 0.1, 0.05],
        position_selection=policy, position_ratio=0.35, position_steps=5,
    )  # fmt: skip
    trainer = make(tokenizer, plan=three_stages(), args=args)
    curriculum, student = trainer.curriculum, copy.deepcopy(trainer.model)
    chosen_by, losses = make_position_policy(policy, 0.35, 5), []
    for step in range(curriculum.total_steps):
        options = {"temperature": curriculum.temperature(step), "sft_weight": curriculum.sft_weight(step)}
        batches = in_micro_batches(trainer, step)
        loss, gradient = plain_step(
            student, trainer.teacher.model, batches, chosen_by, step, divergence="skew_reverse_kl", **options
        )
        losses.append(loss)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter -= curriculum.learning_rate(step) * gradient[name]
    trainer.train()
    assert [s.first_step for s in curriculum.stages] == [0, 2, 5]
    assert trainer.losses == pytest.approx(losses, rel=1e-4)
    for (name, found), expected in zip(trainer.model.named_parameters(), student.parameters()):
        assert_same(found, expected, 2e-5, name)


@pytest.mark.parametrize("policy", MEANS)
def test_all_of_the_positions_are_all(policy: str, tokenizer: PreTrainedTokenizerFast) -> None:
    usual = make(tokenizer)
    assert usual.selection.policy is None
    usual.train()
    chosen = make(tokenizer, args=config(position_selection=policy, position_ratio=1.0))
    chosen.train()
    assert chosen.losses == usual.losses
    assert_gradients(chosen.gradients[-1], usual.gradients[-1], 1e-7)
    assert "selected_share" not in usual.logs[0]
    assert [x["selected_share"] for x in chosen.logs] == [1.0] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_without_padding_give_the_same(policy: str, tokenizer: PreTrainedTokenizerFast) -> None:
    runs = []
    for padding_free in (True, False):
        args = config(position_selection=policy, position_ratio=0.3, padding_free=padding_free, position_steps=4)
        runs.append(make(tokenizer, args=args))
        runs[-1].train()
        assert runs[-1].data_collator.collate.flatten == padding_free
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    assert runs[0].selection.selected.histogram() == runs[1].selection.selected.histogram()
    for found, wanted in zip(runs[0].gradients, runs[1].gradients):
        assert_gradients(found, wanted, 1e-4)


@pytest.mark.parametrize("policy", MEANS)
def test_micro_batches_give_what_the_whole_batch_does(policy: str, tokenizer: PreTrainedTokenizerFast) -> None:
    runs = []
    for parts in (1, 4):
        fields = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        args = config(**fields, position_selection=policy, position_ratio=0.35, epochs_per_stage=2, position_steps=4)
        runs.append(make(tokenizer, args=args))
        runs[-1].train()
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-4)
    for name in ("loss", "divergence", "cross_entropy", "selected_share"):
        assert [x[name] for x in runs[1].logs] == pytest.approx([x[name] for x in runs[0].logs], rel=1e-3), name
    assert_gradients(runs[1].gradients[0], runs[0].gradients[0], 1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("silent", [slice(None), slice(1, None)])
def test_samples_without_loss_or_with_one_position_train(
    silent: slice, policy: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A whole batch without loss too, of which the gradient is 0."""
    one = {"input_ids": [5, 6, 7], "labels": [tiny.IGNORE, tiny.IGNORE, 7]}
    samples = [{**s, "sample_id": str(i)} for i, s in enumerate([SAMPLES[0], one, SAMPLES[2], one])]

    def collator(some: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = tiny.collate(some)
        batch["labels"][silent] = tiny.IGNORE
        return batch

    trainer = make(tokenizer, samples=samples, data_collator=collator, args=config(position_selection=policy))
    trainer.train()
    moved = sum(g.norm().item() for g in trainer.gradients[0].values())
    nothing = silent == slice(None)
    assert (trainer.losses[0] == 0) == (moved == 0) == nothing
    assert trainer.logs[0]["selected_share"] == 0 if nothing else trainer.logs[0]["selected_share"] >= 0.2


# Where the teacher's rows come from.


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        *[(k, p) for k in ("hidden", "topk") for p in ("topk_student_entropy", "topk_reverse_kl", "stochastic")],
        ("hidden", "topk_teacher_entropy"),
    ],
)
def test_a_cache_trains_the_chosen_as_the_live_teacher_does(
    kind: str, policy: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Of 299 classes the difference is the rounding of logits to float16."""
    fields: dict[str, Any] = {"position_selection": policy, "position_ratio": 0.3, "temperature": 2.0}
    live = make(tokenizer, args=config(**fields))
    fields |= {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_kind": kind, "teacher_cache_k": 299}
    cached = make(tokenizer, args=config(**fields))
    live.train()
    cached.train()
    assert cached.losses == pytest.approx(live.losses, rel=1e-5 if kind == "hidden" else 3e-3)
    assert cached.selection.selected.histogram() == live.selection.selected.histogram()


@pytest.mark.parametrize("policy", ["topk_student_entropy", "topk_teacher_entropy", "topk_forward_kl", "curriculum"])
@pytest.mark.parametrize("kind", ["sampled", "projected"])
def test_a_cache_of_one_divergence_trains_the_chosen_too(
    kind: str, policy: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Exactly as the live teacher with projections, nearly with draws, where one chooses the same positions."""
    torch.manual_seed(0)
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    student = tiny.tiny_model("llama")
    fields: dict[str, Any] = {"position_selection": policy, "position_ratio": 0.3, "divergence": "forward_kl"}
    runs = []
    for more in ({}, {"teacher_cache": str(tmp_path / "c"), "teacher_cache_kind": kind, "teacher_cache_k": 256}):
        torch.manual_seed(0)
        args = config(**fields, **more, temperature=1.0, sft_weight=0.1)
        runs.append(make(tokenizer, copy.deepcopy(student), args=args, peft_config=adapters))
        runs[-1].train()
    live, cached = runs
    torch.manual_seed(0)
    args = config(divergence="forward_kl", temperature=1.0, sft_weight=0.1)
    whole = make(tokenizer, copy.deepcopy(student), args=args, peft_config=adapters)
    whole.train()
    assert whole.losses != pytest.approx(live.losses, rel=1e-3), "the choice makes no difference"
    tolerance = 1e-4 if kind == "projected" else 0.15
    assert cached.losses == pytest.approx(live.losses, rel=tolerance)
    if kind == "projected":
        assert_gradients(cached.gradients[0], live.gradients[0], 1e-4)


# Classes.


@pytest.mark.parametrize(("policy", "classes"), [("all", 316), ("topk_student_entropy", 300), ("stochastic", 300)])
def test_drawn_classes_train_nearly_as_all_do(
    policy: str, classes: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """From a live teacher as from a cache of hidden states; what a teacher has beyond the student is not drawn."""
    teacher = tiny.tiny_model("llama_untied", seed=1, width=24, vocab=classes)
    fields = {"divergence": "forward_kl", "temperature": 1.5, "position_selection": policy, "sft_weight": 0.0}
    runs = {}
    for name, more in {
        "exact": {},
        "many": {"class_sampling": 2000},
        "few": {"class_sampling": 8},
        "cached": {"class_sampling": 8, "teacher_cache": str(tmp_path / "cache")},
    }.items():
        runs[name] = make(tokenizer, teacher=teacher, args=config(**{**fields, **more}))
        runs[name].train()
    assert runs["many"].losses != runs["exact"].losses
    assert runs["many"].losses == pytest.approx(runs["exact"].losses, rel=0.05)
    assert runs["few"].losses != pytest.approx(runs["exact"].losses, rel=0.01)
    assert runs["cached"].losses == pytest.approx(runs["few"].losses, rel=1e-4)


def test_draws_follow_from_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    fields = {"divergence": "forward_kl", "class_sampling": 8, "data_seed": SEED}
    runs = [make(tokenizer, args=config(**fields, seed=seed)) for seed in (0, 0, 1)]
    for trainer in runs:
        trainer.train()
    assert runs[0].rows == runs[2].rows
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_every_micro_batch_has_its_own_draws_and_every_run_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    """Twice one sample: with the same draws the two would have the same loss. Nothing is learnt meanwhile."""
    samples = [{**SAMPLES[0], "sample_id": str(i)} for i in range(2)]
    fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-30}
    trainer = make(tokenizer, samples=samples, args=config(divergence="forward_kl", class_sampling=4, **fields))
    losses, original = [], trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        losses.append(original(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    trainer.train()
    trainer.train()
    first, second, *again = [x.item() for x in losses]
    assert first != second
    assert again == [first, second]


def test_classes_are_drawn_from_any_source_of_hidden_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    """Whose head may belong to a model that could be trained."""
    model = tiny.tiny_model("phi", seed=1, width=24)

    class Own:
        num_classes = 300

        @torch.no_grad()
        def rows(self, batch: dict[str, Tensor], temperature: float) -> HiddenRows:
            states = hidden_states(model, {n: batch[n] for n in ("input_ids", "attention_mask")})
            return HiddenRows(states_with_loss(states, batch["labels"]), find_head(model))

    runs = []
    for teacher in (Own(), copy.deepcopy(model)):
        args = config(divergence="forward_kl", class_sampling=16, position_selection="topk_teacher_entropy")
        runs.append(make(tokenizer, teacher=teacher, args=args))
        runs[-1].train()
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


# Samples.


@pytest.mark.parametrize("policy", ["topk_student_entropy", "topk_student_cross_entropy"])
def test_only_the_chosen_samples_of_each_subset_are_seen(policy: str, tokenizer: PreTrainedTokenizerFast) -> None:
    student, plan = tiny.tiny_model("llama"), three_stages()
    before = copy.deepcopy(student.state_dict())
    mean = {}
    for sample in SAMPLES:
        with torch.no_grad():
            z, labels = rows_with_loss(student, tiny.collate([sample]))
        mean[sample["sample_id"]] = plain_signal(policy.removeprefix("topk_"), z, z, labels, 1.0).mean().item()
    args = config(sample_selection=policy, sample_ratio=0.35, epochs_per_stage=4, per_device_train_batch_size=2)
    trainer = make(tokenizer, student, plan=plan, args=args)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    wanted = [sorted(s, key=lambda i: -mean[i])[: ceiling(0.35, len(s))] for s in plan.subsets]
    assert [len(s) for s in wanted] == [3, 2, 2]
    ids = [s["sample_id"] for s in SAMPLES]
    found = [{ids[i] for i in stage.samples} for stage in trainer.curriculum.stages]
    assert found == [set(x) for x in accumulate(wanted)]
    trainer.train()
    kept = {tuple(s["input_ids"]) for s in SAMPLES if s["sample_id"] in found[-1]}
    assert {tuple(row) for rows in trainer.rows for row in rows} == kept


def test_a_cache_is_filled_with_the_chosen_samples_alone(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fields = {"sample_selection": "topk_student_entropy", "teacher_cache": str(tmp_path / "cache")}
    trainer = make(tokenizer, args=config(**fields))
    assert len(trainer.teacher) == 3  # type: ignore[arg-type]
    trainer.train()
    assert len(trainer.losses) == 1


# Presets.


@pytest.mark.parametrize("preset", ["SE-KD", "SE-KD3X"])
def test_presets_train(preset: str, tokenizer: PreTrainedTokenizerFast) -> None:
    three = preset == "SE-KD3X"
    usual = vars(config(optim="adamw_torch", learning_rate=1e-2, epochs_per_stage=40 if three else 12))
    fields = ("output_dir", "use_cpu", "report_to", "save_strategy", "optim", "learning_rate", "epochs_per_stage")
    args = SRDConfig.from_preset(preset, disable_tqdm=True, logging_steps=1, **{n: usual[n] for n in fields})
    assert (args.divergence, args.temperature, args.sft_weight) == ("forward_kl", 1.0, 0.0)
    assert (args.position_selection, args.position_ratio) == ("topk_student_entropy", 0.2)
    assert args.class_sampling == (64 if three else 0)
    assert (args.sample_selection, args.sample_ratio) == ("topk_student_entropy" if three else "all", 0.2)
    trainer = make(tokenizer, args=args, eval_dataset=SAMPLES)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    assert sum(trainer.losses[-3:]) < 0.75 * sum(trainer.losses[:3])
    if not three:  # three samples do not teach the others
        assert trainer.evaluate()["eval_kl"] < 0.9 * before
    assert all(x["selected_share"] < 0.4 for x in trainer.logs)


# Checkpoints.

REMEMBERING: dict[str, dict[str, Any]] = {
    "stochastic": {"position_selection": "stochastic"},
    "classes": {"class_sampling": 8, "divergence": "forward_kl"},
    "threshold": {"position_selection": "global_threshold"},
    "all three": {
        "position_selection": "global_threshold",
        "class_sampling": 8,
        "divergence": "forward_kl",
        "sample_selection": "topk_student_entropy",
        "sample_ratio": 0.7,
    },
}


def weights(trainer: Watched) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("case", REMEMBERING)
def test_a_resumed_run_ends_in_the_same_weights(case: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fields = REMEMBERING[case]
    whole = resumable(tokenizer, tmp_path / "whole", [], **fields)
    whole.train()
    steps = whole.state.global_step
    for stop in (1, steps - 3):
        folder = tmp_path / str(stop)
        resumable(tokenizer, folder, [StopAt(stop)], **fields).train()
        second = resumable(tokenizer, folder, [], **fields)
        second.train(resume_from_checkpoint=True)
        assert (second.state.global_step, len(second.losses)) == (steps, steps - stop)
        assert second.losses == whole.losses[stop:]
        for found, expected in zip(weights(second), weights(whole), strict=True):
            assert torch.equal(found, expected), f"after stopping at {stop}"


def test_what_a_policy_remembers_lies_in_the_checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Resumed from a checkpoint elsewhere it goes on as well; without its file it begins anew."""
    fields = {"position_selection": "global_threshold"}
    whole = resumable(tokenizer, tmp_path / "whole", [], **fields)
    whole.train()
    first = resumable(tokenizer, tmp_path / "first", [StopAt(5)], **fields)
    first.train()
    checkpoint = tmp_path / "moved" / "checkpoint-5"
    shutil.copytree(tmp_path / "first" / "checkpoint-5", checkpoint)
    second = resumable(tokenizer, tmp_path / "second", [], **fields)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(second.selection.policy.queue, whole.selection.policy.queue)  # type: ignore[union-attr]
    assert len(first.selection.policy.queue) < len(whole.selection.policy.queue)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(weights(second), weights(whole), strict=True))
    (checkpoint / "position_selection-0.safetensors").unlink()
    third = resumable(tokenizer, tmp_path / "third", [], **fields)
    third.train(resume_from_checkpoint=str(checkpoint))
    assert len(third.selection.policy.queue) == len(whole.selection.policy.queue) - len(first.selection.policy.queue)  # type: ignore
    assert not all(torch.equal(a, b) for a, b in zip(weights(third), weights(whole), strict=True))


# What is said about it.


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("policy", POLICIES)
def test_logs_say_the_share_and_the_histogram_counts_all(
    policy: str, ratio: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    samples = tiny.tiny_samples(32, seed=9, longest=30)
    args = config(position_selection=policy, position_ratio=ratio, per_device_train_batch_size=8, logging_steps=2)
    trainer = make(tokenizer, samples=samples, args=args)
    trainer.train()
    counts = counts_of(samples)
    assert len(trainer.logs) == 2
    lowest, highest = {"stochastic": (0.6, 1.1), "global_threshold": (0.7, 1.3)}.get(policy, (1.0, 1.25))
    for log in trainer.logs:
        assert lowest * ratio <= log["selected_share"] <= highest * ratio
        assert log["tokens_per_second"] > 0
    found = trainer.selection.selected.histogram()
    if policy in ("topk_student_confidence_gap", "topk_teacher_entropy", "topk_forward_kl", "topk_reverse_kl"):
        assert sum(found["candidates"]) == 0  # the student's entropy was not asked for
        return
    assert sum(found["candidates"]) == sum(counts)
    assert all(a <= b for a, b in zip(found["chosen"], found["candidates"]))
    if policy in MEANS:
        assert sum(found["chosen"]) == sum(ceiling(ratio, n) for n in counts)


@pytest.mark.usefixtures("own_registries")
def test_a_policy_of_ones_own_chooses(tokenizer: PreTrainedTokenizerFast) -> None:
    register_position_policy("surest", lambda ratio, **_: TopPositions(ratio, "student_cross_entropy"))
    runs = [make(tokenizer, args=config(position_selection=n)) for n in ("surest", "topk_student_cross_entropy")]
    for trainer in runs:
        trainer.train()
    assert runs[0].losses == runs[1].losses


def test_evaluation_sees_every_position(tokenizer: PreTrainedTokenizerFast) -> None:
    fields = {"divergence": "forward_kl", "class_sampling": 4, "position_selection": "topk_student_entropy"}
    runs = [make(tokenizer, args=config(**more), eval_dataset=SAMPLES[:5]) for more in ({}, fields)]
    first, second = (trainer.evaluate() for trainer in runs)
    assert first == second
    assert first["eval_kl"] > 0


# A user's mistakes.

# Policies whose signal a kind of cache does not give.
REFUSED = (
    ("topk_teacher_entropy", "topk"),
    ("topk_reverse_kl", "sampled"),
    ("topk_reverse_kl", "projected"),
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *[({n: x}, f"{n} must be above 0 and at most 1") for n in ("position_ratio", "sample_ratio") for x in (0, 1.1)],
        ({"position_ratio": float("nan")}, "position_ratio must be above 0"),
        ({"position_steps": 0}, "position_steps must be a whole number, at least 1"),
        ({"class_sampling": -1}, "class_sampling must be a whole number, at least 0"),
        ({"position_selection": "stochastics"}, "unknown position_selection 'stochastics'; did you mean 'stochastic'"),
        ({"sample_selection": "topk_student_entrop"}, "did you mean 'topk_student_entropy'"),
        ({"class_sampling": 8}, "class_sampling is 8, which estimates only forward_kl, and divergence is 'skew_rev"),
        *[
            (
                {"class_sampling": 8, "divergence": "forward_kl", "teacher_cache": "c", "teacher_cache_kind": kind},
                f"teacher_cache_kind '{kind}' does not hold it",
            )
            for kind in ("topk", "sampled", "projected")
        ],
        *[
            (
                {
                    "position_selection": policy,
                    "divergence": "forward_kl",
                    "teacher_cache": "c",
                    "teacher_cache_kind": kind,
                },
                f"position_selection '{policy}' needs a teacher_cache_kind of .*, not '{kind}'",
            )
            for policy, kind in REFUSED
        ],
    ],
)
def test_settings_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**fields)


def test_every_other_policy_takes_every_kind_of_cache() -> None:
    for policy in POLICIES:
        for kind in ("hidden", "topk", "sampled", "projected"):
            if (policy, kind) not in REFUSED:
                fields = {"position_selection": policy, "teacher_cache": "c", "teacher_cache_kind": kind}
                assert config(**fields, divergence="forward_kl").position_selection == policy


def test_classes_are_not_drawn_for_a_student_with_more_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    student = tiny.tiny_model("llama", vocab=316)
    with pytest.raises(UserError, match="class_sampling: the student has 316 classes and the teacher 300"):
        make(tokenizer, student, args=config(divergence="forward_kl", class_sampling=8))


def test_classes_are_not_drawn_from_rows_without_them(tokenizer: PreTrainedTokenizerFast) -> None:
    live = LiveTeacher(tiny.tiny_model("llama_untied", seed=1))
    head, k = live.head, 4

    def rows(batch: dict[str, Tensor], temperature: float) -> Any:
        hidden = live.rows(batch, temperature).hidden_ND
        return Sampled(torch.zeros(len(hidden), k, dtype=torch.long), torch.zeros(len(hidden)))

    own = SimpleNamespace(num_classes=head.weight.shape[0], rows=rows)
    trainer = make(tokenizer, teacher=own, args=config(divergence="forward_kl", class_sampling=8))
    with pytest.raises(UserError, match="class_sampling needs a teacher's hidden states, not Sampled rows"):
        trainer.train()


def test_a_plan_for_other_data_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    args = config(sample_selection="topk_student_entropy")
    with pytest.raises(UserError, match="plan keeps 1 samples that the data does not have, the first is 'x9'"):
        make(tokenizer, plan=CurriculumPlan(subsets=[["s00", "x9"]]), args=args)
