"""Log-sum-exps kept beside hidden states: their values, and that the hidden states are the same with and without."""

import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_teacher_cache
import tiny
import torch
from safetensors.torch import load_file
from test_teacher_cache import (
    FORK,
    SAMPLES,
    VALIDATION,
    Samples,
    attached,
    dying_process,
    ended,
    files,
    flipped,
    number_of_rows,
    rows_files,
    teacher_model,
)
from test_teacher_cache import fill as build
from test_trainer import Watched, config, three_stages
from torch import Tensor

from srd_fast import UserError, evaluate
from srd_fast.losses import Head
from srd_fast.models import find_head
from srd_fast.selection.signals import take_rows
from srd_fast.teacher import (
    HiddenRows,
    LiveTeacher,
    TeacherCache,
    index,
    make_store,
    open_teacher_cache,
    shards,
    stores,
)
from srd_fast.teacher.log_sum_exp import log_sum_exps

TEMPERATURES = (1.0, 1.5, 2.0)

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")


def keeping(classes: int = tiny.VOCAB, temperatures: Sequence[float] = TEMPERATURES) -> Any:
    return make_store("hidden", classes, temperatures=temperatures, log_sum_exp=True)


def fill(folder: Path, samples: Samples = SAMPLES, **options: Any) -> Any:
    return build(folder, None, samples, **options)


def lse_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("lse-*.safetensors"))


def rows(cache: TeacherCache, samples: Samples, temperature: float) -> HiddenRows:
    found = cache.rows(attached(cache, samples), temperature)
    assert isinstance(found, HiddenRows)
    return found


def exact(hidden_ND: Tensor, head: Head, temperature: float, classes: int) -> Tensor:
    """In float64, of the hidden states as the head's products take them."""
    assert head.weight is not None
    scaled = (hidden_ND.to(head.weight.dtype) * head.scale).double()
    z = scaled @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double() * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return torch.logsumexp(z[:, :classes] / temperature, -1)


def assert_kept(cache: TeacherCache, samples: Samples, classes: int, tolerance: float = 3e-6) -> None:
    for temperature in TEMPERATURES:
        found = rows(cache, samples, temperature)
        assert found.lse_N is not None
        wanted = exact(found.hidden_ND, found.head, temperature, classes)
        assert found.lse_N.shape == wanted.shape
        assert (found.lse_N.double() - wanted).abs().max() < tolerance


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as it was made before log-sum-exps were kept. Shared: not to be written to."""
    folder = tmp_path_factory.mktemp("plain") / "cache"
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that keeps them from the start. Shared: not to be written to."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    fill(folder, store=keeping())
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Any:
    """A function that copies a cache."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"))


# Values.


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 9.0},
    "scale": {"scale": 0.4, "bias": True},
    "everything": {"scale": 3.0, "bias": True, "softcap": 30.0},
}


def a_head(dtype: torch.dtype, bias: bool = False, softcap: float | None = None, scale: float = 1.0) -> Head:
    g = torch.Generator().manual_seed(0)
    weight, of_bias = torch.randn(50, 64, generator=g), torch.randn(50, generator=g) if bias else None
    return Head(weight, of_bias, softcap, scale).to(dtype)


@pytest.mark.parametrize("classes", [50, 41])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float64, 1e-14)]
)
def test_values_are_those_of_unrounded_logits(
    dtype: torch.dtype, tolerance: float, name: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of a few rows. A bfloat16 logit that was rounded would be off by up to 4e-3 of itself."""
    monkeypatch.setattr(stores, "_CHUNK_BYTES", 3 * 50 * 8)
    head, hidden_ND = a_head(dtype, **HEADS[name]), torch.randn(13, 64, generator=torch.Generator().manual_seed(1))
    hidden_ND = hidden_ND.to(dtype)
    for temperature, found in zip(TEMPERATURES, log_sum_exps(hidden_ND, head, classes, TEMPERATURES)):
        wanted = exact(hidden_ND, head, temperature, classes)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((found.double() - wanted).abs() / wanted.abs().clamp(min=1)).max() < tolerance
        if dtype == torch.bfloat16:
            z = head.project(hidden_ND)[:, :classes].float()
            z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
            rounded = torch.logsumexp(z / temperature, -1)
            assert (rounded.double() - wanted).abs().max() > 1000 * (found.double() - wanted).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gemma2", "phi", "cohere", "granite"])
@pytest.mark.parametrize("student", [tiny.VOCAB - 9, tiny.VOCAB + 9])
def test_a_cache_keeps_those_of_its_hidden_states(
    student: int, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Over the classes that student and teacher share, whichever has more."""
    teacher, beside = (
        tiny.tiny_model(architecture, seed=1, width=24).to(dtype),
        tiny.tiny_model(vocab=student, layers=1),
    )
    options = {"student": beside, "temperatures": TEMPERATURES, "progress": False}
    kept = open_teacher_cache(tmp_path, teacher, SAMPLES, **options, log_sum_exp=True)
    classes = min(student, tiny.VOCAB)
    assert rows(kept, SAMPLES, 1.0).hidden_ND.dtype == dtype
    assert_kept(kept, SAMPLES, classes)
    assert_kept(kept, SAMPLES[3:9:2], classes)
    assert_kept(open_teacher_cache(tmp_path, None, SAMPLES, **options), SAMPLES, classes)
    assert_kept(TeacherCache(tmp_path).for_student(beside), SAMPLES, classes)


def test_bytes_are_those_that_are_told(whole: Path, plain: Path) -> None:
    head = find_head(teacher_model())
    assert keeping().bytes_beside(head) == 4 * len(TEMPERATURES)
    assert keeping().bytes_beside(head.to(torch.float64)) == 8 * len(TEMPERATURES)
    of_rows = [x for p in lse_files(whole) for n, x in load_file(p).items() if n not in ("rows", "classes")]
    count = len(rows(TeacherCache(plain), SAMPLES, 1.0).hidden_ND)
    assert sum(x.nbytes for x in of_rows) == count * keeping().bytes_beside(head)


# What is not there.


def test_who_did_not_ask_for_them_goes_without(whole: Path, plain: Path) -> None:
    """Of a student with other classes, of none, at another temperature, beside a live teacher."""
    student, smaller = tiny.tiny_model(layers=1), tiny.tiny_model(vocab=tiny.VOCAB - 1, layers=1)
    kept = TeacherCache(whole).for_student(student)
    assert rows(kept, SAMPLES, 1.5).lse_N is not None
    assert rows(kept, SAMPLES, 1.5 + 1e-12).lse_N is not None
    assert rows(kept, SAMPLES, 1.75).lse_N is None
    assert rows(kept.for_student(smaller), SAMPLES, 1.5).lse_N is None
    assert rows(kept, SAMPLES, 1.5).lse_N is not None, "another student's cache is another"
    assert rows(TeacherCache(whole), SAMPLES, 1.5).lse_N is None
    assert rows(TeacherCache(plain).for_student(student), SAMPLES, 1.0).lse_N is None
    assert LiveTeacher(teacher_model()).rows(tiny.collate(SAMPLES), 1.0).lse_N is None  # type: ignore[union-attr]
    for temperature in (0.7, 1.0, 1.75):
        assert torch.equal(
            rows(kept, SAMPLES, temperature).hidden_ND, rows(TeacherCache(plain), SAMPLES, 1.0).hidden_ND
        )


def test_hidden_states_are_the_same_with_and_without(whole: Path, plain: Path) -> None:
    with_them, without = files(whole), files(plain)
    assert {n: d for n, d in with_them.items() if not n.startswith(("lse-", "index"))} == {
        n: d for n, d in without.items() if n != "index.json"
    }
    assert len(lse_files(whole)) == len(rows_files(whole)) >= 4


def test_an_old_cache_gets_them_without_its_teacher(whole: Path, plain: Path, copied: Any) -> None:
    folder = copied(plain)
    before = {p.name: p.stat().st_mtime_ns for p in rows_files(folder)}
    options = {"temperatures": TEMPERATURES, "progress": False, "log_sum_exp": True}
    assert_kept(open_teacher_cache(folder, None, SAMPLES, **options), SAMPLES, tiny.VOCAB)
    assert files(folder) == files(whole)
    assert {p.name: p.stat().st_mtime_ns for p in rows_files(folder)} == before
    made = {p.name: p.stat().st_mtime_ns for p in lse_files(folder)}
    open_teacher_cache(folder, None, SAMPLES, **options)
    assert {p.name: p.stat().st_mtime_ns for p in lse_files(folder)} == made


def test_another_temperature_or_student_is_added_alone(whole: Path, copied: Any) -> None:
    folder = copied(whole)
    before = files(folder)
    student = tiny.tiny_model(vocab=tiny.VOCAB - 20, layers=1)
    fill(folder, store=keeping(temperatures=(1.0, 4.0)))
    new = [load_file(folder / n) for n in files(folder) if n.startswith("lse-") and n not in before]
    assert [sorted(x) for x in new] == [["classes", "lse@4.0", "rows"]] * len(rows_files(folder))
    options = {"temperatures": TEMPERATURES, "progress": False, "log_sum_exp": True}
    assert_kept(open_teacher_cache(folder, None, SAMPLES, student=student, **options), SAMPLES, tiny.VOCAB - 20)
    kept = TeacherCache(folder, keeping())
    assert_kept(kept, SAMPLES, tiny.VOCAB)
    assert rows(kept, SAMPLES, 4.0).lse_N is not None
    assert before.items() - files(folder).items() == {("index.json", before["index.json"])}


def test_a_batch_has_them_if_all_of_its_samples_do(tmp_path: Path) -> None:
    old, new = SAMPLES[:8], SAMPLES[8:]
    fill(tmp_path, old)
    kept = fill(tmp_path, new, store=keeping())
    assert rows(kept, old, 1.0).lse_N is None
    assert rows(kept, [*old[:1], *new], 1.0).lse_N is None
    assert rows(kept, [*new, *old[:1]], 1.0).lse_N is None
    assert_kept(kept, new, tiny.VOCAB)
    assert len(rows(kept, SAMPLES, 1.0).hidden_ND) == number_of_rows(SAMPLES)
    kept = fill(tmp_path, old[:2], store=keeping(temperatures=(2.0,)))  # one file or two of the old samples'
    assert rows(kept, [*old[:2], *new], 1.0).lse_N is None
    both = rows(kept, [*old[:2], *new], 2.0)
    assert both.lse_N is not None
    tiny.assert_same(both.lse_N, exact(both.hidden_ND, both.head, 2.0, tiny.VOCAB).float(), 1e-6)


def test_samples_without_loss_have_none(tmp_path: Path) -> None:
    silent = [{**s, "labels": [tiny.IGNORE] * len(s["labels"])} for s in SAMPLES[:2]]
    kept = fill(tmp_path / "silent", silent, store=keeping())
    assert len(rows(kept, silent, 1.0).hidden_ND) == 0
    assert_kept(
        fill(tmp_path / "some", [*silent, *SAMPLES[2:5]], store=keeping()), [*silent, *SAMPLES[2:5]], tiny.VOCAB
    )


# Killed.


def test_a_kill_at_any_touch_of_a_file_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every third from the end of the hidden states on: the index, files of log-sum-exps, and the index again."""
    some = partial(fill, samples=SAMPLES[:6], store=keeping())
    some(tmp_path / "whole")
    expected = files(tmp_path / "whole")
    kept = len(lse_files(tmp_path / "whole"))
    monkeypatch.setattr(test_teacher_cache, "fill", some)
    begun = 0
    for moment in itertools.count(4 * (len(expected) - kept - 1), 3):
        folder = tmp_path / str(moment)
        status = ended(dying_process(folder, moment))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        begun += len([*lse_files(folder), *folder.glob(".lse-*")]) > 0
        some(folder)
        assert files(folder) == expected, f"killed at touch {moment}"
    assert begun >= kept >= 2
    assert 4 * (len(expected) + 1) <= moment < 4 * (len(expected) + 1) + 3  # the index is written twice


def test_several_processes_add_them_to_one_folder(whole: Path, plain: Path, copied: Any) -> None:
    folder, ready = copied(plain), FORK.Barrier(3)

    def work() -> None:
        ready.wait()
        options = {"temperatures": TEMPERATURES, "progress": False, "log_sum_exp": True}
        assert_kept(open_teacher_cache(folder, None, SAMPLES, **options), SAMPLES, tiny.VOCAB)

    processes = [FORK.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    assert [ended(p) for p in processes] == [0, 0, 0]
    assert files(folder) == files(whole)


# Damaged.


def test_damage_is_found_and_made_again(whole: Path, copied: Any) -> None:
    folder = copied(whole)
    path = lse_files(folder)[1]
    options = {"temperatures": TEMPERATURES, "template": "alpaca", "progress": False}
    damages: list[Callable[[], Any]] = [
        lambda: flipped(path, shards.OpenFile(path).columns["lse@1.5"].begin + 9),
        lambda: path.write_bytes(lse_files(folder)[0].read_bytes()),
        path.unlink,
    ]
    for damage in damages:
        damage()
        for open_it in (TeacherCache, partial(open_teacher_cache, teacher=None, samples=SAMPLES, **options)):
            with pytest.raises(UserError, match=re.escape(path.name)):
                open_it(folder)
        before = {p.name: p.stat().st_mtime_ns for p in rows_files(folder)}
        kept = open_teacher_cache(folder, teacher_model(), SAMPLES, **options, log_sum_exp=True, repair=True)
        assert_kept(kept, SAMPLES, tiny.VOCAB)
        assert files(folder) == files(whole)
        assert {p.name: p.stat().st_mtime_ns for p in rows_files(folder)} == before


def test_those_of_other_hidden_states_are_not_taken(whole: Path, copied: Any) -> None:
    """As if a version that knows nothing of them, on another machine, had made one file again."""
    folder = copied(whole)
    kept = TeacherCache(folder, keeping())
    path = folder / kept.files[1]
    others = {s["sample_id"]: kept.place(s)[0] for s in SAMPLES}
    tensors = load_file(path)
    tensors["hidden"] = tensors["hidden"] * 1.5
    path.unlink()
    shards.write_once(path, lambda: tensors, wait=True)
    index.write_index(folder, lambda found: {**found, path.name: shards.checked_digest(path)})
    again = TeacherCache(folder, keeping())
    touched = [s for s in SAMPLES if others[s["sample_id"]] == 1]
    assert touched
    assert rows(again, touched, 1.0).lse_N is None
    assert_kept(again, [s for s in SAMPLES if s not in touched], tiny.VOCAB)
    assert_kept(fill(folder, store=keeping()), SAMPLES, tiny.VOCAB)
    assert len(lse_files(folder)) == len(rows_files(folder)), "those of the old hidden states are gone"
    assert set(json.loads((folder / "index.json").read_text())["files"]) == {p.name for p in folder.iterdir()} - {
        "index.json"
    }


# Refused.


@pytest.mark.parametrize("kind", ["topk", "sampled", "projected"])
def test_other_kinds_keep_none(kind: str, tmp_path: Path) -> None:
    message = f"teacher cache kind '{kind}' keeps no log-sum-exps: set log_sum_exp to false, or use \"hidden\""
    student = tiny.tiny_model(layers=1)
    with pytest.raises(UserError, match=re.escape(message)):
        open_teacher_cache(tmp_path, teacher_model(), SAMPLES, kind=kind, k=4, student=student, log_sum_exp=True)
    assert not rows_files(tmp_path)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan")])
def test_temperatures_are_above_0(temperature: float) -> None:
    with pytest.raises(UserError, match=f"temperatures must be above 0 and finite, got {temperature}"):
        keeping(temperatures=(1.0, temperature))


def test_too_small_a_disk_is_told(plain: Path, copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(plain)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500))
    with pytest.raises(UserError, match=r"log-sum-exps need 0\.0\d MB, and 0\.00 MB are free"):
        fill(folder, store=keeping())
    assert files(folder) == files(plain)


# Used.


def test_chosen_rows_bring_theirs(whole: Path) -> None:
    found = rows(TeacherCache(whole, keeping()), SAMPLES, 2.0)
    some = take_rows(found, torch.tensor([5, 0, 17]))
    assert isinstance(some, HiddenRows)
    assert found.lse_N is not None
    assert torch.equal(some.lse_N, found.lse_N[[5, 0, 17]])
    assert take_rows(found._replace(lse_N=None), torch.tensor([1])).lse_N is None  # type: ignore[union-attr]


def test_what_was_cast_to_a_narrow_dtype_is_not_taken(whole: Path) -> None:
    kept = TeacherCache(whole, keeping())
    batch = {"teacher": {name: x.bfloat16() for name, x in kept.collate(SAMPLES).items()}}
    assert kept.rows(batch, 1.0).lse_N is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "classes", "student", "kept"),
    [
        ("object", tiny.VOCAB, tiny.VOCAB, True),
        ("folder", tiny.VOCAB, tiny.VOCAB + 8, True),
        ("object", tiny.VOCAB - 1, tiny.VOCAB, False),
        ("folder", tiny.VOCAB - 1, tiny.VOCAB, False),
    ],
)
def test_training_gets_those_of_each_stage(
    given: str, classes: int, student: int, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows that another thread reads; and so does evaluation. Those over other classes are for other students."""
    folder, seen, get = tmp_path / "cache", list[tuple[float, bool]](), TeacherCache.rows

    def watched(self: TeacherCache, batch: Any, temperature: float) -> Any:
        found = get(self, batch, temperature)
        assert isinstance(found, HiddenRows)
        seen.append((temperature, found.lse_N is not None))
        if found.lse_N is not None:
            wanted = exact(found.hidden_ND, found.head, temperature, classes)
            tiny.assert_same(found.lse_N, wanted.float(), 1e-6)
        return found

    monkeypatch.setattr(TeacherCache, "rows", watched)
    cache = fill(folder, [*SAMPLES, *VALIDATION], store=keeping(classes))
    model = tiny.tiny_model(vocab=student)
    trainer = Watched(
        model=model,
        teacher_model=cache if given == "object" else None,
        args=config(teacher_cache=None if given == "object" else str(folder)),
        train_dataset=list(SAMPLES),
        curriculum=three_stages(),
        eval_dataset=VALIDATION,
        processing_class=tiny.tiny_tokenizer(),
    )
    trainer.train()
    assert {t for t, _ in seen} == set(TEMPERATURES), "the default curriculum goes from 1 to 2"
    assert {there for _, there in seen} == {kept}
    seen.clear()
    trainer.evaluate()
    rows = [{**s, "references": ["a"], "prompt": "a"} for s in VALIDATION]
    evaluate(model, rows, tiny.tiny_tokenizer(), teacher=cache, engine="transformers", progress=False)
    assert {t for t, _ in seen} == {1.0}
    assert {there for _, there in seen} == {kept}
