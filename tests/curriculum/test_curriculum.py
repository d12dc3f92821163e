"""The curriculum is a pure function of the step: who is seen how often; T, weight and learning rate at each border."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srd_fast.curriculum import Curriculum, CurriculumPlan, per_stage
from srd_fast.errors import UserError


def plan_of(*sizes: int) -> CurriculumPlan:
    names = iter(f"s{i:03d}" for i in range(sum(sizes)))
    return CurriculumPlan(subsets=[[next(names) for _ in range(size)] for size in sizes], stages=len(sizes))


def make(
    sizes: Sequence[int] = (4, 4, 4), *, batch_size: int = 4, epochs: float | Sequence[float] = 2, **options: Any
) -> Curriculum:
    stages = len(sizes)
    given_options = {
        "epochs_per_stage": list(epochs) if isinstance(epochs, Sequence) else [epochs] * stages,
        "temperatures": [1.0 + k for k in range(stages)],
        "sft_weights": [0.5 / (1 + k) for k in range(stages)],
        "learning_rates": [1e-3 * (k + 1) for k in range(stages)],
        **options,
    }
    ids = [f"s{i:03d}" for i in reversed(range(sum(sizes)))]
    return Curriculum(plan_of(*sizes), ids, batch_size=batch_size, **given_options)


def names(curriculum: Curriculum, count: int) -> list[str]:
    """The sequence as sample ids; `make` gives the data in the reverse order of the plan."""
    return [f"s{count - 1 - i:03d}" for i in curriculum.indices()]


def by_stage(curriculum: Curriculum, sequence: Sequence[Any]) -> list[Sequence[Any]]:
    size = curriculum.batch_size
    return [sequence[s.first_step * size : (s.first_step + s.steps) * size] for s in curriculum.stages]


# Which samples


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    batch_size=st.integers(1, 12),
    epochs=st.floats(0.1, 5),
    seed=st.integers(0, 5),
)
def test_stage_k_sees_subsets_1_to_k_equally_often(sizes: list[int], batch_size: int, epochs: float, seed: int) -> None:
    curriculum = make(sizes, batch_size=batch_size, epochs=epochs, seed=seed)
    sequence = names(curriculum, sum(sizes))
    assert len(sequence) == curriculum.sample_passes == curriculum.total_steps * batch_size
    for k, seen in enumerate(by_stage(curriculum, sequence)):
        allowed = plan_of(*sizes).stage_ids(k)
        steps = max(1, math.ceil(len(allowed) * epochs / batch_size - 1e-9))
        assert len(seen) == steps * batch_size
        counts = Counter(seen)
        assert set(counts) <= set(allowed)
        passes = len(seen) / len(allowed)
        assert {counts[s] for s in allowed} <= {math.floor(passes), math.ceil(passes)}


def test_whole_epochs_see_every_sample_that_often() -> None:
    curriculum = make((4, 8, 4), batch_size=4, epochs=3)
    first, second, third = by_stage(curriculum, names(curriculum, 16))
    assert Counter(first) == {s: 3 for s in plan_of(4, 8, 4).stage_ids(0)}
    assert Counter(second) == {s: 3 for s in plan_of(4, 8, 4).stage_ids(1)}
    assert Counter(third) == {s: 3 for s in plan_of(4, 8, 4).stage_ids(2)}
    assert curriculum.sample_passes == 3 * (4 + 12 + 16)


def test_half_an_epoch_more_sees_half_the_samples_once_more() -> None:
    curriculum = make((8,), batch_size=4, epochs=1.5)
    assert sorted(Counter(names(curriculum, 8)).values()) == [1] * 4 + [2] * 4


def test_rounding_adds_no_step() -> None:
    assert 100 * 1.1 > 110
    assert make((100,), batch_size=1, epochs=1.1).total_steps == 110


def test_the_paper_takes_twelve_passes_where_plain_distillation_takes_twenty() -> None:
    curriculum = make((16, 16, 16), batch_size=16, epochs=8)
    assert curriculum.sample_passes == 12 * 64


def test_empty_later_subsets_train_on_all_again() -> None:
    curriculum = make((6, 0, 0), batch_size=3, epochs=1)
    for seen in by_stage(curriculum, names(curriculum, 6)):
        assert sorted(seen) == plan_of(6).kept


def test_an_empty_first_stage_is_refused_and_does_not_hang() -> None:
    with pytest.raises(UserError):
        make((0, 6), batch_size=3, epochs=1)


def test_every_epoch_is_shuffled_anew() -> None:
    sequence = names(make((20,), batch_size=20, epochs=3), 20)
    epochs = [tuple(sequence[i : i + 20]) for i in (0, 20, 40)]
    assert len(set(epochs)) == 3
    assert all(sorted(e) == plan_of(20).kept != list(e) for e in epochs)


def test_the_sequence_is_a_function_of_the_seed() -> None:
    first = list(make((9, 9), seed=1).indices())
    assert first == list(make((9, 9), seed=1).indices())
    assert first != list(make((9, 9), seed=2).indices())


def test_a_plan_that_the_data_does_not_fit_is_refused() -> None:
    plan = plan_of(3, 3)
    options: dict[str, Any] = {"epochs_per_stage": [1, 1], "temperatures": [1, 1], "sft_weights": [0, 0]}
    with pytest.raises(UserError, match=r"keeps 2 samples that the data does not have, the first is 's001'"):
        Curriculum(plan, ["s000", "s002", "s003", "s004", "x"], batch_size=2, learning_rates=[1, 1], **options)
    more = Curriculum(plan, ["x", *plan.kept, "y"], batch_size=3, learning_rates=[1, 1], **options)
    assert set(more.indices()) == {1, 2, 3, 4, 5, 6}
    assert [s.samples.tolist() for s in more.stages] == [[1, 2, 3], [1, 2, 3, 4, 5, 6]]


def test_positions_are_looked_up_without_a_python_object_a_sample() -> None:
    plan, ids = plan_of(3, 3), ["s005", "x", "s004", "s000", "s001", "s003", "s002"]
    constants: dict[str, Any] = {"epochs_per_stage": [1, 1], "temperatures": [1, 1], "sft_weights": [0, 0]}
    found = Curriculum(plan, ids, batch_size=3, learning_rates=[1, 1], **constants)
    assert [s.samples.tolist() for s in found.stages] == [[3, 4, 6], [3, 4, 6, 5, 2, 0]]
    assert "subsets" not in vars(plan)


# Batches of like length


def lengths_of(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(5, 200), k=count)


def padding(curriculum: Curriculum, lengths: Sequence[int]) -> int:
    """Padding tokens of the whole run."""
    size, order = curriculum.batch_size, list(curriculum.indices())
    batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return sum(max(batch) * size - sum(batch) for batch in batches)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    batch_size=st.integers(1, 7),
    epochs=st.floats(0.3, 4),
    buckets=st.integers(0, 6),
)
def test_like_lengths_leave_every_stage_its_samples(
    sizes: list[int], batch_size: int, epochs: float, buckets: int
) -> None:
    options = {"batch_size": batch_size, "epochs": epochs, "lengths": lengths_of(sum(sizes))}
    plain, sorted_by_length = (make(sizes, **options, length_buckets=b) for b in (0, buckets))
    assert sorted_by_length.total_steps == plain.total_steps
    size = batch_size * max(1, buckets)
    stages = (by_stage(c, list(c.indices())) for c in (sorted_by_length, plain))
    for found, expected in zip(*stages, strict=True):
        for start in range(0, len(expected), size):  # each window for itself
            assert Counter(found[start : start + size]) == Counter(expected[start : start + size])


@pytest.mark.parametrize("buckets", [2, 4, 8])
def test_like_lengths_save_padding(buckets: int) -> None:
    lengths = lengths_of(96)
    options: dict[str, Any] = {"batch_size": 8, "epochs": 3, "lengths": lengths}
    plain, fewer, less = (make((48, 48), **options, length_buckets=b) for b in (0, buckets // 2, buckets))
    assert padding(less, lengths) < padding(fewer, lengths) <= padding(plain, lengths)
    assert padding(make((48, 48), **options, length_buckets=8), lengths) < 0.4 * padding(plain, lengths)


def test_batches_of_like_length_come_in_any_order() -> None:
    """Long ones first would be another curriculum; each epoch has an order of its own."""
    lengths = lengths_of(64)
    curriculum = make((64,), batch_size=4, epochs=2, lengths=lengths, length_buckets=16)
    order = list(curriculum.indices())
    longest = [max(lengths[i] for i in order[start : start + 4]) for start in range(0, 128, 4)]
    assert longest[:16] != sorted(longest[:16], reverse=True)
    assert longest[:16] != longest[16:]


def test_batches_of_like_length_are_a_function_of_the_seed() -> None:
    options: dict[str, Any] = {"lengths": lengths_of(18), "length_buckets": 3}
    first = list(make((9, 9), seed=1, **options).indices())
    assert first == list(make((9, 9), seed=1, **options).indices())
    assert first != list(make((9, 9), seed=2, **options).indices())


@pytest.mark.parametrize("buckets", [0, 1])
def test_fewer_than_two_buckets_leave_the_order(buckets: int) -> None:
    given_lengths = make((9, 9), lengths=lengths_of(18), length_buckets=buckets)
    assert list(given_lengths.indices()) == list(make((9, 9)).indices())


# Constants of a stage


def test_temperature_and_weight_change_at_the_borders() -> None:
    curriculum = make((4, 4, 4), batch_size=4, epochs=2)
    assert [s.first_step for s in curriculum.stages] == [0, 2, 6]
    assert curriculum.total_steps == 12
    stages = [curriculum.stage_of(step) for step in range(14)]
    assert stages == [0] * 2 + [1] * 4 + [2] * 6 + [2, 2]
    assert [curriculum.temperature(step) for step in range(14)] == [1.0 + k for k in stages]
    assert [curriculum.sft_weight(step) for step in range(14)] == [0.5 / (1 + k) for k in stages]
    assert [step for step in range(14) if curriculum.is_stage_start(step)] == [2, 6]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [1.0, 1.5, 2.0]),
        (3, [3.0, 3.0, 3.0]),
        (0.0, [0.0, 0.0, 0.0]),
        ([1, 5, 2.5], [1.0, 5.0, 2.5]),
        ((1, 5, 2), [1.0, 5.0, 2.0]),
    ],
)
def test_values_of_stages(given: Any, expected: list[float]) -> None:
    found = per_stage("temperature", given, 1.0, 2.0, 3)
    assert found == expected
    assert all(isinstance(x, float) for x in found)


def test_one_stage_takes_the_first_value() -> None:
    assert per_stage("temperature", None, 1.0, 2.0, 1) == [1.0]


def test_a_list_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(UserError, match="sft_weight has 2 values for 3 stages; give one a stage, or one number"):
        per_stage("sft_weight", [0.1, 0.2], 0, 0, 3)


# Learning rate


def cosine(peak: float, low: float, done: int, length: int) -> float:
    return low + (peak - low) * (1 + math.cos(math.pi * done / length)) / 2


def test_each_stage_has_its_own_cosine() -> None:
    curriculum = make((4, 4, 4), batch_size=4, epochs=2, min_learning_rate=1e-5)
    expected = [
        cosine(1e-3 * (k + 1), 1e-5, done, length) for k, length in enumerate((2, 4, 6)) for done in range(length)
    ]
    assert [curriculum.learning_rate(step) for step in range(12)] == pytest.approx(expected, rel=1e-12)
    assert curriculum.learning_rate(2) == 2e-3
    assert curriculum.learning_rate(12) == pytest.approx(1e-5)


def test_or_one_cosine_spans_the_run() -> None:
    curriculum = make((4, 4, 4), batch_size=4, epochs=2, min_learning_rate=1e-5, restart_learning_rate=False)
    expected = [cosine(1e-3, 1e-5, step, 12) for step in range(13)]
    assert [curriculum.learning_rate(step) for step in range(13)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("warmup", "rise"), [(2, 2), (0.5, 5), (0.25, 3), (0.01, 1)])
def test_warm_up_rises_linearly_to_the_peak(warmup: float, rise: int) -> None:
    curriculum = make((10,), batch_size=1, epochs=1, warmup=warmup, min_learning_rate=0)
    rates = [curriculum.learning_rate(step) / 1e-3 for step in range(10)]
    assert rates[: rise + 1] == pytest.approx([(step + 1) / (rise + 1) for step in range(rise + 1)])
    assert rates[rise:] == pytest.approx([cosine(1, 0, done, 10 - rise) for done in range(10 - rise)])


def test_warm_up_comes_again_with_each_restart() -> None:
    again = make((8, 8), batch_size=4, epochs=2, warmup=1)
    starts = [s.first_step for s in again.stages]
    assert [again.learning_rate(s) for s in starts] == pytest.approx([0.5e-3, 1e-3])
    assert [again.learning_rate(s + 1) for s in starts] == pytest.approx([1e-3, 2e-3])
    once = make((8, 8), batch_size=4, epochs=2, warmup=1, restart_learning_rate=False)
    assert once.learning_rate(starts[1]) > once.learning_rate(starts[1] + 1)


@given(st.floats(1e-6, 1), st.floats(0, 1), st.sampled_from([0, 1, 3, 0.1, 0.9]), st.booleans())
def test_the_learning_rate_stays_between_its_ends(peak: float, low: float, warmup: float, restart: bool) -> None:
    options: dict[str, Any] = {"learning_rates": [peak, peak / 2], "restart_learning_rate": restart}
    curriculum = make((5, 5), batch_size=2, warmup=warmup, min_learning_rate=low, **options)
    rates = [curriculum.learning_rate(step) for step in range(curriculum.total_steps)]
    assert all(0 < r <= peak * (1 + 1e-9) for r in rates)
    if warmup == 0:
        border = curriculum.stages[1].first_step
        parts = [rates[:border], rates[border:]] if restart else [rates]
        assert all(a >= b - 1e-12 for part in parts for a, b in pairwise(part))
