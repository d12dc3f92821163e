"""`distillation_loss` against the textbook: same loss, same gradients, for every option and size of chunk."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIVERGENCES, IGNORE, assert_same, plain_cross_entropy, plain_divergence, rounding
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from srd_fast import DistillationLoss, DistillationOutput, UserError, distillation_loss, distillation_loss_from_logits
from srd_fast.kernels import EAGER_BUFFERS
from srd_fast.losses import Head, expect_logits, free_workspace, token_cross_entropy
from srd_fast.losses.backends import chosen_backend

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
VARIANTS = [
    *[(name, {}) for name in ("forward_kl", "reverse_kl", "tvd")],
    *[(name, {"skew": s}) for name in ("skew_forward_kl", "skew_reverse_kl") for s in (0.0, 0.1, 0.9, 1.0)],
    *[("jsd", {"beta": b}) for b in (0.0, 0.1, 0.5, 1.0)],
]


GEMMS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.matmul)


@dataclass
class Problem:
    """Arguments of `distillation_loss`, all float64 leaves unless `to` says otherwise."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Problem":
        """Fresh leaves in another dtype."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k != "labels"}
        fresh = {k: v.detach().to(dtype, copy=True).requires_grad_(v.requires_grad) for k, v in tensors.items()}
        return replace(self, **fresh)

    def leaves(self) -> dict[str, Tensor]:
        """What a gradient may flow into."""
        named = {n: getattr(self, n) for n in ("student_hidden", "student_weight", "student_bias")}
        return {n: t for n, t in named.items() if t is not None and t.requires_grad}

    def run(self, **options: Any) -> DistillationOutput:
        """`distillation_loss` on this problem."""
        return distillation_loss(
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            self.labels,
            student_bias=self.student_bias,
            teacher_bias=self.teacher_bias,
            **{**self.extra, **options},
        )


def problem(
    shape: tuple[int, ...] = (3, 7),
    widths: tuple[int, int] = (5, 8),
    classes: tuple[int, int] = (23, 23),
    bias: bool = True,
    seed: int = 0,
    ignored: float = 0.4,
    **extra: Any,
) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    labels = torch.randint(classes[0], shape, generator=g)
    labels[torch.rand(shape, generator=g) < ignored] = IGNORE
    return Problem(
        draw(*shape, widths[0]).requires_grad_(),
        draw(classes[0], widths[0]).requires_grad_(),
        draw(*shape, widths[1]),
        draw(classes[1], widths[1]),
        labels,
        draw(classes[0]).requires_grad_() if bias else None,
        draw(classes[1]) if bias else None,
        extra,
    )


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@dataclass
class Plain:
    """The textbook's values for every row with loss, in the order of the labels."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    entropy: Tensor


def plain(p: Problem, **options: Any) -> Plain:
    o: dict[str, Any] = {"divergence": "skew_reverse_kl", "temperature": 2.0, "skew": 0.1, "beta": 0.5}
    o |= {"sft_weight": 0.1, "temperature_scaling": True, **p.extra, **options}
    kept = p.labels != IGNORE
    z_S, z_T = (
        plain_logits(
            getattr(p, f"{side}_hidden")[kept],
            getattr(p, f"{side}_weight"),
            getattr(p, f"{side}_bias"),
            o.get(f"{side}_softcap"),
            o.get(f"{side}_scale", 1.0),
        )
        for side in ("student", "teacher")
    )
    common = min(z_S.shape[-1], z_T.shape[-1])
    d = plain_divergence(o["divergence"], z_T[:, :common], z_S[:, :common], o["temperature"], o["skew"], o["beta"])
    ce = plain_cross_entropy(z_S, p.labels[kept])
    log_q = torch.log_softmax(z_S, -1)
    scale = o["temperature"] ** 2 if o["temperature_scaling"] else 1.0
    loss = o["sft_weight"] * ce + (1 - o["sft_weight"]) * scale * d
    return Plain(loss, d, ce, -(log_q.exp() * log_q).sum(-1))


def gradients(p: Problem, loss: Tensor, grad_output: Tensor | None = None) -> dict[str, Tensor]:
    leaves = p.leaves()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), grad_output)))


def assert_like_plain(p: Problem, tolerance: float = 1e-10, **options: Any) -> None:
    """Loss, every value beside it and every gradient of the mean."""
    out, expected = p.run(**options), plain(p, **options)
    assert_same(out.loss, expected.loss.mean(), tolerance, "loss")
    assert_same(out.cross_entropy, expected.cross_entropy.mean(), tolerance, "cross_entropy")
    assert_same(out.entropy, expected.entropy.mean(), tolerance, "entropy")
    assert (out.divergence - expected.divergence.mean()).abs() <= tolerance * (1 + expected.divergence.mean())
    found, wanted = gradients(p, out.loss), gradients(p, expected.loss.mean())
    for name in wanted:
        assert_same(found[name], wanted[name], tolerance, f"gradient of {name}")


class Watch(TorchDispatchMode):
    """Sees every operation: bytes of the largest tensor made, most bytes alive at once, shapes made, and GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.most_alive = self.gemms = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        self.gemms += func.overloadpacket in GEMMS
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if not isinstance(x, Tensor) or x.untyped_storage()._cdata in given:
                continue
            storage = x.untyped_storage()
            self.largest = max(self.largest, storage.nbytes())
            self.shapes.add(tuple(x.shape))
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.most_alive = max(self.most_alive, sum(size for _, size in self._alive.values()))
        return out


# The formulas.


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("divergence", "options"), VARIANTS)
def test_loss_and_gradients_are_those_of_the_formula(
    divergence: str, options: dict[str, float], temperature: float
) -> None:
    p = problem()
    assert_like_plain(p, divergence=divergence, temperature=temperature, sft_weight=0.3, **options)
    if options.get("skew") != 1.0:
        assert_like_plain(p, divergence=divergence, temperature=temperature, sft_weight=0.0, **options)


@pytest.mark.parametrize("divergence", ["skew_forward_kl", "skew_reverse_kl"])
def test_skew_of_one_leaves_the_cross_entropy_alone(divergence: str) -> None:
    p = problem()
    nothing = p.run(divergence=divergence, skew=1.0, sft_weight=0.0)
    assert abs(nothing.loss.item()) < 1e-14
    assert all(g.abs().max() < 1e-14 for g in gradients(p, nothing.loss).values())
    only_sft = gradients(p, p.run(divergence=divergence, skew=1.0, sft_weight=0.5).loss)
    expected = gradients(p, 0.5 * plain(p).cross_entropy.mean())
    for name in expected:
        assert_same(only_sft[name], expected[name], 1e-12, name)


@pytest.mark.parametrize("temperature_scaling", [True, False])
@pytest.mark.parametrize("sft_weight", [0.0, 0.25, 1.0])
def test_weights_of_the_two_terms(sft_weight: float, temperature_scaling: bool) -> None:
    assert_like_plain(problem(), sft_weight=sft_weight, temperature_scaling=temperature_scaling)


def test_cross_entropy_is_that_of_torch() -> None:
    p = problem()
    logits = plain_logits(p.student_hidden, p.student_weight, p.student_bias, None, 1.0)
    expected = functional.cross_entropy(logits.flatten(0, 1), p.labels.flatten(), ignore_index=IGNORE)
    out = p.run(sft_weight=1.0, temperature=3.0)
    assert_same(out.loss, expected, 1e-12)
    assert_same(out.cross_entropy, expected, 1e-12)
    found, wanted = gradients(p, out.loss), gradients(p, expected)
    for name in wanted:
        assert_same(found[name], wanted[name], 1e-12, name)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_kl_is_that_of_torch(divergence: str, temperature: float) -> None:
    p = problem(ignored=0.0)
    sides = [
        plain_logits(p.student_hidden, p.student_weight, p.student_bias, None, 1.0),
        plain_logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias, None, 1.0),
    ]
    log_q, log_p = (torch.log_softmax(z.flatten(0, 1) / temperature, -1) for z in sides)
    pair = (log_q, log_p) if divergence == "forward_kl" else (log_p, log_q)
    expected = temperature**2 * functional.kl_div(*pair, reduction="batchmean", log_target=True)
    out = p.run(divergence=divergence, temperature=temperature, sft_weight=0.0)
    assert_same(out.loss, expected, 1e-12)
    assert_same(out.divergence * temperature**2, expected, 1e-12)
    found, wanted = gradients(p, out.loss), gradients(p, expected)
    for name in wanted:
        assert_same(found[name], wanted[name], 1e-10, name)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_only_cross_entropy(divergence: str) -> None:
    p = problem(widths=(6, 6))
    p = replace(
        p,
        teacher_hidden=p.student_hidden.detach(),
        teacher_weight=p.student_weight.detach(),
        teacher_bias=p.student_bias.detach(),
    )
    out = p.run(divergence=divergence, sft_weight=0.0)
    assert abs(out.loss.item()) < 1e-13
    assert all(g.abs().max() < 1e-13 for g in gradients(p, out.loss).values())
    assert out.cross_entropy.item() > 0.1
    assert out.entropy.item() > 0.1


@pytest.mark.parametrize(
    "head",
    [
        {"student_softcap": 2.0},
        {"teacher_softcap": 1.5},
        {"student_scale": 0.25},
        {"teacher_scale": 3.0},
        {"student_softcap": 2.0, "teacher_softcap": 3.0, "student_scale": 1.7, "teacher_scale": 0.6},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_bias_softcap_and_scale_are_part_of_the_head(bias: bool, head: dict[str, float]) -> None:
    p = problem(bias=bias)
    assert_like_plain(p, divergence="jsd", sft_weight=0.4, **head)
    assert abs(p.run(divergence="jsd", **head).loss.item() - p.run(divergence="jsd").loss.item()) > 1e-3


@pytest.mark.parametrize("classes", [(23, 31), (31, 23)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padded_vocabularies_share_their_common_classes(
    divergence: str, temperature: float, classes: tuple[int, int]
) -> None:
    p = problem(classes=classes)
    p.labels[0, 0] = classes[0] - 1  # a label among the student's own classes where it has more
    assert_like_plain(p, divergence=divergence, temperature=temperature, sft_weight=0.3)
    extra = gradients(p, p.run(divergence=divergence, temperature=temperature, sft_weight=0.0).loss)["student_weight"]
    assert (extra[min(classes) :] == 0).all()


# Rows: which count, and how they add up.


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 10_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_memory_budget_gives_the_same_result(rows: int, reduction: str) -> None:
    p = problem(shape=(4, 9), classes=(17, 19), student_softcap=4.0)
    rows_fit = rows * 19 * 8 * 10
    for budget in (rows_fit, rows_fit + 1, 1 if rows == 1 else rows_fit - 1):
        out, expected = p.run(memory_budget=budget, reduction=reduction), plain(p)
        grad_output = torch.linspace(-1, 2, p.labels.numel(), dtype=torch.float64).view(p.labels.shape)
        if reduction == "mean":
            found, wanted = gradients(p, out.loss), gradients(p, expected.loss.mean())
        else:
            found = gradients(p, out.loss, grad_output)
            wanted = gradients(p, expected.loss, grad_output[p.labels != IGNORE])
        for name in wanted:
            assert_same(found[name], wanted[name], 1e-12, name)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_with_any_gradient_from_above(reduction: str, weighted: bool) -> None:
    p = problem()
    g = torch.Generator().manual_seed(5)
    token_weights = torch.rand(p.labels.shape, generator=g).double() * 2 if weighted else None
    kept = p.labels != IGNORE
    out, expected = p.run(reduction=reduction, token_weights=token_weights), plain(p)
    rows = expected.loss if token_weights is None else expected.loss * token_weights[kept]
    if reduction == "none":
        assert out.loss.shape == p.labels.shape
        assert (out.loss[~kept] == 0).all()
        assert (out.divergence[~kept] == 0).all()
        assert_same(out.loss[kept], rows, 1e-10, "loss")
        grad_output = torch.randn(p.labels.shape, generator=g, dtype=torch.float64)
        found, wanted = gradients(p, out.loss, grad_output), gradients(p, rows, grad_output[kept])
    else:
        total = rows.sum() if reduction == "sum" else rows.sum() / kept.sum()
        assert_same(out.loss, total, 1e-10, "loss")
        factor = torch.tensor(-1.7, dtype=torch.float64)
        found, wanted = gradients(p, out.loss, factor), gradients(p, total, factor)
    for name in wanted:
        assert_same(found[name], wanted[name], 1e-10, name)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_beside_the_loss_are_reduced_like_it(reduction: str) -> None:
    p = problem()
    weights = torch.rand(p.labels.shape, generator=torch.Generator().manual_seed(1)).double()
    out, rows, kept = p.run(reduction=reduction, token_weights=weights), plain(p), p.labels != IGNORE
    for name in ("divergence", "cross_entropy", "entropy"):
        expected = (getattr(rows, name) * weights[kept]).sum() / (kept.sum() if reduction == "mean" else 1)
        assert_same(getattr(out, name), expected, 1e-10, name)
    assert_same(0.1 * out.cross_entropy + 0.9 * 4 * out.divergence, out.loss, 1e-10)


def test_values_of_each_row() -> None:
    p = problem()
    out, rows, kept = p.run(reduction="none"), plain(p), p.labels != IGNORE
    for name in ("divergence", "cross_entropy", "entropy"):
        assert_same(getattr(out, name)[kept], getattr(rows, name), 1e-10, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_the_loss_carries_a_gradient(reduction: str) -> None:
    out = problem().run(reduction=reduction)
    assert out.loss.requires_grad
    for name in ("divergence", "cross_entropy", "entropy", "num_items"):
        assert not getattr(out, name).requires_grad, name


@pytest.mark.parametrize("num_items", [50, 12.5, torch.tensor(50), torch.tensor(12.5)], ids=str)
def test_num_items_is_the_denominator_of_the_mean(num_items: Any) -> None:
    p = problem()
    out, expected = p.run(num_items=num_items), plain(p).loss.sum() / float(num_items)
    assert_same(out.loss, expected, 1e-10)
    assert float(out.num_items) == float(num_items)
    found, wanted = gradients(p, out.loss), gradients(p, expected)
    for name in wanted:
        assert_same(found[name], wanted[name], 1e-10, name)
    assert_same(p.run(num_items=num_items, reduction="sum").loss, plain(p).loss.sum(), 1e-10)


def test_num_items_is_the_number_of_labels_that_count() -> None:
    p = problem()
    assert int(p.run().num_items) == int((p.labels != IGNORE).sum())


@pytest.mark.parametrize("ignore_index", [-1, 4, 255])
def test_another_ignore_index(ignore_index: int) -> None:
    p = problem(shape=(5, 8), ignored=0.0)
    p.labels[p.labels == 4] = 5
    moved = torch.where(torch.rand(p.labels.shape, generator=torch.Generator().manual_seed(3)) < 0.5, p.labels, IGNORE)
    usual = replace(p, labels=moved)
    other = replace(p, labels=torch.where(moved == IGNORE, ignore_index, moved))
    assert_same(other.run(ignore_index=ignore_index).loss, plain(usual).loss.mean(), 1e-12)


def test_ignored_rows_may_hold_anything() -> None:
    p = problem()
    dirty = p.to(torch.float64)
    with torch.no_grad():
        dirty.student_hidden[p.labels == IGNORE] = math.nan
        dirty.teacher_hidden[p.labels == IGNORE] = math.inf
    out = dirty.run()
    assert_same(out.loss, plain(p).loss.mean(), 1e-10)
    found, wanted = gradients(dirty, out.loss), gradients(p, plain(p).loss.mean())
    for name in wanted:
        assert_same(found[name], wanted[name], 1e-10, name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_with_loss(reduction: str) -> None:
    p = problem(ignored=1.1, token_weights=torch.rand(3, 7))
    out = p.run(reduction=reduction)
    assert (out.loss == 0).all()
    assert out.loss.shape == (p.labels.shape if reduction == "none" else ())
    found = gradients(p, out.loss.sum())
    assert set(found) == {"student_hidden", "student_weight", "student_bias"}
    assert all((g == 0).all() for g in found.values())


@pytest.mark.parametrize("shape", [(1,), (1, 1), (), (2, 3, 4), (0,), (2, 0)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    p = problem(shape=shape, ignored=0.0)
    if p.labels.numel():
        assert_like_plain(p)
    else:
        assert p.run().loss.item() == 0
    assert p.run(reduction="none").loss.shape == shape


def test_labels_of_32_bits() -> None:
    p = problem()
    assert_same(replace(p, labels=p.labels.int()).run().loss, p.run().loss, 0.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_option(data: st.DataObject) -> None:
    draw = data.draw
    small, padding = draw(st.integers(2, 40), "classes"), draw(st.integers(0, 20), "padding")
    classes = (small, small + min(padding, small // 2))
    p = problem(
        shape=tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "shape")),
        widths=(draw(st.integers(1, 9), "D_S"), draw(st.integers(1, 9), "D_T")),
        classes=classes if draw(st.booleans(), "teacher is larger") else classes[::-1],
        bias=draw(st.booleans(), "bias"),
        ignored=draw(st.sampled_from([0.0, 0.5]), "ignored"),
        seed=draw(st.integers(0, 2**31), "seed"),
    )
    if (p.labels == IGNORE).all():
        p.labels.view(-1)[0] = 0
    divergence, options = draw(st.sampled_from(VARIANTS), "divergence")
    softcap = draw(st.sampled_from([None, 3.0]), "softcap")
    assert_like_plain(
        p,
        tolerance=1e-8,
        divergence=divergence,
        temperature=draw(st.sampled_from(TEMPERATURES), "temperature"),
        sft_weight=draw(st.sampled_from([0.1, 0.5]), "sft_weight"),
        memory_budget=draw(st.integers(1, 40_000), "budget"),
        student_softcap=softcap,
        **options,
    )


# Tensors as they come.


def test_non_contiguous_inputs() -> None:
    p = problem(shape=(4, 6), widths=(5, 5))
    expected = p.run()
    wanted = gradients(p, expected.loss)
    far = replace(
        p,
        student_hidden=torch.stack([p.student_hidden.detach()] * 2, -1)[..., 0].requires_grad_(),
        student_weight=p.student_weight.detach().T.contiguous().T.requires_grad_(),
        student_bias=torch.stack([p.student_bias.detach()] * 2, -1)[:, 1].requires_grad_(),
        teacher_hidden=p.teacher_hidden.transpose(0, 1).contiguous().transpose(0, 1),
        teacher_weight=p.teacher_weight.T.contiguous().T,
        labels=torch.cat([p.labels, p.labels], 1)[:, :6],
    )
    tensors = [t for t in vars(far).values() if isinstance(t, Tensor)]
    assert sum(not t.is_contiguous() for t in tensors) == 6
    out = far.run()
    assert_same(out.loss, expected.loss, 1e-12)
    for name, g in gradients(far, out.loss).items():
        assert_same(g, wanted[name], 1e-12, name)


def test_inputs_are_left_as_they_are() -> None:
    p = problem(ignored=0.0)
    before = p.to(torch.float64)
    p.run().loss.backward()
    p.run(reduction="none").loss.sum().backward()
    for name, value in vars(before).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(p, name)), name
    student, teacher = torch.randn(2, 6, 9)
    kept = student.clone(), teacher.clone()
    distillation_loss_from_logits(student.requires_grad_(), teacher, torch.zeros(6, dtype=torch.long)).loss.backward()
    assert torch.equal(student, kept[0])
    assert torch.equal(teacher, kept[1])


def test_teacher_gets_no_gradient() -> None:
    p = problem()
    for name in ("teacher_hidden", "teacher_weight", "teacher_bias"):
        getattr(p, name).requires_grad_()
    p.run().loss.backward()
    p.run(reduction="none").loss.sum().backward()
    assert p.student_hidden.grad is not None
    assert p.teacher_hidden.grad is p.teacher_weight.grad is p.teacher_bias.grad is None


@pytest.mark.parametrize("trained", ["student_hidden", "student_weight", "student_bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_each_gradient_alone(trained: str, reduction: str) -> None:
    p = problem()
    wanted = gradients(p, plain(p).loss.sum())[trained]
    for name in ("student_hidden", "student_weight", "student_bias"):
        getattr(p, name).requires_grad_(name == trained)
    p.run(reduction=reduction).loss.sum().backward()
    assert_same(getattr(p, trained).grad, wanted, 1e-10)
    others = {"student_hidden", "student_weight", "student_bias"} - {trained}
    assert all(getattr(p, name).grad is None for name in others)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_twice_adds_up(reduction: str) -> None:
    p = problem()
    wanted = gradients(p, plain(p).loss.sum())
    loss = p.run(reduction=reduction).loss.sum()
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    for name, leaf in p.leaves().items():
        assert_same(leaf.grad, 3 * wanted[name], 1e-10, name)

    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    student.requires_grad_()
    out = distillation_loss_from_logits(student, teacher, torch.zeros(6, dtype=torch.long), reduction=reduction)
    (once,) = torch.autograd.grad(out.loss.sum(), student, retain_graph=True)
    (again,) = torch.autograd.grad(out.loss.sum(), student)
    assert_same(again, once, 0.0)


@pytest.mark.parametrize("budget", [None, 60_000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("divergence", ["skew_reverse_kl", "forward_kl"])
def test_logits_that_are_there_already(divergence: str, reduction: str, budget: int | None) -> None:
    p = problem(shape=(40,), student_softcap=7.0, student_scale=0.5)
    options: dict[str, Any] = {"divergence": divergence, "reduction": reduction, "memory_budget": budget}
    z = plain_logits(p.student_hidden, p.student_weight, p.student_bias, None, 0.5).detach()
    wanted = p.run(**options)
    found = p.run(student_logits=z.clone(), **options)
    for name, value in vars(wanted).items():
        assert_same(getattr(found, name), value, 1e-12, name)
    of_wanted, of_found = (gradients(p, out.loss.sum()) for out in (wanted, found))
    for name, value in of_wanted.items():
        assert_same(of_found[name], value, 1e-12, name)
    assert not torch.equal(p.run(student_logits=z + torch.randn(23), **options).loss, wanted.loss)

    loss = p.run(student_logits=z.clone(), **options).loss.sum()  # its second backward finds them overwritten
    loss.backward(retain_graph=True)
    loss.backward()
    for name, leaf in p.leaves().items():
        assert_same(leaf.grad, 2 * of_wanted[name], 1e-12, name)


@pytest.mark.parametrize("change", [lambda z: z.float(), lambda z: z[:, :-1], lambda z: z[:-1]])
def test_given_logits_must_be_the_heads(change: Any) -> None:
    p = problem(shape=(6,))
    with pytest.raises(UserError, match=r"student_logits must be \(6, 23\) in torch.float64"):
        p.run(student_logits=change(torch.zeros(6, 23, dtype=torch.float64)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(reduction: str) -> None:
    rows, classes, chunk = 3000, 1008, 32
    p = problem(shape=(rows,), widths=(8, 8), classes=(classes, classes), bias=True, ignored=0.2).to(torch.float32)
    budget = chunk * classes * 4 * (2 + EAGER_BUFFERS)
    free_workspace()
    with Watch() as watch:
        p.run(memory_budget=budget, reduction=reduction).loss.mean().backward()
    assert watch.largest == chunk * classes * 4
    assert (chunk, classes) in watch.shapes
    assert p.student_hidden.grad is not None
    fixed = 6 * 4 * (rows * 16 + classes * 9) + 10 * 8 * rows  # packed rows, their gradients, and values per row
    assert watch.most_alive <= budget + fixed


def test_the_smallest_budget_takes_one_row_at_a_time() -> None:
    p = problem(shape=(6,), widths=(2, 2), classes=(400, 400), bias=False, ignored=0.0).to(torch.float32)
    with Watch() as watch:
        p.run(memory_budget=1, order="rows")
    assert (1, 400) in watch.shapes
    assert not any(len(shape) == 2 and shape[1] == 400 and shape[0] > 1 for shape in watch.shapes - {(2, 400)})


# Bytes of ten rows of 23 classes: the aligned logits of both sides and eager mode's temporaries, all float64.
TEN_ROWS = 10 * (2 * 32 + EAGER_BUFFERS * 23) * 8


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        (("student_hidden", "student_weight", "student_bias"), 4),
        (("student_hidden",), 3),
        (("student_weight",), 3),
        (("student_bias",), 2),
        ((), 2),
    ],
)
def test_no_matrix_product_that_nobody_asked_for(trained: tuple[str, ...], products: int) -> None:
    p = problem(shape=(40,), widths=(6, 7), ignored=0.0)
    for name in ("student_hidden", "student_weight", "student_bias"):
        getattr(p, name).requires_grad_(name in trained)
    with Watch() as watch:
        out = p.run(memory_budget=TEN_ROWS, order="rows")
        if trained:
            out.loss.backward()
    assert watch.gemms == 4 * products
    assert ((23, 6) in watch.shapes) == ("student_weight" in trained)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients_there_is_no_work_for_them(context: type, reduction: str) -> None:
    p = problem(shape=(40,), widths=(6, 7), ignored=0.0)
    with context(), Watch() as watch:
        out = p.run(memory_budget=TEN_ROWS, order="rows", reduction=reduction)
    assert not out.loss.requires_grad
    assert_same(out.loss.mean(), plain(p).loss.mean(), 1e-10)
    assert watch.gemms == 4 * 2
    assert (23, 6) not in watch.shapes


# Numbers as they come.


def in_dtype(p: Problem, dtype: torch.dtype, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain PyTorch: the matrix products in `dtype`, softmaxes in float32, as a careful loop would write it."""
    q = p.to(dtype)
    z_S = (q.student_hidden @ q.student_weight.T + q.student_bias).float()
    z_T = (q.teacher_hidden @ q.teacher_weight.T + q.teacher_bias).float()
    kept = p.labels != IGNORE
    d = plain_divergence(options["divergence"], z_T[kept], z_S[kept], 2.0, 0.1, 0.5)
    loss = (0.1 * plain_cross_entropy(z_S[kept], p.labels[kept]) + 0.9 * 4 * d).mean()
    return loss, gradients(q, loss)


def error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "slack"), [(torch.bfloat16, 2e-3), (torch.float16, 3e-4), (torch.float32, None)])
def test_no_further_from_the_truth_than_plain_torch(
    dtype: torch.dtype, slack: float | None, divergence: str, seed: int
) -> None:
    p = problem(shape=(4, 24), widths=(32, 48), classes=(200, 200), seed=seed)
    if slack is None:  # a product and a softmax, and of the errors of rows the mean
        slack = rounding(48 + 200) / int((p.labels != IGNORE).sum()) ** 0.5
    # Where p is q but for rounding, the total variation's gradient has either sign: either error may be the larger.
    luck = 2.0 if divergence == "tvd" else 1.0
    with torch.no_grad():  # both sides start from the same rounded numbers; logits of a few units
        for name in ("student_weight", "teacher_weight"):
            getattr(p, name).mul_(0.3)
    p = p.to(dtype).to(torch.float64)
    truth = plain(p, divergence=divergence).loss.mean()
    wanted = gradients(p, truth)
    plain_value, plain_gradients = in_dtype(p, dtype, divergence=divergence)
    q = p.to(dtype)
    out = q.run(divergence=divergence, memory_budget=17 * 200 * 4 * 10)
    assert out.loss.dtype == torch.float32
    assert error(out.loss, truth) <= error(plain_value, truth) + slack
    for name, g in gradients(q, out.loss).items():
        assert g.dtype == dtype
        assert error(g, wanted[name]) <= luck * error(plain_gradients[name], wanted[name]) + slack, name
        assert error(g, wanted[name]) < 0.1


def test_head_gradient_does_not_lose_digits_chunk_by_chunk() -> None:
    p = problem(shape=(600,), widths=(4, 4), classes=(10, 10), ignored=0.0).to(torch.bfloat16).to(torch.float64)
    wanted = gradients(p, plain(p, divergence="forward_kl").loss.mean())
    _, of_torch = in_dtype(p, torch.bfloat16, divergence="forward_kl")
    q = p.to(torch.bfloat16)
    found = gradients(q, q.run(divergence="forward_kl", memory_budget=2 * 10 * 4 * 10).loss)
    for name in ("student_weight", "student_bias"):
        assert error(found[name], wanted[name]) <= error(of_torch[name], wanted[name]) + 1e-3, name


@pytest.mark.parametrize("hidden", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("teacher", [torch.bfloat16, torch.float32])
def test_mixed_dtypes(hidden: torch.dtype, head: torch.dtype, teacher: torch.dtype) -> None:
    p = problem(shape=(30,), ignored=0.0).to(torch.bfloat16).to(torch.float64)
    fine, high, low = p.to(hidden), p.to(head), p.to(teacher)
    q = replace(
        fine,
        student_weight=high.student_weight,
        student_bias=high.student_bias,
        teacher_hidden=low.teacher_hidden,
        teacher_weight=low.teacher_weight,
        teacher_bias=low.teacher_bias,
    )
    out, truth = q.run(), plain(p).loss.mean()
    found, wanted = gradients(q, out.loss), gradients(p, truth)
    exact = (hidden, head, teacher) == (torch.float32,) * 3
    assert error(out.loss, truth) < (1e-6 if exact else 2e-2)
    for name in wanted:
        assert found[name].dtype == getattr(q, name).dtype
        assert error(found[name], wanted[name]) < (1e-5 if exact else 5e-2), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_runs_the_products_in_its_dtype(reduction: str) -> None:
    p = problem(shape=(30,)).to(torch.float32)
    narrow = p.to(torch.bfloat16)
    expected_loss = narrow.run(reduction=reduction).loss.sum()
    expected = gradients(narrow, expected_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = p.run(reduction=reduction).loss.sum()
        found = gradients(p, loss)
    assert_same(loss, expected_loss, 0.0)
    for name, x in found.items():
        assert x.dtype == torch.float32
        assert_same(x, expected[name].float(), 2**-8, name)


def test_autocast_leaves_float64_alone() -> None:
    p = problem(shape=(30,))
    outside = p.run().loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(p.run().loss, outside, 0.0)


def test_float64_is_not_rounded_on_the_way() -> None:
    p = problem()
    weights = torch.rand(p.labels.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    kept = p.labels != IGNORE
    for out in (p.run(token_weights=weights), p.run(token_weights=weights, reduction="none")):
        assert out.loss.dtype == out.divergence.dtype == torch.float64
        total = out.loss.sum() if out.loss.dim() else out.loss * kept.sum()
        assert_same(total, (plain(p).loss * weights[kept]).sum(), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize(("divergence", "options"), VARIANTS)
def test_classes_ruled_out_never_give_nan(
    divergence: str, options: dict[str, float], side: str, dtype: torch.dtype
) -> None:
    """-inf for some classes, in different places of the two sides, some of them labels."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 6, 12) * 2).to(dtype)
    if side in ("student", "both"):
        student[:, 3:6] = -math.inf
    if side in ("teacher", "both"):
        teacher[:, 5:8] = -math.inf
    student.requires_grad_()
    for temperature in (0.5, 2.0):
        out = distillation_loss_from_logits(
            student,
            teacher,
            torch.arange(6) * 2,
            divergence=divergence,
            temperature=temperature,
            **options,
        )
        (gradient,) = torch.autograd.grad(out.loss, student)
        assert gradient.isfinite().all()
        assert gradient.any()
        for name in ("loss", "divergence", "cross_entropy", "entropy"):
            assert not getattr(out, name).isnan().any(), name


@pytest.mark.parametrize(("divergence", "options"), VARIANTS)
def test_classes_that_both_rule_out_are_as_if_absent(divergence: str, options: dict[str, float]) -> None:
    p = problem(bias=True, ignored=0.0)
    small = Problem(
        *(x.detach()[..., :20, :] if "weight" in n else x.detach() for n, x in list(vars(p).items())[:4]),
        p.labels % 20,
        p.student_bias.detach()[:20],
        p.teacher_bias.detach()[:20],
    )
    with torch.no_grad():
        p.student_bias[20:] = p.teacher_bias[20:] = -math.inf
    masked = replace(p, labels=small.labels)
    for name in ("student_hidden", "student_weight", "student_bias"):
        getattr(small, name).requires_grad_()
    out, expected = masked.run(divergence=divergence, **options), small.run(divergence=divergence, **options)
    assert_same(out.loss, expected.loss, 1e-12)
    assert_same(out.entropy, expected.entropy, 1e-12)
    found, wanted = gradients(masked, out.loss), gradients(small, expected.loss)
    assert_same(found["student_hidden"], wanted["student_hidden"], 1e-12)
    for name in ("student_weight", "student_bias"):
        assert_same(found[name][:20], wanted[name], 1e-12, name)
        assert (found[name][20:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [50.0, 300.0, 1e4, 1e9])
@pytest.mark.parametrize(("divergence", "options"), VARIANTS)
def test_certain_teachers_never_give_nan(
    divergence: str, options: dict[str, float], peak: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 9).to(dtype)
    teacher[torch.arange(5), torch.arange(5)] = peak
    student.requires_grad_()
    for temperature in (0.5, 1.0, 4.0):
        out = distillation_loss_from_logits(
            student, teacher, torch.arange(5) + 1, divergence=divergence, temperature=temperature, **options
        )
        (gradient,) = torch.autograd.grad(out.loss, student)
        assert gradient.isfinite().all()
        assert gradient.any()
        assert out.loss.isfinite()
        if divergence == "forward_kl" and peak > 1000:  # a one-hot teacher makes it the cross-entropy at T
            log_q = torch.log_softmax(student.detach().float() / temperature, -1)
            assert_same(out.divergence, -log_q.diagonal()[:5].mean(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("divergence", "options"), VARIANTS)
def test_certain_students_never_give_nan(divergence: str, options: dict[str, float], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 9).to(dtype)
    student[torch.arange(5), torch.arange(5)] = 1e4
    student.requires_grad_()
    out = distillation_loss_from_logits(student, teacher, torch.arange(5) + 1, divergence=divergence, **options)
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert out.loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


# The other doors.


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("classes", [(12, 12), (12, 15), (15, 12)])
def test_loss_from_logits_is_that_from_hidden_states(classes: tuple[int, int], softcap: float | None) -> None:
    p = problem(classes=classes)
    raw = [
        plain_logits(p.student_hidden, p.student_weight, p.student_bias, None, 1.0).detach().requires_grad_(),
        plain_logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias, None, 1.0),
    ]
    options: dict[str, Any] = {"divergence": "jsd", "beta": 0.3, "temperature": 1.5, "sft_weight": 0.2}
    out = distillation_loss_from_logits(
        *raw, p.labels, **options, student_softcap=softcap, teacher_softcap=softcap, memory_budget=3 * 15 * 8 * 10
    )
    expected = plain(p, **options, student_softcap=softcap, teacher_softcap=softcap)
    assert_same(out.loss, expected.loss.mean(), 1e-10)
    (by_logits,) = torch.autograd.grad(out.loss, raw[0])
    hidden = gradients(p, expected.loss.mean())["student_hidden"]
    assert_same(by_logits @ p.student_weight, hidden, 1e-10)
    assert (by_logits[p.labels == IGNORE] == 0).all()


def test_token_cross_entropy_is_that_of_torch() -> None:
    p = problem(shape=(37,), ignored=0.0)
    logits = plain_logits(p.student_hidden, p.student_weight, p.student_bias, 3.0, 0.5)
    head = Head(p.student_weight, p.student_bias, 3.0, 0.5)
    found = token_cross_entropy(p.student_hidden, head, p.labels, memory_budget=5 * 23 * 8 * 10)
    assert not found.requires_grad
    assert_same(found, functional.cross_entropy(logits, p.labels, reduction="none"), 1e-12)


def test_module_keeps_its_options() -> None:
    p = problem(bias=False)
    tensors = (p.student_hidden, p.student_weight, p.teacher_hidden, p.teacher_weight, p.labels)
    module = DistillationLoss(divergence="jsd", beta=0.3, temperature=1.5)
    assert_same(module(*tensors).loss, plain(p, divergence="jsd", beta=0.3, temperature=1.5).loss.mean(), 1e-10)
    again = plain(p, divergence="jsd", beta=0.3, temperature=4.0, sft_weight=0.6).loss.mean()
    assert_same(module(*tensors, temperature=4.0, sft_weight=0.6).loss, again, 1e-10)
    assert_same(module(*tensors).loss, plain(p, divergence="jsd", beta=0.3, temperature=1.5).loss.mean(), 1e-10)
    assert "divergence='jsd'" in repr(module)
    assert "temperature=1.5" in repr(module)
    assert list(module.parameters()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temprature": 2.0}, "did you mean 'temperature'"),
        ({"divergence": "forward_lk"}, "did you mean 'forward_kl'"),
        ({"temperature": 0}, "temperature must be"),
        ({"reduction": "total"}, "unknown reduction"),
    ],
)
def test_module_refuses_bad_options_when_it_is_made(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        DistillationLoss(**options)


# A user's mistakes: the argument is named.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", x) for x in (0, 0.0, -1.0, math.nan, math.inf, "2", None)],
        *[("skew", x) for x in (-0.1, 1.1, math.nan, "0.1", None)],
        *[("beta", x) for x in (-0.1, 1.1, math.nan)],
        *[("sft_weight", x) for x in (-0.1, 1.1, math.nan)],
        *[("student_softcap", x) for x in (0.0, -30.0, math.nan, math.inf)],
        *[("teacher_softcap", x) for x in (0.0, -30.0)],
        *[("student_scale", x) for x in (0.0, math.nan, None)],
        *[("teacher_scale", x) for x in (-1.0, math.inf)],
        *[("memory_budget", x) for x in (0, -1, 1.5, "1GB")],
        *[("num_items", x) for x in (-1, math.nan, "many")],
        ("backend", "cuda"),
        ("reduction", "batchmean"),
        ("divergence", "kl"),
    ],
)
def test_bad_option_is_named(name: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        problem().run(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_few_logits_are_not_compiled_for() -> None:
    def chosen(name: str = "auto", classes: int = 49152) -> str:
        return chosen_backend(name, torch.device("cpu"), torch.float32, classes, None)

    assert chosen() == "compile"
    with expect_logits(1e9):
        assert (chosen(), chosen("compile")) == ("eager", "compile")
        with expect_logits(1e13):
            assert (chosen(), chosen(classes=300)) == ("compile", "eager")
        assert chosen() == "eager"
    assert chosen() == "compile"


@pytest.mark.parametrize(
    ("name", "given", "nearest"),
    [("backend", "eagre", "eager"), ("reduction", "means", "mean"), ("divergence", "reversekl", "reverse_kl")],
)
def test_misspelt_name_gets_a_suggestion(name: str, given: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown {name} {given!r}; did you mean {nearest!r}"):
        problem().run(**{name: given})


def replaced(**tensors: Any) -> Problem:
    return replace(problem(), **tensors)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (replaced(student_hidden=torch.zeros(3, 7, 5, dtype=torch.long)), ["student_hidden", "floating", "int64"]),
        (replaced(teacher_hidden=torch.zeros(3, 7, 8, dtype=torch.int32)), ["teacher_hidden", "floating", "int32"]),
        (replaced(student_hidden=torch.zeros(3, 6, 5)), ["student_hidden", "(3, 6, 5)", "labels", "(3, 7)"]),
        (replaced(student_hidden=torch.zeros(21, 5)), ["student_hidden", "(21, 5)", "labels", "(3, 7)"]),
        (replaced(teacher_hidden=torch.zeros(3, 8, 8)), ["teacher_hidden", "(3, 8, 8)", "labels", "(3, 7)"]),
        (replaced(student_hidden=torch.zeros(3, 7, 4)), ["student_hidden", "4 wide", "student_weight", "(23, 5)"]),
        (replaced(teacher_hidden=torch.zeros(3, 7, 9)), ["teacher_hidden", "9 wide", "teacher_weight", "(23, 8)"]),
        (replaced(student_weight=torch.zeros(5, 23)), ["student_hidden", "student_weight", "(5, 23)"]),
        (replaced(student_weight=torch.zeros(23)), ["student_weight", "[V, D]", "(23,)"]),
        (replaced(teacher_weight=torch.zeros(23, 8, dtype=torch.int8)), ["teacher_weight", "floating", "int8"]),
        (replaced(student_bias=torch.zeros(22)), ["student_bias", "(23,)", "(22,)"]),
        (replaced(teacher_bias=torch.zeros(1, 23)), ["teacher_bias", "(23,)", "(1, 23)"]),
        (replaced(labels=torch.zeros(3, 7)), ["labels", "integers", "float32"]),
        (replaced(labels=torch.full((3, 7), 23)), ["labels", "0 to 22", "got 23"]),
        (replaced(labels=torch.full((3, 7), -1)), ["labels", "0 to 22", "got -1"]),
        (replaced(teacher_weight=torch.zeros(40, 8), teacher_bias=None), ["23 and 40 classes", "tokenizer"]),
        (replaced(teacher_weight=torch.zeros(11, 8), teacher_bias=None), ["23 and 11 classes", "tokenizer"]),
        (replaced(student_hidden=torch.zeros(3, 7, 5, device="meta")), ["student_hidden", "meta", "labels", "cpu"]),
        (replaced(extra={"token_weights": torch.ones(21)}), ["token_weights", "(21,)", "labels", "(3, 7)"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else "",
)
def test_bad_tensor_is_named(bad: Problem, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        bad.run()
    for word in words:
        assert word in str(caught.value)


def test_vocabularies_a_thousand_classes_apart_are_padding() -> None:
    classes = (3000, 4024)
    assert problem(shape=(2,), ignored=0.0, classes=classes).run().loss.isfinite()
    with pytest.raises(UserError, match="3000 and 4025 classes"):
        problem(shape=(2,), ignored=0.0, classes=(3000, 4025)).run()


def test_bad_logits_are_named_as_logits() -> None:
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(UserError, match="student_logits must be floating point"):
        distillation_loss_from_logits(torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5), labels)
    with pytest.raises(UserError, match=r"teacher_logits has shape \(2, 5\)"):
        distillation_loss_from_logits(torch.zeros(3, 5), torch.zeros(2, 5), labels)


def test_labels_are_checked_against_the_students_classes() -> None:
    p = problem(classes=(20, 25), ignored=0.0)
    p.labels[0, 0] = 20
    with pytest.raises(UserError, match="0 to 19 or ignore_index, got 20"):
        p.run()
