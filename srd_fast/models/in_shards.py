"""A vocabulary that stays in shards while a student trains: its head and its token embedding.

FSDP2 would gather both on each process in every step, and they are the largest weights of a model. Here each process
keeps its classes, and FSDP ignores them. The loss takes the sharded head as it is. For the embedding, a process asks
the others for the rows of its tokens, so the traffic has the size of hidden states, not of a vocabulary.

A process computes the whole gradient of its own classes, over the tokens of all processes, so nothing is reduced. The
trainer multiplies the loss by the number of processes, because FSDP averages gradients, so here both gradients are
divided by that number.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from ..losses import VocabularyShard
from .heads import head_module, unwrap
from .wrapping import DTensor

if distributed.is_available():
    from torch.distributed.tensor import DeviceMesh, Shard


class EmbeddingInShards(nn.Embedding):
    """An embedding of which each process has some rows. All processes call it together, each with its own tokens.

    given_dtype: dtype of the result; None for that of the weight.
    """

    weight: Any
    given_dtype: torch.dtype | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Look up the rows of tokens.

        Args:
            input: [...] token ids.

        Returns:
            [..., D].
        """
        shard, local = VocabularyShard.of(self.weight), self.weight.to_local()
        ranks, flat_N = distributed.get_world_size(shard.group), input.reshape(-1)
        owner_N = flat_N // classes_of_a_rank(shard.classes, ranks)
        order_N = owner_N.argsort(stable=True)
        counts = flat_N.new_zeros(ranks).index_add_(0, owner_N, torch.ones_like(flat_N))
        of_others = torch.empty_like(counts)
        distributed.all_to_all_single(of_others, counts, group=shard.group)
        asked, wanted = torch.stack((counts, of_others)).tolist()
        ids = flat_N.new_empty(sum(wanted))
        distributed.all_to_all_single(ids, flat_N[order_N], wanted, asked, group=shard.group)
        padding = None if self.padding_idx is None else self.padding_idx - shard.first
        if padding is not None and not 0 <= padding < len(local):
            padding = None
        rows = functional.embedding(ids - shard.first, local, padding).to(self.given_dtype or local.dtype)
        found_ND = _Exchange.apply(rows, wanted, asked, shard.group, 1 / ranks)
        place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
        return found_ND[place_N].view(*input.shape, local.shape[1])


class HeadInShards(nn.Linear):
    """A head of which each process has some classes. The loss reads its weight; calling it gives logits only."""

    weight: Any
    own_rows = True  # `through_head` reads it

    def forward(self, input: Tensor) -> Tensor:
        """Compute the logits of all classes, without gradient. All processes call it together, each with its own rows.

        Args:
            input: [..., D] hidden states.

        Returns:
            [..., V].
        """
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            raise RuntimeError(
                "this head is in shards, and gives logits only without gradient: use torch.no_grad(), or "
                "SRDConfig(head_in_shards=False)"
            )
        shard = VocabularyShard.of(self.weight)
        group, ranks = shard.group, distributed.get_world_size(shard.group)
        bias: Any = None if self.bias is None else self.bias.to_local()  # type: ignore[attr-defined]
        rows_ND = input.reshape(-1, input.shape[-1])
        counts = [torch.zeros((), dtype=torch.long, device=input.device) for _ in range(ranks)]
        distributed.all_gather(counts, counts[0].new_tensor(len(rows_ND)), group=group)
        sizes = torch.stack(counts).tolist()
        of_all = [rows_ND.new_empty(max(sizes), rows_ND.shape[1]) for _ in range(ranks)]
        padded = functional.pad(rows_ND, (0, 0, 0, max(sizes) - len(rows_ND)))
        distributed.all_gather(of_all, padded.contiguous(), group=group)
        mine = torch.cat([x[:size] for x, size in zip(of_all, sizes)])
        logits = functional.linear(mine, self.weight.to_local().to(mine.dtype), bias)
        each = classes_of_a_rank(shard.classes, ranks)
        widths = [min(each, shard.classes - rank * each) for rank in range(ranks)]
        found = logits.new_empty(len(rows_ND) * shard.classes)
        given, taken = [size * logits.shape[1] for size in sizes], [len(rows_ND) * width for width in widths]
        distributed.all_to_all_single(found, logits.reshape(-1), taken, given, group=group)
        parts = [x.view(len(rows_ND), width) for x, width in zip(found.split(taken), widths)]
        return torch.cat(parts, 1).view(*input.shape[:-1], shard.classes)


class _Exchange(torch.autograd.Function):
    """Send each process the rows that it asked for, and its gradients back, times a factor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int], group: Any, factor: float) -> Tensor:
        ctx.given, ctx.taken, ctx.group, ctx.factor = given, taken, group, factor
        found = rows.new_empty(sum(taken), rows.shape[1])
        distributed.all_to_all_single(found, rows.contiguous(), taken, given, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        given = gradients[0].contiguous()
        found = given.new_empty(sum(ctx.given), given.shape[1])
        distributed.all_to_all_single(found, given, ctx.given, ctx.taken, group=ctx.group)
        return found.mul_(ctx.factor), None, None, None, None


def classes_of_a_rank(classes: int, ranks: int) -> int:
    """How many classes each process except the last has, as `Shard(0)` divides them."""
    return -(-classes // ranks)


def why_not_in_shards(model: nn.Module, ranks: int) -> str | None:
    """Why a model's vocabulary cannot stay in shards; None if it can.

    Args:
        model: a model that is not sharded yet.
        ranks: how many processes would share it.
    """
    head, embeddings, others = _vocabulary(model)
    if not isinstance(head, nn.Linear):
        return f"its head is a {type(head).__name__}, and not a torch.nn.Linear"
    if others:
        return f"its head's weight is also that of a {type(others[0]).__name__}"
    unfit = [m for m in embeddings if m.weight is head.weight and not _is_plain(m)]
    if unfit:
        return f"its tied embedding, a {type(unfit[0]).__name__}, is more than a look-up"
    classes = len(head.weight)
    if classes_of_a_rank(classes, ranks) * (ranks - 1) >= classes:
        return f"{classes} classes give one of {ranks} processes none"
    return None


def divide_vocabulary(model: nn.Module, mesh: "DeviceMesh", given_dtype: torch.dtype | None = None) -> list[nn.Module]:
    """Keep on each process only its classes of the head, and its rows of the embedding if that is a plain look-up.

    Args:
        model: whole and the same on all processes; `why_not_in_shards` must be None for it.
        mesh: a mesh of one dimension, along which the vocabulary is divided.
        given_dtype: dtype of embedded tokens. Default: that of the embedding.

    Returns:
        The modules that are in shards now.
    """
    head, embeddings, _ = _vocabulary(model)
    shards: dict[Tensor, nn.Parameter] = {}
    plain = [m for m in embeddings if _is_plain(m)]
    for module in (head, *plain):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in shards:
                shards[parameter] = nn.Parameter(_shard_of(parameter, mesh), parameter.requires_grad)
            setattr(module, name, shards[parameter])
        mixed_in = HeadInShards if module is head else EmbeddingInShards
        module.__class__ = _with(type(module), mixed_in)
    for module in plain:
        module.given_dtype = given_dtype
    return [head, *plain]


def _vocabulary(model: nn.Module) -> tuple[Any, list[Any], list[nn.Module]]:
    """The head, the embeddings of input tokens, and other modules that share the head's weight."""
    inner: Any = unwrap(model)
    outer = head_module(model)
    owners = [m for m in model.modules() if m._parameters.get("weight") is not None]
    head = next(m for m in owners if m.weight is outer.weight and any(m is part for part in outer.modules()))
    embedded = getattr(inner.get_input_embeddings(), "weight", None)
    sharing = [m for m in owners if m is not head and (m.weight is embedded or m.weight is head.weight)]
    embeddings = [m for m in sharing if isinstance(m, nn.Embedding)]
    return head, embeddings, [m for m in sharing if m.weight is head.weight and m not in embeddings]


def _is_plain(embedding: nn.Embedding) -> bool:
    """Whether an embedding uses `nn.Embedding`'s own look-up, whatever it does before and after."""
    kinds = type(embedding).__mro__
    own = [vars(kind)["forward"] for kind in kinds[: kinds.index(nn.Embedding)] if "forward" in vars(kind)]
    # An embedding that also reads its weight itself fails on the first batch: torch refuses shards with plain tensors.
    calls_next = all("forward" in forward.__code__.co_names for forward in own)
    return calls_next and not (embedding.max_norm or embedding.scale_grad_by_freq or embedding.sparse)


def _with(kind: type, mixed_in: type) -> type:
    """A class like `kind`, with `mixed_in` in place of the torch class that both inherit from."""
    return mixed_in if kind is mixed_in.__mro__[1] else type(f"{kind.__name__}InShards", (kind, mixed_in), {})


def _shard_of(parameter: Tensor, mesh: "DeviceMesh") -> Tensor:
    each = classes_of_a_rank(len(parameter), mesh.size())
    own = parameter.detach()[each * mesh.get_local_rank() :][:each]
    # A copy, because a view would keep the whole weight in memory.
    local = own.to(mesh.device_type, copy=True).contiguous()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
