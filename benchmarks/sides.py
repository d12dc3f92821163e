"""Who takes part in `benchmarks.train_gpu`, and how each trains. Another side is one `register` in a file of yours:

python -m benchmarks.train_gpu --import my_side.py --sides mine

from benchmarks.sides import Side, register, loop_steps
register(Side("mine", "my-package", lambda s, watch: loop_steps(s, watch, MyLoop)))       # a class as in loops.py
"""

import dataclasses
import importlib.util
import runpy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.curation import CurriculumPlan
from srd_fast.teacher import TeacherCache

from . import plan
from .loops import GPU_LOOPS, LOOPS, PlainLoop
from .pairs import Pair, cut_head, random_model, samples, tokenizer
from .watch import StepWatch

OPTIMIZER = "adamw_torch_fused"
MICRO_TOKENS = 16384
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


# Losses of all steps. Calls `watch.begin` before the first and `watch.step_done` after each.
Train = Callable[[Setup, StepWatch], tuple[SRDTrainer, list[Tensor]]]


@dataclass(frozen=True)
class Side:
    """One who trains. package: whose version its rows have. cached: whether it reads a teacher cache.

    needs: why it cannot take part on a device ("cpu", "cuda"), or None.
    """

    name: str
    package: str
    train: Train
    cached: bool = False
    needs: Callable[[str], str | None] = lambda device: None


SIDES: dict[str, Side] = {}


def register(side: Side) -> None:
    """Let a side take part under its name."""
    SIDES[side.name] = side


def import_files(paths: Iterable[Path]) -> None:
    """Run files that register sides."""
    for path in paths:
        runpy.run_path(str(path))


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


def srd_steps(s: Setup, watch: StepWatch, lora: bool = False, **options: Any) -> tuple[SRDTrainer, list[Tensor]]:
    """`SRDTrainer.train`, with what the config of the side says beyond the others'."""
    adapters = None
    if lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=16, target_modules=ADAPTED, task_type="CAUSAL_LM")
    teacher = make_teacher(s) if s.cache is None else TeacherCache(s.cache, verify=False)
    trainer = make_trainer(s, watch, teacher, adapters, **options)
    trainer.train()
    return trainer, list(trainer.step_losses.values())


def loop_steps(s: Setup, watch: StepWatch, make: Callable[..., PlainLoop]) -> tuple[SRDTrainer, list[Tensor]]:
    """Steps of a loop on the samples and in the order of the trainer. They are read before the clock runs."""
    teacher = make_teacher(s)
    cut_head(teacher, s.pair.classes)
    # The models keep their own attention: with padding_free the trainer would switch it.
    trainer = make_trainer(s, watch, teacher, padding_free=False)
    loop, order, rows = make(trainer.model, teacher, trainer, torch.bfloat16), trainer.curriculum.indices(), trainer
    batches = [[rows.train_dataset[next(order)] for _ in range(s.batch)] for _ in range(s.steps)]  # type: ignore[index]
    losses = []
    watch.begin()
    for number, batch in enumerate(batches):
        losses.append(loop.queue(number, batch))
        watch.step_done()
    return trainer, losses


def _without(package: str, device: str, gpu: bool = False) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return "it needs a GPU" if gpu and device == "cpu" else None


def _no_micro_batches(device: str) -> str | None:
    known = {f.name for f in dataclasses.fields(SRDConfig)}
    return None if "max_tokens_per_batch" in known else "SRDConfig has no field max_tokens_per_batch"


def _ours(name: str, needs: Callable[[str], str | None] = lambda device: None, **options: Any) -> Side:
    return Side(name, "srd-fast", partial(srd_steps, **options), name.startswith(plan.CACHE), needs)


_TRL, _PEFT = partial(_without, "trl"), partial(_without, "peft")
for _side in (
    _ours(plan.CACHE),
    _ours(plan.CACHE_COMPILED, torch_compile=True),
    _ours(plan.LIVE),
    _ours(plan.LIVE_COMPILED, torch_compile=True),
    _ours(plan.LORA, _PEFT, lora=True),
    _ours(plan.LORA_COMPILED, _PEFT, lora=True, torch_compile=True),
    _ours(plan.MICRO, _no_micro_batches, max_tokens_per_batch=MICRO_TOKENS),
    Side(plan.PLAIN, "torch", partial(loop_steps, make=LOOPS[plan.PLAIN])),
    Side(plan.PLAIN_COMPILED, "torch", partial(loop_steps, make=GPU_LOOPS[plan.PLAIN_COMPILED])),
    Side(plan.GKD, "trl", partial(loop_steps, make=LOOPS[plan.GKD]), needs=_TRL),
    Side(
        plan.GKD_LIGER,
        "trl",
        partial(loop_steps, make=GPU_LOOPS[plan.GKD_LIGER]),
        needs=lambda device: _TRL(device) or _without("liger_kernel", device, gpu=True),
    ),
    Side(plan.DISTILLATION, "trl", partial(loop_steps, make=LOOPS[plan.DISTILLATION]), needs=_TRL),
):
    register(_side)
