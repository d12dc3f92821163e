"""bf16=True in every mode: it trains, its loss is that of float32 but for rounding, and it goes on to the same bytes.

Teacher, answers and rows are the same in both precisions, so losses differ by rounding alone. A logit comes out of
about two dozen products, one after the other, each rounded to 8 bits, either way: sqrt(24) * 2^-9 is 1 % of it. A
divergence here is of the size of such a logit, and a loss the mean of two dozen of them, so a fifth of that is its
deviation (0.3 % was the most seen), and 1 % holds it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from tiny import IGNORE
from transformers import PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.reflection import Sampling, register_engine
from srd_fast.reflection.engines import ENGINES
from srd_fast.training import replay

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")
TOLERANCE = 0.01
LIMIT, STEPS = 6, 4
PROMPTS = [[5, 6], [11, 12, 13, 14, 15, 16], [24], [25, 26, 27]]
ANSWERS = [[7, 8, 9, 10], [17, 18, 19, 20, 21, 22], [30, 31], [28, 29, 32]]
PRIVILEGED = [[41, 42, 43, 5, 6], [44], [45, 46, 24, 47, 48, 49, 50, 51], [52, 25, 26, 27]]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def rows(labels: Sequence[Sequence[int]], privileged: bool) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"s{n}",
            "input_ids": [*ours, *answer],
            "labels": [IGNORE] * len(ours) + [*answer],
            "references": ["Red"],
            **({"privileged_ids": PRIVILEGED[n]} if privileged else {}),
        }
        for n, (ours, answer) in enumerate(zip(PROMPTS, labels, strict=True))
    ]


class Scripted:
    """Gives the same answers in every precision, other ones at other seeds."""

    def __init__(self, student: Any, tokenizer: Any, batch_size: int = 1) -> None:
        assert next(student.parameters()).dtype == torch.float32, "weights stay in float32 under bf16"

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        for i, given in enumerate(prompts):
            answer = ANSWERS[PROMPTS.index(list(given))]
            yield i, [(x + sampling.seed) % 200 + 1 for x in answer]


@pytest.fixture(autouse=True)
def scripted() -> Iterator[None]:
    with ENGINES.restored():
        register_engine("scripted", Scripted)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


SELF = {"divergence": "jsd", "privileged_template": "{privileged}"}
FRESH = {"max_new_tokens": LIMIT, "generation_engine": "scripted"}
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "self, cached": ("start", {**SELF, "teacher_cache": "rows"}),
    "self, live": ("self", SELF),
    "self, adapters": ("self", {**SELF, "learning_rate": 0.3}),
    "self, moving average": ("self", {**SELF, "self_ema_decay": 0.8}),
    "on_policy": ("other", {**FRESH, "divergence": "jsd", "lmbda": 0.5}),
    "distillm": (
        "other",
        {**FRESH, "divergence": "skew_reverse_kl", "lmbda": "adaptive", "replay_buffer": 6, "eval_strategy": "steps",
         "eval_steps": 1},
    ),
    "offline_on_policy": ("other", {"divergence": "reverse_kl", "teacher_cache": "rows"}),
}  # fmt: skip


def trainer(name: str, tokenizer: PreTrainedTokenizerFast, bf16: bool, **changes: Any) -> SRDTrainer:
    teacher, fields = MODES[name]
    student = tiny.tiny_model("llama", seed=1)
    given = {
        "output_dir": "out", "optim": "sgd", "use_cpu": True, "report_to": [], "save_strategy": "no",
        "eval_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "learning_rate": 0.03,
        "per_device_train_batch_size": 4, "epochs_per_stage": STEPS, "temperature": 1.0, "sft_weight": 0.0,
    }  # fmt: skip
    args = SRDConfig(**{**given, **fields, **changes, "bf16": bf16})
    teachers: dict[str, Callable[[], Any]] = {
        "self": lambda: "self",
        "start": lambda: copy.deepcopy(student),
        "other": lambda: tiny.tiny_model("llama", seed=2),
    }
    data = rows(ANSWERS, "privileged_template" in fields)
    peft = LORA if name == "self, adapters" else None
    torch.manual_seed(0)
    return SRDTrainer(
        student, teachers[teacher](), args, data, eval_dataset=data, processing_class=tokenizer, peft_config=peft
    )


def losses(trained: SRDTrainer) -> list[float]:
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "TOLERANCE", -100.0)  # phi grows with each evaluation
    monkeypatch.setattr(replay, "RAISE", 0.5)


@pytest.mark.parametrize("name", MODES)
@pytest.mark.usefixtures("growing")
def test_it_trains_and_its_loss_is_near_that_of_float32(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    found: dict[bool, list[float]] = {}
    for bf16 in (False, True):
        folder = "rows16" if bf16 else "rows32"
        cached = {"teacher_cache": folder} if "teacher_cache" in MODES[name][1] else {}
        trained = trainer(name, tokenizer, bf16, **cached)
        before = {n: p.detach().clone() for n, p in trained.model.named_parameters()}
        trained.train()
        found[bf16] = losses(trained)
        moved = [n for n, p in trained.model.named_parameters() if not p.equal(before[n])]
        assert moved, "nothing was trained"
        assert all(p.dtype == torch.float32 for p in trained.model.parameters())
        if name in ("on_policy", "distillm"):
            assert sum(row.get("own_answers", 0) for row in trained.state.log_history) > 0
    assert len(found[True]) == STEPS
    assert found[True] == pytest.approx(found[False], rel=TOLERANCE)
    assert found[True] != found[False], "nothing was rounded: this is float32 twice"


@pytest.mark.parametrize("name", ["self, moving average", "distillm", "offline_on_policy"])
@pytest.mark.usefixtures("growing")
def test_killed_it_goes_on_to_the_same_bytes(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    whole = trainer(name, tokenizer, True, **saving)
    whole.train()
    again = trainer(name, tokenizer, True, **saving)
    again.train(resume_from_checkpoint="out/checkpoint-2")
    ours, theirs = (dict(x.model.named_parameters()) for x in (again, whole))
    assert ours.keys() == theirs.keys()
    for parameter in theirs:
        assert ours[parameter].equal(theirs[parameter]), parameter
    assert losses(again)[-2:] == losses(whole)[-2:]


def test_evaluations_answer_in_bfloat16(tokenizer: PreTrainedTokenizerFast) -> None:
    """By the student itself, which is put under autocast as a step is; and the best step is found by its answers."""
    asked = {"eval_generate": True, "eval_max_new_tokens": 4, "eval_strategy": "steps", "eval_steps": 2,
             "metric_for_best_model": "rouge_l", "eval_metrics": ["rouge_l", "exact_match"]}  # fmt: skip
    seen: list[torch.dtype] = []
    trained = trainer("offline_on_policy", tokenizer, True, **asked, teacher_cache="answered")
    trained.model.model.layers[0].mlp.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    measured = trained.evaluate()
    assert {"eval_rouge_l", "eval_exact_match", "eval_generation_seconds"} <= set(measured)
    assert set(seen) == {torch.bfloat16}
    plain = trainer("offline_on_policy", tokenizer, False, **asked, teacher_cache="plain").evaluate()
    for name in ("eval_kl", "eval_cross_entropy"):
        assert measured[name] == pytest.approx(plain[name], rel=TOLERANCE)
    trained.train()
    found = [row["eval_rouge_l"] for row in trained.state.log_history if "eval_rouge_l" in row]
    assert len(found) >= 2
    assert all(0 <= x <= 1 for x in found)
    assert trained.state.best_metric == max(found[1:])
