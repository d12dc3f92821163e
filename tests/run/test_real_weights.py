"""SmolLM2-135M-Instruct, fetched once: cut to 8 layers it learns from its teacher in 8 steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from srd_fast import CurriculumPlan, SRDConfig, SRDTrainer
from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.data.quickstart import make_quickstart_splits
from srd_fast.models import check_head, load_model, load_tokenizer, prune_depth

pytestmark = pytest.mark.slow
NAME = "smollm2-135m-instruct"


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_a_pruned_student_learns(tmp_path: Path) -> None:
    teacher, student = load_model(NAME), load_model(NAME)
    check_head(teacher, "teacher")
    assert prune_depth(student, 8) == [0, 1, 2, *range(25, 30)]
    train, validation = make_quickstart_splits(64, 16, seed=0)
    args = SRDConfig(
        output_dir=str(tmp_path),
        divergence="forward_kl",
        temperature=1.0,
        sft_weight=0.0,
        learning_rate=4e-4,
        epochs_per_stage=1,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = SRDTrainer(student, teacher, args, train, eval_dataset=validation, processing_class=load_tokenizer(NAME))
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert trainer.state.global_step == 8
    assert after["eval_kl"] < 0.7 * before["eval_kl"]
    assert after["eval_cross_entropy"] < 0.8 * before["eval_cross_entropy"]


@pytest.mark.usefixtures("two_threads")
def test_the_best_by_rouge_l_is_kept(tmp_path: Path) -> None:
    """Trained as above and then, at a rate that ruins it, on: the best student is one from before."""
    teacher, student = load_model(NAME), load_model(NAME)
    prune_depth(student, 8)
    train, validation = make_quickstart_splits(64, 8, seed=0)
    args = SRDConfig(
        output_dir=str(tmp_path), divergence="forward_kl", temperature=1.0, sft_weight=0.0,
        epochs_per_stage=1, stage_learning_rates=[4e-4, 5e-2], min_learning_rate=1e-5, per_device_train_batch_size=8,
        eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4, save_total_limit=1,
        save_only_model=True, eval_generate=True, eval_max_new_tokens=24, load_best_model_at_end=True,
        metric_for_best_model="rouge_l", report_to=[], use_cpu=True,
    )  # fmt: skip
    tokenizer = load_tokenizer(NAME)
    ids = [row["sample_id"] for row in prepare_dataset(train, Tokenisation(tokenizer)).dataset]
    plan = CurriculumPlan([ids[:48], ids[48:]])
    trainer = SRDTrainer(
        student, teacher, args, train, curriculum=plan, eval_dataset=validation, processing_class=tokenizer
    )
    start = trainer.evaluate()
    trainer.train()
    found = {x["step"]: x["eval_rouge_l"] for x in trainer.state.log_history if "eval_rouge_l" in x}
    best = max(found, key=lambda step: found[step])
    assert trainer.state.best_global_step == best == 4
    assert found[best] > start["eval_rouge_l"] + 0.05
    assert found[max(found)] < found[best]
    assert trainer.evaluate()["eval_rouge_l"] == found[best]
