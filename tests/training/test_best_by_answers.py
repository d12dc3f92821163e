"""Evaluations that answer: metrics are those of `evaluate`, training is not disturbed, and the best step is kept."""

import copy
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainerCallback

from srd_fast import Sampling, SRDConfig, SRDTrainer, UserError, evaluate, register_engine
from srd_fast.training.answering import chosen_rows
from srd_fast.training.best import evaluations_since_best
from srd_fast.training.checkpoints import last_whole_checkpoint

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder", "own_registries")
ROWS, HELD_OUT = tiny.tiny_samples(8, longest=6), tiny.tiny_samples(5, seed=3, longest=6)


def told(reflected: Any) -> list[float]:
    """A number of each answer that another answer does not have. It draws, as a function of the user's may."""
    _ = random.random(), np.random.rand(), torch.rand(1)
    return [zlib.crc32(text.encode()) / 2**32 for text in reflected.generations]


told.higher_is_easier = True  # type: ignore[attr-defined]
OWN = f"{__file__}:told"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def make(tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any], **options: Any) -> SRDTrainer:
    usual: dict[str, Any] = {
        "output_dir": "out", "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "epochs_per_stage": 3, "logging_steps": 1,
        "learning_rate": 0.05, "optim": "adamw_torch", "eval_generate": True, "eval_max_new_tokens": 5,
        "restart_learning_rate": False,
    }  # fmt: skip
    given: dict[str, Any] = {
        "model": tiny.tiny_model("llama", layers=1),
        "teacher_model": tiny.tiny_model("llama", layers=1, seed=1),
        "train_dataset": ROWS,
        "eval_dataset": HELD_OUT,
        "processing_class": tokenizer,
        "teacher_tokenizer": tokenizer,
    }
    return SRDTrainer(args=SRDConfig(**{**usual, **fields}), **{**given, **options})


EVERY_STEP: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST_TOLD: dict[str, Any] = {
    **EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "told", "eval_metrics": [OWN],
}  # fmt: skip


def draws() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_metrics_are_those_of_an_evaluation_and_nothing_is_changed(
    temperature: float, training: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    metrics = ["rouge_l", "exact_match", "bleu", OWN]
    trainer = make(tokenizer, {"eval_metrics": metrics, "eval_temperature": temperature, "seed": 7})
    trainer.model.train(training)
    before, weights = draws(), copy.deepcopy(trainer.model.state_dict())
    found = trainer.evaluate()
    assert draws() == before
    assert trainer.model.training is training
    assert all(weight.equal(weights[name]) for name, weight in trainer.model.state_dict().items())
    alone = evaluate(
        trainer.model, HELD_OUT, tokenizer, metrics=metrics[1:], batch_size=2, progress=False,
        sampling=Sampling(max_new_tokens=5, temperature=temperature, seed=7),
    )  # fmt: skip
    for name in ("rouge_l", "exact_match", "bleu", "told"):
        assert found[f"eval_{name}"] == alone[name], name
    assert found["eval_generation_seconds"] > 0
    assert found["eval_kl"] == pytest.approx(trainer.evaluate(HELD_OUT, metric_key_prefix="b")["b_kl"])


def test_some_of_the_rows_are_answered(tokenizer: PreTrainedTokenizerFast) -> None:
    assert chosen_rows(5, None) == chosen_rows(5, 9) == [0, 1, 2, 3, 4]
    assert chosen_rows(10, 4) == [0, 2, 5, 7]
    few = make(tokenizer, {"eval_generate_rows": 2, "eval_metrics": [OWN]}).evaluate()
    alone = evaluate(
        tiny.tiny_model("llama", layers=1), [HELD_OUT[0], HELD_OUT[2]], tokenizer, metrics=[OWN], batch_size=2,
        progress=False, sampling=Sampling(max_new_tokens=5),
    )  # fmt: skip
    assert few["eval_told"] == alone["told"]


@pytest.mark.parametrize(
    "fields",
    [{}, pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow), {"lora": True}],
    ids=["plain", "checkpointing", "adapters"],
)
def test_training_goes_on_as_if_nothing_had_been_answered(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    adapters = None
    if fields.pop("lora", False):
        peft = pytest.importorskip("peft")
        adapters = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
    ends = []
    for answers in (True, False):
        student = tiny.tiny_model("llama", layers=1)
        student.model.layers[0].self_attn.attention_dropout = 0.3
        sampled = {"eval_temperature": 1.0, "eval_max_new_tokens": 5} if answers else {"eval_max_new_tokens": None}
        every = {"eval_strategy": "steps", "eval_steps": 1, "eval_generate": answers, **sampled, **fields}
        torch.manual_seed(0)  # of the adapters
        trainer = make(tokenizer, every, model=student, peft_config=adapters)
        trainer.train()
        assert trainer.model.training
        ends.append([x.detach() for x in trainer.model.parameters()])
    moved = zip(ends[0], tiny.tiny_model("llama", layers=1).parameters())
    assert adapters is not None or any(not torch.equal(x, y) for x, y in moved)
    assert all(torch.equal(x, y) for x, y in zip(*ends))


class Scripted:
    """At the n-th evaluation, the references of the first `right[n]` rows, and nothing for the others."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, right: Sequence[int]) -> None:
        self.right = iter(right)
        self.answers = {}
        for row in HELD_OUT:
            first = next(i for i, x in enumerate(row["labels"]) if x != tiny.IGNORE)
            self.answers[tuple(row["input_ids"][:first])] = row["input_ids"][first:]
        register_engine("scripted", lambda *_, **__: self, replace=True)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        right = next(self.right)
        known = dict(list(self.answers.items())[:right])
        yield from ((i, known.get(tuple(prompt), [])) for i, prompt in enumerate(prompts))


class Weights(TrainerCallback):
    """Keeps the weights of each step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = copy.deepcopy(kwargs["model"].state_dict())


def is_student_of(step: int, trainer: SRDTrainer, weights: Weights) -> bool:
    return all(x.equal(weights.at[step][n]) for n, x in trainer.model.state_dict().items())


@pytest.mark.parametrize("save_steps", [1, 3])
def test_the_best_by_answers_is_kept_wherever_it_is(
    save_steps: int, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    Scripted(tokenizer, [1, 4, 2, 4, 3, 0])
    fields = {**EVERY_STEP, "save_steps": save_steps, "load_best_model_at_end": True, "save_total_limit": 2}
    weights = Weights()
    trainer = make(
        tokenizer, {**fields, "metric_for_best_model": "exact_match", "generation_engine": "scripted"},
        callbacks=[weights],
    )  # fmt: skip
    trainer.train()
    assert trainer.args.greater_is_better is True
    assert [x["eval_exact_match"] for x in trainer.state.log_history if "eval_exact_match" in x][:2] == [0.2, 0.8]
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (2, 0.8)
    assert is_student_of(2, trainer, weights)
    assert not is_student_of(6, trainer, weights)
    said = capsys.readouterr().out
    assert "the student is that of step 2, the best by exact_match (0.8); training ended at step 6\n" in said


@pytest.mark.parametrize("theirs", [False, True])
def test_training_ends_where_answers_no_longer_get_better(
    theirs: bool, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    Scripted(tokenizer, [0, 3, 3, 1, 5, 5])
    fields = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "exact_match"}
    weights = Weights()
    trainer = make(
        tokenizer,
        {**fields, "generation_engine": "scripted", "early_stopping_patience": 0 if theirs else 2},
        callbacks=[weights, *([EarlyStoppingCallback(2)] if theirs else [])],
    )
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step) == (4, 2)
    assert is_student_of(2, trainer, weights)
    assert theirs or "ended at step 4, after 2 evaluations without a better one\n" in capsys.readouterr().out


def test_evaluations_are_counted_from_the_best() -> None:
    def logged(*values: float) -> list[dict[str, float]]:
        return [{"step": i, "eval_x": value} for i, value in enumerate(values, 1)]

    assert evaluations_since_best([], "eval_x", True) == evaluations_since_best(logged(1), "eval_x", True) == 0
    assert evaluations_since_best(logged(1, 3, 3, 2), "eval_x", True) == 2
    assert evaluations_since_best(logged(1, 3, 3, 2), "eval_x", False) == 3
    assert evaluations_since_best([{"step": 0, "eval_x": 9}, *logged(1, 2), {"step": 3}], "eval_x", True) == 0


def test_killed_and_resumed_it_keeps_the_same_student(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    fields = {**BEST_TOLD, "eval_temperature": 1.0, "save_total_limit": 2}
    whole = make(tokenizer, {**fields, "output_dir": str(tmp_path / "whole")})
    whole.train()
    place = {**fields, "output_dir": str(tmp_path / "killed")}
    make(tokenizer, {**place, "max_steps": 3}).train()
    resumed = make(tokenizer, place)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert resumed.state.best_metric == whole.state.best_metric
    for name, weight in whole.model.state_dict().items():
        assert weight.equal(resumed.model.state_dict()[name]), name
    ours, theirs = (
        {x["step"]: x["eval_told"] for x in t.state.log_history if "eval_told" in x} for t in (resumed, whole)
    )
    assert ours == theirs
    assert len(set(ours.values())) > 3, "the answers do not change"


def test_a_training_that_had_ended_early_does_not_go_on(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # More divergence is no aim, but it is greatest at the first step.
    fields: dict[str, Any] = {
        **EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "kl", "greater_is_better": True,
        "early_stopping_patience": 2, "eval_generate": False, "eval_max_new_tokens": None, "learning_rate": 1e-3,
    }  # fmt: skip
    whole = make(tokenizer, {**fields, "output_dir": str(tmp_path / "whole")})
    whole.train()
    assert (whole.state.global_step, whole.state.best_global_step) == (3, 1)
    assert last_whole_checkpoint(tmp_path / "whole") == str(tmp_path / "whole" / "checkpoint-3")
    (tmp_path / "whole").rename(tmp_path / "moved")
    again = make(tokenizer, {**fields, "output_dir": str(tmp_path / "moved")})
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, again.state.best_global_step) == (3, 1)
    assert all(x.equal(again.model.state_dict()[n]) for n, x in whole.model.state_dict().items())


class Killed(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_evaluation_at_the_start_is_none_where_a_killed_training_goes_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """One evaluation more, at the checkpoint's step, would end it earlier, or move an adaptive share."""
    fields: dict[str, Any] = {
        "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3,
        "early_stopping_patience": 2, "metric_for_best_model": "kl", "greater_is_better": True,
        "eval_generate": False, "eval_max_new_tokens": None, "learning_rate": 1e-3, "epochs_per_stage": 5,
    }  # fmt: skip
    whole = make(tokenizer, {**fields, "output_dir": str(tmp_path / "whole")})
    whole.train()
    place = {**fields, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(KeyboardInterrupt):
        make(tokenizer, place, callbacks=[Killed()]).train()
    resumed = make(tokenizer, place)
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = ([x["step"] for x in t.state.log_history if "eval_kl" in x] for t in (resumed, whole))
    assert ours == theirs == [0, 2, 4, 6]
    assert whole.state.global_step == resumed.state.global_step == 6


def test_what_cannot_be_is_said_first(tokenizer: PreTrainedTokenizerFast) -> None:
    for fields, words in (
        ({"eval_generate": "yes"}, "eval_generate must be true or false"),
        (
            {**EVERY_STEP, "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 3},
            r"^save_steps is 3, and with .* a multiple of eval_steps, which is 2; set it to 4$",
        ),
        (
            {**EVERY_STEP, "load_best_model_at_end": True, "eval_strategy": "no"},
            "^load_best_model_at_end is true, but eval_strategy is 'no'; set it to 'steps'$",
        ),
        (
            {**EVERY_STEP, "load_best_model_at_end": True, "save_strategy": "epoch"},
            "^load_best_model_at_end is true, but save_strategy is 'epoch' and eval_strategy is 'steps'; set both to",
        ),
        ({"eval_metrics": []}, r"eval_metrics must be a list of metrics, such as \[rouge_l\], got \[\]"),
        ({"eval_metrics": "rouge_l"}, "eval_metrics must be a list"),
        ({"eval_metrics": ["rogue_l"]}, "unknown metric 'rogue_l'; did you mean 'rouge_l'"),
        ({"eval_metrics": ["cross_entropy"]}, "metric 'cross_entropy' is not a metric of answers"),
        ({"eval_metrics": ["exact_match", "exact_match"]}, "two metrics are called 'exact_match'"),
        ({"eval_metrics": ["nowhere.py:x"]}, "file 'nowhere.py' does not exist"),
        ({"eval_generate_rows": 0}, "eval_generate_rows must be a whole number, at least 1, got 0"),
        ({"eval_max_new_tokens": 0}, "eval_max_new_tokens must be a whole number, at least 1"),
        ({"eval_temperature": -1}, "eval_temperature must be at least 0"),
        ({"eval_generate": False}, "eval_max_new_tokens is 5, but eval_generate is false"),
        (
            {"fsdp": "full_shard", "fsdp_config": {"version": 1}},
            "eval_generate is True, but it cannot answer while it trains by FSDP1; train the student whole or by FSDP2",
        ),
        (
            {"fsdp": "full_shard", "generation_engine": "vllm"},
            "generation_engine 'vllm' does not read a student in shards, as 'transformers' does",
        ),
        ({"generation_engine": "vlm"}, "unknown engine 'vlm'; did you mean 'vllm'"),
        ({"early_stopping_patience": 2}, "there is no metric_for_best_model to look at"),
        ({"early_stopping_patience": 2, "metric_for_best_model": "kl"}, "eval_strategy is 'no'; set it to 'steps'"),
        ({"metric_for_best_model": "bleu"}, "unknown metric_for_best_model 'bleu'"),
        (
            {"metric_for_best_model": "rouge_l", "eval_generate": False, "eval_max_new_tokens": None},
            "unknown metric_for_best_model 'rouge_l'.*are there with eval_generate",
        ),
    ):
        with pytest.raises(UserError, match=words):
            make(tokenizer, fields)
    with pytest.raises(UserError, match="eval_generate is true, but there is no eval_dataset"):
        make(tokenizer, {}, eval_dataset=None)
    gpt2 = {"model": tiny.tiny_model("gpt2"), "teacher_model": tiny.tiny_model("gpt2", seed=1)}
    with pytest.raises(UserError, match="lower eval_max_new_tokens or max_prompt_length"):
        make(tokenizer, {"eval_max_new_tokens": 5000}, **gpt2)
    with pytest.raises(
        UserError, match=r"'numeric_match' .* no reference of the 5 validation rows has a number; leave"
    ):
        make(tokenizer, {"eval_metrics": ["numeric_match"]})
    Path("silent.py").write_text("def f(r): return [float('nan')] * len(r.generations)\nf.higher_is_easier = True\n")
    with pytest.raises(UserError, match="metric 'f' says nothing of any of 5 validation rows"):
        make(tokenizer, {"eval_metrics": ["silent.py:f"]}).evaluate()
    alone = {"eval_generate": False, "eval_max_new_tokens": None, "metric_for_best_model": "kl", "sft_weight": 1.0}
    with pytest.raises(UserError, match="unknown metric_for_best_model 'kl'"):
        make(tokenizer, alone, teacher_model=None)
    make(tokenizer, alone)


def test_the_direction_of_a_metric_of_ones_own_is_known() -> None:
    Path("less.py").write_text("def words(r): return [len(g) for g in r.generations]\nwords.higher_is_easier = False\n")
    metrics = ["rouge_l", OWN, "less.py:words"]
    for name, greater in (
        ("rouge_l", True), ("told", True), ("eval_told", True), ("dev_told", True), ("kl", False), ("words", False)
    ):  # fmt: skip
        args = SRDConfig("out", use_cpu=True, eval_generate=True, eval_metrics=metrics, metric_for_best_model=name)
        assert args.greater_is_better is greater, name


def test_several_sets_have_metrics_each(tokenizer: PreTrainedTokenizerFast) -> None:
    sets = {"one": HELD_OUT[:2], "two": HELD_OUT[2:]}
    fields = {**BEST_TOLD, "metric_for_best_model": "eval_two_told", "max_steps": 2}
    trainer = make(tokenizer, fields, eval_dataset=sets)
    found = trainer.evaluate()
    assert {"eval_one_told", "eval_two_told"} < set(found)
    assert found["eval_one_told"] != found["eval_two_told"]
    trainer.train()
    values = [x["eval_two_told"] for x in trainer.state.log_history if "eval_two_told" in x]
    assert trainer.state.best_metric == max(values)
