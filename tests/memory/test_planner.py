"""The memory planner: counted bytes are those of real tensors, the table adds up, what is proposed fits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import encoder_decoders
import pytest
import tiny
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainingArguments
from typer.testing import CliRunner

from srd_fast import UserError
from srd_fast.cli import app
from srd_fast.data import DistillationCollator
from srd_fast.memory import fitting, planner
from srd_fast.memory.batch import Batch
from srd_fast.memory.dry_step import _forward
from srd_fast.memory.live_bytes import LiveBytes
from srd_fast.models import enable_flattening, hidden_states
from srd_fast.models.varlen import IMPLEMENTATION
from srd_fast.run.config import RunConfig, load_run_config

BASE = 10_000_000
LENGTHS = (9, 3, 6)


@pytest.fixture(autouse=True)
def _no_probe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.originalname != "test_predicted_and_measured_peak":
        monkeypatch.setattr(planner, "_process_bytes", lambda: BASE)


def made_config(teacher: Path, folder: Path, *overrides: str) -> RunConfig:
    given = [f"teacher={teacher}", f"output_dir={folder}", "init_student.layers=2", "dtype=float32", "device=cpu"]
    given += ["max_prompt_length=40", "max_response_length=20", 'distill.eval_strategy="no"']
    return load_run_config(None, [*given, *overrides])


# Live bytes


def test_storages_are_counted_while_they_live() -> None:
    with LiveBytes() as live:
        with live.labelled("a"):
            x = torch.empty(100)
            view = x[10:].view(9, 10)
        with live.labelled("b"):
            y = x + 1
        assert live.live == {"a": 400, "b": 400}
        del x, y
        assert live.live == {"a": 400, "b": 0}
        live.relabel(view, "b")
        del view
    assert live.live == {"a": 0, "b": 0}
    assert live.peak == {"a": 400, "b": 400}


class Saved:
    """Bytes of distinct storages that autograd keeps, without the parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.kept: dict[int, Tensor] = {}

    def pack(self, x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in self.known and x.numel() > 1:
            self.kept.setdefault(key, x)
        return x

    @property
    def total(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen2"])
def test_fake_forward_passes_save_what_real_ones_do(architecture: str, flattened: bool, bf16: bool) -> None:
    real = tiny.tiny_model(architecture, layers=2, width=32).train()
    samples = [{"input_ids": [1] * n, "labels": [1] * n} for n in LENGTHS]
    batch: dict[str, Any] = tiny.collate(samples)
    if flattened:
        if enable_flattening(real) is not None:
            pytest.skip("takes no flattened batches")
        starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        batch = {"input_ids": torch.ones_like(positions), "position_ids": positions, "cu_seq_lens": starts}
    saved = Saved(real)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x), torch.autocast("cpu", enabled=bf16):
        hidden_states(real, batch)

    with LiveBytes() as live:
        fake = type(real)(real.config).train()
        if flattened:
            fake.set_attn_implementation(IMPLEMENTATION)
        counted, before = Saved(fake), sum(live.live.values())
        with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda x: x), torch.autocast("cpu", enabled=bf16):
            out = _forward(fake, Batch(LENGTHS, 5), torch.device("cpu"), flattened)
        alive = sum(live.live.values()) - before
        assert counted.total > 10_000
        assert counted.total == pytest.approx(saved.total, rel=0.005)
        assert counted.total <= alive <= 1.25 * counted.total
        del out


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_fake_passes_through_two_stacks_save_what_real_ones_do(name: str) -> None:
    real = encoder_decoders.tiny_model(name, width=32).train()
    prompts = (5, 2, 4)
    samples = [{"input_ids": [1] * n, "labels": [-100] * p + [1] * (n - p)} for n, p in zip(LENGTHS, prompts)]
    batch = DistillationCollator(0, decoder_start=0)(samples)
    saved = Saved(real)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        hidden_states(real, batch)
    with LiveBytes() as live:
        fake = type(real)(real.config).train()
        counted, before = Saved(fake), sum(live.live.values())
        with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda x: x):
            out = _forward(fake, Batch(LENGTHS, 5, prompts), torch.device("cpu"), False)
        alive = sum(live.live.values()) - before
        assert counted.total > 10_000
        assert counted.total == pytest.approx(saved.total, rel=0.005)
        assert counted.total <= alive <= 1.25 * counted.total
        assert out.shape == (3, 5, 32)  # a start token and the longest response


# Plans


@pytest.mark.long
def test_a_plan_of_two_stacks(tmp_path: Path) -> None:
    tokenizer = encoder_decoders.tiny_tokenizer("t5")
    for name in ("t5", "t5_untied"):
        encoder_decoders.tiny_model(name, layers=(3, 3), width=32).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    made, own_head = (
        planner.plan(made_config(tmp_path / n, tmp_path / "run", "init_student.encoder_layers=2"))
        for n in ("t5", "t5_untied")
    )
    assert made.batch == Batch((60,) * 16, 16 * 20, (40,) * 16)
    assert made.batch.tokens(False) == 16 * (40 + 21)
    student: Any = encoder_decoders.tiny_model("t5", width=32)
    assert made.parts["student weights"] == sum(p.numel() for p in student.parameters()) * 4
    untied: Any = encoder_decoders.tiny_model("t5_untied", width=32)
    assert own_head.parts["student weights"] == sum(p.numel() for p in untied.parameters()) * 4
    fitted = fitting.fit(
        made_config(tmp_path / "t5", tmp_path / "run", "init_student.encoder_layers=2"), made.total - 1
    )
    assert fitted.total < made.total
    assert fitted.batch.tokens(False) < made.batch.tokens(False)


def test_the_table_adds_up(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    made = planner.plan(made_config(tiny_teacher_folder, tmp_path))
    lines = [line.split() for line in str(made).splitlines()]
    total = next(float(words[-3]) for words in lines if words[0] == "total")
    parts = sum(float(words[-3]) for words in lines[: [w[0] for w in lines].index("total")])
    assert made.total == sum(made.parts.values())
    assert total == pytest.approx(parts, abs=0.0005 * len(lines))
    assert made.parts["process"] == BASE
    assert made.batch == Batch((60,) * 16, 16 * 20)
    assert "limits" in made.source
    assert made.host == 0


def parameters(config: RunConfig) -> int:
    made = tiny.tiny_model("llama_untied", layers=2, width=32, vocab=400, max_position_embeddings=1024)
    return sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize(
    ("optim", "states"),
    [("adamw_torch", 2), ("sgd", 0), *(pytest.param(x, 1, marks=pytest.mark.slow) for x in ("rmsprop", "adagrad"))],
)
def test_the_optimizer_s_state(tiny_teacher_folder: Path, tmp_path: Path, optim: str, states: int) -> None:
    config = made_config(tiny_teacher_folder, tmp_path, f"distill.optim={optim}")
    parts = planner.plan(config).parts
    assert parts["student weights"] == pytest.approx(4 * parameters(config), rel=0.01)
    assert parts.get("optimizer", 0) == pytest.approx(states * 4 * parameters(config), rel=0.01, abs=500)


def test_adapters_alone_are_trained(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = made_config(tiny_teacher_folder, tmp_path, "lora={r: 4, target_modules: [q_proj]}")
    parts = planner.plan(config).parts
    assert parts["adapters"] == 2 * 4 * 4 * (32 + 32)
    assert parts["optimizer"] == pytest.approx(2 * parts["adapters"], abs=100)


@pytest.mark.long
def test_what_each_teacher_keeps(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    head = 400 * 32 * 4
    kinds = {}
    for kind in ("hidden", "topk", "sampled", "projected", "live"):
        extra = ["lora={r: 4, target_modules: [q_proj]}"] if kind == "projected" else []
        config = made_config(
            tiny_teacher_folder, tmp_path, f"cache.kind={kind}", "distill.divergence=forward_kl", *extra
        )
        kinds[kind] = planner.plan(config)
    kept = {kind: made.parts.get("teacher", 0) for kind, made in kinds.items()}
    assert kept["hidden"] == kept["projected"] == head
    assert kept["topk"] == kept["sampled"] == 0
    assert kept["live"] > 2 * head
    assert kinds["live"].disk == 0
    # 256 rows of the quickstart, at most 20 tokens of 32 float32 each.
    assert kinds["hidden"].disk == 256 * (20 * 32 * 4 + 24) + head
    # The stages have the temperatures 1, 1.5 and 2, and evaluation has 1.
    keeping = planner.plan(made_config(tiny_teacher_folder, tmp_path, "cache.log_sum_exp=true"))
    assert keeping.disk == 256 * (20 * (32 * 4 + 3 * 4) + 24) + head
    one = made_config(tiny_teacher_folder, tmp_path, "cache.log_sum_exp=true", "distill.temperature=1")
    assert planner.plan(one).disk == 256 * (20 * (32 * 4 + 4) + 24) + head
    # Two answers to each of 256 prompts, and again to those of the first of three stages, whose rows stay.
    again = ("mode=offline_on_policy", "reflect.temperature=1", "answers_per_prompt=2", "answers_again=true")
    anew = planner.plan(made_config(tiny_teacher_folder, tmp_path, *again))
    assert anew.disk == int(256 * 2 * (4 / 3) * (20 * 32 * 4 + 24)) + head
    with pytest.raises(UserError, match=r"config: cache\.log_sum_exp is true, and cache\.kind is 'topk'"):
        planner.plan(made_config(tiny_teacher_folder, tmp_path, "cache.log_sum_exp=true", "cache.kind=topk"))


def test_a_teacher_that_is_spread_out_is_not_guessed(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """Its head alone is sure to be on the device."""
    live = ("cache.kind=live", "dtype=float32")
    whole = planner.plan(made_config(tiny_teacher_folder, tmp_path, *live))
    spread = planner.plan(made_config(tiny_teacher_folder, tmp_path, *live, "teacher_device_map=auto"))
    assert spread.parts["teacher"] == 400 * 32 * 4
    assert spread.parts["teacher"] < whole.parts["teacher"]
    assert "not counted: the live teacher's body" in str(spread)
    assert "not counted" not in str(whole)
    cached = planner.plan(made_config(tiny_teacher_folder, tmp_path, "teacher_device_map=auto"))
    assert "not counted" not in str(cached)


@pytest.mark.slow
def test_a_student_that_is_its_own_teacher_stands_there_once_beside_adapters(
    tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    itself = ("mode=self", f"student={tiny_teacher_folder}", "dtype=float32")
    lora, live = "lora={r: 4, target_modules: [q_proj]}", "cache.kind=live"
    cached, whole, adapted = (
        planner.plan(made_config(tiny_teacher_folder, tmp_path, *itself, *more)) for more in ((), (live,), (live, lora))
    )
    weights = whole.parts["student weights"]
    assert cached.parts["teacher"] == 400 * 32 * 4
    assert whole.parts["teacher"] == pytest.approx(weights, rel=0.01)
    assert "teacher" not in adapted.parts
    assert (cached.disk > 0, whole.disk, adapted.disk) == (True, 0, 0)
    assert "not counted: the longer prompts of the teacher" in str(adapted)
    # Fresh answers need it beside the student too.
    fresh = planner.plan(made_config(tiny_teacher_folder, tmp_path, *itself, "distill.lmbda=0.5"))
    assert fresh.parts["teacher"] == whole.parts["teacher"]
    assert fresh.disk == 0
    assert "not counted: the generation of fresh answers and the longer prompts" in str(fresh)


def test_checkpointing_and_smaller_batches_keep_fewer_activations(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    def activations(*overrides: str) -> int:
        return planner.plan(made_config(tiny_teacher_folder, tmp_path, *overrides)).parts["activations"]

    whole = activations()
    assert activations("distill.per_device_train_batch_size=8") == pytest.approx(whole / 2, rel=0.05)
    recomputed = activations("distill.gradient_checkpointing=true")
    assert recomputed < 0.5 * whole
    # The name since transformers 5.24, which can leave layers out.
    if hasattr(TrainingArguments, "activation_checkpointing"):
        every_second = 'distill.activation_checkpointing_kwargs={"every_n_layers": 2}'
        assert activations("distill.activation_checkpointing=true") == recomputed
        assert recomputed < activations("distill.activation_checkpointing=true", every_second) < whole


def test_micro_batches_by_tokens_have_a_ceiling(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """Samples of 60 tokens at most, 20 of them with loss, 16 a step."""
    whole = planner.plan(made_config(tiny_teacher_folder, tmp_path))
    made = planner.plan(made_config(tiny_teacher_folder, tmp_path, "distill.max_tokens_per_batch=250"))
    assert made.batch == Batch((60,) * 4, 4 * 20)
    assert made.parts["activations"] == pytest.approx(whole.parts["activations"] / 4, rel=0.05)


def test_float32_logits_take_twice_the_room(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """Of two heads of 400 classes, and the gradient in bfloat16 beside them."""
    bf16 = ("dtype=bfloat16", "distill.backend=compile", "cache.kind=hidden")
    narrow, wide = (
        planner.plan(made_config(tiny_teacher_folder, tmp_path, *bf16, *more)).parts["loss"]
        for more in ((), ("distill.logits_dtype=float32",))
    )
    assert wide - narrow == 16 * 20 * 400 * (2 * 2 + 2)


def test_lengths_come_from_the_run_folder(
    tiny_teacher_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from srd_fast.run.pipeline import execute

    limits = ["max_prompt_length=400", "max_response_length=200", "max_rows=24", "validation=4"]
    config = made_config(tiny_teacher_folder, tmp_path, *limits)
    execute(config, only="prepare", say=lambda text: None)
    made = planner.plan(config)
    assert "longest samples" in made.source
    assert max(made.batch.lengths) < 600
    other = planner.plan(made_config(tiny_teacher_folder, tmp_path, *limits[:1], "max_rows=24", "validation=4"))
    assert "limits" in other.source


# Limits


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 2**33), ("8GB", 8 * 10**9), ("8192MB", 8192 * 10**6), ("1.5 KiB", 1536), ("77", 77), ("2g", 2**31)],
)
def test_sizes(text: str, size: int) -> None:
    assert fitting.parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "8 parsecs", "0", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="limit must be a size"):
        fitting.parse_bytes(text)


@pytest.mark.long
def test_what_is_proposed_fits_and_trains_the_same(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    config = made_config(tiny_teacher_folder, tmp_path, "distill.gradient_accumulation_steps=3")
    whole = planner.plan(config)
    assert fitting.fit(config, whole.total).overrides == ()
    limit = BASE + (whole.total - BASE) * 3 // 5
    made = fitting.fit(config, limit)
    accumulated = ("distill.gradient_accumulation_steps=3", *made.overrides)
    again = made_config(tiny_teacher_folder, tmp_path, *accumulated)
    assert planner.plan(again).total == made.total <= limit
    assert again.distill["gradient_accumulation_steps"] == 3
    assert "per_device_train_batch_size" not in again.distill
    assert 60 <= again.distill["max_tokens_per_batch"] < 16 * 60


@pytest.mark.slow
def test_the_command(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(made_config(tiny_teacher_folder, tmp_path / "run").model_dump()))
    told = CliRunner().invoke(app, ["memory", str(file), "seed=3"])
    assert told.exit_code == 0, told.output
    assert "total" in told.output
    assert "srd-fast run" not in told.output
    total = planner.plan(load_run_config(file)).total
    limit = BASE + (total - BASE) * 3 // 4
    told = CliRunner().invoke(app, ["memory", str(file), "seed=3", "--limit", str(limit)])
    command = told.output.splitlines()[-1]
    assert command.startswith(f"srd-fast run {file} seed=3 distill.")
    assert "distill.max_tokens_per_batch=" in command
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_old_name_of_the_command_says_the_new_one(tmp_path: Path) -> None:
    command = shutil.which("srd-fast", path=str(Path(sys.executable).parent))
    assert command, "there is no srd-fast beside python: install the package"
    old, new = (
        subprocess.run([command, verb, str(tmp_path / "none.yaml")], capture_output=True, text=True, check=False)
        for verb in ("plan", "memory")
    )
    said = "warning: `srd-fast plan` is called `srd-fast memory` now; the old name goes away in srd-fast 0.3\n"
    assert old.stderr == said + new.stderr
    assert (old.returncode, old.stdout) == (new.returncode, new.stdout) == (2, "")


@pytest.mark.long
def test_nothing_fits(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing fits in 0\.01 GB: the least is 0\.01 GB, of which process takes"):
        fitting.fit(made_config(tiny_teacher_folder, tmp_path), BASE // 2 + BASE // 4)
    with pytest.raises(UserError, match="does not exist"):
        planner.plan(made_config(tmp_path / "nowhere", tmp_path))


# Real weights

_DISTILL = """
import sys
from pathlib import Path
from srd_fast.run import pipeline, steps
from srd_fast.run.config import load_run_config
folder = Path(sys.argv[1])
config = load_run_config(folder / "config.yaml", sys.argv[2:])
steps.distill(steps.Run(config, folder, dict.fromkeys(pipeline.STEP_NAMES, "test"), {}))
status = Path("/proc/self/status").read_text()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the allowance is measured with glibc")
@pytest.mark.parametrize(("kind", "size"), [("hidden", 8), ("live", 16)])
def test_predicted_and_measured_peak(kind: str, size: int, tmp_path: Path) -> None:
    from srd_fast.curriculum import CurriculumPlan
    from srd_fast.run import steps

    overrides = [f"output_dir={tmp_path}", f"cache.kind={kind}", f"distill.per_device_train_batch_size={size}"]
    overrides += ["max_rows=24", "validation=8", "init_student.warmup_steps=0", "curate.stages=1"]
    overrides += ["device=cpu", "distill.epochs_per_stage=2"]
    config = load_run_config(Path(__file__).parents[2] / "examples" / "standard_pair.yaml", overrides)
    run = steps.Run(config, tmp_path, {}, {})
    steps.prepare(run)
    steps.init_student(run)
    CurriculumPlan(subsets=[list(run.data("train")["sample_id"])], method="none").save(tmp_path / "plan.json")
    steps.cache_teacher(run)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    made = planner.plan(config)
    assert made.source.startswith("every batch")
    command = [sys.executable, "-c", _DISTILL, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
    )
    measured = int(done.stdout.split()[-1])
    print(f"{kind}, batch {size}: predicted {made.total / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert made.total == pytest.approx(measured, rel=0.15)
