"""Run a teacher once, and keep what it gives for the rows with loss.

Which samples share a file follows from the request alone, and a file is written whole or not at all. A cache whose
making was interrupted therefore ends the same as one whose making was not.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import IGNORE_INDEX, DistillationCollator, first_label
from ..errors import DamagedFileError, UserError
from ..files import temporary_path
from ..losses import Head
from ..models import (
    SharedPrefix,
    find_head,
    fingerprint,
    hidden_states,
    load_model,
    model_digest,
    share_prefix,
    shared_starts,
)
from . import shards
from .cache import TeacherCache
from .index import (
    FORMAT,
    HEAD,
    INDEX,
    KEY_BYTES,
    META,
    compare_meta,
    contents,
    digest,
    json_text,
    meta_digest,
    read_index,
    read_meta,
    sample_key,
    verify_files,
    write_index,
)
from .live import LiveTeacher
from .source import rows_with_loss
from .stores import CACHE_KINDS, Store, keeps_head, make_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    """A sample that the cache is to hold."""

    key: bytes
    input_ids: Sequence[int]
    labels: Sequence[int]
    num_rows: int


def _requests(samples: Iterable[Mapping[str, Any]]) -> list[_Request]:
    """Samples without repetition, longest first: batches hold similar lengths, and the largest batch comes first."""
    found: dict[bytes, _Request] = {}
    for s in samples:
        key = sample_key(s["input_ids"], s["labels"])
        found.setdefault(
            key, _Request(key, s["input_ids"], s["labels"], sum(x != IGNORE_INDEX for x in s["labels"][1:]))
        )
    return sorted(found.values(), key=lambda r: (-len(r.input_ids), r.key))


def describe(
    teacher: nn.Module, store: Store, kind: str, template: str | None = None, source: str | None = None
) -> dict[str, Any]:
    """What meta.json says of a cache of this teacher.

    Args:
        teacher: a causal language model.
        store: decides what a row keeps.
        kind: of the store.
        template: the prompt template of the samples.
        source: a fingerprint of where the teacher was loaded from. With it the cache can be checked without the
            weights.

    Returns:
        The content of meta.json.
    """
    head = find_head(teacher, "teacher")
    assert head.weight is not None
    return {
        "format": FORMAT,
        "kind": kind,
        "options": store.options,
        "teacher": model_digest(teacher),
        "source": source,
        "revision": _revision(teacher),
        "dtype": _dtype_name(teacher),
        "template": template,
        "num_classes": head.weight.shape[0],
        "softcap": head.softcap,
        "scale": head.scale,
    }


def build_teacher_cache(
    teacher: nn.Module,
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
) -> "TeacherCache":
    """Run the teacher over the samples that the cache does not hold yet, and open the cache.

    Any number of processes may fill one folder, and any of them may be killed. The next call goes on with the first
    file that is missing or damaged, and the result is the same to the byte.

    Args:
        teacher: a causal language model. It is moved to `device`, and its dtype is that of the hidden states.
        samples: tokenised samples with input_ids and labels (-100 where there is no loss), such as a prepared data set.
        folder: where the cache is, or will be.
        kind: what a row keeps, a name from `srd_fast.cache_kind_names()`: "hidden" (hidden states), "topk" (the
            likeliest classes), "sampled" (drawn classes), "projected" (the student's head, averaged), or your own.
        store: the kind's, from `srd_fast.teacher.make_store`. Default: the one with the kind's default options.
        template: the prompt template of the samples. It is written down, and a cache of another template is refused.
        source: a fingerprint of where the teacher was loaded from (`srd_fast.models.fingerprint`). With it the cache
            can later be checked without the teacher's weights.
        batch_tokens: tokens of a forward pass, padding included. Default: 4,096 on a GPU; 1,024 elsewhere, where larger
            batches are no faster and only hold lengths that differ more.
        shard_bytes: bytes of rows in one file, the most work that a kill can cost.
        device: where the teacher runs. Default: where it is.
        progress: show a progress bar.

    Returns:
        The cache, open for reading.

    Raises:
        UserError: the teacher is quantised or its head is not understood, the folder's cache has another teacher,
            dtype, template or kind, or the disk has too little room.
    """
    folder = Path(folder)
    CACHE_KINDS.check(kind)
    live = LiveTeacher(teacher, device, freeze=False)
    teacher, head = live.model, live.head
    store = store or make_store(kind, live.num_classes)
    batch_tokens = batch_tokens or (4096 if live.device.type == "cuda" else 1024)
    meta = describe(teacher, store, kind, template, source)
    requests = _requests(samples)
    index = _begin(folder, meta)
    _drop_damaged(folder, index)
    missing = _missing(folder, index, requests)
    per_row = store.bytes_per_row(head, next(teacher.parameters()).dtype)
    groups = _groups(missing, per_row, shard_bytes, meta)
    _check_disk(folder, [g for name, g in groups.items() if not (folder / name).exists()], per_row, head, kind)
    if keeps_head(kind):
        shards.write_once(folder / HEAD, head.tensors, wait=True)
    maker = _Maker(teacher, head, store, batch_tokens)
    with tqdm(total=sum(r.num_rows for r in missing), unit="row", desc="teacher", disable=not progress) as bar:
        waiting = []
        for name, group in groups.items():
            if not shards.write_once(folder / name, lambda g=group: maker.make(g), wait=False):  # type: ignore[misc]
                waiting.append((name, group))
                continue
            bar.update(sum(r.num_rows for r in group))
        for name, group in waiting:
            shards.write_once(folder / name, lambda g=group: maker.make(g), wait=True)  # type: ignore[misc]
            bar.update(sum(r.num_rows for r in group))
    _add_to_index(folder, [*groups, *([HEAD] if keeps_head(kind) else [])])
    _drop_unfinished(folder)
    return TeacherCache(folder, store, verify=False)


class _Maker:
    """Makes the rows of a file's samples. A beginning that many of the file's prompts share runs once."""

    def __init__(self, teacher: nn.Module, head: Head, store: Store, batch_tokens: int) -> None:
        self.teacher, self.head, self.store, self.batch_tokens = teacher, head, store, batch_tokens
        self.device = next(teacher.parameters()).device

    @torch.inference_mode()
    def make(self, group: Sequence[_Request]) -> dict[str, Tensor]:
        """Make all tensors of the file."""
        parts, ordered = [], []
        # The state of a prompt's last token predicts the first label, so it is a row of its own.
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
        made = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        made["keys"] = torch.frombuffer(bytearray(b"".join(r.key for r in ordered)), dtype=torch.uint8).view(
            -1, KEY_BYTES
        )
        made["num_rows"] = torch.tensor([r.num_rows for r in ordered])
        return made

    def _batch(self, some: Sequence[_Request]) -> dict[str, Tensor]:
        batch = DistillationCollator(0)([{"input_ids": r.input_ids, "labels": r.labels} for r in some])
        return {name: x.to(self.device) for name, x in batch.items()}

    def _shared(self, start: list[int], some: Sequence[_Request]) -> SharedPrefix | None:
        if not start:
            return None
        with torch.autocast(self.device.type, enabled=False):
            return share_prefix(self.teacher, start, self._batch(some[-2:]))

    def _rows(self, some: Sequence[_Request], shared: SharedPrefix | None) -> dict[str, Tensor]:
        batch = self._batch(some)
        with torch.autocast(self.device.type, enabled=False):
            if shared is None:
                states_BLD = hidden_states(self.teacher, batch)
            else:
                batch = {name: x[:, shared.length :] for name, x in batch.items()}
                states_BLD = shared.hidden_states(batch)
            hidden_ND = rows_with_loss(states_BLD, batch)
            encoded = self.store.encode(hidden_ND, self.head, [r.key for r in some], [r.num_rows for r in some])
        return {name: x.cpu() for name, x in encoded.items()}


def _groups(
    requests: Sequence[_Request], bytes_per_row: int, shard_bytes: int, meta: Mapping[str, Any]
) -> dict[str, list[_Request]]:
    """File name -> its samples. The name depends on the teacher, so no other teacher's file is taken for it."""
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


def _begin(folder: Path, meta: dict[str, Any]) -> dict[str, str]:
    """Write meta.json, or compare it with the one that is there; return the index."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"teacher_cache {str(folder)!r} cannot be made: {e}") from e
    index, path, content = _usable_index(folder), folder / META, json_text(meta).encode()
    if META in index or path.exists():
        try:
            compare_meta(folder, read_meta(folder, index), meta)
            return index
        except DamagedFileError as e:
            if index.get(META) != digest(content):
                raise
            _say_again(e)
    with shards.locked(temporary_path(path)) as descriptor:
        assert descriptor is not None
        shards.publish(descriptor, temporary_path(path), path, content)
    return index


def _usable_index(folder: Path) -> dict[str, str]:
    """The index; if it is damaged, an empty one, and the files then tell what they hold."""
    try:
        return read_index(folder)
    except DamagedFileError as e:
        _say_again(e)
        (folder / INDEX).unlink(missing_ok=True)
        return {}


def _say_again(error: UserError) -> None:
    logger.warning("%s; making it again", error)


def _drop_damaged(folder: Path, index: dict[str, str]) -> None:
    """Delete files with wrong content, whether the index lists them or a killed process left them."""
    named = {name: index.get(name) for name in (*index, *(p.name for p in folder.glob("*.safetensors")))}
    named.pop(META, None)
    damaged = verify_files(folder, named)
    for name, error in damaged:
        _say_again(error)
        (folder / name).unlink(missing_ok=True)
        index.pop(name, None)
    if damaged:
        write_index(folder, lambda files: {n: d for n, d in files.items() if n not in dict(damaged)})


def _drop_unfinished(folder: Path) -> None:
    """Delete the hidden files of killed processes. A file that is being written is locked, and stays."""
    for partial in folder.glob(temporary_path(Path("*")).name):
        with shards.locked(partial, wait=False) as descriptor:
            if descriptor is not None:
                partial.unlink(missing_ok=True)


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


def _add_to_index(folder: Path, names: Sequence[str]) -> None:
    def added(files: dict[str, str]) -> dict[str, str]:
        new = [name for name in names if name not in files]
        return {**files, **{n: shards.checked_digest(folder / n) for n in new}, META: meta_digest(folder)}

    write_index(folder, added)


def open_teacher_cache(
    folder: str | Path,
    teacher: nn.Module | str | None,
    samples: Sequence[Mapping[str, Any]],
    *,
    kind: str = "hidden",
    k: int = 64,
    temperatures: Sequence[float] = (1.0,),
    student: nn.Module | None = None,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repair: bool = False,
    progress: bool = True,
) -> "TeacherCache":
    """Open the cache in a folder. It is checked against its teacher, and first filled with samples that it lacks.

    Args:
        folder: where the cache is, or will be.
        teacher: a model; or a folder or hub id, which is loaded in `dtype` only if the cache has to be filled; or None
            to read what is there.
        samples: tokenised samples that the cache must hold, with input_ids and labels (-100 where there is no loss).
        kind: what a row keeps, a name from `srd_fast.cache_kind_names()`: "hidden" (hidden states), "topk" (the
            likeliest classes), "sampled" (drawn classes), "projected" (the student's head, averaged), or your own.
        k: classes, or draws, that a row of "topk" or "sampled" keeps; at least 1 and below the number of classes.
        temperatures: for which a compact kind holds rows, each above 0. Evaluation needs 1.
        student: the model that will be trained. "projected" needs it, and its head must not change.
        template: prompt template of the samples, compared with the cache's. None: not compared.
        dtype: in which a teacher given by name is loaded.
        device: where the teacher runs when it fills the cache.
        repair: make damaged files again instead of refusing the cache.
        progress: show a progress bar.

    Returns:
        The cache, open for reading.

    Raises:
        UserError: a file is damaged; the cache was made with another teacher, dtype, template, kind or options; samples
            are missing and there is no teacher; or it cannot be filled. The message names which.
    """
    folder = Path(folder)
    named = isinstance(teacher, str)
    source = fingerprint(teacher) if isinstance(teacher, str) else None
    try:
        index = read_index(folder)
        meta = read_meta(folder, index) if index else {}
    except DamagedFileError:
        if not repair:
            raise
        index = {}
    if index:
        if isinstance(teacher, str) and meta.get("source") is None:
            teacher, source = load_model(teacher, dtype, device), None
        wanted: dict[str, Any] = {"kind": kind, "template": template, "source": source}
        if isinstance(teacher, nn.Module):
            wanted |= {
                "dtype": _dtype_name(teacher),
                "teacher": model_digest(teacher),
                "revision": _revision(teacher),
            }
        elif named:
            wanted["dtype"] = str(dtype).removeprefix("torch.")
        compare_meta(folder, meta, wanted)
        store = make_store(kind, _common(meta["num_classes"], student), k, temperatures, student)
        compare_meta(folder, meta, {"options": store.options})
        try:
            cache = TeacherCache(folder, store)
        except DamagedFileError:
            if not repair:
                raise
        else:
            if not cache.missing(samples):
                return cache
    if teacher is None:
        raise UserError(f"teacher_cache {str(folder)!r} lacks samples of this data; pass the teacher, to fill it")
    model = load_model(teacher, dtype, device) if isinstance(teacher, str) else teacher
    head = find_head(model, "teacher").weight
    assert head is not None
    return build_teacher_cache(
        model,
        samples,
        folder,
        kind=kind,
        store=make_store(kind, _common(head.shape[0], student), k, temperatures, student),
        template=template,
        source=source,
        device=device,
        progress=progress,
    )


def _common(teacher_classes: int, student: nn.Module | None) -> int:
    """The number of classes that teacher and student both have."""
    head = None if student is None else find_head(student, "student").weight
    return teacher_classes if head is None else min(teacher_classes, head.shape[0])


def _revision(model: nn.Module) -> str | None:
    """The commit of a model from the hub, or None."""
    return getattr(getattr(model, "config", None), "_commit_hash", None)


def _dtype_name(model: nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
