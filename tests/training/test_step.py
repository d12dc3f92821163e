"""A step of `SRDTrainer` as users run it: in which dtype its products run, what it waits for, how it is divided."""

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from packaging import version
from spies import Products, Waits, Wide, products_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, TrainerCallback

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.data import DistillationCollator, divide_by_tokens, with_loss_rows
from srd_fast.kernels import rows
from srd_fast.teacher import TeacherCache, build_teacher_cache, labels_with_loss, rows_with_loss
from srd_fast.teacher.shards import OpenFile
from srd_fast.training import preparation
from srd_fast.training.batching import MICRO_BATCHES, TokenBatches
from srd_fast.training.health import NotFiniteError, StepCheck, skips_on_the_device

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")

SAMPLES = tiny.tiny_samples(24, longest=24)
# Classes of the two heads: no other dimension of either model is one of these, so their products are known by it.
V_S, V_T = tiny.VOCAB, tiny.VOCAB + 12


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def config(**fields: Any) -> SRDConfig:
    usual: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    usual |= {"disable_tqdm": True, "per_device_train_batch_size": 4, "epochs_per_stage": 1, "max_steps": 2}
    return SRDConfig(**{**usual, **fields})


def make(tokenizer: PreTrainedTokenizerFast, fields: Mapping[str, Any] = {}, **options: Any) -> SRDTrainer:
    given: dict[str, Any] = {
        "model": tiny.tiny_model("llama"),
        "teacher_model": tiny.tiny_model("llama_untied", seed=1, width=24, vocab=V_T),
        "train_dataset": list(SAMPLES),
        "eval_dataset": list(SAMPLES[:5]),
    }
    return SRDTrainer(**{**given, **options}, args=config(**fields), processing_class=tokenizer)


# Dtypes.


def watched(act: Callable[[], Any]) -> Products:
    return products_of(act, V_S, V_T)


def adapters() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"])


WAYS: dict[str, tuple[dict[str, Any], Callable[[SRDTrainer], Any]]] = {
    "training": ({}, lambda t: t.train()),
    "padded": ({"padding_free": False}, lambda t: t.train()),
    "micro-batches": ({"max_tokens_per_batch": 40}, lambda t: t.train()),
    "accumulation": ({"gradient_accumulation_steps": 2}, lambda t: t.train()),
    "checkpointing": ({"gradient_checkpointing": True}, lambda t: t.train()),
    "evaluation": ({}, lambda t: t.evaluate()),
    "student's entropy": ({"position_selection": "topk_student_entropy"}, lambda t: t.train()),
    "teacher's entropy": ({"position_selection": "topk_teacher_entropy"}, lambda t: t.train()),
    "reverse KL": ({"position_selection": "topk_reverse_kl"}, lambda t: t.train()),
    "confidence gap": ({"position_selection": "topk_student_confidence_gap"}, lambda t: t.train()),
    "classes": ({"class_sampling": 8, "divergence": "forward_kl"}, lambda t: t.train()),
    "shown positions": ({"position_selection": "curriculum"}, lambda t: t.positions_of(SAMPLES[0])),
}


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_products_of_both_heads_run_in_the_dtype_of_training(
    way: str, lora: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    fields, act = WAYS[way]
    trainer = make(tokenizer, {"bf16": True, **fields}, peft_config=adapters() if lora else None)
    assert next(trainer.model.parameters()).dtype == torch.float32
    products = watched(lambda: act(trainer))
    assert products.dtypes(V_S) == {torch.bfloat16}, products.seen[V_S]
    # Beside drawn classes and the student's positions shown, nothing else of the teacher is there.
    assert products.dtypes(V_T) == ({torch.bfloat16} if way != "shown positions" else set()), products.seen[V_T]
    if way in ("training", "padded", "accumulation"):
        steps = 2 * int(fields.get("gradient_accumulation_steps", 1))
        assert sum(products.seen[V_S].values()) == (2 if lora else 3) * steps, "logits, hidden gradient, head gradient"
        assert sum(products.seen[V_T].values()) == steps


def test_samples_are_chosen_in_the_dtype_of_training(tokenizer: PreTrainedTokenizerFast) -> None:
    products = watched(lambda: make(tokenizer, {"bf16": True, "sample_selection": "topk_student_entropy"}))
    bfloat16 = sum(n for dtypes, n in products.seen[V_S].items() if set(dtypes) == {torch.bfloat16})
    # The others are of `check_head`, which proves the float32 model.
    assert bfloat16 == 1, products.seen[V_S]


@pytest.mark.parametrize("kind", ["hidden", "topk", "sampled"])
def test_products_beside_a_cache(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    fields = {"bf16": True, "teacher_cache": "cache", "teacher_cache_kind": kind, "teacher_cache_k": 8}
    trainer = make(tokenizer, {**fields, "divergence": "forward_kl"})
    products = watched(trainer.train)
    assert products.dtypes(V_S) == {torch.bfloat16}
    assert products.dtypes(V_T) == ({torch.bfloat16} if kind == "hidden" else set())


def test_float32_logits_of_bfloat16_products(tokenizer: PreTrainedTokenizerFast) -> None:
    """The logits are not rounded; the products that follow them are of bfloat16 factors again."""
    trainer = make(tokenizer, {"bf16": True, "logits_dtype": "float32"})
    products = watched(trainer.train)
    # On a CPU an unrounded product of bfloat16 factors is one of their float32 copies.
    assert set(products.seen[V_T]) == {(torch.float32,) * 3}
    assert set(products.seen[V_S]) == {(torch.float32,) * 3, (torch.bfloat16,) * 3}
    with pytest.raises(UserError, match="logits_dtype must be null or 'float32', got 'float64'"):
        config(logits_dtype="float64")


def test_float32_training_stays_float32(tokenizer: PreTrainedTokenizerFast) -> None:
    products = watched(make(tokenizer).train)
    assert products.dtypes(V_S) == products.dtypes(V_T) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_computes_each_softmax_once(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the trainer's way too, in the dtype of training; `test_kernels.py` has what a pass is."""
    passes, block = Counter[tuple[torch.dtype, bool]](), rows.eager_block

    def counted(numbers: Any, student_RV: Tensor, *others: Any) -> Any:
        with Wide(len(student_RV) * V_S // 2) as wide:
            found = block(numbers, student_RV, *others)
        trains = others[-1] is not None
        passes[student_RV.dtype, trains] = max(passes[student_RV.dtype, trains], wide.passes)
        return found

    monkeypatch.setattr(rows, "eager_block", counted)
    make(tokenizer, {"bf16": dtype == torch.bfloat16, "divergence": "forward_kl"}).train()
    assert {kind for kind, trains in passes if trains} == {dtype}
    # Logits in bfloat16 are widened first, those of both sides.
    assert 20 < passes[dtype, True] <= (27 if dtype == torch.float32 else 29)


# Waiting.

# Of transformers: the mask of a padded batch asks whether anything is padded.
OF_PADDED = ("masking_utils.py",)


class Between(TrainerCallback):
    """On from the end of step 2 to the end of step 12."""

    def __init__(self, mode: Waits) -> None:
        self.mode = mode

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (2, 12):
            self.mode.on = state.global_step == 2


def waits_of(tokenizer: PreTrainedTokenizerFast, fields: Mapping[str, Any], **options: Any) -> Waits:
    mode = Waits()
    usual = {"max_steps": 13, "logging_steps": 13, "epochs_per_stage": 4, "per_device_train_batch_size": 3}
    trainer = make(tokenizer, {**usual, **fields}, callbacks=[Between(mode)], **options)
    with mode:
        trainer.train()
    assert mode.operations > 1000
    return mode


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 50},
        {"gradient_checkpointing": True},
        {"teacher_cache": "cache"},
        {"teacher_cache": "cache", "teacher_cache_kind": "topk"},
        {"position_selection": "topk_student_entropy"},
        {"position_selection": "curriculum"},
        {"class_sampling": 8, "divergence": "forward_kl"},
        {"max_grad_norm": 0.0},
        {"logits_dtype": "float32", "bf16": True},
    ],
    ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()) or "default",
)
def test_nothing_is_waited_for_between_two_logs(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    assert not waits_of(tokenizer, fields).found


@pytest.mark.parametrize("fields", [{}, {"max_tokens_per_batch": 50}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_thread_of_the_steps_reads_no_rows(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, readers = OpenFile.read, set[str]()

    def watched_read(self: OpenFile, *args: Any) -> None:
        readers.add(threading.current_thread().name)
        read(self, *args)

    trainer = make(tokenizer, {"teacher_cache": "cache", **fields})
    monkeypatch.setattr(OpenFile, "read", watched_read)
    trainer.train()
    assert readers == {"srd-fast-rows_0"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(
    "fields", [{}, {"bf16": True}, {"teacher_cache": "cache"}, {"max_tokens_per_batch": 50}], ids=str
)
def test_a_gpu_is_not_waited_for(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """PyTorch itself says where it waits; from the end of step 2 to that of step 12 it is never."""

    class Says(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (2, 12):
                torch.cuda.set_sync_debug_mode("error" if state.global_step == 2 else "default")

    usual = {"max_steps": 13, "logging_steps": 13, "epochs_per_stage": 4, "per_device_train_batch_size": 3}
    trainer = make(tokenizer, {**usual, **fields, "use_cpu": False}, callbacks=[Says()])
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 13


def test_adapters_wait_for_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not waits_of(tokenizer, {}, peft_config=adapters()).found


def test_padded_batches_wait_in_transformers_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    found = waits_of(tokenizer, {"padding_free": False}).found
    assert {place.partition(":")[0] for _, place in found} <= set(OF_PADDED), found


@pytest.mark.parametrize("policy", ["global_threshold", "stochastic"])
def test_policies_that_choose_by_number_look_once(policy: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """How many these choose follows from the values, so the host has to ask: once a batch."""
    found = waits_of(tokenizer, {"position_selection": policy}).found
    if version.parse(torch.__version__) < version.parse("2.13"):  # 2.8 looks whether its quantile is one
        found.pop(("equal", "positions.py:select"), None)
    assert dict(found) == {("nonzero", "positions.py:select"): 10}


@pytest.mark.parametrize("flatten", [False, True])
def test_rows_that_travel_are_those_that_would_be_found(flatten: bool) -> None:
    samples = [
        *SAMPLES[:5],
        {"sample_id": "silent", "input_ids": [5, 6, 7], "labels": [tiny.IGNORE] * 3},
        {"sample_id": "one", "input_ids": [5], "labels": [5]},
        *SAMPLES[5:8],
    ]
    batch = DistillationCollator(0, flatten)(samples)
    found = with_loss_rows(batch)
    states_BLD = torch.randn(*batch["labels"].shape, 3)
    assert torch.equal(rows_with_loss(states_BLD, found), rows_with_loss(states_BLD, batch))
    assert torch.equal(labels_with_loss(found), labels_with_loss(batch))
    assert found["loss_counts"] == [sum(x != tiny.IGNORE for x in s["labels"][1:]) for s in samples]
    if flatten:
        assert found["sample_lengths"] == [len(s["input_ids"]) for s in samples]


def test_a_collator_of_ones_own_gets_its_rows_too(tokenizer: PreTrainedTokenizerFast) -> None:
    """Padded at the front, which no collator of this package does."""

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = tiny.collate(samples)
        shift = [int(n) - batch["labels"].shape[1] for n in batch["attention_mask"].sum(1)]
        return {k: torch.stack([row.roll(-n) for row, n in zip(x, shift)]) for k, x in batch.items()}

    losses = []
    for collator in (None, collate):
        trainer = make(tokenizer, {"logging_steps": 1, "optim": "sgd"}, data_collator=collator)
        trainer.train()
        losses.append([e["divergence"] for e in trainer.state.log_history if "divergence" in e])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("device", "given", "steps", "max_steps", "compiles"),
    [
        ("cuda", None, 1000, -1, True),
        ("cuda", None, 999, -1, False),
        ("cuda", None, 5000, 999, False),
        ("cuda", None, 5000, 1000, True),
        ("cuda", False, 5000, -1, False),
        ("cuda", True, 10, -1, True),
        ("cpu", None, 5000, -1, False),
        ("cpu", True, 10, -1, True),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(device: str, given: Any, steps: int, max_steps: int, compiles: bool) -> None:
    args = SimpleNamespace(torch_compile=given, max_steps=max_steps, device=torch.device(device))
    assert preparation.compiles(args, steps) is compiles  # type: ignore[arg-type]
    assert config().torch_compile is None


def test_what_torch_compile_takes() -> None:
    with pytest.raises(UserError, match="torch_compile must be true, false or null, got 'sometimes'"):
        config(torch_compile="sometimes")


# Steps that are not finite.


class Breaks(TrainerCallback):
    """NaN in one gradient of step `step`, from 0; weights and optimizer state before it."""

    def __init__(self, step: int) -> None:
        self.step, self.before, self.handle = step, dict[str, Any](), None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            model, optimizer = kwargs["model"], kwargs["optimizer"]
            self.before = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})
            self.handle = list(model.parameters())[3].register_hook(lambda g: g * torch.nan)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            self.handle.remove()


@pytest.fixture
def slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host hears of a step only where it waits for the device, as on a GPU whose queue is long."""
    look = StepCheck.look
    monkeypatch.setattr(StepCheck, "look", lambda self, wait=False: look(self) if wait else None)


@pytest.mark.parametrize("ends", ["log", "save", "evaluate", "end"])
@pytest.mark.usefixtures("slow_device")
def test_a_bad_step_heard_of_late_has_moved_nothing(
    ends: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"output_dir": str(tmp_path), "logging_steps": 50, "max_steps": 9, "epochs_per_stage": 3}
    fields |= {"weight_decay": 0.1, "logging_strategy": "no" if ends != "log" else "steps"}
    fields |= {"log": {"logging_steps": 7}, "save": {"save_strategy": "steps", "save_steps": 7}}.get(ends, {})
    fields |= {"eval_strategy": "steps", "eval_steps": 7} if ends == "evaluate" else {}
    breaks = Breaks(step=4)
    trainer = make(tokenizer, fields, callbacks=[breaks])
    with pytest.raises(NotFiniteError, match=r"^step 5: the norm of the gradient is nan \(stage 1, temperature 1"):
        trainer.train()
    assert trainer.state.global_step == (9 if ends == "end" else 7)
    assert not (tmp_path / "checkpoint-7").exists()
    optimizer: Any = trainer.optimizer
    assert skips_on_the_device(getattr(optimizer, "optimizer", optimizer))
    assert breaks.before["optimizer"]
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, breaks.before["model"][name]), name
    for i, state in optimizer.state_dict()["state"].items():
        for name, x in state.items():
            assert torch.equal(x, breaks.before["optimizer"][i][name]), (i, name)
    assert not hasattr(getattr(optimizer, "optimizer", optimizer), "found_inf")


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.usefixtures("slow_device")
def test_other_optimizers_wait_for_the_check(optim: str, tokenizer: PreTrainedTokenizerFast) -> None:
    breaks = Breaks(step=1)
    trainer = make(tokenizer, {"optim": optim, "logging_strategy": "no", "max_steps": 4}, callbacks=[breaks])
    with pytest.raises(NotFiniteError, match=r"^step 2: the norm of the gradient is nan"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert all(torch.equal(x, breaks.before["model"][n]) for n, x in trainer.model.state_dict().items())


def test_the_first_bad_step_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    check = StepCheck(torch.device("cpu"))
    good, bad = torch.tensor(1.5), torch.tensor(torch.inf)
    assert check.look() is None
    assert [check.add(0, good, good).item(), check.add(1, good, good).item()] == [0, 0]
    assert check.look() is None
    assert check.add(2, good, bad).item() == 1
    assert check.add(3, good, good).item() == 1
    assert check.look(wait=True) == (2, 1.5, torch.inf)


# Micro-batches by tokens.


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("most", [24, 40, 100, 10_000])
def test_no_micro_batch_has_more_tokens(most: int, flattened: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 40):
        lengths = torch.randint(1, 25, (count,), generator=generator).tolist()
        parts = divide_by_tokens(lengths, most, flattened)
        assert sorted(i for part in parts for i in part) == list(range(count))
        sizes = [[lengths[i] for i in part] for part in parts]
        tokens = [sum(s) if flattened else max(s) * len(s) for s in sizes]
        assert max(tokens) <= most
        assert all(part == sorted(part) for part in parts)
        if flattened:
            assert len(parts) <= -(-sum(lengths) // most) + (1 if most >= 100 else len(lengths) // 4)
            assert max(tokens) - min(tokens) <= max(lengths)


@contextmanager
def micro_batches_seen(trainer: SRDTrainer) -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    compute = trainer.compute_loss

    def spy(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs)
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy  # type: ignore[method-assign]
    yield seen


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"padding_free": False},
        {"teacher_cache": "cache"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"position_selection": "topk_student_entropy", "position_ratio": 0.4},
        {"bf16": True, "gradient_checkpointing": True},
    ],
    ids=lambda fields: " ".join(f"{k}={v}" for k, v in fields.items()) or "default",
)
def test_a_divided_step_is_the_whole_one(fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    whole = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 8, "logging_steps": 1, **fields}
    weights, logs, counts = [], [], []
    for most in (0, 60):
        trainer = make(tokenizer, {**whole, "max_tokens_per_batch": most})
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        with micro_batches_seen(trainer) as seen:
            trainer.train()
        if most:
            assert max(batch["input_ids"].numel() for batch in seen) <= most
        counts.append(len(seen))
        weights.append({n: p.detach() - before[n] for n, p in trainer.model.named_parameters()})
        logs.append([e for e in trainer.state.log_history if "divergence" in e])
    assert counts[1] > counts[0]
    # bfloat16 rounds each micro-batch's share of a gradient before they are added.
    tolerance = 0.05 if fields.get("bf16") else 1e-5
    for name, change in weights[0].items():
        if change.norm() > 1e-4:
            rounding = 2**-23 * trainer.model.get_parameter(name).norm()  # of the weights, in which the change is seen
            assert (weights[1][name] - change).norm() <= tolerance * change.norm() + rounding, name
    for a, b in zip(*logs):
        for name in ("loss", "divergence", "cross_entropy", "entropy", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=max(1e-5, tolerance / 5)), name
        assert b["tokens_per_second"] > 0


def test_weights_are_cast_once_a_step_and_not_once_a_micro_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten._to_copy and kwargs and kwargs.get("dtype") is torch.bfloat16:
                self.count += args[0].data_ptr() in pointers
            return func(*args, **(kwargs or {}))

    counts = []
    for most in (0, 60):
        fields = {"bf16": True, "per_device_train_batch_size": 8, "max_tokens_per_batch": most, "max_steps": 1}
        trainer = make(tokenizer, fields)
        layers = trainer.model.model.layers
        pointers = {m.weight.data_ptr() for m in layers.modules() if isinstance(m, torch.nn.Linear)}
        with Casts() as casts:
            trainer.train()
        counts.append(casts.count)
    assert counts == [len(pointers), len(pointers)]


def test_kept_casts_do_not_outlive_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make(tokenizer, {"bf16": True, "per_device_train_batch_size": 8, "max_tokens_per_batch": 60})
    trainer.compute_loss = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()


def test_a_sample_above_the_limit_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    longest = max(SAMPLES, key=lambda s: len(s["input_ids"]))
    length = len(longest["input_ids"])
    message = f"max_tokens_per_batch is {length - 1} but sample '{longest['sample_id']}' has {length} tokens; raise it"
    with pytest.raises(UserError, match=message):
        make(tokenizer, {"max_tokens_per_batch": length - 1})
    make(tokenizer, {"max_tokens_per_batch": length})


def test_micro_batches_carry_the_teachers_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    teacher = tiny.tiny_model("llama_untied", seed=1, width=24, vocab=V_T)
    build_teacher_cache(teacher, SAMPLES, tmp_path / "cache", progress=False)
    trainer = make(tokenizer, {"max_tokens_per_batch": 60}, teacher_model=TeacherCache(tmp_path / "cache"))
    assert isinstance(trainer.data_collator, TokenBatches)
    for part in trainer.data_collator(SAMPLES[:8])[MICRO_BATCHES]:
        assert len(part["teacher"].to("cpu")["hidden"]) == len(part["loss_labels"]) == sum(part["loss_counts"])
