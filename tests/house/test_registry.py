"""Names that users add things under."""

from typing import Any

import pytest

import srd_fast
from srd_fast import UserError
from srd_fast.registry import Registry

KINDS = ("divergence", "difficulty", "engine", "position_policy", "sample_policy", "cache_kind")


def colours() -> Registry[int]:
    return Registry("colour", {"red": 1, "blue": 2}, reserved=["any"])


def test_a_thing_is_found_by_its_name() -> None:
    registry = colours()
    registry.register("green", 3)
    assert registry.get("green") == 3
    assert registry.names() == ["any", "blue", "green", "red"]
    assert "green" in registry
    assert "any" in registry


@pytest.mark.parametrize("name", ["gren", "", None, 3, ["red"], {}])
def test_an_unknown_name_comes_with_the_nearest_and_all(name: Any) -> None:
    registry = colours()
    registry.register("green", 3)
    for look_up in (registry.get, registry.check):
        with pytest.raises(UserError, match=r"unknown colour .* Known: any, blue, green, red") as found:
            look_up(name)
        assert ("did you mean 'green'" in str(found.value)) == (name == "gren")
    assert name not in registry


def test_a_name_is_taken_once_unless_replaced() -> None:
    registry = colours()
    with pytest.raises(UserError, match="colour 'red' exists already; pass replace=True or take another name"):
        registry.register("red", 9)
    assert registry.get("red") == 1
    registry.register("red", 9, replace=True)
    assert registry.get("red") == 9
    for replace in (False, True):
        with pytest.raises(UserError, match="colour 'any' exists already; take another name"):
            registry.register("any", 9, replace=replace)


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_a_name_is_text(name: Any) -> None:
    with pytest.raises(UserError, match="the name of a colour must be text that is not empty"):
        colours().register(name, 9)


def test_a_block_leaves_no_trace() -> None:
    registry = colours()

    def change() -> None:
        with registry.restored():
            registry.register("green", 3)
            registry.register("red", 9, replace=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert registry.names() == ["any", "blue", "red"]
    assert registry.get("red") == 1


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_are_registered_alike(kind: str) -> None:
    register, names = getattr(srd_fast, f"register_{kind}"), getattr(srd_fast, f"{kind}_names")
    options = {"higher_is_easier": True} if kind == "difficulty" else {}
    before = names()
    assert before == sorted(before)
    register("mine", lambda *_, **__: None, **options)
    assert names() == sorted([*before, "mine"])
    with pytest.raises(UserError, match="'mine' exists already; pass replace=True"):
        register("mine", lambda *_, **__: None, **options)
    register("mine", lambda *_, **__: None, **options, replace=True)
    with pytest.raises(UserError, match="must be text that is not empty"):
        register("", lambda *_, **__: None, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fixture_left_nothing(kind: str) -> None:
    """Runs after the test above, or alone."""
    assert "mine" not in getattr(srd_fast, f"{kind}_names")()
