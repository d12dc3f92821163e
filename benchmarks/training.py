"""Steps of a training for `benchmarks.train_gpu`: through `SRDTrainer`, or one of the loops that stand beside it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.curriculum import CurriculumPlan
from srd_fast.teacher import TeacherCache

from .loops import PlainLoop
from .pairs import Pair, cut_head, random_model, samples, tokenizer
from .plan import OPTIMIZER
from .watch import StepWatch

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setup:
    """What a side is given. cache: a filled teacher cache, where the side reads one. folder: for its files."""

    pair: Pair
    batch: int
    steps: int
    device: str
    cache: Path | None
    folder: Path


# The trainer, whose curriculum has the order of the samples, and the loss of each step.
Trained = tuple[SRDTrainer, list[Tensor]]


class _Watched(SRDTrainer):
    """Keeps the loss of every step on its device, and tells the watch of each."""

    def __init__(self, watch: StepWatch, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step_losses: dict[int, Tensor] = {}
        self.add_callback(_TellsWatch(watch))

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """As always; a step may be several micro-batches, whose losses sum up."""
        loss, step = super().training_step(*args, **options), self.state.global_step
        self.step_losses[step] = self.step_losses.get(step, 0.0) + loss.detach()
        return loss


class _TellsWatch(TrainerCallback):
    def __init__(self, watch: StepWatch) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.step_done()


def make_trainer(s: Setup, watch: StepWatch, teacher: Any, adapters: Any = None, **options: Any) -> _Watched:
    """Of a student with random weights, over the samples of the steps."""
    rows = samples(s.pair.student.vocab_size, s.batch * s.steps)
    config = SRDConfig(
        output_dir=str(s.folder / "out"),
        divergence="forward_kl",
        temperature=1.0,
        sft_weight=0.0,
        epochs_per_stage=1,
        per_device_train_batch_size=s.batch,
        learning_rate=1e-5,
        optim=OPTIMIZER,
        bf16=True,
        use_cpu=s.device == "cpu",
        dataloader_pin_memory=s.device != "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    stages = CurriculumPlan([list(rows["sample_id"])], method="random")
    student = random_model(s.pair.student, torch.float32, s.device)
    return _Watched(
        watch, student, teacher, config, rows, curriculum=stages, processing_class=tokenizer(), peft_config=adapters
    )


def make_teacher(s: Setup) -> nn.Module:
    """In bfloat16, with random weights."""
    return random_model(s.pair.teacher, torch.bfloat16, s.device).eval()


def srd_steps(s: Setup, watch: StepWatch, lora: bool = False, **options: Any) -> Trained:
    """`SRDTrainer.train`, with what the config of the side says beyond the others'."""
    if unknown := set(options) - {f.name for f in dataclasses.fields(SRDConfig)}:
        raise NotImplementedError(f"SRDConfig has no field {', '.join(sorted(unknown))}")
    adapters = None
    if lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=16, target_modules=ADAPTED, task_type="CAUSAL_LM")
    teacher = make_teacher(s) if s.cache is None else TeacherCache(s.cache, verify=False)
    trainer = make_trainer(s, watch, teacher, adapters, **options)
    trainer.train()
    return trainer, list(trainer.step_losses.values())


def loop_steps(s: Setup, watch: StepWatch, make: Callable[..., PlainLoop]) -> Trained:
    """Steps of a loop on the samples and in the order of the trainer. They are read before the clock runs."""
    teacher = make_teacher(s)
    cut_head(teacher, s.pair.classes)
    # The models keep their own attention: with padding_free the trainer would switch it.
    trainer = make_trainer(s, watch, teacher, padding_free=False)
    loop, order = make(trainer.model, teacher, trainer, torch.bfloat16), trainer.curriculum.indices()
    rows: Any = trainer.train_dataset
    batches = [[rows[next(order)] for _ in range(s.batch)] for _ in range(s.steps)]
    losses = []
    watch.begin()
    for number, batch in enumerate(batches):
        losses.append(loop.queue(number, batch))
        watch.step_done()
    return trainer, losses
