"""Docstrings of the public names, read as the reference reads them: parameters, what is returned, what is raised."""

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import srd_fast
import srd_fast.kernels

griffe: Any = pytest.importorskip("griffe", reason="griffe is missing: pip install 'srd-fast[docs]'")

ROOT = Path(__file__).resolve().parents[2]

# An entry of `Raises:`, as in "UserError: the file is missing".
ERROR = re.compile(r"[A-Z]\w*")


def reference() -> Any:
    """docs/reference.py, which mkdocs loads by its path."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = reference()
PACKAGE = REFERENCE.load()


def public() -> dict[str, Any]:
    """Every public function and class by its full name, and every public method of these classes."""
    names = [f"srd_fast.{n}" for n in srd_fast.__all__] + [f"srd_fast.kernels.{n}" for n in srd_fast.kernels.__all__]
    found = {}
    for name in names:
        thing = PACKAGE[name.removeprefix("srd_fast.")]
        thing = thing.final_target if thing.is_alias else thing
        found[name] = thing
        if thing.is_class:
            methods = {n: m for n, m in thing.members.items() if m.is_function and not n.startswith("_")}
            found |= {f"{name}.{n}": m for n, m in methods.items()}
    return {n: t for n, t in found.items() if t.is_function or t.is_class}


PUBLIC = public()


def has_fields(thing: Any) -> bool:
    """Whether it is a NamedTuple, whose fields are its parameters."""
    return thing.is_class and any(str(base) == "NamedTuple" for base in thing.bases)


def parameters(thing: Any) -> list[str]:
    """What a call takes; of a class, what its construction does."""
    if has_fields(thing):
        return [n for n, m in thing.members.items() if m.is_attribute]
    return [p.name for p in thing.parameters if p.name not in ("self", "cls")]


def returns(thing: Any) -> bool:
    """Whether it is a function that gives something back."""
    return thing.is_function and thing.returns is not None and str(thing.returns) != "None"


def problems(thing: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is missing or wrong in a docstring, in words."""
    if thing.docstring is None:
        return ["there is no docstring"]
    with caplog.at_level(logging.DEBUG, logger="griffe"):
        caplog.clear()
        sections = thing.docstring.parse("google", warn_unknown_params=False, **REFERENCE.PARSING)
    wrong = [r.getMessage() for r in caplog.records if "Failed to get" in r.getMessage()]
    kinds = {
        kind: [s for s in sections if s.kind.value == kind]
        for kind in ("parameters", "attributes", "returns", "raises")
    }
    documented = [p.name.lstrip("*") for kind in ("parameters", "attributes") for s in kinds[kind] for p in s.value]
    wanted = parameters(thing)
    wrong += [f"{name} is not documented on a line of its own" for name in wanted if name not in documented]
    wrong += [f"{name} is documented, and is no parameter" for name in documented if name not in wanted]
    wrong += [f"{name} is documented twice" for name in {n for n in documented if documented.count(n) > 1}]
    if returns(thing) and not kinds["returns"]:
        wrong.append("Returns: is missing")
    # A first word with a colon would be taken for the name of what is returned.
    wrong += [f"Returns: begins with '{r.name}:'" for section in kinds["returns"] for r in section.value if r.name]
    if ">>> " in thing.docstring.value and all(s.kind.value != "examples" for s in sections):
        wrong.append("an example stands outside of Examples:, so the reference has it as a quotation")
    for section in kinds["raises"]:
        wrong += [
            f"Raises: {e.annotation!s} is no error" for e in section.value if not ERROR.fullmatch(str(e.annotation))
        ]
    return wrong


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_docstring_is_whole(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert problems(PUBLIC[name], caplog) == []


def test_all_public_names_are_looked_at() -> None:
    constants = {"ALIGNMENT", "EAGER_BUFFERS", "FORMULAS", "LOGIT_FLOOR"}
    assert all(PACKAGE[f"kernels.{name}"].final_target.docstring for name in constants)
    wanted = {f"srd_fast.{n}" for n in srd_fast.__all__}
    wanted |= {f"srd_fast.kernels.{n}" for n in set(srd_fast.kernels.__all__) - constants}
    assert wanted <= set(PUBLIC)
    assert {"srd_fast.CurriculumPlan.save", "srd_fast.SRDTrainer.evaluate", "srd_fast.TeacherCache.rows"} <= set(PUBLIC)


BAD = '''
def f(a: int, b: int, c: int) -> int:
    """Says nothing of c.

    Args:
        a, b: two numbers.
        d: another.

    Raises:
        UserError for anything.
        what it is: not so.

    Example:
        >>> f(1, 2, 3)
        3
    """
'''
GOOD = '''
def f(a: int, *rest: int) -> int:
    """Adds.

    Args:
        a: the first number.
        *rest: the others.

    Returns:
        Their sum.

    Raises:
        UserError: one is negative.
    """
'''


def function(source: str) -> Any:
    with griffe.temporary_visited_module(source, docstring_parser=griffe.Parser.google) as module:
        return module["f"]


def test_the_checker_finds_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    found = problems(function(BAD), caplog)
    for text in (
        "a is not",
        "b is not",
        "c is not",
        "d is documented, and is no",
        "Returns:",
        "Failed to get",
        "what it",
        "outside of Examples:",
    ):
        assert any(text in problem for problem in found), (text, found)
    assert problems(function("def f() -> None:\n    pass\n"), caplog) == ["there is no docstring"]


def test_the_checker_takes_what_is_right(caplog: pytest.LogCaptureFixture) -> None:
    assert problems(function(GOOD), caplog) == []


def test_every_field_of_the_config_is_in_the_reference() -> None:
    config = PUBLIC["srd_fast.SRDConfig"]
    (table,) = [s for s in config.docstring.parse("google") if s.kind.value == "parameters"]
    told = {p.name: (p.description, p.default) for p in table.value}
    fields = srd_fast.SRDConfig.__dataclass_fields__
    described = {n: f for n, f in fields.items() if "help" in f.metadata and n in srd_fast.SRDConfig.__annotations__}
    assert set(told) == set(described)
    for name, field in described.items():
        assert told[name][0] == field.metadata["help"]
        assert eval(told[name][1]) == field.default


def test_every_public_name_has_its_place_in_the_reference() -> None:
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(listed) == len(set(listed))
    wanted = {f"srd_fast.{n}" for n in srd_fast.__all__} | {f"srd_fast.kernels.{n}" for n in srd_fast.kernels.__all__}
    assert wanted <= set(listed)
