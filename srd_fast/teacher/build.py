"""Run a teacher once, and store its rows with loss.

Which samples share a file depends only on the request, and a file is written completely or not at all. So a cache that
was interrupted and completed is the same as one that was not interrupted.
"""

import hashlib
import logging
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import IGNORE_INDEX, DistillationCollator, check_token_ids, first_label
from ..errors import UserError
from ..losses import Head
from ..models import (
    SharedPrefix,
    decoder_start,
    embeddings_of,
    find_head,
    is_encoder_decoder,
    is_sharded,
    model_digest,
    share_prefix,
    shared_starts,
)
from ..showing import progress_bar
from . import shards
from .cache import TeacherCache
from .fillers import Filler, Fillers, VLLMFillers
from .folder import add_to_index, begin, digests_of, drop_damaged, drop_unfinished
from .index import (
    FORMAT,
    HEAD,
    KEY_BYTES,
    META,
    contents,
    json_text,
    sample_key,
)
from .live import LiveTeacher
from .log_sum_exp import keep_log_sum_exps
from .mirror import at_addresses
from .ranks import Ranks
from .source import rows_with_loss
from .stores import CACHE_KINDS, HiddenStore, Store, keeps_head, make_store
from .vllm_teacher import VLLMTeacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    """A sample to store in the cache."""

    key: bytes
    input_ids: Sequence[int]
    labels: Sequence[int]
    num_rows: int


def _requests(samples: Iterable[Mapping[str, Any]]) -> list[_Request]:
    """Distinct samples, longest first, so that batches have similar lengths and the largest batch comes first."""
    found: dict[bytes, _Request] = {}
    for s in samples:
        key = sample_key(s["input_ids"], s["labels"])
        found.setdefault(
            key, _Request(key, s["input_ids"], s["labels"], sum(x != IGNORE_INDEX for x in s["labels"][1:]))
        )
    return sorted(found.values(), key=lambda r: (-len(r.input_ids), r.key))


def describe(
    teacher: nn.Module | VLLMTeacher, store: Store, kind: str, template: str | None = None, source: str | None = None
) -> dict[str, Any]:
    """The content of meta.json for a cache of this teacher.

    Args:
        teacher: a causal language model, or one that vLLM runs.
        store: decides what is stored of a row.
        kind: the store's kind.
        template: the prompt template of the samples.
        source: a fingerprint of where the teacher was loaded from. With it the cache can be checked without loading
            the weights.

    Returns:
        The content of meta.json.
    """
    if isinstance(teacher, VLLMTeacher):
        # Rows of two engines differ by rounding, so only one engine may fill a cache. For reading, only the teacher's
        # files are compared.
        head, digest, source = teacher.head, f"{teacher.source} by vLLM", teacher.source
    else:
        head, digest = find_head(teacher, "teacher"), model_digest(teacher)
    assert head.weight is not None
    return {
        "format": FORMAT,
        "kind": kind,
        "options": store.options,
        "teacher": digest,
        "source": source,
        "revision": revision_of(teacher),
        "dtype": dtype_name(teacher),
        "template": template,
        "num_classes": head.weight.shape[0],
        "softcap": head.softcap,
        "scale": head.scale,
        **({"encoder_decoder": True} if is_encoder_decoder(teacher) else {}),
    }


@at_addresses
def build_teacher_cache(
    teacher: nn.Module | VLLMTeacher,
    samples: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    kind: str = "hidden",
    store: Store | None = None,
    template: str | None = None,
    source: str | None = None,
    batch_tokens: int | None = None,
    shard_bytes: int = 64 << 20,
    device: torch.device | str | None = None,
    progress: bool = True,
    group: dist.ProcessGroup | None = None,
) -> "TeacherCache":
    """Run the teacher over the samples that the cache does not hold yet, and open the cache.

    Any number of processes may fill one folder, and any of them may be killed. The next call continues with the first
    file that is missing or damaged, and the result is the same, byte for byte. With a `group`, each of its processes
    makes a share of the files; without one, processes divide the work by locks in the file system.

    Args:
        teacher: a causal language model. Its dtype is that of the hidden states. It is moved to `device`, unless it is
            spread out, see `LiveTeacher`. Ranks with FSDP2 shards of a teacher each run samples of their own, in step;
            ranks of a tensor-parallel teacher make one share together. Or a teacher that vLLM runs, which stays open;
            if it uses several devices, the first rank makes everything.
        samples: tokenised samples with input_ids and labels (-100 where there is no loss), such as a prepared data set.
        folder: where the cache is, or will be: a folder, or an address, as in `open_teacher_cache`.
        kind: what is stored of a row, a name from `srd_fast.cache_kind_names()`: "hidden" (hidden states), "topk" (the
            likeliest classes), "sampled" (drawn classes), "projected" (the student's head, averaged), or your own.
        store: the kind's, from `srd_fast.teacher.make_store`. Default: the one with the kind's default options.
            `make_store("hidden", classes, temperatures=..., log_sum_exp=True)` stores log-sum-exps beside the hidden
            states, and adds them to an existing cache.
        template: the prompt template of the samples. It is recorded, and a cache of another template is refused.
        source: a fingerprint of where the teacher was loaded from (`srd_fast.models.fingerprint`). With it the cache
            can later be checked without the teacher's weights.
        batch_tokens: tokens of a forward pass, including padding. Default: 4,096 on a GPU; 1,024 elsewhere, where
            larger batches are no faster and have more padding. vLLM has its own options for that.
        shard_bytes: bytes of rows in one file, which is the most work that can be lost by a kill.
        device: where the teacher runs; for one in vLLM, where its head goes. Default: where it is.
        progress: show a progress bar.
        group: processes that fill the folder together, such as `torch.distributed.group.WORLD`. All of them call this,
            with the same samples. Default: this process alone; with a teacher in shards, all processes.

    Returns:
        The cache, open for reading.

    Raises:
        UserError: the teacher's head is quantised or not understood, vLLM does not start or dies twice, the folder's
            cache has another teacher, dtype, template or kind, or the disk has too little room.
    """
    folder = Path(folder)
    CACHE_KINDS.check(kind)
    if group is None and not isinstance(teacher, VLLMTeacher) and is_sharded(teacher):
        group = dist.group.WORLD
    ranks = Ranks(group)
    if isinstance(teacher, VLLMTeacher):
        live: LiveTeacher | VLLMTeacher = teacher.to(teacher.device if device is None else device)
    else:
        live = LiveTeacher(teacher, device, freeze=False)
    head = live.head
    store = store or make_store(kind, live.num_classes)
    meta = describe(teacher, store, kind, template, source)
    samples = list(samples) if isinstance(samples, Iterator) else samples
    known = teacher.num_embeddings if isinstance(teacher, VLLMTeacher) else embeddings_of(teacher)
    check_token_ids(samples, {"teacher": known})
    requests = _requests(samples)
    index = ranks.first(lambda: _begun(folder, meta))
    with ranks.together():
        _check_shared(folder)
        missing = _missing(folder, index, requests)
    per_row = store.bytes_per_row(head, _dtype(teacher))
    groups = _groups(missing, per_row, shard_bytes, meta)

    def lacking() -> list[str]:
        """Check that there is disk space, store the head, and return the names of the missing files."""
        beside = store.bytes_beside(head) if isinstance(store, HiddenStore) else 0
        names = [name for name in groups if not (folder / name).exists()]
        _check_disk(folder, [groups[name] for name in names], per_row + beside, head, kind)
        if keeps_head(kind):
            shards.write_once(folder / HEAD, head.tensors, wait=True)
        return names

    fillers: Filler
    maker: _Maker | _VLLMMaker
    if isinstance(live, VLLMTeacher):
        live.reserve(max((len(r.input_ids) for r in requests), default=0))
        fillers, maker = VLLMFillers(live, ranks), _VLLMMaker(live, store)
    else:
        fillers = passes = Fillers(live, ranks)
        maker = _Maker(passes, store, batch_tokens or (4096 if live.device.type == "cuda" else 1024))
    mine = fillers.share(ranks.first(lacking))
    total = sum(r.num_rows for name in mine for r in groups[name])
    bar = progress_bar(what="teacher", total=total, unit="row", shown=progress)
    with ranks.together(), fillers.in_step(), bar:
        makers = {name: partial(maker.make, groups[name]) for name in mine}
        fillers.write(folder, makers, lambda name: bar.update(sum(r.num_rows for r in groups[name])))
    with ranks.together():
        named = [*groups, *([HEAD] if keeps_head(kind) else [])]
        digests = digests_of(folder, [name for name in ranks.share(named) if name not in index])
    digests = ranks.merged(digests)
    ranks.first(lambda: _finish(folder, digests))
    cache = TeacherCache(folder, store, verify=False)
    return keep_log_sum_exps(cache, samples, head, live.device, progress, ranks)


def _begun(folder: Path, meta: dict[str, Any]) -> dict[str, str]:
    """Prepare a folder to be filled, and return its index."""
    index = begin(folder, meta)
    drop_damaged(folder, index)
    return index


def _check_shared(folder: Path) -> None:
    if not (folder / META).exists():
        raise UserError(
            f"teacher_cache {str(folder)!r} is not there on {socket.gethostname()}, though the first rank has made it: "
            "name a folder that all ranks share"
        )


def _finish(folder: Path, digests: Mapping[str, str]) -> None:
    add_to_index(folder, digests)
    drop_unfinished(folder)


class _Maker:
    """Makes the rows of a file's samples. A beginning that many of the file's prompts share is run only once."""

    def __init__(self, fillers: Fillers, store: Store, batch_tokens: int) -> None:
        self.fillers, self.live = fillers, fillers.live
        self.head, self.store, self.batch_tokens = self.live.head, store, batch_tokens
        self.collate = DistillationCollator(0, decoder_start=decoder_start(self.live.model))

    def make(self, group: Sequence[_Request]) -> dict[str, Tensor]:
        """Make all tensors of the file."""
        parts, ordered = [], []
        # The state of a prompt's last token predicts the first label, so it is not part of a shared beginning.
        prompts = [r.input_ids[: max(0, first_label(r.labels) - 1)] for r in group]
        for start, members in shared_starts(prompts):
            some = [group[i] for i in members]
            shared = self._shared(start, some)
            while some:
                length = len(some[0].input_ids) - (0 if shared is None else shared.length)
                size = max(1, self.batch_tokens // length)
                parts.append(self._rows(some[:size], shared))
                ordered += some[:size]
                some = some[size:]
        return {**{name: torch.cat([p[name] for p in parts]) for name in parts[0]}, **_of_samples(ordered)}

    def _batch(self, some: Sequence[_Request]) -> dict[str, Tensor]:
        batch = self.collate([{"input_ids": r.input_ids, "labels": r.labels} for r in some])
        return {name: x.to(self.live.entry) for name, x in batch.items()}

    def _shared(self, start: list[int], some: Sequence[_Request]) -> SharedPrefix | None:
        # Ranks in step must make the same number of passes, and a shared beginning takes additional ones.
        if not start or self.fillers.steps:
            return None
        return self.live.run(share_prefix, self.live.model, start, self._batch(some[-2:]))

    def _rows(self, some: Sequence[_Request], shared: SharedPrefix | None) -> dict[str, Tensor]:
        batch = self._batch(some)
        if shared is None:
            states_BLD = self.fillers.hidden_states(batch)
        else:
            batch = {name: x[:, shared.length :] for name, x in batch.items()}
            states_BLD = self.live.run(shared.hidden_states, batch).to(self.live.device)
        with torch.inference_mode(), torch.autocast(self.live.device.type, enabled=False):
            hidden_ND = rows_with_loss(states_BLD, batch["labels"].to(states_BLD.device))
            encoded = self.store.encode(hidden_ND, self.head, [r.key for r in some], [r.num_rows for r in some])
        return {name: x.cpu() for name, x in encoded.items()}


class _VLLMMaker:
    """Makes the rows of a file's samples with vLLM, one file at a time, so that a file made again is the same.

    Args:
        teacher: a teacher that vLLM runs.
        store: decides what is stored of a row.
    """

    def __init__(self, teacher: VLLMTeacher, store: Store) -> None:
        self.teacher, self.store = teacher, store

    @torch.inference_mode()
    def make(self, group: Sequence[_Request]) -> dict[str, Tensor]:
        """Make all tensors of the file."""
        hidden_ND = self.teacher.hidden_rows([{"input_ids": r.input_ids, "labels": r.labels} for r in group])
        device = self.teacher.device
        with torch.autocast(device.type, enabled=False):
            keys, counts = [r.key for r in group], [r.num_rows for r in group]
            encoded = self.store.encode(hidden_ND.to(device), self.teacher.head, keys, counts)
        return {**{name: x.cpu() for name, x in encoded.items()}, **_of_samples(group)}


def _of_samples(group: Sequence[_Request]) -> dict[str, Tensor]:
    """The tensors that describe the samples of a file."""
    keys = torch.frombuffer(bytearray(b"".join(r.key for r in group)), dtype=torch.uint8)
    return {"keys": keys.view(-1, KEY_BYTES), "num_rows": torch.tensor([r.num_rows for r in group])}


def _groups(
    requests: Sequence[_Request], bytes_per_row: int, shard_bytes: int, meta: Mapping[str, Any]
) -> dict[str, list[_Request]]:
    """File name -> its samples. The name depends on the teacher, so that files of other teachers are not used."""
    groups: list[list[_Request]] = []
    room = 0
    for r in requests:
        size = r.num_rows * bytes_per_row
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(r)
        room -= size
    named = {}
    for group in groups:
        made_by = json_text([meta[field] for field in ("teacher", "kind", "options")]).encode()
        name = hashlib.blake2b(b"".join((made_by, *(r.key for r in group))), digest_size=8).hexdigest()
        named[f"rows-{name}.safetensors"] = group
    return named


def _missing(folder: Path, index: Mapping[str, str], requests: Sequence[_Request]) -> list[_Request]:
    held: set[bytes] = set()
    for name in index:
        if name.startswith("rows-"):
            held.update(key for key, _ in contents(folder / name))
    return [r for r in requests if r.key not in held]


def _check_disk(folder: Path, groups: Sequence[Sequence[_Request]], per_row: int, head: Head, kind: str) -> None:
    rows, samples = sum(r.num_rows for g in groups for r in g), sum(map(len, groups))
    needed = rows * per_row + samples * (KEY_BYTES + 8) + len(groups) * 1024
    if keeps_head(kind) and not (folder / HEAD).exists():
        needed += sum(x.numel() * x.element_size() for x in head.tensors().values())
    free = shutil.disk_usage(folder).free
    if rows:
        logger.info("teacher cache: %d rows of %d bytes, %.2f GB to write", rows, per_row, needed / 1e9)
    if needed > free:
        raise UserError(
            f"teacher_cache {str(folder)!r}: {rows} rows of {per_row} bytes need {needed / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free; give a folder on a larger disk, a compact kind (topk, sampled), or train "
            "with the live teacher"
        )


def revision_of(model: nn.Module | VLLMTeacher) -> str | None:
    """The commit of a model from the hub, or None."""
    if isinstance(model, VLLMTeacher):
        return model.revision
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def dtype_name(model: nn.Module | VLLMTeacher) -> str:
    """The dtype of a model's weights, such as "bfloat16"."""
    return str(_dtype(model)).removeprefix("torch.")


def _dtype(model: nn.Module | VLLMTeacher) -> torch.dtype:
    """The dtype of a model's first parameter that is not quantised."""
    if isinstance(model, VLLMTeacher):
        return model.dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
