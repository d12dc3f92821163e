"""One engine for the student's answers: which weights it has when, what it is told, and when it begins and ends."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.reflection import Sampling, TransformersEngine, register_engine
from srd_fast.reflection.engines import ENGINES
from srd_fast.training.kept_engine import KeptEngine

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")
ROWS = tiny.tiny_samples(4, longest=6)
HELD_OUT = tiny.tiny_samples(3, seed=9, longest=9)


def weight(model: Any) -> float:
    return float(next(model.parameters()).detach().flatten()[0])


class Told:
    """Takes weights, and notes what it is told: its answer is its weight, in thousandths."""

    made: ClassVar[list["Told"]] = []

    def __init__(self, student: Any, tokenizer: Any, batch_size: int = 1) -> None:
        self.weight, self.batch_size, self.calls = weight(student), batch_size, ["made"]
        self.made.append(self)

    def reserve(self, length: int, sampling: Sampling) -> None:
        self.calls.append(f"reserve {length}")

    def update_weights(self, student: Any) -> None:
        self.weight = weight(student)
        self.calls.append("update")

    def sleep(self) -> None:
        self.calls.append("sleep")

    def close(self) -> None:
        self.calls.append("close")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        self.calls.append(f"generate {sampling.max_new_tokens}")
        yield from ((i, [5, 6]) for i in range(len(prompts)))


class Unable(Told):
    """Refuses them."""

    def update_weights(self, student: Any) -> None:
        super().update_weights(student)
        raise UserError("vLLM: it does not take weights while it runs")


class Plain(Told):
    """Has no word for it."""

    update_weights = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "update_weights":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def made() -> Iterator[list[Told]]:
    with ENGINES.restored():
        for engine in (Told, Unable, Plain):
            register_engine(engine.__name__.lower(), engine)
        Told.made = []
        yield Told.made


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def config(**fields: Any) -> SRDConfig:
    given = {
        "output_dir": "out", "optim": "sgd", "use_cpu": True, "report_to": [], "save_strategy": "no",
        "eval_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.1,
        "per_device_train_batch_size": 4, "epochs_per_stage": 6, "lmbda": 1.0, "generation_engine": "told",
        "max_new_tokens": 5,
    }  # fmt: skip
    return SRDConfig(**{**given, **fields})


def trainer(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> SRDTrainer:
    student, teacher = tiny.tiny_model("llama", seed=1), tiny.tiny_model("llama", seed=2, layers=3)
    return SRDTrainer(
        student, teacher, config(**fields), ROWS, eval_dataset=HELD_OUT, processing_class=tokenizer
    )  # fmt: skip


SAMPLING = Sampling(max_new_tokens=5)


def test_weights_are_given_where_they_are_too_old(tokenizer: PreTrainedTokenizerFast, made: list[Told]) -> None:
    kept, model = KeptEngine(config(), tokenizer), tiny.tiny_model()
    assert kept.lag(3) == 0
    kept.reserve(30)
    lags = []
    for step in (2, 3, 4, 5, 6):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        engine = kept.of(model, step, SAMPLING, 4, 20, behind=1)
        lags.append(kept.lag(step))
        assert (engine.weight == weight(model)) == (lags[-1] == 0)  # type: ignore[attr-defined]
    assert lags == [0, 1, 0, 1, 0]
    assert kept.of(model, 6, SAMPLING, 8, 20) is engine, "another batch size is no reason to begin anew"
    kept.rest()
    assert made[0].calls == ["made", "reserve 30", "update", "update", "update", "sleep"]
    kept.of(model, 6, SAMPLING, 8, 31, behind=1)
    assert [x.calls for x in made[1:]] == [["made", "reserve 31"]]
    kept.close()
    kept.close()
    assert [x.calls[-1] for x in made] == ["close", "close"]


@pytest.mark.parametrize(("name", "reason"), [("unable", "vLLM: it does not take weights"), ("plain", "it has no")])
def test_one_that_takes_none_begins_anew_and_that_is_said_once(
    name: str, reason: str, tokenizer: PreTrainedTokenizerFast, made: list[Told], caplog: pytest.LogCaptureFixture
) -> None:
    kept, model = KeptEngine(config(generation_engine=name), tokenizer), tiny.tiny_model()
    for step in range(4):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        assert kept.of(model, step, SAMPLING, 4, 20, behind=0).weight == weight(model)  # type: ignore[attr-defined]
    assert len(made) == 4
    assert sum("update" in x.calls for x in made) == (name == "unable")
    assert [x.calls[-1] for x in made[:3]] == 3 * ["close"]
    assert caplog.text.count(f"engine {name} has to restart for new weights each time: {reason}") == 1


def test_transformers_has_the_model_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    kept, model = KeptEngine(config(generation_engine="transformers"), tokenizer), tiny.tiny_model()
    engine = kept.of(model, 0, SAMPLING, 4, 20, behind=0)
    assert isinstance(engine, TransformersEngine)
    assert engine.model is model
    assert kept.of(model, 9, SAMPLING, 4, 40) is engine
    assert kept.lag(9) == 0
    assert kept.of(model, 9, SAMPLING, 8, 40).batch_size == 8  # type: ignore[attr-defined]
    kept.rest()
    kept.close()


def test_steps_and_evaluations_share_one(
    tokenizer: PreTrainedTokenizerFast, made: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"lmbda": 1.0, "sync_every": 3, "eval_generate": True, "eval_max_new_tokens": 9}
    trained = trainer(tokenizer, **fields, eval_strategy="steps", eval_steps=4)
    apart: dict[int, list[float]] = {5: [], 9: []}
    real = Told.generate

    def watched(self: Told, prompts: Any, sampling: Sampling) -> Any:
        apart[sampling.max_new_tokens].append(self.weight - weight(trained.model))
        return real(self, prompts, sampling)

    monkeypatch.setattr(Told, "generate", watched)
    trained.train()
    longest = max(row["labels"].count(-100) for row in HELD_OUT) + 9
    step, evaluation = ["generate 5", "sleep"], ["generate 9", "sleep"]
    assert [x.calls for x in made] == [
        ["made", f"reserve {longest}", *step, *step, *step, "update", *step, "update", *evaluation, *step, *step,
         "update", *evaluation, "close"]
    ]  # fmt: skip
    assert apart[9] == [0, 0], "an evaluation is behind"
    assert [x == 0 for x in apart[5]] == [True, False, False, True, True, False]
    lags = [log["weights_lag"] for log in trained.state.log_history if "weights_lag" in log]
    assert lags == [0, 1, 2, 0, 0, 1]
    trained.evaluate()
    after = ["made", f"reserve {longest}", *evaluation, "close"]
    assert [x.calls for x in made[1:]] == [after], "outside of training an engine ends with its evaluation"


def test_an_engine_ends_with_a_training_that_fails(tokenizer: PreTrainedTokenizerFast, made: list[Told]) -> None:
    trained = trainer(tokenizer, eval_generate=True, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert trained._evaluation_answers is not None
    trained.training_step = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        trained.train()
    assert [x.calls[-1] for x in made] == ["close"]


def test_sleep_without_a_gpu_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("srd_fast.training.answer_fields.is_installed", lambda: True)
    asked: dict[str, Any] = {"generation_engine": "vllm", "generation_options": {"enable_sleep_mode": True}}
    for user in ({}, {"lmbda": 0.0, "eval_generate": True}):
        with pytest.raises(
            UserError, match="generation_options: enable_sleep_mode is true, but vLLM's engine can sleep"
        ):
            config(**asked, **user)
    with pytest.raises(UserError, match="generation_engine is 'vllm', but nothing is answered"):
        config(**asked, lmbda=0.0)
