"""Values of a row's columns, checked."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError


def text_of(row: Mapping[str, Any], column: str) -> str:
    """The text in a column.

    Raises:
        UserError: the column does not hold text.
    """
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{column} must be text, got {type(value).__name__}")
    return encodable(value, column)


def encodable(text: str, column: str) -> str:
    """Return the text if it can be encoded as UTF-8. A text from JSON may have half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{column} holds half of a surrogate pair at character {e.start}") from None
    return text


def texts_of(value: Any, column: str) -> list[str]:
    """A text or a list of texts, as a list.

    Raises:
        UserError: it is neither, or empty.
    """
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) for v in values):
        raise UserError(f"{column} must be text or a list of texts, got {type(value).__name__}")
    return [encodable(v, column) for v in values]


def given_tests(row: Mapping[str, Any]) -> list[str]:
    """The tests in the column `tests`; an empty list without that column."""
    given = row.get("tests")
    return [] if given is None or (isinstance(given, (str, list)) and not given) else texts_of(given, "tests")


def given_references(row: Mapping[str, Any]) -> list[str] | None:
    """The texts in the column `references`; None without that column."""
    given = row.get("references")
    if given is not None and not isinstance(given, list):
        raise UserError(f"references must be a list of texts, got {type(given).__name__}")
    return texts_of(given, "references") if given else None
