"""Which positions, classes and samples are chosen, against plain Python, and draws against the exact mean."""

import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from test_stores import CLASSES, HEADS, WIDTH, entropy, head, hidden, log_p
from tiny import assert_same, plain_cross_entropy, plain_divergence
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srd_fast import CurriculumPlan, UserError
from srd_fast.data import DistillationCollator
from srd_fast.kernels import EAGER_BUFFERS
from srd_fast.losses import (
    Head,
    Projected,
    Sampled,
    TopK,
    compact_distillation_loss,
    distillation_loss,
    free_workspace,
)
from srd_fast.selection import (
    QUEUE,
    SIGNALS,
    Candidates,
    Chosen,
    CurriculumPositions,
    DrawnPositions,
    SelectedPositions,
    Signals,
    ThresholdPositions,
    TopPositions,
    batch_generator,
    make_position_policy,
    position_policy_names,
    register_position_policy,
    register_sample_policy,
    rows_of_samples,
    sample_classes,
    sample_policy_names,
    select_samples,
    share_of,
    take_rows,
)
from srd_fast.teacher import HiddenRows, rows_with_loss

RATIOS = (0.1, 0.2, 0.35, 0.5, 1.0)
# Samples without positions at the start, in the middle and at the end, and with one.
COUNTS = (0, 1, 30, 7, 0, 10, 1, 2, 19, 0)


def arguments(of: Head, side: str) -> dict[str, Any]:
    """A head as keyword arguments of `distillation_loss`. side: "student" or "teacher"."""
    return {f"{side}_{name}": getattr(of, name) for name in ("weight", "bias", "softcap", "scale")}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose(policy: Any, values: Tensor, counts: Sequence[int], step: int = 0, seed: int = 0) -> Chosen:
    return policy.select(Candidates(torch.tensor(counts), lambda name: values, step, generator(seed)))


def some_values(counts: Sequence[int], seed: int, kinds: int = 4) -> Tensor:
    """One of a few values at each position, so that most of them are equal."""
    return torch.randint(0, kinds, (sum(counts),), generator=generator(seed)) / 3


def spans(counts: Sequence[int]) -> list[range]:
    """Indices of each sample's positions."""
    return [range(a, b) for a, b in pairwise(accumulate(counts, initial=0))]


def ceiling(ratio: float, count: int) -> int:
    """ceil(ratio count) of the ratio as it is written."""
    return math.ceil(Fraction(str(ratio)) * count)


def within_three_errors(draws_RX: Tensor, exact_X: Tensor) -> None:
    """The mean over R draws is the exact one in every coordinate, and a mean 3 % off would not be in at least one."""
    found, error = draws_RX.mean(0), draws_RX.std(0) / math.sqrt(len(draws_RX))
    assert ((found - exact_X).abs() <= 3 * error + 1e-9).all(), ((found - exact_X) / error).tolist()
    assert (0.03 * exact_X.abs() > 3 * error).any(), "too few draws to tell"


# How many.


@pytest.mark.parametrize("ratio", [*(i / 100 for i in range(1, 101)), 1 / 3, 2 / 3, 0.125, 1e-10])
def test_the_share_is_the_ceiling_of_the_ratio_as_written(ratio: float) -> None:
    counts = [*range(400), 3000, 4096, 10**6]
    assert share_of(torch.tensor(counts), ratio).tolist() == [ceiling(ratio, n) for n in counts]


def test_a_tenth_of_thirty_is_three() -> None:
    assert share_of(torch.tensor([30, 31, 0, 1]), 0.1).tolist() == [3, 4, 0, 1]
    assert 0.07 * 100 > 7
    assert share_of(torch.tensor([100, 101]), 0.07).tolist() == [7, 8]


def samples_of_all_sorts() -> list[dict[str, Any]]:
    """With a label on the first token, without loss, of one token, and others."""
    ordinary = tiny.tiny_samples(6, seed=3)
    first = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    silent = {"input_ids": [5, 6, 7, 8], "labels": [tiny.IGNORE] * 4}
    only = {"input_ids": [9], "labels": [9]}
    return [first, silent, *ordinary[:3], only, first, *ordinary[3:], silent, only]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("part", [slice(None), slice(None, None, -1), slice(1, 2), slice(5, 6), slice(0, 1)])
def test_rows_of_samples_are_counted_as_in_a_loop(part: slice, flatten: bool) -> None:
    samples = samples_of_all_sorts()[part]
    batch = DistillationCollator(0, flatten)(samples)
    found = rows_of_samples(batch)
    assert found.tolist() == [sum(x != tiny.IGNORE for x in s["labels"][1:]) for s in samples]
    # In the order of `rows_with_loss`: states that say which sample they belong to.
    sample_BL = torch.arange(len(samples))[:, None].expand(batch["labels"].shape[0] if not flatten else -1, -1)
    if flatten:
        sample_BL = torch.repeat_interleave(torch.arange(len(samples)), batch["cu_seq_lens"].diff())[None]
    states = sample_BL.expand(batch["labels"].shape)[..., None]
    expected = torch.repeat_interleave(torch.arange(len(samples)), found)
    assert torch.equal(rows_with_loss(states, batch)[:, 0], expected)


def test_a_flattened_label_at_a_border_counts_once() -> None:
    """As a collator of the user's own may give it, which `rows_with_loss` then sees too."""
    batch = {"labels": torch.tensor([[5, 6, 7, 8, tiny.IGNORE]]), "cu_seq_lens": torch.tensor([0, 2, 5])}
    assert rows_of_samples(batch).tolist() == [1, 2]
    assert len(rows_with_loss(torch.zeros(1, 5, 1), batch)) == 3


# Positions.


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_topk_takes_the_highest_of_each_sample_and_of_equals_the_first(signal: str, ratio: float) -> None:
    policy: Any = make_position_policy(f"topk_{signal}", ratio)
    for seed, counts in enumerate((COUNTS, COUNTS[::-1], (50,), (1,), (0, 1), (3, 0, 0, 9))):
        values, asked = some_values(counts, seed), []
        values_of: Callable[[str], Tensor] = lambda name: (asked.append(name), values)[1]  # noqa: B023, E731
        found = policy.select(Candidates(torch.tensor(counts), values_of, 0, generator()))
        expected = []
        for span in spans(counts):
            expected += sorted(sorted(span, key=lambda i: (-values[i], i))[: ceiling(ratio, len(span))])
        assert asked == [signal]
        assert found.indices_K.tolist() == expected
        assert found.weights_K is None
        assert policy.num_items(torch.tensor(counts)) == len(expected)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("step", [0, 20, 40, 60])
def test_the_curriculum_is_a_window_in_the_order_of_entropy(step: int, ratio: float) -> None:
    """At the lowest in step 0, in the middle after half of the steps, at the highest at the end and beyond."""
    policy = CurriculumPositions(ratio, steps=40)
    for seed, counts in enumerate((COUNTS, (50, 1))):
        values, expected = some_values(counts, seed), []
        for span in spans(counts):
            width = ceiling(ratio, len(span))
            low = round((len(span) - width) * min(1.0, step / 40))
            expected += sorted(sorted(span, key=lambda i: (values[i], i))[low : low + width])
        found = choose(policy, values, counts, step)
        assert found.indices_K.tolist() == expected
        assert found.weights_K is None
        assert policy.num_items(torch.tensor(counts)) == len(expected)


def test_the_curriculum_passes_over_every_position_on_its_way_up() -> None:
    values, policy = torch.rand(30, generator=generator()), CurriculumPositions(0.1, steps=27)
    windows = [choose(policy, values, [30], step).indices_K for step in range(28)]
    assert set(torch.cat(windows).tolist()) == set(range(30))
    means = [values[w].mean().item() for w in windows]
    assert means == sorted(means)
    assert len(set(means)) == 28


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_the_threshold_is_a_quantile_of_the_entropies_that_are_remembered(ratio: float) -> None:
    policy, remembered = ThresholdPositions(ratio), np.empty(0, np.float32)
    shares = []
    for seed, counts in enumerate(((3, 4), (12_000, 0, 1), (15_000,), (7_001, 2), (40_007,), (5,))):
        # Each batch higher than the one before: the threshold must follow.
        values = torch.rand(sum(counts), generator=generator(seed)) * 3 + seed
        found = choose(policy, values, counts)
        remembered = np.concatenate((remembered, values.numpy()))[-QUEUE:]
        threshold = np.quantile(remembered.astype(np.float64), 1 - ratio)
        assert found.indices_K.tolist() == np.flatnonzero(values.numpy() >= threshold).tolist()
        assert len(policy.queue) == len(remembered) <= QUEUE == 30_000
        # Their mean times the number of candidates: divided by `num_items` it is the mean.
        assert found.weights_K is not None
        assert policy.num_items(torch.tensor(counts)) == sum(counts)
        assert found.weights_K.sum() == pytest.approx(sum(counts), rel=1e-4)
        assert len(found.weights_K.unique()) == 1
        shares.append(len(found.indices_K) / sum(counts))
    assert shares[1] == pytest.approx(ratio, abs=0.01)
    assert shares[2] > 1.2 * ratio


def test_a_restored_threshold_goes_on_as_the_first_one() -> None:
    first, second, fresh = (ThresholdPositions(0.2) for _ in range(3))
    choose(first, torch.rand(100, generator=generator()) + 1, [40, 60])
    second.load_state_dict({n: x.clone() for n, x in first.state_dict().items()})
    values = torch.rand(50, generator=generator(1)) * 2
    expected, found = (choose(p, values, [50]).indices_K.tolist() for p in (first, second))
    assert found == expected != choose(fresh, values, [50]).indices_K.tolist()
    assert torch.equal(first.queue, second.queue)


def test_equal_entropies_are_all_above_their_threshold() -> None:
    found = choose(ThresholdPositions(0.2), torch.zeros(9), [4, 5])
    assert found.indices_K.tolist() == list(range(9))
    assert found.weights_K is not None
    assert found.weights_K.tolist() == [1.0] * 9


def test_a_batch_below_the_threshold_has_no_loss() -> None:
    policy = ThresholdPositions(0.2)
    choose(policy, torch.rand(1000, generator=generator()) + 5, [1000])
    found = choose(policy, torch.rand(10, generator=generator()), [10])
    assert (len(found.indices_K), len(policy.queue)) == (0, 1010)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4])
def test_each_sample_has_its_own_draws_and_their_weights(scale: float, ratio: float) -> None:
    """From a weight follows how often a position was drawn: a whole number, ceil(ratio n) in all of each sample."""
    policy = DrawnPositions(ratio)
    for seed in range(5):
        values = (torch.rand(sum(COUNTS), generator=generator(seed)) ** 4) * scale
        values[::3] = 0.0
        found = choose(policy, values, COUNTS, seed=seed)
        weights = torch.zeros(len(values), dtype=torch.float64)
        weights[found.indices_K] = found.weights_K.double()
        assert (found.weights_K > 0).all()
        assert found.indices_K.tolist() == sorted(set(found.indices_K.tolist()))
        for span in map(list, spans(COUNTS)):
            reach = values[span].double().clamp(min=1e-4)
            draws = ceiling(ratio, len(span))
            times = weights[span] * draws * reach / reach.sum()
            assert times.tolist() == pytest.approx(times.round().tolist(), abs=1e-4)
            assert times.sum().item() == pytest.approx(draws, abs=1e-3)


def test_the_mean_weight_of_every_position_is_one() -> None:
    """Over 20,000 draws, within three standard errors; also where the entropy is 0."""
    counts, ratio, replicas = [7, 4, 1], 0.5, 20_000
    values = torch.tensor([0.0, 0.4, 1.2, 0.1, 2.0, 3.0, 0.7, 0.5, 0.0, 0.2, 0.9, 0.3])
    values[[0, 8]] = 0.15  # a position in ten thousand would need more draws
    found = choose(DrawnPositions(ratio), values.repeat(replicas), counts * replicas)
    weights = torch.zeros(replicas * 12, dtype=torch.float64)
    weights[found.indices_K] = found.weights_K.double()
    within_three_errors(weights.view(replicas, 12), torch.ones(12))
    within_three_errors(weights.view(replicas, 12).sum(1, keepdim=True), torch.tensor([12.0]))


def test_zero_entropies_are_drawn_evenly() -> None:
    found = choose(DrawnPositions(0.2), torch.zeros(250_000), [5] * 50_000)
    times = torch.zeros(250_000)
    times[found.indices_K] = found.weights_K / 5
    assert times.view(-1, 5).sum(1).tolist() == [1.0] * 50_000
    within_three_errors(times.view(-1, 5) * 5, torch.ones(5))


@pytest.mark.parametrize("name", [n for n in position_policy_names() if n != "all"])
@pytest.mark.parametrize("counts", [[0], [0, 0, 0]])
def test_of_nothing_nothing_is_chosen(counts: list[int], name: str) -> None:
    policy: Any = make_position_policy(name, 0.2)
    for _ in range(2):
        found = choose(policy, torch.empty(0), counts)
        assert found.indices_K.shape == (0,)
        assert found.indices_K.dtype == torch.int64
        assert found.weights_K is None or found.weights_K.shape == (0,)
        assert policy.num_items(torch.tensor(counts)) == 0


# Draws are unbiased.


def of_rows(values_N: Tensor, replicas: int) -> Tensor:
    """[R, N D] of [R N, D]."""
    return values_N.view(replicas, -1).double()


@pytest.mark.parametrize(("kind", "temperature"), [("plain", 1.0), ("softcap", 2.0), ("scale", 1.5)])
def test_the_mean_gradient_of_drawn_classes_is_the_exact_one(kind: str, temperature: float) -> None:
    """20,000 draws for 3 rows of 11 classes, each coordinate within three standard errors, and so the loss."""
    replicas, rows = 20_000, 3
    of_student = head(**{**HEADS[kind], "classes": 11}, seed=2)
    of_teacher = head(**{**HEADS[kind], "classes": 13}, seed=5)
    hidden_S, hidden_T, labels = hidden(rows), hidden(rows, seed=4), torch.tensor([1, 0, 10])
    options: dict[str, Any] = {"divergence": "forward_kl", "temperature": temperature, "sft_weight": 0.2}
    options |= {"reduction": "none", **arguments(of_student, "student")}

    exact = hidden_S.clone().requires_grad_()
    expected = distillation_loss(
        exact, teacher_hidden=hidden_T, labels=labels, **options, **arguments(of_teacher, "teacher")
    )
    expected.loss.sum().backward()

    many = hidden_S.repeat(replicas, 1).requires_grad_()
    teacher = HiddenRows(hidden_T.repeat(replicas, 1), of_teacher)
    drawn = sample_classes(teacher, 11, temperature, 4, generator(1))
    found = compact_distillation_loss(many, teacher=drawn, labels=labels.repeat(replicas), **options)
    found.loss.sum().backward()
    assert many.grad is not None
    assert exact.grad is not None
    within_three_errors(of_rows(many.grad, replicas), exact.grad.flatten())
    within_three_errors(of_rows(found.loss.detach(), replicas), expected.loss.detach())


def test_drawn_classes_are_those_that_both_have() -> None:
    of_teacher = head(classes=CLASSES + 11)
    teacher = HiddenRows(hidden(6), of_teacher)
    drawn = sample_classes(teacher, CLASSES, 1.5, 5000, generator())
    expected = log_p(teacher.hidden_ND, of_teacher, 1.5)
    assert_same(drawn.entropy_N, entropy(expected), 1e-5)
    assert drawn.ids_NK.shape == (6, 5000)
    for ids, log_p_V in zip(drawn.ids_NK, expected):
        share = torch.bincount(ids, minlength=CLASSES) / 5000
        assert len(share) == CLASSES
        error = (log_p_V.exp() / 5000).sqrt() + 1e-3
        assert ((share - log_p_V.exp()).abs() < 4 * error).all()


def test_drawn_classes_leave_no_graph_of_a_teacher_that_could_be_trained() -> None:
    of_teacher = head()
    trainable = Head(torch.nn.Parameter(of_teacher.weight), of_teacher.bias)
    drawn = sample_classes(HiddenRows(hidden(3), trainable), CLASSES, 1.0, 7, generator())
    assert not drawn.entropy_N.requires_grad
    again = sample_classes(HiddenRows(hidden(3), of_teacher), CLASSES, 1.0, 7, generator())
    assert torch.equal(drawn.ids_NK, again.ids_NK)


def test_no_rows_have_no_drawn_classes() -> None:
    drawn = sample_classes(HiddenRows(hidden(0), head()), CLASSES, 1.0, 7, generator())
    assert (drawn.ids_NK.shape, drawn.entropy_N.shape) == ((0, 7), (0,))


def test_the_mean_gradient_of_drawn_positions_is_the_exact_one() -> None:
    """20,000 draws from samples of 7, 4 and 1 positions, of a parameter that moves all rows."""
    replicas, counts, policy = 20_000, [7, 4, 1], DrawnPositions(0.3)
    of_student, of_teacher = head(classes=11, seed=2), head(classes=11, seed=5)
    hidden_S, hidden_T = hidden(12), hidden(12, seed=4)
    labels = torch.arange(12) % 11
    options: dict[str, Any] = {"divergence": "skew_reverse_kl", "temperature": 1.5, "sft_weight": 0.2}
    options |= {**arguments(of_student, "student"), **arguments(of_teacher, "teacher")}

    exact = hidden_S.clone().requires_grad_()
    expected = distillation_loss(exact, teacher_hidden=hidden_T, labels=labels, **options)
    expected.loss.backward()

    entropies = entropy(log_p(hidden_S, of_student, 1.0, 11)).float()
    chosen = choose(policy, entropies.repeat(replicas), counts * replicas)
    assert 0.2 < len(chosen.indices_K) / (12 * replicas) < 0.45
    place = chosen.indices_K % 12
    some = hidden_S[place].requires_grad_()
    # `num_items` of one replica is the denominator of its mean.
    found = distillation_loss(
        some, teacher_hidden=hidden_T[place], labels=labels[place], token_weights=chosen.weights_K,
        num_items=policy.num_items(torch.tensor(counts)), **options,
    )  # fmt: skip
    found.loss.backward()
    assert some.grad is not None
    assert exact.grad is not None
    gradients = torch.zeros(replicas * 12, 8).index_put((chosen.indices_K,), some.grad).view(replicas, 12, 8)
    within_three_errors(gradients.sum(1).double(), exact.grad.sum(0))
    assert found.loss.item() / replicas == pytest.approx(expected.loss.item(), rel=0.01)


# Signals.


def plain_signal(name: str, z_S: Tensor, z_T: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """A signal of rows from full logits, in float64."""
    z_S, z_T = z_S.double(), z_T.double()
    log_q = torch.log_softmax(z_S, -1)
    if name == "student_entropy":
        return entropy(log_q)
    if name == "student_cross_entropy":
        return plain_cross_entropy(z_S, labels)
    if name == "student_confidence_gap":
        first, second = log_q.exp().sort(-1, descending=True).values[:, :2].T
        return second - first
    if name == "teacher_entropy":
        return entropy(torch.log_softmax(z_T, -1))
    common = min(z_S.shape[-1], z_T.shape[-1])
    return plain_divergence(name, z_T[:, :common], z_S[:, :common], temperature, 0, 0)


def signals_of(kind: str, teacher: str = "plain", rows: int = 9, temperature: float = 2.0) -> tuple[Signals, list[int]]:
    of_student, of_teacher = head(**HEADS[kind], seed=2), head(**HEADS[teacher], seed=5)
    asked: list[int] = []

    def teacher_rows() -> HiddenRows:
        asked.append(1)
        return HiddenRows(hidden(rows, seed=4), of_teacher)

    labels = torch.arange(rows) * 5 % CLASSES
    return Signals(hidden(rows).requires_grad_(), of_student, labels, teacher_rows, temperature), asked


KEPT_ROWS = sum(ceiling(0.35, n) for n in COUNTS)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows_at_once", [30, 33, 71])
@pytest.mark.parametrize(
    "policy",
    [TopPositions(0.35), TopPositions(0.35, "student_cross_entropy"), CurriculumPositions(0.35, 4)],
    ids=["entropy", "cross-entropy", "curriculum"],
)
def test_logits_of_the_chosen_are_kept(policy: Any, rows_at_once: int, kind: str) -> None:
    rows, counts_B = sum(COUNTS), torch.tensor(COUNTS)
    signals, _ = signals_of(kind, rows=rows)
    wanted = policy.select(Candidates(counts_B, signals, 2, generator()))
    signals, _ = signals_of(kind, rows=rows)
    row_bytes = signals.head.num_classes(signals.student_ND) * 4
    signals._one_side = max(rows_at_once, KEPT_ROWS) * row_bytes + 2 * EAGER_BUFFERS * row_bytes
    chosen, kept = signals.choose(policy, counts_B, 2, generator())
    assert torch.equal(chosen.indices_K, wanted.indices_K)
    assert chosen.weights_K is None
    assert kept is not None
    assert_same(kept, signals.head.project(signals.student_ND[chosen.indices_K]), tiny.rounding(WIDTH))
    whole, _ = signals_of(kind, rows=rows)
    for name in ("student_entropy", "student_cross_entropy"):
        assert_same(signals.found(name), whole(name), tiny.rounding(WIDTH + CLASSES), name)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_memory_that_runs_out_while_choosing_changes_nothing(fails_at: int) -> None:
    rows, counts_B, calls = sum(COUNTS), torch.tensor(COUNTS), []

    class Failing(TopPositions):
        def select(self, candidates: Candidates) -> Chosen:
            calls.append(len(candidates.counts_B))
            if len(calls) == fails_at:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
            return super().select(candidates)

    signals, _ = signals_of("plain", rows=rows)
    wanted = TopPositions(0.35).select(Candidates(counts_B, signals, 2, generator()))
    signals, _ = signals_of("plain", rows=rows)
    signals._one_side = (max(30, KEPT_ROWS) + 2 * EAGER_BUFFERS) * CLASSES * 4
    try:
        chosen, kept = signals.choose(Failing(0.35), counts_B, 2, generator())
    finally:
        free_workspace()
    assert len(calls) > fails_at
    assert sum(calls[fails_at:]) == len(COUNTS), "every sample was chosen from once more"
    assert torch.equal(chosen.indices_K, wanted.indices_K)
    assert_same(kept, signals.head.project(signals.student_ND[chosen.indices_K]), tiny.rounding(WIDTH))


@pytest.mark.parametrize(
    ("policy", "rows_at_once"),
    [
        (TopPositions(0.35), KEPT_ROWS - 1),
        (TopPositions(0.35), max(COUNTS) - 1),
        (TopPositions(0.35, "forward_kl"), 100),
        (DrawnPositions(0.35), 100),
        (ThresholdPositions(0.35), 100),
    ],
)
def test_logits_are_not_kept_where_they_do_not_fit_or_the_choice_is_not_by_sample(
    policy: Any, rows_at_once: int
) -> None:
    counts_B = torch.tensor(COUNTS)
    signals, _ = signals_of("plain", rows=sum(COUNTS))
    signals._one_side = rows_at_once * CLASSES * 4
    chosen, kept = signals.choose(policy, counts_B, 0, generator())
    assert kept is None
    again = signals_of("plain", rows=sum(COUNTS))[0]
    wanted = copy.deepcopy(policy)
    if isinstance(wanted, ThresholdPositions):
        wanted.queue = torch.empty(0)
    assert torch.equal(chosen.indices_K, wanted.select(Candidates(counts_B, again, 0, generator())).indices_K)


@pytest.mark.parametrize(("kind", "teacher"), [*zip(HEADS, HEADS), ("plain", "padded"), ("padded", "plain")])
@pytest.mark.parametrize("name", SIGNALS)
def test_signals_are_those_of_full_logits(name: str, kind: str, teacher: str) -> None:
    signals, asked = signals_of(kind, teacher)
    wide = 10 * CLASSES
    z_S = log_p(signals.student_ND, signals.head, 1.0, wide).detach()
    z_T = log_p(hidden(9, seed=4), head(**HEADS[teacher], seed=5), 1.0, wide)
    expected = plain_signal(name, z_S, z_T, signals.labels_N, 2.0)
    found = signals(name)
    assert found.shape == (9,)
    assert not found.requires_grad
    assert len(expected.unique()) > 5
    assert_same(found, expected, 1e-5, name)
    assert signals(name) is found
    assert len(asked) == (name in ("teacher_entropy", "forward_kl", "reverse_kl"))


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_of_no_rows_are_empty(name: str) -> None:
    assert signals_of("plain", rows=0)[0](name).shape == (0,)


def test_both_signals_of_one_pass_come_from_it() -> None:
    signals, _ = signals_of("plain")
    assert signals.found("student_entropy") is None
    signals("student_cross_entropy")
    assert signals.found("student_entropy") is not None


def test_a_teacher_with_fewer_classes_than_the_labels_has_an_entropy() -> None:
    signals, _ = signals_of("padded")
    signals.labels_N = torch.full((9,), CLASSES + 3)
    expected = entropy(log_p(hidden(9, seed=4), head(seed=5), 1.0))
    assert_same(signals("teacher_entropy"), expected, 1e-5)


def compact_rows() -> list[Any]:
    ids, log_p_NK = torch.arange(6).view(3, 2), -torch.rand(3, 2, generator=generator()) - 1
    n, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    return [TopK(ids, log_p_NK, n), Sampled(ids, n), Projected(log_p_NK, n, other), HiddenRows(log_p_NK, head())]


@pytest.mark.parametrize("rows", compact_rows(), ids=lambda rows: type(rows).__name__)
def test_some_rows_of_a_teacher_are_each_tensors_rows(rows: Any) -> None:
    taken = take_rows(rows, torch.tensor([2, 0]))
    assert type(taken) is type(rows)
    for name, value in rows._asdict().items():
        found = getattr(taken, name)
        assert torch.equal(found, value[[2, 0]]) if isinstance(value, Tensor) else found is value


def test_a_compact_cache_gives_the_entropy_that_it_keeps() -> None:
    top_k, sampled, projected, _ = compact_rows()
    for rows in (sampled, projected):
        found = Signals(hidden(3), head(), torch.arange(3), lambda rows=rows: rows, 1.0)("teacher_entropy")
        assert found.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(UserError, match="'topk_teacher_entropy' needs a teacher cache that keeps it"):
        Signals(hidden(3), head(), torch.arange(3), lambda: top_k, 1.0)("teacher_entropy")
    with pytest.raises(UserError, match="unknown signal of positions 'entropy'; did you mean 'student_"):
        Signals(hidden(3), head(), torch.arange(3), lambda: top_k, 1.0)("entropy")


# What was chosen.


def test_the_histogram_counts_every_position_once() -> None:
    selected, wanted = SelectedPositions(CLASSES, bins=5), torch.zeros(2, 5, dtype=torch.long)
    edges = np.linspace(0, math.log(CLASSES), 6)
    for rows in (9, 40, 0):
        signals, _ = signals_of("plain", rows=rows)
        values = signals("student_entropy").numpy()
        chosen = choose(TopPositions(0.3), torch.from_numpy(values), [rows]).indices_K
        selected.add(signals, chosen)
        for row, part in zip(wanted, (values, values[chosen])):
            row += torch.from_numpy(np.histogram(part, edges)[0])
    found = selected.histogram()
    assert found["edges"] == pytest.approx(edges.tolist(), abs=1e-6)
    assert [found["candidates"], found["chosen"]] == wanted.tolist()
    assert (sum(found["candidates"]), sum(found["chosen"])) == (49, 15)
    # Equal widths: of four products for each position, one for the entropy of all and four for those chosen.
    saved = 1 - (49 + 4 * 15) / (4 * 49)
    assert selected.take() == {"selected_share": 15 / 49, "saved_head_work": pytest.approx(saved)}
    assert selected.take() == {"selected_share": 0.0, "saved_head_work": 0.0}
    assert selected.saved_head_work == pytest.approx(saved)


@pytest.mark.parametrize(
    ("signal", "products"),
    [
        ("student_entropy", 1), ("student_cross_entropy", 1), ("student_confidence_gap", 1),
        ("teacher_entropy", 1), ("forward_kl", 2), ("reverse_kl", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kept", [False, True])
def test_saved_work_counts_what_choosing_cost(signal: str, products: int, kept: bool) -> None:
    selected, signals = SelectedPositions(CLASSES), signals_of("plain", rows=20)[0]
    signals(signal)
    selected.add(signals, torch.arange(5), kept=kept)
    assert selected.saved_head_work == pytest.approx(1 - (20 * products + 5 * (3 if kept else 4)) / 80)


def test_values_beyond_the_edges_are_counted_too() -> None:
    """Rounding may leave an entropy below 0 or above ln V."""
    signals, selected = signals_of("plain", rows=3)[0], SelectedPositions(CLASSES, bins=4)
    signals._found["student_entropy"] = torch.tensor([-1e-7, math.log(CLASSES) + 1e-6, 0.0])
    selected.add(signals, torch.tensor([1]))
    assert selected.histogram()["candidates"] == [2, 0, 0, 1]
    assert selected.histogram()["chosen"] == [0, 0, 0, 1]


def test_draws_of_a_batch_follow_from_its_place() -> None:
    places = [(0, 1, 2, 3), (0, 1, 3, 2), (0, 12, 3, 0), (0, 1, 23, 0), (1, 1, 2, 3)]
    drawn = [tuple(torch.rand(4, generator=batch_generator(torch.device("cpu"), *p)).tolist()) for p in places]
    again = [tuple(torch.rand(4, generator=batch_generator(torch.device("cpu"), *p)).tolist()) for p in places]
    assert drawn == again
    assert len(set(drawn)) == len(places)


# Names.


def test_every_name_makes_its_policy() -> None:
    others = ["all", "curriculum", "global_threshold", "stochastic"]
    assert position_policy_names() == [*others, *sorted(f"topk_{s}" for s in SIGNALS)]
    assert make_position_policy("all", 0.2) is None
    assert make_position_policy("topk_reverse_kl", 0.3) == TopPositions(0.3, "reverse_kl")
    assert make_position_policy("curriculum", 0.3, 7) == CurriculumPositions(0.3, 7)
    assert make_position_policy("curriculum", 0.3) == CurriculumPositions(0.3, 4000)
    assert make_position_policy("stochastic", 0.3) == DrawnPositions(0.3)
    threshold = make_position_policy("global_threshold", 0.3)
    assert isinstance(threshold, ThresholdPositions)
    assert threshold.ratio == 0.3
    with pytest.raises(UserError, match="unknown position_selection 'topk_entropy'; did you mean 'topk_"):
        make_position_policy("topk_entropy", 0.2)


@pytest.mark.usefixtures("own_registries")
def test_a_policy_of_ones_own_is_registered_once() -> None:
    register_position_policy("longest", lambda ratio, steps: CurriculumPositions(ratio, 2 * steps))
    assert make_position_policy("longest", 0.5, 3) == CurriculumPositions(0.5, 6)
    for name in ("longest", "all", "stochastic"):
        with pytest.raises(UserError, match=f"position_selection '{name}' exists already"):
            register_position_policy(name, lambda ratio, **_: DrawnPositions(ratio))
    register_position_policy("longest", lambda ratio, **_: DrawnPositions(ratio), replace=True)
    assert make_position_policy("longest", 0.5) == DrawnPositions(0.5)


# Samples.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


SAMPLES = tiny.tiny_samples(23, seed=6)
PLAN = CurriculumPlan(
    [[s["sample_id"] for s in SAMPLES[i:j]] for i, j in ((11, 21), (0, 0), (0, 11))],
    dropped=[{"sample_id": SAMPLES[21]["sample_id"], "reason": "hard"}],
    method="random",
)


@pytest.mark.parametrize("policy", ["topk_student_entropy", "topk_student_cross_entropy"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_the_samples_with_the_highest_means_stay(ratio: float, policy: str, tokenizer: PreTrainedTokenizerFast) -> None:
    student, mean = tiny.tiny_model("gpt2", resid_pdrop=0.5), {}
    for sample in SAMPLES:
        labels = torch.tensor(sample["labels"])[1:]
        with torch.no_grad():
            z = student(torch.tensor([sample["input_ids"]])).logits[0, :-1][labels != tiny.IGNORE]
        values = plain_signal(policy.removeprefix("topk_"), z, z, labels[labels != tiny.IGNORE], 1.0)
        mean[sample["sample_id"]] = values.mean().item()
    student.train()
    found = select_samples(PLAN, Dataset.from_list(SAMPLES), student, tokenizer, policy, ratio)
    assert student.training
    assert found.method == "random"
    assert [len(s) for s in found.subsets] == [ceiling(ratio, n) for n in (10, 0, 11)]
    for subset, before in zip(found.subsets, PLAN.subsets):
        highest = sorted(before, key=lambda i: -mean[i])[: len(subset)]
        assert subset == [i for i in before if i in highest]
    gone = [x["sample_id"] for x in found.dropped]
    assert sorted(gone + found.kept) == sorted(s["sample_id"] for s in SAMPLES[:22])
    assert found.dropped[0] == PLAN.dropped[0]
    for entry in found.dropped[1:]:
        assert f"{mean[entry['sample_id']]:.3f}" in entry["reason"]


def test_a_sample_without_loss_is_the_last_to_stay(tokenizer: PreTrainedTokenizerFast) -> None:
    silent = {"sample_id": "a", "input_ids": [5, 6, 7], "labels": [tiny.IGNORE] * 3}
    data = Dataset.from_list([silent, *SAMPLES[:3]])
    for ratio, kept in ((0.75, 3), (1.0, 4)):
        plan = CurriculumPlan([data["sample_id"]])
        found = select_samples(plan, data, tiny.tiny_model(), tokenizer, "topk_student_entropy", ratio)
        assert len(found.kept) == kept
        assert ("a" in found.kept) == (ratio == 1.0)


def test_all_samples_stay_and_unknown_ones_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    data, student = Dataset.from_list(SAMPLES), tiny.tiny_model()
    assert select_samples(PLAN, data, student, tokenizer, "all", 0.1) is PLAN
    assert sample_policy_names() == ["all", "topk_student_cross_entropy", "topk_student_entropy"]
    with pytest.raises(UserError, match="unknown sample_selection 'topk_entropy'; did you mean 'topk_student_entropy'"):
        select_samples(PLAN, data, student, tokenizer, "topk_entropy", 0.1)
    with pytest.raises(UserError, match="plan keeps 1 samples that the data does not have, the first is 'x9'"):
        select_samples(CurriculumPlan([["s00", "x9"]]), data, student, tokenizer, "topk_student_entropy", 0.1)


@pytest.mark.usefixtures("own_registries")
def test_a_sample_policy_of_ones_own_gives_a_value_a_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    data, student = Dataset.from_list(SAMPLES), tiny.tiny_model()
    register_sample_policy("by_name", lambda student, samples, tokenizer: [-int(i[1:]) for i in samples["sample_id"]])
    found = select_samples(PLAN, data, student, tokenizer, "by_name", 0.3)
    assert found.subsets == [["s11", "s12", "s13"], [], ["s00", "s01", "s02", "s03"]]
    assert found.dropped[-1] == {"sample_id": "s10", "reason": "by name -10.000, beyond the 4 highest of its subset"}
    register_sample_policy("short", lambda student, samples, tokenizer: [1.0])
    with pytest.raises(UserError, match="sample_selection 'short' gave 1 values for 21 samples"):
        select_samples(PLAN, data, student, tokenizer, "short", 0.3)
