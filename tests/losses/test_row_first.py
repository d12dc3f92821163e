"""Divergences that need numbers of a row before its terms: concrete score distillation and adaptive KL.

The definitions here are the papers': all pairs of classes, all classes sorted, weights as constants of the gradient.
"""

from typing import Any

import pytest
import torch
from tiny import ROW_FIRST, assert_same, plain_cross_entropy, plain_head_share
from torch import Tensor

from srd_fast import (
    SRDConfig,
    TopK,
    UserError,
    compact_distillation_loss,
    distillation_loss,
    distillation_loss_from_logits,
)
from srd_fast.kernels import RowDivergence
from srd_fast.kernels.row_first import find_head

WEIGHTS = {"csd": "SS", "csd_ts": "TS", "csd_us": "US", "csd_uu": "UU"}


def of_pairs(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D of each row: over all pairs of classes, or from sorted classes."""
    p, q = log_p.exp(), log_q.exp()
    if name == "adaptive_kl":
        share = plain_head_share(p, q)
        return share * (p * (log_p - log_q)).sum(-1) + (1 - share) * (q * (log_q - log_p)).sum(-1)
    weights = {"S": q.detach(), "T": p, "U": torch.full_like(p, 1 / p.shape[-1])}
    w_1, w_2 = (weights[letter] for letter in WEIGHTS[name])
    d = log_q - log_p
    pairs = (d[..., :, None] - d[..., None, :]).square()
    return 0.25 * (w_1[..., :, None] * w_2[..., None, :] * pairs).sum((-1, -2))


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.long)])
@pytest.mark.parametrize("order", ["rows", "classes"])
@pytest.mark.parametrize("name", ROW_FIRST)
def test_loss_and_gradients_are_those_of_the_definition(name: str, order: str, backend: str) -> None:
    """With a padded vocabulary, softcaps, a bias, weights of tokens, an ignored label, and chunks or blocks."""
    g = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    # One teacher is more certain than a half, one less.
    h_S, w_S, b_S, h_T, w_T = random(7, 6), random(70, 6), random(70), random(7, 9) * 0.2, random(61, 9) * 3
    h_T[1] *= 8
    for x in (h_S, w_S, b_S):
        x.requires_grad_()
    labels = torch.tensor([69, 4, -100, 60, 0, 12, 33])
    token_weights, kept = torch.rand(7, generator=g, dtype=torch.float64), labels != -100
    z_S, z_T = 7 * torch.tanh((h_S @ w_S.T + b_S) / 7), 9 * torch.tanh(h_T @ w_T.T / 9)
    for temperature, known in ((1.0, False), (1.7, True), (2.0, False)):
        options: dict[str, Any] = {"teacher_lse": (z_T / temperature).logsumexp(-1)} if known else {}
        out = distillation_loss(
            h_S, w_S, h_T, w_T, labels, divergence=name, temperature=temperature, sft_weight=0.3, student_bias=b_S,
            student_softcap=7.0, teacher_softcap=9.0, token_weights=token_weights, backend=backend, order=order,
            memory_budget=4000, **options,
        )  # fmt: skip
        d = of_pairs(
            name, torch.log_softmax(z_T[kept] / temperature, -1), torch.log_softmax(z_S[kept, :61] / temperature, -1)
        )
        rows = 0.3 * plain_cross_entropy(z_S[kept], labels[kept]) + 0.7 * temperature**2 * d
        expected = (rows * token_weights[kept]).mean()
        assert_same(out.loss, expected, 1e-10, "loss")
        found = torch.autograd.grad(out.loss, (h_S, w_S, b_S))
        for x, y in zip(found, torch.autograd.grad(expected, (h_S, w_S, b_S), retain_graph=True)):
            assert_same(x, y, 1e-10, "gradient")
        with torch.no_grad():
            alone = distillation_loss(
                h_S, w_S, h_T, w_T, labels, divergence=name, temperature=temperature, sft_weight=0.3, student_bias=b_S,
                student_softcap=7.0, teacher_softcap=9.0, token_weights=token_weights, backend=backend, order=order,
                memory_budget=4000, **options,
            )  # fmt: skip
        assert_same(alone.divergence, (d * token_weights[kept]).mean(), 1e-10, "value without a gradient")


def on_logits(name: str, z_S: Tensor, z_T: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """D of each row, and its gradient on the logits, where nothing else is in the loss."""
    leaf = z_S.clone().requires_grad_()
    labels = torch.zeros(len(z_S), dtype=torch.long)
    options = {"temperature": 1.0, "sft_weight": 0.0, "reduction": "none", **options}
    out = distillation_loss_from_logits(leaf, z_T, labels, divergence=name, **options)
    out.loss.sum().backward()
    assert leaf.grad is not None
    return out.divergence, leaf.grad


def test_gradients_of_concrete_scores_by_hand() -> None:
    """Two classes. d = (1, -2) + a constant; q = (1/4, 3/4), p, u = (1/2, 1/2)."""
    z_S = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    z_T = z_S - torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    p = torch.softmax(z_T, -1)[0, 0].item()
    # Each pair is counted twice in 1/4 sum, and d_0 - d_1 = 3.
    for name, pair in (
        ("csd", 1 / 4 * 3 / 4),
        ("csd_ts", (p * 3 / 4 + (1 - p) * 1 / 4) / 2),
        ("csd_us", (1 / 2 * 3 / 4 + 1 / 2 * 1 / 4) / 2),
        ("csd_uu", 1 / 4),
    ):
        value, gradient = on_logits(name, z_S, z_T)
        assert value.item() == pytest.approx(pair * 9 / 2, abs=1e-12)
        assert gradient[0].tolist() == pytest.approx([pair * 3, -pair * 3], abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_concrete_scores_weighted_by_the_student_have_the_gradient_of_the_reverse_kl(temperature: float) -> None:
    torch.manual_seed(0)
    z_S, z_T = (torch.randn(4, 30, dtype=torch.float64) * 3 for _ in range(2))
    value, gradient = on_logits("csd", z_S, z_T, temperature=temperature)
    of_kl, expected = on_logits("reverse_kl", z_S, z_T, temperature=temperature)
    assert_same(gradient, expected, 1e-12, "gradient")
    assert ((value - of_kl).abs() > 1e-2).any()
    # As the authors write it: raw logits, with T in the weights alone.
    q, d = torch.softmax(z_S / temperature, -1), z_S - z_T
    assert_same(gradient, q * (d - (q * d).sum(-1, keepdim=True)), 1e-12, "gradient of raw logits")


@pytest.mark.parametrize("name", ROW_FIRST)
def test_equal_and_shifted_rows_are_at_distance_zero(name: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 20, dtype=torch.float64)
    for z_S in (z, z + 5.0):
        value, gradient = on_logits(name, z_S, z)
        assert value.abs().max() < 1e-13
        assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize("name", ROW_FIRST)
def test_classes_that_both_rule_out_are_not_there(name: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        z_S, z_T = (torch.randn(3, 20, dtype=dtype) for _ in range(2))
        padded = [torch.cat((z, torch.full((3, 4), -torch.inf, dtype=dtype)), 1) for z in (z_S, z_T)]
        value, gradient = on_logits(name, *padded)
        expected, expected_gradient = on_logits(name, z_S, z_T)
        assert_same(value, expected, 1e-6)
        assert_same(gradient[:, :20], expected_gradient, 1e-6)
        assert not gradient[:, 20:].any()


@pytest.mark.parametrize("name", ROW_FIRST)
def test_certain_students_and_teachers_give_no_nan(name: str) -> None:
    z = torch.zeros(4, 8)
    z[0, 1] = z[1, 2] = 200.0
    z[2, 3:] = -1e30
    for z_S, z_T in ((z, z.roll(1, 0)), (z, torch.randn(4, 8)), (torch.randn(4, 8), z[:2].repeat(2, 1))):
        value, gradient = on_logits(name, z_S, z_T)
        assert not value.isnan().any()
        assert not gradient.isnan().any()


def test_adaptive_kl_by_hand() -> None:
    """The head of (.45, .3, .25) is its first class: with the second it is more than a half. Shares by the gaps."""
    p, q = (torch.tensor([x], dtype=torch.float64) for x in ([0.45, 0.3, 0.25], [0.15, 0.35, 0.5]))
    forward, reverse = ((a * (a / b).log()).sum().item() for a, b in ((p, q), (q, p)))
    # Gaps .3 | .05, .25. Turned round, with head and tail the other way, the two KLs would change places.
    value, _ = on_logits("adaptive_kl", q.log(), p.log())
    assert value.item() == pytest.approx(0.5 * forward + 0.5 * reverse, abs=1e-12)
    q = torch.tensor([[0.40, 0.1, 0.5]], dtype=torch.float64)
    forward, reverse = ((a * (a / b).log()).sum().item() for a, b in ((p, q), (q, p)))
    value, _ = on_logits("adaptive_kl", q.log(), p.log())  # gaps .05 | .2, .25
    assert value.item() == pytest.approx(0.1 * forward + 0.9 * reverse, abs=1e-12)
    assert abs(value.item() - (0.9 * forward + 0.1 * reverse)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0, 4.0, 30.0])
def test_the_head_is_that_of_a_sort(dtype: torch.dtype, spread: float) -> None:
    """A row without ties, certain or not; of classes that are all alike all are the likeliest."""
    torch.manual_seed(1)
    log_p = torch.log_softmax(torch.randn(40, 301, dtype=dtype) * spread, -1)
    found = log_p >= find_head(
        log_p.amax(-1, keepdim=True), lambda begin: (log_p.exp() * (log_p >= begin)).sum(-1, keepdim=True)
    )
    values, order = log_p.exp().sort(-1, descending=True)
    head = values.cumsum(-1) <= 0.5
    head[:, 0] = True
    if spread == 0.0:
        head[:] = True
    assert torch.equal(found, torch.zeros_like(head).scatter(-1, order, head))


def test_equally_likely_classes_are_in_one_part() -> None:
    """Of .4, .2, .2, .2 one of the three would fit, all do not. Beside .5 none of .1 fits."""
    for row, head in (
        ([0.2, 0.4, 0.2, 0.2], [1]),
        ([0.1, 0.1, 0.5, 0.1, 0.1, 0.1], [2]),
        ([0.2, 0.3, 0.3, 0.2], [1, 2]),
    ):
        log_p = torch.tensor([row], dtype=torch.float64).log()
        begin = find_head(log_p.amax(-1, keepdim=True), lambda at, x=log_p: (x.exp() * (x >= at)).sum(-1, keepdim=True))
        assert (log_p >= begin)[0].nonzero().squeeze(1).tolist() == head


@pytest.mark.parametrize("name", ["csd", "csd_ts"])
def test_top_k_with_all_but_one_class_is_exact(name: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(9, 5, dtype=torch.float64)
    z_T, labels = torch.randn(4, 9, dtype=torch.float64), torch.tensor([0, 3, 8, 2])
    top = torch.log_softmax(z_T / 2.0, -1).topk(8)
    teacher = TopK(top.indices, top.values, torch.log1p(-top.values.exp().sum(1)))
    found = compact_distillation_loss(hidden, weight, teacher, labels, divergence=name, temperature=2.0)
    expected = distillation_loss_from_logits(hidden @ weight.T, z_T, labels, divergence=name, temperature=2.0)
    assert_same(found.loss, expected.loss, 1e-10)
    (x,), (y,) = (torch.autograd.grad(out.loss, hidden) for out in (found, expected))
    assert_same(x, y, 1e-10)


@pytest.mark.parametrize("name", ["csd_us", "csd_uu", "adaptive_kl"])
def test_what_counts_every_class_refuses_a_teacher_of_few(name: str) -> None:
    teacher = TopK(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), torch.full((1,), -1.0))
    with pytest.raises(UserError, match=f"divergence '{name}' needs every class by itself, and a TopK teacher"):
        compact_distillation_loss(torch.randn(1, 3), torch.randn(5, 3), teacher, torch.tensor([2]), divergence=name)
    with pytest.raises(UserError, match=f"divergence '{name}' needs every class by itself, and teacher_cache_kind"):
        SRDConfig(output_dir="x", divergence=name, teacher_cache="y", teacher_cache_kind="topk")


@pytest.mark.parametrize("name", ROW_FIRST)
def test_the_row_function_of_buckets_is_that_of_rows(name: str) -> None:
    torch.manual_seed(0)
    log_p, log_q = (torch.log_softmax(torch.randn(3, 12, dtype=torch.float64), -1) for _ in range(2))
    leaf = log_q.clone().requires_grad_()
    expected = of_pairs(name, log_p, torch.log_softmax(leaf, -1))
    expected.sum().backward()
    value, weight = RowDivergence.of(name)(log_p, log_q)
    assert_same(value, expected, 1e-12)
    assert_same(weight - log_q.exp() * weight.sum(-1, keepdim=True), leaf.grad, 1e-12)
