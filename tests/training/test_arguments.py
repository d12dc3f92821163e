"""Every field of `transformers.TrainingArguments` does something in a training here, or says why not."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast, TrainingArguments

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.errors import FaultsError
from srd_fast.training import preparation
from srd_fast.training.arguments import CHOICES, RANGES, REFUSED

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")

TESTS = Path(__file__).resolve().parents[1]

# Fields that this library has a hand in -> the test of what they do.
TESTED = {
    "output_dir": "test_what_is_measured_and_kept_when",
    "per_device_train_batch_size": "test_each_step_sees_the_samples_of_the_curriculum",
    "max_steps": "test_a_run_cut_short_says_so",
    "learning_rate": "test_the_optimizer_is_the_one_that_was_asked_for",
    "warmup_steps": "test_the_learning_rate_rises_and_falls_in_each_stage",
    "optim": "test_other_optimizers_wait_for_the_check",
    "optim_args": "test_the_optimizer_is_the_one_that_was_asked_for",
    "optim_target_modules": "test_an_optimizer_that_cannot_be_is_refused",
    "weight_decay": "test_the_optimizer_is_the_one_that_was_asked_for",
    "adam_beta1": "test_the_optimizer_is_the_one_that_was_asked_for",
    "adam_beta2": "test_the_optimizer_is_the_one_that_was_asked_for",
    "adam_epsilon": "test_the_optimizer_is_the_one_that_was_asked_for",
    "gradient_accumulation_steps": "test_accumulated_gradients_are_those_of_the_whole_batch",
    "bf16": "test_products_of_both_heads_run_in_the_dtype_of_training",
    "fp16": "test_products_of_both_heads_run_in_the_dtype_of_training",
    "activation_checkpointing": "test_gradient_checkpointing_gives_the_same_gradients",
    "activation_checkpointing_kwargs": "test_gradient_checkpointing_stays_outside",
    "gradient_checkpointing": "test_gradient_checkpointing_gives_the_same_gradients",
    "gradient_checkpointing_kwargs": "test_gradient_checkpointing_stays_outside",
    "torch_compile": "test_long_runs_on_a_gpu_are_compiled",
    "torch_compile_backend": "test_the_compiler_gets_its_settings",
    "torch_compile_mode": "test_the_compiler_gets_its_settings",
    "use_liger_kernel": "test_a_package_that_is_not_there_is_told",
    "neftune_noise_alpha": "test_noise_changes_the_weights",
    "logging_strategy": "test_what_is_measured_and_kept_when",
    "logging_steps": "test_what_is_measured_and_kept_when",
    "logging_first_step": "test_what_is_measured_and_kept_when",
    "include_num_input_tokens_seen": "test_input_tokens_are_counted",
    "report_to": "test_a_package_that_is_not_there_is_told",
    "eval_strategy": "test_what_is_measured_and_kept_when",
    "eval_steps": "test_what_is_measured_and_kept_when",
    "eval_delay": "test_what_is_measured_and_kept_when",
    "eval_on_start": "test_what_is_measured_and_kept_when",
    "per_device_eval_batch_size": "test_batches_of_evaluation_have_a_size_of_their_own",
    "save_strategy": "test_what_is_measured_and_kept_when",
    "save_steps": "test_what_is_measured_and_kept_when",
    "save_total_limit": "test_what_is_measured_and_kept_when",
    "save_only_model": "test_what_is_measured_and_kept_when",
    "push_to_hub": "test_a_hub_that_does_not_answer_is_found_before_training",
    "load_best_model_at_end": "test_the_best_model_is_the_closest_to_the_teacher",
    "metric_for_best_model": "test_the_best_model_is_the_closest_to_the_teacher",
    "greater_is_better": "test_less_is_better_of_distances_and_losses",
    "seed": "test_data_seed_decides_the_order",
    "data_seed": "test_data_seed_decides_the_order",
    "accelerator_config": "test_samples_that_the_curriculum_does_not_count_are_refused",
    "parallelism_config": "test_samples_that_the_curriculum_does_not_count_are_refused",
    "dataloader_num_workers": "test_the_loader_is_as_it_was_asked_for",
    "dataloader_persistent_workers": "test_the_loader_is_as_it_was_asked_for",
    "dataloader_prefetch_factor": "test_the_loader_is_as_it_was_asked_for",
    "dataloader_multiprocessing_context": "test_the_loader_is_as_it_was_asked_for",
    "remove_unused_columns": "test_a_collator_of_ones_own_may_see_all_columns",
    "average_tokens_across_devices": "test_two_processes_end_in_the_weights_of_one",
    "fsdp": "test_weights_that_only_one_process_has_are_refused",
    "fsdp_config": "test_weights_that_only_one_process_has_are_refused",
    "disable_tqdm": "test_a_training_on_a_terminal_is_a_bar",
    "prediction_loss_only": "test_what_metrics_do_not_get_is_not_there",
    "include_for_metrics": "test_metrics_of_ones_own_get_classes_instead_of_logits",
    "deepspeed": "test_a_package_that_is_not_there_is_told",
}
_IN_STEP = "transformers' own training step or loop, in which this library's loss is called"
_CALLBACK = "a callback or an integration of transformers, which sees steps and logs as it does there"
_HUB = "transformers' own upload of the checkpoints that it wrote"
_PROCESSES = "accelerate's and torch's, when the student is wrapped for many processes"
_SCRIPT = "a flag for scripts, which transformers' Trainer does not read either"
LEFT_ALONE = {
    **dict.fromkeys(("max_grad_norm", "torch_empty_cache_steps", "debug", "skip_memory_metrics"), _IN_STEP),
    **dict.fromkeys(("full_determinism", "restore_callback_states_from_checkpoint"), _IN_STEP),
    **dict.fromkeys(("tf32", "use_cpu"), "set for the whole process when the arguments are made"),
    **dict.fromkeys(("log_on_each_node", "logging_nan_inf_filter", "log_level", "log_level_replica"), _CALLBACK),
    **dict.fromkeys(("run_name", "project", "trackio_space_id", "trackio_bucket_id"), _CALLBACK),
    **dict.fromkeys(("trackio_static_space_id", "enable_jit_checkpoint"), _CALLBACK),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"), _HUB),
    **dict.fromkeys(("hub_revision", "save_on_each_node"), _HUB),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _PROCESSES),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank"), _PROCESSES),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint"), _SCRIPT),
    "liger_kernel_config": "goes with use_liger_kernel: kernels that transformers puts into the student's layers",
    "dataloader_drop_last": "every batch of a curriculum is whole, so there is none to drop",
    "dataloader_pin_memory": "torch's loader pins where there is a GPU",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def config(**fields: Any) -> SRDConfig:
    usual: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    usual |= {"per_device_train_batch_size": 4, "epochs_per_stage": 1, "save_strategy": "no", "logging_steps": 1}
    return SRDConfig(**{**usual, **fields})


def make(tokenizer: PreTrainedTokenizerFast, data_collator: Any = None, **fields: Any) -> SRDTrainer:
    return SRDTrainer(
        model=tiny.tiny_model("llama", layers=1),
        teacher_model=tiny.tiny_model("llama", layers=1, seed=1),
        args=config(**fields),
        train_dataset=tiny.tiny_samples(16),
        eval_dataset=tiny.tiny_samples(5, seed=3),
        processing_class=tokenizer,
        teacher_tokenizer=tokenizer,
        data_collator=data_collator,
    )


def test_every_field_is_in_one_of_the_tables() -> None:
    theirs = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    tables = [*TESTED, *REFUSED, *LEFT_ALONE]
    assert theirs - set(tables) == set(), "does it do something here?"
    assert {name for name in tables if tables.count(name) > 1} == set()
    assert set(RANGES) <= theirs | {"ddp_bucket_cap_mb"}
    assert set(CHOICES) & set(REFUSED) == set()
    tests = {
        name for file in TESTS.rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert set(TESTED.values()) <= tests


# Refused


def other_than(accepted: tuple[Any, ...]) -> Any:
    first = accepted[0]
    return {bool: lambda: not first, int: lambda: first + 2, str: lambda: "other", type(None): lambda: {"x": 1}}[
        type(first)
    ]()


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_curriculum_cannot_do_is_refused(name: str) -> None:
    if name not in {f.name for f in dataclasses.fields(TrainingArguments)}:
        pytest.skip("not a field of this version")
    special = {"lr_scheduler_type": "linear", "train_sampling_strategy": "group_by_length", "label_names": ["y"]}
    value = special.get(name, other_than(REFUSED[name].accepted))
    with pytest.raises(FaultsError) as error:
        config(**{name: value})
    assert str(error.value).startswith(f"{name} is {value!r}, but ")
    assert error.value.faults[0].names == (name,)
    for fine in REFUSED[name].accepted:
        config(**{name: fine})


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range_are_refused(name: str) -> None:
    low, high = RANGES[name]
    for value in [*([] if low is None else [low - 1]), *([] if high is None else [high + 1]), float("nan"), "many"]:
        with pytest.raises(UserError, match=f"^{name} must be .*got {value!r}$"):
            config(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_other_words_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} must be .* or .*, got 'perhaps'$"):
        config(**{name: "perhaps"})


def test_all_faults_are_told_at_once() -> None:
    """Those of transformers too, which ends at its first and names no field."""
    with pytest.raises(FaultsError) as error:
        config(skew=3, divergence="kl", eval_strategy="often", save_strategy="sometimes", num_train_epochs=2,
               dataloader_prefetch_factor=2, class_sampling=4)  # fmt: skip
    found = {names for names, _ in error.value.faults}
    assert found == {
        ("skew",), ("divergence",), ("eval_strategy",), ("save_strategy",), ("num_train_epochs",),
        ("dataloader_prefetch_factor",),
    }  # fmt: skip
    assert str(error.value).count("\n") == len(found) - 1


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("accelerator_config", {"split_batches": True}, "split_batches is True"),
        ("accelerator_config", {"dispatch_batches": True}, "dispatch_batches is True"),
        ("accelerator_config", {"even_batches": False}, "even_batches is False"),
        ("parallelism_config", {"cp_size": 2}, "cp_size is 2"),
        ("parallelism_config", {"tp_size": 4}, "tp_size is 4"),
    ],
)
def test_samples_that_the_curriculum_does_not_count_are_refused(field: str, value: Any, words: str) -> None:
    if field == "parallelism_config":
        value = type("Sizes", (), value)()
    with pytest.raises(UserError, match=f"^{field}: {words}, but"):
        config(**{field: value})
    config(accelerator_config={"split_batches": False, "non_blocking": True})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optim": "adamw_8bit"}, "optim is 'adamw_8bit': .*install"),
        ({"optim": "lomo"}, "optim is 'lomo': .*install"),
        ({"report_to": "mlflow"}, "report_to is 'mlflow', which needs .*: pip install mlflow, or set it to none"),
        ({"report_to": ["tensorbord"]}, "unknown report_to 'tensorbord'; did you mean 'tensorboard'"),
        ({"use_liger_kernel": True}, "use_liger_kernel is true, which needs .*: pip install liger-kernel"),
    ],
)
def test_a_package_that_is_not_there_is_told(
    fields: dict[str, Any], words: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=words):
        make(tokenizer, **fields)
    with pytest.raises(UserError, match=r"deepspeed is 'zero\.json': .*deepspeed"):
        config(deepspeed="zero.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optim_args": "momentum=0.9"}, "none of which is for this optimizer: optim is 'adamw_torch_fused'"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim is 'sgd'"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim is 'sgd', with optim_args 'momentum=-1': Invalid"),
        ({"optim_target_modules": ["q_proj"]}, "optim_target_modules is given, but optim is 'adamw_torch_fused'"),
        ({"adam_beta1": 1.0}, "Invalid beta"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(
    fields: dict[str, Any], words: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=words):
        make(tokenizer, **fields)


# Honoured


def test_the_optimizer_is_the_one_that_was_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make(tokenizer, learning_rate=0.25, weight_decay=0.5, adam_beta1=0.6, adam_beta2=0.7, adam_epsilon=0.01)
    groups = trainer.create_optimizer().param_groups
    for group, decay in zip(groups, (0.5, 0.0)):
        found = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
        assert found == {"lr": 0.25, "weight_decay": decay, "betas": (0.6, 0.7), "eps": 0.01}
    trainer = make(tokenizer, optim="sgd", optim_args="momentum=0.3,nesterov=true")
    assert trainer.create_optimizer().param_groups[0]["momentum"] == 0.3


def test_a_run_cut_short_says_so(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps the schedule of the whole one, and what would be a short whole one is in the message."""
    with caplog.at_level(logging.WARNING):
        trainer = make(tokenizer, max_steps=2, learning_rate=1e-2)
        whole = make(tokenizer, learning_rate=1e-2)
    assert "max_steps ends training at step 2 of 4, in stage 1 of 1, at learning rate 0.005" in caplog.text
    assert "set epochs_per_stage to 0.5 instead" in caplog.text
    assert caplog.text.count("max_steps ends") == 1
    trainer.train()
    rates = [x["learning_rate"] for x in trainer.state.log_history if "loss" in x]
    assert rates == [whole.curriculum.learning_rate(step) for step in (0, 1)]
    assert make(tokenizer, epochs_per_stage=0.5).curriculum.total_steps == 2


def test_the_learning_rate_rises_and_falls_in_each_stage(tokenizer: PreTrainedTokenizerFast) -> None:
    trainer = make(tokenizer, warmup_steps=2, learning_rate=0.3, min_learning_rate=0.0)
    assert [trainer.curriculum.learning_rate(step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.15])
    constant = make(tokenizer, learning_rate=0.3, min_learning_rate=0.3)
    assert {constant.curriculum.learning_rate(step) for step in range(4)} == {0.3}


def test_what_is_measured_and_kept_when(tokenizer: PreTrainedTokenizerFast) -> None:
    fields: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3, "eval_on_start": True}
    fields |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_only_model": True}
    trainer = make(tokenizer, output_dir="kept", logging_steps=2, logging_first_step=True, **fields)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_kl" in entry] == [0, 3, 4]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 4]
    assert sorted(path.name for path in Path("kept").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert not any(Path("kept").rglob("optimizer.pt"))
    quiet = make(tokenizer, max_steps=1, logging_strategy="no")
    quiet.train()
    assert not [entry for entry in quiet.state.log_history if "loss" in entry]


def test_noise_changes_the_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [make(tokenizer, max_steps=1, learning_rate=1e-2, neftune_noise_alpha=a) for a in (None, 50.0)]
    for trainer in made:
        trainer.train()
    one, other = (trainer.model.get_input_embeddings().weight for trainer in made)
    assert not torch.equal(one, other)


def test_the_compiler_gets_its_settings(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(preparation, "compile_layers", lambda *_, **options: given.append(options))
    make(tokenizer, torch_compile=True, torch_compile_backend="eager", torch_compile_mode="max-autotune")
    assert [(options["backend"], options["mode"]) for options in given] == [("eager", "max-autotune")]


@pytest.mark.parametrize("most", [0, 40])
@pytest.mark.parametrize("padding_free", [True, False])
def test_input_tokens_are_counted(padding_free: bool, most: int, tokenizer: PreTrainedTokenizerFast) -> None:
    fields = {"padding_free": padding_free, "max_tokens_per_batch": most, "max_steps": 2}
    trainer = make(tokenizer, include_num_input_tokens_seen="non_padding", **fields)
    chosen = list(trainer.curriculum.indices())[:8]
    trainer.train()
    wanted = sum(len(trainer.train_dataset[i]["input_ids"]) for i in chosen)
    assert trainer.state.num_input_tokens_seen == wanted
    if not padding_free and not most:
        padded = make(tokenizer, include_num_input_tokens_seen="all", **fields)
        padded.train()
        lengths = [len(padded.train_dataset[i]["input_ids"]) for i in chosen]
        assert padded.state.num_input_tokens_seen == 4 * max(lengths[:4]) + 4 * max(lengths[4:])


def test_batches_of_evaluation_have_a_size_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    for size, batches in ((2, 3), (5, 1)):
        trainer, seen = make(tokenizer, per_device_eval_batch_size=size), []
        collate = trainer._collate
        trainer._collate = lambda samples, seen=seen, collate=collate: seen.append(len(samples)) or collate(samples)
        trainer.evaluate()
        assert len(seen) == batches
        assert sum(seen) == 5


def test_the_loader_is_as_it_was_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    fields: dict[str, Any] = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    fields |= {"dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "spawn"}
    loader = make(tokenizer, **fields).get_train_dataloader()
    found = (loader.num_workers, loader.persistent_workers, loader.prefetch_factor)
    assert found == (2, True, 3)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert loader.in_order


class Seeing:
    """A collator that notes the columns that it gets."""

    def __init__(self) -> None:
        self.columns: set[str] = set()

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        self.columns |= set(samples[0])
        return dict(tiny.collate(samples))


@pytest.mark.parametrize("removed", [True, False])
def test_a_collator_of_ones_own_may_see_all_columns(removed: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    seeing = Seeing()
    make(tokenizer, seeing, remove_unused_columns=removed, max_steps=1).train()
    assert {"input_ids", "labels"} <= seeing.columns
    assert ("sample_id" in seeing.columns) is not removed
