"""No key about answers, or about what a teacher reads, is accepted where it would do nothing."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from srd_fast.errors import FaultsError, UserError
from srd_fast.run.config import RunConfig
from srd_fast.run.modes import fine_tuning
from srd_fast.run.pipeline import execute
from srd_fast.run.steps import Run, check_rows_of_run
from srd_fast.training.config import SRDConfig
from srd_fast.training.trainer import SRDTrainer

SAMPLED = {"engine": "transformers", "temperature": 1.0, "max_new_tokens": 2}
LIVE_SELF = {"mode": "self", "privileged_template": "{prompt} Hint: {response}", "student": "TEACHER"}


def told(settings: dict[str, Any], folder: Path) -> list[str]:
    """The lines of what a run refuses before any work."""
    with pytest.raises((UserError, FaultsError)) as found:
        execute(RunConfig(**{**settings, "output_dir": str(folder)}), say=lambda text: None)
    assert not folder.exists()
    return [fault.text for fault in found.value.faults] if isinstance(found.value, FaultsError) else [str(found.value)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": {"max_new_tokens": 5}}, "distill: max_new_tokens is 5, but nothing is answered"),
        ({"distill": {"generation_temperature": 0.5}}, "generation_temperature is 0.5, but nothing is answered"),
        ({"distill": {"generation_engine": "ray"}}, "generation_engine is 'ray', but nothing is answered"),
        ({"distill": {"generation_options": {"a": 1}}}, "generation_options is {'a': 1}, but nothing is answered"),
        ({"distill": {"sync_every": 4}}, "sync_every is 4, but nothing is answered"),
        (
            {"distill": {"eval_generate": True, "sync_every": 4, "generation_engine": "ray"}},
            "sync_every is 4, but nothing is answered while the student is trained; leave it out, or set lmbda, seq_kd",
        ),
        ({"mode": "on_policy", "distill": {"sync_every": 4}}, "'transformers' answers with the student's weights"),
        ({"mode": "on_policy", "distill": {"lmbda": 1, "seq_kd": True}}, "lmbda is 1 and leaves it no step"),
        ({"mode": "sft", "distill": {"seq_kd": True}}, "mode 'sft' has no teacher that could answer"),
        ({"mode": "seqkd", "distill": {"seq_kd": True}}, "mode 'seqkd' trains on answers made beforehand"),
        ({"mode": "offline_on_policy", "distill": {"seq_kd": True}}, "trains on answers made beforehand"),
        ({"mode": "sft", "distill": {"standardize_logits": True}}, "mode 'sft' has no divergence"),
        ({"distill": {"replay_buffer": 10}}, "lmbda is 0, so that nothing comes into it"),
        ({"distill": {"eval_generate": True, "eval_strategy": "no"}}, "so that nothing is evaluated while"),
        ({"distill": {"eval_generate_rows": 3}}, "eval_generate is false"),
        ({"distill": {"self_ema_decay": 0.9}}, "in mode 'kd' the teacher is not the student"),
        ({"max_privileged_length": 99}, "config: max_privileged_length is 99, and without a privileged_template"),
        ({"columns": {"privileged": "hints"}}, "config: columns has privileged: hints, and there is no"),
        ({**LIVE_SELF, "columns": {"privileged": "hints"}}, "privileged_template is '{prompt} Hint: {response}', so"),
        ({"reflect": {**SAMPLED, "judge": "numeric_match"}}, "judge is 'numeric_match', and attempts is 1"),
        ({"mode": "sft", "cache": {"log_sum_exp": True}}, "cache.log_sum_exp is true, and a run of mode 'sft'"),
        (
            {"mode": "on_policy", "distill": {"lmbda": 1}, "cache": {"engine": "vllm"}},
            "cache.engine is 'vllm', and a run of mode 'on_policy' with these settings keeps none",
        ),
    ],
    ids=lambda x: None if isinstance(x, str) else "+".join(x),
)
def test_a_key_that_would_do_nothing_is_refused(
    changes: dict[str, Any], words: str, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    given = {key: str(tiny_teacher_folder) if value == "TEACHER" else value for key, value in changes.items()}
    lines = told({**tiny.tiny_run(tiny_teacher_folder), "reflect": SAMPLED, **given}, tmp_path / "run")
    assert any(words in line for line in lines), lines
    assert len(lines) == 1, lines


def test_fine_tuning_first_takes_none_of_them_over(tiny_teacher_folder: Path) -> None:
    """`srd-fast sft` begins from the config of another run, in which they mean something."""
    config = RunConfig(
        **{
            **tiny.tiny_run(tiny_teacher_folder),
            "student": str(tiny_teacher_folder),
            "mode": "self",
            "privileged_template": "{privileged}",
            "max_privileged_length": 99,
            "columns": {"privileged": "hints", "instruction": "q", "output": "a"},
            "cache": {"kind": "live"},
            "distill": {
                "lmbda": 0.5, "seq_kd": True, "max_new_tokens": 5, "generation_engine": "ray", "sync_every": 2,
                "generation_temperature": 0.5, "self_ema_decay": 0.9, "standardize_logits": True, "learning_rate": 1e-3,
            },
        }
    )  # fmt: skip
    made = fine_tuning(config, "teacher")
    assert made.distill == {"learning_rate": 1e-3}
    assert (made.columns, made.max_privileged_length) == ({"instruction": "q", "output": "a"}, 2048)
    kept = {"eval_generate": True, "max_new_tokens": 5}
    config = config.model_copy(update={"distill": kept})
    assert fine_tuning(config, "teacher").distill == kept


def test_python_refuses_them_too(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for fields, words in (
        ({"max_privileged_length": 99}, "max_privileged_length is 99, and without a privileged_template"),
        ({"max_new_tokens": 5}, "max_new_tokens is 5, but nothing is answered"),
    ):
        with pytest.raises(UserError, match=words):
            SRDConfig(output_dir=str(tmp_path), use_cpu=True, **fields)  # type: ignore[arg-type]
    args = SRDConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    rows = [{"instruction": "a", "output": "b", "hint": "c"}]
    with pytest.raises(UserError, match="columns has privileged: hint, and there is no privileged_template"):
        SRDTrainer(tiny_model, tiny_model, args, rows, processing_class=tiny_tokenizer, columns={"privileged": "hint"})


WORDS = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "maybe", "never", "always", "so")]
LONG = {"instruction": "Say much. " * 20, "output": "much"}


def settings_of(rows: list[dict[str, str]], teacher: Path, folder: Path) -> dict[str, Any]:
    for name, some in (("rows", rows), ("held_out", WORDS[:2])):
        (folder / f"{name}.json").write_text(json.dumps(some))
    settings = {**tiny.tiny_run(teacher), "reflect": SAMPLED, "max_rows": None, "output_dir": str(folder / "run")}
    return {**settings, "data": str(folder / "rows.json"), "validation": str(folder / "held_out.json")}


@pytest.mark.parametrize("key", ["reflect.signals", "reflect.judge", "evaluate.metrics", "distill.eval_metrics"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("execution", "runs the tests of a row, and none of the {} rows has any"),
        ("numeric_match", "compares final numbers, and no reference of the {} rows has a number"),
    ],
)
def test_what_no_row_has_is_told_as_soon_as_rows_are_read(
    name: str, said: str, key: str, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "reflect.signals": {"reflect": {**SAMPLED, "signals": [name]}},
        "reflect.judge": {"reflect": {**SAMPLED, "signals": ["pass_rate"], "attempts": 2, "judge": name}},
        "evaluate.metrics": {"evaluate": {"metrics": [name]}},
        "distill.eval_metrics": {"distill": {"eval_generate": True, "eval_metrics": [name]}},
    }
    rows = "6 training" if key.startswith("reflect") else "2 validation"
    with pytest.raises(UserError, match=f"config: {key}: '{name}' {said.format(rows)}"):
        execute(RunConfig(**settings_of(WORDS, tiny_teacher_folder, tmp_path) | changes[key]), say=lambda text: None)
    assert (tmp_path / "run" / "data").is_dir()
    assert not (tmp_path / "run" / "start").exists()


def test_rows_too_long_for_a_micro_batch_are_told_where_no_curriculum_can_drop_them(
    tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    settings = settings_of([*WORDS, LONG], tiny_teacher_folder, tmp_path)
    execute(RunConfig(**settings), only="prepare", say=lambda text: None)
    lengths = sorted(map(len, pq.read_table(tmp_path / "run" / "data" / "train.parquet")["input_ids"].to_pylist()))
    assert lengths[-1] > lengths[-2]
    for curate, most, too_long in (
        ({"method": "none"}, lengths[-2], 1),
        ({"keep": 0.5}, lengths[-2], 0),
        ({"keep": 0.5}, lengths[0] - 1, 7),
        ({"keep": "knee"}, lengths[-2], 0),
        ({"method": "none"}, lengths[-1], 0),
    ):
        config = RunConfig(**settings, curate=curate, distill={"max_tokens_per_batch": most})
        run = Run(config, tmp_path / "run", {}, {})
        if too_long:
            words = (
                f"max_tokens_per_batch is {most}, and {too_long} of 7 training rows .* the longest has {lengths[-1]}"
            )
            with pytest.raises(UserError, match=words):
                check_rows_of_run(run)
        else:
            check_rows_of_run(run)
