"""Any number of files is read with few of them open."""

import os
import threading
from pathlib import Path

import pytest
import tiny
import torch

from srd_fast import UserError
from srd_fast.teacher import LiveTeacher, TeacherCache, build_teacher_cache
from srd_fast.teacher import shards as shard_files
from srd_fast.teacher.descriptors import Descriptors, identity_of

SAMPLES = tiny.tiny_samples(40)


@pytest.fixture(scope="module")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    build_teacher_cache(tiny.tiny_model("llama"), SAMPLES, folder, shard_bytes=64, progress=False)
    assert len(list(folder.glob("rows-*.safetensors"))) > 30
    return folder


def files_open(folder: Path) -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(str(folder) in os.readlink(link) for link in links if link.is_symlink())


def rows_of(cache: TeacherCache) -> torch.Tensor:
    return cache.rows({"teacher": cache.collate(SAMPLES)}, 1.0).hidden_ND  # type: ignore[union-attr]


@pytest.mark.parametrize("most", [1, 3, 100])
def test_a_cache_of_many_files_keeps_few_open(most: int, many_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "_DESCRIPTORS", Descriptors(most))
    cache = TeacherCache(many_files)
    live = LiveTeacher(tiny.tiny_model("llama"))
    wanted = torch.cat([live.rows(tiny.collate([s]), 1.0).hidden_ND for s in SAMPLES])  # type: ignore[union-attr]
    for _ in range(2):
        torch.testing.assert_close(rows_of(cache), wanted)
        cache.will_need(cache.place(SAMPLES[0]))
        if Path("/proc/self/fd").is_dir():
            assert 0 < files_open(many_files) <= most


def test_threads_read_at_once_what_is_closed_behind_them(many_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "_DESCRIPTORS", Descriptors(1))
    cache, found, errors = TeacherCache(many_files), list[torch.Tensor](), list[BaseException]()

    def read() -> None:
        try:
            found.extend(rows_of(cache) for _ in range(5))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 20
    assert all(torch.equal(x, found[0]) for x in found)


def test_another_file_in_the_place_of_one_is_refused(tmp_path: Path) -> None:
    path, descriptors = tmp_path / "rows", Descriptors(1)
    path.write_bytes(b"0123456789")
    with path.open("rb") as f:
        identity = identity_of(f.fileno())
    with descriptors.reading("a", path, identity) as descriptor:
        assert os.read(descriptor, 4) == b"0123"
    descriptors.close("a")
    path.write_bytes(b"01234")
    with pytest.raises(UserError, match="not the file that was there"), descriptors.reading("a", path, identity):
        pass
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"), descriptors.reading("a", path, identity):
        pass


def test_rows_are_read_where_the_system_cannot_read_at_an_offset(
    many_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = rows_of(TeacherCache(many_files))
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    cache = TeacherCache(many_files)
    cache.will_need(cache.place(SAMPLES[0]))
    assert torch.equal(rows_of(cache), wanted)
