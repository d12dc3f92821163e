"""The configuration of `srd-fast run`: a YAML file with `key=value` overrides, checked before anything runs."""

from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .config import TRAINING_PRESETS, SRDConfig, with_preset
from .curation import CURATION_PRESETS, KNEE
from .errors import UserError
from .reflection.reflect import REFLECTION_PRESETS
from .suggest import unknown_name

# Fields of SRDConfig that the run sets itself, or that mean nothing in it.
_SET_BY_RUN = {"output_dir", "seed", "num_train_epochs", "template", "max_prompt_length", "max_response_length"}
_SET_BY_RUN |= {"teacher_cache", "teacher_cache_kind", "teacher_cache_k"}
_DISTILL_FIELDS = {f.name for f in dataclass_fields(SRDConfig) if f.init} - _SET_BY_RUN


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class InitStudent(_Section):
    """How the student is cut out of the teacher and warmed up (only with `student: prune`)."""

    layers: int | list[int] = 15
    warmup_steps: int = Field(default=25, ge=0)
    warmup_learning_rate: float = Field(default=4e-4, gt=0)
    warmup_batch_size: int = Field(default=16, ge=1)


class Reflect(_Section):
    """How the student's reflections are made and scored."""

    engine: str = "auto"
    engine_options: dict[str, Any] = {}
    batch_size: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    signals: list[str] = Field(default=["rouge_l", "cross_entropy"], min_length=1)
    cross_entropy_by: Literal["student", "engine"] = "student"
    test_seconds: float = Field(default=5.0, gt=0)
    test_memory_mb: int = Field(default=512, ge=16)
    rouge_tokenizer: Literal["auto", "rouge", "unicode"] = "auto"
    score_eos: bool = True


class Curate(_Section):
    """How scores become a plan. `signals`: name -> weight; default: every signal of reflect, weight 1.

    `keep`: the share to keep, or "knee" to find it, see `curate`. `reflect_again`: at the border of each stage the
    student, as it is then, reflects again, and the samples that it was not trained on yet are ranked anew.
    """

    method: Literal["srd", "random", "none"] = "srd"
    keep: float | Literal["knee"] = 0.75
    stages: int = Field(default=3, ge=1)
    rrf_k: float = Field(default=60, gt=0)
    signals: dict[str, float] | None = None
    floor_subsets: bool = False
    reflect_again: bool = False

    @field_validator("keep", mode="before")
    @classmethod
    def _share_or_knee(cls, given: Any) -> Any:
        if given != KNEE and not (isinstance(given, (int, float)) and 0 < given <= 1):
            raise ValueError(f"must be in (0, 1], or {KNEE!r}")
        return given


class Cache(_Section):
    """Where teacher rows come from: `kind` live runs the teacher at every step, the others run it once."""

    kind: Literal["hidden", "topk", "sampled", "projected", "live"] = "hidden"
    k: int = Field(default=64, ge=1)


class Evaluate(_Section):
    """How models are evaluated on the validation rows. With `seeds`, sampled once for each at `temperature`."""

    batch_size: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    seeds: list[int] = []
    temperature: float = Field(default=1.0, gt=0)


class RunConfig(_Section):
    """Everything `srd-fast run` needs; every field has a default."""

    teacher: str = "smollm2-135m-instruct"
    student: str = "prune"
    output_dir: str = "runs/srd"
    data: str = "quickstart"
    data_split: str = "train"
    validation: int | str = 100
    max_rows: int | None = Field(default=None, ge=1)
    template: str = "alpaca"
    max_prompt_length: int = Field(default=512, ge=1)
    max_response_length: int = Field(default=256, ge=2)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    seed: int = Field(default=0, ge=0, lt=2**32)
    preset: str | None = None
    init_student: InitStudent = InitStudent()
    reflect: Reflect = Reflect()
    curate: Curate = Curate()
    cache: Cache = Cache()
    distill: dict[str, Any] = {}
    lora: dict[str, Any] | None = None
    evaluate: Evaluate = Evaluate()

    @field_validator("validation")
    @classmethod
    def _some_rows(cls, given: int | str) -> int | str:
        if isinstance(given, int) and given < 1:
            raise ValueError("must be a file, or how many rows to hold out, at least 1")
        return given

    @field_validator("distill")
    @classmethod
    def _known_fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in _SET_BY_RUN:
                raise ValueError(f"{name} is set at the top level of the config, or by the run itself")
            if name not in _DISTILL_FIELDS:
                raise ValueError(unknown_name("key", name, _DISTILL_FIELDS, listed=False))
        # YAML 1.1 reads `save_strategy: no` as false.
        return {k: "no" if k.endswith("_strategy") and v is False else v for k, v in given.items()}


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"config {str(path)!r} cannot be read: {e}") from e
    except yaml.YAMLError as e:
        raise UserError(f"config {str(path)!r} is not valid YAML: {' '.join(str(e).split())}") from e
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {str(path)!r} must hold `key: value` lines, got {type(content).__name__}")
    return content


def _override(content: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=value`; the value is YAML. 1e-4 without a dot, which YAML takes for text, is a number here."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"override {assignment!r} is not of the form key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"override {assignment!r}: the value is not valid YAML") from e
    *parents, last = key.split(".")
    level = content
    for parent in parents:
        level = level.setdefault(parent, {})
        if not isinstance(level, dict):
            raise UserError(f"override {assignment!r}: {parent!r} is not a section")
    level[last] = value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; everyone means the number."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def load_run_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a config, apply the preset under it and the overrides over it, and check every key and value.

    Raises:
        UserError: one line that names the key, the value and what it should be; for an unknown key, the nearest one.
    """
    given = _read_yaml(path) if path is not None else {}
    content = {key: value for key, value in given.items() if value is not None}  # `curate:` with nothing below it
    for assignment in overrides:
        _override(content, assignment)
    content = _numbers(content)
    preset = content.get("preset")
    if preset is not None:
        if preset not in TRAINING_PRESETS:
            raise UserError(unknown_name("preset", preset, TRAINING_PRESETS))
        if isinstance(content.get("distill", {}), dict):
            content["distill"] = with_preset(preset, content.get("distill", {}))
        for section, presets in (("curate", CURATION_PRESETS), ("reflect", REFLECTION_PRESETS)):
            if isinstance(content.get(section, {}), dict):
                content[section] = {**presets.get(preset, {}), **content.get(section, {})}
    try:
        return RunConfig(**content)
    except ValidationError as e:
        raise UserError(_one_line(e)) from e
    except TypeError as e:
        raise UserError(f"config keys must be text: {e}") from e


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"] if not (isinstance(x, str) and x in {"int", "str", "list[int]"}))
    if first["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation
        name, known = str(first["loc"][-1]), section.model_fields
        prefix = ".".join(str(x) for x in first["loc"][:-1])
        return "config: " + unknown_name(f"key in {prefix}" if prefix else "key", name, known)
    message = first["msg"].removeprefix("Value error, ")
    return f"config: {where}: {message[:1].lower()}{message[1:]}, got {first['input']!r}"
