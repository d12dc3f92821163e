"""A teacher run once: its rows are the live teacher's; no kill, damage or change of teacher goes unnoticed.

This file is also the program of two ranks that fill one cache (see test_distributed.py): `python
test_teacher_cache.py FOLDER`.
"""

import gc
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_distributed
import tiny
import torch
from ranks import Ranks
from safetensors.torch import load_file
from test_trainer import StopAt, Watched, config, three_stages
from tiny import assert_same
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import CurriculumPlan, UserError
from srd_fast.teacher import (
    LiveTeacher,
    StaleCacheError,
    TeacherCache,
    build,
    build_teacher_cache,
    make_store,
    open_teacher_cache,
    shards,
)
from srd_fast.teacher.cache import ComingRows
from srd_fast.teacher.stores import HiddenStore

Samples = Sequence[Mapping[str, Any]]
SAMPLES = tiny.tiny_samples(15)  # those of test_trainer.py
LONGEST = max(len(s["input_ids"]) for s in SAMPLES)
VALIDATION = tiny.tiny_samples(5, seed=8)
# Some thirty rows, so that the samples take several files.
SHARD_BYTES = 3000
FORK = multiprocessing.get_context("fork")


def teacher_model(**options: Any) -> PreTrainedModel:
    """The teacher of most tests here."""
    return tiny.tiny_model("llama_untied", **{"seed": 1, "width": 24, "layers": 1, **options})


def fill(folder: Path, teacher: PreTrainedModel | None = None, samples: Samples = SAMPLES, **options: Any) -> Any:
    """Build a cache of several files."""
    options = {"shard_bytes": SHARD_BYTES, "batch_tokens": 64, "template": "alpaca", "progress": False, **options}
    return build_teacher_cache(teacher or teacher_model(), samples, folder, **options)


def files(folder: Path) -> dict[str, str]:
    """Every file of a folder, hidden ones included, and a hash of its bytes."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def rows_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*.safetensors"))


def attached(cache: TeacherCache, samples: Samples) -> dict[str, Any]:
    """A padded batch with what the cache holds of it."""
    return {**tiny.collate(samples), "teacher": cache.collate(samples)}


def hidden(cache: TeacherCache, samples: Samples) -> Tensor:
    return cache.rows(attached(cache, samples), 1.0).hidden_ND


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """The Trainer and forked processes pass over what the imports left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks of this file, at work from the start because they begin with seconds of imports."""
    with Ranks(__file__, tmp_path_factory.mktemp("ranks"), 2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed cache of SAMPLES by `teacher_model()`. Shared: work on a copy."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    fill(folder)
    assert len(rows_files(folder)) >= 4
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed cache."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the library logs; the command line turns its propagation off."""
    monkeypatch.setattr(logging.getLogger("srd_fast"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="srd_fast")
    return caplog


# Rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama_untied", "gpt2", "phi", "gemma2", "cohere", "granite"])
def test_cached_rows_are_those_of_the_live_teacher(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = tiny.tiny_model(architecture, seed=1, width=24).to(dtype)
    live, built = LiveTeacher(teacher), fill(tmp_path / "cache", teacher)
    tolerance = tiny.forward_rounding(teacher, LONGEST)  # the cache was filled in other batches
    for cache in (built, TeacherCache(tmp_path / "cache")):
        for part in (SAMPLES[:1], SAMPLES[3:8], SAMPLES[::-1]):
            expected = live.rows(tiny.collate(part), 2.0)
            found = cache.rows(attached(cache, part), 2.0)
            assert found.hidden_ND.dtype == dtype
            assert_same(found.hidden_ND, expected.hidden_ND, tolerance)
            assert torch.equal(found.head.weight, expected.head.weight)
            assert (found.head.softcap, found.head.scale) == (expected.head.softcap, expected.head.scale)
            assert (found.head.bias is None) == (expected.head.bias is None) == (architecture != "phi")
            if found.head.bias is not None:
                assert torch.equal(found.head.bias, expected.head.bias)
        assert cache.num_classes == live.num_classes == tiny.VOCAB


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_what_prompts_begin_with_is_run_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, samples = random.Random(0), list[dict[str, Any]]()
    for start, count in ((range(20, 40), 20), (range(60, 85), 18), (range(3), 4)):
        for _ in range(count):
            prompt = [*start, *(draw.randrange(100, 300) for _ in range(draw.randint(1, 9)))]
            response = [draw.randrange(1, 300) for _ in range(draw.randint(1, 7))]
            samples.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    draw.shuffle(samples)
    teacher, tokens = teacher_model(), [0]
    teacher.get_input_embeddings().register_forward_hook(lambda module, args, out: tokens.append(args[0].numel()))
    store = make_store(kind, tiny.VOCAB, 8)

    def filled(name: str) -> tuple[Any, int]:
        tokens.clear()
        options = {"shard_bytes": 1 << 20, "batch_tokens": 256, "kind": kind, "store": store}
        return fill(tmp_path / name, teacher, samples, **options), sum(tokens)

    (shared, few), _ = filled("shared"), monkeypatch.setattr(build, "share_prefix", lambda *_: None)
    whole, many = filled("whole")
    assert few < many - 550  # of 20 * 19 + 25 * 17, less the samples that prove it
    for sample in samples:
        ours, theirs = (c.collate([sample]) for c in (shared, whole))
        for name, expected in theirs.items():
            if expected.is_floating_point():
                assert_same(ours[name], expected, 1e-5, name)
            else:
                assert torch.equal(ours[name], expected)


def test_a_sample_of_two_data_sets_is_stored_once(whole: Path, tmp_path: Path) -> None:
    again = [{**s, "sample_id": f"other {s['sample_id']}"} for s in SAMPLES[::-1]]
    cache = fill(tmp_path / "cache", samples=[*SAMPLES, *again])
    assert len(cache) == len(SAMPLES)
    stored = [key.tobytes() for p in rows_files(tmp_path / "cache") for key in load_file(p)["keys"].numpy()]
    assert len(stored) == len(set(stored)) == len(SAMPLES)
    assert files(tmp_path / "cache") == files(whole)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_samples_does_not_matter(seed: int, whole: Path, tmp_path: Path) -> None:
    mixed = random.Random(seed).sample(SAMPLES, len(SAMPLES))
    assert mixed != SAMPLES
    cache = fill(tmp_path / "cache", samples=mixed)
    assert files(tmp_path / "cache") == files(whole)
    assert torch.equal(hidden(cache, mixed), hidden(TeacherCache(whole), mixed))


def test_new_data_adds_files_and_leaves_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    fill(folder, samples=SAMPLES[:9])
    before, old = files(folder), {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    cache = fill(folder, samples=SAMPLES)
    after = files(folder)
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: digest for name, digest in before.items() if name != "index.json"
    }
    assert all((folder / name).stat().st_mtime_ns == old[name] for name in before if name != "index.json")
    new = sorted(after.keys() - before.keys())
    assert new
    assert all(name.startswith("rows-") for name in new)
    assert sum(len(load_file(folder / name)["keys"]) for name in new) == 6
    assert set(json.loads((folder / "index.json").read_text())["files"]) == after.keys() - {"index.json"}
    teacher = teacher_model()
    expected = LiveTeacher(teacher).rows(tiny.collate(SAMPLES), 1.0).hidden_ND
    assert_same(hidden(cache, SAMPLES), expected, tiny.forward_rounding(teacher, LONGEST))
    assert files(folder) == after


def test_the_same_tokens_with_other_labels_are_another_sample(tmp_path: Path) -> None:
    one = SAMPLES[0]
    other = {**one, "labels": [*one["labels"][:-1], tiny.IGNORE]}
    cache = fill(tmp_path, samples=[one, other])
    assert len(hidden(cache, [one])) == len(hidden(cache, [other])) + 1
    assert torch.equal(hidden(cache, [one])[:-1], hidden(cache, [other]))


def test_samples_without_loss_have_no_rows(tmp_path: Path) -> None:
    """Also one whose only label stands at its first token, and one that the cache was never filled with."""
    ids = [5, 6, 7, 8]
    nothing = {"input_ids": ids, "labels": [tiny.IGNORE] * 4}
    first = {"input_ids": ids, "labels": [5, *[tiny.IGNORE] * 3]}
    cache = fill(tmp_path, samples=[nothing, first, *SAMPLES[:2]])
    assert len(cache) == 4
    assert cache.missing([nothing, first, *SAMPLES[:3]]) == 1
    unknown = {"input_ids": [9, 9], "labels": [tiny.IGNORE] * 2}
    for part in ([nothing], [first], [unknown]):
        assert hidden(cache, part).shape == (0, 24)
    between = [nothing, SAMPLES[0], first, SAMPLES[1], unknown]
    assert torch.equal(hidden(cache, between), hidden(cache, SAMPLES[:2]))


def test_a_sample_that_is_not_there_is_named(whole: Path) -> None:
    cache = TeacherCache(whole)
    with pytest.raises(UserError, match=rf"does not hold sample 's00' of {len(VALIDATION[0]['input_ids'])} tokens"):
        cache.collate(VALIDATION[:1])


def test_a_cache_travels_to_workers(whole: Path) -> None:
    cache = TeacherCache(whole)
    expected = hidden(cache, SAMPLES)
    cache.will_need(cache.place(SAMPLES[0]))
    assert torch.equal(hidden(pickle.loads(pickle.dumps(cache)), SAMPLES), expected)


def test_what_is_read_ahead_is_the_sample(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, asked = TeacherCache(whole), []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: asked.append(os.pread(fd, size, start)))
    for sample in SAMPLES:
        cache.will_need(cache.place(sample))
        assert asked.pop() == hidden(cache, [sample]).numpy().tobytes()
        assert not asked


def test_rows_that_another_thread_reads_are_the_same(copied: Path) -> None:
    cache = TeacherCache(copied)
    expected, coming = cache.collate(SAMPLES), cache.collate_ahead(SAMPLES)
    assert isinstance(coming, ComingRows)
    assert cache.collate_ahead([{"input_ids": [9], "labels": [tiny.IGNORE]}]).to("cpu")["hidden"].shape == (0, 24)
    for rows in (coming.to("cpu"), pickle.loads(pickle.dumps(cache)).collate_ahead(SAMPLES).to("cpu")):
        assert rows.keys() == expected.keys()
        assert all(torch.equal(rows[name], x) for name, x in expected.items())
    os.truncate(rows_files(copied)[-1], 200)
    coming = cache.collate_ahead(SAMPLES)
    with pytest.raises(shards.DamagedFileError, match="it is shorter than when it was opened"):
        coming.to("cpu")


def test_a_cache_that_is_dropped_closes_its_files(whole: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    cache = TeacherCache(whole)
    cache.collate_ahead(SAMPLES).to("cpu")
    assert len(os.listdir("/proc/self/fd")) > before
    del cache
    # The reading thread lets go of its last call, and so of the files, a moment after the rows are there.
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_teacher_that_cannot_teach_live_fills_no_cache(tmp_path: Path) -> None:
    teacher = tiny.tiny_model("llama", final_logit_softcapping=1.0)
    with pytest.raises(UserError, match="hidden states times its head differ"):
        fill(tmp_path / "cache", teacher)
    assert not (tmp_path / "cache").exists()


# Killed.


TOUCHES = ("open", "ftruncate", "fsync", "replace", "unlink")


def dying_process(folder: Path, moment: int, pause: float = 0.0, ready: Any = None) -> Any:
    """A process that fills `folder` and sends itself SIGKILL when it touches a file for the `moment`-th time (from 0).

    Killed at a write, it leaves half of the bytes. pause: seconds of each fsync. ready: a barrier to start from.
    """

    def work() -> None:
        touches, truncate = itertools.count(), os.ftruncate

        def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if name == "fsync":
                    time.sleep(pause)
                if next(touches) == moment:
                    if name == "fsync":
                        truncate(args[0], os.fstat(args[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapped

        for name in TOUCHES:
            setattr(os, name, watched(name, getattr(os, name)))
        if ready is not None:
            ready.wait()
        fill(folder)

    process = FORK.Process(target=work)
    process.start()
    return process


def ended(process: Any) -> int:
    """The exit status, -9 after SIGKILL."""
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


NEVER = 10**9


@pytest.mark.slow
def test_a_kill_at_any_touch_of_a_file_changes_nothing(whole: Path, tmp_path: Path) -> None:
    """Each moment in a folder of its own, and its next process does the rest."""
    expected = files(whole)
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        status = ended(dying_process(folder, moment))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        unfinished = files(folder) if folder.exists() else {}
        assert unfinished != expected or moment > 4 * len(expected) - 2, "it was killed too late"
        assert "index.json" not in unfinished or unfinished == expected
        fill(folder)
        assert files(folder) == expected, f"killed at touch {moment}"
    assert moment == 4 * len(expected)  # open, truncate, sync and rename of each file


def test_a_process_killed_again_and_again_gets_to_the_end(whole: Path, tmp_path: Path) -> None:
    """Each process comes one touch further than the one before; killed ones leave whole files and one hidden one."""
    kills = 0
    while (status := ended(dying_process(tmp_path, kills))) != 0:
        assert status == -signal.SIGKILL
        assert len(list(tmp_path.glob(".*.partial"))) <= 1
        kills += 1
    assert kills >= 8
    assert files(tmp_path) == files(whole)


@pytest.mark.slow
def test_kills_from_outside_at_random_moments(whole: Path, tmp_path: Path) -> None:
    expected, generator, kills = files(whole), random.Random(0), 0
    started = time.monotonic()
    assert ended(dying_process(tmp_path / "timed", NEVER, pause=0.01)) == 0
    seconds = time.monotonic() - started
    for attempt in range(60):
        folder = tmp_path / str(attempt % 2)  # each is resumed by the next but one, killed or not
        process = dying_process(folder, NEVER, pause=0.01)
        time.sleep(generator.uniform(0, seconds))
        process.kill()
        if ended(process) == 0:
            assert files(folder) == expected
            shutil.rmtree(folder)
        else:
            kills += 1
        if kills == 10:
            break
    assert kills == 10
    for folder in (tmp_path / "0", tmp_path / "1"):
        fill(folder)
        assert files(folder) == expected


def test_several_processes_fill_one_folder(whole: Path, tmp_path: Path) -> None:
    """Every rows file is made once, by one of the three."""
    folder, log = tmp_path / "cache", tmp_path / "log"
    ready, publish = FORK.Barrier(3), shards.publish

    def work() -> None:
        def noted(descriptor: int, partial: Path, target: Path, content: bytes) -> None:
            with log.open("a") as f:
                f.write(f"{os.getpid()} {target.name}\n")
            time.sleep(0.02)
            publish(descriptor, partial, target, content)

        shards.publish = noted
        ready.wait()
        fill(folder)

    processes = [FORK.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    assert [ended(p) for p in processes] == [0, 0, 0]
    assert files(folder) == files(whole)
    made = [line.split() for line in log.read_text().splitlines() if "rows-" in line]
    assert sorted(name for _, name in made) == [p.name for p in rows_files(whole)]
    assert len({pid for pid, _ in made}) > 1


def test_several_processes_of_which_some_are_killed(whole: Path, tmp_path: Path) -> None:
    expected, generator, killed = files(whole), random.Random(1), 0
    for attempt in range(60):  # a process that leaves much to the other two may end before its moment
        if killed >= 8:
            break
        folder, ready = tmp_path / str(attempt), FORK.Barrier(3)
        moments = (NEVER, generator.randrange(4 * len(expected)), generator.randrange(4 * len(expected)))
        processes = [dying_process(folder, moment, 0.002, ready) for moment in moments]
        statuses = [ended(p) for p in processes]
        assert statuses[0] == 0
        assert set(statuses) <= {0, -signal.SIGKILL}
        killed += len([s for s in statuses if s])
        found = files(folder)
        assert {name: found[name] for name in expected} == expected, moments
        fill(folder)
        assert files(folder) == expected, moments
    assert killed >= 8


def test_what_a_killed_process_left_beside_finished_files_goes(copied: Path, whole: Path) -> None:
    """As one that waited for another's file leaves it."""
    for path in (rows_files(copied)[0], copied / "meta.json", copied / "head.safetensors"):
        path.with_name(f".{path.name}.partial").write_bytes(b"half")
    fill(copied)
    assert files(copied) == files(whole)


def test_a_file_that_another_process_writes_is_left_to_it(copied: Path) -> None:
    partial = copied / ".rows-0.safetensors.partial"
    with shards.locked(partial) as descriptor:
        os.write(descriptor, b"half")
        assert ended(dying_process(copied, NEVER)) == 0
        assert partial.read_bytes() == b"half"
    fill(copied)
    assert not partial.exists()


# Damaged.


def flipped(path: Path, position: int) -> Callable[[], Any]:
    """Flip a bit of one byte; returns what undoes it."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position] ^= 1 << position % 8
    path.write_bytes(changed)
    return lambda: path.write_bytes(content)


def kinds_of_file(folder: Path) -> list[Path]:
    """Two of the rows files, and each other file."""
    return [rows_files(folder)[0], rows_files(folder)[-1], *(folder / f"{n}" for n in OTHER_FILES)]


OTHER_FILES = ("head.safetensors", "meta.json", "index.json")


def opened(folder: Path) -> TeacherCache:
    """As the trainer does without a teacher."""
    return open_teacher_cache(folder, None, SAMPLES, template="alpaca", progress=False)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(("open_it", "step"), [(TeacherCache, 7), (opened, 29)])
def test_a_flipped_bit_is_noticed_and_the_file_named(
    open_it: Callable[[Path], Any], step: int, number: int, copied: Path
) -> None:
    """Bytes all over a json file, a header and the rows."""
    path = kinds_of_file(copied)[number]
    size = path.stat().st_size
    everywhere = random.Random(number).sample(range(size), 20)
    for position in {*range(0, min(size, 700), step), *everywhere, size - 1}:
        undo = flipped(path, position)
        with pytest.raises(UserError) as error:
            open_it(copied)
        assert path.name in str(error.value), f"byte {position}: {error.value}"
        undo()
    open_it(copied)


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _flip(path: Path) -> None:
    flipped(path, path.stat().st_size // 2)


def _exchange(path: Path) -> None:
    """With another file of its kind, whole in itself."""
    other = next((p for p in rows_files(path.parent) if p != path), path)
    path.write_bytes(other.read_bytes())


DAMAGE = (_cut_in_half, _cut_last_byte, _empty, _append, _flip, Path.unlink)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("damage", DAMAGE, ids=[d.__name__.strip("_") for d in DAMAGE])
def test_a_damaged_file_is_named_and_made_again(
    damage: Callable[[Path], Any], number: int, copied: Path, whole: Path, said: pytest.LogCaptureFixture
) -> None:
    path = kinds_of_file(copied)[number]
    damage(path)
    nothing_there = path.name == "index.json" and not path.exists()
    for open_it in (TeacherCache, opened):
        with pytest.raises(UserError, match="unfinished|lacks samples" if nothing_there else path.name):
            open_it(copied)
    before = {p.name: p.stat().st_mtime_ns for p in copied.iterdir() if p != path and p.name != "index.json"}
    cache = fill(copied)
    assert files(copied) == files(whole)
    assert {name: (copied / name).stat().st_mtime_ns for name in before} == before, "a whole file was made again"
    named = [record.getMessage() for record in said.records]
    assert [path.name in message and "making it again" in message for message in named] == [True] * (not nothing_there)
    assert torch.equal(hidden(cache, SAMPLES), hidden(TeacherCache(whole), SAMPLES))


@pytest.mark.parametrize("name", ["rows-*.safetensors", *OTHER_FILES])
def test_opening_repairs_when_asked_to(name: str, tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    teacher = teacher_model()
    options: dict[str, Any] = {"template": "alpaca", "progress": False}
    open_teacher_cache(tmp_path, teacher, SAMPLES, **options)
    before, (path,) = files(tmp_path), tmp_path.glob(name)
    _flip(path)
    with pytest.raises(UserError, match=path.name):
        open_teacher_cache(tmp_path, teacher, SAMPLES, **options)
    assert not said.records
    open_teacher_cache(tmp_path, teacher, SAMPLES, **options, repair=True)
    assert files(tmp_path) == before
    assert [path.name in record.getMessage() for record in said.records] == [True]


def test_a_rows_file_in_the_place_of_another_is_noticed(copied: Path, whole: Path) -> None:
    path = rows_files(copied)[0]
    _exchange(path)
    with pytest.raises(UserError, match=path.name):
        TeacherCache(copied)
    fill(copied)
    assert files(copied) == files(whole)


def test_files_damaged_before_the_index_was_written(copied: Path, whole: Path, said: pytest.LogCaptureFixture) -> None:
    (copied / "index.json").unlink()
    for path in (rows_files(copied)[1], copied / "head.safetensors"):
        _flip(path)
    fill(copied)
    assert files(copied) == files(whole)
    assert len(said.records) == 2


def test_several_damaged_files_have_the_same_rows_again(copied: Path, whole: Path) -> None:
    for path in rows_files(copied)[::2]:
        _flip(path)
    cache = fill(copied)
    tolerance = tiny.forward_rounding(teacher_model(), LONGEST)
    assert_same(hidden(cache, SAMPLES), hidden(TeacherCache(whole), SAMPLES), tolerance)
    assert opened(copied).missing(SAMPLES) == 0


# Of something else.


def _other_weight() -> PreTrainedModel:
    teacher = teacher_model()
    with torch.no_grad():
        next(teacher.parameters()).view(-1)[7] += 1e-3
    return teacher


def _other_revision() -> PreTrainedModel:
    teacher = teacher_model()
    teacher.config._commit_hash = "def"
    return teacher


CHANGES: dict[str, dict[str, Any]] = {
    "teacher (weights or configuration)": {"teacher": _other_weight},
    "teacher's revision": {"teacher": _other_revision},
    "dtype": {"teacher": lambda: teacher_model().bfloat16()},
    "template": {"template": "chat"},
    "kind": {"kind": "topk"},
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("building", [True, False])
def test_a_cache_of_something_else_is_refused(what: str, building: bool, tmp_path: Path) -> None:
    maker = teacher_model()
    maker.config._commit_hash = "abc"
    fill(tmp_path, maker)
    before = files(tmp_path)
    changed = {"teacher": lambda: maker, "template": "alpaca", "kind": "hidden", **CHANGES[what]}
    teacher, kind = changed.pop("teacher")(), changed["kind"]

    def use() -> None:
        if building:
            fill(tmp_path, teacher, **changed, store=make_store(kind, tiny.VOCAB))
        else:
            open_teacher_cache(tmp_path, teacher, SAMPLES, **changed, progress=False)

    with pytest.raises(
        StaleCacheError, match=f"was made with another {re.escape(what)}: .* there, .* here; delete the folder"
    ):
        use()
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["topk", "sampled"])
@pytest.mark.parametrize("change", [{"k": 5}, {"temperatures": (1.0, 3.0)}, {"temperatures": (1.0,)}])
def test_other_options_are_refused(kind: str, change: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": kind, "k": 4, "temperatures": (1.0, 2.0), "template": "alpaca"}
    teacher = teacher_model()
    open_teacher_cache(tmp_path, teacher, SAMPLES, **options, progress=False)
    before = files(tmp_path)
    with pytest.raises(StaleCacheError, match="was made with another options"):
        open_teacher_cache(tmp_path, teacher, SAMPLES, **{**options, **change}, progress=False)
    assert files(tmp_path) == before
    open_teacher_cache(tmp_path, None, SAMPLES, **{**options, "temperatures": [2, 1.0, 1]}, progress=False)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """`teacher_model()` and its tokenizer as save_pretrained writes them. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    teacher_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_other_files_behind_the_teachers_name_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    teacher, folder = Path(shutil.copytree(teacher_folder, tmp_path / "teacher")), tmp_path / "cache"
    open_teacher_cache(folder, str(teacher), SAMPLES, template="alpaca", progress=False)
    before = files(folder)
    settings = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**settings, "rms_norm_eps": 0.1}))
    with pytest.raises(StaleCacheError, match="another teacher's files"):
        open_teacher_cache(folder, str(teacher), SAMPLES, template="alpaca", progress=False)
    assert files(folder) == before


# The disk.


class _Wide(HiddenStore):
    """Claims a gigabyte a row."""

    def bytes_per_row(self, head: Any, hidden_dtype: torch.dtype) -> int:
        return 10**9


def number_of_rows(samples: Samples) -> int:
    return sum(x != tiny.IGNORE for s in samples for x in s["labels"][1:])


def test_too_small_a_disk_is_told_before_the_teacher_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=5_250_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(LiveTeacher, "hidden_states", lambda *args: pytest.fail("the teacher ran"))
    rows = number_of_rows(SAMPLES)
    with pytest.raises(UserError, match=rf"{rows} rows of 1000000000 bytes need {rows}.00 GB, and 5.25 GB are free"):
        fill(tmp_path, store=_Wide())
    assert [p.name for p in tmp_path.iterdir()] == ["meta.json"]


def test_the_room_that_is_asked_for_is_what_it_takes(whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A disk of the cache's own size is refused at most for the size of headers, and one smaller always."""
    free = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    size = sum(p.stat().st_size for p in whole.glob("*.safetensors"))
    free.free = size - 1024
    with pytest.raises(UserError, match="GB are free"):
        fill(tmp_path)
    free.free = size + 1024 * len(rows_files(whole))
    fill(tmp_path)
    assert files(tmp_path) == files(whole)
    free.free = 0
    fill(tmp_path)  # nothing to write
    rows_files(tmp_path)[0].unlink()
    with pytest.raises(UserError, match="GB are free"):
        fill(tmp_path)


# Training.


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(tokenizer: PreTrainedTokenizerFast, teacher: Any, cache: Path | None = None, **fields: Any) -> Any:
    """Losses, weights and the KL before and after of a run over three stages."""
    trainer = untrained(tokenizer, teacher, cache, **fields)
    before = trainer.evaluate()["eval_kl"]
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return SimpleNamespace(
        trainer=trainer, losses=trainer.losses, weights=weights, metrics=[before, trainer.evaluate()["eval_kl"]]
    )


def untrained(
    tokenizer: PreTrainedTokenizerFast,
    teacher: Any,
    cache: Path | None = None,
    callbacks: Sequence[Any] = (),
    samples: Samples = SAMPLES,
    **fields: Any,
) -> Watched:
    return Watched(
        model=tiny.tiny_model("llama"),
        teacher_model=teacher,
        args=config(teacher_cache=None if cache is None else str(cache), **fields),
        train_dataset=list(samples),
        curriculum=three_stages() if samples is SAMPLES else None,
        eval_dataset=VALIDATION,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def assert_same_run(found: Any, expected: Any) -> None:
    """To the bit."""
    assert found.losses == expected.losses
    assert found.metrics == expected.metrics
    assert all(torch.equal(found.weights[n], w) for n, w in expected.weights.items())


def assert_near_run(found: Any, expected: Any) -> None:
    """To the rounding of other batches."""
    tolerance = tiny.forward_rounding(expected.trainer.model, LONGEST)
    assert len(set(expected.losses)) == len(expected.losses) > 5
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.metrics == pytest.approx(expected.metrics, rel=tolerance)
    for name, weight in expected.weights.items():
        assert_same(found.weights[name], weight, 1e-5, name)


@pytest.mark.parametrize("padding_free", [True, False, "auto"])
def test_training_from_a_cache_is_training_beside_the_teacher(
    padding_free: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    live = trained(tokenizer, teacher_model(), padding_free=padding_free)
    cached = trained(tokenizer, teacher_model(), tmp_path / "cache", padding_free=padding_free)
    assert isinstance(cached.trainer.teacher, TeacherCache)
    assert_near_run(cached, live)
    assert_same_run(trained(tokenizer, None, tmp_path / "cache", padding_free=padding_free), cached)
    assert_same_run(trained(tokenizer, TeacherCache(tmp_path / "cache"), padding_free=padding_free), cached)


def test_a_cache_given_as_the_teacher_goes_where_the_trainer_is(
    whole: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    monkeypatch.setattr(TeacherCache, "to", lambda self, device: moved.append(device) or self)
    trainer = untrained(tokenizer, TeacherCache(whole))
    assert moved == [trainer.args.device]


@pytest.mark.gpu
@pytest.mark.parametrize("given", ["folder", "object"])
def test_training_from_a_cache_on_a_gpu(given: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    on_cpu = trained(tokenizer, teacher_model(), folder)
    source = (TeacherCache(folder), None) if given == "object" else (None, folder)
    found = trained(tokenizer, *source, use_cpu=False)
    assert found.trainer.args.device.type == "cuda"
    assert found.losses == pytest.approx(on_cpu.losses, rel=1e-3)
    assert found.metrics == pytest.approx(on_cpu.metrics, rel=1e-3)


def test_padding_does_not_matter(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    teacher = teacher_model()
    flattened, padded, automatic = (
        trained(tokenizer, teacher, tmp_path / "cache", padding_free=p) for p in (True, False, "auto")
    )
    assert_near_run(padded, flattened)
    assert_same_run(automatic, flattened)


def test_a_named_teacher_is_loaded_to_fill_the_cache_alone(
    teacher_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(tokenizer, str(teacher_folder), tmp_path / "cache")
    assert_same_run(first, trained(tokenizer, teacher_model(), tmp_path / "other"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the teacher was loaded")

    monkeypatch.setattr("srd_fast.teacher.opening.load_model", refuse)
    monkeypatch.setattr("srd_fast.training.preparation.load_model", refuse)
    second = trained(tokenizer, str(teacher_folder), tmp_path / "cache")
    assert_same_run(second, first)
    assert not [x for x in gc.get_objects() if isinstance(x, LiveTeacher) and x is not second.trainer.teacher]
    with pytest.raises(pytest.fail.Exception, match="the teacher was loaded"):
        untrained(tokenizer, str(teacher_folder), tmp_path / "cache", samples=tiny.tiny_samples(16))


def test_a_named_teacher_is_compared_with_a_cache_made_by_a_model(
    teacher_folder: Path, tokenizer: PreTrainedTokenizerFast, whole: Path
) -> None:
    open_teacher_cache(whole, str(teacher_folder), SAMPLES, template="alpaca", progress=False)
    with pytest.raises(StaleCacheError, match="dtype"):
        open_teacher_cache(whole, str(teacher_folder), SAMPLES, template="alpaca", dtype=torch.bfloat16)


def test_without_a_teacher_the_cache_must_be_whole(tokenizer: PreTrainedTokenizerFast, copied: Path) -> None:
    with pytest.raises(UserError, match="lacks samples of this data; pass the teacher"):
        untrained(tokenizer, None, copied)  # those of the validation
    with pytest.raises(UserError, match="lacks samples of this data; pass the teacher"):
        untrained(tokenizer, None, copied.with_name("nowhere"))
    assert not copied.with_name("nowhere").exists()
    with pytest.raises(UserError, match="teacher_model is missing"):
        untrained(tokenizer, None)


def test_samples_that_are_dropped_are_not_cached(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    ids = [s["sample_id"] for s in SAMPLES]
    Watched(
        model=tiny.tiny_model("llama"),
        teacher_model=teacher_model(),
        args=config(teacher_cache=str(tmp_path / "cache")),
        train_dataset=SAMPLES,
        curriculum=CurriculumPlan(subsets=[ids[:4]], dropped=[{"sample_id": i, "reason": "hard"} for i in ids[4:]]),
        processing_class=tokenizer,
    )
    cache = TeacherCache(tmp_path / "cache")
    assert (len(cache), cache.missing(SAMPLES[:4])) == (4, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_the_same_rows(workers: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    teacher = teacher_model()
    expected = trained(tokenizer, teacher, tmp_path / "cache")
    assert_same_run(trained(tokenizer, None, tmp_path / "cache", dataloader_num_workers=workers), expected)


@pytest.mark.parametrize("length_buckets", [0, 3])
def test_a_resumed_run_ends_in_the_same_weights(
    length_buckets: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    fields |= {"gradient_accumulation_steps": 2, "length_buckets": length_buckets, "epochs_per_stage": 2}
    expected = trained(tokenizer, teacher_model(), tmp_path / "cache", output_dir=str(tmp_path / "whole"), **fields)
    stop = 8
    assert expected.trainer.curriculum.stage_of(stop) == 1
    again = {"output_dir": str(tmp_path / "resumed"), **fields}
    first = untrained(tokenizer, None, tmp_path / "cache", callbacks=[StopAt(stop)], **again)
    first.train()
    assert first.state.global_step == stop
    second = untrained(tokenizer, None, tmp_path / "cache", **again)
    second.train(resume_from_checkpoint=True)
    assert first.losses + second.losses == expected.losses
    assert first.rows + second.rows == expected.trainer.rows
    assert all(torch.equal(p, expected.weights[n]) for n, p in second.model.named_parameters())


def test_batches_of_like_length_are_those_of_the_curriculum(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    run = trained(tokenizer, teacher_model(), tmp_path / "cache", length_buckets=2, epochs_per_stage=2)
    order = [SAMPLES[i]["input_ids"] for i in run.trainer.curriculum.indices()]
    assert [row for rows in run.trainer.rows for row in rows] == order
    assert order != [
        SAMPLES[i]["input_ids"] for i in untrained(tokenizer, None, tmp_path / "cache").curriculum.indices()
    ]
    assert_near_run(trained(tokenizer, teacher_model(), length_buckets=2, epochs_per_stage=2), run)


def test_a_teacher_kept_in_the_hosts_memory_says_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    live, offloaded = (trained(tokenizer, teacher_model(), teacher_offload=o) for o in (False, True))
    assert offloaded.trainer.teacher.offload
    assert_same_run(offloaded, live)


# Two ranks.


def rank(folder: Path) -> None:
    """One of two ranks; its result goes to FOLDER/rankN.pt."""
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at each start
    result = test_distributed.train(folder / "out", 2, "llama", teacher_cache=str(folder / "cache"))
    torch.save(result, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_fill_one_cache_and_train_as_one_process(ranks: Ranks, tmp_path: Path) -> None:
    live = test_distributed.train(tmp_path / "live", 1, "llama")
    alone = test_distributed.train(tmp_path / "alone", 1, "llama", teacher_cache=str(tmp_path / "own"))
    results = ranks.results(120)
    assert files(ranks.folder / "cache") == files(tmp_path / "own")
    for found in (*results, alone):
        assert found["order"] == live["order"]
        for name, weight in live["weights"].items():
            assert_same(found["weights"][name], weight, 1e-5, name)
        for metrics, expected in zip(found["metrics"], live["metrics"], strict=True):
            assert metrics["eval_kl"] == pytest.approx(expected["eval_kl"], rel=1e-4)
    for found in results:
        assert (found["world"], found["wrapped"]) == (2, "DistributedDataParallel")
        for log, expected in zip(found["logs"], live["logs"], strict=True):
            assert log["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert all(torch.equal(w, results[1]["weights"][n]) for n, w in results[0]["weights"].items())


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
