"""The configuration of `srd-fast run`: a YAML file with `key=value` overrides, checked before anything runs."""

import math
from collections import Counter
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..curriculum import CURATION_PRESETS, KNEE
from ..data import check_chat_template_kwargs, check_columns, shown
from ..errors import UserError, first_line
from ..reflection.reflect import REFLECTION_PRESETS
from ..suggest import unknown_name
from ..training.config import TRAINING_PRESETS, SRDConfig, with_preset

# A config is some hundred lines. PyYAML takes a second for this many bytes; and aliases, each of which stands for a
# part of the file, could make values without end of a few lines.
_MOST_BYTES = 100_000
_MOST_VALUES = 20_000
_DEEPEST = 20
# Where null is a value, not an empty section.
_NULLABLE = {"max_bad_rows", "parse_special_tokens"}
# Fields of SRDConfig that the run sets itself, or that mean nothing in it.
_SET_BY_RUN = {"output_dir", "seed", "num_train_epochs", "template", "max_prompt_length", "max_response_length"}
_SET_BY_RUN |= {"chat_template_kwargs", "parse_special_tokens", "columns", "data_function", "train_on"}
_SET_BY_RUN |= {"teacher_device_map", "teacher_tp_plan", "teacher_cache", "teacher_cache_kind", "teacher_cache_k"}
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

    `teacher_device_map`: where the parts of the teacher go, where it does not fit on one device: "auto", or a device,
    "cpu" or "disk" for each module. `teacher_tp_plan`: "auto" splits its layers over all processes.
    `data`: a file, a folder, a pattern, a hub name (`name`, `name:config`), a list of these, or path, name and split.
    `columns`: such as {instruction: question, output: answer}, where the data's columns have names of their own.
    `data_function`: FILE.py:FUNCTION, from a row (or, with a parameter `path`, from a file) to rows.
    `train_on`: of a conversation's answers the "last", or "all".
    `max_bad_rows`: how many rows of a file may be unusable: a whole number, or a share in (0, 1); null: no limit.
    """

    teacher: str = "smollm2-135m-instruct"
    teacher_device_map: str | dict[str, Any] | None = None
    teacher_tp_plan: Literal["auto"] | None = None
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


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as f:
            content = f.read(_MOST_BYTES + 1)
        text = content.decode()
    except (OSError, ValueError) as e:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"config {str(path)!r} cannot be read: {first_line(e)}") from e
    if len(content) > _MOST_BYTES:
        raise UserError(f"config {str(path)!r} is larger than {_MOST_BYTES} bytes: is it a config?")
    values = _parsed(text, f"config {str(path)!r} is not valid YAML")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config {str(path)!r} must hold `key: value` lines, got {type(values).__name__}")
    return values


def _parsed(text: str, complaint: str) -> Any:
    """The values of a YAML text.

    Raises:
        UserError: beginning with the complaint.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _check_aliases(node, complaint)
        return yaml.constructor.SafeConstructor().construct_document(node)
    except UserError:
        raise
    except RecursionError as e:
        raise UserError(f"{complaint}: nested too deeply") from e
    except Exception as e:  # besides YAMLError what int(), date() and others say, as of 2024-13-45
        raise UserError(f"{complaint}: {shown(' '.join(str(e).split()) or type(e).__name__, 500)}") from e


def _check_aliases(root: yaml.Node, complaint: str) -> None:
    """Refuse values without end, and a key that a section has twice: YAML would silently keep the last."""
    counts: dict[int, int] = {}  # values below a node, each alias counted as all that it stands for; -1: not known yet

    def count(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        line = node.start_mark.line + 1
        if id(node) not in counts:
            counts[id(node)] = -1
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
            twice = [key for key, times in keys.items() if times > 1]
            if twice:
                raise UserError(f"{complaint}: the section at line {line} has the key {shown(twice[0])!r} twice")
            below = [x for pair in pairs for x in pair] or node.value
            counts[id(node)] = 1 + sum(count(x) for x in below)
        if counts[id(node)] < 0:
            raise UserError(f"{complaint}: line {line} has an alias of itself within it")
        return counts[id(node)]

    if count(root) > _MOST_VALUES:
        raise UserError(f"{complaint}: with its aliases it has more than {_MOST_VALUES} values")


def _override(content: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=value`. The value is YAML, but 1e-4, which YAML takes for text without a dot, is a number."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(assignment)!r} is not of the form key=value")
    if key.count(".") > _DEEPEST:
        raise UserError(f"override {shown(assignment)!r}: no key has so many dots")
    _check_text(key, "override")
    value = _checked(_parsed(text, f"override {shown(assignment)!r}: the value is not valid YAML"), shown(key))
    *parents, last = key.split(".")
    level = content
    for parent in parents:
        level = level.setdefault(parent, {})
        if not isinstance(level, dict):
            raise UserError(f"override {shown(assignment)!r}: {shown(parent)!r} is not a section")
    level[last] = value


def _checked(value: Any, where: str = "") -> Any:
    """Copy values, with 1e-4, which is text in YAML 1.1, as a number.

    Args:
        value: from YAML.
        where: the key of the value, for the message.

    Raises:
        UserError: a key is not text, or a value is one that no setting can hold.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"config keys must be text, got {_repr(key)} in {where or 'the file'}")
            _check_text(key, where or "a key")
        return {k: _checked(v, f"{where}.{shown(k)}".strip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_checked(v, where) for v in value]
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"config: {where}: must be a number, got nan")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"config: {where}: must be a number of at most 18 digits, got {_repr(value)}")
    if isinstance(value, str):
        _check_text(value, where)
        if value[:1] in "+-.0123456789" and "e" in value.lower():
            try:
                return float(value)
            except ValueError:
                return value
    return value


def _check_text(text: str, where: str) -> None:
    """Refuse text that no path and no file can hold."""
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"config: {where}: holds a NUL or half of a surrogate pair, got {_repr(text)}")


def _repr(value: Any) -> str:
    """A value as text for a message."""
    try:
        return shown(repr(value), 200)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a {type(value).__name__} of thousands of digits"


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
    given = _read_yaml(path) if path is not None else {}
    # `curate:` with nothing below it is no value.
    content = {key: value for key, value in _checked(given).items() if value is not None or key in _NULLABLE}
    for assignment in overrides:
        _override(content, assignment)
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
    return f"config: {shown(where)}: {message[:1].lower()}{message[1:]}, got {_repr(first['input'])}"
