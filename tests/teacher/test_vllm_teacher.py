"""A teacher that vLLM runs: its rows are the live teacher's but for rounding, and its cache is filled once.

What needs the engine is marked `vllm` (CONTRIBUTING, "vLLM on a CPU"); the head and the options need none.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from test_quantised import trained
from test_teacher_cache import SAMPLES, SHARD_BYTES, attached, files, rows_files
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast.errors import StaleCacheError, UserError
from srd_fast.models import find_head, head_of_files, load_model
from srd_fast.run.config import load_run_config
from srd_fast.run.steps.cache import cache_inputs, check_cache
from srd_fast.run.steps.settings import training_config
from srd_fast.teacher import LiveTeacher, TeacherCache, VLLMTeacher, build_teacher_cache, make_store, open_teacher_cache
from srd_fast.teacher.vllm_teacher import source_by_vllm
from srd_fast.workers.vllm import is_installed

with_vllm = pytest.mark.skipif(not is_installed(), reason="vLLM is missing: see CONTRIBUTING, 'vLLM on a CPU'")


def saved(folder: Path, model: PreTrainedModel, **options: Any) -> str:
    model.save_pretrained(folder, **options)
    return str(folder)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_head_read_alone_is_the_models(architecture: str, tmp_path: Path) -> None:
    model = tiny.tiny_model(architecture, layers=1)
    source = saved(tmp_path, model, max_shard_size="20KB" if architecture in ("llama_untied", "phi") else "1GB")
    whole = find_head(model)
    found, embeddings = head_of_files(source, torch.float32)
    assert (found.scale, found.softcap) == (whole.scale, whole.softcap)
    assert found.weight is not None
    assert whole.weight is not None
    assert torch.equal(found.weight, whole.weight)
    assert (found.bias is None) == (whole.bias is None)
    assert found.bias is None or whole.bias is None or torch.equal(found.bias, whole.bias)
    assert embeddings == model.get_input_embeddings().weight.shape[0]


def test_a_head_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = saved(tmp_path / "model", tiny.tiny_model("llama_untied", layers=1))
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    head = weights.pop("lm_head.weight")
    for wrong in ({}, {"lm_head.weight": head.to(torch.int8)}, {"lm_head.weight": head[:-1]}):
        save_file({**weights, **wrong}, file)
        with pytest.raises(UserError, match=r"hold no full head of \(300, 16\).*quantise the model without it"):
            head_of_files(source, torch.float32)
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="its weights cannot be read"):
        head_of_files(source, torch.float32)
    file.unlink()
    with pytest.raises(UserError, match="has no weights in safetensors"):
        head_of_files(source, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vlm"}, "unknown engine of a teacher cache 'vlm'; did you mean 'vllm'"),
        ({"engine_options": {"dtype": "auto"}}, r"engine_options \['dtype'\] are for the engine 'vllm'"),
        ({"engine": "vllm", "engine_options": {"dtype": "auto"}}, "holds 'dtype', but .* an argument of its own"),
        ({"engine": "vllm", "engine_options": {"enable_prefix_caching": True}}, "it must be False; leave it out"),
        ({"engine": "vllm", "engine_options": {"tensor_parallel_size": 0}}, "tensor_parallel_size must be a whole num"),
        ({"engine": "vllm", "device_map": "auto"}, "leave device_map and tp_plan out"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_teacher_cache(tmp_path / "cache", "no/teacher", SAMPLES, **options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cache.engine_options={max_num_seqs: 8}"], "config: cache: engine_options .* are for the engine 'vllm'"),
        (["cache.engine=vllm", "cache.kind=live"], "cache.engine 'vllm' fills a cache, and cache.kind is 'live'"),
        (["cache.engine=vllm", "teacher_device_map=auto"], "config: cache: .* leave device_map and tp_plan out"),
    ],
)
def test_a_config_that_cannot_be(given: list[str], message: str) -> None:
    config = load_run_config(None, given)
    with pytest.raises(UserError, match=message):
        check_cache(config, training_config(config))


def test_the_engine_is_of_a_runs_inputs_only_where_it_is_not_the_usual_one() -> None:
    usual, vllm = (load_run_config(None, given) for given in ([], ["cache.engine=vllm"]))
    assert cache_inputs(vllm) == [*cache_inputs(usual), "vllm", {}]


def test_what_changes_the_teacher_is_in_its_source(tmp_path: Path) -> None:
    source = saved(tmp_path, tiny.tiny_model("llama", layers=1))
    plain = source_by_vllm(source, None)
    assert source_by_vllm(source, {"max_num_seqs": 8, "tensor_parallel_size": 2}) == plain
    assert source_by_vllm(source, {"quantization": "fp8"}) not in (plain, source_by_vllm(source, {"quantization": "q"}))


# With the engine.


@pytest.fixture(scope="module")
def source(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama with heads as wide as vLLM's kernels need."""
    model = tiny.tiny_model("llama_untied", layers=2, width=64, max_position_embeddings=512)
    folder = tmp_path_factory.mktemp("teacher")
    tiny_tokenizer.save_pretrained(folder)
    return saved(folder, model)


@pytest.fixture(scope="module")
def teacher(source: str) -> Iterator[VLLMTeacher]:
    made = VLLMTeacher(source, max_num_batched_tokens=64)  # longer samples go in pieces
    made.reserve(max(len(s["input_ids"]) for s in SAMPLES))
    yield made
    made.close()


def relative(found_ND: Tensor, wanted_ND: Tensor) -> float:
    """The largest difference of a row, relative to its length."""
    return ((found_ND - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)).max().item()


def fill(folder: Path, teacher: Any, **options: Any) -> TeacherCache:
    return build_teacher_cache(teacher, SAMPLES, folder, shard_bytes=SHARD_BYTES, progress=False, **options)


@pytest.mark.vllm
@with_vllm
def test_rows_and_caches_of_each_kind_are_those_of_the_live_teacher(
    teacher: VLLMTeacher, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model(source)
    assert trained(teacher) == pytest.approx(trained(model), rel=1e-3), "beside a student"
    rows = teacher.rows({"teacher": teacher.collate_ahead(SAMPLES).to("cpu")}, 1.0)
    live = fill(tmp_path / "live", model)
    wanted = live.rows(attached(live, SAMPLES), 1.0)
    assert relative(rows.hidden_ND, wanted.hidden_ND) < 1e-4
    assert torch.equal(teacher.head.weight, LiveTeacher(model).head.weight)
    student = tiny.tiny_model("llama", layers=1)
    for kind in ("hidden", "projected", "topk"):
        store = make_store(kind, teacher.num_classes, 8, (1.0, 2.0), student, log_sum_exp=kind == "hidden")
        theirs, ours = (
            fill(tmp_path / f"{kind}-{engine}", by, kind=kind, store=store)
            for engine, by in (("live", model), ("vllm", teacher))
        )
        assert len(rows_files(tmp_path / f"{kind}-vllm")) == len(rows_files(tmp_path / f"{kind}-live")) > 1
        for temperature in (1.0, 2.0):
            a, b = (cache.rows(attached(cache, SAMPLES), temperature) for cache in (ours, theirs))
            for x, y in zip(a, b):
                if isinstance(x, Tensor) and x.is_floating_point():
                    torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-3 if kind == "topk" else 1e-4)


@pytest.mark.long
@pytest.mark.vllm
@with_vllm
def test_a_killed_engine_and_a_killed_run_end_with_the_same_bytes(
    teacher: VLLMTeacher, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tmp_path / "whole"
    fill(whole, teacher)
    cut = tmp_path / "cut"
    asked = teacher.hidden_rows

    def kill_once(*args: Any) -> Tensor:
        teacher.hidden_rows = asked  # type: ignore[method-assign]
        for child in psutil.Process().children():
            child.kill()
        return asked(*args)

    teacher.hidden_rows = kill_once  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        fill(cut, teacher)
    assert "vLLM's process died and is started again: it ended by SIGKILL" in caplog.text
    assert files(cut) == files(whole)
    for lost in rows_files(cut)[::2]:
        lost.unlink()
    before = {p: p.stat().st_mtime_ns for p in rows_files(cut)}
    fill(cut, teacher)
    assert files(cut) == files(whole)
    assert {p: t for p, t in before.items() if p.stat().st_mtime_ns == t} == before, "what was there is made again"
    # Any engine reads it, by the teacher's files; another one does not add to it.
    found = open_teacher_cache(cut, source, SAMPLES)
    assert len(found) == len(TeacherCache(whole))
    with pytest.raises(StaleCacheError, match=r"by vLLM"):
        open_teacher_cache(cut, source, tiny.tiny_samples(3, seed=9), progress=False)
    with pytest.raises(StaleCacheError, match="teacher's files"):
        open_teacher_cache(cut, source, SAMPLES, engine="vllm", engine_options={"quantization": "fp8"})
    children = psutil.Process().children()
    assert len(open_teacher_cache(cut, source, SAMPLES, engine="vllm")) == len(found)
    assert psutil.Process().children() == children, "a full cache starts an engine"


@pytest.mark.long
@pytest.mark.vllm
@with_vllm
def test_what_vllm_refuses_is_said(source: str) -> None:
    made = VLLMTeacher(source, no_such_option=1)
    with pytest.raises(UserError, match=r"vLLM does not start: .*no_such_option"):
        made.hidden_rows(SAMPLES)
    made.close()


@pytest.mark.long
@pytest.mark.vllm
@with_vllm
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_bundled_model(dtype: torch.dtype, most: float) -> None:
    """In bfloat16 a row's difference is that between any two ways of summing: its mean is what is held here."""
    source = "smollm2-135m-instruct"
    rows = tiny_text_samples(source)
    made = VLLMTeacher(source, dtype)
    try:
        found_ND = made.hidden_rows(rows).float()
    finally:
        made.close()
    live = LiveTeacher(load_model(source, dtype))
    exact = LiveTeacher(load_model(source))
    for by in (live, exact):
        ids = [s["input_ids"][None] for s in rows]
        states = [by.hidden_states({"input_ids": x, "attention_mask": torch.ones_like(x)}) for x in ids]
        wanted_ND = torch.cat([x[0, :-1] for x in states]).float()
        errors = (found_ND - wanted_ND).norm(dim=-1) / wanted_ND.norm(dim=-1)
        beside = "transformers" if by is live else "float32"
        print(f"{dtype}, beside {beside}: mean {errors.mean():.1e}, largest {errors.max():.1e}")
        assert errors.mean() < most


def tiny_text_samples(source: str) -> list[dict[str, Any]]:
    from srd_fast.data.quickstart import make_quickstart_rows
    from srd_fast.models import load_tokenizer

    tokenizer = load_tokenizer(source)
    texts = [f"{row['instruction']} {row['output']}" for row in make_quickstart_rows(8, seed=3)]
    ids = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    return [{"input_ids": x, "labels": x} for x in ids]
