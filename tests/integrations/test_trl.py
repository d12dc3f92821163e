"""The trainers of `srd_fast.integrations.trl` beside TRL's own: the same losses, gradients and weights at each step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from srd_fast import CurriculumPlan, UserError, attach_curriculum
from srd_fast.data.quickstart import make_quickstart_rows

trl = pytest.importorskip("trl", reason="trl is missing: pip install 'srd-fast[trl]'")
gkd = pytest.importorskip("trl.experimental.gkd", reason="this TRL has no GKDTrainer where 1.16 has it")
# Behind the skips: the module needs TRL.
from srd_fast.integrations import trl as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_collection")

SLOW = pytest.mark.long
ROWS = [
    {
        "sample_id": f"r{i}",
        "messages": [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["output"][:40]},
        ],
    }
    for i, row in enumerate(make_quickstart_rows(8, seed=3))
]


class Made:
    """Trainers of either library from one set of arguments, and what their steps gave."""

    def __init__(self, models: Callable[[int], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, folder: Path):
        self.models, self.tokenizer, self.folder = models, tokenizer, folder

    def _fields(self, **fields: Any) -> dict[str, Any]:
        made = {"output_dir": str(self.folder / "out"), "per_device_train_batch_size": 2, "max_steps": 3, "seed": 5}
        made |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
        made |= {"use_cpu": True, "bf16": False, "learning_rate": 1e-2, "optim": "sgd", "max_length": 96}
        made |= {"gradient_checkpointing": False, "disable_tqdm": True, "lr_scheduler_type": "constant"}
        return {**made, **fields}

    def gkd(self, library: Any, rows: Any = ROWS, teacher: Any = None, model: Any = None, **fields: Any) -> Any:
        config = library.GKDConfig(**self._fields(**{"lmbda": 0.0, **fields}))
        return library.GKDTrainer(
            self.models(1) if model is None else model,
            self.models(2) if teacher is None else teacher,
            config,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=self.tokenizer,
        )

    def sft(self, library: Any, model: Any = None, more: dict[str, Any] | None = None, **fields: Any) -> Any:
        ids = [self.tokenizer(m["messages"][1]["content"])["input_ids"] for m in ROWS]
        labels = [[-100] * 3 + x[3:] for x in ids]
        data = Dataset.from_dict({"input_ids": ids, "labels": labels, "sample_id": [r["sample_id"] for r in ROWS]})
        return library.SFTTrainer(
            self.models(1) if model is None else model,
            library.SFTConfig(**self._fields(**fields)),
            train_dataset=data,
            processing_class=self.tokenizer,
            **(more or {}),
        )


@pytest.fixture
def made(
    make_tiny_model: Callable[[int], PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Made:
    return Made(make_tiny_model, tiny_tokenizer, tmp_path)


def steps(trainer: Any) -> list[tuple[float, float]]:
    """Loss and norm of the gradient of each step."""
    set_seed(5)
    trainer.train()
    return [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "grad_norm" in x]


def assert_same_steps(mine: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    expected = steps(theirs)
    assert len(expected) == 3
    assert all(norm > 0 for _, norm in expected)
    assert steps(mine) == [pytest.approx(pair, rel=tolerance) for pair in expected]
    for name, weight in theirs.model.state_dict().items():
        assert (mine.model.state_dict()[name] - weight).abs().max() <= tolerance * weight.abs().max(), name


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"beta": 0.0, "temperature": 2.0}, marks=SLOW),  # GKD's temperature is not that of its loss
        {"beta": 0.3, "temperature": 2.0},
        pytest.param({"beta": 1.0, "gradient_accumulation_steps": 1}, marks=SLOW),
        pytest.param({"lmbda": 1.0, "max_new_tokens": 8}, marks=SLOW),  # answers of the student
        pytest.param({"seq_kd": True, "max_new_tokens": 8}, marks=SLOW),  # answers of the teacher
    ],
    ids=str,
)
def test_gkd_trains_as_trls(made: Made, fields: dict[str, Any]) -> None:
    assert_same_steps(made.gkd(ours, **fields), made.gkd(gkd, **fields))


@SLOW
def test_gkd_with_trls_config_bfloat16_and_adapters(made: Made) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(made.models(1), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    theirs = made.gkd(gkd, model=adapted())
    mine = made.gkd(ours, model=adapted())
    assert_same_steps(mine, theirs)
    mixed = [made.gkd(library, bf16=True) for library in (ours, gkd)]
    found, expected = map(steps, mixed)
    assert found == [pytest.approx(pair, rel=2e-2) for pair in expected]
    assert found != steps(made.gkd(ours))


def test_sft_trains_as_trls(made: Made) -> None:
    mine, theirs = made.sft(ours), made.sft(trl)
    assert_same_steps(mine, theirs)
    for name in ("entropy", "num_tokens"):
        found, expected = ([x[name] for x in t.state.log_history if name in x] for t in (mine, theirs))
        assert found == pytest.approx(expected, rel=1e-4)
    losses = [t.evaluate(t.train_dataset)["eval_loss"] for t in (mine, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@SLOW
def test_a_teacher_beside_sft_live_and_from_a_cache(made: Made) -> None:
    """Half cross-entropy, half KL: nothing of the KL, and it is TRL's loss again."""
    plain = steps(made.sft(trl))
    alone = steps(made.sft(ours, more={"teacher_model": made.models(2)}, sft_weight=1.0))
    assert alone == [pytest.approx(pair, rel=1e-5) for pair in plain]
    live = steps(made.sft(ours, more={"teacher_model": made.models(2)}))
    assert live != alone
    folder = str(made.folder / "cache")
    cached = made.sft(ours, more={"teacher_model": made.models(2)}, teacher_cache=folder)
    assert steps(cached) == [pytest.approx(pair, rel=1e-5) for pair in live]
    # The cache alone is a teacher.
    assert steps(made.sft(ours, teacher_cache=folder)) == [pytest.approx(pair, rel=1e-5) for pair in live]


@SLOW
def test_gkd_from_a_cache_needs_no_teacher(made: Made) -> None:
    live = made.gkd(ours)
    folder, name = str(made.folder / "cache"), str(made.folder / "teacher")
    made.models(2).save_pretrained(name)
    cached = made.gkd(ours, teacher=name, teacher_cache=folder)
    assert sum(p.numel() for p in cached.teacher_model.parameters()) == 0
    assert_same_steps(cached, live)


@SLOW
def test_a_curriculum_reaches_both(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    ids = [r["sample_id"] for r in ROWS]
    plan = CurriculumPlan(subsets=[ids[4:6], ids[:2]], method="none")
    seen: list[float] = []
    for trainer in (made.gkd(ours, max_steps=-1), made.sft(ours, max_steps=-1)):
        attach_curriculum(
            trainer, plan, epochs_per_stage=2, on_stage=lambda s, t, w, x=trainer: seen.append(x.divergence_temperature)
        )
        trainer.train()
        assert trainer.state.global_step == 1 + 2
        assert trainer.sft_weight == 0.1
    assert seen == [1.0, 2.0, 1.0, 2.0]
    attach_curriculum(made.gkd(gkd), plan, epochs_per_stage=8)
    assert "TRL's GKDTrainer compares at temperature 1" in caplog.text


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gkd", {"divergence": "kl"}, "kl"),
        ("gkd", {"divergence_temperature": 0.0}, "divergence_temperature must be"),
        ("gkd", {"teacher_cache": "c", "lmbda": 0.5}, "lmbda is 0.5"),
        ("gkd", {"teacher_cache": "c", "seq_kd": True}, "seq_kd is on"),
        ("gkd", {"teacher_cache": "c", "teacher_cache_kind": "sampled"}, "sampled"),
        ("sft", {"loss_type": "dft"}, "loss_type is 'dft'"),
        ("sft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ("sft", {"sft_weight": 2.0}, "sft_weight must be"),
        ("sft", {"teacher_cache": "c"}, "teacher_cache 'c'"),
    ],
)
@pytest.mark.usefixtures("own_folder")
def test_what_does_not_go_together_is_refused(made: Made, kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        getattr(made, kind)(ours, **fields)
