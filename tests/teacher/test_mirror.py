"""A teacher cache at an address of fsspec: filled, read and mended through a local copy of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import tiny
import torch

from srd_fast import TeacherCache, UserError, build_teacher_cache, open_teacher_cache
from srd_fast.teacher.mirror import Mirror

SAMPLES = tiny.tiny_samples(9)
ADDRESS = "memory://bucket/cache"


@pytest.fixture(autouse=True)
def _own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SRD_FAST_CACHE", str(tmp_path / "copies"))
    yield
    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def opened(folder: Any = ADDRESS, samples: Any = SAMPLES, **options: Any) -> TeacherCache:
    given = {"teacher": tiny.tiny_model("llama", seed=1), "progress": False, **options}
    return open_teacher_cache(folder, samples=samples, **given)


def there(address: str = ADDRESS) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(address)
    return {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in fs.find(root)}


def on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SRD_FAST_CACHE", str(tmp_path / "others"))


def test_it_holds_what_a_folder_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path / "folder")
    opened()
    assert there() == {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    on_another_machine(monkeypatch, tmp_path)
    expected = TeacherCache(tmp_path / "folder").collate(SAMPLES)["hidden"]
    built = build_teacher_cache(tiny.tiny_model("llama", seed=1), SAMPLES, "memory://bucket/built", progress=False)
    assert there("memory://bucket/built") == there()
    for cache in (TeacherCache(ADDRESS), opened(teacher=None), built):
        assert torch.equal(cache.collate(SAMPLES)["hidden"], expected)


def test_what_is_there_is_fetched_and_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples on another machine: the first ones' file comes, only the new one's goes."""
    opened(samples=SAMPLES[:4])
    first = there()
    on_another_machine(monkeypatch, tmp_path)
    sent, send = [], Mirror._send
    monkeypatch.setattr(Mirror, "_send", lambda self, name: (sent.append(name), send(self, name)))
    assert len(opened()) == len(SAMPLES)
    after = there()
    assert {name: after[name] for name in first if name != "index.json"} == {
        name: content for name, content in first.items() if name != "index.json"
    }
    assert sent == [*sorted(after.keys() - first.keys()), "index.json"]
    fetched: list[str] = []
    monkeypatch.setattr(Mirror, "_write", lambda self, name, content: fetched.append(name))
    TeacherCache(ADDRESS)
    assert fetched == ["index.json"]


def test_damage_and_another_teacher_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened()
    with pytest.raises(UserError, match=f"teacher_cache '{ADDRESS}' was made with another teacher"):
        opened(teacher=tiny.tiny_model("llama", seed=2))
    name = next(name for name in there() if name.startswith("rows-"))
    damaged = bytearray(there()[name])
    damaged[-1] ^= 1
    fsspec.filesystem("memory").pipe_file(f"/bucket/cache/{name}", bytes(damaged))
    TeacherCache(ADDRESS)  # this machine has its copy
    on_another_machine(monkeypatch, tmp_path)
    with pytest.raises(UserError, match=rf"teacher_cache '{ADDRESS}': {name} is not the one that its index says"):
        TeacherCache(ADDRESS)


def test_addresses_of_this_machine_and_of_nowhere(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/here"
    assert opened(address).folder == tmp_path / "here"
    assert TeacherCache(address).missing(SAMPLES) == 0
    with pytest.raises(UserError, match="teacher_cache 'nothing://x' cannot be opened"):
        TeacherCache("nothing://x")
    with pytest.raises(UserError, match="is not there or unfinished"):
        TeacherCache("memory://bucket/other")
