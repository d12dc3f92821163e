"""The final number of an answer, by which problems like those of GSM8K are judged (arXiv 2110.14168)."""

import re
from decimal import Decimal

from ..rouge import normal_form

# Digits with or without thousands separators. A minus is a sign unless it follows a word or a number.
_NUMBER = re.compile(r"(?:(?<![\w.,)\]])-[$€£]?)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-"})
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The number after the last "####" of a text, if there is one; else the last number in it.

    Currency signs, units and thousands separators are ignored; digits of other widths are read as digits.

    Args:
        text: an answer or a reference.

    Returns:
        The number's value; None if there is no number.

    Examples:
        >>> final_number("5 boxes of 250 are 5 * 250 = $1,250.00.")
        Decimal('1250.00')
        >>> final_number("3 + 4 = 7 #### 7 apples, as 2 are gone")
        Decimal('7')
    """
    text = normal_form(text).translate(_SIGNS)
    before, mark, behind = text.rpartition(_MARK)
    if mark and (first := _NUMBER.search(behind)):
        return _value(first[0])
    found = _NUMBER.findall(before if mark else text)
    return _value(found[-1]) if found else None


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[^0-9.-]", "", number))
