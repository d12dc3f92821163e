"""A teacher that was run once: its rows with loss, read from disk by what a sample says."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..data import IGNORE_INDEX
from ..errors import UserError
from ..losses import Head
from . import shards
from .index import HEAD, OF_SAMPLES, contents, read_index, read_meta, sample_key, verify_files
from .source import TeacherRows
from .stores import HiddenStore, Store, check_kind


class TeacherCache:
    """A teacher source that reads a cache. Reading is safe in several processes and data-loader workers.

    Args:
        folder: what `build_teacher_cache` filled.
        store: for compact kinds, the store it was filled with; "hidden" needs none.
        verify: compare the checksum of every file first, about a second a GB and core.

    Raises:
        UserError that names the file if the cache is unfinished or damaged.
    """

    def __init__(self, folder: str | Path, store: Store | None = None, verify: bool = True) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if not index:
            raise UserError(
                f"teacher_cache {str(self.folder)!r} is not there or unfinished: make it with `srd-fast cache`"
            )
        if verify:
            for _, error in verify_files(self.folder, index):
                raise error
        self.meta = read_meta(self.folder, index)
        if store is None:
            check_kind(self.meta["kind"])
            if self.meta["kind"] != "hidden":
                raise UserError(f"teacher_cache of kind {self.meta['kind']!r} needs its store")
            store = HiddenStore()
        self.store = store
        self.num_classes: int = self.meta["num_classes"]
        self.head: Head | None = None
        if HEAD in index:
            parts = load_file(self.folder / HEAD)
            self.head = Head(parts["weight"], parts.get("bias"), self.meta["softcap"], self.meta["scale"])
        self._files = sorted(name for name in index if name.startswith("rows-"))
        # Key -> file, first row, rows.
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, name in enumerate(self._files):
            start = 0
            for key, count in contents(self.folder / name):
                self._places[key] = number, start, count
                start += count
        self._open: dict[int, dict[str, Tensor]] = {}
        self._ahead: dict[int, tuple[int, dict[str, tuple[int, int]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_ahead": {}}

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, samples: Iterable[Mapping[str, Any]]) -> int:
        """How many of the samples the cache does not hold."""
        return sum(sample_key(s["input_ids"], s["labels"]) not in self._places for s in samples)

    def to(self, device: torch.device | str) -> "TeacherCache":
        """Move the teacher's head."""
        self.head = self.head and self.head.on(device)
        return self

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The stored rows of a batch's samples, one sample after the other."""
        found = [self._sample(s) for s in samples]
        return {name: torch.cat([f[name] for f in found]) for name in found[0]}

    def _place(self, sample: Mapping[str, Any]) -> tuple[int, int, int]:
        try:
            return self._places[sample_key(sample["input_ids"], sample["labels"])]
        except KeyError:
            raise UserError(
                f"teacher_cache {str(self.folder)!r} does not hold sample {sample.get('sample_id', '')!r} of "
                f"{len(sample['input_ids'])} tokens (its template is {self.meta['template']!r}): fill it with this data"
            ) from None

    def _sample(self, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        without_loss = all(x == IGNORE_INDEX for x in sample["labels"])
        number, start, count = (0, 0, 0) if without_loss else self._place(sample)
        if number not in self._open:
            rows = shards.mapped(self.folder / self._files[number])
            self._open[number] = {name: x for name, x in rows.items() if name not in OF_SAMPLES}
        return {name: x[start : start + count] for name, x in self._open[number].items()}

    def will_need(self, sample: Mapping[str, Any]) -> None:
        """Have the system read a sample's rows ahead, without waiting for it."""
        if not hasattr(os, "posix_fadvise"):
            return
        number, start, count = self._place(sample)
        if number not in self._ahead:
            self._ahead[number] = shards.open_for_reading_ahead(self.folder / self._files[number])
        descriptor, places = self._ahead[number]
        for name, (begin, size) in places.items():
            if name not in OF_SAMPLES:
                os.posix_fadvise(descriptor, begin + start * size, count * size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        for descriptor, _ in getattr(self, "_ahead", {}).values():
            os.close(descriptor)

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """From what `collate` put into the batch as "teacher"."""
        return self.store.decode(batch["teacher"], self.head, temperature)
