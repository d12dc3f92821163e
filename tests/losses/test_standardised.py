"""Logits standardised before the temperature, against a plain formula that autograd differentiates."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same, plain_cross_entropy, plain_divergence
from torch import Tensor

from srd_fast import (
    SRDConfig,
    UserError,
    distillation_loss,
    distillation_loss_from_logits,
    register_divergence,
)


def standardised(z: Tensor) -> Tensor:
    """Less the mean, over the root of the mean square, of all classes."""
    return (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True)


@pytest.mark.parametrize("backend", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd", "csd_ts", "csd_us", "adaptive_kl"])
def test_loss_and_gradients_are_those_of_the_definition(name: str, backend: str) -> None:
    """In chunks, with a padded vocabulary, softcaps, a bias, weights of tokens and an ignored label."""
    g = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    h_S, w_S, b_S, h_T, w_T = random(7, 6), random(40, 6), random(40), random(7, 9), random(37, 9) * 3
    for x in (h_S, w_S, b_S):
        x.requires_grad_()
    labels, token_weights = torch.tensor([39, 4, -100, 36, 0, 12, 33]), torch.rand(7, generator=g, dtype=torch.float64)
    kept = labels != -100
    z_S, z_T = 7 * torch.tanh((h_S @ w_S.T + b_S) / 7)[kept], 9 * torch.tanh(h_T @ w_T.T / 9)[kept]
    for temperature in (1.0, 2.0, 0.7):
        out = distillation_loss(
            h_S, w_S, h_T, w_T, labels, divergence=name, temperature=temperature, sft_weight=0.3, student_bias=b_S,
            student_softcap=7.0, teacher_softcap=9.0, token_weights=token_weights, backend=backend, memory_budget=9000,
            standardize_logits=True,
        )  # fmt: skip
        d = plain_divergence(name, standardised(z_T), standardised(z_S[:, :37]), temperature, 0.1, 0.5)
        rows = 0.3 * plain_cross_entropy(z_S, labels[kept]) + 0.7 * temperature**2 * d
        expected = (rows * token_weights[kept]).mean()
        assert_same(out.loss, expected, 1e-10, "loss")
        assert_same(out.divergence, (d * token_weights[kept]).mean(), 1e-10, "divergence")
        found = torch.autograd.grad(out.loss, (h_S, w_S, b_S))
        for x, y in zip(found, torch.autograd.grad(expected, (h_S, w_S, b_S), retain_graph=True)):
            assert_same(x, y, 1e-10, "gradient")


def test_students_that_differ_in_scale_and_shift_are_at_distance_zero() -> None:
    torch.manual_seed(0)
    z_T = torch.randn(3, 20, dtype=torch.float64)
    z_S = (0.3 * z_T - 4).requires_grad_()
    out = distillation_loss_from_logits(
        z_S, z_T, torch.zeros(3, dtype=torch.long), sft_weight=0.0, standardize_logits=True
    )
    out.loss.backward()
    assert out.loss.abs() < 1e-13
    assert z_S.grad is not None
    assert z_S.grad.abs().max() < 1e-13


def test_classes_that_one_side_rules_out_are_in_none_of_its_sums() -> None:
    torch.manual_seed(0)
    z_S, z_T, labels = torch.randn(3, 20), torch.randn(3, 20), torch.tensor([0, 1, 2])
    padded = [torch.cat((z, torch.full((3, 4), -torch.inf)), 1).requires_grad_() for z in (z_S, z_T)]
    found = distillation_loss_from_logits(padded[0], padded[1].detach(), labels, standardize_logits=True)
    found.loss.backward()
    leaf = z_S.clone().requires_grad_()
    expected = distillation_loss_from_logits(leaf, z_T, labels, standardize_logits=True)
    expected.loss.backward()
    assert_same(found.loss, expected.loss, 1e-6)
    assert_same(padded[0].grad[:, :20], leaf.grad, 1e-6)
    assert not padded[0].grad[:, 20:].any()


def test_a_row_without_spread_gives_no_nan() -> None:
    z = torch.full((2, 5), 3.0, requires_grad=True)
    out = distillation_loss_from_logits(z, torch.randn(2, 5), torch.tensor([0, 1]), standardize_logits=True)
    out.loss.backward()
    assert out.loss.isfinite()
    assert not z.grad.isnan().any()


@pytest.mark.usefixtures("own_registries")
def test_a_registered_divergence_is_standardised_too() -> None:
    register_divergence("squares", lambda log_p, log_q, *, skew, beta: (log_p.exp() - log_q.exp()).square().sum(-1))
    torch.manual_seed(0)
    z_S, z_T = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8, dtype=torch.float64)
    options: dict[str, Any] = {"temperature": 2.0, "sft_weight": 0.0, "temperature_scaling": False}
    labels = torch.zeros(3, dtype=torch.long)
    found = distillation_loss_from_logits(z_S, z_T, labels, divergence="squares", standardize_logits=True, **options)
    p, q = (torch.softmax(standardised(z) / 2, -1) for z in (z_T, z_S))
    expected = (p - q).square().sum(-1).mean()
    assert_same(found.loss, expected, 1e-12)
    (x,), (y,) = (torch.autograd.grad(loss, z_S) for loss in (found.loss, expected))
    assert_same(x, y, 1e-10)


def test_what_cannot_be_standardised_is_refused() -> None:
    h, w, labels = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1])
    with pytest.raises(UserError, match="order 'classes' cannot run: standardize_logits needs a row's mean"):
        distillation_loss(h, w, h, w, labels, order="classes", standardize_logits=True)
    with pytest.raises(UserError, match="standardize_logits must be True or False, got 'z-score'"):
        distillation_loss(h, w, h, w, labels, standardize_logits="z-score")  # type: ignore[arg-type]
    fields: dict[str, Any] = {"output_dir": "x", "standardize_logits": True}
    with pytest.raises(UserError, match="standardize_logits is true, but teacher_cache_kind 'topk' gives few"):
        SRDConfig(**fields, teacher_cache="y", teacher_cache_kind="topk")
    with pytest.raises(UserError, match="standardize_logits is true, but class_sampling gives few"):
        SRDConfig(**fields, divergence="forward_kl", class_sampling=8)
    with pytest.raises(UserError, match="standardize_logits must be true or false, got 'yes'"):
        SRDConfig(output_dir="x", standardize_logits="yes")  # type: ignore[arg-type]


_TRITON = """
import torch
from srd_fast import distillation_loss_from_logits as loss
torch.manual_seed(0)
z_S, z_T, labels = torch.randn(3, 200) * 3, torch.randn(3, 190) * 3, torch.tensor([199, 3, 5])
for name in ("jsd", "csd_ts"):
    a, b = z_S.clone().requires_grad_(), z_S.double().requires_grad_()
    found = loss(a, z_T, labels, divergence=name, backend="triton", standardize_logits=True)
    exact = loss(b, z_T.double(), labels, divergence=name, backend="eager", standardize_logits=True)
    found.loss.backward(), exact.loss.backward()
    assert abs(found.loss.item() - exact.loss.item()) < 1e-5
    assert (a.grad - b.grad).abs().max() < 1e-6
"""


@pytest.mark.slow
def test_triton_standardises_as_pytorch_does() -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _TRITON], check=True, env=environment, cwd=Path(__file__).parents[2])
