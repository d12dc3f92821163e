"""Values of a YAML file and of `key=value` overrides, refused where no setting can hold them."""

import math
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from ..data import shown
from ..errors import UserError, first_line

# A config has a few hundred lines. PyYAML needs a second for this many bytes; and with aliases, each of which stands
# for a part of the file, a few lines could make endless values.
_MOST_BYTES = 100_000
_MOST_VALUES = 20_000
_DEEPEST = 20
QUICKSTART = "quickstart"  # the example that comes with the package
CONFIG_FILE = "config.yaml"  # of a run folder, and what srd-fast init writes


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The values of a config file.

    Raises:
        UserError: the file cannot be read, is not YAML, or has no keys.
    """
    try:
        with _opened(path) as f:
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


def _opened(path: str | Path) -> BinaryIO:
    """Open a file, or the config of a folder; for the name "quickstart", unless it exists, the package's example."""
    path = Path(path)
    if str(path) == QUICKSTART and not path.exists():
        path = Path(__file__).parent.parent / "examples" / "quickstart.yaml"
    return (path / CONFIG_FILE if path.is_dir() else path).open("rb")


def _parsed(text: str, complaint: str) -> Any:
    """The values of a YAML text.

    Raises:
        UserError: the text is not usable YAML. The message begins with `complaint`.
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
    except Exception as e:  # YAMLError, or errors of int(), date() and others, as for 2024-13-45
        raise UserError(f"{complaint}: {shown(' '.join(str(e).split()) or type(e).__name__, 500)}") from e


def _check_aliases(root: yaml.Node, complaint: str) -> None:
    """Refuse endless values, and a section with the same key twice, of which YAML would silently keep the last."""
    counts: dict[int, int] = {}  # number of values below a node, aliases expanded; -1: not known yet

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


def apply_override(content: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=value`. The value is YAML, except that 1e-4, which is text in YAML 1.1, is a number."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(assignment)!r} is not of the form key=value")
    if key.count(".") > _DEEPEST:
        raise UserError(f"override {shown(assignment)!r}: no key has so many dots")
    _check_text(key, "override")
    value = checked(_parsed(text, f"override {shown(assignment)!r}: the value is not valid YAML"), shown(key))
    *parents, last = key.split(".")
    level = content
    for parent in parents:
        level = level.setdefault(parent, {})
        if not isinstance(level, dict):
            raise UserError(f"override {shown(assignment)!r}: {shown(parent)!r} is not a section")
    level[last] = value


def checked(value: Any, where: str = "") -> Any:
    """Copy values, and convert numbers such as 1e-4, which is text in YAML 1.1.

    Args:
        value: a value from YAML.
        where: the key of the value, for the message.

    Raises:
        UserError: a key is not text or has a colon without a space, or a value is one that no setting can hold.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise UserError(f"config keys must be text, got {shown_value(key)} in {where or 'the file'}")
            _check_text(key, where or "a key")
            if value[key] is None and ":" in key:
                way = shown(key.replace(":", ": ", 1))
                raise UserError(f"config: {where or 'the file'}: YAML has a space after a colon: {way!r}")
        return {k: checked(v, f"{where}.{shown(k)}".strip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [checked(v, where) for v in value]
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"config: {where}: must be a number, got nan")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"config: {where}: must be a number of at most 18 digits, got {shown_value(value)}")
    if isinstance(value, str):
        _check_text(value, where)
        if value[:1] in "+-.0123456789" and "e" in value.lower():
            try:
                return float(value)
            except ValueError:
                return value
    return value


def _check_text(text: str, where: str) -> None:
    """Refuse text that cannot be written to a path or a file."""
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"config: {where}: holds a NUL or half of a surrogate pair, got {shown_value(text)}")


def shown_value(value: Any) -> str:
    """A value as text for a message."""
    try:
        return shown(repr(value), 200)
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return f"a {type(value).__name__} of thousands of digits"
