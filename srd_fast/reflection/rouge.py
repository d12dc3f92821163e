"""ROUGE-L as `rouge-score` computes it (F-measure, Porter stemmer), and a way out for text its tokenizer empties."""

import re
from collections.abc import Sequence

from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from ..errors import UserError
from ..suggest import unknown_name

MODES = ("auto", "rouge", "unicode")
# Scripts written without spaces count a character as a token: Thai and Lao, kana, Han, Hangul stays with its words.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]|_", re.UNICODE)


class UnicodeTokenizer(Tokenizer):
    """Lower-cased words of any script, characters of scripts without spaces, and every symbol as a token."""

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text."""
        return _TOKEN.findall(text.casefold())


class RougeL:
    """ROUGE-L F-measure in 0..1, the best over the references.

    Args:
        tokenizer: "rouge" is rouge-score's own, which keeps a-z and 0-9 only; "unicode" is `UnicodeTokenizer`; "auto"
            is rouge-score's except where it leaves nothing of any reference, and counts those samples.

    Example:
        >>> RougeL().score("The cats sat", ["the cat sat down"])
        0.8571428571428571
    """

    def __init__(self, tokenizer: str = "auto") -> None:
        if tokenizer not in MODES:
            raise UserError(unknown_name("ROUGE tokenizer", tokenizer, MODES))
        self.mode = tokenizer
        self.emptied = 0
        self._plain = DefaultTokenizer(use_stemmer=True)
        self._rouge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
        self._unicode = rouge_scorer.RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score one answer; 0 for an empty one."""
        emptied = self.mode != "unicode" and not any(self._plain.tokenize(r) for r in references)
        self.emptied += emptied and any(r.strip() for r in references)
        scorer = self._unicode if self.mode == "unicode" or (emptied and self.mode == "auto") else self._rouge
        return max(float(scorer.score(r, prediction)["rougeL"].fmeasure) for r in references)
