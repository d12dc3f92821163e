"""Configs with any number of faults: all of them are told at once, before a step has run.

`pytest -n 0 -m long tests/run/test_many_faults.py` tries 2,000 of them, and runs some of those that have none.
"""

import json
import random
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import yaml

from srd_fast.errors import FaultsError, UserError
from srd_fast.memory import room
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.pipeline import execute, load_checked

# Key and value -> a part of the line that tells of it. No two of a group go together.
FAULTS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "curate.keep": [({"curate.keep": 1.5}, "curate.keep: must be in (0, 1]"), ({"curate.keep": "all"}, "curate.keep:")],
    "curate.stages": [({"curate.stages": 0}, "curate.stages:"), ({"curate.stages": "three"}, "curate.stages:")],
    "curate.method": [
        ({"curate.method": "easy"}, "curate.method:"),
        ({"curate.method": "random", "curate.reflect_again": True}, "curate.reflect_again ranks by reflection"),
    ],
    "curate.rrf_k": [({"curate.rrf_k": -1}, "curate.rrf_k:")],
    "curate": [({"curate.kepe": 0.5}, "unknown key in curate 'kepe'")],
    "reflect.engine": [
        ({"reflect.engine": "vlm"}, "unknown engine 'vlm'"),
        ({"reflect.engine": "vllm"}, "reflect.engine is 'vllm', which needs the package vllm"),
    ],
    "reflect.engine_options": [({"reflect.engine_options": {"sampling": 1}}, "engine_options holds 'sampling'")],
    "reflect.temperature": [({"reflect.temperature": -0.5}, "reflect.temperature:")],
    "reflect.batch_size": [({"reflect.batch_size": 2.5}, "reflect.batch_size:")],
    "reflect.signals": [
        ({"reflect.signals": ["rouge_x"]}, "unknown difficulty signal 'rouge_x'"),
        ({"reflect.signals": []}, "reflect.signals:"),
        ({"reflect.signals": ["nowhere.py:f"]}, "nowhere.py"),
    ],
    "cache.k": [({"cache.k": 0}, "cache.k:")],
    "cache.kind": [
        ({"cache.kind": "all"}, "cache.kind:"),
        ({"cache.kind": "live", "cache.log_sum_exp": True}, "cache.log_sum_exp is true, and cache.kind is 'live'"),
    ],
    "evaluate": [
        ({"evaluate.seeds": ["a"]}, "evaluate.seeds"),
        ({"evaluate.metrics": ["meteor"]}, "evaluate.metrics"),
        ({"evaluate.temperature": 0}, "evaluate.temperature:"),
    ],
    "init_student": [
        ({"init_student.layers": 40}, "init_student: layers must be from 1 to the teacher's 4, got 40"),
        ({"init_student.warmup_steps": -1}, "init_student.warmup_steps:"),
        ({"init_student.encoder_layers": 2}, "init_student.encoder_layers is given"),
    ],
    "lora": [({"lora": {"rank": 8}}, "unknown key in lora 'rank'"), ({"lora": {"target_modules": ["nope"]}}, "lora: ")],
    "data": [({"data": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"), ({"data": 5}, "data:")],
    "validation": [({"validation": 0}, "validation: must be a file"), ({"validation": "none.csv"}, "'none.csv' does")],
    "data_function": [({"data_function": "mine.py:rows"}, "mine.py")],
    "template": [({"template": "Q: {question}"}, "{question}"), ({"template": 5}, "template:")],
    "max_rows": [({"max_rows": 0}, "max_rows:")],
    "seed": [({"seed": -1}, "seed:"), ({"seed": 1.5}, "seed:")],
    "dtype": [({"dtype": "int8"}, "dtype:")],
    "device": [({"device": "gpu"}, "device: 'gpu' cannot be used")],
    "preset": [({"preset": "papers"}, "unknown preset 'papers'; did you mean 'paper'?")],
    "output_dir": [({"output_dir": "file/run"}, "output_dir: 'file/run' cannot be made")],
    "unknown": [({"studnet": "x"}, "unknown key 'studnet'; did you mean 'student'?")],
    "distill.unknown": [({"distill.lr": 1}, "did you mean 'learning_rate'?")],
    "distill.set": [({"distill.output_dir": "x"}, "output_dir is set at the top level")],
    "distill.skew": [({"distill.skew": 1.5}, "skew must be at least 0 and"), ({"distill.skew": "a"}, "skew:")],
    "distill.divergence": [
        ({"distill.divergence": "kld"}, "unknown divergence 'kld'"),
        ({"distill.class_sampling": 8}, "class_sampling is 8, which estimates only forward_kl"),
    ],
    "distill.temperature": [({"distill.temperature": 0}, "temperature must be at least")],
    "distill.learning_rate": [({"distill.learning_rate": 0}, "learning_rate must be above 0")],
    "distill.schedule": [({"distill.lr_scheduler_type": "linear"}, "lr_scheduler_type is 'linear', but")],
    "distill.sampling": [({"distill.train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'seq")],
    "distill.smoothing": [({"distill.label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1")],
    "distill.eval": [
        ({"distill.eval_strategy": "daily"}, "eval_strategy is 'daily'"),
        ({"distill.metric_for_best_model": "bleu"}, "unknown metric_for_best_model 'bleu'"),
    ],
    "distill.save": [
        ({"distill.save_strategy": "daily"}, "save_strategy is 'daily'"),
        ({"distill.save_total_limit": 0}, "save_total_limit must be a whole number, at least 1"),
    ],
    "distill.optim": [
        ({"distill.optim": "adamm"}, "optim is 'adamm'"),
        ({"distill.optim": "paged_lion_8bit"}, "install"),
        ({"distill.optim_args": "a=1"}, "optim_args is 'a=1'"),
    ],
    "distill.report_to": [({"distill.report_to": ["mlflow"]}, "report_to is 'mlflow', which needs a package")],
    "distill.batch": [({"distill.per_device_train_batch_size": 0}, "per_device_train_batch_size must be")],
    "distill.epochs": [({"distill.epochs_per_stage": [1, 2, 3, 4]}, "epochs_per_stage has 4 values for")],
    "distill.padding_free": [({"distill.padding_free": "never"}, "padding_free must be")],
    "distill.bf16": [({"distill.bf16": "perhaps"}, "bf16:")],
    "distill.position": [({"distill.position_selection": "topk_luck"}, "topk_luck")],
    "distill.samples": [({"distill.sample_selection": "luck"}, "'luck'")],
    "distill.norm": [({"distill.max_grad_norm": -1}, "max_grad_norm must be at least 0")],
    "distill.workers": [({"distill.dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor is 2")],
}  # fmt: skip
# Those of packages that are not there.
for group, said, package in (
    ("reflect.engine", "package vllm", "vllm"),
    ("distill.optim", "install", "bitsandbytes"),
    ("distill.report_to", "mlflow", "mlflow"),
):
    if find_spec(package) is not None:
        FAULTS[group] = [fault for fault in FAULTS[group] if said not in fault[1]]
# Looks at what another one would have to be right for.
HIDES = {"curate.stages": ["distill.epochs"], "cache.kind": [], "preset": ["distill.samples", "distill.divergence"]}
HIDES |= {"curate": ["curate.method"], "curate.keep": ["curate.method"], "curate.rrf_k": ["curate.method"]}
HIDES |= {"curate.stages": ["distill.epochs", "curate.method"], "data_function": ["data", "validation"]}
HIDES |= {"lora": ["init_student"], "distill.bf16": [], "reflect.signals": []}
FINE: dict[str, list[Any]] = {
    "curate.keep": [0.5, 1, "knee"],
    "curate.stages": [1, 2],
    "curate.method": ["srd", "random", "none"],
    "reflect.temperature": [0, 0.7],
    "reflect.signals": [["rouge_l"], ["rouge_l", "cross_entropy"], ["exact_match", "chrf"]],
    "cache.kind": ["hidden", "topk", "live"],
    "evaluate.metrics": [[], ["bleu"]],
    "max_rows": [20, 24],
    "seed": [3],
    "distill.divergence": ["forward_kl", "jsd", "skew_reverse_kl"],
    "distill.temperature": [1, 2.5],
    "distill.learning_rate": ["1e-3", 0.01],
    "distill.lr_scheduler_type": ["cosine"],
    "distill.save_strategy": ["no", "epoch"],
    "distill.optim": ["sgd", "adamw_torch", "adafactor"],
    "distill.bf16": [True, False],
    "distill.padding_free": [True, False, "auto"],
    "distill.max_grad_norm": [0, 0.5],
    "distill.position_selection": ["topk_student_entropy"],
    "distill.weight_decay": [0.1],
    "distill.warmup_steps": [2, 0.25],
    "distill.max_tokens_per_batch": [2000],
    "distill.gradient_accumulation_steps": [2],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    tiny.tiny_model("llama", layers=4).save_pretrained(folder / "teacher")
    tiny.tiny_tokenizer().save_pretrained(folder / "teacher")
    (folder / "file").write_text("no folder")
    return folder


def usual(base: Path) -> dict[str, Any]:
    return {
        "teacher": str(base / "teacher"), "output_dir": "run", "max_rows": 24, "validation": 6, "dtype": "float32",
        "max_prompt_length": 400, "max_response_length": 64, "init_student.layers": 2, "init_student.warmup_steps": 0,
        "reflect.engine": "transformers", "reflect.max_new_tokens": 4, "evaluate.max_new_tokens": 4,
        "distill.epochs_per_stage": 0.25, "distill.per_device_train_batch_size": 2, "distill.eval_strategy": "no",
    }  # fmt: skip


def drawn(seed: int, base: Path) -> tuple[dict[str, Any], list[str]]:
    """A config by dotted keys, and what must be said of it."""
    rng = random.Random(seed)
    values = usual(base)
    for key in rng.sample(sorted(FINE), rng.randint(0, 4)):
        values[key] = rng.choice(FINE[key])
    words: list[str] = []
    groups = rng.sample([g for g in FAULTS if FAULTS[g]], rng.choice([0, 1, 1, 2, 3, 5, 8]))
    hidden = {other for group in groups for other in HIDES.get(group, [])}
    for group in groups:
        if group in hidden:
            continue
        wrong, said = rng.choice(FAULTS[group])
        values |= wrong
        words.append(said)
    if "distill.class_sampling" in values:
        values["distill.divergence"] = "jsd"
    if "curate.reflect_again" in values and values.get("distill.save_strategy") == "no":
        del values["distill.save_strategy"]
    return values, words


def written(values: dict[str, Any], seed: int) -> list[str]:
    """Some of the values in config.yaml; the others as overrides."""
    content: dict[str, Any] = {}
    overrides = []
    for number, (key, value) in enumerate(values.items()):
        if (number + seed) % 3 == 0 and not isinstance(value, dict):
            overrides.append(f"{key}={json.dumps(value)}")
            continue
        *section, last = key.split(".")
        (content.setdefault(section[0], {}) if section else content)[last] = value
    Path("config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return overrides


def told(load: Callable[[], RunConfig]) -> list[str]:
    try:
        execute(load(), checks=[stop])
    except FaultsError as e:
        assert not Path("run").exists(), "work has begun"
        return [fault.text for fault in e.faults]
    except FineError:
        return []
    raise AssertionError("nothing stopped the run")


class FineError(Exception):
    """The config is fine."""


def stop(config: RunConfig) -> None:
    raise FineError


def try_all(seeds: range, base: Path) -> int:
    count = 0
    for seed in seeds:
        values, words = drawn(seed, base)
        overrides = written(values, seed)
        lines = told(lambda overrides=overrides: load_checked("config.yaml", overrides))
        for said in words:
            found = [line for line in lines if said in line]
            assert found, (seed, said, lines, values)
            lines.remove(found[0])
        assert not lines, (seed, lines, values)
        count += len(words)
    return count


@pytest.fixture
def here(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(base / "file", "file")
    return base


def test_each_fault_is_told_alone_and_with_others(here: Path) -> None:
    assert try_all(range(14), here) > 14


def config_here(base: Path, **more: Any) -> RunConfig:
    return load_run_config("config.yaml", written({**usual(base), **more}, 1))


def test_room_in_memory_is_looked_at(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The planner is asked only where a bound that costs nothing is not enough."""
    config, planned = config_here(here), []
    needed = type("Plan", (), {"total": 700 << 20})()
    monkeypatch.setattr(room, "plan", lambda config: planned.append(config) or needed)
    for total, free, asked in ((64 << 30, 32 << 30, 0), (64 << 30, 1 << 30, 1), (64 << 30, 600 << 20, 2)):
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda t=total, f=free: type("M", (), {"total": t, "available": f})
        )
        room.check_room(config)
        assert len(planned) == asked
        assert ("of which 0.6 GB are free" in caplog.text) is (asked == 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"total": 500 << 20, "available": 1}))
    with pytest.raises(
        UserError, match=r"distill needs about 0\.7 GB at its peak, and cpu has 0\.5 GB; srd-fast memory"
    ):
        room.check_room(config)


@pytest.mark.parametrize(("fields", "fits"), [({}, False), ({"distill.save_strategy": "no"}, True)])
def test_room_on_the_disk_is_looked_at(
    fields: dict[str, Any], fits: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * sum(p.numel() for p in tiny.tiny_model("llama", layers=4).parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Disk", (), {"free": 2 * size})())
    config = config_here(here, **fields)
    if fits:
        return room.check_room(config)
    with pytest.raises(
        UserError, match=r"output_dir: the student and its checkpoints take .* lower distill\.save_total"
    ):
        execute(config, checks=[room.check_room])
    assert not Path("run").exists()


def test_a_pruned_student_takes_the_room_of_the_layers_it_keeps(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files, its optimizer's states and three checkpoints: ten times the weights."""
    config = config_here(here, **{"init_student.layers": 1})
    needed = 4 * 10 * sum(p.numel() for p in tiny.tiny_model("llama", layers=1).parameters())
    disk = {"free": needed}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Disk", (), disk))
    room.check_room(config)
    disk["free"] -= 1
    with pytest.raises(UserError, match="output_dir: the student and its checkpoints take"):
        room.check_room(config)


@pytest.mark.long
def test_two_thousand_configs(here: Path) -> None:
    assert try_all(range(100, 2100), here) > 3000


@pytest.mark.long
def test_what_is_not_refused_runs(here: Path) -> None:
    ran = 0
    for seed in range(3000, 3100):
        values, words = drawn(seed, here)
        if words:
            continue
        execute(load_checked("config.yaml", written(values, seed)), say=lambda _: None)
        assert Path("run/report.html").is_file()
        shutil.rmtree("run")
        ran += 1
        if ran == 6:
            return
