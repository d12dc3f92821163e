"""TRL's `GKDTrainer` and `SFTTrainer` with this library's loss and teacher cache.

The classes have the names and arguments of TRL's. Data, generation, logging and saving stay TRL's; the loss is computed
from hidden states, without a tensor of all logits. With the defaults of their configs they give TRL's own numbers.

Where TRL computes differently from this library, TRL's way is kept: GKD's divergence is always at temperature 1, since
`temperature` is only that of the sampling; it has no factor T^2; and with several processes GKD divides by the tokens
of all processes and also averages the gradients, while SFT multiplies by the number of processes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from ..errors import UserError
from ..losses import LossOptions
from ..losses.options import check_in_range
from ..models import load_config, load_model, unwrap
from ..teacher import CACHE_KINDS, LiveTeacher, TeacherCache, open_teacher_cache
from ..training.config import check_cache_kind
from .batch import samples_of
from .loop import loss_of_batch

try:
    import trl
    from trl.experimental import gkd
except ImportError as e:
    raise UserError(f"srd_fast.integrations.trl needs TRL 1.16 or later ({e}): pip install 'srd-fast[trl]'") from e


def _described(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class _LossFields:
    """The fields of both configs in addition to TRL's."""

    divergence: str = _described("jsd", "Name of the divergence; see divergence_names().")
    divergence_temperature: float = _described(1.0, "T of both softmaxes in the divergence, above 0.")
    temperature_scaling: bool = _described(False, "Multiply the divergence by T^2.")
    skew: float = _described(0.1, "Skew of the skew divergences, 0 to 1.")
    beta: float = _described(0.5, "Beta of the JSD, 0 (forward KL) to 1 (reverse KL).")
    sft_weight: float = _described(
        0.0, "Weight of the cross-entropy on the labels, 0 to 1. The divergence has the rest."
    )
    backend: str = _described("auto", "Loss backend: triton, compile, eager or auto.")
    memory_budget: int | None = _described(None, "Bytes that the loss may allocate beyond hidden states and gradients.")
    teacher_cache: str | None = _described(None, "Folder of the teacher's rows; missing rows are computed first.")
    teacher_cache_kind: str = _described("hidden", "What the cache stores for each token; see cache_kind_names().")
    teacher_cache_k: int = _described(64, "Classes, or draws, for each token of a compact cache.")


@dataclass
class GKDConfig(_LossFields, gkd.GKDConfig):
    """TRL's GKDConfig with the fields of this library's loss. Those listed here are its own.

    Args:
        divergence: the name of D, one of `divergence_names()`. "jsd" with `beta` is TRL's.
        divergence_temperature: T of D, above 0. TRL's is 1; its `temperature` is that of the sampling.
        temperature_scaling: multiply D by T^2. TRL does not.
        skew: s of the skew divergences, 0 to 1.
        sft_weight: weight of the cross-entropy on the labels, 0 to 1. TRL has none.
        backend: "triton", "compile", "eager" or "auto".
        memory_budget: bytes that the loss may allocate. None: the device's default.
        teacher_cache: folder of the teacher's rows, for `lmbda=0` without `seq_kd`. The teacher then runs once over the
            data, before training.
        teacher_cache_kind: one of `cache_kind_names()`.
        teacher_cache_k: classes, or draws, a row of a compact kind.
    """


@dataclass
class SFTConfig(_LossFields, trl.SFTConfig):
    """TRL's SFTConfig with the fields of this library's loss. Without a teacher the loss is TRL's cross-entropy.

    Args:
        divergence: the name of D, one of `divergence_names()`.
        divergence_temperature: T of D, above 0.
        temperature_scaling: multiply D by T^2.
        skew: s of the skew divergences, 0 to 1.
        beta: beta of the JSD, 0 to 1.
        sft_weight: weight of the cross-entropy if there is a teacher, 0 to 1.
        backend: "triton", "compile", "eager" or "auto".
        memory_budget: bytes that the loss may allocate. None: the device's default.
        teacher_cache: folder of the teacher's rows, which then runs once over the data, before training.
        teacher_cache_kind: one of `cache_kind_names()`.
        teacher_cache_k: classes, or draws, a row of a compact kind.
    """

    divergence: str = _described("forward_kl", "Name of the divergence; see divergence_names().")
    temperature_scaling: bool = _described(True, "Multiply the divergence by T^2.")
    sft_weight: float = _described(0.5, "Weight of the cross-entropy if there is a teacher, 0 to 1.")


class _Distils:
    """The common part of both trainers: their loss.

    Attributes:
        divergence_temperature: T of the next step; `attach_curriculum` sets it.
        sft_weight: weight of the cross-entropy of the next step; `attach_curriculum` sets it.
    """

    args: Any
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    model: Any
    divergence_temperature: float
    sft_weight: float
    teacher: Any

    def _set_loss(self, args: Any, config: type[_LossFields]) -> None:
        """Read and check the loss's fields of a config. A config of TRL's own has their defaults."""
        given = {f.name: getattr(args, f.name, getattr(config, f.name)) for f in fields(_LossFields)}
        check_in_range("divergence_temperature", given["divergence_temperature"])
        self.divergence_temperature, self.sft_weight = given["divergence_temperature"], given["sft_weight"]
        names = ("divergence", "temperature_scaling", "skew", "beta", "backend", "memory_budget")
        self._fields: dict[str, Any] = {name: given[name] for name in names}
        self._options()

    def _options(self, teacher: bool = True) -> LossOptions:
        weight = self.sft_weight if teacher else 1.0
        return LossOptions(
            **self._fields, temperature=self.divergence_temperature, sft_weight=weight, ignore_index=None
        )

    def _open_cache(self, args: Any, teacher: Any, dtype: Any) -> TeacherCache:
        """Open `args.teacher_cache`, after filling in the data's missing rows."""
        given = self.eval_dataset or {}
        data = [self.train_dataset, *(given.values() if isinstance(given, dict) else [given])]
        samples: list[dict[str, list[int]]] = []
        for rows in data:
            if not has_length(rows):
                raise UserError("teacher_cache needs data with a length, to run the teacher over: load them whole")
            # The samples as a step will see them, after the collator, which cuts and masks.
            samples += (s for row in _rows(rows) for s in samples_of(self.data_collator([row])))
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() and args.world_size > 1 else None
        cache = open_teacher_cache(
            args.teacher_cache,
            teacher,
            samples,
            kind=args.teacher_cache_kind,
            k=args.teacher_cache_k,
            temperatures=sorted({1.0, self.divergence_temperature}),
            student=unwrap(self.model),
            dtype=dtype,
            device=args.device,
            progress=not args.disable_tqdm and args.process_index == 0,
            group=world,
        )
        return cache.to(args.device)


def _rows(data: Any) -> Iterable[Any]:
    return (data[i] for i in range(len(data)))


def _check_cache(args: Any) -> bool:
    """Whether a cache is asked for. Refuse a kind that does not fit the divergence."""
    if getattr(args, "teacher_cache", None) is None:
        return False
    CACHE_KINDS.check(args.teacher_cache_kind)
    check_cache_kind(args.teacher_cache_kind, args.divergence)
    if getattr(args, "deepspeed", None) is not None:
        raise UserError("teacher_cache does not go with deepspeed here; SRDTrainer has both")
    return True


class _NotLoaded(nn.Module):
    """A stand-in for the teacher that TRL requires, if there is a cache: a configuration without weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class GKDTrainer(_Distils, gkd.GKDTrainer):
    """TRL's GKDTrainer with this library's loss; the same arguments.

    With the defaults of `GKDConfig`, loss and gradients are TRL's. With `args.teacher_cache` and `lmbda=0`, the teacher
    runs once over the data and is not in memory while the student trains.

    Args:
        model: the student, or its folder or hub id.
        teacher_model: a model, its folder or hub id; with `args.teacher_cache` it is loaded only if the cache lacks
            rows, or None.
        args: a GKDConfig of this module, or TRL's.
        *rest: TRL's further arguments, in its order.
        **more: TRL's further arguments, by name.

    Raises:
        UserError: `args` is missing, a field of the loss is wrong, or a cache is asked for where answers are generated.
    """

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: Any = None,
        *rest: Any,
        **more: Any,
    ) -> None:
        if args is None:
            raise UserError("args is missing: pass a GKDConfig of srd_fast.integrations.trl")
        self._set_loss(args, GKDConfig)
        cached = _check_cache(args)
        if cached and (args.lmbda > 0 or args.seq_kd):
            why = f"lmbda is {args.lmbda}" if args.lmbda > 0 else "seq_kd is on"
            raise UserError(
                f"teacher_cache holds rows of the data's answers, and {why}, which trains on generated ones: set "
                "lmbda to 0 and seq_kd to False, or leave teacher_cache out"
            )
        if teacher_model is None and not cached:
            raise UserError("teacher_model is missing: pass a model, its folder or hub id, or args.teacher_cache")
        shown, dtype = teacher_model, torch.float32
        if cached:
            options, args.teacher_model_init_kwargs = args.teacher_model_init_kwargs or {}, None
            dtype = _dtype(options.get("dtype"))
            seen = model if teacher_model is None else teacher_model
            shown = _NotLoaded(load_config(seen) if isinstance(seen, str) else seen.config)
        super().__init__(model, shown, args, *rest, **more)
        self.teacher = self._open_cache(args, teacher_model, dtype) if cached else self.teacher_model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The divergence of a batch from hidden states.

        Args:
            model: the student, wrapped for training.
            inputs: a batch of the data collator.
            return_outputs: return the student's outputs beside the loss, which takes another forward pass.
            num_items_in_batch: tokens with loss in the whole optimizer step, the denominator. Default: of this batch.

        Returns:
            Scalar, the loss; with `return_outputs` a tuple.
        """
        read = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        # TRL's collator pads on the left and gives no position_ids, so padding counts in positions here too.
        out, _ = loss_of_batch(model, self.teacher, read, self._loss_options(), num_items=num_items_in_batch)
        if not return_outputs:
            return out.loss
        with torch.no_grad():
            return out.loss, model(input_ids=read["input_ids"], attention_mask=read["attention_mask"])

    def _loss_options(self) -> LossOptions:
        # TRL's own attribute, which may be changed between steps.
        self._fields["beta"] = self.beta
        return self._options()


class SFTTrainer(_Distils, trl.SFTTrainer):
    """TRL's SFTTrainer with this library's loss, and optionally a teacher; otherwise the same arguments.

    Without a teacher, loss and gradients are those of TRL's "nll". With one, D has the weight 1 - `args.sft_weight`.
    The metric mean_token_accuracy is not logged, because it would need logits.

    Args:
        model: the student, or its folder or hub id.
        args: an SFTConfig of this module, or TRL's.
        *rest: TRL's further arguments, in its order.
        teacher_model: a model, or its folder or hub id; with `args.teacher_cache` it is loaded only if the cache lacks
            rows. None: only the cross-entropy, or the cache as it is.
        **more: TRL's further arguments, by name.

    Raises:
        UserError: a field of the loss is wrong, or asks for another loss.
    """

    def __init__(self, model: Any, args: Any = None, *rest: Any, teacher_model: Any = None, **more: Any) -> None:
        args = SFTConfig("SFT") if args is None else args
        self._set_loss(args, SFTConfig)
        cached = _check_cache(args)
        if getattr(args, "loss_type", "nll") != "nll":
            raise UserError(f"loss_type is {args.loss_type!r}, which is TRL's own loss: use trl.SFTTrainer, or 'nll'")
        if args.label_smoothing_factor:
            raise UserError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, which this loss lacks: set it to 0"
            )
        if more.get("compute_loss_func") is not None:
            raise UserError("compute_loss_func takes the place of this loss: use trl.SFTTrainer, or leave it out")
        super().__init__(model, args, *rest, **more)
        if self.aux_loss_enabled:
            raise UserError("router_aux_loss_coef is not 0, and this loss has no balance loss: set it to 0")
        if cached:
            self.teacher = self._open_cache(args, teacher_model, torch.float32)
        elif teacher_model is None:
            self.teacher = None
        else:
            loaded = load_model(teacher_model, torch.float32, args.device) if isinstance(teacher_model, str) else None
            self.teacher = LiveTeacher(loaded or teacher_model, args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy and divergence of a batch from hidden states.

        Args:
            model: the student, wrapped for training.
            inputs: a batch of the data collator.
            return_outputs: return the student's outputs beside the loss, which takes another forward pass.
            num_items_in_batch: tokens with loss in the whole optimizer step, the denominator. Default: of this batch.

        Returns:
            Scalar, the loss; with `return_outputs` a tuple.
        """
        mode = "train" if self.model.training else "eval"
        options = self._options(teacher=self.teacher is not None)
        out, found = loss_of_batch(model, self.teacher, inputs, options, num_items=num_items_in_batch)
        loss = out.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        labels = out.num_items.new_tensor(len(found["loss_labels"]))
        counted = torch.stack([out.entropy * out.num_items, labels.to(out.entropy.dtype), self._tokens_of(inputs, out)])
        entropy, count, tokens = self.accelerator.reduce(counted.detach(), "sum").tolist()
        self._metrics[mode]["entropy"].append(entropy / count if count else 0.0)
        if mode == "train":
            self._total_train_tokens += int(tokens) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**{name: x for name, x in inputs.items() if name != "labels"})

    @staticmethod
    def _tokens_of(inputs: dict[str, Any], out: Any) -> Tensor:
        seen = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else inputs["input_ids"].new_tensor(inputs["input_ids"].numel())
        )
        return seen.to(out.entropy.dtype)


def _dtype(given: Any) -> torch.dtype:
    if isinstance(given, torch.dtype):
        return given
    return torch.float32 if given in (None, "auto") else getattr(torch, given)
