"""`attach_curriculum`: a curriculum for a trainer of another library.

The trainer's sampler sets the order of the samples, a callback everything else. Both depend only on the step's number,
so a resumed run continues correctly.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from ..curriculum import Curriculum, CurriculumPlan, per_stage
from ..errors import UserError
from ..training.batching import IndexStream, check_max_steps
from ..training.trainer import SRDTrainer

logger = logging.getLogger(__name__)

OnStage = Callable[[int, float, float], None]
# Names of the temperature in trainers. The first that a trainer has is set.
_TEMPERATURES = ("divergence_temperature", "temperature")
_WEIGHTS = ("sft_weight",)


def attach_curriculum(
    trainer: Trainer,
    plan: CurriculumPlan,
    *,
    epochs_per_stage: float | Sequence[float] = 8,
    temperature: float | Sequence[float] | None = None,
    temperature_start: float = 1.0,
    temperature_end: float = 2.0,
    sft_weight: float | Sequence[float] | None = None,
    sft_weight_start: float = 0.3,
    sft_weight_end: float = 0.1,
    sample_ids: Sequence[str] | None = None,
    on_stage: OnStage | None = None,
) -> Curriculum:
    """Give a `transformers` or TRL trainer the samples, stages, temperatures and weights of a plan.

    The run becomes one epoch of the trainer, which goes through all stages. The learning rate, the optimizer and the
    loss stay the trainer's. If the trainer has these attributes, T is set as `divergence_temperature` or `temperature`,
    and the weight of the cross-entropy as `sft_weight`; `on_stage` can set them anywhere else.

    Args:
        trainer: a trainer that has not trained yet. Its train_dataset has the column sample_id.
        plan: the plan of train_dataset's samples, from `curate`.
        epochs_per_stage: passes over each stage's samples: one number, or one a stage. It replaces num_train_epochs.
        temperature: one T, or one a stage; replaces temperature_start and _end.
        temperature_start: T of the first stage, above 0.
        temperature_end: T of the last stage, above 0; stages between are interpolated linearly.
        sft_weight: one weight of the cross-entropy, or one a stage; replaces sft_weight_start and _end.
        sft_weight_start: weight in the first stage, 0 to 1.
        sft_weight_end: weight in the last stage, 0 to 1.
        sample_ids: ids of the rows of train_dataset in its order, if it has no column sample_id.
        on_stage: called as `on_stage(stage, temperature, sft_weight)` before the first step of each stage, and of a
            resumed run. Stages are counted from 1.

    Returns:
        The schedule: its `total_steps`, and `stage_of`, `temperature` and `sft_weight` of a step.

    Raises:
        UserError: the order of the trainer's data cannot be set, the plan does not fit the data, or a value is out of
            range.
    """
    _check_trainer(trainer)
    if plan.weights:
        raise UserError(
            f"the plan weighs samples by {plan.weight_by!r}, and a trainer's own loss takes no weights: curate without "
            "weight_by, or train with SRDTrainer"
        )
    args, data = trainer.args, trainer.train_dataset
    ids = _ids_of(data, sample_ids)
    stages = len(plan.subset_columns)
    epochs = per_stage("epochs_per_stage", epochs_per_stage, 0.0, 0.0, stages)
    temperatures = per_stage("temperature", temperature, temperature_start, temperature_end, stages)
    weights = per_stage("sft_weight", sft_weight, sft_weight_start, sft_weight_end, stages)
    for name, values, fits, wanted in (
        ("epochs_per_stage", epochs, lambda x: x > 0, "above 0"),
        ("temperature", temperatures, lambda x: x > 0, "above 0"),
        ("sft_weight", weights, lambda x: 0 <= x <= 1, "from 0 to 1"),
    ):
        for value in values:
            if not fits(value):
                raise UserError(f"{name} must be {wanted}, got {value!r}")
    curriculum = Curriculum(
        plan,
        ids,
        batch_size=trainer.get_total_train_batch_size(args),
        epochs_per_stage=epochs,
        temperatures=temperatures,
        sft_weights=weights,
        learning_rates=[args.learning_rate] * stages,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )
    check_max_steps(curriculum, args)
    args.num_train_epochs = 1.0
    trainer._get_train_sampler = lambda *a, **k: IndexStream(curriculum)  # type: ignore[method-assign]
    trainer.add_callback(_Stages(trainer, curriculum, on_stage))
    return curriculum


class _Stages(TrainerCallback):
    """Sets a stage's temperature and weight before its first step."""

    def __init__(self, trainer: Trainer, curriculum: Curriculum, on_stage: OnStage | None) -> None:
        self.trainer, self.curriculum, self.on_stage = trainer, curriculum, on_stage
        self.stage: int | None = None
        self.taken = [next((n for n in names if hasattr(trainer, n)), None) for names in (_TEMPERATURES, _WEIGHTS)]
        if on_stage is not None:
            return
        for what, name, first in zip(("temperature", "sft_weight"), self.taken, ("temperatures", "sft_weights")):
            if name is None:
                logger.warning(
                    "%s has no attribute %s, so the stages' %s have no effect: give on_stage, or use only the order",
                    type(trainer).__name__, what, first,
                )  # fmt: skip
        if self.taken[0] == "temperature" and type(trainer).__module__.startswith("trl.experimental.gkd"):
            logger.warning(
                "TRL's GKDTrainer compares at temperature 1 and uses its temperature only for sampling; "
                "srd_fast.integrations.trl.GKDTrainer compares at the stages' temperatures"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stage = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage = self.curriculum.stage_of(state.global_step)
        if stage == self.stage:
            return
        self.stage, now = stage, self.curriculum.stages[stage]
        for name, value in zip(self.taken, (now.temperature, now.sft_weight)):
            if name is not None:
                setattr(self.trainer, name, value)
        logger.info("stage %d: temperature %g, sft_weight %g", stage + 1, now.temperature, now.sft_weight)
        if self.on_stage is not None:
            self.on_stage(stage + 1, now.temperature, now.sft_weight)


def _check_trainer(trainer: Any) -> None:
    """Refuse a trainer that would not take samples in the order of its sampler."""
    if not isinstance(trainer, Trainer):
        raise UserError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    kind, args = type(trainer), trainer.args
    if isinstance(trainer, SRDTrainer):
        raise UserError(f"{kind.__name__} has a curriculum of its own: give it curriculum=plan")
    for name in ("_get_train_sampler", "get_train_dataloader"):
        if getattr(kind, name) is not getattr(Trainer, name) or name in vars(trainer):
            raise UserError(f"{kind.__name__} makes an order of its own ({name}), so a curriculum cannot give it one")
    if trainer.train_dataset is None or not has_length(trainer.train_dataset):
        raise UserError("train_dataset must have a length for a curriculum to order it; load an iterable one whole")
    if getattr(args, "packing", False):
        raise UserError("packing is on, which joins samples, so that a curriculum finds none of them; set it to False")
    if args.ignore_data_skip:
        raise UserError("ignore_data_skip is on, so a resumed run would start its curriculum again; set it to False")
    if args.auto_find_batch_size:
        raise UserError("auto_find_batch_size would change the curriculum's steps in mid-run; set it to False")
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy != "random" or getattr(args, "group_by_length", False):
        raise UserError("train_sampling_strategy is set, and a curriculum is an order of its own; leave it out")


def _ids_of(data: Any, given: Sequence[str] | None) -> list[str]:
    if given is not None:
        if len(given) != len(data):
            raise UserError(f"sample_ids has {len(given)} ids and train_dataset {len(data)} rows: one a row is needed")
        return list(given)
    columns = getattr(data, "column_names", None) or (list(data[0]) if len(data) else [])
    if "sample_id" not in columns:
        raise UserError(
            f"train_dataset has no column sample_id (it has {', '.join(columns) or 'none'}), by which a plan knows its "
            "samples: keep that column, or give sample_ids"
        )
    column = getattr(data, "column_names", None) is not None
    return list(data["sample_id"]) if column else [row["sample_id"] for row in data]
