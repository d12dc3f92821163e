"""From text to ids, for data that may contain the text of a special token, which must stay plain text.

`guard` puts a break into every such text. A text that a template renders from guarded texts has special tokens only
where the template itself wrote them. `ids` cuts a guarded text at its breaks, so that no token spans one. `plain`
removes the breaks.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# A code point that Unicode reserves for internal use. If a text contains it nevertheless, it is doubled.
_BREAK = "\ufdd0"
_LONE_BREAK = re.compile(f"(?<!{_BREAK}){_BREAK}(?!{_BREAK})")


class TextEncoder:
    """Encodes the beginning of a sample, and its continuation.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._newline = self._prefix_space_marker()

    @property
    def _added(self) -> list[AddedToken]:
        return list(getattr(self.tokenizer, "added_tokens_decoder", {}).values())

    @cached_property
    def special(self) -> tuple[str, ...]:
        """Texts of the special tokens, longest first."""
        texts = {*(t.content for t in self._added if t.special), *map(str, self.tokenizer.all_special_tokens)}
        return tuple(sorted(texts - {""}, key=lambda t: (-len(t), t)))

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Texts of all added tokens that are not blank, special or not, longest first."""
        texts = {*(t.content for t in self._added), *self.special}
        return tuple(sorted((t for t in texts if t.strip()), key=lambda t: (-len(t), t)))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return _any_of(self.special)

    def guard(self, value: Any, parse: bool = False, others: Iterable[str] = ()) -> Any:
        """Put breaks into texts of special tokens, so that they stay plain text.

        Args:
            value: a text, or lists and dicts of texts. Keys are not changed.
            parse: put no breaks into special tokens.
            others: texts that are treated as special tokens too.

        Returns:
            The same value with breaks.
        """
        if not isinstance(value, str):
            if isinstance(value, Mapping):
                return {k: self.guard(v, parse, others) for k, v in value.items()}
            return [self.guard(v, parse, others) for v in value] if isinstance(value, list) else value
        text = value.replace(_BREAK, 2 * _BREAK)
        if parse:
            return text
        pattern = _any_of([*self.special, *others]) if others else self._special_pattern
        return pattern.sub(lambda m: f"{m[0][0]}{_BREAK}{m[0][1:]}", text)

    def plain(self, text: str) -> str:
        """The text without breaks."""
        return "".join(_pieces(text))

    def without_special(self, text: str) -> str:
        """The text that remains when its tokens are decoded without special tokens."""
        return self._special_pattern.sub("", text)

    def trailing(self, text: str) -> list[tuple[int, str]]:
        """The added tokens at the end of a guarded text, apart from white space: where each ends, and its text."""
        found: list[tuple[int, str]] = []
        while (text := text.rstrip()).endswith(self.added):
            mark = next(t for t in self.added if text.endswith(t))
            found.append((len(text), mark))
            text = text.removesuffix(mark)
        return found[::-1]

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Ids of a guarded text that begins a sample.

        Args:
            text: a guarded text.
            special: let the tokenizer add its special tokens.
        """
        first, *others = _pieces(text)
        if not others:
            return self._whole(first, special)
        begun = self._whole(first)
        before, after = self._around if special else ([], [])
        return [*before, *begun, *(i for piece in others for i in self._behind(piece)), *after]

    def ids_of_all(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """What `ids` gives for each text, tokenised together."""
        return self._together(texts, lambda some: self._whole_of_all(some, special), lambda x: self.ids(x, special))

    def continuation_ids_of_all(self, texts: Sequence[str]) -> list[list[int]]:
        """What `continuation_ids` gives for each text, tokenised together."""
        if not self._newline:
            return self._together(texts, self._whole_of_all, self.continuation_ids)
        size = len(self._newline)

        def behind(some: list[str]) -> list[list[int]]:
            found = self._whole_of_all(["\n" + text for text in some])
            return [ids[size:] if ids[:size] == self._newline else self._whole(x) for ids, x in zip(found, some)]

        return self._together(texts, behind, self.continuation_ids)

    def target_ids_of_all(self, texts: Sequence[str]) -> list[list[int]]:
        """What `target_ids` gives for each text, tokenised together."""

        def targets(some: list[str]) -> list[list[int]]:
            found = self.tokenizer(text_target=some, add_special_tokens=False).input_ids
            return [[*self._opening, *ids] for ids in found]

        return self._together(texts, targets, self.target_ids)

    def _together(
        self, texts: Sequence[str], many: Callable[[list[str]], list[list[int]]], one: Callable[[str], list[int]]
    ) -> list[list[int]]:
        """Ids of texts: those without breaks by `many`, the others by `one`."""
        plain = [text for text in texts if _BREAK not in text]
        ids = iter(many(plain) if plain else [])
        return [next(ids) if _BREAK not in text else one(text) for text in texts]

    def continuation_ids(self, text: str) -> list[int]:
        """Ids of a guarded text that follows other tokens."""
        return [i for piece in _pieces(text) for i in self._behind(piece)]

    def target_ids(self, text: str) -> list[int]:
        """Ids of a guarded text for a decoder, after the tokens with which the tokenizer begins such texts.

        Some tokenizers encode it differently from a text for an encoder.
        """
        first, *others = _pieces(text)
        return [*self._opening, *self._target(first), *(i for piece in others for i in self._behind(piece))]

    def _target(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text_target=text, add_special_tokens=special).input_ids)

    @cached_property
    def _opening(self) -> list[int]:
        """The ids that the tokenizer puts before a target: BART's <s>, a code of the language."""
        alone, whole = self._target("a"), self._target("a", special=True)
        return whole[: next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)]

    def _whole(self, text: str, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special).input_ids)

    def _whole_of_all(self, texts: list[str], special: bool = False) -> list[list[int]]:
        if not self._is_plain:
            return list(self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False).input_ids)
        self.tokenizer("a")  # turns truncation and padding off in the backend
        found = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [encoding.ids for encoding in found]

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the tokenizer gives exactly the ids of its backend.

        Calling the backend directly takes a tenth of the time, because it leaves out offsets and other results.
        """
        kind = type(self.tokenizer)
        calls = ("__call__", "_encode_plus", "backend_tokenizer")
        return isinstance(self.tokenizer, PreTrainedTokenizerFast) and all(
            getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in calls
        )

    def _behind(self, text: str) -> list[int]:
        if self._newline:
            ids = self._whole("\n" + text)
            if ids[: len(self._newline)] == self._newline:
                return ids[len(self._newline) :]
        return self._whole(text)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer adds before and after a text."""
        alone, whole = self._whole("a"), self._whole("a", special=True)
        start = next(i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        return whole[:start], whole[start + len(alone) :]

    def _prefix_space_marker(self) -> list[int]:
        """The ids of a newline if this tokenizer puts a space before every text (SentencePiece), else none.

        Such a tokenizer would turn the response "a" into " a"; after a newline it does not.
        """
        newline, alone, behind = self._whole("\n"), self._whole("a"), self._whole("\na")
        shift = behind[: len(newline)] == newline and behind[len(newline) :] != alone
        return newline if shift else []


def _pieces(text: str) -> list[str]:
    """A guarded text, cut at its breaks."""
    if _BREAK not in text:
        return [text]
    return [piece.replace(2 * _BREAK, _BREAK) for piece in _LONE_BREAK.split(text)]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts that a break can divide, the longest first."""
    divisible = sorted((t for t in texts if len(t) > 1), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, divisible)) or "(?!)")
