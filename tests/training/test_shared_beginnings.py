"""What several samples of a flattened batch begin with stands in it once, and training gives the same."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_flattening import enabled, gradients, make
from tiny import IGNORE, assert_same
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer
from srd_fast.data import DistillationCollator, with_loss_rows
from srd_fast.models import compile_layers, hidden_states, unfit_for_shared_prefix, varlen
from srd_fast.selection.positions import rows_of_samples
from srd_fast.teacher import LiveTeacher

ONE, OTHER = list(range(20, 32)), [*range(20, 29), 60, 61]


def behind(start: list[int], count: int, seed: int) -> list[dict[str, Any]]:
    """Samples of uneven lengths behind the same prompt."""
    samples = tiny.tiny_samples(count, seed=seed, longest=8)
    return [
        {
            "sample_id": f"{seed}-{s['sample_id']}",
            "input_ids": start + s["input_ids"],
            "labels": [IGNORE] * len(start) + s["labels"],
        }
        for s in samples
    ]


def mixed(seed: int = 0) -> list[dict[str, Any]]:
    """Two beginnings, samples of each in turns, and one sample that begins with neither."""
    one, other = behind(ONE, 3, seed + 1), behind(OTHER, 3, seed + 2)
    samples = [s for pair in zip(one, other) for s in pair]
    return [*samples[:4], *behind([], 1, seed + 3), *samples[4:]]


SAMPLES = mixed()
SHARED = DistillationCollator(0, flatten=True, share_prefix=True)
WHOLE = DistillationCollator(0, flatten=True)


def samples_of(batch: dict[str, Any], name: str) -> list[list[int]]:
    """A batch's samples put together again."""
    borders = batch["cu_seq_lens"].tolist()
    parts = [batch[name][0, a:b].tolist() for a, b in pairwise(borders)]
    own = parts[-len(batch["continues"]) :]
    return [(parts[k] if k >= 0 else []) + part for k, part in zip(batch["continues"], own)]


def test_each_beginning_stands_once_and_samples_keep_their_order() -> None:
    batch = SHARED(SAMPLES)
    assert batch["continues"] == [0, 1, 0, 1, -1, 0, 1]
    assert samples_of(batch, "input_ids") == [s["input_ids"] for s in SAMPLES]
    assert samples_of(batch, "labels") == [[IGNORE, *s["labels"][1:]] for s in SAMPLES]
    assert samples_of(batch, "position_ids") == [list(range(len(s["input_ids"]))) for s in SAMPLES]
    whole = sum(len(s["input_ids"]) for s in SAMPLES)
    assert batch["input_ids"].numel() == whole - 2 * len(ONE) - 2 * len(OTHER)


def test_rows_with_loss_are_those_of_whole_samples() -> None:
    shared, whole = with_loss_rows(SHARED(SAMPLES)), with_loss_rows(WHOLE(SAMPLES))
    assert shared["loss_labels"].tolist() == whole["loss_labels"].tolist()
    assert shared["loss_counts"] == whole["loss_counts"] == rows_of_samples(shared).tolist()
    seen = [batch["input_ids"][0][batch["loss_rows"]].tolist() for batch in (shared, whole)]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("samples", "shared"),
    [
        (SAMPLES[:1], None),
        (behind(ONE[:7], 4, 1), None),
        ([SAMPLES[0], SAMPLES[4]], None),
        # What predicts a first label is the sample's own, also where the prompts are all alike.
        ([{"input_ids": [*ONE, 5, n], "labels": [IGNORE] * 12 + [5, n]} for n in (1, 2, 3)], 11),
        ([{"input_ids": [*ONE, n], "labels": [IGNORE] * 9 + [29, 30, 31, n]} for n in (1, 2, 3)], 8),
        ([{"input_ids": ONE, "labels": [IGNORE] * 12}] * 2, 11),
        ([{"input_ids": ONE, "labels": ONE}] * 2, None),
        ([{"input_ids": [7], "labels": [7]}] * 3, None),
    ],
)
def test_how_much_is_shared(samples: list[dict[str, Any]], shared: int | None) -> None:
    batch = SHARED(samples)
    if shared is None:
        whole = WHOLE(samples)
        assert batch.keys() == whole.keys()
        assert all(torch.equal(batch[n], whole[n]) for n in whole)
        return
    assert batch["cu_seq_lens"][1] == shared
    assert samples_of(batch, "input_ids") == [s["input_ids"] for s in samples]
    assert with_loss_rows(batch)["loss_labels"].tolist() == [y for s in samples for y in s["labels"][1:] if y != IGNORE]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "granite", "opt", "Gemma3Text", "Mistral", "Mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_whole_samples(name: str, checkpointing: bool) -> None:
    model, reference = enabled(name), make(name)
    assert unfit_for_shared_prefix(model) is None
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    expected, wanted = losses(reference, DistillationCollator(0)(SAMPLES))
    found, made = losses(model, SHARED(SAMPLES))
    assert_same(found, expected, 1e-5, "hidden states")
    largest = max(g.abs().max() for g in wanted.values())
    for name_, gradient in wanted.items():
        assert (made[name_] - gradient).abs().max() < 1e-5 * max(largest, 1.0), name_


def losses(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of the rows with loss, and gradients of a sum that weights each."""
    rows = with_loss_rows(batch)["loss_rows"]
    model.zero_grad(set_to_none=True)
    states_ND = hidden_states(model, batch).flatten(0, 1)[rows]
    weights = torch.randn(states_ND.shape, generator=torch.Generator().manual_seed(1))
    (states_ND * weights).sum().backward()
    return states_ND.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def textbook(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], continues: list[int], window: int | None) -> Tensor:
    """[1, L, heads, D]: one softmax over everything, with what a token may not see masked."""
    total, fronts = sum(lengths), len(lengths) - len(continues)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    seen, place = torch.zeros(total, total, dtype=torch.bool), torch.zeros(total, dtype=torch.long)
    for i, n in enumerate(lengths):
        front = continues[i - fronts] if i >= fronts else -1
        own = list(range(starts[i], starts[i] + n))
        before = list(range(starts[front], starts[front] + lengths[front])) if front >= 0 else []
        place[own] = torch.arange(len(before), len(before) + n)
        for t in own:
            seen[t, before + [s for s in own if s <= t]] = True
    if window is not None:
        seen &= place[:, None] - place[None, :] < window
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * 0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 4, 6, 100])
@pytest.mark.parametrize(
    ("lengths", "continues"),
    [([5, 3, 3, 1], [0, 0, 0]), ([4, 4, 3, 3, 2, 4], [1, 0, -1, 1]), ([6, 1], [0]), ([2, 3], [-1, -1])],
)
@pytest.mark.parametrize("opaque", [False, True])
def test_attention_is_softmax_over_the_sample_and_its_beginning(
    lengths: list[int], continues: list[int], window: int | None, opaque: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), 8) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    expected = textbook(q, k, v, lengths, continues, window)
    if opaque:
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        inputs = q, k, v, starts, window or 0, 0.5, 0.0, torch.tensor(continues, dtype=torch.int32)
        found, _ = varlen._attend_in_samples(*inputs)
        if window in (None, 4):
            torch.library.opcheck(varlen._attend_in_samples, inputs)
    else:
        found = varlen._attend_by_length(q, k, v, lengths, window, 0.5, 0.0, continues)
    assert_same(found, expected, 1e-12)
    weights = torch.cos(torch.arange(found.numel())).view_as(found)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (found, expected))):
        assert (a - b).abs().max() < 1e-12


def test_compiled_layers_take_them() -> None:
    model, reference = enabled("llama").train(), enabled("llama").train()
    assert compile_layers(model, flattened=True, backend="eager") is None
    for seed, collate in ((0, SHARED), (4, WHOLE), (8, SHARED)):
        samples = mixed(seed)
        found, made = gradients(model, collate(samples))
        expected, wanted = gradients(reference, collate(samples))
        assert_same(found, expected, 1e-5)
        for name, gradient in wanted.items():
            assert_same(made[name], gradient, 1e-4, name)


def test_dropout_is_each_samples_own() -> None:
    """In a model that drops nothing, as teachers do, a beginning is shared all the same."""
    model = enabled("gpt2", resid_pdrop=0.1)
    assert "dropout" in str(unfit_for_shared_prefix(model))
    assert unfit_for_shared_prefix(model.requires_grad_(False)) is None
    assert "dropout" in str(unfit_for_shared_prefix(enabled("llama", attention_dropout=0.1)))


def test_other_implementations_do_not_share() -> None:
    assert "sdpa" in str(unfit_for_shared_prefix(tiny.tiny_model("llama")))
    with pytest.raises(ValueError, match="in flash_attention_2 no sample can see the keys of another"):
        varlen.varlen_keywords(torch.tensor([0, 4, 6]), torch.device("cpu"), "flash_attention_2", continues=[0])


def test_a_model_that_counts_tokens_is_noticed() -> None:
    """Positions are right, and yet a token's state depends on where in the batch it stands."""
    model = enabled("llama")

    def by_place(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + 0.05 * torch.arange(output.shape[1])[:, None])

    model.model.layers[0].mlp.register_forward_hook(by_place)
    assert "behind a shared beginning come out different" in str(unfit_for_shared_prefix(model))


# Training.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


class Batches:
    """What the trainer's student was given."""

    def __init__(self) -> None:
        self.tokens = 0
        self.shared = 0

    def watch(self, trainer: SRDTrainer) -> None:
        compute = trainer.compute_loss

        def counted(model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            self.tokens += inputs["input_ids"].numel()
            self.shared += "continues" in inputs
            return compute(model, inputs, *args, **options)

        trainer.compute_loss = counted  # type: ignore[method-assign]


def make_trainer(
    tokenizer: PreTrainedTokenizerFast, folder: Path, fields: dict[str, Any], **options: Any
) -> SRDTrainer:
    usual: dict[str, Any] = {"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    usual |= {"per_device_train_batch_size": 7, "epochs_per_stage": 1, "logging_steps": 1, "learning_rate": 1e-3}
    usual |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    given: dict[str, Any] = {
        "model": tiny.tiny_model("llama"),
        "teacher_model": tiny.tiny_model("llama_untied", seed=1, width=24),
        "train_dataset": [row for seed in range(0, 40, 10) for row in mixed(seed)],
        "eval_dataset": mixed(50),
    }
    torch.manual_seed(0)
    return SRDTrainer(**{**given, **options}, args=SRDConfig(**{**usual, **fields}), processing_class=tokenizer)


def shares(trainer: SRDTrainer) -> bool:
    collator: Any = trainer._collate.collate
    return bool(collator.share_prefix)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"bf16": True}, marks=pytest.mark.slow),
        {"teacher_cache": "cache"},
        {"max_tokens_per_batch": 60},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        pytest.param({"position_selection": "topk_student_entropy"}, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: next(iter(fields), "plain"),
)
def test_training_follows_the_curve_of_whole_samples(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    if "teacher_cache" in fields:
        fields = fields | {"teacher_cache": str(tmp_path / "cache")}
    curves, seen = [], []
    for shared in (False, True):
        trainer, batches = make_trainer(tokenizer, tmp_path, fields), Batches()
        assert shares(trainer)
        trainer._collate.collate.share_prefix = shared  # type: ignore[attr-defined]
        batches.watch(trainer)
        trainer.train()
        names = ("loss", "grad_norm", "eval_loss", "eval_cross_entropy")
        curves.append([entry[n] for entry in trainer.state.log_history for n in names if n in entry])
        seen.append(batches)
    assert len(curves[0]) >= 8
    assert curves[1] == pytest.approx(curves[0], rel=0.02 if "bf16" in fields else 1e-4)
    assert seen[0].shared == 0
    assert seen[1].shared > 0
    assert seen[1].tokens < (0.95 if "max_tokens_per_batch" in fields else 0.8) * seen[0].tokens


def test_what_differs_from_sample_to_sample_is_not_shared(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Noise in the embeddings, dropout, batches that a teacher of the user's own gets."""
    peft = pytest.importorskip("peft")
    lora = {"target_modules": ["q_proj"]}
    assert shares(make_trainer(tokenizer, tmp_path, {}, peft_config=peft.LoraConfig(**lora)))
    assert not shares(make_trainer(tokenizer, tmp_path, {}, peft_config=peft.LoraConfig(**lora, lora_dropout=0.1)))
    assert not shares(make_trainer(tokenizer, tmp_path, {"neftune_noise_alpha": 5.0}))
    assert not shares(make_trainer(tokenizer, tmp_path, {}, model=tiny.tiny_model("llama", attention_dropout=0.1)))
    assert not shares(make_trainer(tokenizer, tmp_path, {"padding_free": False}))

    class Wrapped:
        def __init__(self) -> None:
            self.inner = LiveTeacher(tiny.tiny_model("llama_untied", seed=1, width=24))
            self.num_classes = self.inner.num_classes

        def rows(self, batch: Any, temperature: float) -> Any:
            return self.inner.rows(batch, temperature)

    assert not shares(make_trainer(tokenizer, tmp_path, {"padding_free": True}, teacher_model=Wrapped()))
