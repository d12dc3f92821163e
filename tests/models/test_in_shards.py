"""A vocabulary in shards, on one process that has all of it: values, gradients and what is refused.

Several processes: `tests/training/test_sharded.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from tiny import assert_same
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.losses import Head, LossOptions, StudentRows, loss_beside_head, token_cross_entropy
from srd_fast.models import divide_vocabulary, hidden_states, through_head, why_not_in_shards

BATCH = tiny.collate(tiny.tiny_samples(3))
LABELS = BATCH["labels"][:, 1:].flatten()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def rows_of(model: nn.Module) -> Tensor:
    return hidden_states(model, BATCH)[:, :-1].flatten(0, 1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of a batch's loss through the head as the trainer reads it, by name of the weight."""
    generator = torch.Generator().manual_seed(3)
    teacher_ND, weight = (torch.randn(n, 6, generator=generator) for n in (len(LABELS), tiny.VOCAB + 4))

    def loss(head: Head, hidden_ND: Tensor) -> tuple[Tensor]:
        rows = StudentRows(hidden_ND, head, LABELS, LossOptions("jsd", temperature=2.0))
        return (loss_beside_head(rows, teacher_ND, Head(weight)).loss,)

    through_head(model, loss, rows_of(model))[0].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items()}


def values(model: nn.Module) -> Tensor:
    """Cross-entropies of a batch through the head, without gradient."""
    labels = LABELS.clamp(min=0)
    with torch.no_grad():
        return through_head(model, lambda head, x: token_cross_entropy(x, head, labels), rows_of(model))


# Tied; a factor on what is embedded, and a softcap; a bias and an embedding of its own; learned positions.
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "gpt2"])
def test_a_divided_model_gives_and_learns_what_the_whole_one_does(architecture: str, mesh: DeviceMesh) -> None:
    whole, divided = tiny.tiny_model(architecture), tiny.tiny_model(architecture)
    assert why_not_in_shards(divided, 1) is None
    modules = divide_vocabulary(divided, mesh)
    head, embedding = divided.get_output_embeddings(), divided.get_input_embeddings()
    assert modules == [head, embedding]
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == tied
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        assert_same(divided(**BATCH).logits, whole(**BATCH).logits, 1e-6, "logits")
    assert_same(values(divided), values(whole), 1e-6, "values")
    expected, found = gradients(whole), gradients(divided)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same(found[name], gradient, 1e-6, name)
    with pytest.raises(RuntimeError, match=r"only without gradient.*head_in_shards=False"):
        divided(**BATCH)


def test_embedded_tokens_have_the_dtype_that_is_asked_for_and_padding_learns_nothing(mesh: DeviceMesh) -> None:
    model = tiny.tiny_model("llama_untied")
    embedding = model.get_input_embeddings()
    embedding.padding_idx, before = 7, embedding.weight.detach().clone()
    divide_vocabulary(model, mesh, torch.bfloat16)
    ids = torch.tensor([[7, 2, 7], [299, 0, 2]])
    rows = embedding(ids)
    assert torch.equal(rows, before[ids].bfloat16())
    assert embedding(ids[:, :0]).shape == (2, 0, 16)
    rows.float().sum().backward()
    gradient = embedding.weight.grad.full_tensor()
    assert gradient.dtype == torch.float32
    assert gradient[[7, 2, 299, 0, 1], 0].tolist() == [0, 2, 1, 1, 0]


class Projection(nn.Module):
    """A head that multiplies by a weight and is no Linear."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Normed(nn.Embedding):
    """An embedding that reads its weight itself."""

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight / self.weight.norm())[ids]


def test_a_vocabulary_that_is_more_than_two_look_ups_stays_whole(mesh: DeviceMesh) -> None:
    model = tiny.tiny_model("llama")
    weight = model.get_output_embeddings().weight
    assert "give one of 250 processes none" in str(why_not_in_shards(model, 250))
    model.beside = Projection(weight)
    assert "also that of a Projection" in str(why_not_in_shards(model, 2))
    del model.beside
    model.get_input_embeddings().__class__ = Normed
    assert "Normed, is more than a look-up" in str(why_not_in_shards(model, 2))
    model.lm_head = Projection(weight)
    assert "head is a Projection" in str(why_not_in_shards(model, 2))
    # Where it is not the head's, such an embedding is left to FSDP.
    apart = tiny.tiny_model("llama_untied")
    apart.get_input_embeddings().__class__ = Normed
    assert why_not_in_shards(apart, 2) is None
    assert divide_vocabulary(apart, mesh) == [apart.get_output_embeddings()]


def test_a_head_in_shards_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="head_in_shards must be true, false or 'auto', got 'node'"):
        SRDConfig(output_dir=str(tmp_path), head_in_shards="node")
    args = SRDConfig(output_dir=str(tmp_path), head_in_shards=True, use_cpu=True, report_to=[])
    pair = tiny.tiny_model(), tiny.tiny_model(seed=1)
    with pytest.raises(UserError, match=r"head_in_shards is true, but the student is not sharded by FSDP2.*'auto'"):
        SRDTrainer(*pair, args, tiny.tiny_samples(4), processing_class=tiny.tiny_tokenizer())
