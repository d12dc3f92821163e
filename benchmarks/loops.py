"""Training steps to stand beside SRD-Fast's: the loop that everyone writes first, and TRL's two trainers.

Each takes the samples of a step and does it whole: batch, forward, loss, backward, clipping, optimizer. Optimizer,
learning rate and clipping are those of the `SRDTrainer` that it stands beside.

TRL's trainers run their own `training_step` on the completions given, padded; generation, which the DistillationTrainer
does before each step, is left out, and gradient checkpointing, their default, is off, as on the other sides. Neither
has a curriculum, and the GKDTrainer's loss is at temperature 1: they stand beside plain distillation at temperature 1.
`benchmarks.on_policy` has the GKDTrainer with its generation.
`use_liger_kernel=True` gives the GKDTrainer's student liger-kernel's layers; its loss is the same.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from srd_fast import SRDTrainer
from srd_fast.data import DistillationCollator, first_label, pad_id, pad_right

Samples = list[dict[str, Any]]


class PlainLoop:
    """One step of distillation as it is usually written."""

    def __init__(self, student: nn.Module, teacher: nn.Module, trainer: SRDTrainer, dtype: torch.dtype) -> None:
        self.student, self.teacher, self.trainer, self.dtype = student.train(), teacher.eval(), trainer, dtype
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, student)
        self.optimizer = kind([p for p in student.parameters() if p.requires_grad], **options)
        self.collate = DistillationCollator(pad_id(trainer.processing_class))
        self.device = trainer.args.device

    def step(self, number: int, samples: Samples) -> float:
        """Loss of the step `number` on these samples; the weights are changed."""
        return self.queue(number, samples).item()

    def queue(self, number: int, samples: Samples) -> Tensor:
        """As `step`, without waiting for the device."""
        loss = self.backward(number, samples).detach()
        nn.utils.clip_grad_norm_(self.student.parameters(), self.trainer.args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.curriculum.learning_rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def backward(self, number: int, samples: Samples) -> Tensor:
        """Loss of a batch; the gradients are there."""
        curriculum = self.trainer.curriculum
        t, sft = curriculum.temperature(number), curriculum.sft_weight(number)
        batch = {name: x.to(self.device) for name, x in self.collate(samples).items()}
        labels = batch["labels"][:, 1:]
        kept = labels != -100
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with torch.no_grad():
                logits_T = self.teacher(**inputs, use_cache=False).logits
            logits_S = self.student(**inputs, use_cache=False).logits
        loss = self.loss_of(logits_S, logits_T, labels, kept, t, sft)
        loss.backward()
        return loss

    @staticmethod
    def loss_of(logits_S: Tensor, logits_T: Tensor, labels: Tensor, kept: Tensor, t: float, sft: float) -> Tensor:
        """From the logits [B, L, V] of both, in float32."""
        z_S, z_T = logits_S[:, :-1].float(), logits_T[:, :-1].float()
        log_p, log_q = torch.log_softmax(z_T / t, -1), torch.log_softmax(z_S / t, -1)
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
        divergence = (per_token * kept).sum() / kept.sum()
        cross_entropy = functional.cross_entropy(z_S.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return sft * cross_entropy + (1 - sft) * t * t * divergence


class Reversed(PlainLoop):
    """The same with each batch in reverse, which changes nothing but the order of sums."""

    def backward(self, number: int, samples: Samples) -> Tensor:
        """As always."""
        return super().backward(number, samples[::-1])


class Compiled(PlainLoop):
    """The same with the layers of both models and the loss through `torch.compile`."""

    def __init__(self, student: nn.Module, teacher: nn.Module, trainer: SRDTrainer, dtype: torch.dtype) -> None:
        super().__init__(student, teacher, trainer, dtype)
        for model in (student, teacher):
            # One graph serves all layers; of a whole model each would be compiled again.
            for layer in model.get_decoder().layers:  # type: ignore[operator]
                layer.compile()
        self.loss_of = torch.compile(PlainLoop.loss_of)  # type: ignore[method-assign]


class _TRL(PlainLoop, ABC):
    """A trainer of TRL's that runs `training_step` on batches it is given."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, student: nn.Module, teacher: nn.Module, trainer: SRDTrainer, dtype: torch.dtype) -> None:
        super().__init__(student, teacher, trainer, dtype)
        args = trainer.args
        options = {
            "output_dir": f"{args.output_dir}/trl", "per_device_train_batch_size": args.per_device_train_batch_size,
            "bf16": dtype == torch.bfloat16, "use_cpu": args.use_cpu, "report_to": [], "gradient_checkpointing": False,
            "beta": 0.0, "temperature": 1.0, **self.options,
        }  # fmt: skip
        self.trl = self.make(student, teacher, options)
        self.trl.current_gradient_accumulation_steps = 1
        self.model = self.trl.accelerator.prepare_model(student)

    @abstractmethod
    def make(self, student: nn.Module, teacher: nn.Module, options: dict[str, Any]) -> Any:
        """The trainer."""

    @abstractmethod
    def batch(self, samples: Samples) -> dict[str, Tensor]:
        """What its `training_step` takes."""

    def backward(self, number: int, samples: Samples) -> Tensor:
        """TRL's."""
        count = torch.tensor(sum(x != -100 for s in samples for x in s["labels"][1:]))
        return self.trl.training_step(self.model, self.batch(samples), count)


class GKD(_TRL):
    """GKDTrainer, off-policy: full logits of both, forward KL."""

    def make(self, student: nn.Module, teacher: nn.Module, options: dict[str, Any]) -> Any:
        """The trainer."""
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        return GKDTrainer(
            student, teacher, GKDConfig(**{"lmbda": 0.0, **options}), data_collator=self.collate,
            train_dataset=self.trainer.train_dataset, processing_class=self.trainer.processing_class,
        )  # fmt: skip

    def batch(self, samples: Samples) -> dict[str, Tensor]:
        """Padded to the longest."""
        return self.collate(samples)


class GKDWithLiger(GKD):
    """GKDTrainer on liger-kernel's layers."""

    options: ClassVar[dict[str, Any]] = {"use_liger_kernel": True}

    def __init__(self, student: nn.Module, teacher: nn.Module, trainer: SRDTrainer, dtype: torch.dtype) -> None:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        super().__init__(student, teacher, trainer, dtype)
        _apply_liger_kernel_to_instance(model=student)  # what `Trainer.train` does with use_liger_kernel=True


class GKDOnPolicy(GKD):
    """GKDTrainer on answers that the student samples in each step, by `generate` of transformers; JSD."""

    options: ClassVar[dict[str, Any]] = {"lmbda": 1.0, "beta": 0.5}

    def __init__(
        self, student: nn.Module, teacher: nn.Module, trainer: SRDTrainer, dtype: torch.dtype, new_tokens: int
    ) -> None:
        self.options = {**self.options, "max_new_tokens": new_tokens}
        super().__init__(student, teacher, trainer, dtype)
        self.generation_seconds, self.answer_tokens = 0.0, 0
        generate = self.trl.generate_on_policy_outputs

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            found = generate(*args)
            self.generation_seconds = time.perf_counter() - began
            self.answer_tokens = int((found[2] != -100).sum())
            return found

        self.trl.generate_on_policy_outputs = timed

    def batch(self, samples: Samples) -> dict[str, Tensor]:
        """Padded, and beside it the prompts alone, padded at their beginnings."""
        prompts = [s["input_ids"][: first_label(s["labels"])][::-1] for s in samples]
        return {
            **self.collate(samples),
            "prompts": pad_right(prompts, self.collate.pad_token_id).flip(1),
            "prompt_attention_mask": pad_right([[1] * len(x) for x in prompts], 0).flip(1),
        }


class Distillation(_TRL):
    """DistillationTrainer: chunked loss over the completions' hidden states, forward KL."""

    def make(self, student: nn.Module, teacher: nn.Module, options: dict[str, Any]) -> Any:
        """The trainer, with given completions where it would generate."""
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        class OnGivenCompletions(DistillationTrainer):
            def _prepare_inputs(self, generation_batch: Any) -> Any:
                return {name: x.to(self.accelerator.device) for name, x in generation_batch.items()}

        return OnGivenCompletions(
            student, teacher, DistillationConfig(**options), train_dataset=Dataset.from_dict({"prompt": ["-"]}),
            processing_class=self.trainer.processing_class,
        )  # fmt: skip

    def batch(self, samples: Samples) -> dict[str, Tensor]:
        """Prompts padded at their beginnings, completions at their ends, as it does with those that it generates."""
        split = [first_label(s["labels"]) for s in samples]
        # Padded at the end backwards is padded at the beginning.
        prompts = [s["input_ids"][:n][::-1] for s, n in zip(samples, split)]
        completions = [s["input_ids"][n:] for s, n in zip(samples, split)]
        pad = self.collate.pad_token_id
        return {
            "prompt_ids": pad_right(prompts, pad).flip(1),
            "prompt_mask": pad_right([[1] * len(x) for x in prompts], 0).flip(1),
            "completion_ids": pad_right(completions, pad),
            "completion_mask": pad_right([[1] * len(x) for x in completions], 0),
            "num_items_in_batch": torch.tensor(float(sum(map(len, completions)))),
        }


PLAIN, REVERSED = "plain loop", "plain loop, batches in reverse"
LOOPS: dict[str, Callable[..., PlainLoop]] = {
    PLAIN: PlainLoop,
    REVERSED: Reversed,
    "trl GKDTrainer": GKD,
    "trl DistillationTrainer": Distillation,
}
# Those that only a GPU runs in reasonable time.
GPU_LOOPS: dict[str, Callable[..., PlainLoop]] = {
    f"{PLAIN}, compiled": Compiled,
    "trl GKDTrainer, liger-kernel": GKDWithLiger,
}
