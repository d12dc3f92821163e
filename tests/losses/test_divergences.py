"""Each divergence: its value, its weight w = dD/d(log q), its limits and bounds, and the registry of users' own."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIVERGENCES, ROW_FIRST, assert_same, plain_divergence
from torch import Tensor
from torch.nn import functional

from srd_fast import UserError, distillation_loss_from_logits, divergence_names, register_divergence
from srd_fast.losses import get_divergence

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
CASES = [
    (name, skew, beta)
    for name in DIVERGENCES
    for skew, beta in ([(s, 0.5) for s in SHARES] if "skew" in name else [(0.1, b) for b in SHARES])
    if name == "jsd" or "skew" in name or beta == 0.5
]


def log_softmaxes(rows: int = 6, classes: int = 11, spread: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(2, rows, classes, dtype=torch.float64) * spread
    return torch.log_softmax(logits[0], -1), torch.log_softmax(logits[1], -1)


def value_and_logit_gradient(
    name: str, log_p: Tensor, log_q: Tensor, skew: float = 0.1, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """D of each row, and dD/d(student logits) by the rule g = w - q*sum(w)."""
    value, weight = get_divergence(name).bind(skew, beta)(log_p, log_q)
    return value, weight - log_q.exp() * weight.sum(-1, keepdim=True)


@pytest.mark.parametrize(("name", "skew", "beta"), CASES)
def test_value_and_weight_are_those_of_the_formula(name: str, skew: float, beta: float) -> None:
    log_p, log_q = log_softmaxes()
    logits = log_q.clone().requires_grad_()
    expected = plain_divergence(name, log_p, logits, 1.0, skew, beta)
    expected.sum().backward()
    value, gradient = value_and_logit_gradient(name, log_p, log_q, skew, beta)
    assert value.shape == (6,)
    if name.startswith("skew") and skew == 1.0:  # the mixture is the distribution itself
        assert value.abs().max() < 1e-12
        assert gradient.abs().max() < 1e-12
        return
    assert_same(value, expected, 1e-12, "value")
    assert_same(gradient, logits.grad, 1e-12, "gradient")


def test_forward_and_reverse_kl_are_those_of_torch() -> None:
    log_p, log_q = log_softmaxes()
    forward = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    reverse = functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    assert_same(value_and_logit_gradient("forward_kl", log_p, log_q)[0], forward, 1e-14)
    assert_same(value_and_logit_gradient("reverse_kl", log_p, log_q)[0], reverse, 1e-14)


@pytest.mark.parametrize(
    ("name", "skew", "beta", "same_as"),
    [
        ("skew_forward_kl", 0.0, 0.5, "forward_kl"),
        ("skew_reverse_kl", 0.0, 0.5, "reverse_kl"),
        ("jsd", 0.1, 0.0, "forward_kl"),
        ("jsd", 0.1, 1.0, "reverse_kl"),
    ],
)
def test_ends_of_skew_and_beta_are_the_plain_divergences(name: str, skew: float, beta: float, same_as: str) -> None:
    log_p, log_q = log_softmaxes()
    value, gradient = value_and_logit_gradient(name, log_p, log_q, skew, beta)
    expected, expected_gradient = value_and_logit_gradient(same_as, log_p, log_q)
    assert_same(value, expected, 1e-12, "value")
    assert_same(gradient, expected_gradient, 1e-12, "gradient")


@pytest.mark.parametrize(("beta", "limit", "slope"), [(1e-6, "forward_kl", 1e-6), (1 - 1e-6, "reverse_kl", 1e-6)])
def test_jsd_tends_to_the_plain_divergences(beta: float, limit: str, slope: float) -> None:
    log_p, log_q = log_softmaxes(spread=1.0)
    value, gradient = value_and_logit_gradient("jsd", log_p, log_q, beta=beta)
    expected, expected_gradient = value_and_logit_gradient(limit, log_p, log_q)
    assert_same(value / slope, expected, 1e-4, "value")
    assert_same(gradient / slope, expected_gradient, 1e-4, "gradient")


@pytest.mark.parametrize(("name", "skew", "beta"), CASES)
def test_identical_distributions_are_at_distance_zero(name: str, skew: float, beta: float) -> None:
    log_p, _ = log_softmaxes()
    value, gradient = value_and_logit_gradient(name, log_p, log_p.clone(), skew, beta)
    assert value.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("name", DIVERGENCES)
def test_more_distant_distributions_have_a_larger_divergence(name: str) -> None:
    log_p, log_q = log_softmaxes()
    shares = (0.25, 0.5, 0.75, 1.0)
    steps = torch.stack([torch.log_softmax(torch.lerp(log_p, log_q, s), -1) for s in shares])
    values = torch.stack([value_and_logit_gradient(name, log_p, s)[0] for s in steps])
    assert (values > 0).all()
    assert (values.diff(dim=0) > 0).all()


def test_the_two_sides_are_not_interchangeable() -> None:
    log_p, log_q = log_softmaxes()
    for name in ("forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl"):
        there, back = (value_and_logit_gradient(name, *pair)[0] for pair in ((log_p, log_q), (log_q, log_p)))
        assert (there - back).abs().max() > 1e-2, name
    lopsided = value_and_logit_gradient("jsd", log_p, log_q, beta=0.1)[0]
    mirrored = value_and_logit_gradient("jsd", log_q, log_p, beta=0.9)[0]
    assert_same(lopsided, mirrored, 1e-12)
    assert (lopsided - value_and_logit_gradient("jsd", log_p, log_q, beta=0.9)[0]).abs().max() > 1e-2


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CASES), st.integers(1, 4), st.integers(2, 40), st.floats(0.01, 30.0), st.integers(0, 2**31 - 1))
def test_values_stay_within_their_bounds(
    case: tuple[str, float, float], rows: int, classes: int, spread: float, seed: int
) -> None:
    name, skew, beta = case
    value, gradient = value_and_logit_gradient(name, *log_softmaxes(rows, classes, spread, seed), skew, beta)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert (value >= -1e-12).all()
    assert (gradient.sum(-1).abs() <= 1e-9 * (1 + gradient.abs().sum(-1))).all()  # softmax ignores a common shift
    most = math.inf
    if name == "tvd":
        most = 1.0
    elif name == "jsd" and 0 < beta < 1:
        most = math.log(2) if beta == 0.5 else -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    elif name.startswith("skew") and skew > 0:
        most = -math.log(skew)
    assert (value <= most + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "skew", "beta"), CASES)
def test_certain_teacher_and_certain_student_give_no_nan(
    name: str, skew: float, beta: float, dtype: torch.dtype
) -> None:
    """Log-probabilities of -200 and of -1e30 (a class ruled out) on either side, or on both."""
    logits = torch.zeros(5, 8, dtype=dtype)
    logits[0, 1] = logits[1, 2] = 200.0
    logits[2, 3] = 1e30
    logits[3, 4:] = -1e30
    certain = torch.log_softmax(logits, -1).clamp(min=-1e30)
    soft = log_softmaxes(5, 8)[0].to(dtype)
    for log_p, log_q in ((certain, soft), (soft, certain), (certain, certain.roll(1, 0)), (certain, certain)):
        value, gradient = value_and_logit_gradient(name, log_p, log_q, skew, beta)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


def test_names_are_in_order() -> None:
    assert divergence_names() == sorted((*DIVERGENCES, *ROW_FIRST))


@pytest.mark.parametrize(
    ("given_name", "nearest"),
    [
        ("reverse_lk", "reverse_kl"),
        ("skew_reverse", "skew_reverse_kl"),
        ("JSD", "jsd"),
        ("tv", "tvd"),
        ("kl", "forward_kl"),
        ("srkl", "skew_reverse_kl"),
        ("TFKL", "forward_kl"),
        ("js", "jsd"),
    ],
)
def test_unknown_name_lists_the_names_and_suggests_the_nearest(given_name: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        get_divergence(given_name)
    message = str(caught.value)
    assert repr(given_name) in message
    assert f"did you mean {nearest!r}?" in message
    for name in DIVERGENCES:
        assert name in message


@pytest.mark.parametrize("given_name", ["zzz", "", None, 3, ["jsd"]])
def test_name_like_no_other_lists_the_names_alone(given_name: object) -> None:
    with pytest.raises(UserError, match="unknown divergence") as caught:
        get_divergence(given_name)  # type: ignore[arg-type]
    assert "did you mean" not in str(caught.value) or given_name == ["jsd"]
    assert "skew_forward_kl" in str(caught.value)


def squared(log_p: Tensor, log_q: Tensor, *, skew: float, beta: float) -> Tensor:
    """A divergence that uses both options, so that they are seen to arrive."""
    return ((log_p.exp() - skew * log_q.exp()) ** 2).sum(-1) * (1 + beta)


def squared_weight(log_p: Tensor, log_q: Tensor, *, skew: float, beta: float) -> Tensor:
    q = log_q.exp()
    return -2 * (1 + beta) * skew * q * (log_p.exp() - skew * q)


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_registered_divergence_trains_like_its_formula(with_weight: bool, reduction: str) -> None:
    register_divergence("squared", squared, squared_weight if with_weight else None)
    assert "squared" in divergence_names()
    torch.manual_seed(0)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(5, 7, dtype=torch.float64), torch.randint(7, (5,))
    out = distillation_loss_from_logits(
        student,
        teacher,
        labels,
        divergence="squared",
        skew=0.3,
        beta=0.7,
        temperature=2.0,
        sft_weight=0.25,
        reduction=reduction,
    )
    out.loss.mean().backward()

    plain = student.detach().clone().requires_grad_()
    log_p, log_q = torch.log_softmax(teacher / 2, -1), torch.log_softmax(plain / 2, -1)
    expected = (
        0.25 * functional.cross_entropy(plain, labels) + 0.75 * 4 * squared(log_p, log_q, skew=0.3, beta=0.7).mean()
    )
    expected.backward()
    assert_same(out.loss.mean(), expected, 1e-12, "loss")
    assert_same(student.grad, plain.grad, 1e-12, "gradient")


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_registered_divergence_needs_no_gradient_mode(context: type) -> None:
    register_divergence("squared", squared)
    log_p, log_q = log_softmaxes()
    with context():
        out = distillation_loss_from_logits(
            log_q, log_p, torch.zeros(6, dtype=torch.long), divergence="squared", temperature=1.0
        )
    assert_same(out.divergence, squared(log_p, log_q, skew=0.1, beta=0.5).mean(), 1e-12)


@pytest.mark.usefixtures("own_registries")
def test_given_weight_is_the_one_used() -> None:
    register_divergence("wrong_on_purpose", squared, lambda log_p, log_q, *, skew, beta: log_q.exp() * 0 + log_p.exp())
    log_p, log_q = log_softmaxes()
    assert_same(value_and_logit_gradient("wrong_on_purpose", log_p, log_q)[1], log_p.exp() - log_q.exp(), 1e-12)


@pytest.mark.usefixtures("own_registries")
def test_a_taken_name_is_kept_unless_replaced() -> None:
    log_p, log_q = log_softmaxes()
    before = value_and_logit_gradient("forward_kl", log_p, log_q)[0]
    with pytest.raises(UserError, match=r"'forward_kl' exists already.*replace=True"):
        register_divergence("forward_kl", squared)
    assert_same(value_and_logit_gradient("forward_kl", log_p, log_q)[0], before, 0.0)
    register_divergence("forward_kl", squared, replace=True)
    value = value_and_logit_gradient("forward_kl", log_p, log_q)[0]
    assert_same(value, squared(log_p, log_q, skew=0.1, beta=0.5), 0.0)
