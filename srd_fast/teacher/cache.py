"""A teacher that was run before: its rows with loss are read from disk, found by the content of a sample."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from ..data import IGNORE_INDEX
from ..errors import UserError
from ..losses import Head
from ..models import find_head
from . import shards
from .index import HEAD, OF_SAMPLES, contents, lse_files, read_index, read_meta, sample_key, verify_files
from .mirror import mirror_of
from .source import TeacherRows
from .stores import CACHE_KINDS, HiddenStore, Store


class ComingRows:
    """Rows of a batch that another thread is reading. The Trainer's loader calls `to` just before the batch's step.

    Args:
        rows: what `TeacherCache.collate` would return, not filled yet.
        read: is done when the rows are filled.
    """

    def __init__(self, rows: dict[str, Tensor], read: "Future[None]") -> None:
        self._rows, self._read = rows, read

    def to(self, device: torch.device | str, non_blocking: bool = False) -> dict[str, Tensor]:
        """Wait for the rows, and move them to a device."""
        self._read.result()
        return {name: x.to(device, non_blocking=non_blocking) for name, x in self._rows.items()}


class TeacherCache:
    """A cache of a teacher's rows, used in place of the teacher. Several processes may read it at once.

    Args:
        folder: the folder that `build_teacher_cache` filled, or an address that fsspec knows, of which a local copy is
            made.
        store: the store with which it was filled. Not needed for "hidden".
        verify: first compare the checksum of every file, which takes about a second per GB on one core.

    Raises:
        UserError: the cache is missing, unfinished or damaged. The message names the file.
    """

    def __init__(self, folder: str | Path, store: Store | None = None, verify: bool = True) -> None:
        if (mirror := mirror_of(folder)) is not None:
            mirror.fetch()
            folder = mirror.folder
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
            CACHE_KINDS.check(self.meta["kind"])
            if self.meta["kind"] != "hidden":
                raise UserError(f"teacher_cache of kind {self.meta['kind']!r} needs its store")
            store = HiddenStore()
        self.store = store
        self.num_classes: int = self.meta["num_classes"]
        self.is_encoder_decoder: bool = self.meta.get("encoder_decoder", False)  # of the teacher
        self.head: Head | None = None
        if HEAD in index:
            parts = load_file(self.folder / HEAD)
            self.head = Head(parts["weight"], parts.get("bias"), self.meta["softcap"], self.meta["scale"])
        self.files = sorted(name for name in index if name.startswith("rows-"))
        kept = lse_files(self.folder, index)
        self._lse_files = [kept.get(index[name], {}) for name in self.files]
        # Key -> file, first row, rows.
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for number, name in enumerate(self.files):
            start = 0
            for key, count in contents(self.folder / name):
                self._places[key] = number, start, count
                start += count
        self._open: dict[str, shards.OpenFile] = {}
        self._reader: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_reader": None}

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, samples: Iterable[Mapping[str, Any]]) -> int:
        """Count the samples that the cache does not hold.

        Args:
            samples: tokenised, with input_ids and labels.

        Returns:
            How many are missing.
        """
        return sum(sample_key(s["input_ids"], s["labels"]) not in self._places for s in samples)

    def to(self, device: torch.device | str) -> "TeacherCache":
        """Move the teacher's head, which caches of kind "hidden" have.

        Args:
            device: where the student trains.

        Returns:
            The cache itself.
        """
        self.head = self.head and self.head.on(device)
        return self

    def for_student(self, student: nn.Module) -> "TeacherCache":
        """Set the student for which the rows are: those of kind "hidden" then come with its log-sum-exps, if stored.

        Args:
            student: the student. Its number of classes decides over how many classes a log-sum-exp must be.

        Returns:
            A cache that shares this one's files and head; the cache itself if the student makes no difference.
        """
        classes = common_classes(self.num_classes, student)
        if not isinstance(self.store, HiddenStore) or self.store.classes == classes or not any(self._lse_files):
            return self
        found = copy.copy(self)
        found.store = replace(self.store, classes=classes)
        return found

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Read the rows of a batch's samples, one sample after the other.

        Args:
            samples: tokenised, with input_ids and labels.

        Returns:
            Tensors on the CPU by name, for `rows`. If CUDA is in use they are in page-locked memory.

        Raises:
            UserError: the cache does not hold one of the samples.
        """
        rows, reads = self._rows_to_read(samples)
        _run(reads)
        return rows

    def collate_ahead(self, samples: Sequence[Mapping[str, Any]]) -> ComingRows | dict[str, Tensor]:
        """Start reading the rows of a batch's samples in another thread.

        That thread mostly copies memory, without Python's lock, so the caller can work meanwhile. In a worker of a data
        loader, which is ahead of the steps anyway, the rows are read at once.

        Args:
            samples: tokenised, with input_ids and labels.

        Returns:
            An object whose `to(device)` waits for the rows and returns them; in a worker the rows themselves.

        Raises:
            UserError: the cache does not hold one of the samples.
        """
        if get_worker_info() is not None:
            return self.collate(samples)
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "srd-fast-rows")
        rows, reads = self._rows_to_read(samples)
        return ComingRows(rows, self._reader.submit(_run, reads))

    def _rows_to_read(self, samples: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], list[Callable[[], None]]]:
        """The tensors that `collate` returns, still empty, and the calls that fill them."""
        # A sample without loss has no rows. The search starts at the end, where most samples have labels.
        places = [self.place(s) for s in samples if any(x != IGNORE_INDEX for x in reversed(s["labels"]))]
        total = sum(count for _, _, count in places)
        # A GPU copies from page-locked memory without waiting. Allocating new memory costs more than reading into it.
        pinned = torch.cuda.is_initialized() and get_worker_info() is None
        columns = {number: self._columns(number) for number in {number for number, _, _ in places} or {0}}
        found, reads = {}, list[Callable[[], None]]()
        for name, file in next(iter(columns.values())).items():
            if not all(name in of_file for of_file in columns.values()):
                continue  # log-sum-exps, which only some files have
            column = self._file(file).columns[name]
            rows = found[name] = torch.empty((total, *column.row_shape), dtype=column.dtype, pin_memory=pinned)
            end = 0
            for number, start, count in places:
                read = self._file(columns[number][name]).read
                reads.append(partial(read, name, start, rows[end : end + count]))
                end += count
        return found, reads

    def _columns(self, number: int) -> dict[str, str]:
        """Name of each tensor that has the rows of a file's samples -> the file that it is in."""
        own = self.files[number]
        columns = {name: own for name in self._file(own).columns if name not in OF_SAMPLES}
        if isinstance(self.store, HiddenStore) and self.store.classes is not None:
            columns |= self._lse_files[number].get(self.store.classes, {})
        return columns

    def _file(self, name: str) -> shards.OpenFile:
        if name not in self._open:
            self._open[name] = shards.OpenFile(self.folder / name)
        return self._open[name]

    def place(self, sample: Mapping[str, Any]) -> tuple[int, int, int]:
        """Find a sample's rows.

        Args:
            sample: tokenised, with input_ids and labels.

        Returns:
            Number of the file, first row in it, and number of rows.

        Raises:
            UserError: the cache does not hold the sample.
        """
        try:
            return self._places[sample_key(sample["input_ids"], sample["labels"])]
        except KeyError:
            raise UserError(
                f"teacher_cache {str(self.folder)!r} does not hold sample {str(sample.get('sample_id', ''))!r} of "
                f"{len(sample['input_ids'])} tokens (its template is {self.meta['template']!r}): fill it with this data"
            ) from None

    def will_need(self, place: tuple[int, int, int]) -> None:
        """Ask the operating system to read rows ahead, without waiting for it.

        Args:
            place: from `place`.
        """
        number, start, count = place
        for name, file in self._columns(number).items():
            self._file(file).will_need(name, start, count)

    def rows(self, batch: Mapping[str, Any], temperature: float) -> TeacherRows:
        """Return the teacher's rows of a batch, as a loss takes them.

        Args:
            batch: with what `collate` returned under "teacher".
            temperature: T of the loss. A compact kind must hold rows for it.

        Returns:
            `HiddenRows`, or `TopK`, `Sampled` or `Projected`, by the kind of the cache. Hidden states come with their
            log-sum-exps if the files of all samples have them for `temperature` and the student of `for_student`.
        """
        return self.store.decode(batch["teacher"], self.head, temperature)


def common_classes(teacher_classes: int, student: nn.Module | None) -> int:
    """The number of classes that teacher and student both have."""
    head = None if student is None else find_head(student, "student").weight
    return teacher_classes if head is None else min(teacher_classes, head.shape[0])


def _run(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()
