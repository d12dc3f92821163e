"""docs/extending.md as it stands: each of its examples is run as a user's file, and what it registers is used."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from tiny import assert_same, plain_loss
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import (
    Sampling,
    Signal,
    SRDConfig,
    SRDTrainer,
    StaleCacheError,
    TeacherCache,
    build_teacher_cache,
    curate,
    distillation_loss,
    reflect,
)
from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.teacher import make_store

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
# Heading -> its example.
EXAMPLES = dict(re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE, re.M | re.S))
SAMPLES = tiny.tiny_samples(8)
pytestmark = pytest.mark.usefixtures("own_registries", "own_folder", "quick_collection")


def run_example(heading: str) -> None:
    exec(compile(EXAMPLES[heading], f"extending.md: {heading}", "exec"), {"__name__": "a_users_file"})


def test_the_page_has_one_short_example_of_each() -> None:
    assert list(EXAMPLES) == [
        "A divergence", "A difficulty signal", "An engine", "A position policy", "A sample policy",
        "A row format", "A kind of teacher cache",
    ]  # fmt: skip
    assert PAGE.count("```python") == len(EXAMPLES)
    for example in EXAMPLES.values():
        assert len(example.splitlines()) < 15


def test_the_divergence_has_the_gradient_of_autograd() -> None:
    run_example("A divergence")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden_S, weight_S, hidden_T, weight_T = draw(9, 4), draw(31, 4), draw(9, 6), draw(31, 6)
    leaves, plain = ([x.clone().requires_grad_() for x in (hidden_S, weight_S)] for _ in range(2))
    labels = torch.arange(9)
    out = distillation_loss(*leaves, hidden_T, weight_T, labels, divergence="hellinger", temperature=2.0, sft_weight=0)
    p, q = (torch.softmax(h @ w.T / 2, -1) for h, w in ((hidden_T, weight_T), plain))
    expected = 4 * 0.5 * (p.sqrt() - q.sqrt()).square().sum(-1).mean()
    assert_same(out.loss, expected, 1e-12, "loss")
    for found, wanted in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, plain)):
        assert_same(found, wanted, 1e-12, "gradient")


def test_the_row_format_makes_rows_of_its_columns(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    run_example("A row format")
    rows = [{"id": i, "translation": {"en": f"The sea, {i}.", "de": f"Das Meer, {i}."}} for i in range(3)]
    samples = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    assert samples["references"][:] == [[f"Das Meer, {i}."] for i in range(3)]
    assert "Translate into German.\n\n### Input:\nThe sea, 2.\n" in samples["prompt"][2]


def test_the_difficulty_signal_ranks(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    run_example("A difficulty signal")
    rows, options = [dict(row) for row in make_quickstart_rows(8, seed=2)], {"progress": False}
    sampling = Sampling(max_new_tokens=8, temperature=1.0)
    scores = reflect(tiny_model, rows, tiny_tokenizer, sampling=sampling, signals=["brevity"], **options)
    lengths = {row["sample_id"]: len(row["generation"]) for row in scores}
    assert list(scores["brevity"]) == [-n for n in lengths.values()]
    assert len(set(lengths.values())) > 3
    plan = curate(scores, signals={"brevity": Signal(higher_is_easier=True)}, keep=0.75, stages=3)
    kept = [lengths[i] for i in plan.kept]
    assert kept == sorted(lengths.values())[:6]


def test_the_engine_answers(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """With one beam it is greedy search; with four it finds other answers."""
    run_example("An engine")

    def answers(engine: str, **options: Any) -> list[str]:
        rows, sampling = [dict(row) for row in make_quickstart_rows(4, seed=2)], Sampling(max_new_tokens=6)
        scores = reflect(
            tiny_model, rows, tiny_tokenizer, engine=engine, engine_options=options, sampling=sampling,
            signals=["rouge_l"], batch_size=1, progress=False,
        )  # fmt: skip
        return list(scores["generation"])

    greedy = answers("transformers")
    assert all(greedy)
    assert answers("beam_search", beams=1) == greedy
    assert answers("beam_search") != greedy


class Watched(SRDTrainer):
    """Keeps each step's batch and loss, and what `expected(model, batch)` says of it, with the weights of that step."""

    expected: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.wanted: list[float] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        self.batches.append(inputs)
        if self.expected is not None:
            self.wanted.append(self.expected(model, inputs).item())
        loss = super().compute_loss(model, inputs, *args, **options)
        self.losses.append(loss.item())
        return loss


TEACHER = {"architecture": "llama_untied", "seed": 1, "width": 24}
LOSS = {"divergence": "forward_kl", "temperature": 2.0, "sft_weight": 0.3}


def trainer(**fields: Any) -> Watched:
    """Two steps of four samples each, by plain SGD."""
    usual: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    usual |= {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.05, "disable_tqdm": True, "padding_free": False}
    usual |= {"per_device_train_batch_size": 4, "epochs_per_stage": 1, **LOSS}
    return Watched(
        model=tiny.tiny_model(),
        teacher_model=tiny.tiny_model(**TEACHER),
        args=SRDConfig(**{**usual, **fields}),
        train_dataset=SAMPLES,
        processing_class=tiny.tiny_tokenizer(),
    )


def rows_of(batch: dict[str, Any]) -> list[list[int]]:
    """Positions with loss of each sample of a padded batch."""
    return [(labels[1:] != tiny.IGNORE).nonzero().flatten().tolist() for labels in batch["labels"]]


def test_the_position_policy_trains() -> None:
    """Both steps have the textbook's loss over the first 40 % of each response."""
    run_example("A position policy")
    watched, teacher = trainer(position_selection="first_tokens", position_ratio=0.4), tiny.tiny_model(**TEACHER)

    @torch.no_grad()
    def expected(student: nn.Module, batch: dict[str, Any]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        z_S, z_T = student(**inputs).logits, teacher(**inputs).logits
        first = [(b, i) for b, rows in enumerate(rows_of(batch)) for i in rows[: -(-len(rows) * 2 // 5)]]
        at = tuple(torch.tensor(first).T)
        return plain_loss(z_S[:, :-1][at], z_T[:, :-1][at], batch["labels"][:, 1:][at], **LOSS).mean()  # type: ignore[arg-type]

    watched.expected = expected
    watched.train()
    assert len(watched.losses) == 2
    assert watched.losses == pytest.approx(watched.wanted, rel=1e-5)


def test_the_sample_policy_trains() -> None:
    run_example("A sample policy")
    watched = trainer(sample_selection="longest", sample_ratio=0.5, per_device_train_batch_size=2)
    watched.train()
    assert len(watched.losses) == 2
    lengths = [n for batch in watched.batches for n in batch["attention_mask"].sum(1).tolist()]
    assert sorted(lengths) == sorted(len(s["input_ids"]) for s in SAMPLES)[-4:]


def test_the_cache_kind_trains(tmp_path: Path) -> None:
    """Nearly as the live teacher does, from a quarter of the bytes."""
    run_example("A kind of teacher cache")
    live, cached = trainer(), trainer(teacher_cache="cache", teacher_cache_kind="eight_bits")
    for watched in (live, cached):
        watched.train()
    assert len(live.losses) == 2
    assert cached.losses == pytest.approx(live.losses, rel=0.02)
    assert cached.losses != live.losses

    store, teacher = make_store("eight_bits", tiny.VOCAB), tiny.tiny_model(**TEACHER)
    opened, rows = TeacherCache("cache", store), Dataset.from_list(SAMPLES)
    stored = opened.collate(SAMPLES)
    assert stored["hidden"].dtype == torch.int8
    assert opened.head is not None
    per_row = sum(x[0].numel() * x.element_size() for x in stored.values())
    assert per_row == store.bytes_per_row(opened.head, torch.float32)
    again = build_teacher_cache(teacher, rows, tmp_path / "built", kind="eight_bits", progress=False)
    assert all(torch.equal(x, stored[name]) for name, x in again.collate(SAMPLES).items())
    with pytest.raises(StaleCacheError, match="another kind: 'eight_bits' there, 'hidden' here"):
        trainer(teacher_cache="cache")
