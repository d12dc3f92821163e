"""Fresh answers: the loss against a plain loop over full logits, labels, schedules, buffers, engines, and resuming."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from tiny import IGNORE, plain_divergence
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.data import answered, end_of
from srd_fast.reflection import Sampling, TransformersEngine, register_engine
from srd_fast.reflection.engines import ENGINES
from srd_fast.training import on_policy, replay
from srd_fast.training.replay import (
    ADAPTIVE,
    DATA,
    FRESH,
    REPLAYED,
    AnswerSchedule,
    ReplayBuffer,
    adaptive_share,
    logged_losses,
)

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")
LIMIT = 5
ROWS = tiny.tiny_samples(4, longest=6)
# One answer ends, one is cut by the limit, one is empty, one ends just before the limit.
GIVEN = [[7, 8], [11, 12, 13, 14, 15], [], [21, 22, 23, 24]]
LABELS = [[7, 8, 0], [11, 12, 13, 14, 15], [0], [21, 22, 23, 24, 0]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def config(**fields: Any) -> SRDConfig:
    given = {
        "output_dir": "out", "optim": "sgd", "max_grad_norm": 1e9, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.1,
        "per_device_train_batch_size": 4, "epochs_per_stage": 1, "temperature": 1.5, "sft_weight": 0.3,
        "lmbda": 1.0, "max_new_tokens": LIMIT, "divergence": "reverse_kl",
    }  # fmt: skip
    return SRDConfig(**{**given, **fields})


def prompt(row: dict[str, Any]) -> list[int]:
    return row["input_ids"][: row["labels"].index(next(x for x in row["labels"] if x != IGNORE))]


PROMPTS = [prompt(row) for row in ROWS]


class Scripted:
    """Answers each prompt with what is written for it. It keeps a weight of the student that it was made with."""

    made: ClassVar[list["Scripted"]] = []

    def __init__(self, student: Any, tokenizer: Any, batch_size: int = 1) -> None:
        self.weight, self.closed = float(next(student.parameters()).flatten()[0]), False
        self.made.append(self)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        assert sampling.max_new_tokens == LIMIT
        yield from ((i, GIVEN[PROMPTS.index(list(p))]) for i, p in enumerate(prompts))

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def scripted() -> Iterator[list[Scripted]]:
    with ENGINES.restored():
        Scripted.made = []
        register_engine("scripted", Scripted)
        yield Scripted.made


class Watched(SRDTrainer):
    """Keeps the loss and the gradient of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.add_callback(_Gradients(self))

    @property
    def logs(self) -> list[dict[str, float]]:
        return [entry for entry in self.state.log_history if "loss" in entry]


class _Gradients(TrainerCallback):
    def __init__(self, trainer: Watched) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        named = self.trainer.model.named_parameters()
        self.trainer.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def trainer(tokenizer: PreTrainedTokenizerFast, args: SRDConfig, **options: Any) -> Watched:
    student, teacher = tiny.tiny_model("llama", seed=1), tiny.tiny_model("llama", seed=2, layers=3)
    given = {"teacher_model": teacher, "train_dataset": ROWS, "processing_class": tokenizer, **options}
    return Watched(given.pop("model", student), args=args, **given)


def plain(
    name: str, student: PreTrainedModel, teacher: PreTrainedModel, beta: float
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the given answers from full logits, a sample at a time, with masks written by hand."""
    student, total, count = copy.deepcopy(student).double(), torch.zeros((), dtype=torch.float64), 0
    teacher = copy.deepcopy(teacher).double()
    for start, labels in zip(PROMPTS, LABELS):
        ids = torch.tensor([start + labels])
        ours, theirs = student(ids).logits[0], teacher(ids).logits[0].detach()
        for place in range(len(start) - 1, len(start) + len(labels) - 1):
            total = total + plain_divergence(name, theirs[place], ours[place], 1.5, 0.1, beta) * 1.5**2
            count += 1
    loss = total / count
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("reverse_kl", {}),
        pytest.param("jsd", {"beta": 0.3, "padding_free": False}, marks=pytest.mark.slow),
        pytest.param(
            "forward_kl",
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            marks=pytest.mark.slow,
        ),
        ("skew_reverse_kl", {"max_tokens_per_batch": 24}),
    ],
)
def test_with_answers_given_loss_and_gradient_are_those_of_a_plain_loop(
    name: str, fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    trained = trainer(tokenizer, config(divergence=name, generation_engine="scripted", **fields))
    student, teacher = copy.deepcopy(trained.model), trained.teacher.model  # type: ignore[attr-defined]
    trained.train()
    expected, gradient = plain(name, student, teacher, fields.get("beta", 0.5))
    (log,) = trained.logs
    assert log["loss"] == pytest.approx(expected, rel=1e-6)
    assert (log["own_answers"], log["replayed"], log["weights_lag"]) == (1, 0, 0)
    assert (log["answers_cut"], log["answers_empty"], log["answer_tokens"]) == (0.25, 0.25, 11 / 4)
    (found,) = trained.gradients
    largest = max(float(x.abs().max()) for x in gradient.values())
    assert found.keys() == gradient.keys()
    for key, value in gradient.items():
        torch.testing.assert_close(found[key].double(), value, rtol=0, atol=1e-5 * largest)


def test_an_adaptive_share_follows_the_mean_of_several_validation_sets(tokenizer: PreTrainedTokenizerFast) -> None:
    """At such a learning rate every loss is far above the one before it."""
    fields = {"lmbda": ADAPTIVE, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 20.0}
    args = config(**fields, generation_engine="scripted", epochs_per_stage=3)
    trained = trainer(tokenizer, args, eval_dataset={"a": ROWS[:2], "b": ROWS[2:]})
    trained.train()
    losses = [
        [x[f"eval_{name}_loss"] for x in trained.state.log_history if f"eval_{name}_loss" in x] for name in ("a", "b")
    ]
    means = [sum(both) / 2 for both in zip(*losses)]
    assert len(means) == 3
    expected = [adaptive_share(means[:k]) for k in range(3)]
    assert [log["lmbda"] for log in trained.logs] == expected
    assert expected[-1] > 0, "this test could not tell a share from none"


def test_a_weight_of_cross_entropy_is_logged_as_it_was_used(tokenizer: PreTrainedTokenizerFast) -> None:
    args = config(lmbda=0.5, generation_engine="scripted", epochs_per_stage=12, logging_steps=4)
    trained = trainer(tokenizer, args)
    trained.train()
    assert any(0 < log["own_answers"] < 1 for log in trained.logs)
    for log in trained.logs:
        assert log["sft_weight"] == pytest.approx(0.3 * (1 - log["own_answers"]))


def test_a_token_of_the_teachers_answer_without_embedding_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = tiny.tiny_model("llama", seed=2, layers=3)
    teacher.resize_token_embeddings(teacher.config.vocab_size + 10)
    student = tiny.tiny_model("llama", seed=1)
    classes = student.config.vocab_size

    class Odd(Scripted):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
            yield from ((i, [5, classes + 3]) for i in range(len(prompts)))

    register_engine("odd", Odd)
    args = config(lmbda=0.0, seq_kd=True, generation_engine="odd")
    trained = trainer(tokenizer, args, model=student, teacher_model=teacher)
    with pytest.raises(UserError, match=f"with token {classes + 3}, and the student has {classes} classes: give"):
        trained.train()


def test_labels_of_an_answer() -> None:
    row = {"sample_id": "a", "input_ids": [5, 6, 7, 8], "labels": [IGNORE, IGNORE, 7, 8], "tests": []}
    assert answered(row, [9, 10], 0) == {**row, "input_ids": [5, 6, 9, 10, 0], "labels": [IGNORE, IGNORE, 9, 10, 0]}
    assert answered(row, [9, 10], None)["labels"] == [IGNORE, IGNORE, 9, 10]
    assert answered(row, [], 3)["input_ids"] == [5, 6, 3]
    assert answered(row, [9, 10, 11], 0, most=3)["labels"][2:] == [9, 10, 11]
    assert answered(row, [9, 10], 0, most=3)["labels"][2:] == [9, 10, 0]
    turns = [IGNORE, 4, 2, IGNORE, IGNORE, 6, 0]
    assert answered({"input_ids": [1, 4, 2, 8, 8, 6, 0], "labels": turns}, [3], 2)["input_ids"] == [1, 3, 2]
    assert end_of(turns, {0, 2}, 0) == 2, "the first turn is the one that is answered"
    assert end_of([IGNORE, 4, 5], {0, 2}, 0) == 0, "a response that was cut ends in nothing"


def test_phi_is_a_function_of_the_validation_losses() -> None:
    assert adaptive_share([]) == adaptive_share([1.0]) == adaptive_share([1.0, 1.05, 1.1]) == 0
    assert adaptive_share([1.0, 1.2]) == adaptive_share([2.0, 1.0, 1.125]) == 0.1
    assert adaptive_share([1.0, 1.2, 1.4, 1.0, 1.3]) == 0.3
    assert adaptive_share([0.5 * i for i in range(30)]) == 1.0
    history = [
        {"step": 2, "eval_loss": 1.0}, {"step": 3, "loss": 9.0}, {"step": 4, "eval_loss": 3.0},
        {"step": 4, "eval_loss": 2.0}, {"step": 6, "eval_loss": 5.0},
    ]  # fmt: skip
    assert logged_losses(history, 5) == [1.0, 2.0]
    assert logged_losses(history, 1) == []
    of_sets = [
        {"step": 2, "eval_a_loss": 1.0, "eval_a_kl": 7.0}, {"step": 2, "eval_b_loss": 2.0}, {"step": 3, "loss": 9.0},
        {"step": 4, "eval_a_loss": 3.0},
    ]  # fmt: skip
    assert logged_losses(of_sets, 5, ["a", "b"]) == [1.5]
    assert logged_losses(of_sets, 5, ["a"]) == [1.0, 3.0]


def test_a_schedule_answers_anew_less_and_less_once_its_buffer_is_full() -> None:
    always, gkd = AnswerSchedule(1.0, 10, 1000, 3), AnswerSchedule(0.3, 0, 1000, 3)
    assert {always.kind(step, [], 9) for step in range(1000)} == {FRESH}
    late = [always.kind(step, [], 10) for step in range(1000)]
    assert set(late) == {FRESH, REPLAYED}
    assert late[:100].count(REPLAYED) < 15 < 85 < late[-100:].count(REPLAYED)
    kinds = [gkd.kind(step, [], 0) for step in range(1000)]
    assert set(kinds) == {DATA, FRESH}
    assert 260 < kinds.count(FRESH) < 340
    assert kinds == [gkd.kind(step, [9.0, 1.0], 7) for step in range(1000)]
    assert kinds != [AnswerSchedule(0.3, 0, 1000, 4).kind(step, [], 0) for step in range(1000)]
    phi = AnswerSchedule(ADAPTIVE, 10, 1000, 3)
    assert {phi.kind(step, [1.0], 10) for step in range(1000)} == {DATA}
    rising = [float(i) for i in range(6)]  # phi is 0.5
    assert 450 < sum(phi.kind(step, rising, 10) != DATA for step in range(1000)) < 550


def test_a_buffer_keeps_the_last_and_comes_back_from_a_file(tmp_path: Path) -> None:
    buffer, again = ReplayBuffer(3), ReplayBuffer(3)
    buffer.add([{"sample_id": str(i), "input_ids": [i, i], "labels": [IGNORE, i]} for i in range(5)])
    assert len(buffer) == 3
    assert sorted(row["labels"][1] for row in buffer.draw(3, seed=1)) == [2, 3, 4]
    assert len(buffer.draw(7, seed=1)) == 7
    buffer.save(tmp_path / "buffer.parquet")
    again.load(tmp_path / "buffer.parquet")
    assert [again.draw(2, seed) for seed in range(5)] == [buffer.draw(2, seed) for seed in range(5)]
    again.add([{"input_ids": [9], "labels": [9]}])
    assert sorted(row["labels"][-1] for row in again.draw(3, seed=0)) == [3, 4, 9]


def test_an_engine_with_weights_of_its_own_gets_them_by_sync_every(
    tokenizer: PreTrainedTokenizerFast, scripted: list[Scripted]
) -> None:
    trained = trainer(tokenizer, config(generation_engine="scripted", sync_every=3, epochs_per_stage=7))
    trained.train()
    assert [log["weights_lag"] for log in trained.logs] == [0, 1, 2, 0, 1, 2, 0]
    assert len(scripted) == 3
    assert len({engine.weight for engine in scripted}) == 3, "an engine did not get the weights of its step"
    assert all(engine.closed for engine in scripted)


def answers_seen(trained: SRDTrainer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[dict[str, Any]], Any]]:
    """Fills with the fresh samples of each step, and a copy of the student as it was then."""
    seen: list[tuple[list[dict[str, Any]], Any]] = []
    real = on_policy.FreshAnswers._answers

    def watched(self: Any, samples: Any, seed: int, step: int, teacher: Any, student: Any) -> Any:
        made = real(self, samples, seed, step, teacher, student)
        seen.append((made, copy.deepcopy(student if teacher is None else teacher.model)))
        return made

    monkeypatch.setattr(on_policy.FreshAnswers, "_answers", watched)
    return seen


@pytest.mark.parametrize("whose", ["student", pytest.param("teacher", marks=pytest.mark.slow)])
def test_answers_are_those_of_the_weights_at_that_step(
    whose: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"lmbda": 1.0} if whose == "student" else {"lmbda": 0.0, "seq_kd": True}
    args = config(**fields, generation_temperature=0.0, epochs_per_stage=3, learning_rate=1.0)
    trained = trainer(tokenizer, args)
    seen = answers_seen(trained, monkeypatch)
    trained.train()
    assert len(seen) == 3
    for samples, model in seen:
        model.set_attn_implementation("eager")
        for sample in samples:
            start = prompt(sample)
            engine = TransformersEngine(model, tokenizer)
            ((_, expected),) = engine.generate([start], Sampling(max_new_tokens=LIMIT))
            answer = [x for x in sample["labels"] if x != IGNORE]
            assert answer == expected + [0] * (len(expected) < LIMIT)
    weights = [float(sum(p.detach().abs().sum() for p in model.parameters())) for _, model in seen]
    assert len(set(weights)) == (3 if whose == "student" else 1)
    # The teacher's answers are imitated too, the student's own are not.
    parts = [log["loss"] - log["divergence"] * 1.5**2 * (1.0 if whose == "student" else 0.7) for log in trained.logs]
    rest = [0.0 if whose == "student" else 0.3 * log["cross_entropy"] for log in trained.logs]
    assert parts == pytest.approx(rest, abs=1e-4)


def test_a_cache_serves_the_other_steps(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"lmbda": 0.5, "epochs_per_stage": 6, "learning_rate": 0.01, "seed": 1}
    live = trainer(tokenizer, config(**fields))
    live.train()
    cached = trainer(tokenizer, config(**fields, teacher_cache=str(tmp_path / "cache")))
    cached.train()
    own = [log["own_answers"] for log in cached.logs]
    assert set(own) == {0.0, 1.0}
    assert own == [log["own_answers"] for log in live.logs]
    assert [log["loss"] for log in cached.logs] == pytest.approx([log["loss"] for log in live.logs], rel=1e-5)


def test_killed_and_resumed_it_has_the_same_bytes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "TOLERANCE", -100.0)  # phi grows with each evaluation
    rows = tiny.tiny_samples(8, seed=5, longest=6)
    fields: dict[str, Any] = {
        "lmbda": ADAPTIVE, "replay_buffer": 4, "epochs_per_stage": 6, "save_strategy": "steps", "save_steps": 7,
        "eval_strategy": "steps", "eval_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01, "max_grad_norm": 1.0,
        "restart_learning_rate": False,
    }  # fmt: skip

    def made(folder: str, **more: Any) -> Watched:
        args = config(**fields, output_dir=str(tmp_path / folder), **more)
        return trainer(tokenizer, args, train_dataset=rows, eval_dataset=ROWS)

    whole = made("whole")
    whole.train()
    killed = made("killed", max_steps=9)
    killed.train()
    resumed = made("killed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-7"))
    theirs, ours = ([log["own_answers"] + log["replayed"] for log in t.logs] for t in (whole, resumed))
    assert len(theirs) == 12
    assert ours == theirs
    assert {1.0, 2.0} <= set(theirs[7:]), f"no answer is fresh, or none replayed, after the kill: {theirs}"
    assert whole.logs[-1]["lmbda"] > 0
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_what_cannot_be_answered_is_said_first(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for fields, words in (
        ({"lmbda": 1.1}, "lmbda must be at least 0 and at most 1, got 1.1"),
        ({"lmbda": -0.1}, "lmbda must be at least 0"),
        ({"lmbda": "adaptve"}, "lmbda must be from 0 to 1, or 'adaptive', got 'adaptve'"),
        ({"lmbda": ADAPTIVE}, "set eval_strategy to 'steps'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1"),
        ({"generation_temperature": -1.0}, "generation_temperature must be at least 0"),
        ({"lmbda": 0.0, "replay_buffer": 9}, "replay_buffer is 9, but lmbda is 0"),
        ({"seq_kd": "yes"}, "seq_kd must be true or false, got 'yes'"),
        ({"generation_engine": "transformer"}, "unknown engine 'transformer'; did you mean 'transformers'"),
        ({"generation_options": {"sampling": 1}}, "engine_options holds 'sampling'"),
    ):
        with pytest.raises(UserError, match=words):
            config(**fields)
    if not on_policy_needs_vllm():
        with pytest.raises(UserError, match="generation_engine is 'vllm', which needs the package vllm"):
            config(generation_engine="vllm")
    with pytest.raises(UserError, match="generation_engine is 'vllm', but nothing is answered"):
        config(lmbda=0.0, max_new_tokens=128, generation_engine="vllm")
    learned = tiny.tiny_model("gpt2")
    with pytest.raises(UserError, match="lower max_new_tokens or max_prompt_length"):
        trainer(tokenizer, config(max_new_tokens=80), model=learned)
    with pytest.raises(UserError, match="max_tokens_per_batch is 10, but a prompt and its fresh answer may have 1"):
        trainer(tokenizer, config(max_tokens_per_batch=10), train_dataset=[
            {"sample_id": "a", "input_ids": list(range(1, 9)), "labels": [IGNORE] * 7 + [8]}])  # fmt: skip
    with pytest.raises(UserError, match="teacher_model is missing: fresh answers"):
        trainer(tokenizer, config(teacher_cache=str(tmp_path / "none")), teacher_model=None)
    with pytest.raises(UserError, match="teacher_model is missing: pass a model"):
        trainer(tokenizer, config(lmbda=0.0, max_new_tokens=128), teacher_model=None)
    small, short = tiny.tiny_model("llama", vocab=290), [{"sample_id": "a", "input_ids": [1, 2], "labels": [IGNORE, 2]}]
    with pytest.raises(UserError, match="the student has 300 classes and the teacher 290"):
        trainer(tokenizer, config(shared_vocabulary=True), teacher_model=small, train_dataset=short)


def on_policy_needs_vllm() -> bool:
    from srd_fast.workers.vllm import is_installed

    return is_installed()


def test_without_a_teacher_the_loss_is_the_cross_entropy(tokenizer: PreTrainedTokenizerFast) -> None:
    trained = trainer(
        tokenizer, config(lmbda=0.0, max_new_tokens=128, sft_weight=1.0), teacher_model=None, eval_dataset=ROWS
    )
    student = copy.deepcopy(trained.model).double()
    measured = trained.evaluate()
    trained.train()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        logits = student(torch.tensor([row["input_ids"]])).logits[0]
        for place, label in enumerate(row["labels"][1:]):
            if label != IGNORE:
                total, count = total - torch.log_softmax(logits[place], -1)[label], count + 1
    (total / count).backward()
    (log,) = trained.logs
    assert log["loss"] == pytest.approx(float(total / count), rel=1e-6)
    assert "divergence" not in log
    assert measured == {"eval_loss": pytest.approx(log["loss"]), "eval_cross_entropy": pytest.approx(log["loss"])}
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(trained.gradients[0][name].double(), parameter.grad, rtol=0, atol=1e-5)


def test_answers_that_do_not_end_are_told_once(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    args = config(generation_engine="transformers", max_new_tokens=1, epochs_per_stage=3)
    trained = trainer(tokenizer, args)
    trained.train()
    assert [log["answers_cut"] for log in trained.logs] == [1, 1, 1]
    (told,) = [x for x in caplog.messages if "did not end" in x]
    assert "100 % of the fresh answers" in told
    assert "max_new_tokens=1" in told
