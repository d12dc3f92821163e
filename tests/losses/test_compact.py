"""`compact_distillation_loss` against the textbook in float64: values and gradients for each kind of teacher."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_losses import Watch
from tiny import DIVERGENCES, IGNORE, assert_same, plain_cross_entropy, plain_divergence, rounding
from torch import Tensor
from torch.nn import functional

from srd_fast import DistillationOutput, UserError, distillation_loss, register_divergence
from srd_fast.kernels import SparseDivergence
from srd_fast.losses import (
    CompactTeacher,
    Projected,
    Sampled,
    TopK,
    compact_distillation_loss,
    free_workspace,
)
from srd_fast.losses.buffers import workspace

TEMPERATURES = (1.0, 2.0, 0.7)
# A divergence for each kind of teacher that takes it.
KINDS = [*[("top_k", name) for name in DIVERGENCES], ("sampled", "forward_kl"), ("projected", "forward_kl")]
HEADS: list[dict[str, float]] = [{}, {"student_softcap": 2.0}, {"student_scale": 0.6}]


@dataclass
class Case:
    """A student and the logits that its teacher had: float64 unless `to` says otherwise."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    teacher_NV: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> Tensor:
        """Which labels have a loss."""
        return self.labels != IGNORE

    def leaves(self) -> dict[str, Tensor]:
        """What a gradient flows into."""
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {n: x for n, x in named.items() if x is not None and x.requires_grad}

    def to(self, dtype: torch.dtype) -> "Case":
        """Fresh leaves of another dtype, the same teacher."""
        changed = {n: getattr(self, n) for n in ("hidden", "weight", "bias")}
        fresh = {
            n: None if x is None else x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)
            for n, x in changed.items()
        }
        return replace(self, **fresh)

    def teacher(self, kind: str, temperature: float, k: int = 6, seed: int = 0) -> CompactTeacher:
        """What a cache at the temperature holds, in float64."""
        log_p = torch.log_softmax(self.teacher_NV / temperature, -1)
        p, entropy = log_p.exp(), -(log_p.exp() * log_p).sum(-1)
        if kind == "top_k":
            top = log_p.topk(k)
            return TopK(top.indices, top.values, log_p.scatter(1, top.indices, -math.inf).logsumexp(1))
        if kind == "sampled":
            g = torch.Generator().manual_seed(seed)
            return Sampled(torch.multinomial(p, k, replacement=True, generator=g), entropy)
        scale = self.options.get("student_scale", 1.0)
        bias = entropy.new_zeros(entropy.shape) if self.bias is None else p @ self.bias.detach().double() * scale
        return Projected(p @ self.weight.detach().double() * scale, entropy, bias)

    def run(self, teacher: CompactTeacher, **options: Any) -> DistillationOutput:
        """`compact_distillation_loss` on this case."""
        options = {"student_bias": self.bias, **self.options, **options}
        return compact_distillation_loss(self.hidden, self.weight, teacher, self.labels, **options)


def case(
    shape: tuple[int, ...] = (3, 7),
    classes: int = 23,
    width: int = 5,
    bias: bool = True,
    ignored: float = 0.3,
    seed: int = 0,
    frozen: bool = False,
    **options: Any,
) -> Case:
    """Logits of a few units; about half of the labels are among the teacher's likeliest classes."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    labels = torch.randint(classes, shape, generator=g)
    labels[torch.rand(shape, generator=g) < ignored] = IGNORE
    kept = labels != IGNORE
    teacher_NV = 2 * draw(int(kept.sum()), classes)
    likeliest = teacher_NV.argmax(1)
    labels[kept] = torch.where(torch.arange(len(likeliest)) % 2 == 0, likeliest, labels[kept])
    weight, b = draw(classes, width), draw(classes) if bias else None
    weight.requires_grad_(not frozen)
    if b is not None:
        b.requires_grad_(not frozen)
    return Case(draw(*shape, width).requires_grad_(), weight, b, labels, teacher_NV, options)


def plain_logits(c: Case) -> Tensor:
    z = c.hidden[c.kept] @ c.weight.T
    z = (z if c.bias is None else z + c.bias) * c.options.get("student_scale", 1.0)
    cap = c.options.get("student_softcap")
    return z if cap is None else cap * torch.tanh(z / cap)


def in_buckets(log_p: Tensor, ids: Tensor) -> Tensor:
    rest = log_p.masked_fill(functional.one_hot(ids, log_p.shape[1]).sum(1).bool(), -math.inf).logsumexp(1)
    return torch.cat((log_p.gather(1, ids), rest[:, None]), 1)


def plain_rows(
    c: Case, teacher: CompactTeacher, *, divergence: str, temperature: float, sft_weight: float = 0.1
) -> dict[str, Tensor]:
    """Loss and divergence of each row with loss, of tensors that autograd differentiates."""
    z = plain_logits(c)
    log_q = torch.log_softmax(z / temperature, -1)
    if isinstance(teacher, TopK):
        log_p = torch.log_softmax(c.teacher_NV / temperature, -1)
        sides = in_buckets(log_p, teacher.ids_NK), in_buckets(log_q, teacher.ids_NK)
        d = plain_divergence(divergence, *sides, 1.0, 0.1, 0.5)
    elif isinstance(teacher, Sampled):
        d = -teacher.entropy_N - log_q.gather(1, teacher.ids_NK).mean(1)
    else:
        d = plain_divergence(divergence, c.teacher_NV, z, temperature, 0.1, 0.5)
    ce = plain_cross_entropy(z, c.labels[c.kept])
    log_q_1 = torch.log_softmax(z, -1)
    loss = sft_weight * ce + (1 - sft_weight) * temperature**2 * d
    return {"loss": loss, "divergence": d, "cross_entropy": ce, "entropy": -(log_q_1.exp() * log_q_1).sum(-1)}


def gradients(c: Case, loss: Tensor, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    leaves = c.leaves()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), grad_output)))


def assert_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_same(found[name], wanted[name], tolerance, f"gradient of {name}")


# The formulas.


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("kind", "divergence", "head"),
    [(k, d, h) for k, d in KINDS for h in HEADS if k != "projected" or "student_softcap" not in h],
    ids=str,
)
def test_loss_and_gradients_are_those_of_autograd(
    kind: str, divergence: str, temperature: float, head: dict[str, float]
) -> None:
    for bias in (True, False):
        c = case(bias=bias, frozen=kind == "projected", **head)
        teacher = c.teacher(kind, temperature)
        if kind != "projected":
            in_ids = (teacher.ids_NK == c.labels[c.kept][:, None]).any(1)
            assert in_ids.any()
            assert not in_ids.all()
        if kind == "sampled":
            assert (teacher.ids_NK.sort(1).values.diff(dim=1) == 0).any()
        options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "sft_weight": 0.3}
        out = c.run(teacher, **options, memory_budget=4 * 23 * 8 * 12)
        expected = plain_rows(c, teacher, **options)
        for name, x in expected.items():
            assert_same(getattr(out, name), x.mean(), 1e-10, name)
        assert len(c.leaves()) == (1 if kind == "projected" else 2 + bias)
        assert_gradients(gradients(c, out.loss), gradients(c, expected["loss"].mean()), 1e-10)


@pytest.mark.parametrize(("options", "name"), [({"skew": 0.0}, "skew_reverse_kl"), ({"beta": 0.0}, "jsd")])
def test_skew_and_beta_are_used(options: dict[str, float], name: str) -> None:
    c = case()
    teacher = c.teacher("top_k", 2.0)
    limit = {"skew_reverse_kl": "reverse_kl", "jsd": "forward_kl"}[name]
    assert_same(c.run(teacher, divergence=name, **options).loss, c.run(teacher, divergence=limit).loss, 1e-12)
    assert abs(c.run(teacher, divergence=name).loss - c.run(teacher, divergence=limit).loss) > 1e-3


@pytest.mark.parametrize("classes_kept", [22, 23])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_classes_but_one_or_none_give_the_full_divergence(
    divergence: str, temperature: float, classes_kept: int
) -> None:
    c = case()
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature}
    teacher_hidden = torch.zeros(*c.labels.shape, 23, dtype=torch.float64)
    teacher_hidden[c.kept] = c.teacher_NV
    full = distillation_loss(
        c.hidden, c.weight, teacher_hidden, torch.eye(23).double(), c.labels, student_bias=c.bias, **options
    )
    out = c.run(c.teacher("top_k", temperature, classes_kept), **options)
    for name in ("loss", "divergence", "cross_entropy", "entropy"):
        assert_same(getattr(out, name), getattr(full, name), 1e-11, name)
    assert_gradients(gradients(c, out.loss), gradients(c, full.loss), 1e-11)


def test_buckets_never_exceed_the_full_divergence() -> None:
    c = case(ignored=0.0)
    for divergence in DIVERGENCES:
        values = [
            c.run(c.teacher("top_k", 2.0, k), divergence=divergence, reduction="none").divergence
            for k in (1, 4, 12, 22)
        ]
        for few, more in pairwise(values):
            assert (few <= more + 1e-12).all()
        assert (values[0] < values[-1]).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, rounding(16 + 301))])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_projection_is_the_full_forward_kl(temperature: float, dtype: torch.dtype, tolerance: float) -> None:
    c = case(shape=(40,), classes=301, width=16, frozen=True, student_scale=0.5).to(dtype)
    teacher_hidden = torch.zeros(40, 301, dtype=dtype)
    teacher_hidden[c.kept] = c.teacher_NV.to(dtype)
    options: dict[str, Any] = {"divergence": "forward_kl", "temperature": temperature, "student_scale": 0.5}
    full = distillation_loss(
        c.hidden, c.weight, teacher_hidden, torch.eye(301, dtype=dtype), c.labels, student_bias=c.bias, **options
    )
    teacher = Projected(*(x.to(dtype) for x in c.teacher("projected", temperature)))
    out = c.run(teacher, divergence="forward_kl", temperature=temperature)
    assert_same(out.divergence, full.divergence, tolerance)
    assert_gradients(gradients(c, out.loss), gradients(c, full.loss), tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_give_the_full_forward_kl_on_average(temperature: float) -> None:
    """Value and gradient are within 4.5 standard errors of the exact ones; these errors are small beside them."""
    draws, k = 6000, 3
    one = case(shape=(1,), ignored=0.0, classes=11)
    many = replace(
        one,
        hidden=one.hidden.detach().repeat(draws, 1).requires_grad_(),
        labels=one.labels.repeat(draws),
        teacher_NV=one.teacher_NV.repeat(draws, 1),
    )
    options: dict[str, Any] = {"divergence": "forward_kl", "temperature": temperature, "sft_weight": 0.0}
    out = many.run(many.teacher("sampled", temperature, k), reduction="none", **options)
    exact = plain_rows(one, one.teacher("projected", temperature), **options)
    (found,) = torch.autograd.grad(out.loss.sum(), many.hidden)
    (wanted,) = torch.autograd.grad(exact["loss"].sum(), one.hidden)
    for rows, truth in ((out.loss.detach()[:, None], exact["loss"].detach()[:, None]), (found, wanted)):
        standard_error = rows.std(0) / math.sqrt(draws)
        assert ((rows.mean(0) - truth[0]).abs() < 4.5 * standard_error).all()
        assert (standard_error < 0.05 * truth.abs().max()).all()
        assert (standard_error > 0).all()


@pytest.mark.usefixtures("own_registries")
def test_registered_divergences_work_over_buckets() -> None:
    register_divergence("again", lambda log_p, log_q, *, skew, beta: (log_p.exp() * (log_p - log_q)).sum(-1))
    c = case()
    teacher = c.teacher("top_k", 2.0)
    out, built_in = c.run(teacher, divergence="again"), c.run(teacher, divergence="forward_kl")
    assert_same(out.loss, built_in.loss, 1e-12)
    assert_gradients(gradients(c, out.loss), gradients(c, built_in.loss), 1e-12)


# Rows: which count, and how they add up.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["top_k", "sampled", "projected"])
def test_reductions_and_token_weights(kind: str, reduction: str, weighted: bool) -> None:
    c = case(frozen=kind == "projected")
    g = torch.Generator().manual_seed(5)
    weights = torch.rand(c.labels.shape, generator=g).double() * 2 if weighted else None
    teacher, options = c.teacher(kind, 2.0), {"divergence": "forward_kl", "temperature": 2.0}
    out = c.run(teacher, **options, token_weights=weights, reduction=reduction, memory_budget=5 * 23 * 8 * 12)
    rows = plain_rows(c, teacher, **options)
    if weights is not None:
        rows = {name: x * weights[c.kept] for name, x in rows.items()}
    if reduction == "none":
        for name, x in rows.items():
            assert getattr(out, name).shape == c.labels.shape
            assert (getattr(out, name)[~c.kept] == 0).all()
            assert_same(getattr(out, name)[c.kept], x, 1e-10, name)
        above = torch.randn(c.labels.shape, generator=g, dtype=torch.float64)
        found, wanted = gradients(c, out.loss, above), gradients(c, rows["loss"], above[c.kept])
    else:
        rows = {name: x.sum() if reduction == "sum" else x.mean() for name, x in rows.items()}
        for name, x in rows.items():
            assert_same(getattr(out, name), x, 1e-10, name)
        above = torch.tensor(-1.7, dtype=torch.float64)
        found, wanted = gradients(c, out.loss, above), gradients(c, rows["loss"], above)
    assert_gradients(found, wanted, 1e-10)
    assert out.loss.requires_grad
    assert not any(getattr(out, name).requires_grad for name in ("divergence", "cross_entropy", "entropy"))


@pytest.mark.parametrize("num_items", [50, torch.tensor(12.5)], ids=str)
def test_num_items_is_the_denominator_of_the_mean(num_items: Any) -> None:
    c = case()
    teacher = c.teacher("top_k", 2.0)
    out, total = c.run(teacher, num_items=num_items), c.run(teacher, reduction="sum")
    assert_same(out.loss, total.loss / float(num_items), 1e-12)
    assert float(out.num_items) == float(num_items)
    assert int(total.num_items) == int(c.kept.sum())
    wanted = {name: g / float(num_items) for name, g in gradients(c, total.loss).items()}
    assert_gradients(gradients(c, out.loss), wanted, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["top_k", "sampled", "projected"])
def test_no_row_with_loss(kind: str, reduction: str) -> None:
    c = case(ignored=1.1, frozen=kind == "projected")
    teacher = {
        "top_k": TopK(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0)),
        "sampled": Sampled(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0)),
        "projected": Projected(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0)),
    }[kind]
    out = c.run(teacher, divergence="forward_kl", reduction=reduction)
    assert out.loss.shape == (c.labels.shape if reduction == "none" else ())
    assert (out.loss == 0).all()
    assert all((g == 0).all() for g in gradients(c, out.loss.sum()).values())


@pytest.mark.parametrize("kind", ["top_k", "sampled", "projected"])
def test_backward_twice_adds_up(kind: str) -> None:
    c = case(frozen=kind == "projected")
    teacher = c.teacher(kind, 2.0)
    loss = c.run(teacher, divergence="forward_kl").loss
    wanted = gradients(c, plain_rows(c, teacher, divergence="forward_kl", temperature=2.0)["loss"].mean())
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    for name, leaf in c.leaves().items():
        assert_same(leaf.grad, 3 * wanted[name], 1e-10, name)


def test_the_teacher_is_left_alone() -> None:
    for kind in ("top_k", "sampled", "projected"):
        c = case(frozen=kind == "projected")
        teacher = c.teacher(kind, 2.0)
        teacher = type(teacher)(*(x.requires_grad_() if x.is_floating_point() else x for x in teacher))
        before = [x.detach().clone() for x in teacher]
        c.run(teacher, divergence="forward_kl").loss.backward()
        assert all(x.grad is None and torch.equal(x, y) for x, y in zip(teacher, before))
        assert c.hidden.grad is not None


def test_each_gradient_alone() -> None:
    c = case()
    teacher = c.teacher("top_k", 2.0)
    wanted = gradients(c, c.run(teacher).loss)
    for trained in ("hidden", "weight", "bias"):
        for name in ("hidden", "weight", "bias"):
            getattr(c, name).requires_grad_(name == trained)
        found = gradients(c, c.run(teacher).loss)
        assert_gradients(found, {trained: wanted[trained]}, 1e-12)


# Memory.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["top_k", "sampled", "projected"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(kind: str, reduction: str) -> None:
    rows, classes, chunk = 800, 1008, 32
    c = case(shape=(rows,), classes=classes, width=8, ignored=0.2, frozen=kind == "projected")
    teacher = c.teacher(kind, 2.0, k=8)
    c = c.to(torch.float32)
    budget = chunk * classes * 4 * 11
    free_workspace()
    with Watch() as watch:
        options: dict[str, Any] = {"divergence": "forward_kl", "memory_budget": budget, "reduction": reduction}
        c.run(teacher, **options).loss.mean().backward()
        assert watch.largest <= max(chunk * classes * 4, rows * 9 * 8)
        assert not any(len(s) == 2 and s[1] == classes and s[0] > chunk for s in watch.shapes)
        kept = {key: x.data_ptr() for key, x in workspace.buffers.items()}
        assert kept
        c.run(teacher, **options).loss.mean().backward()
    assert {key: x.data_ptr() for key, x in workspace.buffers.items()} == kept


# Numbers as they come.


def peaked(rest: float, classes: int = 50, rows: int = 12) -> Case:
    """Logits are the hidden states; the student's mass outside of the teacher's 4 likeliest classes is about `rest`."""
    c = case(shape=(rows,), classes=classes, width=classes, bias=False, ignored=0.0)
    top = c.teacher_NV.topk(4).indices
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = logits.scatter_add(1, top, torch.full(top.shape, 2 * -math.log(rest / classes), dtype=torch.float64))
    return replace(c, hidden=logits.float().double().requires_grad_(), weight=torch.eye(classes, dtype=torch.float64))


@pytest.mark.parametrize("rest", [1e-2, 1e-6, 1e-12, 1e-30])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_reverse_kl"])
def test_a_tiny_rest_keeps_its_digits(divergence: str, rest: float) -> None:
    """In float32, where 1 - sum(q) is 6e-8 at least or 0: log of the rest's mass and its classes' gradient."""
    c = peaked(rest)
    teacher = c.teacher("top_k", 2.0, k=4)
    truth = plain_rows(c, teacher, divergence=divergence, temperature=2.0, sft_weight=0.0)
    wanted = gradients(c, truth["loss"].mean())["hidden"]
    log_q = torch.log_softmax(c.hidden.detach() / 2, -1)
    mass = in_buckets(log_q, teacher.ids_NK)[:, -1].exp()
    assert (mass < 3 * rest).all()
    assert (mass > rest / 30).all()
    narrow = c.to(torch.float32)
    out = narrow.run(TopK(teacher.ids_NK, *(x.float() for x in teacher[1:])), divergence=divergence, sft_weight=0.0)
    assert_same(out.divergence, truth["divergence"].mean(), rounding(50))
    found = gradients(narrow, out.loss)["hidden"].double()
    # Of each class by itself, however small its gradient.
    others = torch.ones_like(wanted, dtype=torch.bool).scatter(1, teacher.ids_NK, False)
    assert ((found - wanted).abs()[others] <= 3e-5 * wanted.abs()[others]).all()
    assert_same(found, wanted, rounding(50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "divergence", "softcap"), [(k, d, c) for k, d in KINDS for c in (None, 30.0) if k != "projected" or not c]
)
def test_certain_sides_never_give_nan(kind: str, divergence: str, dtype: torch.dtype, softcap: float | None) -> None:
    for where in range(3):
        c = case(shape=(6,), width=23, bias=False, ignored=0.0, frozen=kind == "projected", student_softcap=softcap)
        logits = c.hidden.detach().clone()
        ids = c.teacher_NV.topk(6).indices
        if where == 0:  # the student in a class of the rest
            logits[:, int(c.teacher_NV.sum(0).argmin())] = 1e3
        elif where == 1:  # the student in a class of the top k
            logits.scatter_(1, ids[:, :1], 1e3)
        else:
            c.teacher_NV.scatter_(1, ids[:, :1], 1e4)
        weight = torch.eye(23, dtype=torch.float64).requires_grad_(kind != "projected")
        c = replace(c, hidden=logits.requires_grad_(), weight=weight).to(dtype)
        for temperature in TEMPERATURES:
            out = c.run(c.teacher(kind, temperature), divergence=divergence, temperature=temperature)
            found = gradients(c, out.loss)
            for x in (out.loss, out.divergence, out.cross_entropy, out.entropy, *found.values()):
                assert x.isfinite().all()
            assert found["hidden"].any()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(("kind", "divergence"), [k for k in KINDS if k[0] != "projected"])
def test_classes_that_the_bias_rules_out(kind: str, divergence: str, softcap: float | None) -> None:
    """Neither label nor among the teacher's few; both sides have them ruled out."""
    c = case(student_softcap=softcap)
    unused = sorted(set(range(23)) - set(c.labels.flatten().tolist()))[:2]
    c.teacher_NV[:, unused] = -1e4
    teacher = c.teacher(kind, 2.0)
    with torch.no_grad():
        c.bias[unused] = -math.inf
    out = c.run(teacher, divergence=divergence)
    found = gradients(c, out.loss)
    assert all(x.isfinite().all() for x in (out.loss, out.divergence, out.entropy, *found.values()))
    narrow = c.to(torch.float32)
    assert all(x.isfinite().all() for x in gradients(narrow, narrow.run(teacher, divergence=divergence).loss).values())
    if softcap is None:
        expected = plain_rows(c, teacher, divergence=divergence, temperature=2.0)["loss"].mean()
        assert_same(out.loss, expected, 1e-10)
        assert_same(found["hidden"], gradients(c, expected)["hidden"], 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, rounding(16 + 101)), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("logits_dtype", [None, torch.float32])
@pytest.mark.parametrize(("kind", "divergence"), KINDS)
def test_narrow_dtypes(
    kind: str, divergence: str, logits_dtype: torch.dtype | None, dtype: torch.dtype, tolerance: float
) -> None:
    c = case(shape=(40,), classes=101, width=16, frozen=kind == "projected").to(dtype).to(torch.float64)
    teacher = c.teacher(kind, 2.0)
    expected = plain_rows(c, teacher, divergence=divergence, temperature=2.0)["loss"].mean()
    narrow = c.to(dtype)
    floats = (x.float() if x.is_floating_point() else x for x in teacher)
    out = narrow.run(type(teacher)(*floats), divergence=divergence, logits_dtype=logits_dtype)
    assert out.loss.dtype == torch.float32
    assert_same(out.loss, expected, tolerance)
    found, wanted = gradients(narrow, out.loss), gradients(c, expected)
    for name, g in found.items():
        assert g.dtype == dtype
        assert ((g.double() - wanted[name]).norm() / wanted[name].norm()) < tolerance, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["top_k", "sampled", "projected"])
def test_autocast_runs_the_products_in_its_dtype(kind: str, reduction: str) -> None:
    c = case(shape=(30,), frozen=kind == "projected")
    teacher = c.teacher(kind, 2.0)
    c = c.to(torch.float32)
    narrow = c.to(torch.bfloat16)
    options: dict[str, Any] = {"divergence": "forward_kl", "reduction": reduction}
    expected = narrow.run(teacher, **options).loss.sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = c.run(teacher, **options).loss.sum()
        found = gradients(c, loss)
    assert_same(loss, expected, 1e-6)
    for name, g in gradients(narrow, expected).items():
        assert found[name].dtype == torch.float32
        assert_same(found[name], g.float(), 2**-7, name)


# Backends.


@pytest.mark.parametrize(
    ("kind", "divergence", "temperature", "head"),
    [
        ("top_k", "skew_reverse_kl", 2.0, {}),
        ("top_k", "jsd", 0.7, {"student_softcap": 4.0}),
        ("sampled", "forward_kl", 1.0, {}),
        ("projected", "forward_kl", 1.0, {}),
    ],
)
def test_compiled_equals_eager(kind: str, divergence: str, temperature: float, head: dict[str, float]) -> None:
    c = case(shape=(30,), classes=97, width=6, frozen=kind == "projected", **head)
    teacher = c.teacher(kind, temperature)
    c = c.to(torch.float32)
    options: dict[str, Any] = {"divergence": divergence, "temperature": temperature, "memory_budget": 7 * 97 * 4}
    results = []
    for backend in ("compile", "eager"):
        out = c.run(teacher, backend=backend, **options)
        results.append((out, gradients(c, out.loss)))
    (compiled, found), (eager, wanted) = results
    for name in ("loss", "divergence", "cross_entropy", "entropy"):
        assert_same(getattr(compiled, name), getattr(eager, name), rounding(6 + 97), name)
    assert_gradients(found, wanted, rounding(6 + 97))


def test_triton_is_refused() -> None:
    c = case()
    with pytest.raises(UserError, match=r"backend 'triton' cannot run: .* compact teachers"):
        c.run(c.teacher("top_k", 2.0), backend="triton")


def test_what_a_sparse_divergence_must_say() -> None:
    ids = torch.arange(6).view(3, 2)
    assert torch.equal(SparseDivergence(ids).rows(slice(1, 3)).ids_CK, ids[1:])
    with pytest.raises(NotImplementedError):
        SparseDivergence(None)(torch.zeros(1, 1), torch.zeros(1, 1))


# A user's mistakes: the argument is named.


@pytest.mark.parametrize("kind", ["sampled", "projected"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "skew_reverse_kl"])
def test_some_teachers_know_forward_kl_alone(kind: str, divergence: str) -> None:
    c = case(frozen=True)
    with pytest.raises(UserError, match=f"divergence must be 'forward_kl' with a {kind.title()}.*{divergence!r}"):
        c.run(c.teacher(kind, 2.0), divergence=divergence)


def test_a_projection_holds_for_a_frozen_linear_head() -> None:
    c = case(frozen=True)
    teacher = c.teacher("projected", 2.0)
    for name in ("weight", "bias"):
        trained = replace(c, **{name: getattr(c, name).clone().requires_grad_()})
        with pytest.raises(UserError, match=f"student_{name} requires a gradient"):
            trained.run(teacher, divergence="forward_kl")
    with pytest.raises(UserError, match="student_softcap must be None"):
        c.run(teacher, divergence="forward_kl", student_softcap=30.0)
    narrow = teacher._replace(projection_ND=teacher.projection_ND[:, :4])
    with pytest.raises(UserError, match="projection_ND is 4 wide but student_weight is"):
        c.run(narrow, divergence="forward_kl")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", x) for x in (0, -1.0, math.nan, None)],
        ("skew", 1.1),
        ("beta", -0.1),
        ("sft_weight", 2),
        ("student_softcap", 0.0),
        ("student_scale", None),
        ("memory_budget", 0),
        ("num_items", -1),
        ("backend", "cuda"),
        ("reduction", "total"),
        ("divergence", "kl"),
        ("logits_dtype", torch.float16),
    ],
)
def test_bad_option_is_named(name: str, value: object) -> None:
    c = case()
    with pytest.raises(UserError) as caught:
        c.run(c.teacher("top_k", 2.0), **{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


BAD_TENSORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"ids_NK": torch.zeros(13, 6)}, ["ids_NK", "int64", "float32"]),
    ({"ids_NK": [[1, 2]]}, ["ids_NK", "tensor", "list"]),
    ({"ids_NK": torch.arange(6).repeat(14, 1)}, ["ids_NK", "(14, 6)", "13 labels"]),
    ({"ids_NK": torch.arange(13)}, ["ids_NK", "(13,)", "2 dimensions"]),
    ({"ids_NK": torch.zeros(13, 0, dtype=torch.long)}, ["ids_NK", "(13, 0)"]),
    ({"ids_NK": torch.arange(18, 24).repeat(13, 1)}, ["ids_NK", "0 to 22", "got 23"]),
    ({"ids_NK": torch.arange(-1, 5).repeat(13, 1)}, ["ids_NK", "0 to 22", "got -1"]),
    ({"ids_NK": torch.tensor([1, 2, 3, 4, 5, 1]).repeat(13, 1)}, ["ids_NK", "distinct", "row 0"]),
    ({"log_p_NK": torch.zeros(13, 5)}, ["log_p_NK", "(13, 5)", "(13, 6)"]),
    ({"log_p_NK": torch.zeros(13, 6, dtype=torch.long)}, ["log_p_NK", "floating", "int64"]),
    ({"log_tail_N": torch.zeros(13, 1)}, ["log_tail_N", "(13, 1)", "1 dimension "]),
    ({"log_tail_N": torch.zeros(13, device="meta")}, ["log_tail_N", "meta", "cpu"]),
]


@pytest.mark.parametrize(("bad", "words"), BAD_TENSORS, ids=lambda x: "-".join(x))
def test_bad_tensor_is_named(bad: dict[str, Any], words: list[str]) -> None:
    c = case()
    assert int(c.kept.sum()) == 13
    with pytest.raises(UserError) as caught:
        c.run(c.teacher("top_k", 2.0)._replace(**bad))
    for word in words:
        assert word in str(caught.value)


def test_bad_arguments_of_the_student_are_named() -> None:
    c = case()
    teacher = c.teacher("top_k", 2.0)
    for changed, says in (
        ({"hidden": torch.zeros(3, 6, 5)}, "student_hidden has shape"),
        ({"weight": torch.zeros(23)}, "student_weight must be"),
        ({"bias": torch.zeros(22)}, "student_bias must have shape"),
        ({"labels": torch.full((3, 7), 23)}, "labels must be from 0 to 22 or ignore_index, got 23"),
    ):
        with pytest.raises(UserError, match=says):
            replace(c, **changed).run(teacher)
    with pytest.raises(UserError, match="token_weights has shape"):
        c.run(teacher, token_weights=torch.ones(3))
    with pytest.raises(UserError, match="teacher must be a TopK, Sampled or Projected, got tuple"):
        c.run(tuple(teacher))
