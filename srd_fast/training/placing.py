"""How a training's student is sharded, called and saved.

The Trainer leaves sharding to FSDP and DeepSpeed, which do it when training begins. But an evaluation may come first.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import distributed, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations.fsdp import update_fsdp_plugin_peft

from ..errors import UserError
from ..losses import get_divergence
from ..models import (
    call_through,
    divide_vocabulary,
    gathered,
    is_emptied,
    is_fully_sharded,
    is_sharded,
    loading_whole,
    save_student,
    tensor_parallel_group,
    whole_student,
    why_not_in_shards,
)
from .answer_fields import why_silent
from .checkpoints import check_engine
from .config import SRDConfig

if distributed.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy

logger = logging.getLogger(__name__)

R = TypeVar("R")

# With more processes, exchanging rows moves more data than gathering the head: docs/many_gpus.md has the numbers.
_MOST_RANKS = 8


class StudentPlace:
    """Everything that a trainer does with its student that depends on where the student's weights are.

    Args:
        args: the training's config.
        accelerator: the training's accelerator.
    """

    def __init__(self, args: SRDConfig, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.in_shards = False
        self._known: tuple[Any, Any] = None, None  # the wrapped model, and the model inside

    @property
    def fsdp(self) -> Any:
        """accelerate's FSDP plugin, or None if FSDP does not shard the student."""
        return getattr(self.accelerator.state, "fsdp_plugin", None)

    @property
    def fsdp_version(self) -> int | None:
        """1 or 2; None without FSDP."""
        return None if self.fsdp is None else self.fsdp.fsdp_version

    @property
    def has_deepspeed(self) -> bool:
        """Whether DeepSpeed trains the student."""
        return getattr(self.accelerator.state, "deepspeed_plugin", None) is not None

    def choose_head(self, student: nn.Module, own_optimizer: bool, predicts: bool) -> None:
        """Decide whether the student's vocabulary will stay in shards, as `head_in_shards` says.

        Args:
            student: the student before it is sharded.
            own_optimizer: whether the user made the optimizer, for the weights before sharding.
            predicts: whether evaluations look for each token's likeliest class.

        Raises:
            UserError: `head_in_shards` is true, but the vocabulary cannot stay in shards.
        """
        if self.args.head_in_shards is False:
            return
        reason = self._why_whole(student)
        if reason is None and own_optimizer:
            reason = "an optimizer of your own has the weights as they are now"
        if reason is None and predicts:
            reason = "compute_metrics needs the likeliest class of a whole row"
        if self.args.head_in_shards is True and reason is not None:
            raise UserError(f"head_in_shards is true, but {reason}; set it to 'auto' or false")
        world = self.args.world_size
        near = world <= _MOST_RANKS and int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
        self.in_shards = reason is None and (near or self.args.head_in_shards is True)

    def _why_whole(self, student: nn.Module) -> str | None:
        plugin = self.fsdp
        if self.fsdp_version != 2 or self.args.world_size == 1:
            return "the student is not sharded by FSDP2 on several processes"
        if is_sharded(student):
            return "the student is sharded already"
        if getattr(self.accelerator, "torch_device_mesh", None) is not None:
            return "parallelism_config divides the processes in a way of its own"
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            return "the student's weights are offloaded to the host"
        if plugin.activation_checkpointing:
            return "fsdp_config's activation_checkpointing comes before any sharding (gradient_checkpointing does not)"
        if plugin.ignored_modules is not None:
            return "fsdp_config has ignored_modules of its own"
        if get_divergence(self.args.divergence).value_and_weight is not None:
            return f"divergence {self.args.divergence!r} sees whole rows of logits"
        if self.args.standardize_logits:
            return "standardize_logits sees whole rows of logits"
        if self.args.position_selection == "topk_student_confidence_gap":
            return f"position_selection {self.args.position_selection!r} sees whole rows of logits"
        return why_not_in_shards(student, self.args.world_size)

    def inner(self, wrapped: nn.Module) -> nn.Module:
        """The student without wrappers, found once: accelerate searches every module of a model each time."""
        if self._known[0] is not wrapped:
            self._known = wrapped, self.accelerator.unwrap_model(wrapped)
        return self._known[1]

    def call(self, wrapped: nn.Module, forward: Callable[[dict[str, Any]], R], batch: dict[str, Any]) -> R:
        """Run `forward` without gradients, inside the student's call, where sharded weights are gathered."""
        student = self.inner(wrapped)
        with gathered(student):
            return call_through(wrapped, student, forward, batch)

    def placed(self, student: nn.Module) -> nn.Module:
        """Wrap, shard and move a student that has no wrapper yet, as for a training step.

        Args:
            student: the student, whole in this process or emptied by ZeRO-3.

        Returns:
            The student as training calls it.
        """
        if self.fsdp is not None:
            with self._keeping_shards(student):
                return self._sharded_by_fsdp(student)
        if self.has_deepspeed and not is_emptied(student):
            student.to(self.args.device)
        return student

    def _sharded_by_fsdp(self, student: nn.Module) -> nn.Module:
        self.fsdp.set_auto_wrap_policy(student)
        if self.fsdp_version == 2:
            return fsdp2_prepare_model(self.accelerator, student)  # `prepare` would want the optimizer too
        if hasattr(student, "peft_config"):
            update_fsdp_plugin_peft(student, self.accelerator)
        return self.accelerator.prepare(student)

    @contextmanager
    def _keeping_shards(self, student: nn.Module) -> Iterator[None]:
        """In the block, let FSDP2 shard a student, except a vocabulary that is in shards of its own."""
        if not self.in_shards or is_fully_sharded(student):
            yield
            return
        policy, mesh = (
            self.fsdp.mixed_precision_policy,
            init_device_mesh(self.args.device.type, (self.args.world_size,)),
        )
        self.fsdp.ignored_modules = divide_vocabulary(student, mesh, getattr(policy, "param_dtype", None))
        try:
            yield
        finally:
            self.fsdp.ignored_modules = None

    def save(self, wrapped: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Save the whole student, adapters merged, and check the saved folder. All processes call this together.

        Args:
            wrapped: the student as training calls it.
            tokenizer: saved with it.
            folder: where it goes. The first process writes.

        Raises:
            UserError: it could not be saved. All processes raise it.
        """
        student: Any = self.inner(wrapped)
        failures: list[UserError | None] = [None]
        with loading_whole():
            if is_sharded(wrapped):
                student = whole_student(wrapped, student)
            if self.args.process_index == 0:
                try:
                    save_student(student, tokenizer, folder)
                except UserError as e:
                    failures = [e]
        if self.args.world_size > 1:
            distributed.broadcast_object_list(failures)
        if failures[0] is not None:
            raise failures[0]

    def why_silent(self, student: nn.Module) -> str | None:
        """Why a student cannot answer prompts while it trains; None if it can.

        Args:
            student: the model that is trained.
        """
        in_shards = self.fsdp is not None or is_sharded(student)
        return why_silent(self.args, self.has_deepspeed, self.fsdp_version, in_shards)

    def check_micro_batches(self, student: nn.Module) -> None:
        """Refuse `max_tokens_per_batch` if processes cannot have different numbers of micro-batches in a step.

        Args:
            student: the model that is trained.

        Raises:
            UserError: the field is set, and the way of training does not allow that.
        """
        reason = None
        if self.has_deepspeed:
            reason = "DeepSpeed steps after each backward"
        elif self.fsdp is not None or is_sharded(student):
            reason = "processes with different numbers of micro-batches would wait for each other's shards"
        if self.args.max_tokens_per_batch and reason is not None:
            raise UserError(
                f"max_tokens_per_batch is {self.args.max_tokens_per_batch}, but {reason}; set it to 0 and lower "
                "per_device_train_batch_size, with more gradient_accumulation_steps"
            )

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Refuse a checkpoint from which this training cannot resume, and warn of what is lost.

        Args:
            checkpoint: the folder.

        Raises:
            UserError: this training cannot resume from it.
        """
        check_engine(checkpoint, self.fsdp, self.has_deepspeed, self.args.world_size)
        if self.fsdp_version == 1:
            logger.warning(
                "FSDP1 has been seen to lose the optimizer's state when it goes on from a checkpoint (on a CPU): "
                "use FSDP2 (fsdp_config={'version': 2}) for a run that is to be resumed"
            )


def check_not_divided(student: Any) -> None:
    """Refuse a student that is divided over processes by tensor, pipeline or expert parallelism.

    Args:
        student: the student as the user gave it.

    Raises:
        UserError: it is divided in such a way.
    """
    spread = getattr(getattr(student, "config", None), "distributed_config", None)
    sizes = {name: getattr(spread, name, None) or 1 for name in ("tp_size", "pp_size", "ep_size")}
    given = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    if given or tensor_parallel_group(student) is not None:
        raise UserError(
            f"model: the student is divided over processes ({given or 'tensor parallelism'}), but every process trains "
            "on samples of its own; load it without, and put it in shards with fsdp, deepspeed or "
            "DistributedConfig(fsdp_size=N), or call model_distillation_loss in a loop of your own"
        )


def check_fsdp(args: SRDConfig) -> None:
    """Refuse FSDP settings with which a student cannot be tried before training.

    Args:
        args: the training's config.

    Raises:
        UserError: only the first process would have the student's weights.
    """
    config = args.fsdp_config if args.fsdp and isinstance(args.fsdp_config, dict) else {}
    if args.world_size > 1 and str(config.get("cpu_ram_efficient_loading", False)).lower() == "true":
        raise UserError(
            "fsdp_config: cpu_ram_efficient_loading is true, so only the first process would have the student's "
            "weights, and every process tries its student before training; set it to false"
        )
