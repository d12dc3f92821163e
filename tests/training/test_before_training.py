"""What would go wrong at the end of a training shows before its first step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast import SRDConfig, SRDTrainer, UserError
from srd_fast.models import saving
from srd_fast.training.placing import check_fsdp
from srd_fast.training.student import prune_and_warm_up

pytestmark = pytest.mark.usefixtures("quick_collection", "own_folder")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tiny_tokenizer()


def student_of_a_checkpoint() -> PreTrainedModel:
    """With values for sampling, and no word on whether to sample."""
    model = tiny.tiny_model("llama", layers=1)
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    return model


def trainer(tokenizer: PreTrainedTokenizerFast, student: PreTrainedModel | None = None, **fields: Any) -> SRDTrainer:
    usual: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    usual |= {"per_device_train_batch_size": 4, "epochs_per_stage": 1, "save_strategy": "no"}
    return SRDTrainer(
        model=student or student_of_a_checkpoint(),
        teacher_model=tiny.tiny_model("llama", seed=1),
        args=SRDConfig(**{**usual, **fields}),
        train_dataset=tiny.tiny_samples(8),
        eval_dataset=tiny.tiny_samples(4),
        processing_class=tokenizer,
    )


def shipped(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "generation_config.json").read_text()))


def test_checkpoints_and_the_student_keep_what_its_checkpoint_said(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = trainer(tokenizer, save_strategy="steps", save_steps=1)
    training.train()
    training.save_model("end")
    for folder in ("out/checkpoint-1", "out/checkpoint-2", "end"):
        found = shipped(tmp_path / folder)
        assert (found["temperature"], found["top_p"], found["do_sample"]) == (0.9, 0.6, True)
        assert found["eos_token_id"] in (0, [0])
    assert caplog.text.count("it is mended: do_sample=True, because of temperature=0.9, top_p=0.6") == 1
    assert {p.name for p in Path("out").iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_a_student_cut_out_of_such_a_teacher_can_be_saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny.tiny_model("llama", max_position_embeddings=512).save_pretrained("teacher")
    tokenizer.save_pretrained("teacher")
    Path("teacher/generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": [0, 7]}')
    prune_and_warm_up("teacher", tmp_path / "deep" / "student", layers=1)
    found = shipped(tmp_path / "deep" / "student")
    assert (found["temperature"], found["do_sample"], found["eos_token_id"]) == (0.9, True, [0, 7])


def with_odd_config() -> PreTrainedModel:
    model = student_of_a_checkpoint()
    model.config.extra = object()
    return model


def with_odd_end() -> PreTrainedModel:
    model = student_of_a_checkpoint()
    model.generation_config.eos_token_id = object()
    return model


@pytest.mark.parametrize("odd", [with_odd_config, with_odd_end])
def test_a_student_that_cannot_be_saved_is_not_trained(
    odd: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = trainer(tokenizer, odd())
    monkeypatch.setattr(training, "training_step", lambda *_: pytest.fail("a step is made"))
    with pytest.raises(UserError, match=r"the student could not be saved after training: its (generation )?config: "):
        training.train()


def test_a_tokenizer_that_cannot_be_saved_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tiny.tiny_tokenizer()
    training = trainer(odd, save_strategy="steps")
    odd.init_kwargs["extra"] = object()
    monkeypatch.setattr(training, "training_step", lambda *_: pytest.fail("a step is made"))
    with pytest.raises(UserError, match="could not be saved in 'out' after training: the tokenizer: "):
        training.train()


def test_a_hub_that_does_not_answer_is_found_before_training(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whoami(self: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(saving.HfApi, "whoami", whoami)
    with pytest.raises(UserError, match=r"push_to_hub is set, but the model hub does not answer .*no route to host"):
        trainer(tokenizer, push_to_hub=True)


# The best model


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("kl", False),
        ("eval_kl", False),
        ("cross_entropy", False),
        ("eval_cross_entropy", False),
        ("loss", False),
        ("divergence", False),
        ("perplexity", False),
        ("reverse_kl", False),
        ("rouge_l", True),
        ("accuracy", True),
        ("exact_match", True),
    ],
)
def test_less_is_better_of_distances_and_losses(metric: str, greater: bool) -> None:
    args = SRDConfig(output_dir="out", use_cpu=True, metric_for_best_model=metric)
    assert args.greater_is_better is greater
    for given in (True, False):
        assert SRDConfig(
            output_dir="out", use_cpu=True, metric_for_best_model=metric, greater_is_better=given
        ).greater_is_better is given  # fmt: skip
    assert SRDConfig(output_dir="out", use_cpu=True).greater_is_better is None


@pytest.mark.parametrize("metric", ["rouge_l", "eval_perplexity", "kll"])
def test_a_best_model_by_what_is_not_measured_is_refused(metric: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=rf"unknown metric_for_best_model '{metric}'.*cross_entropy, kl, loss"):
        trainer(tokenizer, metric_for_best_model=metric)


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"cpu_ram_efficient_loading": True}, True),
        ({"cpu_ram_efficient_loading": "true", "version": 1}, True),
        ({"fsdp_cpu_ram_efficient_loading": True}, True),
        ({"cpu_ram_efficient_loading": False}, False),
        ({}, False),
    ],
)
def test_weights_that_only_one_process_has_are_refused(
    config: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SRDConfig(output_dir="out", use_cpu=True, report_to="none", fsdp=True, fsdp_config=dict(config))
    check_fsdp(args)  # one process has them all
    monkeypatch.setattr(SRDConfig, "world_size", 2)
    if not refused:
        return check_fsdp(args)
    with pytest.raises(UserError, match=r"cpu_ram_efficient_loading is true.* set it to false"):
        check_fsdp(args)
