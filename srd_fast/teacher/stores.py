"""What a teacher cache stores of each row with loss: hidden states, or less if the teacher's head does not fit.

A store converts last hidden states to tensors whose first dimension is the row, and these tensors to what the loss
takes. Shape letters: N rows, K kept classes, M temperatures, D width, V classes, B bytes.

    hidden      the hidden states: exact for every divergence and temperature; 2 D_T bytes in bfloat16; beside them, if
                wanted, the log-sum-exp of the logits at some temperatures
    topk        the K likeliest classes and the mass of the rest: every divergence, over K + 1 buckets
    sampled     K draws from the teacher's distribution: forward KL, its estimate and gradient unbiased
    projected   the mean of the student's head under that distribution: forward KL, exact, for a frozen head

Sampled classes as a substitute for a distribution: sparse logit sampling (arXiv 2503.16870).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import LOGIT_FLOOR
from ..losses import Head, Projected, Sampled, TopK, products_dtype
from ..models import find_head
from ..registry import Registry
from .index import lse_at
from .shards import payload_digest
from .source import HiddenRows, TeacherRows

# Bytes of logits that are computed at a time to fill a compact store.
_CHUNK_BYTES = 256 << 20


class Store(Protocol):
    """One kind of store. `options` has everything on which the stored values depend; it is compared on reading."""

    @property
    def options(self) -> dict[str, Any]: ...

    def bytes_per_row(self, head: Head, hidden_dtype: torch.dtype) -> int:
        """Bytes of a row on disk."""

    def encode(self, hidden_ND: Tensor, head: Head, keys: Sequence[bytes], counts: Sequence[int]) -> dict[str, Tensor]:
        """Tensors to store, first dimension N. keys, counts: key and number of rows of each sample, in order."""

    def decode(self, stored: Mapping[str, Tensor], head: Head | None, temperature: float) -> TeacherRows:
        """The rows that the loss takes at `temperature`."""


@dataclass(frozen=True)
class HiddenStore:
    """Last hidden states in the teacher's dtype.

    `classes`: how many classes student and teacher share; None: unknown, and no log-sum-exps are used. `lse`: the
    temperatures at which log-sum-exps over these classes are stored, in separate files.
    """

    classes: int | None = None
    lse: tuple[float, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Empty: there is nothing to choose."""
        return {}

    def bytes_per_row(self, head: Head, hidden_dtype: torch.dtype) -> int:
        """D_T times the bytes of a number."""
        assert head.weight is not None
        return head.weight.shape[1] * hidden_dtype.itemsize

    def bytes_beside(self, head: Head) -> int:
        """Bytes of a row in other files: a number for each temperature."""
        return unrounded_dtype(head).itemsize * len(self.lse)

    def encode(self, hidden_ND: Tensor, head: Head, keys: Sequence[bytes], counts: Sequence[int]) -> dict[str, Tensor]:
        """The hidden states, unchanged."""
        return {"hidden": hidden_ND}

    def decode(self, stored: Mapping[str, Tensor], head: Head | None, temperature: float) -> TeacherRows:
        """The hidden states with the cache's head, and the log-sum-exps if they are stored."""
        assert head is not None
        name = lse_at(temperature, stored)
        # With DeepSpeed, the Trainer casts every tensor of a batch to bfloat16, in which a log-sum-exp is useless.
        exact = name is not None and stored[name].dtype == unrounded_dtype(head)
        return HiddenRows(stored["hidden"], head, stored[name] if name is not None and exact else None)


def bits_for(classes: int) -> int:
    """Bits that hold an id below `classes`."""
    return max(1, math.ceil(math.log2(classes)))


def pack_ids(ids_NK: Tensor, bits: int) -> Tensor:
    """[N, ceil(K bits / 8)] uint8: the ids one after the other, lowest bit first."""
    of_ids = (ids_NK[..., None] >> torch.arange(bits, device=ids_NK.device)) & 1
    of_rows = of_ids.flatten(-2).to(torch.uint8)
    padded = torch.nn.functional.pad(of_rows, (0, -of_rows.shape[-1] % 8)).unflatten(-1, (-1, 8))
    powers = 1 << torch.arange(8, device=ids_NK.device, dtype=torch.uint8)
    return (padded * powers).sum(-1, dtype=torch.uint8)


def unpack_ids(packed_NB: Tensor, bits: int, count: int) -> Tensor:
    """[N, count] int64: what `pack_ids` packed."""
    of_rows = (packed_NB[..., None] >> torch.arange(8, device=packed_NB.device, dtype=torch.uint8)) & 1
    of_ids = of_rows.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits)).long()
    return (of_ids << torch.arange(bits, device=packed_NB.device)).sum(-1)


def logit_chunks(hidden_ND: Tensor, head: Head, classes: int) -> Iterator[Tensor]:
    """Float32 logits of the first classes, [C, classes], after the softcap; products in the loss's dtype."""
    head = head.to(products_dtype(hidden_ND, head))
    rows = max(1, _CHUNK_BYTES // (head.num_classes(hidden_ND) * 4))
    for part in hidden_ND.split(rows):
        yield _capped(head.project(part)[:, :classes].float(), head)


def unrounded_dtype(head: Head) -> torch.dtype:
    """The dtype in which products with a head are summed: float32, or float64 for a float64 head."""
    assert head.weight is not None
    return torch.promote_types(head.weight.dtype, torch.float32)


def unrounded_chunks(hidden_ND: Tensor, head: Head, classes: int) -> Iterator[Tensor]:
    """The same as `logit_chunks`, but with products in the head's own dtype, unrounded, in `unrounded_dtype`."""
    dtype, V = unrounded_dtype(head), head.num_classes(hidden_ND)
    for part in hidden_ND.split(max(1, _CHUNK_BYTES // (V * dtype.itemsize))):
        yield _capped(head.project(part, part.new_empty(len(part), V, dtype=dtype))[:, :classes], head)


def _capped(z: Tensor, head: Head) -> Tensor:
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _index(temperatures: Sequence[float], wanted: float) -> int:
    for i, t in enumerate(temperatures):
        if math.isclose(t, wanted, rel_tol=1e-9):
            return i
    known = ", ".join(f"{t:g}" for t in temperatures)
    raise UserError(f"teacher_cache holds rows for the temperatures {known}, not {wanted:g}: make it with that one too")


@dataclass(frozen=True)
class _FewClasses:
    """`k` of the first `classes` classes of each row, at some temperatures."""

    k: int
    temperatures: tuple[float, ...]
    classes: int

    @property
    def options(self) -> dict[str, Any]:
        """k and the temperatures."""
        return {"k": self.k, "temperatures": list(self.temperatures)}


@dataclass(frozen=True)
class TopKStore(_FewClasses):
    """The `k` likeliest classes: ids, float16 logits below the largest, and the rest's mass at each temperature."""

    def bytes_per_row(self, head: Head, hidden_dtype: torch.dtype) -> int:
        """Ids, two bytes a logit, four a temperature."""
        return math.ceil(self.k * bits_for(self.classes) / 8) + 2 * self.k + 4 * len(self.temperatures)

    def encode(self, hidden_ND: Tensor, head: Head, keys: Sequence[bytes], counts: Sequence[int]) -> dict[str, Tensor]:
        """ids [N, B], logits [N, K], log_rest [N, M]: ln of the sum of e^((z - max) / T) over all other classes."""
        parts = []
        for z in logit_chunks(hidden_ND, head, self.classes):
            top, ids = z.topk(self.k, dim=-1)
            z, below = z - top[:, :1], (top - top[:, :1]).half()
            rest = z.scatter(1, ids, -math.inf)
            log_rest = torch.stack([torch.logsumexp(rest / t, -1) for t in self.temperatures], -1)
            parts.append((pack_ids(ids, bits_for(self.classes)), below, log_rest.clamp(min=LOGIT_FLOOR)))
        return _joined(("ids", "logits", "log_rest"), parts)

    def decode(self, stored: Mapping[str, Tensor], head: Head | None, temperature: float) -> TeacherRows:
        """The classes, renormalised, so that they are a distribution in spite of float16 rounding."""
        log_rest = stored["log_rest"][:, _index(self.temperatures, temperature)]
        z = stored["logits"].float() / temperature
        log_sum = torch.logaddexp(torch.logsumexp(z, -1), log_rest)
        ids = unpack_ids(stored["ids"], bits_for(self.classes), self.k)
        return TopK(ids, z - log_sum[:, None], log_rest - log_sum)


def _joined(names: Sequence[str], parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(pieces) for name, pieces in zip(names, zip(*parts))}


@dataclass(frozen=True)
class SampledStore(_FewClasses):
    """`k` draws with replacement from the teacher's distribution at each temperature, and its entropy."""

    def bytes_per_row(self, head: Head, hidden_dtype: torch.dtype) -> int:
        """Ids and an entropy for each temperature."""
        return (math.ceil(self.k * bits_for(self.classes) / 8) + 4) * len(self.temperatures)

    def encode(self, hidden_ND: Tensor, head: Head, keys: Sequence[bytes], counts: Sequence[int]) -> dict[str, Tensor]:
        """ids [N, M, B], entropy [N, M]. A sample's draws depend only on its key, not on other samples."""
        parts = []
        for key, hidden in zip(keys, hidden_ND.split(list(counts))):
            generator = torch.Generator(hidden.device).manual_seed(int.from_bytes(key[:7], "little"))
            for z in logit_chunks(hidden, head, self.classes):
                ids, entropies = [], []
                for t in self.temperatures:
                    drawn = draw_rows(z, t, self.k, generator)
                    ids.append(pack_ids(drawn.ids_NK.sort(-1).values, bits_for(self.classes)))
                    entropies.append(drawn.entropy_N)
                parts.append((torch.stack(ids, 1), torch.stack(entropies, 1)))
        return _joined(("ids", "entropy"), parts)

    def decode(self, stored: Mapping[str, Tensor], head: Head | None, temperature: float) -> TeacherRows:
        """The draws at that temperature."""
        i = _index(self.temperatures, temperature)
        return Sampled(unpack_ids(stored["ids"][:, i], bits_for(self.classes), self.k), stored["entropy"][:, i])


def draw_rows(z_NV: Tensor, temperature: float, count: int, generator: torch.Generator) -> Sampled:
    """`count` draws with replacement from each row's softmax at a temperature, and its entropy."""
    log_p = torch.log_softmax(z_NV / temperature, -1)
    p = log_p.exp()
    return Sampled(draw_classes(p, count, generator), -(p * log_p.clamp(min=LOGIT_FLOOR)).sum(-1))


def draw_classes(p_NV: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[N, count] ids drawn with replacement, by inverting the distribution function in float64."""
    cumulative = p_NV.double().cumsum(-1)
    u = torch.rand(p_NV.shape[0], count, generator=generator, device=p_NV.device, dtype=torch.float64)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp(max=p_NV.shape[1] - 1)


@dataclass(frozen=True)
class ProjectedStore:
    """p @ W_S at each temperature, float32, with the entropy and p @ bias_S: the loss then needs no teacher's head.

    Nor does it need the log-sum-exp of the teacher's logits, which is part of the entropy.
    """

    student_head: Head
    student_digest: str
    temperatures: tuple[float, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The temperatures and the student's head."""
        return {"temperatures": list(self.temperatures), "student_head": self.student_digest}

    def bytes_per_row(self, head: Head, hidden_dtype: torch.dtype) -> int:
        """D_S + 2 float32 for each temperature."""
        assert self.student_head.weight is not None
        return 4 * (self.student_head.weight.shape[1] + 2) * len(self.temperatures)

    def encode(self, hidden_ND: Tensor, head: Head, keys: Sequence[bytes], counts: Sequence[int]) -> dict[str, Tensor]:
        """projection [N, M, D_S], entropy [N, M], bias [N, M]."""
        student = self.student_head.on(hidden_ND.device)
        weight, bias, scale = student.weight, student.bias, student.scale
        assert weight is not None
        parts = []
        for z in logit_chunks(hidden_ND, head, weight.shape[0]):
            projections, entropies, biases = [], [], []
            for t in self.temperatures:
                log_p = torch.log_softmax(z / t, -1)
                p = log_p.exp()
                projections.append(p @ weight[: z.shape[1]].float() * scale)
                biases.append(z.new_zeros(len(z)) if bias is None else p @ bias[: z.shape[1]].float() * scale)
                entropies.append(-(p * log_p.clamp(min=LOGIT_FLOOR)).sum(-1))
            parts.append(tuple(torch.stack(x, 1) for x in (projections, entropies, biases)))
        return _joined(("projection", "entropy", "bias"), parts)

    def decode(self, stored: Mapping[str, Tensor], head: Head | None, temperature: float) -> TeacherRows:
        """The projection at that temperature."""
        i = _index(self.temperatures, temperature)
        return Projected(stored["projection"][:, i], stored["entropy"][:, i], stored["bias"][:, i])


@dataclass(frozen=True)
class CacheKind:
    """A registered kind: the function that makes its store, and the type of the decoded rows."""

    make: Callable[..., Store]
    rows: type[TeacherRows]


def _few_classes(store: type[TopKStore] | type[SampledStore]) -> Callable[..., Store]:
    def make(classes: int, *, k: int, temperatures: tuple[float, ...], **_: Any) -> Store:
        if not 1 <= k < classes:
            raise UserError(f"teacher cache: k must be from 1 to {classes - 1}, got {k}")
        return store(k, temperatures, classes)

    return make


def _hidden(classes: int, *, temperatures: tuple[float, ...], log_sum_exp: bool = False, **_: Any) -> Store:
    return HiddenStore(classes, temperatures) if log_sum_exp else HiddenStore()


def _projected(classes: int, *, temperatures: tuple[float, ...], student: nn.Module | None, **_: Any) -> Store:
    if student is None:
        raise UserError('teacher cache kind "projected" needs the student, whose head must not change')
    head = find_head(student, "student")
    return ProjectedStore(head, payload_digest(head.tensors()), temperatures)


CACHE_KINDS = Registry(
    "teacher cache kind",
    {
        "hidden": CacheKind(_hidden, HiddenRows),
        "topk": CacheKind(_few_classes(TopKStore), TopK),
        "sampled": CacheKind(_few_classes(SampledStore), Sampled),
        "projected": CacheKind(_projected, Projected),
    },
)


def cache_kind_names() -> list[str]:
    """Names that `teacher_cache_kind=` takes.

    Returns:
        All names, in alphabetical order.
    """
    return CACHE_KINDS.names()


def register_cache_kind(
    name: str,
    make: Callable[..., Store],
    *,
    rows: type[TeacherRows] = HiddenRows,
    replace: bool = False,
) -> None:
    """Add a kind of teacher cache under `name`, usable at once as `SRDConfig(teacher_cache_kind=name)`.

    Args:
        name: a new name; an existing one only with `replace=True`.
        make: `make(classes, k=..., temperatures=..., student=...)` -> its `Store`; see `make_store` for the four.
        rows: the type that the store's `decode` returns. With HiddenRows the cache stores the teacher's head and passes
            it to `decode`; with Sampled and Projected only forward_kl is possible.
        replace: whether an existing kind of this name is replaced.

    Raises:
        UserError: the name is taken, or is not text.
    """
    CACHE_KINDS.register(name, CacheKind(make, rows), replace=replace)


def keeps_head(kind: str) -> bool:
    """Whether a cache of this kind has the teacher's head, and so the teacher's whole distribution.

    Raises:
        UserError: the kind is unknown. The message has the list of kinds.
    """
    return CACHE_KINDS.get(kind).rows is HiddenRows


def make_store(
    kind: str,
    classes: int,
    k: int = 64,
    temperatures: Sequence[float] = (1.0,),
    student: nn.Module | None = None,
    log_sum_exp: bool = False,
) -> Store:
    """Make the store of a kind.

    Args:
        kind: a name from `cache_kind_names()`.
        classes: number of classes that teacher and student share.
        k: classes, or draws, of a row in a compact store.
        temperatures: the temperatures for which a compact store has rows, or at which log-sum-exps are stored; each
            above 0. Evaluation needs 1.
        student: for "projected", the model whose head does not change.
        log_sum_exp: for kind "hidden": store the log-sum-exp of each row's logits over `classes` at each temperature, 4
            bytes, beside the hidden states, which saves the loss a pass over the teacher's head.

    Raises:
        UserError: the kind is unknown, or does not support the arguments.
    """
    found = CACHE_KINDS.get(kind)
    if log_sum_exp and kind != "hidden":
        raise UserError(f'teacher cache kind {kind!r} keeps no log-sum-exps: set log_sum_exp to false, or use "hidden"')
    for t in temperatures:
        if not 0 < t < math.inf:
            raise UserError(f"teacher cache: temperatures must be above 0 and finite, got {t}")
    if not keeps_head(kind) and student is not None:
        weight = find_head(student, "student").weight
        if weight is not None and weight.shape[0] > classes:
            raise UserError(
                f"teacher cache kind {kind!r}: the student has {weight.shape[0]} classes and the teacher {classes}; "
                'a compact kind needs a teacher with all of the student\'s classes, use "hidden"'
            )
    ordered = tuple(sorted({float(t) for t in temperatures}))
    kept = {"log_sum_exp": True} if log_sum_exp else {}  # a user's own kind need not take it
    return found.make(classes, k=k, temperatures=ordered, student=student, **kept)
