"""`model_distillation_loss` beside the loop that everyone writes first: two models, their full logits, a batch."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import DataCollatorWithFlattening

from srd_fast import UserError, build_teacher_cache, model_distillation_loss
from srd_fast.data import DistillationCollator
from srd_fast.teacher import LiveTeacher, StepCollator

OPTIONS: dict[str, Any] = {"divergence": "skew_reverse_kl", "temperature": 1.5, "sft_weight": 0.3, "skew": 0.2}


def pair(architecture: str = "llama", dtype: torch.dtype = torch.float64, **teacher: Any) -> tuple[Any, Any]:
    # Gemma 2's window must reach a token from all padding: where it sees none, its own states are NaN.
    config = {"sliding_window": 64} if architecture == "gemma2" else {}
    student = tiny.tiny_model(architecture, seed=1, layers=1, **config).to(dtype)
    return student, tiny.tiny_model(architecture, seed=2, width=24, **config, **teacher).to(dtype)


def a_batch(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return tiny.collate(tiny.tiny_samples(count, seed))


def naive(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """[N] the loss of each label with loss, from the logits of whole calls."""
    # With a cache, transformers does not look for the borders of joined rows.
    inputs: dict[str, Any] = {**{name: x for name, x in batch.items() if name != "labels"}, "use_cache": False}
    with torch.no_grad():
        p_BLV = teacher(**inputs).logits[:, :-1]
    q_BLV, labels = student(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    kept = labels != tiny.IGNORE
    return tiny.plain_loss(q_BLV[kept], p_BLV[kept], labels[kept], **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(student: nn.Module, mine: Tensor, expected: Callable[[], Tensor], tolerance: float) -> None:
    """The loss, and the gradient of every parameter that has one."""
    mine.backward()
    found = gradients(student)
    student.zero_grad()
    wanted = expected()
    wanted.backward()
    assert mine.item() == pytest.approx(wanted.item(), rel=tolerance)
    assert found.keys() == gradients(student).keys()
    for name, gradient in gradients(student).items():
        if gradient.abs().max() > 1e-12:
            tiny.assert_same(found[name], gradient, tolerance, name)


@pytest.mark.parametrize(
    ("architecture", "divergence"),
    [
        ("llama", "forward_kl"),
        ("gemma2", "jsd"),
        ("phi", "reverse_kl"),
        ("cohere", "tvd"),
        ("granite", "skew_forward_kl"),
    ],
)
def test_it_is_the_loss_of_the_full_logits(architecture: str, divergence: str) -> None:
    """The teacher's vocabulary is padded, and one label inside a response has no loss."""
    student, teacher = pair(architecture, vocab=tiny.VOCAB + 4)
    batch, options = a_batch(), {**OPTIONS, "divergence": divergence}
    out = model_distillation_loss(student, teacher, {**batch, "sample_id": ["a"]}, **options)
    assert int(out.num_items) == int((batch["labels"][:, 1:] != tiny.IGNORE).sum())
    assert_same_training(student, out.loss, lambda: naive(student, teacher, batch, **options).mean(), 1e-9)
    assert not gradients(teacher)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_an_encoder_decoder_model_reads_its_labels_unshifted(name: str) -> None:
    student, teacher = (encoder_decoders.tiny_model(name, seed=s).double() for s in (1, 2))
    batch = a_batch()
    batch["labels"] = batch["labels"].roll(-3, 1)
    out = model_distillation_loss(student, teacher, batch, **OPTIONS)

    def expected() -> Tensor:
        kept = batch["labels"] != tiny.IGNORE
        with torch.no_grad():
            p = teacher(**batch).logits[kept]
        return tiny.plain_loss(student(**batch).logits[kept], p, batch["labels"][kept], **OPTIONS).mean()

    assert_same_training(student, out.loss, expected, 1e-9)


def test_what_the_models_read_is_passed_on() -> None:
    """Left padding with positions of its own, and rows joined without padding, as transformers' collator does."""
    student, teacher = pair("gpt2")
    left = {name: x.flip(1) for name, x in a_batch().items()}
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    joined = dict(DataCollatorWithFlattening()(tiny.tiny_samples(3)))
    for batch in (left, joined):
        out = model_distillation_loss(student, teacher, batch, **OPTIONS)
        assert_same_training(student, out.loss, lambda: naive(student, teacher, batch, **OPTIONS).mean(), 1e-9)  # noqa: B023
        student.zero_grad()


def test_one_value_a_label_weights_and_the_denominator() -> None:
    student, teacher = pair()
    batch = a_batch()
    places = batch["labels"] != tiny.IGNORE
    places[:, 0] = False
    rows = naive(student, teacher, batch, **OPTIONS)
    none = model_distillation_loss(student, teacher, batch, reduction="none", **OPTIONS)
    tiny.assert_same(none.loss[places], rows, 1e-9)
    assert none.loss[~places].abs().sum() == 0
    assert none.entropy.shape == batch["labels"].shape
    weights = torch.rand(batch["labels"].shape, dtype=torch.float64)
    out = model_distillation_loss(student, teacher, batch, token_weights=weights, num_items=7, **OPTIONS)
    assert out.loss.item() == pytest.approx(((rows * weights[places]).sum() / 7).item(), rel=1e-9)
    batch["labels"][:] = tiny.IGNORE
    empty = model_distillation_loss(student, teacher, batch, **OPTIONS)
    empty.loss.backward()
    assert empty.loss.item() == 0


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_what_is_around_a_student_changes_nothing() -> None:
    """DDP, compiled models, adapters: the same loss and gradients, and DDP gets to know of the backward pass."""
    bare, teacher = pair()
    batch = a_batch()
    model_distillation_loss(bare, teacher, batch, **OPTIONS).loss.backward()
    for wrap in (
        DistributedDataParallel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
        lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
    ):
        student = pair()[0]
        wrapped = wrap(student)
        seen: list[str] = []
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(seen, lambda state, bucket: (state.append("reduced"), _done(bucket))[1])
        model_distillation_loss(wrapped, torch.compile(teacher, backend="eager"), batch, **OPTIONS).loss.backward()
        assert gradients(student).keys() == gradients(bare).keys()
        for name, gradient in gradients(bare).items():
            tiny.assert_same(gradients(student)[name], gradient, 1e-12, name)
        assert bool(seen) == isinstance(wrapped, DistributedDataParallel)


def _done(bucket: Any) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_adapters_of_peft_are_trained() -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: pip install 'srd-fast[peft]'")
    student, teacher = pair()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(student, config)
    batch = a_batch()
    out = model_distillation_loss(adapted, teacher, batch, **OPTIONS)
    assert_same_training(adapted, out.loss, lambda: naive(adapted, teacher, batch, **OPTIONS).mean(), 1e-9)
    assert all("lora" in name for name in gradients(adapted))
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="PromptTuningConfig"):
        model_distillation_loss(peft.get_peft_model(pair()[0], prompts), teacher, batch)


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """accelerate keeps one state for a process, which other tests have made and will make."""
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._shared_state.clear()
    yield
    for state in states:
        state._shared_state.clear()


@pytest.mark.usefixtures("own_accelerator")
def test_autocast_is_that_of_the_loop_or_of_accelerate() -> None:
    """In bfloat16 the error against float64 is no larger than that of the full logits, and the two ways are one."""
    batch, options = a_batch(8), {**OPTIONS, "divergence": "forward_kl"}
    student, teacher = pair(dtype=torch.float32)
    exact = [m.double() for m in copy.deepcopy((student, teacher))]
    truth = naive(*exact, batch, **options).mean()
    truth.backward()

    def error() -> float:
        found = gradients(student)
        student.zero_grad()
        return sum((found[n].double() - g).norm().item() for n, g in gradients(exact[0]).items())

    with torch.autocast("cpu", torch.bfloat16):
        naive(student, teacher, batch, **options).mean().backward()
        theirs = error()
        mine = model_distillation_loss(student, teacher, batch, **options).loss
    mine.backward()
    ours = error()
    assert 0 < ours <= 1.2 * theirs
    assert mine.item() == pytest.approx(truth.item(), rel=2e-2)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared, frozen = accelerator.prepare(student), accelerator.prepare_model(teacher, evaluation_mode=True)
    assert model_distillation_loss(prepared, frozen, batch, **options).loss.item() == mine.item()


def test_a_teacher_is_a_source_too(tmp_path: Path) -> None:
    """Live, or a cache: with the batch's own samples, or with the rows that a collator brought."""
    student, teacher = pair(dtype=torch.float32)
    samples = tiny.tiny_samples(4)
    batch = tiny.collate(samples)
    expected = model_distillation_loss(student, teacher, batch, **OPTIONS).loss
    cache = build_teacher_cache(teacher, samples, tmp_path / "cache", progress=False)
    collated = StepCollator(DistillationCollator(), cache, ahead=True)(samples)
    joined = dict(DataCollatorWithFlattening()(samples))
    for source, given in ((LiveTeacher(teacher), batch), (cache, batch), (cache, collated), (cache, joined)):
        out = model_distillation_loss(student, source, given, **OPTIONS)
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UserError, match="does not hold sample"):
        model_distillation_loss(student, cache, a_batch(seed=9), **OPTIONS)
    own = DistillationCollator(flatten=True)(samples)
    with pytest.raises(UserError, match="StepCollator"):
        model_distillation_loss(student, cache, own, **OPTIONS)


def test_the_teacher_does_not_drop_and_modes_stay() -> None:
    student, teacher = pair("gpt2", dtype=torch.float32, resid_pdrop=0.5)
    batch = a_batch()
    expected = model_distillation_loss(student, teacher, batch).loss.item()
    teacher.train()
    teacher.transformer.wte.eval()
    student.train()
    assert model_distillation_loss(student, teacher, batch).loss.item() == pytest.approx(expected, rel=1e-6)
    assert student.training
    assert teacher.training
    assert not teacher.transformer.wte.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "gpt2"}, "student must be a model, got 'gpt2'"),
        ({"teacher": None}, "teacher must be a model, or a source"),
        ({"teacher": "gpt2"}, "teacher must be a model, got 'gpt2'"),
        ({"teacher": nn.Linear(2, 2)}, "teacher Linear has no language-model head"),
        ({"teacher": tiny.tiny_model(vocab=900)}, "300 and 900 classes"),
        ({"batch": [1]}, "batch must be a mapping"),
        ({"batch": {"input_ids": torch.ones(1, 3, dtype=torch.long)}}, r"batch\['labels'\] must be a tensor"),
        ({"labels": torch.ones(4, 3, dtype=torch.long)}, "with labels unshifted"),
        ({"temperature": 0}, "temperature must be"),
        ({"divergence": "kl"}, "kl"),
        ({"token_weights": torch.ones(3)}, "token_weights must have the shape of labels"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    student, teacher = pair(dtype=torch.float32)
    batch = a_batch()
    if "labels" in change:
        batch["labels"] = change.pop("labels")
    given = {"student": student, "teacher": teacher, "batch": batch, **change}
    with pytest.raises(UserError, match=message):
        model_distillation_loss(**given)


def test_a_head_that_is_not_understood_is_found_out() -> None:
    student, teacher = pair(dtype=torch.float32)
    own = teacher.forward
    teacher.forward = lambda *a, **k: _scaled(own(*a, **k))
    with pytest.raises(UserError, match="differ from its own logits"):
        model_distillation_loss(student, teacher, a_batch())
    del teacher.forward
    mixed = encoder_decoders.tiny_model("t5")
    with pytest.raises(UserError, match="the teacher an encoder-decoder model"):
        model_distillation_loss(student, mixed, a_batch())


def _scaled(out: Any) -> Any:
    out.logits = out.logits * 2
    return out
