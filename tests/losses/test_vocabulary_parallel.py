"""A vocabulary divided over processes gives what one process with the whole heads gives.

This file is also the program of those processes, gloo on the CPU: `python test_vocabulary_parallel.py FOLDER` with
RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, as torchrun sets them. One start of processes runs all cases.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from srd_fast.kernels import FORMULAS

# As in `tiny`, whose import takes the processes longer than all cases.
IGNORE = -100
DIVERGENCES = tuple(FORMULAS)
# Of those that need numbers of a row first, the one with the most of them does for all but the first cases.
USUAL = tuple(name for name, f in FORMULAS.items() if f.row_first is None or name == "csd_us")
Found = dict[str, Any]


@dataclass
class Case:
    """A loss.

    classes, widths: of student and teacher. divided, divided_T: how their classes are over the ranks; "whole" for a
    teacher that each rank has. rows: of the ranks; counts: how many of them each has where they are its own; ignored:
    the share of labels without loss. kind: of the teacher. options: of the loss. weighted: whether labels have weights.
    trained: whether there is a backward. equal: student and teacher are one model.
    """

    classes: tuple[int, int] = (23, 23)
    widths: tuple[int, int] = (5, 8)
    divided: str = "uneven"
    divided_T: str = "whole"
    rows: str = "same"
    counts: str = "uneven"
    kind: str = "head"
    bias: bool = False
    weighted: bool = False
    lse: bool = False
    dtype: torch.dtype = torch.float64
    trained: bool = True
    equal: bool = False
    ignored: float = 0.4
    options: dict[str, Any] = field(default_factory=dict)


def case(order: str = "auto", budget: int | None = None, **fields: Any) -> Case:
    """A case; what `Case` does not have are options of the loss."""
    own = {name: fields.pop(name) for name in list(fields) if name in Case.__dataclass_fields__}
    return Case(**own, options={"order": order, "memory_budget": budget, **fields})


# So little that a chunk has one row, or a block as few classes as there are.
ONE_ROW = 1
CASES: dict[str, Case] = {
    f"{divergence}, {order}": case(order, divergence=divergence, bias=order == "rows")
    for divergence in DIVERGENCES
    for order in ("rows", "classes")
}
CASES |= {
    f"{divergence}, own rows": case("rows", ONE_ROW, divergence=divergence, rows="own", temperature=1.0)
    for divergence in USUAL
}
CASES |= {
    f"{divergence}, lse": case("classes", divergence=divergence, lse=True, temperature=3.0)
    for divergence in ("forward_kl", "reverse_kl", "jsd")
}
CASES |= {
    "chunks of a row": case("rows", ONE_ROW, bias=True),
    "DTensor": case(divided="DTensor", bias=True, divergence="forward_kl"),
    "DTensor, own rows": case("rows", ONE_ROW, divided="DTensor", rows="own", bias=True),
    "both DTensors": case(divided="DTensor", divided_T="DTensor", bias=True),
    "a teacher with more classes, both DTensors": case(
        classes=(23, 26), divided="DTensor", divided_T="DTensor", bias=True, divergence="jsd"
    ),
    "a student with more classes, both DTensors": case(
        classes=(27, 23), divided="DTensor", divided_T="DTensor", bias=True, divergence="reverse_kl"
    ),
    "a student with more classes": case("classes", classes=(30, 23), divergence="forward_kl"),
    "a student with more classes, rows": case("rows", classes=(30, 23), divergence="tvd", temperature=1.0),
    "a teacher with more classes": case(classes=(23, 30), divergence="reverse_kl"),
    "a teacher in other blocks": case("classes", divided_T="reversed"),
    "blocks in another order": case("rows", divided="reversed", divergence="forward_kl"),
    "blocks in another order, classes": case("classes", divided="reversed", divergence="reverse_kl"),
    "a rank without classes": case("rows", divided="empty", divergence="forward_kl"),
    "a rank without classes, classes": case("classes", divided="empty", bias=True),
    "the first rank without classes": case(divided="empty first", divergence="reverse_kl", rows="own"),
    "softcap, scale": case(
        "rows", student_softcap=3.0, teacher_softcap=2.0, student_scale=0.7, teacher_scale=1.3, bias=True
    ),
    "softcap, scale, classes": case(
        "classes", student_softcap=3.0, teacher_softcap=2.0, student_scale=0.7, bias=True, divergence="forward_kl"
    ),
    "weights": case(weighted=True, rows="own", counts="even"),
    "one loss a label": case("rows", reduction="none", weighted=True),
    "one loss a label, own rows": case("rows", reduction="none", weighted=True, rows="own"),
    "one loss a label, classes, own rows": case("classes", reduction="none", rows="own", divergence="forward_kl"),
    "sum": case(reduction="sum", rows="own", divergence="tvd"),
    "num_items": case(num_items=40, rows="own"),
    "another ignore_index": case(ignore_index=0),
    "every label": case(ignore_index=None),
    "a rank without rows": case("rows", rows="own", counts="none"),
    "a rank without rows, classes": case("classes", rows="own", counts="none", bias=True, divergence="jsd"),
    "no rows": case(rows="own", counts="nobody"),
    "cross-entropy alone": case(sft_weight=1.0),
    "without gradient": case("rows", trained=False, divergence="forward_kl"),
    "without gradient, own rows": case("classes", trained=False, rows="own", lse=True, divergence="forward_kl"),
    "TopK": case("rows", kind="TopK", divergence="skew_reverse_kl"),
    "TopK, classes, own rows": case("classes", kind="TopK", divergence="jsd", rows="own", student_softcap=2.0),
    "Sampled": case("rows", ONE_ROW, kind="Sampled", divergence="forward_kl", rows="own"),
    "Sampled, classes": case("classes", kind="Sampled", divergence="forward_kl", temperature=3.0),
    "Projected": case("rows", kind="Projected", divergence="forward_kl", rows="own", weighted=True),
    "Projected, classes": case("classes", kind="Projected", divergence="forward_kl"),
    "token values": case(kind="none"),
    "token values, own rows": case(kind="none", rows="own"),
}
CASES |= {
    f"triton, {divergence}, {order}": case(
        order, backend="triton", dtype=torch.float32, divergence=divergence, rows=rows, classes=(40, 37), ignored=0.8
    )
    for divergence, order, rows in (
        ("forward_kl", "rows", "same"),
        ("reverse_kl", "classes", "own"),
        ("skew_reverse_kl", "rows", "own"),
    )
}
CASES |= {
    f"equal models, {divergence}, {order}": case(
        order, equal=True, dtype=torch.float32, divergence=divergence, sft_weight=0.0, widths=(6, 6), divided="DTensor"
    )
    for divergence in USUAL
    for order in ("rows", "classes")
}
COMPILED = {
    f"compiled, {divergence}, {order}": case(
        order, backend="compile", dtype=torch.float32, divergence=divergence, classes=(70, 66), divided="DTensor"
    )
    for divergence, order in (("jsd", "rows"), ("reverse_kl", "classes"))
}
# Rounded to 8 bits here and there: against what one process in the same dtype makes of it.
NARROW = {
    "rows": case("rows", ONE_ROW, dtype=torch.bfloat16, divergence="forward_kl"),
    "own rows": case("rows", dtype=torch.bfloat16, rows="own", bias=True),
    "own rows, classes": case("classes", dtype=torch.bfloat16, rows="own", counts="none", divergence="jsd"),
    "lse": case("classes", dtype=torch.bfloat16, lse=True, student_scale=0.7, divergence="reverse_kl"),
    "logits in float32": case("rows", dtype=torch.bfloat16, logits_dtype=torch.float32, rows="own"),
    "TopK": case("rows", dtype=torch.bfloat16, kind="TopK", rows="own"),
    "Projected": case("rows", dtype=torch.bfloat16, kind="Projected", divergence="forward_kl", rows="own"),
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


def inputs(c: Case) -> dict[str, Tensor]:
    """Of one process, all in float64 but of the values of the case's dtype."""
    g = torch.Generator().manual_seed(len(repr(c)))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(c.dtype).double()

    rows = 24
    labels = torch.randint(min(c.classes), (rows,), generator=g)
    if c.options.get("ignore_index", IGNORE) == IGNORE:
        labels[torch.rand(rows, generator=g) < c.ignored] = IGNORE
    if c.counts == "nobody":
        labels[:] = IGNORE
    drawn = {
        "student_hidden": draw(rows, c.widths[0]),
        "student_weight": draw(c.classes[0], c.widths[0]),
        "teacher_hidden": draw(rows, c.widths[1]),
        "teacher_weight": draw(c.classes[1], c.widths[1]),
        "student_bias": draw(c.classes[0]),
        "teacher_bias": draw(c.classes[1]),
        "token_weights": draw(rows).abs(),
        "grad_output": draw(rows),
        "labels": labels,
    }
    if c.equal:
        drawn |= {f"teacher_{name}": drawn[f"student_{name}"] for name in ("hidden", "weight", "bias")}
    return drawn


def ranges(how: str, classes: int, world: int) -> list[range]:
    """The classes of each rank."""
    if how == "DTensor":
        size = -(-classes // world)
        ends = [min(classes, size * rank) for rank in range(world + 1)]
        return [range(*pair) for pair in pairwise(ends)]
    shares = [1 + 2 * (rank % 2 == 0) for rank in range(world)]
    if how == "empty":
        shares[-1] = 0
    if how == "empty first":
        shares[0] = 0
    if how == "reversed":
        return ranges("uneven", classes, world)[::-1]
    ends = [classes * sum(shares[:rank]) // sum(shares) for rank in range(world + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def rows_of(c: Case, world: int) -> list[slice]:
    """The rows of each rank."""
    if c.rows == "same":
        return [slice(0, 24)] * world
    shares = [1 + 2 * (rank % 2 == 0) for rank in range(world)] if c.counts in ("uneven", "nobody") else [1] * world
    if c.counts == "none":
        shares[-1] = 0
    ends = [24 * sum(shares[:rank]) // sum(shares) for rank in range(world + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def compact_teacher(c: Case, x: dict[str, Tensor], kept: Tensor, labels: Tensor) -> Any:
    """Of the rows with loss among `kept`, from the logits of the whole teacher. labels: of those rows."""
    from srd_fast import Projected, Sampled, TopK

    z = x["teacher_hidden"] @ x["teacher_weight"].T
    log_p = torch.log_softmax(z[:, : c.classes[0]] / c.options.get("temperature", 2.0), -1)
    generator = torch.Generator().manual_seed(3)
    draws = torch.multinomial(log_p.exp(), 6, replacement=True, generator=generator)
    entropy = -(log_p.exp() * log_p).sum(1)
    at = kept[labels != IGNORE]
    if c.kind == "TopK":
        top = log_p.topk(4)
        tail = torch.log1p(-top.values.exp().sum(1))
        return TopK(top.indices[at], top.values[at], tail[at])
    if c.kind == "Sampled":
        return Sampled(draws[at], entropy[at])
    projection = log_p.exp() @ x["student_weight"]
    return Projected(projection[at], entropy[at], torch.zeros(len(at), dtype=torch.float64))


def run(c: Case, x: dict[str, Tensor], rows: slice, heads: dict[str, Any], **more: Any) -> Found:
    """Values and gradients on some rows. heads: student_weight and the others, as leaves, with keywords for them."""
    from srd_fast import compact_distillation_loss, distillation_loss
    from srd_fast.losses import token_values
    from srd_fast.losses.vocabulary import head_of

    hidden = x["student_hidden"][rows].to(c.dtype).requires_grad_(c.trained and c.kind != "none")
    labels, options = x["labels"][rows], {**c.options, **more}
    if c.kind == "none":
        head = head_of(heads["student_weight"], heads.get("student_bias"), vocabulary=more.get("vocabulary"))
        kept = labels != IGNORE
        values = token_values(hidden[kept], head, labels[kept])
        return {"cross_entropy": values.cross_entropy, "entropy": values.entropy}
    if c.weighted:
        options["token_weights"] = x["token_weights"][rows].to(c.dtype)
    if heads.get("student_bias") is not None:
        options["student_bias"] = heads["student_bias"]
    if c.kind == "head":
        if heads.get("teacher_bias") is not None:
            options["teacher_bias"] = heads["teacher_bias"]
        if c.lse:
            z = x["teacher_hidden"] @ x["teacher_weight"].T / options.get("temperature", 2.0)
            options["teacher_lse"] = z[rows, : min(c.classes)].logsumexp(1)
        of_teacher = x["teacher_hidden"][rows].to(c.dtype), heads["teacher_weight"]
        out = distillation_loss(hidden, heads["student_weight"], *of_teacher, labels, **options)
    else:
        teacher = compact_teacher(c, x, torch.arange(24)[rows], labels)
        out = compact_distillation_loss(hidden, heads["student_weight"], teacher, labels, **options)
    found: Found = {name: value.detach() for name, value in vars(out).items()}
    if c.trained:
        from_above = x["grad_output"][rows] if out.loss.dim() else torch.tensor(1.75)
        out.loss.backward(from_above.to(out.loss.dtype))
        found["d_hidden"] = hidden.grad
        for name in ("student_weight", "student_bias"):
            leaf = heads.get(f"{name}_leaf", heads.get(name))
            if leaf is not None and leaf.grad is not None:
                found[f"d_{name}"] = leaf.grad
    return found


def alone(c: Case, dtype: torch.dtype = torch.float64) -> Found:
    """What one process finds."""
    x = inputs(c)
    names = ["student_weight", "teacher_weight", *(["student_bias", "teacher_bias"] if c.bias else [])]
    heads: dict[str, Any] = {name: x[name].to(dtype, copy=True) for name in names}
    if c.trained and c.kind not in ("Projected", "none"):
        for name in names:
            heads[name].requires_grad_(name.startswith("student"))
    options = {**c.options, "order": "rows", "memory_budget": None, "backend": "eager"}
    if dtype == torch.float64:
        options["logits_dtype"] = None
    whole = replace(c, dtype=dtype, options=options)
    return run(whole, x, slice(0, 24), heads)


def on_rank(c: Case, rank: int, world: int) -> Found:
    """What this rank finds with its classes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from srd_fast import VocabularyShard

    x, more, heads = inputs(c), {}, {}
    mesh = init_device_mesh("cpu", (world,))
    for side, classes, how in (("student", c.classes[0], c.divided), ("teacher", c.classes[1], c.divided_T)):
        part = ranges(how, classes, world)[rank]
        keyword = "vocabulary" if side == "student" else "teacher_vocabulary"
        for name in (f"{side}_weight", f"{side}_bias"):
            if name.endswith("bias") and not c.bias:
                continue
            whole = x[name].to(c.dtype)
            if how == "DTensor":
                heads[name] = distribute_tensor(whole, mesh, [Shard(0)])
            else:
                heads[name] = whole if how == "whole" else whole[part.start : part.stop].clone()
        if how == "DTensor" and c.rows == "own":
            more[keyword] = VocabularyShard.of(heads[f"{side}_weight"], "own")
        elif how not in ("DTensor", "whole"):
            more[keyword] = VocabularyShard(dist.group.WORLD, part.start, classes, c.rows)
    if c.kind in ("none", "TopK", "Sampled", "Projected"):
        more.pop("teacher_vocabulary", None)
    if c.trained and c.kind not in ("Projected", "none"):
        for name, head in heads.items():
            head.requires_grad_(name.startswith("student"))
    found = run(c, x, rows_of(c, world)[rank], heads, **more)
    # A DTensor's gradient is one of the same layout.
    for name in ("student_weight", "student_bias"):
        gradient = found.get(f"d_{name}")
        if gradient is not None and c.divided == "DTensor":
            assert gradient.placements == heads[name].placements
            found[f"d_{name}"] = gradient.to_local()
    return found


def worker(folder: Path, names: str) -> None:
    """All cases on this rank; results in FOLDER/rankN.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if names == "large":
        found: Any = large(rank, world)
    elif names == "compiled":
        found = {name: on_rank(c, rank, world) for name, c in COMPILED.items()}
    else:
        found = {name: on_rank(c, rank, world) for name, c in CASES.items()}
        found["calls"] = {name: calls_of(c, rank, world) for name, c in COUNTED.items()}
        found["narrow"] = {name: on_rank(c, rank, world) for name, c in NARROW.items()}
        found["kept"] = borders(rank, world)
        found["wrapped"] = wrapped(rank, world)
        found["refusals"] = {name: refusal(change, rank, world) for name, change in REFUSALS.items()}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


# What travels, by case: two chunks of 12 rows, or all 24 rows at once. Labels are all there.
COUNTED = {
    "two reads": case("rows", ignore_index=None, dtype=torch.float32),
    "one read": case("rows", ignore_index=None, dtype=torch.float32, divergence="reverse_kl"),
    "lse is known": case("classes", ignore_index=None, dtype=torch.float32, divergence="forward_kl", lse=True),
    "TopK": case("rows", ignore_index=None, dtype=torch.float32, kind="TopK"),
    "own rows": case("rows", ignore_index=None, dtype=torch.float32, rows="own", counts="even"),
    "without gradient": case("rows", ignore_index=None, dtype=torch.float32, trained=False),
}


@contextmanager
def small_chunks() -> Any:
    """Chunks of 12 rows of all ranks, whatever fits."""
    from srd_fast.losses import shard_order

    plan = shard_order.plan_loss

    def in_twelves(*args: Any) -> Any:
        planned = plan(*args)
        return replace(planned, rows=12) if planned.order == "rows" else planned

    shard_order.plan_loss = in_twelves
    try:
        yield
    finally:
        shard_order.plan_loss = plan


def calls_of(c: Case, rank: int, world: int) -> list[tuple[str, int]]:
    """Every collective of a loss."""
    with spied() as calls, small_chunks():
        on_rank(c, rank, world)
    return calls


@contextmanager
def spied() -> Any:
    """Every collective in the block, with the bytes that this rank gives to it."""
    calls: list[tuple[str, int]] = []
    # Where what a rank gives stands among the arguments.
    new = hasattr(dist, "all_gather_single")
    collectives = {"all_gather_single": 1, "reduce_scatter_single": 1} if new else {}
    collectives |= {} if new else {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
    collectives |= {"all_reduce": 0, "broadcast": 0, "all_gather": 1, "reduce": 0, "batch_isend_irecv": 0}
    real = {name: getattr(dist, name) for name in collectives}

    def spy(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            given = args[collectives[name]]
            short = name.replace("_into_tensor", "").replace("_tensor", "").replace("_single", "")
            calls.append((short, given.numel() * given.element_size() if isinstance(given, Tensor) else -1))
            return real[name](*args, **options)

        return call

    for name in collectives:
        setattr(dist, name, spy(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def borders(rank: int, world: int) -> Found:
    """How often ranks fetch classes of a teacher whose shards end elsewhere: in two losses, and after a change."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from srd_fast import distillation_loss

    c = case(classes=(23, 26))
    x, mesh = inputs(c), init_device_mesh("cpu", (world,))
    weight, teacher_weight = (distribute_tensor(x[f"{s}_weight"], mesh, [Shard(0)]) for s in ("student", "teacher"))

    def loss() -> Tensor:
        out = distillation_loss(x["student_hidden"], weight, x["teacher_hidden"], teacher_weight, x["labels"])
        return out.divergence

    fetched, losses = [], []
    for change in (1.0, 1.0, 0.5):
        if change != 1.0:
            teacher_weight.to_local().mul_(change)
        with spied() as calls:
            losses.append(loss())
        fetched.append(sum(name == "batch_isend_irecv" for name, _ in calls))
    alone = [
        distillation_loss(
            x["student_hidden"], x["student_weight"], x["teacher_hidden"], factor * x["teacher_weight"], x["labels"]
        ).divergence
        for factor in (1.0, 1.0, 0.5)
    ]
    return {"fetched": fetched, "losses": torch.stack(losses), "alone": torch.stack(alone)}


def wrapped(rank: int, world: int) -> Found:
    """A step of a body and a head that FSDP2 has divided, rows of its own on each rank, and the same step alone.

    The loss of a rank is multiplied by their number, as trainers do whose gradients are then averaged.
    """
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from srd_fast import VocabularyShard, distillation_loss

    x = inputs(case(ignore_index=None))
    labels = x["labels"] % 23

    def model() -> nn.ModuleDict:
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(5, 5), "head": nn.Linear(5, 23, bias=False)}).double()

    whole, divided = model(), model()
    loss = distillation_loss(
        whole["body"](x["student_hidden"]), whole["head"].weight, x["teacher_hidden"], x["teacher_weight"], labels
    ).loss
    loss.backward()
    for layer in divided.values():
        fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    rows = rows_of(case(rows="own"), world)[rank]
    hidden, weight = divided["body"](x["student_hidden"][rows]), divided["head"].weight
    shard = VocabularyShard.of(weight, "own", head_gradient=1 / world)
    of_teacher = x["teacher_hidden"][rows], x["teacher_weight"]
    own = distillation_loss(hidden, weight, *of_teacher, labels[rows], num_items=24, vocabulary=shard).loss
    (own * world).backward()
    return {
        "gradients": {name: p.grad.full_tensor() for name, p in divided.named_parameters()},
        "alone": {name: p.grad for name, p in whole.named_parameters()},
    }


Arguments = dict[str, Any]


def _on_one(name: str, value: Any) -> Callable[[int, Arguments], None]:
    def change(rank: int, arguments: Arguments) -> None:
        if rank == 1:
            arguments[name] = value(arguments[name]) if callable(value) else value

    return change


def _on_all(**values: Any) -> Callable[[int, Arguments], None]:
    def change(rank: int, arguments: Arguments) -> None:
        arguments.update({name: value(arguments[name]) if callable(value) else value for name, value in values.items()})

    return change


# What goes wrong, and on which rank.
REFUSALS: dict[str, Callable[[int, Arguments], None]] = {
    "a label that is no class": _on_one("labels", lambda x: x + 100),
    "a temperature below 0": _on_one("temperature", -1.0),
    "another temperature": _on_one("temperature", 3.0),
    "another divergence": _on_one("divergence", "jsd"),
    "other labels": _on_one("labels", lambda x: x.flip(0)),
    "fewer rows": _on_one("labels", lambda x: torch.where(torch.arange(24) < 2, IGNORE, x)),
    "no gradient": _on_one("student_hidden", lambda x: x.detach()),
    "hidden states too wide": _on_one("student_hidden", lambda x: torch.cat((x, x), 1)),
    "a teacher of another width": _on_one("teacher_hidden", lambda x: x[:, :-1]),
    "a registered divergence": _on_all(divergence="squared"),
    "logits": _on_all(student_logits=torch.zeros(24, 23, dtype=torch.float64)),
    "a gap": _on_all(student_weight=lambda x: x[:-1]),
    "too many classes": _on_one("student_weight", lambda x: torch.cat((x, x, x, x))),
    "triton in float64": _on_all(backend="triton"),
}


def refusal(change: Callable[[int, Arguments], None], rank: int, world: int) -> str:
    """The message of this rank's error."""
    from srd_fast import UserError, VocabularyShard, distillation_loss, register_divergence

    register_divergence("squared", lambda p, q, *, skew, beta: ((p.exp() - q.exp()) ** 2).sum(-1), replace=True)
    c = case(ignore_index=None)
    x, part = inputs(c), ranges("uneven", 23, world)[rank]
    arguments: Arguments = {
        "student_hidden": x["student_hidden"].clone().requires_grad_(),
        "student_weight": x["student_weight"][part.start : part.stop],
        "teacher_hidden": x["teacher_hidden"],
        "teacher_weight": x["teacher_weight"],
        "labels": x["labels"].abs() % 23,
        "vocabulary": VocabularyShard(dist.group.WORLD, part.start, 23),
    }
    change(rank, arguments)
    try:
        distillation_loss(**arguments)
    except UserError as error:
        return str(error)
    return ""


def large(rank: int, world: int) -> Found:
    """V = 262,144: the most memory beyond the inputs, and a sample of the gradients."""
    import resource

    from srd_fast import VocabularyShard, distillation_loss
    from srd_fast.losses import free_workspace

    classes, rows, width = 262144, 256, 24
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, width, generator=g).requires_grad_()
    teacher_hidden = torch.randn(rows, width, generator=g)
    part = ranges("DTensor", classes, world)[rank]
    whole = torch.randn(2, classes, width, generator=g)
    weight, teacher_weight = (x[part.start : part.stop].clone() for x in whole)
    labels = torch.randint(classes, (rows,), generator=g)
    del whole

    def loss(count: int) -> Tensor:
        return distillation_loss(
            hidden[:count], weight.requires_grad_(), teacher_hidden[:count], teacher_weight, labels[:count],
            vocabulary=VocabularyShard(dist.group.WORLD, part.start, classes),
            teacher_vocabulary=VocabularyShard(dist.group.WORLD, part.start, classes),
            memory_budget=4 << 30, backend="eager", order="rows",
        ).loss  # fmt: skip

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    loss(2)
    free_workspace()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident()
    value = loss(rows)
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    value.backward()
    assert weight.grad is not None
    return {
        "loss": value.detach(),
        "d_hidden": hidden.grad,
        "d_weight": weight.grad[::100].clone(),
        "extra": peak - before,
        "head": weight.numel(),
    }


def found_by(folder: Path, world: int, names: str = "all") -> list[Found]:
    """What each rank found."""
    with Ranks(__file__, folder, world, names, TRITON_INTERPRET="1") as ranks:
        return ranks.results()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("two")
    return found_by(folder, 2)


def expected_of(c: Case) -> Found:
    """Of one process; for a head as a teacher, checked against the formula besides."""
    from test_losses import Problem, gradients, plain
    from tiny import assert_same

    found = alone(c)
    o = c.options
    if c.kind == "head" and c.trained and o.get("reduction", "mean") == "mean" and c.counts != "nobody":
        x = inputs(c)
        if o.get("ignore_index", IGNORE) != IGNORE or c.weighted or "num_items" in o:
            return found
        p = Problem(
            x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_(), x["teacher_hidden"],
            x["teacher_weight"], x["labels"], *((x["student_bias"], x["teacher_bias"]) if c.bias else (None, None)),
        )  # fmt: skip
        formula = {n: v for n, v in o.items() if n not in ("order", "memory_budget", "backend", "ignore_index")}
        loss = plain(p, **formula).loss.mean()
        assert (loss - found["loss"]).abs() <= 1e-10 * (1 + loss.abs())
        if not c.equal:
            assert_same(found["d_hidden"], 1.75 * gradients(p, loss)["student_hidden"], 1e-10, "d_hidden")
    return found


def check(c: Case, ranks: list[Found], name: str) -> None:
    """Ranks against one process: values and gradients."""
    from tiny import assert_same

    world, expected = len(ranks), expected_of(c)
    tolerance = TOLERANCE[c.dtype]

    def same(actual: Tensor, wanted: Tensor, what: str) -> None:
        if c.equal and what in ("loss", "divergence", "d_hidden", "d_student_weight"):
            # A mixture of two equal numbers is rounded.
            mixed = c.options["divergence"] in ("skew_forward_kl", "skew_reverse_kl", "jsd")
            assert actual.abs().max() <= 5e-7 * mixed, what
        elif wanted.numel() == 0 or wanted.abs().max() == 0:
            assert actual.shape == wanted.shape, what
            assert not actual.any(), what
        else:
            assert_same(actual, wanted, tolerance, f"{name}: {what}")

    found = [rank[name] for rank in ranks]
    assert set(found[0]) == set(expected)
    for what, wanted in expected.items():
        parts = [f[what] for f in found]
        if what in ("d_student_weight", "d_student_bias"):
            pieces = zip(ranges(c.divided, c.classes[0], world), parts)
            same(torch.cat([x for _, x in sorted(pieces, key=lambda y: (y[0].start, y[0].stop))]), wanted, what)
        elif what == "num_items":
            assert all(x == wanted for x in parts)
        elif c.rows == "same":
            for x in parts:
                same(x, wanted, what)
        elif parts[0].dim() == 0:
            same(torch.stack([x.double() for x in parts]).sum(), wanted, what)
        else:
            same(torch.cat(parts), wanted, what)


@pytest.mark.parametrize("name", CASES)
def test_ranks_find_what_one_process_does(name: str, two: list[Found]) -> None:
    check(CASES[name], two, name)


@pytest.mark.parametrize("name", NARROW)
def test_narrow_heads_are_as_exact_as_in_one_process(name: str, two: list[Found]) -> None:
    c = NARROW[name]
    exact, rounded = alone(c), alone(c, c.dtype)
    found = [rank["narrow"][name] for rank in two]
    for what in ("loss", "divergence", "cross_entropy", "d_hidden", "d_student_weight"):
        if what not in exact:
            continue
        parts = [f[what] for f in found]
        if what == "d_student_weight":
            whole = torch.cat(parts)
        elif c.rows == "same":
            whole = parts[1]
        else:
            whole = sum(parts) if parts[0].dim() == 0 else torch.cat(parts)
        largest, error = exact[what].abs().max(), (whole.double() - exact[what]).abs().max()
        assert error <= 1.25 * (rounded[what].double() - exact[what]).abs().max() + 2e-3 * largest, what
        assert largest > 1e-3


def _expected_calls(name: str) -> list[tuple[str, int]]:
    """What docs/many_gpus.md promises, in bytes of a rank: by row, 4 for each number, 8 in float64."""
    width, of_teacher, k = 5, 8, 4
    start = ("all_gather", 40 * 8)

    def joined(rows: int, *numbers: int, hidden: bool = True) -> list[tuple[str, int]]:
        told = [("all_gather", 4 * rows * n) for n in numbers]
        return [*told, ("all_reduce", 4 * rows * width)] if hidden else told

    if name == "two reads":
        return [start, *joined(12, 8, 2) * 2]
    if name == "without gradient":
        return [start, *joined(12, 8, 2, hidden=False) * 2]
    if name == "one read":
        return [start, *joined(12, 11) * 2]
    if name == "lse is known":
        return [start, *joined(24, 6, 1)]
    if name == "TopK":
        first, last = joined(12, 5)
        return [start, *[first, ("all_reduce", 4 * 12 * k), last] * 2]
    # Each rank gives six of the 12 rows; the gradient of all 12.
    rows = [("all_gather", 6 * n) for n in (4 * width, 8 * 2, 4 * of_teacher)]
    both = [*rows, *joined(12, 8, 2, hidden=False), ("reduce_scatter", 4 * 12 * width)]
    return [start, start, *both * 2]


@pytest.mark.parametrize("name", COUNTED)
def test_no_more_travels_than_the_docs_promise(name: str, two: list[Found]) -> None:
    for rank in two:
        assert rank["calls"][name] == _expected_calls(name)


def test_a_teacher_in_other_shards_is_fetched_once(two: list[Found]) -> None:
    for rank in two:
        kept = rank["kept"]
        assert kept["fetched"] == [1, 0, 1]
        torch.testing.assert_close(kept["losses"], kept["alone"], rtol=1e-12, atol=0)
        assert kept["losses"][0] != kept["losses"][2]


def test_a_head_of_fsdp_gets_the_gradient_of_one_process(two: list[Found]) -> None:
    """Not averaged once more over the ranks, as that of the body is."""
    from tiny import assert_same

    for rank in two:
        assert set(rank["wrapped"]["alone"]) == {"body.weight", "body.bias", "head.weight"}
        for name, expected in rank["wrapped"]["alone"].items():
            assert_same(rank["wrapped"]["gradients"][name], expected, 1e-11, name)


WORDS = {
    "a label that is no class": "labels must be from 0 to 22",
    "a temperature below 0": "temperature must be",
    "hidden states too wide": "student_hidden is 10 wide",
    "a teacher of another width": "teacher_hidden is 7 wide",
    "too many classes": "the vocabulary has 23",
}
SAID_BY_ALL = {
    "another temperature": "temperature, sft_weight and temperature_scaling must be the same on all ranks",
    "another divergence": "divergence, skew and beta must be the same",
    "other labels": "labels must be the same on all ranks",
    "fewer rows": "number of labels with loss must be the same",
    "no gradient": "what requires a gradient must be the same",
    "a registered divergence": "a registered divergence sees whole rows",
    "logits": "needs hidden states and heads, but logits are given",
    "a gap": "must have each of 23 classes once, but the ranks have 0 to 16, 17 to 22",
    "triton in float64": "no float64",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_no_rank_waits_for_one_that_refuses(name: str, two: list[Found]) -> None:
    """That the ranks went on with the next case shows that none waited."""
    first, second = (rank["refusals"][name] for rank in two)
    if name in WORDS:
        assert WORDS[name] in second
        assert "but rank 1 of the group refused its arguments" in first
    else:
        assert SAID_BY_ALL[name] in first
        assert SAID_BY_ALL[name] in second


@pytest.mark.long
def test_four_ranks_find_what_one_process_does(tmp_path: Path) -> None:
    ranks = found_by(tmp_path, 4)
    for name, c in CASES.items():
        check(c, ranks, name)


@pytest.mark.long
def test_compiled_passes_find_it_too(tmp_path: Path) -> None:
    ranks = found_by(tmp_path, 2, "compiled")
    for name, c in COMPILED.items():
        check(c, ranks, name)


@pytest.mark.long
def test_a_vocabulary_of_262144_takes_each_of_four_ranks_a_quarter(tmp_path: Path) -> None:
    from tiny import assert_same

    (tmp_path / "one").mkdir()
    (alone,) = found_by(tmp_path / "one", 1, "large")
    ranks = found_by(tmp_path, 4, "large")
    assert [rank["head"] * 4 for rank in ranks] == [alone["head"]] * 4
    for rank in ranks:
        # Logits of both sides are 512 MiB alone; what does not grow with V is less than this.
        assert rank["extra"] < alone["extra"] / 4 + (64 << 20)
        assert_same(rank["loss"], alone["loss"], 1e-5, "loss")
        assert_same(rank["d_hidden"], alone["d_hidden"], 1e-5, "d_hidden")


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2])
