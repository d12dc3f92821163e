"""Reflection in parts: whatever is stopped, damaged, reordered or shared out ends with the scores of one quiet run."""

import dataclasses
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset
from test_cli import process, srd_fast
from test_reflection import ROWS, Scripted, end_of_prompt, prompts_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, reflect, register_engine
from srd_fast.data import Tokenisation, prepare_dataset
from srd_fast.errors import UserError
from srd_fast.reflection import merge_shards
from srd_fast.reflection.parts import cut, read_part, write_part
from srd_fast.reflection.shards import parse_shard, samples_of_shard, shard_file, shard_files, write_shard
from srd_fast.run.config import load_run_config
from srd_fast.run.pipeline import execute

Reflection = Callable[..., list[dict[str, Any]]]

# Parts of 3, 3, 3 and 2.
SHARD_SIZE = 3
PARTS = math.ceil(len(ROWS) / SHARD_SIZE)


pytestmark = pytest.mark.usefixtures("own_registries")


class InParts(Scripted):
    """A scripted engine that takes few prompts at a time; remembers its calls, too."""

    shard_size = SHARD_SIZE

    def __init__(self, answer: Callable[[list[int]], list[int]] = end_of_prompt) -> None:
        super().__init__(answer)
        self.calls: list[list[list[int]]] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        self.calls.append([list(p) for p in prompts])
        yield from super().generate(prompts, sampling)


@pytest.fixture
def samples(tiny_tokenizer: PreTrainedTokenizerFast) -> Dataset:
    return prepare_dataset(ROWS, Tokenisation(tiny_tokenizer)).dataset


@pytest.fixture
def run(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset, tmp_path: Path
) -> Reflection:
    """Scores by an engine, with the parts in a folder; further options replace those of `reflect`."""

    def scores(engine: Any, **options: Any) -> list[dict[str, Any]]:
        register_engine("mine", engine, replace=True)
        student, rows = options.pop("student", tiny_model), options.pop("dataset", samples)
        options = {"engine": "mine", "parts_folder": tmp_path / "parts", "progress": False, **options}
        return reflect(student, rows, tiny_tokenizer, **options).to_list()

    return scores


def parts_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("parts/part-*.parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "parts").iterdir()}


# Parts that are there


def test_parts_that_are_there_are_not_made_again(
    run: Reflection, samples: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = InParts()
    whole = run(first)
    assert [len(c) for c in first.calls] == [3, 3, 3, 2]
    assert sorted(first.prompts) == sorted(prompts_of(samples))
    before = contents(tmp_path)
    assert len(before) == PARTS
    for path in parts_in(tmp_path):
        again, lost = InParts(), pq.read_table(path)["sample_id"].to_pylist()
        path.unlink()
        caplog.clear()
        assert run(again) == whole
        assert sorted(again.prompts) == sorted(
            p for p, i in zip(prompts_of(samples), samples["sample_id"]) if i in lost
        )
        assert f"{len(ROWS) - len(lost)} of {len(ROWS)} generations were there already" in caplog.text
        assert contents(tmp_path) == before
    last = InParts()
    assert run(last) == whole
    assert last.prompts == []


def test_every_part_is_on_the_disk_before_the_next_is_begun(run: Reflection, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watching(InParts):
        def generate(self, prompts: Any, sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
            seen.append(len(contents(tmp_path)))
            return super().generate(prompts, sampling)

    run(Watching())
    assert seen == list(range(PARTS))


def test_parts_hold_samples_of_like_length_whatever_the_order_of_the_rows() -> None:
    generator = random.Random(0)
    lengths = [generator.randrange(5) for _ in range(40)]
    keys = [f"k{i}" for i in range(40)]
    parts = cut(lengths, 7, keys)
    assert [len(p) for p in parts] == [7, 7, 7, 7, 7, 5]
    assert sorted(i for p in parts for i in p) == list(range(40))
    assert [lengths[i] for p in parts for i in p] == sorted(lengths, reverse=True)
    order = generator.sample(range(40), 40)
    shuffled = cut([lengths[i] for i in order], 7, [keys[i] for i in order])
    assert [[keys[order[i]] for i in p] for p in shuffled] == [[keys[i] for i in p] for p in parts]


# Damage


def _other_ids(path: Path) -> None:
    """A sound part under the name of another one."""
    other = next(p for p in path.parent.iterdir() if p != path)
    shutil.copy(other, path)


def _other_generations(path: Path) -> None:
    table = pq.read_table(path)
    changed = [[*ids[:-1], ids[-1] ^ 1] for ids in table["generated_ids"].to_pylist()]
    field = table.schema.field("generated_ids")
    pq.write_table(table.set_column(1, field, pa.array(changed, field.type)), path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "nothing in it": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "without its last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "text": lambda path: path.write_text("PAR1 is not all"),
    "another table": lambda path: pq.write_table(pq.read_table(path).drop_columns("generated_ids"), path),
    "other ids": _other_ids,
    "other generations": _other_generations,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_made_again(
    damage: str, run: Reflection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, before = run(InParts()), contents(tmp_path)
    path = parts_in(tmp_path)[1]
    DAMAGE[damage](path)
    assert contents(tmp_path) != before
    again = InParts()
    assert run(again) == whole
    assert len(again.calls) == 1
    assert caplog.text.count(f"{path} is damaged and is made again") == 1
    assert contents(tmp_path) == before


def test_no_flipped_bit_and_no_cut_goes_unseen(tmp_path: Path) -> None:
    """A part is read back as it was written, or not at all."""
    path, ids = tmp_path / "part.parquet", ["a", "b", "ü"]
    generated = [[399, 0, 7, 12], [], [3]]
    write_part(path, ids, generated)
    assert read_part(path, ids) == generated
    assert [p.name for p in tmp_path.iterdir()] == ["part.parquet"]
    content, unseen = path.read_bytes(), 0
    for place in range(0, len(content), 2):
        path.write_bytes(content[:place])
        assert read_part(path, ids) is None
        flipped = bytearray(content)
        flipped[place] ^= 1 << place // 2 % 8
        path.write_bytes(flipped)
        found = read_part(path, ids)
        assert found in (None, generated), f"bit {place // 2 % 8} of byte {place}"
        unseen += found is not None
    assert unseen < len(content) / 4, "bits that say nothing"


# What is never mixed


OTHER_SAMPLING = {
    "max_new_tokens": 127, "temperature": 1e-3, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 6, "seed": 1, "stop_ids": (5,),
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Sampling)])
def test_another_sampling_is_never_mixed_with_old_parts(name: str, run: Reflection) -> None:
    run(InParts())
    other = InParts()
    run(other, sampling=dataclasses.replace(Sampling(), **{name: OTHER_SAMPLING[name]}))
    assert len(other.prompts) == len(ROWS)


def test_another_student_is_never_mixed_with_old_parts(run: Reflection, tiny_model: PreTrainedModel) -> None:
    run(InParts())
    unchanged, other = InParts(), InParts()
    run(unchanged)
    with torch.no_grad():
        list(tiny_model.parameters())[-1][0, 0] += 1e-3
    run(other)
    assert (len(unchanged.prompts), len(other.prompts)) == (0, len(ROWS))


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_another_student_folder_is_never_mixed_with_old_parts(
    change: str, run: Reflection, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_teacher_folder, tmp_path / "student"))
    run(InParts(), student=str(folder))
    unchanged, other = InParts(), InParts()
    run(unchanged, student=str(folder))
    if change == "weights":
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    run(other, student=str(folder), dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    assert (len(unchanged.prompts), len(other.prompts)) == (0, len(ROWS))


class Settled(InParts):
    """Says which of its settings its generations depend on."""

    def __init__(self, quantized: bool = False) -> None:
        super().__init__()
        self.settings = {"quantized": quantized}


def test_another_engine_or_setting_of_it_is_never_mixed_with_old_parts(run: Reflection) -> None:
    class Other(InParts):
        pass

    run(InParts())
    run(Settled())
    for engine, options in (
        (Other(), {}),
        (InParts(), {"engine_options": {"beams": 2}}),
        (InParts(), {"batch_size": 31}),
        (Settled(quantized=True), {}),
    ):
        run(engine, **options)
        assert len(engine.prompts) == len(ROWS)
        engine.prompts.clear()
        run(engine, **options)
        assert engine.prompts == []


def test_an_engine_says_itself_which_options_matter(run: Reflection) -> None:
    run(Settled())
    moved = Settled()
    run(moved, engine_options={"processes": 8}, batch_size=31)
    assert moved.prompts == []


def test_a_smaller_batch_of_the_same_part_is_never_mixed_with_old_parts(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset, tmp_path: Path
) -> None:
    """A sampled text depends on its batch, also where either batch size makes all samples one part."""
    options: dict[str, Any] = {"engine": "transformers", "sampling": Sampling(4, temperature=1.0), "progress": False}
    runs = {
        size: [
            list(reflect(tiny_model, samples, tiny_tokenizer, batch_size=size, **options, **folder)["generation"])
            for folder in ({"parts_folder": tmp_path}, {})
        ]
        for size in (4, 8)
    }
    assert runs[4][0] == runs[4][1]
    assert runs[8][0] == runs[8][1] != runs[4][0]


@pytest.mark.parametrize("text", ["Something else.", "{} And why?"])
def test_another_prompt_is_never_mixed_with_old_parts(text: str, run: Reflection) -> None:
    rows = [{**row, "sample_id": f"r{i}"} for i, row in enumerate(ROWS)]
    run(InParts(), dataset=rows)
    rows[4] = {**rows[4], "instruction": text.format(rows[4]["instruction"])}
    expected = run(InParts(), dataset=rows, parts_folder=None)
    other = InParts()
    assert run(other, dataset=rows) == expected
    assert 0 < len(other.prompts) <= len(ROWS)


def test_one_other_token_of_a_prompt_makes_its_part_again(run: Reflection, samples: Dataset) -> None:
    """Under the same ids, and with prompts as long as before."""
    before, rows = run(InParts()), samples.to_list()
    rows[4]["input_ids"][len(prompts_of(samples)[4]) - 20] ^= 1
    other = InParts()
    after = run(other, dataset=Dataset.from_list(rows, features=samples.features))
    assert len(other.calls) == 1
    assert [a["generation"] == b["generation"] for a, b in zip(before, after)] == [i != 4 for i in range(len(ROWS))]


def test_another_reference_is_scored_from_the_parts_that_are_there(run: Reflection) -> None:
    rows = [{**row, "sample_id": f"r{i}"} for i, row in enumerate(ROWS)]
    before = run(InParts(), dataset=rows)
    rows[4] = {**rows[4], "output": "Something else."}
    other = InParts()
    after = run(other, dataset=rows)
    assert other.prompts == []
    assert [a == b for a, b in zip(before, after)] == [i != 4 for i in range(len(ROWS))]


# Order of the rows


def rows_of_like_length() -> list[dict[str, Any]]:
    """Many prompts as long as each other, so that only a fixed order of ties makes the same batches."""
    return [{"sample_id": f"{w}{n}", "instruction": f"{w} {n}", "output": w} for w in "abcd" for n in range(4)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_order_of_the_rows_changes_nothing(
    temperature: float, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows_of_like_length()
    data = prepare_dataset(rows, Tokenisation(tiny_tokenizer)).dataset
    assert len({len(p) for p in prompts_of(data)}) < 4
    options: dict[str, Any] = {"engine": "transformers", "batch_size": 3, "progress": False}
    options["sampling"] = Sampling(max_new_tokens=6, temperature=temperature)
    runs = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        scores = reflect(tiny_model, shuffled, tiny_tokenizer, **options)
        assert list(scores["sample_id"]) == [row["sample_id"] for row in shuffled]
        runs.append(scores.sort("sample_id"))
    assert len(set(runs[0]["generation"])) > 5
    for other in runs[1:]:
        for column in ("sample_id", "generation", "rouge_l", "reason"):
            assert list(other[column]) == list(runs[0][column])
        assert list(other["cross_entropy"]) == pytest.approx(list(runs[0]["cross_entropy"]), rel=1e-5)


# Several calls at once


class Together(InParts):
    """Goes on only once three calls are there."""

    parallel, shard_size = 3, 2  # 6 parts

    def __init__(self) -> None:
        super().__init__()
        self.barrier, self.lock = threading.Barrier(3, timeout=60), threading.Lock()
        self.threads: set[int] = set()
        self.now = self.most = 0

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.add(threading.get_ident())
        self.barrier.wait()
        answers = list(super().generate(prompts, sampling))
        with self.lock:
            self.now -= 1
        yield from answers


def test_a_parallel_engine_gets_as_many_calls_at_once(run: Reflection, tmp_path: Path) -> None:
    together, alone = Together(), InParts()
    found = run(together)
    assert together.most == 3
    assert len(together.threads) >= 3
    assert threading.get_ident() not in together.threads
    assert len(together.calls) == len(parts_in(tmp_path)) == 6
    assert found == run(alone, parts_folder=None)
    assert len({row["generation"] for row in found}) == len(ROWS)


def test_an_error_in_one_call_leaves_the_parts_under_way(run: Reflection, tmp_path: Path) -> None:
    raised = threading.Event()

    class Breaking(Together):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
            answers = list(super().generate(prompts, sampling))
            if len(prompts[0]) == longest:
                raised.set()
                raise RuntimeError("out of luck")
            assert raised.wait(60)
            time.sleep(0.5)  # the error is known well before this part is finished
            yield from answers

    whole = run(engine := InParts(), parts_folder=None)
    longest = max(map(len, engine.prompts))
    broken = Breaking()
    with pytest.raises(RuntimeError, match="out of luck"):
        run(broken)
    assert len(broken.calls) == 3
    assert len(parts_in(tmp_path)) == 2
    mended = type("Breaking", (InParts,), {"shard_size": 2})()  # parts know their engine by the name of its class
    assert run(mended) == whole
    assert len(mended.calls) == 4


# Engines that fail


class Failing(InParts):
    """Fails in its third call, after one answer: raises, or leaves the rest out."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error, self.fails = error, True

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[tuple[int, list[int]]]:
        answers = super().generate(prompts, sampling)
        if self.fails and len(self.calls) == 2:
            yield next(answers)
            if self.error is not None:
                raise self.error
            return
        yield from answers


@pytest.mark.parametrize("error", [None, RuntimeError("crash"), KeyboardInterrupt()], ids=repr)
def test_an_engine_that_fails_keeps_the_finished_parts(
    error: BaseException | None, run: Reflection, tmp_path: Path
) -> None:
    engine = Failing(error)
    with pytest.raises(UserError if error is None else type(error)) as failure:
        run(engine)
    if error is None:
        assert "the engine gave nothing for 2 of 3 samples" in str(failure.value)
    assert len(parts_in(tmp_path)) == len(contents(tmp_path)) == 2
    engine.fails = False
    engine.calls.clear()
    found = run(engine)
    assert [len(c) for c in engine.calls] == [3, 2]
    assert found == run(InParts(), parts_folder=None)


def test_an_engine_is_told_the_lengths_and_is_closed_after_an_error(run: Reflection, samples: Dataset) -> None:
    class Told(Failing):
        def __init__(self, error: BaseException | None) -> None:
            super().__init__(error)
            self.events: list[Any] = []

        def reserve(self, length: int, sampling: Sampling) -> None:
            self.events.append((length, sampling, len(self.calls)))

        def close(self) -> None:
            self.events.append(len(self.calls))

    engine, sampling = Told(RuntimeError("crash")), Sampling(max_new_tokens=9)
    with pytest.raises(RuntimeError, match="crash"):
        run(engine, sampling=sampling)
    longest = max(map(len, prompts_of(samples)))
    assert engine.events == [(longest + 9, sampling, 0), 3]


# Sampling


def test_a_seed_differs_by_seed_and_prompts() -> None:
    groups: list[list[list[int]]] = [
        [], [[]], [[], []], [[1, 2, 3]], [[1, 2], [3]], [[1], [2, 3]], [[3], [1, 2]], [[1, 2, 4]], [[2, 1]], [[258]],
    ]  # fmt: skip
    seeds = [Sampling(seed=seed).seed_of(group) for seed in (0, 1, 2**40) for group in groups]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert Sampling(seed=1).seed_of([(1, 2), [3]]) == Sampling(seed=1, temperature=1.0).seed_of([[1, 2], [3]])


def test_a_seed_is_the_same_in_every_process() -> None:
    """On every machine, at any time: what was begun in one may be finished in another."""
    assert Sampling(seed=5).seed_of([[1, 2], [70000]]) == 8467765864970317228


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 10])
def test_sampled_generations_go_on_as_they_would_have(
    stop: int,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    samples: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options: dict[str, Any] = {
        "engine": "transformers", "batch_size": 1, "sampling": Sampling(6, temperature=1.0, seed=3), "progress": False,
    }  # fmt: skip
    expected = reflect(tiny_model, samples, tiny_tokenizer, **options).to_list()
    batches: list[int] = []
    generate = tiny_model.generate

    def interrupted(**given: Any) -> Any:
        batches.append(len(given["input_ids"]))
        if len(batches) == stop:
            raise KeyboardInterrupt
        return generate(**given)

    monkeypatch.setattr(tiny_model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reflect(tiny_model, samples, tiny_tokenizer, parts_folder=tmp_path, **options)
    finished = (stop - 1) // 4 * 4  # parts are of four batches
    torch.manual_seed(stop)
    assert reflect(tiny_model, samples, tiny_tokenizer, parts_folder=tmp_path, **options).to_list() == expected
    assert len(batches) == stop + len(ROWS) - finished


# Cross-entropy by the engine


class Scoring(InParts):
    """Log-probabilities of the student itself, sample by sample."""

    model: Any = None
    scored = 0

    def __call__(self, student: Any, tokenizer: Any, **options: Any) -> "Scoring":
        self.model = student
        return self

    @torch.no_grad()
    def token_log_probs(self, samples: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[float]]]:
        assert len(samples) <= self.shard_size
        for i in reversed(range(len(samples))):
            ids = torch.tensor([samples[i]])
            rows = torch.log_softmax(self.model(input_ids=ids).logits[0, :-1], -1)
            self.scored += 1
            yield i, rows.gather(-1, ids[0, 1:, None])[:, 0].tolist()


@pytest.mark.parametrize("score_eos", [True, False])
def test_the_engines_cross_entropy_equals_the_students(score_eos: bool, run: Reflection) -> None:
    engines = Scoring(), Scoring()
    by_student, by_engine = (
        [row["cross_entropy"] for row in run(engine, cross_entropy_by=by, score_eos=score_eos)]
        for engine, by in zip(engines, ("student", "engine"))
    )
    assert [engine.scored for engine in engines] == [0, len(by_engine)]
    assert by_engine == pytest.approx(by_student, rel=1e-5)
    assert max(by_engine) - min(by_engine) > 0.1
    other = run(Scoring(), cross_entropy_by="engine", score_eos=not score_eos)
    assert by_engine != pytest.approx([row["cross_entropy"] for row in other], rel=1e-5)


def test_room_is_asked_for_the_longest_sample_to_score(run: Reflection, samples: Dataset) -> None:
    lengths: list[int] = []

    class Told(Scoring):
        def reserve(self, length: int, sampling: Sampling) -> None:
            lengths.append(length)

    run(Told(), cross_entropy_by="engine", sampling=Sampling(1))
    assert lengths[0] >= max(map(len, samples["input_ids"])) + 1


def test_an_engine_without_log_probabilities_is_refused_before_any_work(run: Reflection) -> None:
    engine = InParts()
    with pytest.raises(UserError, match="cross_entropy_by='engine' needs an engine with token_log_probs, not InParts"):
        run(engine, cross_entropy_by="engine")
    assert engine.prompts == []
    with pytest.raises(UserError, match=r"unknown cross_entropy_by 'engin'; did you mean 'engine'\?"):
        run(engine, cross_entropy_by="engin")


# Shards


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 300])
def test_every_sample_is_in_one_shard_whatever_the_order(count: int) -> None:
    ids = [f"sample {i}" for i in range(200)]
    shuffled = random.Random(count).sample(ids, len(ids))
    shards = [f"{k}/{count}" for k in range(1, count + 1)]
    found = [[ids[i] for i in samples_of_shard(ids, shard)] for shard in shards]
    assert sorted(i for share in found for i in share) == sorted(ids)
    assert [{shuffled[i] for i in samples_of_shard(shuffled, shard)} for shard in shards] == list(map(set, found))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_sample_stays_in_its_shard() -> None:
    """Machines with another version of this package must agree."""
    ids = list("abcdefghij")
    assert ["".join(ids[i] for i in samples_of_shard(ids, f"{k}/3")) for k in (1, 2, 3)] == ["cegi", "abf", "dhj"]


@pytest.mark.parametrize("wrong", ["0/3", "4/3", "a", "3", "1/0", "", "1/2/3", "-1/2", "1.0/2", "1 2"])
def test_a_shard_is_k_of_n(wrong: str) -> None:
    with pytest.raises(
        UserError, match=re.escape(f"shard must be k/n with k from 1 to n, such as 3/16, got {wrong!r}")
    ):
        parse_shard(wrong)


def test_a_shard_has_a_file_of_its_own(tmp_path: Path) -> None:
    assert parse_shard(" 3/16 ") == (3, 16)
    assert shard_file(tmp_path, "3/16") == tmp_path / "reflections-00003-of-00016.parquet"


def test_a_shard_without_samples_says_so(run: Reflection, samples: Dataset) -> None:
    empty = next(f"{k}/99" for k in range(1, 100) if not samples_of_shard(list(samples["sample_id"]), f"{k}/99"))
    with pytest.raises(UserError, match=f"shard {empty} has no sample; take fewer shards"):
        run(InParts(), shard=empty)


class SameAlone(Scoring):
    """Neither answers nor log-probabilities depend on the samples beside."""


def shards_of(run: Reflection, count: int, folder: Path, **options: Any) -> list[Path]:
    for k in range(1, count + 1):
        scores = run(SameAlone(), shard=f"{k}/{count}", cross_entropy_by="engine", **options)
        write_shard(Dataset.from_list(scores), shard_file(folder, f"{k}/{count}"), "made from this")
    return shard_files(folder)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_shards_together_are_the_whole(count: int, run: Reflection, tmp_path: Path) -> None:
    rows = [{**row, "sample_id": f"r{i}"} for i, row in enumerate(ROWS)]
    rows[3]["output"] = ""  # unscored, with a reason, in one shard only
    whole = run(SameAlone(), cross_entropy_by="engine", dataset=rows, parts_folder=None)
    assert [row["reason"] for row in whole].count("empty reference") == 1
    files = shards_of(run, count, tmp_path, dataset=rows)
    assert len(files) == count
    ids = [row["sample_id"] for row in rows]
    merged = merge_shards(files[::-1], ids, "made from this")
    assert repr(merged.to_list()) == repr(whole)  # NaN is not equal to itself
    assert merged.features == Dataset.from_list(whole).features
    turned = merge_shards(files, ids[::-1], "made from this")
    assert repr(turned.to_list()) == repr(whole[::-1])


def test_shards_of_a_model_are_the_whole(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, samples: Dataset, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"engine": "transformers", "batch_size": 4, "sampling": Sampling(8), "progress": False}
    whole = reflect(tiny_model, samples, tiny_tokenizer, **options)
    for shard in ("1/2", "2/2"):
        scores = reflect(tiny_model, samples, tiny_tokenizer, shard=shard, **options)
        assert 0 < len(scores) < len(whole)
        write_shard(scores, shard_file(tmp_path, shard), "x")
    merged = merge_shards(shard_files(tmp_path), list(samples["sample_id"]), "x")
    for column in ("sample_id", "generation", "rouge_l", "reason"):
        assert list(merged[column]) == list(whole[column])
    assert list(merged["cross_entropy"]) == pytest.approx(list(whole["cross_entropy"]), rel=1e-5)


@pytest.fixture
def three(run: Reflection, tmp_path: Path) -> list[Path]:
    """Sound files of three shards."""
    return shards_of(run, 3, tmp_path)


def test_a_missing_shard_is_named_with_its_command(three: list[Path], samples: Dataset) -> None:
    with pytest.raises(UserError) as error:
        merge_shards([three[0], three[2]], list(samples["sample_id"]), "made from this")
    assert "1 of 3 shards are missing, the first is 2/3: srd-fast reflect CONFIG --shard 2/3" in str(error.value)


def test_a_shard_under_the_name_of_another_leaves_samples_missing(three: list[Path], samples: Dataset) -> None:
    shutil.copy(three[0], three[1])
    lost = samples["sample_id"][samples_of_shard(list(samples["sample_id"]), "2/3")[0]]
    with pytest.raises(UserError, match=rf"samples are in no shard, the first is '{lost}': reflect the shards again"):
        merge_shards(three, list(samples["sample_id"]), "made from this")


def test_samples_that_are_there_twice_are_refused(three: list[Path], samples: Dataset) -> None:
    table = pq.read_table(three[0])
    overlapping = Dataset.from_list([*table.to_pylist(), pq.read_table(three[1]).to_pylist()[0]])
    ids = list(samples["sample_id"])
    with pytest.raises(UserError, match=f"the shards hold .* rows for {len(ROWS)} samples: some are there twice"):
        merge_shards([*three, three[1]], ids, "made from this")
    write_shard(overlapping, three[0], "made from this")
    with pytest.raises(UserError, match=f"the shards hold {len(ROWS) + 1} rows for {len(ROWS)} samples"):
        merge_shards(three, ids, "made from this")


def test_a_shard_made_from_something_else_is_named(three: list[Path], samples: Dataset) -> None:
    with pytest.raises(UserError, match=f"{three[0].name}' was made from another student, other data or other settin"):
        merge_shards(three, list(samples["sample_id"]), "made from that")
    bare = pq.read_table(three[1]).replace_schema_metadata(None)
    pq.write_table(bare, three[1])
    with pytest.raises(UserError, match=f"{three[1].name}' was made from another student"):
        merge_shards(three, list(samples["sample_id"]), "made from this")


def test_a_damaged_shard_is_named(three: list[Path], samples: Dataset) -> None:
    content = three[2].read_bytes()
    place = content.index(b"PAR1", 4) if content.count(b"PAR1") > 2 else len(content) // 4
    flipped = bytearray(content)
    flipped[place] ^= 255
    for damaged in (b"", content[: len(content) // 2], content[:-1], bytes(flipped)):
        three[2].write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{three[2].name}' cannot be read \(.*\): reflect that shard again"):
            merge_shards(three, list(samples["sample_id"]), "made from this")


def test_shards_of_two_splits_are_not_mixed(run: Reflection, three: list[Path], samples: Dataset) -> None:
    files = shards_of(run, 2, three[0].parent)
    assert len(files) == 5
    with pytest.raises(UserError, match=r"shards of different splits lie side by side \(\[2, 3\] shards\)"):
        merge_shards(files, list(samples["sample_id"]), "made from this")


# Through the command line


COMMAND_PARTS = 16


@pytest.fixture(scope="module")
def config_file(tiny_teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = {
        "teacher": str(tiny_teacher_folder),
        "student": str(tiny_teacher_folder),
        "max_rows": 4 * COMMAND_PARTS,
        "validation": 4,
        "dtype": "float32",
        "max_prompt_length": 400,
        "max_response_length": 64,
        "reflect": {"engine": "transformers", "max_new_tokens": 12, "batch_size": 1},
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def prepared(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all steps before `reflect` done. Shared: work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "prepared"
    config = load_run_config(config_file, [f"output_dir={folder}"])
    for step in ("prepare", "init-student"):
        execute(config, only=step, say=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def quiet(prepared: Path, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after `srd-fast reflect` without a disturbance, in a process of its own. Shared."""
    folder = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("quiet") / "run"))
    with process("reflect", config_file, f"output_dir={folder}") as undisturbed:
        out, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, err
    assert "reflect: done in" in out
    return folder


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


@pytest.mark.slow
def test_the_command_leaves_no_parts(quiet: Path) -> None:
    assert sorted(p.name for p in quiet.iterdir()) == [
        ".lock",
        "config.yaml",
        "data",
        "reflections.parquet",
        "steps.json",
    ]


@pytest.mark.slow
def test_the_command_does_shards_and_joins_them(copy: Path, quiet: Path, config_file: Path) -> None:
    config = (config_file, f"output_dir={copy}")
    for k in (1, 2):
        result = srd_fast("reflect", *config, "--shard", f"{k}/2")
        assert result.status == 0, result
        assert f"reflect, shard {k}/2: {shard_file(copy, f'{k}/2')}\n" in result.out
        assert shard_file(copy, f"{k}/2").is_file()
        assert not (copy / "reflections.parquet").exists()
        if k == 1:
            message = srd_fast("reflect", *config).error()
            assert "1 of 2 shards are missing, the first is 2/2: srd-fast reflect CONFIG --shard 2/2" in message
    assert srd_fast("reflect", *config).steps("done in") == ["reflect"]
    assert not (copy / "reflections.parts").exists()
    merged, whole = (pq.read_table(f / "reflections.parquet").to_pydict() for f in (copy, quiet))
    assert merged.pop("cross_entropy") == pytest.approx(whole.pop("cross_entropy"), rel=1e-5)
    assert merged == whole
    assert srd_fast("reflect", *config).steps("unchanged, skipped") == ["reflect"]
    assert srd_fast("curate", *config).steps("done in") == ["curate"]
    message = srd_fast("reflect", *config, "reflect.max_new_tokens=5").error()
    assert "was made from another student, other data or other settings than this run's" in message


def test_the_command_refuses_what_is_no_shard(copy: Path, config_file: Path) -> None:
    message = srd_fast("reflect", config_file, f"output_dir={copy}", "--shard", "3/2").error()
    assert "shard must be k/n with k from 1 to n, such as 3/16, got '3/2'" in message


# Killed


FORK = multiprocessing.get_context("fork")


def dying(reflection: Callable[[], object], moment: int) -> Any:
    """A process that sends itself SIGKILL the `moment`-th time (from 0) that it syncs or renames a file.

    Killed at the sync, it leaves half of the bytes.
    """

    def work() -> None:
        touches = iter(range(10**9))

        def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if next(touches) == moment:
                    if name == "fsync":
                        os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return wrapped

        for name in ("fsync", "replace"):
            setattr(os, name, watched(name, getattr(os, name)))
        reflection()

    process = FORK.Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def test_a_kill_at_any_touch_of_a_file_changes_nothing(run: Reflection, tmp_path: Path) -> None:
    """Each process is killed one touch later than the one before it, in a folder of its own."""
    whole, kills = run(InParts()), 0
    expected = contents(tmp_path)
    while True:
        folder = tmp_path / str(kills)
        status = dying(lambda folder=folder: run(InParts(), parts_folder=folder / "parts"), kills)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        left = {name: content for name, content in contents(folder).items() if not name.startswith(".")}
        assert len(left) == kills // 2
        assert left.items() <= expected.items()
        rest = InParts()
        assert run(rest, parts_folder=folder / "parts") == whole
        assert len(rest.calls) == PARTS - len(left)
        assert contents(folder) == expected
        kills += 1
    assert kills == 2 * PARTS


@pytest.mark.long
def test_a_command_killed_at_random_moments_ends_as_an_undisturbed_one(
    prepared: Path, quiet: Path, config_file: Path, tmp_path: Path
) -> None:
    expected = pq.read_table(quiet / "reflections.parquet").to_pylist()
    generator, kills, resumed = random.Random(0), 0, []
    folder = tmp_path / "run"

    def finished_parts() -> int:
        return len(list(folder.glob("reflections.parts/part-*")))

    for attempt in range(40):
        if not folder.exists():
            shutil.copytree(prepared, folder)
        before, more, delay = finished_parts(), generator.randint(0, 3), generator.uniform(0, 0.3)
        command = [sys.executable, "-u", "-m", "srd_fast.cli", "reflect", str(config_file), f"output_dir={folder}"]
        errors = tmp_path / f"{attempt}.err"
        with errors.open("w") as e, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=e, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().endswith("reflect ...\n"), errors.read_text()
            while kills < 10 and process.poll() is None and finished_parts() < before + more:
                time.sleep(0.001)
            if kills < 10:
                time.sleep(delay)
                process.kill()
            status = process.wait(300)
        assert status in (0, -signal.SIGKILL), errors.read_text()
        if status:
            kills += 1
            resumed.append(finished_parts())
            continue
        written = folder / "reflections.parquet"
        assert pq.read_table(written).to_pylist() == expected
        assert written.read_bytes() == (quiet / written.name).read_bytes()
        assert not (folder / "reflections.parts").exists()
        shutil.rmtree(folder)
        if kills == 10:
            break
    assert kills == 10
    assert len({n for n in resumed if 0 < n < COMMAND_PARTS}) >= 3, f"killed at {resumed} parts"


def test_a_shard_needs_no_verb_between_prepare_and_itself(config_file: Path, prepared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert srd_fast("prepare", config_file, f"output_dir={folder}").status == 0
    for k in (1, 2):
        result = srd_fast("reflect", config_file, f"output_dir={folder}", "--shard", f"{k}/2")
        assert result.steps("done in") == (["init-student"] if k == 1 else []), result
    assert not list(folder.glob("*parts*"))
    assert srd_fast("reflect", config_file, f"output_dir={folder}").steps("done in") == ["reflect"]
