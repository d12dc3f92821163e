"""What a compact teacher cache keeps of a row, against the teacher's whole distribution in float64."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_teacher_cache import SAMPLES, VALIDATION, fill, teacher_model
from test_trainer import Watched, config
from tiny import assert_same
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srd_fast import CurriculumPlan, SRDConfig, UserError, register_cache_kind
from srd_fast.losses import Head, Projected, Sampled, TopK
from srd_fast.models import find_head
from srd_fast.teacher import LiveTeacher, make_store
from srd_fast.teacher.stores import SampledStore, bits_for, keeps_head, pack_ids, unpack_ids

TEMPERATURES = (1.0, 1.5, 3.0)
KINDS = ("topk", "sampled", "projected")
CLASSES, WIDTH = 37, 8
# What a head adds to a product; the vocabulary is larger, equal or smaller than the CLASSES in common.
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.4, "bias": True},
    "padded": {"classes": CLASSES + 11},
}


def head(
    classes: int = CLASSES, bias: bool = False, softcap: float | None = None, scale: float = 1.0, seed: int = 0
) -> Head:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, WIDTH, generator=g)
    return Head(weight, torch.randn(classes, generator=g) if bias else None, softcap, scale)


def hidden(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def log_p(hidden_ND: Tensor, of: Head, temperature: float, classes: int = CLASSES) -> Tensor:
    """The teacher's log-probabilities over the first classes, in float64."""
    assert of.weight is not None
    z = hidden_ND.double() @ of.weight.double().T
    z = (z if of.bias is None else z + of.bias.double()) * of.scale
    z = z if of.softcap is None else of.softcap * torch.tanh(z / of.softcap)
    return torch.log_softmax(z[:, :classes] / temperature, -1)


def entropy(log_p_NV: Tensor) -> Tensor:
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def encoded(store: Any, hidden_ND: Tensor, of: Head, counts: Sequence[int] | None = None) -> dict[str, Tensor]:
    """As of one sample, or of samples of so many rows with the keys 7, 8, ..."""
    counts = [len(hidden_ND)] if counts is None else counts
    return store.encode(hidden_ND, of, [key(7 + i) for i in range(len(counts))], counts)


class _Student(torch.nn.Module):
    """As much of a student as its head."""

    def __init__(self, of: Head) -> None:
        super().__init__()
        assert of.weight is not None
        self.head = torch.nn.Linear(WIDTH, len(of.weight), bias=of.bias is not None)
        self.head.weight.data = of.weight
        if of.bias is not None:
            self.head.bias.data = of.bias
        self.config: Any = type("Config", (), {"logit_scale": of.scale})()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


# Ids.


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 20), st.integers(0, 4), st.integers(1, 40), st.randoms(use_true_random=False))
def test_packed_ids_come_back(bits: int, rows: int, count: int, generator: Any) -> None:
    ids = torch.tensor([[generator.randrange(2**bits) for _ in range(count)] for _ in range(rows)])
    ids = ids.long().view(rows, count)
    packed = pack_ids(ids, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(count * bits / 8))
    assert torch.equal(unpack_ids(packed, bits, count), ids)


@pytest.mark.parametrize("bits", range(1, 21))
def test_the_ends_of_the_range_can_be_packed(bits: int) -> None:
    ids = torch.tensor([[0, 2**bits - 1, 0, 2**bits - 1, 2**bits - 1]])
    assert torch.equal(unpack_ids(pack_ids(ids, bits), bits, 5), ids)


@pytest.mark.parametrize(("classes", "bits"), [(2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (152064, 18)])
def test_bits_hold_every_class(classes: int, bits: int) -> None:
    assert bits_for(classes) == bits


# Rows.


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("k", [1, 5, CLASSES - 1])
def test_the_likeliest_classes_and_the_rest(k: int, name: str) -> None:
    of, hidden_ND = head(**HEADS[name]), hidden(40)
    store = make_store("topk", CLASSES, k, TEMPERATURES)
    stored = encoded(store, hidden_ND, of)
    for temperature in TEMPERATURES:
        rows = store.decode(stored, None, temperature)
        assert isinstance(rows, TopK)
        expected = log_p(hidden_ND, of, temperature)
        top = expected.topk(k, -1)
        assert torch.equal(rows.ids_NK.sort(-1).values, top.indices.sort(-1).values)
        # A logit is rounded to 2^-11 of its distance to the largest.
        error = (rows.log_p_NK - expected.gather(1, rows.ids_NK)).abs().max().item()
        furthest = (top.values[:, 0] - top.values[:, -1]).max().item()
        assert error <= 2**-11 * furthest + 2e-6
        rest = expected.scatter(1, top.indices, -math.inf).logsumexp(-1)
        assert (rows.log_tail_N - rest).abs().max() <= 2**-11 * furthest + 1e-5
        mass = rows.log_p_NK.exp().sum(-1) + rows.log_tail_N.exp()
        assert mass == pytest.approx(torch.ones(40), abs=tiny.rounding(CLASSES))


@pytest.mark.parametrize("name", HEADS)
def test_drawn_classes_follow_the_distribution(name: str) -> None:
    """Pearson's chi-square of 60,000 draws of a row, classes expected under 5 times taken together."""
    of, hidden_ND, k = head(**HEADS[name]), hidden(2), 60_000
    store = SampledStore(k, TEMPERATURES, CLASSES)
    stored = encoded(store, hidden_ND, of)
    for temperature in TEMPERATURES:
        rows = store.decode(stored, None, temperature)
        assert isinstance(rows, Sampled)
        log_p_NV = log_p(hidden_ND, of, temperature)
        assert_same(rows.entropy_N, entropy(log_p_NV), 1e-5)
        for ids, p in zip(rows.ids_NK, log_p_NV.exp()):
            counts, wanted = torch.bincount(ids, minlength=CLASSES).double(), k * p
            assert len(counts) == CLASSES
            rare = wanted < 5
            counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
            wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None].clamp(min=1e-9)])
            chi_square = ((counts - wanted)[wanted > 1].square() / wanted[wanted > 1]).sum().item()
            freedom = int((wanted > 1).sum()) - 1
            assert freedom >= 5
            assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # five standard deviations


def test_draws_of_two_rows_and_temperatures_are_independent() -> None:
    """Of equal rows, the same draws would mean the same random numbers."""
    hidden_ND = hidden(1).expand(2, -1)
    store = SampledStore(50, (1.0, 1.0001), CLASSES)
    ids = [store.decode(encoded(store, hidden_ND, head()), None, t).ids_NK for t in (1.0, 1.0001)]
    drawn = {tuple(row) for x in ids for row in x.tolist()}
    assert len(drawn) == 4


def test_a_samples_draws_follow_from_its_key_alone() -> None:
    store, of = make_store("sampled", CLASSES, 9, TEMPERATURES), head()
    counts = [3, 0, 4, 2]
    hidden_ND = hidden(sum(counts))
    together, start = encoded(store, hidden_ND, of, counts), 0
    for number, count in enumerate(counts):
        alone = store.encode(hidden_ND[start : start + count], of, [key(7 + number)], [count])
        for name, value in alone.items():
            assert torch.equal(value, together[name][start : start + count]), name
        start += count
    again = store.encode(hidden_ND, of, [key(70 + i) for i in range(4)], counts)
    assert not torch.equal(again["ids"], together["ids"])
    assert torch.equal(again["entropy"], together["entropy"])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("of_student", [{}, {"bias": True, "scale": 0.7}, {"classes": CLASSES - 5}])
def test_the_projection_is_the_mean_of_the_students_head(of_student: dict[str, Any], name: str) -> None:
    student = head(seed=2, **of_student)
    of, hidden_ND = head(**HEADS[name]), hidden(20)
    assert student.weight is not None
    store = make_store("projected", CLASSES, temperatures=TEMPERATURES, student=_Student(student))
    stored = encoded(store, hidden_ND, of)
    classes = min(len(student.weight), len(of.weight))  # type: ignore[arg-type]
    for temperature in TEMPERATURES:
        rows = store.decode(stored, None, temperature)
        assert isinstance(rows, Projected)
        expected = log_p(hidden_ND, of, temperature, classes)
        p = expected.exp()
        assert_same(rows.projection_ND, p @ student.weight[:classes].double() * student.scale, 1e-5)
        assert_same(rows.entropy_N, entropy(expected), 1e-5)
        if student.bias is None:
            assert not rows.bias_N.any()
        else:
            assert_same(rows.bias_N, p @ student.bias[:classes].double() * student.scale, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_logits_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, hidden_ND = head(), hidden(11)
    store = make_store(kind, CLASSES, 4, TEMPERATURES, _Student(head(seed=2, bias=True)))
    whole = encoded(store, hidden_ND, of)
    monkeypatch.setattr("srd_fast.teacher.stores._CHUNK_BYTES", 3 * CLASSES * 4)
    parts = encoded(store, hidden_ND, of)
    for name, value in whole.items():
        if name == "ids" and kind == "topk":
            assert torch.equal(parts[name], value)
        elif name != "ids":  # draws have an order of their own
            assert_same(parts[name].float(), value.float(), 1e-5, name)


@pytest.mark.parametrize("kind", [*KINDS, "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_takes_the_bytes_that_it_says(kind: str, dtype: torch.dtype) -> None:
    store = make_store(kind, CLASSES, 5, TEMPERATURES, _Student(head(seed=2)))
    of = head().to(dtype)
    stored = encoded(store, hidden(6).to(dtype), of)
    assert {len(x) for x in stored.values()} == {6}
    assert sum(x.numel() * x.element_size() for x in stored.values()) == 6 * store.bytes_per_row(of, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_that_is_not_there_is_named(kind: str) -> None:
    store = make_store(kind, CLASSES, 4, (2.0, 1.0, 1), _Student(head(seed=2)))
    stored = encoded(store, hidden(3), head())
    store.decode(stored, None, 2.0 + 1e-12)
    with pytest.raises(UserError, match=r"holds rows for the temperatures 1, 2, not 1\.5"):
        store.decode(stored, None, 1.5)


@pytest.mark.parametrize("kind", ["topk", "sampled"])
@pytest.mark.parametrize("k", [0, -1, CLASSES])
def test_k_is_checked(kind: str, k: int) -> None:
    with pytest.raises(UserError, match=f"k must be from 1 to {CLASSES - 1}, got {k}"):
        make_store(kind, CLASSES, k)


def test_kinds_are_checked() -> None:
    with pytest.raises(UserError, match="unknown teacher cache kind 'top_k'; did you mean 'topk'"):
        make_store("top_k", CLASSES)
    with pytest.raises(UserError, match="needs the student, whose head must not change"):
        make_store("projected", CLASSES)


@pytest.mark.usefixtures("own_registries")
def test_a_kind_of_ones_own_is_made_as_it_says() -> None:
    asked: list[Any] = []

    def make(classes: int, **options: Any) -> Any:
        asked.append((classes, options))
        return make_store("topk", classes, options["k"])

    register_cache_kind("mine", make, rows=TopK)
    assert make_store("mine", CLASSES, 3, (2, 1.0, 2.0)) == make_store("topk", CLASSES, 3)
    assert asked == [(CLASSES, {"k": 3, "temperatures": (1.0, 2.0), "student": None})]
    assert not keeps_head("mine")
    fields: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "teacher_cache": "c", "teacher_cache_kind": "mine"}
    SRDConfig(**fields)
    with pytest.raises(UserError, match="needs a teacher_cache_kind of hidden, projected, sampled, not 'mine'"):
        SRDConfig(**fields, position_selection="topk_teacher_entropy")
    with pytest.raises(UserError, match="teacher_cache_kind 'mine' does not hold it"):
        SRDConfig(**fields, class_sampling=8, divergence="forward_kl")
    register_cache_kind("mine", make, rows=Sampled, replace=True)
    with pytest.raises(UserError, match="teacher_cache_kind 'mine' gives only forward_kl"):
        SRDConfig(**fields)


# In a cache.


@pytest.mark.parametrize("kind", KINDS)
def test_a_compact_cache_is_the_same_in_any_order_and_batch(kind: str, tmp_path: Path) -> None:
    """A sample alone in its batch has the rows that it has among others."""
    teacher, student = teacher_model(), tiny.tiny_model("phi")
    store = make_store(kind, tiny.VOCAB, 6, TEMPERATURES, student)
    one, other = (
        fill(tmp_path / str(tokens), teacher, samples, kind=kind, store=store, batch_tokens=tokens)
        for samples, tokens in ((SAMPLES, 1), (SAMPLES[::-1], 4096))
    )
    for temperature in TEMPERATURES:
        rows = [c.rows({"teacher": c.collate(SAMPLES)}, temperature) for c in (one, other)]
        for name, value in rows[0]._asdict().items():
            if name == "ids_NK":
                assert torch.equal(value, getattr(rows[1], name))
            else:
                assert_same(getattr(rows[1], name), value, 2e-3 if kind == "topk" else 1e-5, name)
    assert not (tmp_path / "1" / "head.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_cached_rows_are_those_of_the_teachers_distribution(kind: str, tmp_path: Path) -> None:
    """From tokens to rows: every row belongs to its own label."""
    teacher, student = teacher_model(vocab=tiny.VOCAB + 8), tiny.tiny_model("llama")
    cache = fill(tmp_path, teacher, kind=kind, store=make_store(kind, tiny.VOCAB, 6, (1.0, 2.0), student))
    live = LiveTeacher(teacher).rows(tiny.collate(SAMPLES), 2.0)
    expected = log_p(live.hidden_ND, live.head, 2.0, tiny.VOCAB)
    rows = cache.rows({"teacher": cache.collate(SAMPLES)}, 2.0)
    assert cache.num_classes == tiny.VOCAB + 8
    if isinstance(rows, TopK):
        assert torch.equal(rows.ids_NK[:, 0], expected.argmax(-1))
        assert_same(rows.log_p_NK, expected.gather(1, rows.ids_NK), 1e-3)
    elif isinstance(rows, Sampled):
        assert_same(rows.entropy_N, entropy(expected), 1e-5)
        drawn = expected.gather(1, rows.ids_NK)
        # The mean of -log p over draws is the entropy, on the whole within five standard errors.
        spread = (expected.exp() * expected.square()).sum(-1) - entropy(expected).square()
        error = ((-drawn).mean(-1) - entropy(expected)).mean().item()
        assert abs(error) < 5 * math.sqrt(spread.sum().item() / 6) / len(spread)
        uniform = -expected.mean(-1) - entropy(expected)
        assert uniform.mean().item() > 10 * math.sqrt(spread.sum().item() / 6) / len(spread), "it could not fail"
    else:
        weight = find_head(student).weight
        assert weight is not None
        assert_same(rows.projection_ND, expected.exp() @ weight.double(), 1e-5)


# Training.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(
    tokenizer: PreTrainedTokenizerFast, lora: bool = False, vocab: tuple[int, int] = (300, 300), **fields: Any
) -> Any:
    """Two stages with a temperature each; metrics before and after. vocab: of student and teacher."""
    torch.manual_seed(0)
    adapters = None
    if lora:
        adapters = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ids = [s["sample_id"] for s in SAMPLES]
    trainer = Watched(
        model=tiny.tiny_model("llama", vocab=vocab[0]),
        teacher_model=teacher_model(vocab=vocab[1]),
        args=config(temperature=[1.0, 2.0], epochs_per_stage=2, **fields),
        train_dataset=copy.deepcopy(SAMPLES),
        curriculum=CurriculumPlan(subsets=[ids[:7], ids[7:]]),
        eval_dataset=VALIDATION,
        processing_class=tokenizer,
        peft_config=adapters,
    )
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    return trainer, [before, trainer.evaluate()["eval_kl"]]


def test_a_projected_cache_trains_adapters_as_the_teacher_does(tokenizer: Any, tmp_path: Path) -> None:
    fields = {"lora": True, "divergence": "forward_kl", "learning_rate": 1.0}
    live, expected = trained(tokenizer, **fields)
    fields |= {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_kind": "projected"}
    cached, metrics = trained(tokenizer, **fields)
    assert len(set(live.losses)) == len(live.losses) == 12
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert expected[1] < expected[0]
    for (name, found), wanted in zip(cached.model.named_parameters(), live.model.parameters(), strict=True):
        assert_same(found, wanted, 1e-4, name)


def test_a_projected_cache_needs_a_frozen_head(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="requires a gradient"):
        trained(tokenizer, divergence="forward_kl", teacher_cache=str(tmp_path / "c"), teacher_cache_kind="projected")[
            0
        ].train()


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [
        (300, 300),
        pytest.param(300, 316, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl"])
def test_nearly_all_classes_train_as_the_teacher_does(
    divergence: str, of_student: int, of_teacher: int, tokenizer: Any, tmp_path: Path
) -> None:
    """What is left between the two is the rounding of logits to float16."""
    options: dict[str, Any] = {"vocab": (of_student, of_teacher), "divergence": divergence}
    live, expected = trained(tokenizer, **options)
    options |= {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_kind": "topk", "teacher_cache_k": 299}
    cached, metrics = trained(tokenizer, **options)
    assert cached.losses == pytest.approx(live.losses, rel=2e-3)
    assert metrics == pytest.approx(expected, rel=2e-3)


def test_a_student_with_more_classes_than_the_teacher_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab": (316, 300), "divergence": "forward_kl", "teacher_cache_k": 8}
    for kind in ("topk", "sampled"):
        with pytest.raises(UserError, match="316 classes and the teacher 300"):
            trained(tokenizer, **options, teacher_cache=str(tmp_path / kind), teacher_cache_kind=kind)


def test_few_classes_train_nearly_as_the_teacher_does(tokenizer: Any, tmp_path: Path) -> None:
    """Each bucket less takes from the divergence."""
    _, expected = trained(tokenizer, divergence="forward_kl", sft_weight=0.0)
    found = []
    for k in (4, 64):
        fields: dict[str, Any] = {"teacher_cache": str(tmp_path / str(k)), "teacher_cache_kind": "topk"}
        found.append(trained(tokenizer, divergence="forward_kl", sft_weight=0.0, **fields, teacher_cache_k=k)[1])
    for few, more, all_classes in zip(*found, expected, strict=True):
        assert 0.2 * all_classes < few < more < all_classes
        assert more > 0.8 * all_classes


def test_drawn_classes_train_nearly_as_the_teacher_does(tokenizer: Any, tmp_path: Path) -> None:
    live, expected = trained(tokenizer, divergence="forward_kl")
    fields: dict[str, Any] = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_kind": "sampled"}
    cached, metrics = trained(tokenizer, divergence="forward_kl", **fields, teacher_cache_k=256)
    assert cached.losses != live.losses
    assert cached.losses == pytest.approx(live.losses, rel=0.1)
    assert metrics == pytest.approx(expected, rel=0.1)
    again, _ = trained(tokenizer, divergence="forward_kl", **fields, teacher_cache_k=256)
    assert again.losses == cached.losses
