"""ROUGE-L as `rouge-score` computes it (F-measure, Porter stemmer), equal to the last bit.

A second tokenizer serves text of which rouge-score's own leaves nothing.
"""

import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count, pairwise
from typing import Any

from nltk.stem.porter import PorterStemmer  # rouge-score's stemmer, installed with it
from rapidfuzz.distance import LCSseq

from .errors import UserError, first_line
from .suggest import unknown_name

logger = logging.getLogger(__name__)

MODES = ("auto", "rouge", "unicode")
MAX_WORDS = 2**17  # distinct words of which a scorer remembers the stem
# Two processes, each with a core to itself, pay from 60,000 pairs of 34 words on (python -m benchmarks.rouge).
PAIRS_PER_PROCESS = 50_000

_ALPHANUMERIC = bytes(c if chr(c).isalnum() else ord(" ") for c in range(128)).ljust(256)
# Scripts written without spaces count a character as a token: Thai and Lao, kana, Han, Hangul stays with its words.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_UNICODE_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]|_", re.UNICODE)
_PORTER = PorterStemmer()


def rouge_words(text: str) -> list[bytes]:
    """Runs of a-z and 0-9 in the lower-cased text: the tokens of `rouge_score.tokenize` before stemming."""
    return text.lower().encode("ascii", "replace").translate(_ALPHANUMERIC).split()


def unicode_tokens(text: str) -> list[str]:
    """Case-folded words of any script; characters of scripts without spaces, and symbols, are tokens of their own."""
    return _UNICODE_TOKEN.findall(text.casefold())


def _stem(word: bytes) -> str:
    return _PORTER.stem(word.decode(), to_lowercase=False) if len(word) > 3 else word.decode()


class _Numbers(dict[Any, int]):
    """Token -> a number. Tokens with the same stem have the same number."""

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
        tokenizer: "rouge" is rouge-score's own, which keeps only a-z and 0-9. "unicode" is `unicode_tokens`. "auto" is
            rouge-score's, except where it leaves nothing of any reference.

    Attributes:
        emptied: how many samples had references of which rouge-score's tokenizer left nothing.

    Raises:
        UserError: the tokenizer is unknown.

    Example:
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
        if self.mode != "unicode" and not any(wanted):
            self.emptied += any(r.strip() for r in references)
            if self.mode == "auto":
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
            workers: number of processes, this one included, at least 1. Default: one for each CPU, as long as each
                process has `PAIRS_PER_PROCESS` samples; fewer samples are scored in this process.

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
# and its work where nothing asks for __name__. This child imports srd_fast.rouge alone, whatever called it.
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
