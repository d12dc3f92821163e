"""Log-sum-exps stored beside the hidden states of a cache: they save the loss a pass over the teacher's head.

They are computed from the stored hidden states and the cache's own head, so they can be added to a cache at any time,
without its teacher. Like the files with hidden states, their files are written completely or not at all.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from ..losses import Head
from ..showing import progress_bar
from .cache import TeacherCache
from .folder import add_to_index, digests_of, drop_from_index, drop_unfinished, write_all
from .index import contents, json_text, lse_at, lse_files, lse_name, read_index
from .ranks import Ranks
from .stores import HiddenStore, unrounded_chunks


def log_sum_exps(hidden_ND: Tensor, head: Head, classes: int, temperatures: Sequence[float]) -> list[Tensor]:
    """log sum_v exp(z_v / T) at each temperature, [N] each, z the unrounded logits of the first classes."""
    chunks = [[torch.logsumexp(z / t, -1) for t in temperatures] for z in unrounded_chunks(hidden_ND, head, classes)]
    return [torch.cat(of_chunks) for of_chunks in zip(*chunks)]


def keep_log_sum_exps(
    cache: TeacherCache,
    samples: Iterable[Mapping[str, Any]],
    head: Head,
    device: torch.device | str,
    progress: bool,
    ranks: Ranks,
) -> TeacherCache:
    """Add the log-sum-exps that the cache's store asks for and that the files of these samples lack.

    Args:
        cache: the cache, which holds the samples.
        samples: tokenised samples, with input_ids and labels.
        head: the cache's head.
        device: the device that computes.
        progress: show a progress bar.
        ranks: the ranks that have opened the cache together; each makes a share.

    Returns:
        The cache, opened again if anything was added.

    Raises:
        UserError: the disk has too little room.
    """
    store = cache.store
    if not isinstance(store, HiddenStore) or store.classes is None or not store.lse:
        return cache
    folder, index = cache.folder, read_index(cache.folder)
    kept = lse_files(folder, index)
    todo: dict[str, _Lacking] = {}
    for rows in sorted({cache.files[cache.place(s)[0]] for s in samples}):
        there = kept.get(index[rows], {}).get(store.classes, {})
        lacking = tuple(t for t in store.lse if lse_at(t, there) is None)
        if lacking:
            file = _Lacking(folder / rows, index[rows], store.classes, lacking)
            todo[file.name] = file
    # Ranks may see different files, if one has already written some, so the first rank's list counts.
    names = ranks.first(lambda: list(todo))
    if not names:
        return cache
    ranks.first(lambda: _check_disk(folder, list(todo.values()), store.bytes_beside(head) // len(store.lse)))
    mine = ranks.share(names)
    with ranks.together(), progress_bar(what="log-sum-exp", total=len(mine), unit="file", shown=progress) as bar:
        here = head.on(device)
        makers = {name: partial(todo[name].make, here) for name in mine}
        write_all(folder, makers, lambda name: bar.update())
        digests = digests_of(folder, mine)
    digests = ranks.merged(digests)
    ranks.first(lambda: _finish(folder, digests))
    return TeacherCache(folder, store, verify=False)


def _finish(folder: Path, digests: Mapping[str, str]) -> None:
    add_to_index(folder, digests)
    drop_orphans(folder)
    drop_unfinished(folder)


class _Lacking:
    """Log-sum-exps that a file with hidden states lacks.

    Args:
        path: the file with hidden states.
        digest: that file's digest.
        classes: over how many of the first classes the sums are.
        temperatures: the temperatures.
    """

    def __init__(self, path: Path, digest: str, classes: int, temperatures: tuple[float, ...]) -> None:
        self.path, self.digest, self.classes, self.temperatures = path, digest, classes, temperatures
        made_from = json_text([path.name, digest, classes, list(temperatures)]).encode()
        self.name = f"lse-{hashlib.blake2b(made_from, digest_size=8).hexdigest()}.safetensors"

    @torch.inference_mode()
    def make(self, head: Head) -> dict[str, Tensor]:
        """All tensors of the file."""
        assert head.weight is not None
        device = head.weight.device
        with safe_open(self.path, "pt") as f:
            hidden_ND = f.get_tensor("hidden").to(device)
        with torch.autocast(device.type, enabled=False):
            values = log_sum_exps(hidden_ND, head, self.classes, self.temperatures)
        of_rows = torch.frombuffer(bytearray.fromhex(self.digest), dtype=torch.uint8)
        named = {lse_name(t): x for t, x in zip(self.temperatures, values)}
        return {"rows": of_rows, "classes": torch.tensor([self.classes]), **named}


def _check_disk(folder: Path, todo: Sequence[_Lacking], size: int) -> None:
    """Refuse to write if the disk lacks room. size: bytes of a number."""
    numbers = sum(len(file.temperatures) * sum(count for _, count in contents(file.path)) for file in todo)
    needed, free = numbers * size + len(todo) * 1024, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"teacher_cache {str(folder)!r}: log-sum-exps need {needed / 1e6:.2f} MB, and {free / 1e6:.2f} MB are "
            "free; give a folder on a larger disk, or set log_sum_exp to false"
        )


def drop_orphans(folder: Path) -> None:
    """Delete log-sum-exps whose file with hidden states is gone or has changed."""
    index = read_index(folder)
    of_rows = lse_files(folder, index)
    orphans = {f for d in of_rows.keys() - set(index.values()) for x in of_rows[d].values() for f in x.values()}
    drop_from_index(folder, orphans)
    for name in orphans:
        (folder / name).unlink(missing_ok=True)
