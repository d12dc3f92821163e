"""`model_distillation_loss`: the loss of two models and a batch, in one line of your own training loop."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast
from weakref import WeakSet

import torch
from accelerate.utils import extract_model_from_parallel
from accelerate.utils.modeling import get_mixed_precision_context_manager
from torch import Tensor, nn

from ..errors import UserError
from ..losses import DistillationOutput, Head, LossOptions, StudentRows
from ..models import (
    call_through,
    check_head,
    check_same_kind,
    entry_device,
    evaluating,
    is_sharded,
    refuse_trained_prompts,
    run_inside,
    through_head,
    whole_head,
)
from ..teacher import (
    HiddenRows,
    RowsOfSamples,
    TeacherRows,
    TeacherSource,
    distillation_loss_of_rows,
    rows_with_loss,
)
from ..teacher.live import moved
from .batch import label_places, samples_of, states_of, with_rows

# Models that were checked already; for those with whole weights, the check included a trial of the head.
_known: WeakSet[nn.Module] = WeakSet()


def model_distillation_loss(
    student: nn.Module,
    teacher: nn.Module | TeacherSource,
    batch: Mapping[str, Any],
    *,
    divergence: str = "skew_reverse_kl",
    temperature: float = 2.0,
    skew: float = 0.1,
    beta: float = 0.5,
    sft_weight: float = 0.1,
    temperature_scaling: bool = True,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    order: str = "auto",
) -> DistillationOutput:
    """Distillation loss of two models and a batch, for your own training loop, without a tensor of all logits.

    It is `distillation_loss` of the rows with loss. The models run without their heads, under the current autocast or
    that of accelerate's wrapper. Heads are used with their bias, softcap and scale. Each model is tried once on a few
    tokens, to prove that hidden states times head are its logits, unless its weights are in shards. A compiled model
    runs uncompiled here. The balancing loss of a mixture of experts is not included.

    Args:
        student: a causal language model or an encoder-decoder model of `transformers`. It may be wrapped by DDP, have
            PEFT adapters in its layers, or be prepared by accelerate. Its mode (train or eval) is not changed.
        teacher: such a model, on any device, which runs without gradient and in eval mode; or any object with the
            methods of `TeacherSource`, such as a `TeacherCache`, which is moved to the batch's device.
        batch: the arguments of the student's own call: input_ids [B, L], labels [B, L] (not shifted; -100: no loss),
            attention_mask and others. Other keys are ignored. A cache finds its rows by the samples of a padded batch,
            or they come with a batch from `srd_fast.teacher.StepCollator`.
        divergence: the name of D, one of `divergence_names()`.
        temperature: T, above 0. D compares the two softmaxes at T; cross-entropy and entropy are at temperature 1.
        skew: s of the skew divergences, 0 to 1. Other divergences ignore it.
        beta: beta of the JSD, 0 (forward KL) to 1 (reverse KL). Other divergences ignore it.
        sft_weight: weight of the cross-entropy on the labels, 0 to 1. D has the rest, 1 - sft_weight.
        temperature_scaling: multiply D by T^2 in the loss.
        token_weights: [B, L] factor on each label's loss. It does not enter `num_items`.
        num_items: denominator of the mean, above 0: the tokens of all accumulation steps and ranks, for example.
            Default: the number of labels with loss here.
        reduction: "mean", "sum", or "none" for one value per label, 0 where the label has no loss.
        backend: "triton" (on a GPU), "compile" (`torch.compile`, on a CPU), "eager", or "auto".
        memory_budget: bytes that the loss may allocate beyond hidden states and gradients. Default: a twentieth of a
            GPU's memory, at most 4 GiB, and 512 MiB elsewhere.
        logits_dtype: dtype of the logits: None for that of the matrix products, or torch.float32.
        order: "rows" or "classes", whichever the outer loop is over, or "auto" for the one that is predicted to be
            faster. See `distillation_loss`.

    Returns:
        The loss and its parts.

    Raises:
        UserError: an argument is wrong, the batch does not fit, or a model's head is not understood. The message names
            the argument, its value and what it should be. It is a ValueError.
    """
    options = LossOptions(
        divergence, temperature, skew, beta, sft_weight, temperature_scaling, reduction, None, backend, memory_budget,
        logits_dtype, order,
    )  # fmt: skip
    if teacher is None:
        raise UserError("teacher must be a model, or a source of its rows such as a TeacherCache, got None")
    out, found = loss_of_batch(student, teacher, batch, options, token_weights, num_items)
    return _in_place(out, found) if reduction == "none" else out


def loss_of_batch(
    student: nn.Module,
    teacher: nn.Module | TeacherSource | None,
    batch: Mapping[str, Any],
    options: LossOptions,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
) -> tuple[DistillationOutput, dict[str, Any]]:
    """Compute the loss of `model_distillation_loss` with existing options.

    Args:
        student: as in `model_distillation_loss`.
        teacher: as in `model_distillation_loss`; None for only the cross-entropy.
        batch: as in `model_distillation_loss`.
        options: the loss's options, with `ignore_index` None and, without a teacher, `sft_weight` 1.
        token_weights: as in `model_distillation_loss`.
        num_items: as in `model_distillation_loss`.

    Returns:
        The loss and its parts, and the batch as `with_rows` returns it. With reduction "none", the parts have one value
        for each row with loss.

    Raises:
        UserError: as in `model_distillation_loss`.
    """
    given, inner = _understood(student, "student")
    found = with_rows(inner, batch)
    rows: TeacherRows | None = None
    if teacher is not None:
        check_same_kind(inner, cast(nn.Module, teacher))
        rows = _rows_of_teacher(teacher, found, options.temperature, found["input_ids"].device)
    weights_N = None if token_weights is None else _of_labels(token_weights, found)

    def of_rows(head: Head, student_ND: Tensor) -> tuple[Tensor, DistillationOutput]:
        student_rows = StudentRows(student_ND, head, found["loss_labels"], options, weights_N, num_items)
        out = student_rows.loss() if rows is None else distillation_loss_of_rows(student_rows, rows)
        return out.loss, out

    def forward(batch: Mapping[str, Any]) -> tuple[Tensor, DistillationOutput]:
        return through_head(inner, of_rows, rows_with_loss(states_of(inner, batch), batch), "student")

    with _precision(inner):
        loss, out = call_through(given, inner, forward, found)
    return replace(out, loss=loss), found


def _understood(model: Any, name: str) -> tuple[nn.Module, nn.Module]:
    """A model as its loop calls it, uncompiled, and the model inside, after a check that the loss can use them.

    Raises:
        UserError: the loss cannot use the model.
    """
    if not isinstance(model, nn.Module):
        hint = ": load it first, e.g. by AutoModelForCausalLM.from_pretrained" if isinstance(model, str) else ""
        raise UserError(f"{name} must be a model, got {model!r:.80}{hint}")
    given = getattr(model, "_orig_mod", model)
    inner = extract_model_from_parallel(given, keep_torch_compile=False)
    refuse_trained_prompts(inner, name)
    if inner in _known:
        return given, inner
    if not is_sharded(given):
        head, place = whole_head(inner, name=name), entry_device(inner)
        with evaluating(inner), torch.autocast(place.type, enabled=False), _own_forward(inner):
            check_head(inner, name, head, place)
    _known.add(inner)
    return given, inner


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """In the block, run a model without the mixed precision that accelerate has wrapped around its forward."""
    original = vars(model).get("_original_forward")
    if original is None:
        yield
        return
    prepared = vars(model)["forward"]
    vars(model)["forward"] = original
    try:
        yield
    finally:
        vars(model)["forward"] = prepared


def _precision(model: nn.Module) -> AbstractContextManager[Any]:
    """The autocast of accelerate's wrapper around a model's own call, which the loss does not use."""
    return get_mixed_precision_context_manager(True) if "_original_forward" in vars(model) else nullcontext()


def _rows_of_teacher(
    teacher: nn.Module | TeacherSource, batch: dict[str, Any], temperature: float, device: torch.device
) -> TeacherRows:
    """The teacher's rows for a batch's rows with loss, on the batch's device."""
    if not isinstance(teacher, nn.Module) and hasattr(teacher, "rows") and hasattr(teacher, "num_classes"):
        if isinstance(teacher, RowsOfSamples):
            teacher.to(device)
            rows = batch["teacher"] if "teacher" in batch else teacher.collate(samples_of(batch))
            batch = {**batch, "teacher": moved(rows, device)}
        return teacher.rows(batch, temperature)
    _, inner = _understood(teacher, "teacher")
    place = entry_device(inner)
    with torch.no_grad(), evaluating(inner), _precision(inner):
        there = batch if place == device else moved(batch, place)
        states_BLD = run_inside(inner, lambda x: states_of(inner, x), there)
        return HiddenRows(rows_with_loss(states_BLD, there).to(device), whole_head(inner, device))


def _of_labels(token_weights: Any, batch: Mapping[str, Any]) -> Tensor:
    labels = batch["labels"]
    if not isinstance(token_weights, Tensor) or token_weights.shape != labels.shape:
        got = tuple(token_weights.shape) if isinstance(token_weights, Tensor) else type(token_weights).__name__
        raise UserError(f"token_weights must have the shape of labels, {tuple(labels.shape)}, got {got}")
    return token_weights.flatten()[label_places(batch)]


def _in_place(out: DistillationOutput, batch: Mapping[str, Any]) -> DistillationOutput:
    """Put the rows' values into the shape of the labels, each at its label."""
    places_N, labels = label_places(batch), batch["labels"]

    def spread(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(labels.numel()).index_put((places_N,), x_N).view(labels.shape)

    return replace(
        out, **{name: spread(getattr(out, name)) for name in ("loss", "divergence", "cross_entropy", "entropy")}
    )
