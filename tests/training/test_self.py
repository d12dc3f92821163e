"""A student that is its own teacher, which reads more: against a plain loop, copies, averages, and resuming."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from peft import LoraConfig
from tiny import IGNORE, assert_same, plain_divergence
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.models import with_adapters
from srd_fast.reflection import Sampling, register_engine
from srd_fast.reflection.engines import ENGINES
from srd_fast.teacher import LiveTeacher, OwnTeacher

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")
TEMPERATURE = 1.5
# Prompt of the student, of the teacher, and the answer: long, cut at the limit, one token alone, with a gap.
PARTS = [
    ([5, 6], [41, 42, 43, 5, 6], [7, 8, 9, 10, 0]),
    ([11, 12, 13, 14, 15, 16], [44], [17, 18, 19, 20, 21, 22, 23]),
    ([24], [45, 46, 24, 47, 48, 49, 50, 51], [0]),
    ([25, 26, 27], [52, 25, 26, 27], [28, 29, 30, 31]),
]
GAP = (3, 1)  # of that sample, this token of its answer has no loss
ROWS = [
    {
        "sample_id": f"s{n}",
        "input_ids": ours + answer,
        "labels": [IGNORE] * len(ours) + [IGNORE if (n, i) == GAP else x for i, x in enumerate(answer)],
        "privileged_ids": theirs,
    }
    for n, (ours, theirs, answer) in enumerate(PARTS)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def config(**fields: Any) -> SRDConfig:
    given = {
        "output_dir": "out", "optim": "sgd", "max_grad_norm": 1e9, "use_cpu": True, "report_to": [],
        "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.1,
        "per_device_train_batch_size": 4, "epochs_per_stage": 1, "temperature": TEMPERATURE, "sft_weight": 0.0,
        "divergence": "jsd", "privileged_template": "{privileged}",
    }  # fmt: skip
    return SRDConfig(**{**given, **fields})


class Watched(SRDTrainer):
    """Keeps the gradient of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[dict[str, Tensor]] = []
        self.add_callback(_Gradients(self))

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]


class _Gradients(TrainerCallback):
    def __init__(self, trainer: Watched) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        named = self.trainer.model.named_parameters()
        self.trainer.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def trained(
    tokenizer: PreTrainedTokenizerFast, student: PreTrainedModel, args: SRDConfig, teacher: Any = "self", **options: Any
) -> Watched:
    given = {"train_dataset": ROWS, "processing_class": tokenizer, **options}
    found = Watched(student, teacher, args, **given)
    found.train()
    return found


def plain(
    name: str, student: PreTrainedModel, beta: float = 0.5, answers: Any = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one batch from the full logits of two forward passes a sample, each position by hand."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(student).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for n, (ours, theirs, given) in enumerate(PARTS):
        answer = given if answers is None else answers[n]
        of_student = student(torch.tensor([ours + answer])).logits[0]
        of_teacher = teacher(torch.tensor([theirs + answer])).logits[0].detach()
        for i in range(len(answer)):
            if answers is None and (n, i) == GAP:
                continue
            rows = of_teacher[len(theirs) - 1 + i], of_student[len(ours) - 1 + i]
            total = total + plain_divergence(name, *rows, TEMPERATURE, 0.1, beta) * TEMPERATURE**2
            count += 1
    loss = total / count
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def check(found: Watched, expected: tuple[float, dict[str, Tensor]]) -> None:
    loss, gradient = expected
    assert found.losses[0] == pytest.approx(loss, rel=1e-6)
    assert found.gradients[0].keys() == gradient.keys()
    for name, ours in found.gradients[0].items():
        assert_same(ours, gradient[name], 1e-5, name)


@pytest.mark.parametrize("teacher", ["self", "cache"])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("jsd", {}),
        ("forward_kl", {"padding_free": False}),
        ("jsd", {"beta": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        pytest.param("reverse_kl", {"max_tokens_per_batch": 16}, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_those_of_a_plain_loop(
    name: str, fields: dict[str, Any], teacher: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    student = tiny.tiny_model("llama", seed=1)
    expected = plain(name, student, fields.get("beta", 0.5))
    if teacher == "cache":
        fields = {**fields, "teacher_cache": "rows"}
    start = "self" if teacher == "self" else copy.deepcopy(student)
    check(trained(tokenizer, student, config(divergence=name, **fields), start), expected)


class Left:
    """Pads at the beginning."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        right = tiny.collate(samples)
        counts = right["attention_mask"].sum(1).tolist()
        length = right["labels"].shape[1]
        return {name: torch.stack([x.roll(length - n) for x, n in zip(rows, counts)]) for name, rows in right.items()}


def test_both_sides_may_be_padded_at_the_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    student = tiny.tiny_model("llama", seed=1)
    expected = plain("jsd", student)
    check(trained(tokenizer, student, config(), data_collator=Left()), expected)


def test_an_encoder_decoder_model_can_be_its_own_teacher() -> None:
    of_t5 = encoder_decoders.tiny_tokenizer("t5")
    student = encoder_decoders.tiny_model("t5", seed=1)
    rows = [
        {**s, "privileged_ids": [7, 9, *s["input_ids"][: s["labels"].count(IGNORE)]]}
        for s in encoder_decoders.tiny_samples(4, seed=2)
    ]
    seen = [{"input_ids": r["privileged_ids"] + r["input_ids"][(n := r["labels"].count(IGNORE)) :],
             "labels": [IGNORE] * (n + 2) + r["labels"][n:]} for r in rows]  # fmt: skip
    ours, theirs = (encoder_decoders.own_logits(student, x)[0].detach().double() for x in (rows, seen))
    expected = plain_divergence("forward_kl", theirs, ours, TEMPERATURE, 0.1, 0.5).mean() * TEMPERATURE**2
    found = trained(of_t5, student, config(divergence="forward_kl"), train_dataset=rows)
    assert found.losses[0] == pytest.approx(float(expected), rel=1e-5)


def adapted() -> PreTrainedModel:
    """A student with adapters, in which dropout is on."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return with_adapters(tiny.tiny_model("llama", seed=1), lora)  # type: ignore[return-value]


def test_beside_adapters_the_teacher_is_the_model_without_them(tokenizer: PreTrainedTokenizerFast) -> None:
    start, student = tiny.tiny_model("llama", seed=1), adapted()
    found = trained(tokenizer, student, config(epochs_per_stage=4, learning_rate=1.0))
    batch = tiny.collate(ROWS)
    own, copied = found._source, LiveTeacher(start)
    assert isinstance(own, OwnTeacher)
    # The student has moved, and its teacher is still what the adapters were put on, to the bit.
    with student.disable_adapter():  # type: ignore[operator]
        off = LiveTeacher(student, freeze=False).rows(batch, 1.0).hidden_ND  # type: ignore[union-attr]
    on = LiveTeacher(student, freeze=False).rows(batch, 1.0).hidden_ND  # type: ignore[union-attr]
    rows = own.rows(batch, 1.0).hidden_ND  # type: ignore[union-attr]
    assert torch.equal(rows, off)
    assert torch.equal(rows, copied.rows(batch, 1.0).hidden_ND)  # type: ignore[union-attr]
    assert not torch.allclose(rows, on, atol=1e-3)
    # Nothing but the adapters is there twice.
    twice = {p.data_ptr() for p in own.model.parameters()} - {p.data_ptr() for p in student.parameters()}
    assert len(twice) == sum(p.requires_grad for p in student.parameters()) == 8
    assert [step.keys() == found.gradients[0].keys() for step in found.gradients] == [True] * 4
    assert all("lora" in name for name in found.gradients[0])


def test_loss_beside_adapters_is_that_of_a_plain_loop(tokenizer: PreTrainedTokenizerFast) -> None:
    loss, _ = plain("forward_kl", tiny.tiny_model("llama", seed=1))
    found = trained(tokenizer, adapted(), config(divergence="forward_kl"))
    assert found.losses[0] == pytest.approx(loss, rel=1e-6)


class _Weights(TrainerCallback):
    """Keeps the weights of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append({n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if p.requires_grad})


@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("make", [lambda: tiny.tiny_model("llama", seed=1), adapted])
def test_a_moving_average_follows_the_student(decay: float, make: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    student, weights = make(), _Weights()
    expected = {n: p.detach().clone() for n, p in student.named_parameters() if p.requires_grad}
    args = config(epochs_per_stage=3, self_ema_decay=decay, learning_rate=1.0)
    found = trained(tokenizer, student, args, callbacks=[weights])
    own = found._source
    assert isinstance(own, OwnTeacher)
    for step in weights.steps:
        expected = {n: decay * x + (1 - decay) * step[n] for n, x in expected.items()}
    assert len(weights.steps) == 3
    theirs = dict(own.model.named_parameters())
    for name, value in expected.items():
        assert_same(theirs[name], value, 1e-6, name)
        assert decay == 0.0 or not torch.allclose(value, weights.steps[-1][name], atol=1e-4)


def test_the_average_is_what_the_next_step_learns_from(tokenizer: PreTrainedTokenizerFast) -> None:
    """With decay 0 the teacher is the student itself, so every loss is that of a plain loop with its weights."""
    student = tiny.tiny_model("llama", seed=1)
    snapshots: list[PreTrainedModel] = []

    class Snapshot(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            snapshots.append(copy.deepcopy(kwargs["model"]))

    args = config(epochs_per_stage=3, self_ema_decay=0.0)
    found = trained(tokenizer, student, args, callbacks=[Snapshot()])
    assert found.losses == pytest.approx([plain("jsd", model)[0] for model in snapshots], rel=1e-5)


def test_under_autocast_shared_weights_stay_as_they_are() -> None:
    batch = tiny.collate(ROWS)
    alone = OwnTeacher(tiny.tiny_model("llama", seed=1), "cpu", torch.bfloat16)
    assert next(alone.model.parameters()).dtype == torch.bfloat16
    student = adapted()
    shared = OwnTeacher(student, "cpu", torch.bfloat16)
    assert {p.dtype for p in student.parameters()} == {p.dtype for p in shared.model.parameters()} == {torch.float32}
    whole = OwnTeacher(student, "cpu", torch.float32)
    states = [t.rows(batch, 1.0).hidden_ND.float() for t in (whole, shared, alone)]  # type: ignore[union-attr]
    assert not torch.equal(states[0], states[1]), "the products are not in bfloat16"
    for other in states[1:]:
        assert_same(other, states[0], 0.1)


# Fresh answers: one ends, one is cut by the limit, one is empty, one ends just before the limit.
LIMIT = 5
GIVEN = [[7, 8], [11, 12, 13, 14, 15], [], [21, 22, 23, 24]]
LABELS = [[7, 8, 0], [11, 12, 13, 14, 15], [0], [21, 22, 23, 24, 0]]


@pytest.fixture
def scripted() -> Iterator[list[list[int]]]:
    """An engine that has an answer for each prompt, of the student or of the teacher; the prompts that it saw."""
    asked: list[list[int]] = []

    class Scripted:
        def __init__(self, model: Any, tokenizer: Any, batch_size: int = 1) -> None:
            pass

        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
            for i, given in enumerate(prompts):
                asked.append(list(given))
                yield i, GIVEN[next(n for n, part in enumerate(PARTS) if list(given) in part[:2])]

    with ENGINES.restored():
        register_engine("scripted", Scripted)
        yield asked


@pytest.mark.parametrize("fields", [{}, {"padding_free": False}, {"max_tokens_per_batch": 24}])
def test_fresh_answers_stand_behind_both_prompts(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, scripted: list[list[int]]
) -> None:
    student = tiny.tiny_model("llama", seed=1)
    expected = plain("jsd", student, answers=LABELS)
    args = config(lmbda=1.0, generation_engine="scripted", max_new_tokens=LIMIT, **fields)
    check(trained(tokenizer, student, args), expected)
    assert sorted(scripted) == sorted(ours for ours, _, _ in PARTS)


def test_the_teachers_fresh_answers_are_to_its_own_prompts(
    tokenizer: PreTrainedTokenizerFast, scripted: list[list[int]]
) -> None:
    student = tiny.tiny_model("llama", seed=1)
    expected = plain("forward_kl", student, answers=LABELS)
    args = config(seq_kd=True, generation_engine="scripted", max_new_tokens=LIMIT, divergence="forward_kl")
    check(trained(tokenizer, student, args), expected)
    assert sorted(scripted) == sorted(theirs for _, theirs, _ in PARTS)


def test_a_cache_serves_the_other_steps(tokenizer: PreTrainedTokenizerFast) -> None:
    fields: dict[str, Any] = {"lmbda": 0.5, "epochs_per_stage": 6, "learning_rate": 0.01, "max_new_tokens": LIMIT}
    students = [tiny.tiny_model("llama", seed=1) for _ in range(3)]
    live = trained(tokenizer, students[0], config(**fields, seed=1))
    cached = trained(tokenizer, students[1], config(**fields, seed=1, teacher_cache="rows"), students[2])
    own = [log["own_answers"] for log in live.state.log_history if "own_answers" in log]
    assert set(own) == {0.0, 1.0}
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)


@pytest.mark.parametrize("make", [lambda: tiny.tiny_model("llama", seed=1), adapted])
def test_killed_and_resumed_it_has_the_same_bytes(
    make: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "lmbda": 0.5, "replay_buffer": 4, "max_new_tokens": LIMIT, "epochs_per_stage": 10, "save_strategy": "steps",
        "save_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01, "self_ema_decay": 0.8, "eval_strategy": "steps",
        "eval_steps": 4,
    }  # fmt: skip

    def made(folder: str, **more: Any) -> Watched:
        args = config(**fields, output_dir=str(tmp_path / folder), **more)
        return Watched(make(), "self", args, ROWS, eval_dataset=ROWS, processing_class=tokenizer)

    whole = made("whole")  # each is made before it trains, and so has the same random numbers
    whole.train()
    made("killed", max_steps=7).train()
    resumed = made("killed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-6"))
    assert whole.losses[6:] == resumed.losses[6:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    for ours, theirs in zip(*(t._source.model.state_dict().values() for t in (whole, resumed))):  # type: ignore[attr-defined]
        assert torch.equal(ours, theirs)
    (tmp_path / "killed" / "checkpoint-6" / "teacher.safetensors").unlink()
    with pytest.raises(UserError, match=r"checkpoint-6' has no moving average of this student"):
        made("killed").train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-6"))


def test_an_evaluation_measures_against_what_the_teacher_reads(tokenizer: PreTrainedTokenizerFast) -> None:
    student = tiny.tiny_model("llama", seed=1)
    args = config(eval_strategy="steps", eval_steps=1, temperature=1.0)
    found = Watched(student, "self", args, ROWS, eval_dataset=ROWS, processing_class=tokenizer)
    total, count = 0.0, 0
    for n, (ours, theirs, answer) in enumerate(PARTS):
        of_student, of_teacher = (student(torch.tensor([x + answer])).logits[0].double() for x in (ours, theirs))
        for i in range(len(answer)):
            if (n, i) != GAP:
                rows = of_teacher[len(theirs) - 1 + i], of_student[len(ours) - 1 + i]
                total += float(plain_divergence("forward_kl", *rows, 1.0, 0.1, 0.5).detach())
                count += 1
    assert found.evaluate()["eval_kl"] == pytest.approx(total / count, rel=1e-5)
    # What is predicted is the student's alone.
    plain_rows = [{k: v for k, v in row.items() if k != "privileged_ids"} for row in ROWS]
    assert "test_kl" not in found.predict(plain_rows).metrics


def test_any_teacher_may_read_more(tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = tiny.tiny_model("llama", seed=2, layers=3)
    rows = [{"prompt": "Sky?", "completion": "Blue."}, {"prompt": "Grass?", "completion": "Green."}]
    args = config(privileged_template="{prompt} {response}", divergence="forward_kl", per_device_train_batch_size=2)
    student = tiny.tiny_model("llama", seed=1)
    samples = prepare_dataset(rows, Tokenisation(tokenizer, privileged_template="{prompt} {response}")).dataset
    total, count = 0.0, 0
    for row in samples:
        start = row["labels"].count(IGNORE)
        answer = row["input_ids"][start:]
        z_S = student(torch.tensor([row["input_ids"]])).logits[0, start - 1 : -1].double()
        z_T = teacher(torch.tensor([row["privileged_ids"] + answer])).logits[0, -1 - len(answer) : -1].double()
        total += float(plain_divergence("forward_kl", z_T, z_S, TEMPERATURE, 0.1, 0.5).sum().detach())
        count += len(answer)
    found = trained(tokenizer, student, args, teacher, train_dataset=rows)
    assert found.losses[0] == pytest.approx(total / count * TEMPERATURE**2, rel=1e-5)


def test_what_cannot_be_is_said_first(tokenizer: PreTrainedTokenizerFast) -> None:
    student = tiny.tiny_model("llama", seed=1)
    for decay in (1.0, -0.1, "slow", True, float("nan")):
        with pytest.raises(UserError, match="self_ema_decay must be from 0 to below 1, or null"):
            config(self_ema_decay=decay)
    with pytest.raises(UserError, match="keep_student_dtype is true; set it to false"):
        config(self_ema_decay=0.5, keep_student_dtype=True)
    with pytest.raises(UserError, match="privileged_template must be text that says more than the prompt"):
        config(privileged_template="{prompt}")
    for fields, teacher, words in (
        ({"privileged_template": None}, "self", "without a privileged_template it reads what the student reads"),
        ({"teacher_cache": "rows"}, "self", "runs beside the student, and teacher_cache is 'rows'; leave it out"),
        ({"teacher_offload": True}, "self", "which is where the student is; leave teacher_offload out"),
        ({"self_ema_decay": 0.5}, tiny.tiny_model("llama", seed=2), "is for teacher_model 'self'; leave it out"),
        ({"sft_weight": 1.0}, None, "privileged_template says what only the teacher reads, but there is no teacher"),
    ):
        with pytest.raises(UserError, match=words):
            SRDTrainer(student, teacher, config(**fields), ROWS, processing_class=tokenizer)
    plain_rows = [{k: v for k, v in row.items() if k != "privileged_ids"} for row in ROWS]
    with pytest.raises(UserError, match="train_dataset: 4 rows have nothing that only the teacher could read: row 1,"):
        SRDTrainer(student, "self", config(), plain_rows, processing_class=tokenizer)
    long = [{**ROWS[0], "privileged_ids": [5] * 70}]
    short = tiny.tiny_model("gpt2", seed=1)
    with pytest.raises(UserError, match=r"64 positions of the teacher.*needs 75: lower max_privileged_length"):
        SRDTrainer(short, "self", config(), long, processing_class=tokenizer)
