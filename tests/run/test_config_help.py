"""What a config can say is found: `srd-fast config`, its schema, `srd-fast init`, names of other libraries."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

import srd_fast
from srd_fast.cli import app
from srd_fast.data.quickstart import make_quickstart_rows
from srd_fast.errors import UserError
from srd_fast.models import load_config
from srd_fast.run.config import RunConfig, load_run_config
from srd_fast.run.config_help import config_text, json_schema
from srd_fast.run.distill_fields import DISTILL_FIELDS
from srd_fast.run.steps.settings import training_config
from srd_fast.run.synonyms import SYNONYMS

ROOT = Path(__file__).resolve().parents[2]


def sections() -> dict[str, type[BaseModel]]:
    fields = RunConfig.model_fields.items()
    found = {
        n: f.annotation for n, f in fields if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel)
    }
    return {"": RunConfig, **found}


@pytest.mark.parametrize("every", [False, True])
def test_the_text_is_a_config_of_all_defaults(every: bool, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(config_text(every), encoding="utf-8")
    found, usual = load_run_config(file), RunConfig()
    for name in RunConfig.model_fields:
        assert name == "distill" or getattr(found, name) == getattr(usual, name), name
    assert training_config(found).to_dict() == training_config(usual).to_dict()
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert set(content) == set(RunConfig.model_fields)
    for name, section in sections().items():
        assert not name or set(content[name]) == set(section.model_fields)
    of_device = {"use_cpu", "bf16", "dataloader_pin_memory"}
    assert not every or set(content["distill"]) == DISTILL_FIELDS - of_device
    assert max(map(len, config_text(every).splitlines())) <= 104


def test_every_key_says_what_it_is() -> None:
    for name, section in sections().items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}"
            assert field.description[-1] in ".)", f"{name}.{key}"


def test_the_page_has_the_text() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert f"```yaml\n{config_text()}```" in page, "copy what srd-fast config prints into docs/config.md"


def test_the_schema_knows_every_key() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    distill = schema["properties"]["distill"]
    assert set(distill["properties"]) == DISTILL_FIELDS
    assert distill["additionalProperties"] is False
    assert distill["properties"]["skew"] == {
        "type": "number",
        "default": 0.1,
        "description": "Skew of the skew divergences, 0 to 1.",
    }
    assert distill["properties"]["eval_steps"]["default"] == 25
    assert schema["$defs"]["Curate"]["properties"]["stages"]["minimum"] == 1


# Names of other libraries.


def test_a_synonym_is_no_key_and_means_one() -> None:
    known: dict[str, set[str]] = {name: set(section.model_fields) for name, section in sections().items()}
    known["distill"] = DISTILL_FIELDS
    for section, names in SYNONYMS.items():
        for name, meant in names.items():
            where, _, key = meant.rpartition(".")
            assert name not in known[section], f"{section}.{name}"
            assert key in known[where or section], f"{section}.{name}: {meant}"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("distill.lr=1e-4", "'lr'; did you mean 'learning_rate'"),
        ("distill.num_train_epochs=3", "'num_train_epochs'; did you mean 'epochs_per_stage'"),
        ("distill.batch-size=3", "'batch-size'; did you mean 'per_device_train_batch_size'"),
        ("batch_size=3", "did you mean 'distill.per_device_train_batch_size'"),
        ("curate.num_stages=3", "did you mean 'stages'"),
        ("teacher_model=x", "did you mean 'teacher'"),
        ("distill.temperatur=2", "did you mean 'temperature'"),
        ("epochs_per_stage=3", "did you mean 'distill.epochs_per_stage'"),
        ("layers=4", "did you mean 'init_student.layers'"),
        ("signals=[gap]", "did you mean 'reflect.signals or curate.signals'"),
        ("reflect.keep=0.5", "did you mean 'curate.keep'"),
        ("distill.keep=0.5", "did you mean 'curate.keep'"),
        ("distill.dtype=float32", "did you mean 'dtype at the top level'"),
        ("distill.group_by_length=true", "did you mean 'length_buckets'"),
        ("distill.output_dir=x", "output_dir is set at the top level of the config"),
    ],
)
def test_a_key_of_another_library_is_understood(given: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config(None, [given])
    assert meant in str(caught.value)
    assert "got {" not in str(caught.value)


# The command.


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_the_command_prints_them() -> None:
    assert run("config").stdout == config_text()
    assert run("config", "--all").stdout == config_text(every=True)
    assert json.loads(run("config", "--json-schema").stdout) == json.loads(json.dumps(json_schema()))
    assert run("--version").stdout == f"{srd_fast.__version__}\n"


@pytest.mark.usefixtures("own_folder")
def test_the_example_comes_with_the_package() -> None:
    """A file of that name goes before it."""
    assert load_run_config("quickstart") == load_run_config(ROOT / "examples" / "quickstart.yaml")
    Path("quickstart").write_text("seed: 7\n")
    assert load_run_config("quickstart").seed == 7


@pytest.mark.usefixtures("own_folder")
def test_a_first_config(tiny_teacher_folder: Path) -> None:
    rows = [{"question": r["instruction"], "reply": r["output"]} for r in make_quickstart_rows(40, seed=1)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["init", "mine", "--data", "rows.jsonl", "--teacher", str(tiny_teacher_folder)]
    done = run(*words, "--columns", "instruction=question,output=reply")
    assert done.exit_code == 0, done.output
    assert done.stdout == "config: mine/config.yaml\nsrd-fast run mine/config.yaml\n"
    config = load_run_config("mine/config.yaml")
    assert (config.template, config.columns) == ("chat", {"instruction": "question", "output": "reply"})
    assert (config.init_student.layers, config.validation, config.curate.stages) == (2, 4, 3)
    assert config.max_response_length % 64 == config.max_prompt_length % 64 == 0
    assert training_config(config).epochs_per_stage == 8
    text = Path("mine/config.yaml").read_text()
    assert isinstance(run(*words).exception, UserError)
    assert Path("mine/config.yaml").read_text() == text
    few = run(
        "init", "other", "--data", "rows.jsonl", "--teacher", str(tiny_teacher_folder), "--columns", "output=nope"
    )
    assert isinstance(few.exception, UserError)
    assert not Path("other").exists()


@pytest.mark.usefixtures("own_folder")
def test_a_first_config_fits_the_models(tiny_teacher_folder: Path) -> None:
    """Another tokenizer and rows without answers are told; lengths are no longer than the teacher's positions."""
    rows = make_quickstart_rows(8, seed=1)
    Path("rows.json").write_text(json.dumps(rows))
    Path("empty.json").write_text(json.dumps([{**row, "output": ""} for row in rows]))
    Path("long.json").write_text(json.dumps([{**row, "instruction": "far " * 900, "output": "off"} for row in rows]))
    teacher = load_config(str(tiny_teacher_folder))
    tiny.tiny_tokenizer(vocab_size=280).save_pretrained("other")
    tiny.tiny_model("llama").save_pretrained("other")
    common = ["init", "mine", "--teacher", str(tiny_teacher_folder), "--data"]
    for words, said in (
        ([*common, "rows.json", "--student", "other"], "different tokenizers"),
        ([*common, "empty.json"], "all of 8 answers that were looked at are empty"),
    ):
        assert said in str(run(*words).exception)
        assert not Path("mine").exists()
    assert run(*common, "long.json").exit_code == 0
    made = load_run_config("mine/config.yaml")
    assert made.max_prompt_length + made.max_response_length <= teacher.max_position_embeddings
    assert "0 of 100 fit" in Path("mine/config.yaml").read_text()
