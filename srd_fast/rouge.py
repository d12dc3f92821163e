"""ROUGE-L as `rouge-score` computes it (F-measure, Porter stemmer), equal to the last bit.

rouge-score's tokenizer keeps only a-z and 0-9. A second tokenizer serves the scripts that it would lose.
"""

import logging
import os
import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import count, pairwise
from typing import Any

import regex
from nltk.stem.porter import PorterStemmer  # rouge-score's stemmer, installed with it
from rapidfuzz.distance import LCSseq

from .errors import UserError, first_line
from .suggest import unknown_name

logger = logging.getLogger(__name__)

MODES = ("auto", "by_sample", "rouge", "unicode")
MAX_WORDS = 2**17  # distinct words whose stem a scorer remembers
# Two processes, each with a core of its own, are faster from 60,000 pairs of 34 words on (python -m benchmarks.rouge).
PAIRS_PER_PROCESS = 50_000
# What rouge-score's tokenizer may lose before another one is chosen: a tenth of a data set's letters (Western European
# languages lose 2 to 5 % to accents, Czech 14 %, Vietnamese 27 %); half of one reference's letters (a short English
# answer may be a name with accents); and a fifth of a reference's words, if they are in another script than Latin.
LOST_IN_DATA, LOST_IN_SAMPLE, LOST_WORDS = 0.1, 0.5, 0.2

_ALPHANUMERIC = bytes(c if chr(c).isalnum() else ord(" ") for c in range(128)).ljust(256)
_NO_LETTERS = bytes(c for c in range(128) if not chr(c).isalpha())
_NOT_ASCII = dict.fromkeys(range(128))
# Scripts whose words no space separates: East Asia's, and those whose lines Unicode breaks by a dictionary (SA).
_UNSPACED = r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\u30fc\p{Line_Break=SA}]--[\p{Nd}\p{M}]]"
_WORD = r"[\p{L}\p{N}\p{M}]"
_UNICODE_TOKEN = regex.compile(rf"(?V1){_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED}){_WORD})+|[^\s{_WORD}]")
_OTHER_SCRIPT = regex.compile(r"(?V1)[\p{L}--[\p{Latin}\p{Common}\p{Inherited}]]")
_IGNORABLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_PORTER = PorterStemmer()


def rouge_words(text: str) -> list[bytes]:
    """Runs of a-z and 0-9 in the lower-cased text: the tokens of `rouge_score.tokenize` before stemming."""
    return text.lower().encode("ascii", "replace").translate(_ALPHANUMERIC).split()


def normal_form(text: str) -> str:
    """The text in lower case and in one encoding of each character, without invisible characters and width variants."""
    if not text.isascii():
        text = _IGNORABLE.sub("", unicodedata.normalize("NFKC", text))
        text = unicodedata.normalize("NFKC", text.casefold())
    return text.casefold()


def unicode_tokens(text: str) -> list[str]:
    """Words of any script in a text's `normal_form`.

    A mark belongs to its letter. Characters of scripts without spaces, and symbols, are tokens of their own.

    Args:
        text: any.

    Returns:
        The tokens in their order.

    Examples:
        >>> unicode_tokens("\u5317\u4eac AI \uff12\uff10!")
        ['\u5317', '\u4eac', 'ai', '20', '!']
    """
    return _UNICODE_TOKEN.findall(normal_form(text))


def _letters(texts: Iterable[str]) -> tuple[int, int]:
    """How many letters texts have, and how many of them rouge-score's tokenizer would lose."""
    known = lost = 0
    for text in texts:
        if not text.isascii():
            text = unicodedata.normalize("NFC", text)
            lost += sum(map(str.isalpha, text.translate(_NOT_ASCII)))
        known += len(text.encode("ascii", "ignore").translate(None, _NO_LETTERS))
    return known + lost, lost


def choose_tokenizer(tokenizer: str, references: Iterable[Sequence[str]]) -> str:
    """Make the choice for "auto", and log it if it is not rouge-score's tokenizer.

    Args:
        tokenizer: a name that `RougeL` takes.
        references: the references of every sample of a whole data set, so that all parts of it get the same choice.

    Returns:
        The name itself, or for "auto": "unicode" if rouge-score's tokenizer would lose more than a tenth of the
        letters, else "by_sample".

    Raises:
        UserError: the tokenizer is unknown.
    """
    if tokenizer not in MODES:
        raise UserError(unknown_name("ROUGE tokenizer", tokenizer, MODES))
    if tokenizer != "auto":
        return tokenizer
    letters, lost = _letters(text for of_sample in references for text in of_sample)
    if lost <= LOST_IN_DATA * letters:
        return "by_sample"
    logger.warning(
        "ROUGE-L reads words of any script (rouge_tokenizer unicode): rouge-score's tokenizer, which keeps a-z and "
        "0-9, would lose %.0f %% of the references' letters", 100 * lost / letters,
    )  # fmt: skip
    return "unicode"


def _unreadable(references: Sequence[str], words: Sequence[Sequence[int]]) -> bool:
    """Whether rouge-score's tokenizer leaves nothing of a sample's references, or loses most of their letters."""
    nothing = not any(words)
    if nothing or all(map(str.isascii, references)):
        return nothing and any(r.strip() for r in references)
    return any(map(_mostly_lost, references))


def _mostly_lost(reference: str) -> bool:
    """Whether rouge-score's tokenizer loses most letters of a reference, or too many of its words of other scripts."""
    if reference.isascii():
        return False
    letters, lost = _letters([reference])
    if lost > LOST_IN_SAMPLE * letters:
        return True
    words = [token for token in unicode_tokens(reference) if token[0].isalnum()]
    return sum(_OTHER_SCRIPT.search(word) is not None for word in words) > LOST_WORDS * len(words)


def _stem(word: bytes) -> str:
    return _PORTER.stem(word.decode(), to_lowercase=False) if len(word) > 3 else word.decode()


class _Numbers(dict[Any, int]):
    """Token -> number. Tokens with the same stem have the same number."""

    def __init__(self, stem: Callable[[Any], str]) -> None:
        self._stem, self._of_stem, self._free = stem, dict[str, int](), count()

    def __missing__(self, token: Any) -> int:
        return self.setdefault(token, self._of_stem.setdefault(self._stem(token), next(self._free)))


class _Reader:
    """Text -> numbers of its tokens. Only texts read by the same reader can be compared."""

    def __init__(self, tokenize: Callable[[str], list[Any]], stem: Callable[[Any], str]) -> None:
        self._tokenize, self._stem = tokenize, stem
        self.numbers = _Numbers(stem)

    def __call__(self, text: str) -> list[int]:
        return list(map(self.numbers.__getitem__, self._tokenize(text)))

    def bounded(self) -> "_Reader":
        """This reader, or one with an empty memory if this one knows too many words."""
        return self if len(self.numbers) <= MAX_WORDS else _Reader(self._tokenize, self._stem)


def _f_measure(reference: list[int], prediction: list[int]) -> float:
    """F-measure of the longest common subsequence. The order of the operations is rouge-score's."""
    common = LCSseq.similarity(reference, prediction)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


class RougeL:
    """ROUGE-L F-measure, 0 to 1, the best over the references.

    Args:
        tokenizer: "rouge" is rouge-score's own, which keeps only a-z and 0-9. "unicode" is `unicode_tokens`.
            "by_sample" is rouge-score's, or "unicode" for a sample whose references would lose most of their letters.
            "auto" is what `choose_tokenizer` chooses for all references that `score_all` is given; for `score` it is
            "by_sample".

    Attributes:
        emptied: the number of samples whose references would lose most of their letters, or all, with rouge-score's
            tokenizer; 0 with "unicode".

    Raises:
        UserError: the tokenizer is unknown.

    Examples:
        >>> RougeL().score("The cats sat", ["the cat sat down"])
        0.8571428571428571
    """

    def __init__(self, tokenizer: str = "auto") -> None:
        if tokenizer not in MODES:
            raise UserError(unknown_name("ROUGE tokenizer", tokenizer, MODES))
        self.mode = tokenizer
        self.emptied = 0
        self._rouge, self._unicode = _Reader(rouge_words, _stem), _Reader(unicode_tokens, str)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score one answer.

        Args:
            prediction: the answer.
            references: texts to compare it with.

        Returns:
            The best F-measure; 0 for an empty answer, or without references.
        """
        self._rouge, self._unicode = self._rouge.bounded(), self._unicode.bounded()
        read = self._unicode if self.mode == "unicode" else self._rouge
        wanted = [read(r) for r in references]
        if self.mode != "unicode" and _unreadable(references, wanted):
            self.emptied += 1
            if self.mode != "rouge":
                read = self._unicode
                wanted = [read(r) for r in references]
        found = read(prediction)
        return max((_f_measure(w, found) for w in wanted), default=0.0)

    def score_all(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], workers: int | None = None
    ) -> list[float]:
        """Score many answers.

        Args:
            predictions: the answer of each sample.
            references: the texts to compare each answer with.
            workers: number of processes, including this one, at least 1. Default: one for each CPU, but no more than
                one for each `PAIRS_PER_PROCESS` samples.

        Returns:
            The F-measure of each sample.

        Raises:
            UserError: predictions and references differ in number, or workers is below 1.
        """
        samples = len(predictions)
        if samples != len(references):
            raise UserError(f"ROUGE-L needs references for each prediction: {samples} and {len(references)} were given")
        if workers is not None and workers < 1:
            raise UserError(f"workers must be at least 1, not {workers}")
        mode = choose_tokenizer(self.mode, references)
        if mode != self.mode:
            chosen = RougeL(mode)
            scores = chosen.score_all(predictions, references, workers)
            self.emptied += chosen.emptied
            return scores
        workers = min(workers, max(samples, 1)) if workers else max(1, min(_cpus(), samples // PAIRS_PER_PROCESS))
        if workers > 1:
            cuts = [samples * i // workers for i in range(workers + 1)]
            try:
                parts = _in_processes([(self.mode, predictions[a:b], references[a:b]) for a, b in pairwise(cuts)])
                self.emptied += sum(emptied for _, emptied in parts)
                return [score for scores, _ in parts for score in scores]
            except (OSError, EOFError, pickle.PickleError) as e:
                logger.warning("ROUGE-L in %d processes failed (%s), so it takes one", workers, first_line(e))
        return list(map(self.score, predictions, references))


_Chunk = tuple[str, Sequence[str], Sequence[Sequence[str]]]
_Scores = tuple[list[float], int]
# multiprocessing (spawn) starts a process by running the caller's script again: its imports, which may take seconds,
# and even its work, if the script does not check __name__. This child imports only srd_fast.rouge.
_CHILD = """
import pickle, sys
sys.path[:], chunk = pickle.load(sys.stdin.buffer)
from srd_fast.rouge import _score_chunk
pickle.dump(_score_chunk(chunk), sys.stdout.buffer)
"""


def _score_chunk(chunk: _Chunk) -> _Scores:
    """Scores, and the number of emptied samples."""
    mode, predictions, references = chunk
    scorer = RougeL(mode)
    return scorer.score_all(predictions, references, workers=1), scorer.emptied


def _in_processes(chunks: Sequence[_Chunk]) -> list[_Scores]:
    """Run `_score_chunk` on the first chunk here, and on each other chunk in a Python process of its own."""
    with ExitStack() as stack:
        command = [sys.executable, "-c", _CHILD]
        pipes: list[tuple[Any, Any]] = []
        for _ in chunks[1:]:
            child = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            pipes.append((child.stdin, child.stdout))
        for (to, _), chunk in zip(pipes, chunks[1:]):
            pickle.dump((sys.path, chunk), to)
            to.close()
        return [_score_chunk(chunks[0]), *(pickle.load(back) for _, back in pipes)]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
