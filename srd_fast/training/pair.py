"""Checks of student and teacher together before the first step."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from ..models import (
    check_tokenizers,
    is_encoder_decoder,
    load_model,
    load_tokenizer,
    mend_generation_config,
    refuse_trained_prompts,
    untie_adapted_embeddings,
    unwrap,
    with_adapters,
)
from ..teacher import SELF, LiveTeacher, TeacherSource
from .config import SRDConfig

logger = logging.getLogger(__name__)

_NARROW = (torch.bfloat16, torch.float16)
# What `SRDTrainer` takes as `teacher_model`.
Teacher = nn.Module | TeacherSource | str | None


def ready_pair(
    student: nn.Module | str,
    teacher: Teacher,
    args: SRDConfig,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    peft_config: Any,
) -> tuple[nn.Module, Teacher]:
    """Check student and teacher as far as that needs no forward pass, and put adapters into the student.

    Args:
        student: the model that is trained, or its folder or hub id, which is loaded in float32.
        teacher: a model, its folder or hub id, a source of rows, "self", or None to read an existing cache, or to train
            only on the cross-entropy.
        args: the training's config.
        tokenizer: the student's tokenizer.
        teacher_tokenizer: the teacher's tokenizer. Default: the one saved with the teacher.
        peft_config: the adapters' configuration, or None.

    Returns:
        The student and the teacher, taken out of `torch.compile`'s wrappers.

    Raises:
        UserError: one of the two cannot be used, or the two do not fit each other.
    """
    given: nn.Module = load_model(student) if isinstance(student, str) else student
    trained, teacher = uncompiled(given, "student"), uncompiled(teacher, "teacher")
    if teacher is None and args.teacher_cache is None and not args.only_cross_entropy:
        raise UserError(
            "teacher_model is missing: pass a model, its folder or name, or name a teacher_cache; only with sft_weight "
            "1 nothing is asked of a teacher"
        )
    if teacher is None and args.answers_anew:
        raise UserError(
            "teacher_model is missing: fresh answers (lmbda, seq_kd) need the teacher itself, also beside a "
            "teacher_cache"
        )
    for name, model in (("student", trained), ("teacher", teacher)):
        refuse_trained_prompts(model, name)
    check_privileged(teacher, args)
    if not is_self(teacher):
        check_teachers_tokenizer(tokenizer, teacher_tokenizer, teacher, args)
    if peft_config is not None:
        trained = with_adapters(trained, peft_config, args.seed)
    untie_adapted_embeddings(trained)
    check_no_shared_weights(trained, teacher)
    if is_encoder_decoder(trained) and args.neftune_noise_alpha is not None:
        raise UserError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}, but an encoder-decoder model embeds its tokens where "
            "transformers adds no noise; leave it out"
        )
    mend_generation_config(trained, "student")
    return trained, teacher


def is_self(teacher: Teacher) -> bool:
    """Whether the student is to be its own teacher."""
    return isinstance(teacher, str) and teacher == SELF


def check_privileged(teacher: Teacher, args: SRDConfig) -> None:
    """Refuse settings for a teacher that reads more than its student, or for teacher "self", with any other teacher.

    Args:
        teacher: as in `ready_pair`.
        args: the training's config.

    Raises:
        UserError: there are such settings.
    """
    if args.privileged_template is not None and teacher is None and args.teacher_cache is None:
        raise UserError("privileged_template says what only the teacher reads, but there is no teacher; leave it out")
    if not is_self(teacher):
        if args.self_ema_decay is not None:
            raise UserError(f"self_ema_decay is {args.self_ema_decay}, which is for teacher_model 'self'; leave it out")
        return
    if args.privileged_template is None:
        raise UserError(
            "teacher_model is 'self', and without a privileged_template it reads what the student reads, so that there "
            "is nothing to learn: set it to '{privileged}' for a text of each row, or to one text for all"
        )
    other = "pass the folder of the starting student as teacher_model instead"
    if args.teacher_cache is not None:
        raise UserError(
            f"teacher_model is 'self', which runs beside the student, and teacher_cache is {args.teacher_cache!r}; "
            f"leave it out, or {other}, which can fill one"
        )
    if args.teacher_offload or args.teacher_device_map or args.teacher_tp_plan:
        named = ("teacher_offload", "teacher_device_map", "teacher_tp_plan")
        given = next(name for name in named if getattr(args, name))
        raise UserError(f"teacher_model is 'self', which is where the student is; leave {given} out, or {other}")


def uncompiled(model: Any, name: str) -> Any:
    """Take a model out of `torch.compile`'s wrapper.

    Args:
        model: a model, or anything else.
        name: "student" or "teacher", for the log.

    Returns:
        The model inside; anything else unchanged.
    """
    inner = getattr(model, "_orig_mod", None)
    if inner is None:
        return model
    logger.warning(
        "the %s came compiled as a whole; the loss takes hidden states and never calls it so: its layers run as they "
        "are, or compiled with torch_compile=True",
        name,
    )
    return inner


def tokenizer_beside(model: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model: in its folder, under its hub id, or where the model was loaded from.

    Nothing is downloaded for a model that is loaded already.

    Args:
        model: a model, its folder or its hub id.

    Returns:
        The tokenizer, or None if there is none.
    """
    if isinstance(model, str):
        return load_tokenizer(model)
    name = str(getattr(model, "name_or_path", ""))
    if name and Path(name).is_dir():
        return load_tokenizer(name) if Path(name, "tokenizer_config.json").is_file() else None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True) if name else None
    except Exception:  # not in the hub's cache, or no tokenizer there
        return None


def check_teachers_tokenizer(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase | None, teacher: Teacher, args: SRDConfig
) -> None:
    """Compare the two tokenizers, or warn that a teacher's is not known.

    Args:
        ours: the student's tokenizer.
        theirs: the teacher's tokenizer. Default: the one saved with the teacher.
        teacher: a model, its folder or hub id, a source of rows, or None.
        args: the training's config.

    Raises:
        UserError: the two differ.
    """
    theirs = theirs or tokenizer_beside(teacher)
    if theirs is not None:
        check_tokenizers(ours, theirs, args.shared_vocabulary)
    elif isinstance(teacher, nn.Module):
        logger.warning("the teacher's tokenizer is not known, so nobody compared it; pass teacher_tokenizer to do so")


def check_no_shared_weights(student: nn.Module, teacher: Teacher) -> None:
    """Refuse a student that shares trained weights with its teacher.

    Args:
        student: the model that is trained.
        teacher: a model, or anything else.

    Raises:
        UserError: there are such weights. The message names the first one.
    """
    model = teacher.model if isinstance(teacher, LiveTeacher) else teacher
    if not isinstance(model, nn.Module):
        return
    if unwrap(model) is unwrap(student):
        raise UserError("teacher_model is the model that is trained; load the teacher as a model of its own")
    theirs = {_place(p) for p in model.parameters()} - {0}
    both = [name for name, p in student.named_parameters() if _place(p) in theirs and _is_trained(p, student, teacher)]
    if both:
        raise UserError(
            f"student and teacher_model are to share {len(both)} of the weights that are trained, such as {both[0]}: "
            "training would change the teacher; give the student copies of these modules (copy.deepcopy), or freeze "
            "them in the student (requires_grad_(False)) before the trainer is made"
        )


def _place(x: Tensor) -> int:
    """The address of a weight; 0 for a quantised one of several tensors, which is never trained."""
    return 0 if hasattr(x, "__tensor_flatten__") else x.untyped_storage().data_ptr()


def _is_trained(parameter: Tensor, student: nn.Module, teacher: Teacher) -> bool:
    """Whether the student trains, or would train, a weight that a teacher has too.

    A `LiveTeacher` has frozen its weights before, those of the student among them. With adapters that is intended.
    """
    frozen_by_the_teacher = isinstance(teacher, LiveTeacher) and unwrap(student) is student
    return parameter.requires_grad or frozen_by_the_teacher


def widen_trained_weights(student: nn.Module, args: SRDConfig) -> None:
    """Convert trained weights to float32, as mixed precision needs them: small steps vanish in narrower dtypes.

    Args:
        student: the model that is trained.
        args: the training's config.

    Raises:
        UserError: there are narrower weights, and the training is not in mixed precision.
    """
    narrow = [p for p in student.parameters() if p.requires_grad and p.dtype in _NARROW]
    if not narrow or args.keep_student_dtype:
        return
    dtype = str(narrow[0].dtype).removeprefix("torch.")
    if not (args.bf16 or args.fp16):
        raise UserError(
            f"the student's weights are {dtype}, in which most steps at learning_rate {args.learning_rate:g} vanish: "
            "set bf16=True (weights in float32, products in bfloat16), or load it in float32, or train it as it is "
            "with keep_student_dtype=True"
        )
    for parameter in narrow:
        parameter.data = parameter.data.float()
    logger.warning(
        "the student's %s weights are trained in float32 (%.2f GB): most steps would vanish in %s; "
        "keep_student_dtype=True trains them as they are",
        dtype, 4e-9 * sum(p.numel() for p in narrow), dtype,
    )  # fmt: skip
