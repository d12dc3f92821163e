"""`attach_curriculum` on trainers that know nothing of it: which samples each step sees, and what a stage sets."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from srd_fast import CurriculumPlan, UserError, attach_curriculum
from srd_fast.curriculum import Curriculum

pytestmark = pytest.mark.usefixtures("quick_collection")

SAMPLES = tiny.tiny_samples(12)
IDS = [s["sample_id"] for s in SAMPLES]
# The last three samples are dropped, and the order of the data is not that of the plan.
PLAN = CurriculumPlan(subsets=[[IDS[7], IDS[1]], [IDS[0], IDS[3], IDS[5]], [IDS[2], IDS[8], IDS[6]]], method="none")


class Recording(Trainer):
    """Any trainer of somebody: with attributes for T and weight, a loss that uses them, and a memory of its samples."""

    def __init__(self, **kwargs: Any) -> None:
        self.seen: list[tuple[str, float, float]] = []
        self.temperature, self.sft_weight = 9.0, 9.0
        super().__init__(data_collator=self._collate, **kwargs)

    def _collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**tiny.collate(samples), "sample_ids": [s["sample_id"] for s in samples]}

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.seen += [(i, self.temperature, self.sft_weight) for i in inputs.pop("sample_ids")]
        return model(**inputs).loss * self.sft_weight


def trainer(folder: Path, data: Any = None, kind: type[Trainer] = Recording, **fields: Any) -> Any:
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.01, "use_cpu": True}
    args |= {
        "report_to": "none",
        "remove_unused_columns": False,
        "save_strategy": "no",
        "seed": 3,
        "disable_tqdm": True,
    }
    dataset = Dataset.from_list(SAMPLES) if data is None else data
    made = TrainingArguments(str(folder), **{**args, **fields})
    return kind(model=tiny.tiny_model(layers=1), args=made, train_dataset=dataset)


def expected(epochs: Sequence[float] = (1, 1.5, 2)) -> tuple[Curriculum, list[tuple[str, float, float]]]:
    """2, 5 and 8 samples, 4 a step: steps of each stage, and what each sample of the run is seen with."""
    values = {"temperatures": (1.0, 1.5, 2.0), "sft_weights": (0.3, 0.2, 0.1), "learning_rates": (1, 1, 1)}
    curriculum = Curriculum(PLAN, IDS, batch_size=4, epochs_per_stage=epochs, seed=3, **values)
    seen = []
    for number, index in enumerate(curriculum.indices()):
        step = number // 4
        seen.append((IDS[index], curriculum.temperature(step), pytest.approx(curriculum.sft_weight(step))))
    return curriculum, seen


def test_order_stages_temperature_and_weight_reach_the_trainer(tmp_path: Path) -> None:
    told: list[tuple[int, float, float]] = []
    training = trainer(tmp_path)
    schedule = attach_curriculum(
        training, PLAN, epochs_per_stage=[1, 1.5, 2], on_stage=lambda *stage: told.append(stage)
    )
    training.train()
    curriculum, seen = expected()
    assert [s.steps for s in curriculum.stages] == [1, 2, 4]
    assert schedule.total_steps == training.state.global_step == 7
    assert training.seen == seen
    assert not {IDS[i] for i in (4, 9, 10, 11)} & {i for i, *_ in training.seen}
    assert told == [(1, 1.0, 0.3), (2, 1.5, pytest.approx(0.2)), (3, 2.0, pytest.approx(0.1))]


def test_a_run_goes_on_in_the_middle_of_a_stage(tmp_path: Path) -> None:
    """Step 5 is the second of the third stage's four: the same samples, T and weights, and the same student."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer(tmp_path, **options)
    attach_curriculum(whole, PLAN, epochs_per_stage=[1, 1.5, 2])
    whole.train()
    told: list[int] = []
    resumed = trainer(tmp_path, **options)
    attach_curriculum(resumed, PLAN, epochs_per_stage=[1, 1.5, 2], on_stage=lambda stage, t, w: told.append(stage))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert told == [3]
    assert resumed.seen == whole.seen[5 * 4 :]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


class Plain(Trainer):
    """Without attributes for T and weight."""


def test_rows_in_a_list_ids_beside_them_and_a_shorter_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{k: v for k, v in s.items() if k != "sample_id"} for s in SAMPLES]
    training = trainer(tmp_path, rows, Plain, max_steps=2)
    training.data_collator = lambda samples: (seen.extend(rows.index(s) for s in samples), tiny.collate(samples))[1]
    seen: list[int] = []
    schedule = attach_curriculum(training, PLAN, temperature=1.0, sft_weight=[0.5, 0.2, 0], sample_ids=IDS)
    training.train()
    assert training.state.global_step == 2
    assert seen[:8] == list(islice(schedule.indices(), 8))
    assert "Plain has no attribute temperature" in caplog.text
    assert "Plain has no attribute sft_weight" in caplog.text
    listed = trainer(tmp_path, SAMPLES, Plain)
    assert attach_curriculum(listed, PLAN).total_steps == schedule.total_steps == 4 + 10 + 16


class Ordered(Recording):
    """With an order of its own."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return None


@pytest.mark.parametrize(
    ("given", "fields", "message"),
    [
        ({"trainer": "t"}, {}, "trainer must be a transformers.Trainer, got str"),
        ({"kind": Ordered}, {}, "Ordered makes an order of its own"),
        ({"data": Dataset.from_list(SAMPLES[:5])}, {}, "the plan keeps 4 samples that the data does not have"),
        ({"data": Dataset.from_list(SAMPLES).remove_columns("sample_id")}, {}, "train_dataset has no column sample_id"),
        ({"data": Dataset.from_list(SAMPLES).to_iterable_dataset()}, {"max_steps": 3}, "must have a length"),
        ({"sample_ids": IDS[:3]}, {}, "sample_ids has 3 ids and train_dataset 12 rows"),
        ({"epochs_per_stage": 0}, {}, "epochs_per_stage must be above 0, got 0"),
        ({"temperature": [1, 2]}, {}, "temperature has 2 values for 3 stages"),
        ({"sft_weight_end": 1.5}, {}, "sft_weight must be from 0 to 1"),
        ({}, {"max_steps": 99}, "max_steps is 99 but the curriculum has 30 steps"),
        ({}, {"ignore_data_skip": True}, "ignore_data_skip"),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({}, {"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
    ],
)
def test_what_cannot_be_ordered_is_refused(
    given: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = {k: given[k] for k in ("data", "kind") if k in given}
    options = {k: v for k, v in given.items() if k not in ("data", "kind", "trainer")}
    with pytest.raises(UserError, match=message):
        attach_curriculum(given.get("trainer") or trainer(tmp_path, **made, **fields), PLAN, **options)


def test_one_trainer_gets_one_curriculum(tmp_path: Path) -> None:
    training = trainer(tmp_path)
    attach_curriculum(training, PLAN)
    with pytest.raises(UserError, match="makes an order of its own"):
        attach_curriculum(training, PLAN)
