"""Two tokenizers are one if they give the same ids to every text, whatever classes they are of."""

import pytest
import tiny
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from srd_fast import UserError
from srd_fast.models import check_tokenizers, tokenizer_digest


class InPython(PreTrainedTokenizer):
    """The tokens of another tokenizer, in a class without a compiled backend."""

    def __init__(self, other: PreTrainedTokenizerFast, shift: int = 0) -> None:
        self._other, self._shift = other, shift
        self._ids = other.get_vocab()
        self._tokens = {i: t for t, i in self._ids.items()}
        super().__init__(eos_token=other.eos_token, pad_token=other.pad_token)

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        found = self._other.tokenize(text)
        return found[self._shift :] if self._shift else found

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]


def with_tokens(*tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def test_the_class_of_a_tokenizer_does_not_matter() -> None:
    fast = tiny.tiny_tokenizer()
    slow = InPython(fast)
    assert getattr(slow, "backend_tokenizer", None) is None
    check_tokenizers(slow, fast)
    check_tokenizers(fast, slow)
    check_tokenizers(slow, InPython(fast))
    with pytest.raises(UserError, match="cut text differently"):
        check_tokenizers(InPython(fast, shift=1), fast)


@pytest.mark.parametrize("own", [("[PAD]",), ("[PAD]", "<think>", "</think>")], ids=len)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_tokens_of_one_side_alone_are_allowed_when_asked_for(own: tuple[str, ...], side: str) -> None:
    pair = (with_tokens(*own), tiny.tiny_tokenizer())
    student, teacher = pair if side == "student" else pair[::-1]
    with pytest.raises(UserError, match=r"'\S+' is (None|\d+) and (None|\d+)\): .* with shared_vocabulary=True"):
        check_tokenizers(student, teacher)
    check_tokenizers(student, teacher, shared_vocabulary=True)


def test_no_option_allows_one_id_for_two_tokens() -> None:
    for ours, theirs in ((("<a>",), ("<b>",)), (("<a>", "<b>"), ("<b>", "<a>")), (("<a>", "<b>"), ("<b>",))):
        with pytest.raises(UserError, match="different tokenizers") as caught:
            check_tokenizers(with_tokens(*ours), with_tokens(*theirs), shared_vocabulary=True)
        assert "shared_vocabulary" not in str(caught.value)


def test_the_digest_follows_tokens_marks_and_template() -> None:
    plain, same = tiny.tiny_tokenizer(), tiny.tiny_tokenizer()
    assert tokenizer_digest(plain) == tokenizer_digest(same)
    other, marked = tiny.tiny_tokenizer(), tiny.tiny_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    marked.bos_token = tiny.EOS
    found = {tokenizer_digest(t) for t in (plain, other, marked, with_tokens("<a>"))}
    assert len(found) == 4
