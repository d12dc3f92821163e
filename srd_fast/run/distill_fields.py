"""The section `distill` of a config: which fields of SRDConfig it has, and their types."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from types import MappingProxyType
from typing import Any, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from ..data import shown
from ..errors import UserError
from ..suggest import unknown_name
from ..training.config import SRDConfig
from .synonyms import SYNONYMS
from .yaml_values import shown_value

# Fields of SRDConfig that the run sets itself, or that have no meaning in it.
_SET_BY_RUN = {"output_dir", "seed", "num_train_epochs", "template", "max_prompt_length", "max_response_length"}
_SET_BY_RUN |= {"chat_template_kwargs", "parse_special_tokens", "columns", "data_function", "train_on"}
_SET_BY_RUN |= {"privileged_template", "max_privileged_length"}
_SET_BY_RUN |= {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"}
_SET_BY_RUN |= {"teacher_device_map", "teacher_tp_plan", "teacher_cache", "teacher_cache_kind", "teacher_cache_k"}
DISTILL_FIELDS = {f.name for f in fields(SRDConfig) if f.init} - _SET_BY_RUN


def check_field(name: str, value: Any, elsewhere: Mapping[str, str] = MappingProxyType({})) -> None:
    """Refuse a key that `distill` does not have, or a value of another type.

    Args:
        name: the key.
        value: the value from YAML.
        elsewhere: the key -> its place, if it is one of another section.

    Raises:
        UserError: the key or its value is wrong. The message lacks the section's name.
    """
    if name in _SET_BY_RUN and name not in SYNONYMS["distill"]:
        raise UserError(f"{name} is set at the top level of the config, or by the run itself")
    if name not in DISTILL_FIELDS:
        synonyms = {**elsewhere, **SYNONYMS["distill"]}
        raise UserError(unknown_name("key", shown(name), DISTILL_FIELDS, listed=False, synonyms=synonyms))
    if name.endswith("_strategy") and value is False:
        return
    kind = _types()[name]
    if kind is not None:
        try:
            if kind.validate_python(value) != value:  # such as "no" for a bool, which would stay text
                kind.validate_python(value, strict=True)
        except ValidationError as e:
            reason = e.errors()[0]["msg"]
            raise UserError(f"{name}: {reason[:1].lower()}{reason[1:]}, got {shown_value(value)}") from e


@cache
def _types() -> dict[str, TypeAdapter[Any] | None]:
    """The types of the fields of `distill`; None for types of transformers' own."""
    hints, found = get_type_hints(SRDConfig), dict[str, TypeAdapter[Any] | None]()
    for name in DISTILL_FIELDS:
        try:
            found[name] = TypeAdapter(hints[name])
        except PydanticUserError:
            found[name] = None
    return found
