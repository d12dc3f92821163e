"""The configuration of `srd-fast run`: a YAML file with `key=value` overrides, checked before anything runs."""

from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..curriculum import CURATION_PRESETS, KNEE
from ..data import check_chat_template_kwargs, check_columns, shown
from ..errors import UserError
from ..reflection.reflect import REFLECTION_PRESETS
from ..suggest import unknown_name
from ..training.config import TRAINING_PRESETS, SRDConfig, with_preset
from .yaml_values import apply_override, checked, read_yaml, shown_value

# Where null is a value, not an empty section.
_NULLABLE = {"max_bad_rows", "parse_special_tokens"}
# Fields of SRDConfig that the run sets itself, or that mean nothing in it.
_SET_BY_RUN = {"output_dir", "seed", "num_train_epochs", "template", "max_prompt_length", "max_response_length"}
_SET_BY_RUN |= {"chat_template_kwargs", "parse_special_tokens", "columns", "data_function", "train_on"}
_SET_BY_RUN |= {"teacher_cache", "teacher_cache_kind", "teacher_cache_k"}
_DISTILL_FIELDS = {f.name for f in dataclass_fields(SRDConfig) if f.init} - _SET_BY_RUN


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class InitStudent(_Section):
    """How the student is cut out of the teacher and warmed up (only with `student: prune`).

    `layers`: of an encoder-decoder model those of the decoder, and of the encoder without `encoder_layers`.
    """

    layers: int | list[int] = 15
    encoder_layers: int | list[int] | None = None
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
    rouge_tokenizer: Literal["auto", "by_sample", "rouge", "unicode"] = "auto"
    score_eos: bool = True


class Curate(_Section):
    """How scores become a plan.

    `signals`: name -> weight; default: every signal of reflect, with weight 1. `keep`: the share to keep, or "knee" to
    find it, see `curate`. `reflect_again`: at the border of each stage, the student reflects again as it is then, and
    samples that it was not trained on yet are ranked anew.
    """

    method: Literal["srd", "random", "none"] = "srd"
    keep: float | Literal["knee"] = 0.75
    stages: int = Field(default=3, ge=1, le=100_000)
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
    """Where teacher rows come from. `kind` live runs the teacher at every step, the other kinds run it once.

    `log_sum_exp`: kind hidden keeps, beside the hidden states, the log-sum-exp of each row's teacher logits at each
    temperature of the run, 4 bytes, which spares the loss a pass over the teacher's head. A cache that is there gets
    what it lacks of them, and keeps its hidden states.
    """

    kind: Literal["hidden", "topk", "sampled", "projected", "live"] = "hidden"
    k: int = Field(default=64, ge=1)
    log_sum_exp: bool = False


class Evaluate(_Section):
    """How models are evaluated on the validation rows. With `seeds`, answers are sampled once for each.

    `metrics`: of the answers, besides ROUGE-L.
    """

    batch_size: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    seeds: list[int] = []
    temperature: float = Field(default=1.0, gt=0)
    metrics: list[Literal["bleu", "chrf"]] = []


class RunConfig(_Section):
    """Everything `srd-fast run` needs. Every field has a default.

    `data`: a file, a folder, a pattern, a hub name (`name`, `name:config`), a list of these, or path, name and split.
    `columns`: such as {instruction: question, output: answer}, where the data's columns have names of their own.
    `data_function`: FILE.py:FUNCTION, from a row (or, with a parameter `path`, from a file) to rows.
    `train_on`: of a conversation's answers the "last", or "all".
    `max_bad_rows`: how many rows of a file may be unusable: a whole number, or a share in (0, 1); null: no limit.
    """

    teacher: str = "smollm2-135m-instruct"
    student: str = "prune"
    output_dir: str = "runs/srd"
    data: str | list[str] | dict[str, str] = "quickstart"
    data_split: str = "train"
    validation: int | str | list[str] | dict[str, str] = 100
    columns: dict[str, str] = {}
    data_function: str | None = None
    train_on: Literal["last", "all"] = "last"
    max_rows: int | None = Field(default=None, ge=1)
    max_bad_rows: int | float | None = 0.1
    template: str = "alpaca"
    chat_template_kwargs: dict[str, Any] = {}
    parse_special_tokens: bool | None = None
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
    def _some_rows(cls, given: Any) -> Any:
        if isinstance(given, int) and given < 1:
            raise ValueError("must be a file, or how many rows to hold out, at least 1")
        return given

    @field_validator("max_bad_rows", mode="before")
    @classmethod
    def _count_or_share(cls, given: Any) -> Any:
        count = isinstance(given, int) and not isinstance(given, bool) and given >= 0
        share = isinstance(given, float) and 0 < given < 1
        if given is not None and not count and not share:
            raise ValueError("must be a count (0, 1, 2, ...), a share of the rows in (0, 1), or null for no limit")
        return given

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, given: dict[str, str]) -> dict[str, str]:
        return check_columns(given)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables(cls, given: dict[str, Any]) -> dict[str, Any]:
        return check_chat_template_kwargs(given)

    @field_validator("distill")
    @classmethod
    def _known_fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in _SET_BY_RUN:
                raise ValueError(f"{name} is set at the top level of the config, or by the run itself")
            if name not in _DISTILL_FIELDS:
                raise ValueError(unknown_name("key", shown(name), _DISTILL_FIELDS, listed=False))
        # YAML 1.1 reads `save_strategy: no` as false.
        return {k: "no" if k.endswith("_strategy") and v is False else v for k, v in given.items()}


def load_run_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a config, add the preset's values where it has none, apply the overrides, and check every key and value.

    Args:
        path: a YAML file, or None for the defaults.
        overrides: texts such as "distill.skew=0.2".

    Returns:
        The config.

    Raises:
        UserError: one line that names the key, the value and what it should be; for an unknown key, the nearest one.
    """
    given = read_yaml(path) if path is not None else {}
    # `curate:` with nothing below it is no value.
    content = {key: value for key, value in checked(given).items() if value is not None or key in _NULLABLE}
    for assignment in overrides:
        apply_override(content, assignment)
    preset = content.get("preset")
    if isinstance(preset, str):
        if preset not in TRAINING_PRESETS:
            raise UserError(unknown_name("preset", shown(preset), TRAINING_PRESETS))
        if isinstance(content.get("distill", {}), dict):
            content["distill"] = with_preset(preset, content.get("distill", {}))
        for section, presets in (("curate", CURATION_PRESETS), ("reflect", REFLECTION_PRESETS)):
            if isinstance(content.get(section, {}), dict):
                content[section] = {**presets.get(preset, {}), **content.get(section, {})}
    try:
        return RunConfig(**content)
    except ValidationError as e:
        raise UserError(_one_line(e)) from e


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    # Of a union, which pydantic lists as if they were keys.
    kinds = {"int", "float", "str", "list[int]", "list[str]", "dict[str,str]"}
    where = ".".join(str(x) for x in first["loc"] if not (isinstance(x, str) and x in kinds))
    if first["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in first["loc"][:-1]:
            section = section.model_fields[part].annotation
        name, known = shown(str(first["loc"][-1])), section.model_fields
        prefix = ".".join(str(x) for x in first["loc"][:-1])
        return "config: " + unknown_name(f"key in {prefix}" if prefix else "key", name, known)
    message = first["msg"].removeprefix("Value error, ")
    return f"config: {shown(where)}: {message[:1].lower()}{message[1:]}, got {shown_value(first['input'])}"
