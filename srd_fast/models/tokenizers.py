"""Check that two tokenizers give the same ids to every text, so that a class means the same token to both models."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError

# Spaces, capitals, numbers, accents, scripts without spaces, emoji, code, and what a normaliser may fold.
_PROBES = (
    "Hello  World!\n\tdef f(x): return x**2  # 12345.678 naïve café 中文字符 😀 don't\r\n",
    " leading, trailing ",
    "ﬁ Å ① ２０２４ e\u0301 \u00a0\u200b",
    "Привет мир! नमस्ते दुनिया, สวัสดี, مرحبا بالعالم, 안녕하세요",
)


def check_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, shared_vocabulary: bool = False
) -> None:
    """Refuse two tokenizers that do not give the same ids to every text.

    The check compares the whole vocabulary (padding classes have no entry, so padded models pass), the merges if both
    have some, and the ids of a few texts in many scripts. The tokenizers may be of different Python classes.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        shared_vocabulary: allow tokens that only one of the two has, at ids that the other does not use.

    Raises:
        UserError: they differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=str)
    in_conflict = _in_conflict(ours, theirs, differing)
    if in_conflict or (differing and not shared_vocabulary):
        token = (in_conflict or differing)[0]
        way_out = "needs the same one"
        if not in_conflict:
            way_out += ", or, with shared_vocabulary=True, goes over the tokens that both have"
        raise UserError(
            f"student and teacher have different tokenizers ({len(ours)} and {len(theirs)} tokens; {token!r} is "
            f"{ours.get(token)} and {theirs.get(token)}): distillation over the vocabulary {way_out}"
        )
    merges = [_merges(t) for t in (student, teacher)]
    cut_alike = all(student(text).input_ids == teacher(text).input_ids for text in _PROBES)
    if not cut_alike or (None not in merges and merges[0] != merges[1]):
        raise UserError(
            "student and teacher tokenizers share a vocabulary but cut text differently (merges, normaliser or "
            "special tokens differ): distillation over the vocabulary needs the same tokenizer"
        )


def _in_conflict(ours: dict[str, int], theirs: dict[str, int], differing: list[str]) -> list[str]:
    """The differing tokens that rule out even a partly shared vocabulary."""
    taken = set(ours.values()), set(theirs.values())
    found = []
    for token in differing:
        mine, other = ours.get(token), theirs.get(token)
        if (mine is not None and other is not None) or (mine in taken[1]) or (other in taken[0]):
            found.append(token)
    return found


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's tokens, merges, special tokens and chat template."""
    told = [
        sorted(tokenizer.get_vocab().items(), key=str),
        _merges(tokenizer),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    ]
    return hashlib.blake2b(json.dumps(told, default=str).encode(), digest_size=16).hexdigest()


def _merges(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The BPE merges; None for another kind of tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str()).get("model", {}).get("merges")
