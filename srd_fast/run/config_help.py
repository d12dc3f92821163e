"""Every key of a config with its default, its range and its meaning: as a YAML file, and as a JSON schema."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, PydanticUserError, TypeAdapter
from pydantic.fields import FieldInfo

from ..training.config import SRDConfig
from ..training.student import trainer_basics
from .config import RunConfig
from .distill_fields import DISTILL_FIELDS
from .steps.settings import RUN_DEFAULTS

_WIDTH = 104
# What the run sets by its device and dtype, and what it sets always.
_OF_DEVICE = {"use_cpu", "bf16", "dataloader_pin_memory"}
_DEFAULTS = {**trainer_basics(torch.device("cpu"), torch.float32), **RUN_DEFAULTS}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "at least this many:"}


def config_text(every: bool = False) -> str:
    """A config file of all defaults, with each key's meaning above it.

    Args:
        every: include the fields of `transformers.TrainingArguments`; otherwise the section `distill` has only those
            of this library.

    Returns:
        YAML that `srd-fast run` accepts.
    """
    lines: list[str] = []
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if name == "distill":
            lines += ["", *_comment(field.description or "", ""), "distill:", *_distill(every)]
        elif isinstance(section, type) and issubclass(section, BaseModel):
            lines += ["", *_comment(field.description or "", ""), f"{name}:", *_keys(section, "  ")]
        else:
            lines += [*([""] if name == "lora" else []), *_key(name, field, "", field.default)]
    return "\n".join(lines).lstrip() + "\n"


def text_of(values: dict[str, Any]) -> str:
    """A config file of some keys, with each key's meaning above it.

    Args:
        values: key -> value; for a section, a dictionary.

    Returns:
        YAML.
    """
    lines: list[str] = []
    for name, value in values.items():
        field = RunConfig.model_fields[name]
        section: Any = field.annotation
        if name != "distill" and not hasattr(section, "model_fields"):
            lines += _key(name, field, "", value)
            continue
        lines += ["", *_comment(field.description or "", ""), f"{name}:"]
        for key, below in value.items():
            if name == "distill":
                lines += _entry(key, vars(SRDConfig)["__dataclass_fields__"][key].metadata["help"], [], below, "  ")
            else:
                lines += _key(key, section.model_fields[key], "  ", below)
    return "\n".join(lines).lstrip() + "\n"


def _keys(section: type[BaseModel], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield from _key(name, field, indent, field.default)


def _key(name: str, field: FieldInfo, indent: str, value: Any) -> list[str]:
    limits = [f"{_SIGNS[k]} {v}" for m in field.metadata for k in _SIGNS if (v := getattr(m, k, None)) is not None]
    return _entry(name, field.description or "", [*_choices(field.annotation), *limits], value, indent)


def _choices(annotation: Any) -> list[str]:
    """The values of a `Literal`, which may be inside a list type."""
    if typing.get_origin(annotation) is list:
        return _choices(typing.get_args(annotation)[0])
    return [" | ".join(typing.get_args(annotation))] if typing.get_origin(annotation) is Literal else []


def _distill(every: bool) -> Iterator[str]:
    mine = vars(SRDConfig)["__annotations__"]
    fields = [f for f in dataclasses.fields(SRDConfig) if f.name in DISTILL_FIELDS and f.name not in _OF_DEVICE]
    for field in sorted(fields, key=lambda f: (f.name not in mine, f.name not in RUN_DEFAULTS)):
        if every or field.name in mine or field.name in RUN_DEFAULTS:
            # The help of transformers' fields changes with its versions, so it is shown only with `every`.
            text = field.metadata.get("help", "") if every or field.name in mine else ""
            yield from _entry(field.name, text, [], _default(field), "  ")


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.name in _DEFAULTS:
        return _DEFAULTS[field.name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return getattr(field.default, "value", field.default)  # the value of an enumeration's member


def _entry(name: str, text: str, limits: list[str], value: Any, indent: str) -> list[str]:
    words = " ".join(text.split())
    if limits:
        words = f"{words.removesuffix('.')} ({', '.join(limits)})."
    shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000)
    return [*_comment(words, indent), f"{indent}{name}: {shown.removesuffix('...' + chr(10)).rstrip()}"]


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, with which editors complete and check keys."""
    schema = RunConfig.model_json_schema()
    types = typing.get_type_hints(SRDConfig)
    fields = {}
    for field in dataclasses.fields(SRDConfig):
        if field.name not in DISTILL_FIELDS:
            continue
        try:
            kind = TypeAdapter(types[field.name]).json_schema()
        except (PydanticUserError, NameError):  # a type of transformers' own
            kind = {}
        default = _default(field)
        shown = {"default": default} if isinstance(default, (str, int, float, bool)) else {}
        fields[field.name] = {**kind, **shown, "description": " ".join(field.metadata.get("help", "").split())}
    schema["properties"]["distill"] |= {"properties": fields, "additionalProperties": False}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
