"""`distillation_loss`: the distillation loss of SRD from hidden states, or from logits where a loop has them already.

    loss = sft_weight * CE(labels, student) + (1 - sft_weight) * scale * D(teacher, student)

with D over softmaxes at `temperature` and scale = temperature^2 (Hinton et al., arXiv 1503.02531) or 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import RowCoefficients, RowValues
from ..suggest import unknown_name
from .backends import check_backend
from .chunked import ChunkedLoss, PackedRows, Visitor, run_or_halve
from .divergences import get_divergence
from .head import Head

_REDUCTIONS = ("mean", "sum", "none")
# Vocabularies are padded to a multiple that suits the hardware: 943 unused classes (Phi-2) is the most in the wild.
_MOST_PADDING = 1024
# Of temperatures, softcaps and scales: beyond, their squares and products leave float32.
_RANGE = (1e-6, 1e6)


@dataclass
class DistillationOutput:
    """What `distillation_loss` returns; all but `loss` carry no gradient.

    With reduction "mean" and "sum" every value is a scalar reduced alike; with "none" each has the shape of the labels,
    0 at ignored ones. divergence: D in nats at the temperature, without T^2. cross_entropy, and entropy of the student:
    nats at temperature 1. num_items: scalar, the denominator of "mean".
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor
    num_items: Tensor


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_tensor(name: str, value: Any, optional: bool = False) -> None:
    """Refuse what is no dense tensor of real numbers."""
    if optional and value is None:
        return
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()
    kind = f"{value.layout} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    require(dense, f"{name} must be a dense tensor of real numbers{', or None' if optional else ''}, got {kind}")


def _in_range(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and low <= value <= high


def check_options(options: dict[str, Any]) -> None:
    """Refuse bad values of the options of `distillation_loss`, divergence and token_weights left out."""
    for name in ("temperature", "student_softcap", "teacher_softcap", "student_scale", "teacher_scale"):
        value = options[name]
        if value is None and name.endswith("softcap"):
            continue
        require(
            _in_range(value, *_RANGE),
            f"{name} must be a finite number above 0, from {_RANGE[0]:g} to {_RANGE[1]:g}, got {value!r}",
        )
    for name in ("skew", "beta", "sft_weight"):
        value = options[name]
        require(
            _in_range(value, 0, 1),
            f"{name} must be a number from 0 to 1, got {value!r}",
        )
    scaling = options["temperature_scaling"]
    require(isinstance(scaling, bool), f"temperature_scaling must be True or False, got {scaling!r}")
    check_backend(options["backend"])
    if options["reduction"] not in _REDUCTIONS:
        raise UserError(unknown_name("reduction", options["reduction"], _REDUCTIONS))
    num_items = options["num_items"]
    if num_items is not None and not isinstance(num_items, Tensor):
        require(
            _in_range(num_items, 0, 2**53) and num_items > 0,
            f"num_items must be a number above 0, a scalar tensor, or None to count the labels, got {num_items!r}",
        )
    if isinstance(num_items, Tensor):
        real = num_items.layout == torch.strided and not num_items.is_complex() and num_items.dtype != torch.bool
        require(
            num_items.numel() == 1 and num_items.dim() == 0 and real,
            f"num_items must be a scalar tensor of a number, got {tuple(num_items.shape)} {num_items.dtype}",
        )
    ignored = options["ignore_index"]
    require(
        ignored is None or (isinstance(ignored, int) and -(2**31) <= ignored < 2**31),
        f"ignore_index must be a whole number of 32 bits, or None where every label counts, got {ignored!r}",
    )
    budget = options["memory_budget"]
    require(
        budget is None or (isinstance(budget, int) and budget > 0),
        f"memory_budget must be a number of bytes above 0, or None for the device's default, got {budget!r}",
    )
    require(
        options["logits_dtype"] in (None, torch.float32),
        f"logits_dtype must be torch.float32, or None for the dtype of the heads, got {options['logits_dtype']!r}",
    )


def check_side(side: str, hidden: Tensor, head: Head, labels: Tensor) -> None:
    """Refuse hidden states, or logits, that fit neither the labels nor their head."""
    what = f"{side}_hidden" if head.weight is not None else f"{side}_logits"
    check_tensor(what, hidden)
    check_tensor(f"{side}_weight", head.weight, optional=True)
    check_tensor(f"{side}_bias", head.bias, optional=True)
    for name, given in ((f"{side}_weight", head.weight), (f"{side}_bias", head.bias)):
        on = labels.device if given is None else given.device
        require(on == labels.device, f"{name} is on {on} and labels on {labels.device}")
    require(hidden.is_floating_point(), f"{what} must be floating point, got {hidden.dtype}")
    require(
        hidden.shape[:-1] == labels.shape,
        f"{what} has shape {tuple(hidden.shape)} and labels {tuple(labels.shape)}: all but the last "
        f"dimension of {what} must be that of labels",
    )
    require(hidden.device == labels.device, f"{what} is on {hidden.device} and labels on {labels.device}")
    if head.weight is None:
        return
    require(
        head.weight.dim() == 2 and head.weight.is_floating_point(),
        f"{side}_weight must be a floating-point matrix [V, D], got {tuple(head.weight.shape)} {head.weight.dtype}",
    )
    require(
        hidden.shape[-1] == head.weight.shape[1],
        f"{side}_hidden is {hidden.shape[-1]} wide but {side}_weight is [V, D] = {tuple(head.weight.shape)}",
    )
    require(
        head.bias is None or tuple(head.bias.shape) == (head.weight.shape[0],),
        f"{side}_bias must have shape ({head.weight.shape[0]},), got "
        f"{None if head.bias is None else tuple(head.bias.shape)}",
    )


def check_vocabularies(student_classes: int, teacher_classes: int) -> None:
    """Refuse two vocabularies whose sizes differ by more than padding does."""
    small, large = sorted((student_classes, teacher_classes))
    require(
        large - small <= min(_MOST_PADDING, small // 2),
        f"student and teacher have {student_classes} and {teacher_classes} classes, too far apart for one "
        "vocabulary with padding: both must use the same tokenizer",
    )


def check_classes(what: str, classes: Tensor, num_classes: int, otherwise: str = "") -> None:
    """Refuse class indices out of range. otherwise: what else they may be, for the message."""
    # Looking at them would synchronise a GPU with its host; there the gather's own device-side assertion speaks.
    if classes.device.type == "cpu" and classes.numel():
        values = classes.detach().numpy()
        low, high = int(values.min()), int(values.max())
        require(
            low >= 0 and high < num_classes,
            f"{what} must be from 0 to {num_classes - 1}{otherwise}, got {low if low < 0 else high}",
        )


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """On the device; a number goes there as the argument of a kernel, for which nothing waits."""
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, device=device)


def _autocast_dtype(student: Tensor) -> torch.dtype | None:
    # Autocast leaves float64 alone.
    kind = student.device.type
    if student.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class StudentRows:
    """The student's rows with loss and what a loss needs besides a teacher, all checked.

    kept: indices of the N rows among all labels, None for all of them. weights_N: factor on each row, the mean's
    denominator within it where that is safe.
    """

    def __init__(self, student: Tensor, head: Head, labels: Tensor, o: dict[str, Any]) -> None:
        check_options(o)
        check_tensor("labels", labels)
        check_tensor("token_weights", o["token_weights"], optional=True)
        check_tensor("student_logits", o["student_logits"], optional=True)
        require(
            labels.dtype in (torch.int64, torch.int32),
            f"labels must be integers (int64 or int32), got {labels.dtype}",
        )
        check_side("student", student, head, labels)
        token_weights = o["token_weights"]
        if token_weights is not None:
            require(
                token_weights.device == labels.device,
                f"token_weights is on {token_weights.device} and labels on {labels.device}",
            )
            shapes = f"token_weights has shape {tuple(token_weights.shape)}, labels {tuple(labels.shape)}"
            require(token_weights.shape == labels.shape, f"{shapes}: they must be equal")

        self.head, self.labels, self.options = head, labels, o
        self.compute = torch.promote_types(student.dtype, torch.float32)
        self.kept: Tensor | None = None
        if o["ignore_index"] is not None:
            self.kept = labels.reshape(-1).ne(o["ignore_index"]).nonzero().squeeze(1)
        self.labels_N = self._rows(labels.reshape(-1)).long()
        check_classes("labels", self.labels_N, head.num_classes(student), " or ignore_index")
        self.hidden_ND = self._rows(student.reshape(-1, student.shape[-1]))
        self.gemm_dtype = _autocast_dtype(student)
        self.num_items = _scalar(self.labels_N.numel() if o["num_items"] is None else o["num_items"], labels.device)
        self.weights_N = None if token_weights is None else self.of_rows(token_weights).to(self.compute)
        self.logits_NV = self._given_logits(o["student_logits"], student)
        # The denominator belongs in the rows' weights: there it is applied in float32, before a gradient is rounded.
        # Not with float16 gradients, which a factor of 1/num_items would push out of its range.
        self._divide = o["reduction"] == "mean"
        if self._divide and torch.float16 not in (self.gemm_dtype, student.dtype):
            share = 1 / self.num_items.clamp(min=1).to(self.compute)
            self.weights_N = share.expand(self.labels_N.shape) if self.weights_N is None else self.weights_N * share
            self._divide = False

    def _given_logits(self, logits: Tensor | None, student: Tensor) -> Tensor | None:
        if logits is None:
            return None
        dtype = self.options["logits_dtype"] or products_dtype(student, self.head)
        wanted = (*self.labels.shape, self.head.num_classes(student))
        require(
            tuple(logits.shape) == wanted and logits.dtype == dtype and logits.device == self.labels.device,
            f"student_logits must be {wanted} in {dtype}, as the head would give them, got {tuple(logits.shape)} in "
            f"{logits.dtype} on {logits.device}",
        )
        flat_NV = logits.detach().flatten(0, -2)
        return flat_NV if len(self.labels_N) == len(flat_NV) else self._rows(flat_NV)

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.kept is None else x[self.kept]

    def of_rows(self, x: Tensor) -> Tensor:
        """The rows with loss of [..., D] or, in the shape of the labels, of [...], without gradient."""
        return self._rows(x.detach().reshape(-1, *x.shape[self.labels.dim() :]))

    def _in_place(self, x_N: Tensor) -> Tensor:
        """In the shape of the labels, 0 at ignored ones."""
        if self.kept is None:
            return x_N.view(self.labels.shape)
        return x_N.new_zeros(self.labels.numel()).index_put((self.kept,), x_N).view(self.labels.shape)

    def loss(self, **teacher: Any) -> DistillationOutput:
        """The loss beside a teacher, given as fields of `PackedRows`."""
        o = self.options
        sft, t = float(o["sft_weight"]), float(o["temperature"])
        rows = PackedRows(
            labels_N=self.labels_N,
            weights_N=self.weights_N,
            coefficients=RowCoefficients(sft, (1.0 - sft) * (t * t if o["temperature_scaling"] else 1.0), t),
            student_softcap=self.head.softcap,
            student_scale=self.head.scale,
            gemm_dtype=self.gemm_dtype,
            logits_dtype=o["logits_dtype"],
            backend=o["backend"],
            memory_budget=o["memory_budget"],
            student_NV=self.logits_NV,
            **{"teacher_ND": None, "teacher_head": None, "divergence": None, **teacher},
        )
        per_row = o["reduction"] == "none"
        loss, *values = ChunkedLoss.apply(
            self.hidden_ND, self.head.weight, self.head.bias, rows, per_row, torch.is_grad_enabled()
        )
        if self.weights_N is not None:
            values = [x * self.weights_N for x in values]
        out = [self._in_place(x) for x in (loss, *values)] if per_row else [loss, *(x.sum() for x in values)]
        if self._divide:
            out = [x / self.num_items.clamp(min=1) for x in out]
        return DistillationOutput(out[0], out[1], out[2], out[3], self.num_items)


def _loss(
    student: Tensor,
    student_head: Head,
    teacher: Tensor,
    teacher_head: Head,
    labels: Tensor,
    o: dict[str, Any],
) -> DistillationOutput:
    rows = StudentRows(student, student_head, labels, o)
    check_side("teacher", teacher, teacher_head, labels)
    check_vocabularies(student_head.num_classes(student), teacher_head.num_classes(teacher))
    return rows.loss(
        teacher_ND=rows.of_rows(teacher),
        teacher_head=teacher_head,
        divergence=get_divergence(o["divergence"]).bind(float(o["skew"]), float(o["beta"])),
    )


def distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    divergence: str = "skew_reverse_kl",
    temperature: float = 2.0,
    skew: float = 0.1,
    beta: float = 0.5,
    sft_weight: float = 0.1,
    temperature_scaling: bool = True,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
    student_logits: Tensor | None = None,
) -> DistillationOutput:
    """Distillation loss from last hidden states; the gradient flows into the student's hidden states, weight and bias.

    Rows with `labels == ignore_index` are packed out first and cost nothing; the others run through both heads a chunk
    at a time. The GEMMs run in each head's dtype, or autocast's where that is on; softmaxes and reductions in float32
    (float64 for float64 input).

    Args:
        student_hidden: [..., D_S] last hidden states after the final norm, any float dtype.
        student_weight: [V_S, D_S] head.
        teacher_hidden: [..., D_T]; teacher_weight: [V_T, D_T]. Neither receives a gradient.
        labels: [...] class indices aligned with the hidden states (shifted already), or `ignore_index`.
        divergence: a name from `divergence_names()`.
        temperature: T > 0 of both softmaxes in D. Cross-entropy and entropy are at temperature 1.
        skew: s of the skew divergences, 0 to 1. beta: of the JSD, 0 (forward KL) to 1 (reverse KL).
        sft_weight: a, 0 to 1, weight of the cross-entropy on the labels.
        temperature_scaling: multiply D by T^2.
        student_bias, teacher_bias: [V]. *_softcap: c of c * tanh(z / c). *_scale: factor on the logits.
        token_weights: [...] factor on each token's loss; it does not enter `num_items`.
        num_items: denominator of the mean, e.g. the tokens of all accumulation steps and ranks. Default: those here.
        reduction: "mean", "sum" or "none" (one value per label, 0 where ignored).
        ignore_index: label without loss; None: every label has one, and a GPU need not be asked how many.
        backend: "triton" (a GPU), "compile" (`torch.compile`, for a CPU), "eager", or "auto": Triton on a GPU, compile
            on a CPU from 16,384 classes on, else eager.
        memory_budget: bytes for a chunk's working memory. Default 1 GiB on CUDA, 512 MiB elsewhere.
        logits_dtype: None for the dtype of the GEMMs, or torch.float32: with narrower heads the logits are then not
            rounded, which takes twice the memory and makes the gradient an order of magnitude more exact.
        student_logits: [..., V_S] before the softcap, in the dtype of the GEMMs, where they were computed already; it
            saves their product, and they are overwritten.

    V_S and V_T may differ by padding: D is then over the common classes, the rest over all of the student's.

    Raises:
        UserError (a ValueError) that names the argument, its value and what it should be.

    Example:
        >>> import torch
        >>> h_S, w_S, h_T, w_T = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(2, 3, 16), torch.randn(11, 16)
        >>> labels = torch.tensor([[-100, 4, 2], [-100, -100, 0]])
        >>> out = distillation_loss(h_S.requires_grad_(), w_S, h_T, w_T, labels, divergence="jsd")
        >>> out.loss.backward()
        >>> int(out.num_items), h_S.grad[0, 0].abs().sum().item()
        (3, 0.0)
    """
    options = dict(locals())
    return _loss(
        student_hidden,
        Head(student_weight, student_bias, student_softcap, student_scale),
        teacher_hidden,
        Head(teacher_weight, teacher_bias, teacher_softcap, teacher_scale),
        labels,
        options,
    )


def distillation_loss_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    divergence: str = "skew_reverse_kl",
    temperature: float = 2.0,
    skew: float = 0.1,
    beta: float = 0.5,
    sft_weight: float = 0.1,
    temperature_scaling: bool = True,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    token_weights: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    backend: str = "auto",
    memory_budget: int | None = None,
) -> DistillationOutput:
    """`distillation_loss` for loops that have logits: [..., V_S] and [..., V_T]. Everything else as there."""
    options = dict(locals(), student_scale=1.0, teacher_scale=1.0, logits_dtype=None, student_logits=None)
    student_head = Head(None, None, student_softcap)
    return _loss(student_logits, student_head, teacher_logits, Head(None, None, teacher_softcap), labels, options)


def products_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """In which the products of these hidden states with a head run: the head's, or autocast's where that is on."""
    return _autocast_dtype(hidden) or (hidden.dtype if head.weight is None else head.weight.dtype)


@torch.no_grad()
def token_values(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    memory_budget: int | None = None,
    counts: Sequence[int] | None = None,
    visit: Visitor | None = None,
    logits_dtype: torch.dtype | None = None,
) -> RowValues:
    """Cross-entropy and entropy of each row under a model's head, without a [N, V] tensor and without gradient.

    The products run in the head's dtype, or autocast's.

    Args:
        hidden_ND: [N, D] last hidden states of the rows to score.
        labels_N: [N] class indices.
        counts: rows of each sample; then every chunk has whole samples.
        visit: with counts, called with the samples and the rows of each chunk, its logits before the softcap, which are
            gone afterwards, and its values; should memory run out, again from the first chunk on, then smaller ones.
        logits_dtype: as in `distillation_loss`.

    Returns:
        cross_entropy and entropy, [N] in nats at temperature 1; divergence is 0.
    """
    coefficients = RowCoefficients(1.0, 0.0, 1.0)
    dtype = _autocast_dtype(hidden_ND)
    rows = PackedRows(
        None, None, labels_N, None, None, coefficients,
        gemm_dtype=dtype, logits_dtype=logits_dtype, memory_budget=memory_budget,
    )  # fmt: skip
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return run_or_halve(hidden_ND, head, rows, None, counts=counts, visit=visit)[0]


def token_cross_entropy(hidden_ND: Tensor, head: Head, labels_N: Tensor, memory_budget: int | None = None) -> Tensor:
    """Cross-entropy of `token_values`, [N] in nats."""
    return token_values(hidden_ND, head, labels_N, memory_budget).cross_entropy


class DistillationLoss(nn.Module):
    """`distillation_loss` with its options fixed: `DistillationLoss(divergence="jsd", temperature=2.0)(h, w, ...)`.

    Options may be given again in the call, where they win. Their names are those of `distillation_loss`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = set(distillation_loss.__kwdefaults__ or {})
        for name in options:
            if name not in known:
                raise UserError(unknown_name("option", name, known))
        check_options({**(distillation_loss.__kwdefaults__ or {}), **options})
        get_divergence(options.get("divergence", "skew_reverse_kl"))
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        **options: Any,
    ) -> DistillationOutput:
        """See `distillation_loss`."""
        merged = {**self.options, **options}
        return distillation_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **merged)

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())
