"""The table of row formats: the columns of each, and how its rows are converted to a standard format.

Only the standard formats are tokenised; every other format has the same content under other names.

A data set has one format, the one with the most votes of its rows. A row votes for the first format of the table whose
columns all have a value in it; among the first four formats, it votes for all that fit. If two formats have equally
many votes, the first of the table wins. So additional columns change nothing if an earlier format fits.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..registry import Registry
from .conversations import SYSTEM
from .turns import as_messages, joined_turns

Row = Mapping[str, Any]
Convert = Callable[[Row], Row]

TEXT = "text"
_MOST_STATES = 10_000
# Columns that every row may have besides those of its format.
CARRIED = ("sample_id", "references", "tests", "tools", "system", "privileged")
STANDARD = (("instruction", "output"), ("prompt", "completion"), ("messages",), ("input_ids", "labels"), (TEXT,))


@dataclass(frozen=True)
class RowFormat:
    """A common format of rows.

    Args:
        columns: the columns that a row must have.
        convert: a row with values in these columns -> a row of a standard format. Its `sample_id`, `references`,
            `tests`, `tools`, `system` and `privileged` are kept. None: this is a standard format.
        optional: columns that are read if a row has them.
    """

    columns: tuple[str, ...]
    convert: Convert | None = None
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(self.columns)

    def standard(self, row: Row) -> tuple[tuple[str, ...], Row]:
        """Convert a row, and return it with the columns of its standard format.

        Raises:
            UserError: the row cannot be converted.
        """
        made = row if self.convert is None else self.convert(row)
        if made is row:
            return self.columns, row
        columns = next((kind for kind in STANDARD if all(c in made for c in kind)), None)
        if columns is None:
            raise UserError(f"the row format {self} makes {sorted(made)}, which is not a standard format")
        return columns, {**{c: row[c] for c in CARRIED if c in row}, **made}


def _texts(value: Any, column: str) -> Any:
    """A text, or a list of texts of which the first is the answer. It may be given as {"text": [...]}."""
    if isinstance(value, Mapping):
        value = value.get("text", value)
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(x, str) for x in value)):
        return value
    raise UserError(f"{column} must be text or a list of texts, got {type(value).__name__}")


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{column} must be text, got {type(value).__name__}")
    return value


def _has_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, Mapping) for turn in value)


_INPUTS = ("input", "context")
_SYSTEMS = ("system_prompt", "system_message")


def _system(row: Row) -> dict[str, Any]:
    """The system text under one of its other names, if there is none under its own."""
    found = next((row[c] for c in _SYSTEMS if row.get(c) is not None), None)
    return {} if found is None or row.get(SYSTEM) is not None else {SYSTEM: found}


def _pair(asked: str, answered: str, inputs: tuple[str, ...] = _INPUTS) -> RowFormat:
    """A question and its answer in two columns. A column `prompt` is used as it is; others go through the template.

    Either may be a list of turns: then they are a conversation.

    Args:
        asked: the column of the question.
        answered: the column of the answer or answers.
        inputs: columns with the text that the question is about. The first with a value counts.
    """
    as_it_stands = asked == "prompt"
    inputs = () if as_it_stands else tuple(c for c in inputs if c not in (asked, answered))

    def convert(row: Row) -> Row:
        if _has_turns(row[asked]) or _has_turns(row[answered]):
            return {"messages": joined_turns(row[asked], row[answered], asked, answered), **_system(row)}
        question, answer = _text(row[asked], asked), _texts(row[answered], answered)
        if as_it_stands:
            return {"prompt": question, "completion": answer, **_system(row)}
        about = next((c for c in inputs if row.get(c) not in (None, "")), None)
        text = "" if about is None else _text(row[about], about)
        return {"instruction": question, "input": text, "output": answer, **_system(row)}

    return RowFormat((asked, answered), convert, (*inputs, *_SYSTEMS))


def _conversation(column: str) -> RowFormat:
    return RowFormat((column,), lambda row: {"messages": as_messages(row[column], column), **_system(row)}, _SYSTEMS)


def _messages(row: Row) -> Row:
    messages = as_messages(row["messages"], "messages")
    return row if messages is row["messages"] else {"messages": messages}


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if not (_has_turns(prompt) or _has_turns(completion)):
        return row
    return {"messages": joined_turns(prompt, completion, "prompt", "completion")}


def _chosen(asked: str | None) -> RowFormat:
    """The better answer of a preference pair. The other answer is not read.

    Args:
        asked: the column of the question; None if the chosen answer is a whole conversation.
    """

    def convert(row: Row) -> Row:
        prompt, answer = None if asked is None else row[asked], row["chosen"]
        if isinstance(prompt, str) and isinstance(answer, str):
            pair = ("prompt", "completion") if asked == "prompt" else ("instruction", "output")
            return {**dict(zip(pair, (prompt, answer))), **_system(row)}
        if asked is None and isinstance(answer, str):
            return _of_two_voices(answer)
        return {"messages": joined_turns(prompt, answer, asked or "", "chosen"), **_system(row)}

    return RowFormat(("chosen",) if asked is None else (asked, "chosen"), convert, _SYSTEMS)


def _of_two_voices(text: str) -> Row:
    """Split a text of paragraphs that begin with Human: and Assistant: before its last answer."""
    before, voice, answer = text.rpartition("\n\nAssistant:")
    if not voice:
        raise UserError(
            "chosen is text, and neither a column prompt nor a last '\\n\\nAssistant:' says what it answers"
        )
    return {"prompt": before + voice, "completion": answer}


ROW_FORMATS: Registry[RowFormat] = Registry(
    "row format",
    {
        "instruction": RowFormat(("instruction", "output"), None, ("input",)),
        "prompt": RowFormat(("prompt", "completion"), _prompt_completion),
        "messages": RowFormat(("messages",), _messages),
        "tokenised": RowFormat(("input_ids", "labels"), None, ("prompt", "privileged_ids")),
        "sharegpt": _conversation("conversations"),
        "conversation": _conversation("conversation"),
        "preference": _chosen("prompt"),
        "preference of a question": _chosen("question"),
        "preference of an instruction": _chosen("instruction"),
        "preference of conversations": _chosen(None),
        "dolly": _pair("instruction", "response"),
        "instruction/answer": _pair("instruction", "answer"),
        "instruction/completion": _pair("instruction", "completion"),
        "prompt/response": _pair("prompt", "response"),
        "prompt/output": _pair("prompt", "output"),
        "prompt/answer": _pair("prompt", "answer"),
        "question/answer": _pair("question", "answer"),
        "question/response": _pair("question", "response"),
        "question/answers": _pair("question", "answers"),
        "question/solution": _pair("question", "solution"),
        "query/response": _pair("query", "response"),
        "query/answer": _pair("query", "answer"),
        "problem/solution": _pair("problem", "solution"),
        "input/output": _pair("input", "output"),
        "input/response": _pair("input", "response"),
        "input/target": _pair("input", "target"),
        "inputs/targets": _pair("inputs", "targets"),
        "source/target": _pair("source", "target"),
        "article/highlights": _pair("article", "highlights", ()),
        "document/summary": _pair("document", "summary", ()),
        "dialogue/summary": _pair("dialogue", "summary", ()),
        "text/summary": _pair(TEXT, "summary", ()),
        "contents": _conversation("contents"),
        "dialogue": _conversation("dialogue"),
        "dialog": _conversation("dialog"),
        "turns": _conversation("turns"),
        "data": _conversation("data"),
        TEXT: RowFormat((TEXT,)),
    },
)
# A row votes for each of these that fits, so that the columns of one do not matter to rows of another.
_FIRST = tuple(ROW_FORMATS.get(name) for name in ("instruction", "prompt", "messages", "tokenised"))


def register_row_format(
    name: str, columns: Iterable[str], convert: Convert, *, optional: Iterable[str] = (), replace: bool = False
) -> None:
    """Add a row format. It goes before all built-in formats.

    Args:
        name: a new name; an existing one only with `replace=True`.
        columns: the columns that a row must have.
        convert: `convert(row)` -> a row with instruction/input/output, prompt/completion, messages, or
            input_ids/labels. It may raise `UserError`: the row is then rejected for that reason.
        optional: columns that `convert` reads if a row has them.
        replace: whether an existing format of this name is replaced.

    Raises:
        UserError: the name is taken, or is not text, or there are no columns.
    """
    made = RowFormat(tuple(columns), convert, tuple(optional))
    if not made.columns:
        raise UserError(f"row format {name!r} needs at least one column to be recognised by")
    ROW_FORMATS.register(name, made, replace=replace)


def row_format_names() -> list[str]:
    """The names of all row formats, including those that you registered.

    Returns:
        In alphabetical order.
    """
    return ROW_FORMATS.names()


def choose_format(rows: Iterable[Row], among: Iterable[RowFormat] | None = None) -> RowFormat | None:
    """The format of rows, by the rule at the head of this file; None if no row has all columns of any format.

    Args:
        rows: the rows of a data set.
        among: formats to choose from. Default: all.
    """
    order = ordered_formats() if among is None else list(among)
    filled: Counter[RowFormat] = Counter()
    there: Counter[RowFormat] = Counter()
    # Most rows have the same columns with values, so each such set of columns is looked at only once.
    of_columns: dict[tuple[str, ...], tuple[list[RowFormat], list[RowFormat]]] = {}
    for row in rows:
        state = (*row, "", *[c for c, value in row.items() if value is not None])
        if state not in of_columns:
            if len(of_columns) > _MOST_STATES:
                of_columns.clear()
            of_columns[state] = _counted(row, order)
        has, knows = of_columns[state]
        filled.update(has)
        there.update(knows)
    if not there:
        return None
    return max(order, key=lambda each: (filled[each], there[each]))


def ordered_formats() -> list[RowFormat]:
    """All formats: those that users registered, the newest first, then the built-in ones."""
    known = ROW_FORMATS.things()
    own = [each for each in known if each not in _BUILT_IN]
    return [*own[::-1], *(each for each in known if each in _BUILT_IN)]


def _counted(row: Row, order: list[RowFormat]) -> tuple[list[RowFormat], list[RowFormat]]:
    """The formats that a row votes for: by its values, and by its columns alone."""
    has = [each for each in order if all(row.get(c) is not None for c in each.columns)]
    knows = [each for each in order if all(c in row for c in each.columns)]
    return _leading(has), _leading(knows)


def _leading(formats: list[RowFormat]) -> list[RowFormat]:
    """The first format, or all that are among the first four of the table."""
    standard = [each for each in formats if each in _FIRST]
    return standard if standard and formats[0] in _FIRST else formats[:1]


_BUILT_IN = frozenset(ROW_FORMATS.things())
