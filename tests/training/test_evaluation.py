"""Evaluation equals what a loop over single rows with full logits gives, and leaves the models as they were."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, evaluate, register_engine
from srd_fast.data import Tokenisation, first_label, prepare_dataset
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.teacher import LiveTeacher, build_teacher_cache

ROWS: list[dict[str, Any]] = [dict(row) for row in make_quickstart_rows(9, seed=4)]
ROWS[2]["output"] = [ROWS[2]["output"], "a second reference"]
SHORT = Sampling(max_new_tokens=4)


pytestmark = pytest.mark.usefixtures("own_registries")


@pytest.fixture
def teacher(make_tiny_model: Callable[[int], PreTrainedModel]) -> PreTrainedModel:
    return make_tiny_model(3)


def run(model: Any, tokenizer: PreTrainedTokenizerFast, rows: Any = ROWS, **options: Any) -> dict[str, Any]:
    return evaluate(model, rows, tokenizer, progress=False, **{"sampling": SHORT, **options})


class Answers:
    """An engine that gives the answers of a table: seed -> one text a prompt, in order."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, table: dict[int, list[str]]) -> None:
        self.tokenizer, self.table, self.samplings = tokenizer, table, list[Sampling]()
        register_engine("answers", lambda *_, **__: self, replace=True)

    def generate(self, prompts: Sequence[Any], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        self.samplings.append(sampling)
        for i in reversed(range(len(prompts))):
            yield i, self.tokenizer(self.table[sampling.seed][i]).input_ids


def plain_rows(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any
) -> list[tuple[float, float, int]]:
    """KL(teacher, student), cross-entropy and tokens of each row, from full logits in float64."""
    found = []
    for sample in prepare_dataset(ROWS, Tokenisation(tokenizer, **options)).dataset:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"][1:])
        log_q = torch.log_softmax(student(input_ids=ids).logits[0, :-1].double(), -1)
        log_p = torch.log_softmax(teacher(input_ids=ids).logits[0, :-1].double(), -1)
        rows = labels != -100
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[rows].sum().item()
        entropy = -log_q[rows].gather(1, labels[rows, None]).sum().item()
        found.append((kl, entropy, int(rows.sum())))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_divergence_and_cross_entropy_are_means_over_the_response_tokens(
    batch_size: int,
    template: str,
    tiny_model: PreTrainedModel,
    teacher: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    with torch.no_grad():
        of_rows = [*zip(*plain_rows(tiny_model, teacher, tiny_tokenizer, template=template))]
    tokens = sum(of_rows[2])
    kl, entropy = (sum(x) / tokens for x in of_rows[:2])
    found = run(tiny_model, tiny_tokenizer, teacher=teacher, batch_size=batch_size, template=template, per_row=True)
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
    assert found["cross_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert (found["num_tokens"], found["num_samples"]) == (tokens, len(ROWS))
    assert kl > 0.5
    for name, values in zip(("kl", "cross_entropy", "num_tokens"), of_rows):
        assert found["rows"][name] == pytest.approx(values, rel=1e-5), name


def test_a_model_is_at_no_distance_from_itself(
    teacher: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert run(teacher, tiny_tokenizer, teacher=LiveTeacher(teacher))["kl"] == pytest.approx(0, abs=1e-6)


def test_a_cache_says_what_the_teacher_says(
    tiny_model: PreTrainedModel, teacher: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    samples = prepare_dataset(ROWS, Tokenisation(tiny_tokenizer)).dataset
    cache = build_teacher_cache(teacher, samples, tmp_path / "cache", progress=False)
    beside = run(tiny_model, tiny_tokenizer, teacher=teacher, batch_size=4)
    alone = run(teacher, tiny_tokenizer, batch_size=4)

    def without_a_body(*args: Any, **options: Any) -> Any:
        raise AssertionError("the teacher's body runs")

    found = run(tiny_model, tiny_tokenizer, teacher=cache, batch_size=4)
    for name in ("kl", "cross_entropy"):
        assert found[name] == pytest.approx(beside[name], rel=1e-5), name
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("srd_fast.training.measure.hidden_states", without_a_body)
        found = run(teacher, tiny_tokenizer, states=cache, batch_size=4)
    assert found["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-5)
    assert (found["kl"], found["num_tokens"]) == (None, alone["num_tokens"])
    with pytest.raises(UserError, match="leave one of the two out"):
        run(tiny_model, tiny_tokenizer, teacher=teacher, states=cache)


def test_without_a_teacher_there_is_no_divergence(
    tiny_model: PreTrainedModel, teacher: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = run(tiny_model, tiny_tokenizer)
    assert alone["kl"] is None
    beside = run(tiny_model, tiny_tokenizer, teacher=teacher)
    assert alone["cross_entropy"] == pytest.approx(beside["cross_entropy"], rel=1e-6)


def test_rouge_l_is_the_mean_of_the_best_over_references(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "output": ["the red cat", "two dogs ran", "nothing"]},
        {"instruction": "b", "output": "the red cat"},
        {"instruction": "c", "output": ["one", "two"]},
    ]
    Answers(tiny_tokenizer, {0: ["two dogs ran away", "the cat", "three"]})
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        scorer.score("two dogs ran", "two dogs ran away")["rougeL"].fmeasure,
        scorer.score("the red cat", "the cat")["rougeL"].fmeasure,
        0.0,
    ]
    found = run(tiny_model, tiny_tokenizer, rows, engine="answers")
    assert found["rouge_l"] == pytest.approx(statistics.fmean(expected), rel=1e-12)
    assert found["rouge_l_std"] is None


def test_seeds_give_a_mean_and_a_deviation(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"instruction": "a", "output": "one two"}, {"instruction": "b", "output": "three four"}]
    table = {10: ["one two", "three four"], 20: ["one two", "x"], 30: ["x", "y"]}
    engine = Answers(tiny_tokenizer, table)
    sampling = Sampling(max_new_tokens=7, temperature=0.9)
    asked: dict[str, Any] = {
        "engine": "answers",
        "seeds": [10, 20, 30],
        "sampling": sampling,
        "metrics": ["exact_match"],
    }
    found = run(tiny_model, tiny_tokenizer, rows, **asked, per_row=True)
    assert found["rouge_l"] == pytest.approx(0.5)
    assert found["rouge_l_std"] == pytest.approx(statistics.stdev([1, 0.5, 0]))
    assert [(s.seed, s.temperature, s.max_new_tokens) for s in engine.samplings] == [(n, 0.9, 7) for n in (10, 20, 30)]
    of_rows = found["rows"]
    assert of_rows["rouge_l"] == of_rows["exact_match"] == pytest.approx([2 / 3, 1 / 3])
    assert (of_rows["generation"], of_rows["kl"]) == (["x", "y"], None)
    assert len(set(of_rows["sample_id"])) == 2
    assert "rows" not in run(tiny_model, tiny_tokenizer, rows, **asked)


def test_a_row_of_which_a_metric_says_nothing(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [{"instruction": f"add {i}", "output": output} for i, output in enumerate(("it is 3", "no number", "4"))]
    Answers(tiny_tokenizer, {0: ["3", "3", "3"]})
    found = run(tiny_model, tiny_tokenizer, rows, engine="answers", metrics=["numeric_match"], per_row=True)
    assert found["rows"]["numeric_match"] == [1.0, None, 0.0]
    assert found["numeric_match"] == 0.5


def test_seeds_sample_and_greedy_does_not(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0)
    runs = [run(tiny_model, tiny_tokenizer, sampling=sampling, seeds=seeds) for seeds in ([1, 2], [1, 2], [3, 4])]
    assert [e["generation"] for e in runs[0]["examples"]] == [e["generation"] for e in runs[1]["examples"]]
    assert [e["generation"] for e in runs[0]["examples"]] != [e["generation"] for e in runs[2]["examples"]]
    assert runs[0]["rouge_l_std"] is not None
    with pytest.raises(UserError, match="seeds need a sampling temperature above 0"):
        run(tiny_model, tiny_tokenizer, seeds=[1])


def test_examples_are_the_first_rows(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    Answers(tiny_tokenizer, {0: [f"answer {i}" for i in range(len(ROWS))]})
    examples = run(tiny_model, tiny_tokenizer, engine="answers", num_examples=3)["examples"]
    data = prepare_dataset(ROWS, Tokenisation(tiny_tokenizer)).dataset
    assert examples == [
        {
            "sample_id": data["sample_id"][i],
            "prompt": data["prompt"][i],
            "reference": data["references"][i][0],
            "generation": f"answer {i}",
        }
        for i in range(3)
    ]


def test_generation_is_greedy_from_the_training_prompt(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = run(tiny_model, tiny_tokenizer, num_examples=len(ROWS))
    for example, sample in zip(found["examples"], prepare_dataset(ROWS, Tokenisation(tiny_tokenizer)).dataset):
        ids = torch.tensor([sample["input_ids"][: first_label(sample["labels"])]])
        out = tiny_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        answer = tiny_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert example["generation"] == answer


def test_tokenised_samples_are_taken_as_they_are(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = prepare_dataset(ROWS, Tokenisation(tiny_tokenizer, "chat")).dataset
    assert run(tiny_model, tiny_tokenizer, data) == run(tiny_model, tiny_tokenizer, template="chat")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    training: bool, tiny_model: PreTrainedModel, teacher: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert_unchanged_by_evaluation(tiny_model, training, tiny_tokenizer, student=tiny_model, teacher=teacher)


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_left_as_it_was(
    training: bool, tiny_model: PreTrainedModel, teacher: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert_unchanged_by_evaluation(teacher, training, tiny_tokenizer, student=tiny_model, teacher=teacher)


def assert_unchanged_by_evaluation(
    watched: PreTrainedModel,
    training: bool,
    tokenizer: PreTrainedTokenizerFast,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
) -> None:
    watched.train(training)
    next(watched.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in watched.parameters()]
    weights = [p.detach().clone() for p in watched.parameters()]
    run(student, tokenizer, teacher=teacher)
    assert watched.training is training
    assert [p.requires_grad for p in watched.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(weights, watched.parameters()))
    assert all(p.grad is None for p in watched.parameters())


def test_dropout_is_off(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    quiet = run(tiny_model.eval(), tiny_tokenizer)
    loud = run(tiny_model.train(), tiny_tokenizer)
    assert loud == quiet
    assert math.isfinite(loud["cross_entropy"])
