"""Prompts as ids, within the limit: what is cut from one that is too long, and in which order."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from .chat import ChatTemplate
from .conversations import Conversation
from .encoding import TextEncoder
from .templates import PromptTemplate
from .values import encodable

# No token has more characters. Text beyond so many characters for each token of the limit would be cut off anyway, and
# a tokenizer needs a minute for ten megabytes of text.
LONGEST_TOKEN = 256
# Names of what is counted if a row does not fit.
PROMPTS_CUT, RESPONSES_CUT, TURNS_DROPPED = "prompts_cut", "responses_cut", "turns_dropped"


class Prompts:
    """Tokenises prompts.

    Args:
        encoder: the tokenizer's encoder.
        most: the most tokens of a prompt.
        encoder_decoder: whether the model reads the prompt with an encoder.
    """

    def __init__(self, encoder: TextEncoder, most: int, encoder_decoder: bool) -> None:
        self.encoder, self.tokenizer, self.most = encoder, encoder.tokenizer, most
        self._encoder_decoder = encoder_decoder
        self._bos, self._eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id

    def ids_of_all(self, prompts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of prompts, tokenised together.

        Args:
            prompts: guarded texts, each with whether the chat template rendered it. The end of a rendered one may be
                missing from its ids if there are too many anyway.
        """
        chats = iter(self.encoder.ids_of_all([self._readable(text) for text, is_chat in prompts if is_chat]))
        texts = [self._readable(text) for text, is_chat in prompts if not is_chat]
        others = iter(self._once(ids, text) for ids, text in zip(self.encoder.ids_of_all(texts, True), texts))
        return [next(chats) if is_chat else next(others) for _, is_chat in prompts]

    def fitted(
        self, fields: Mapping[str, Any], template: PromptTemplate, parse: bool, cuts: Counter[str] | None
    ) -> tuple[str, list[int]]:
        """Render and tokenise a prompt from a template of text, cut to the limit.

        Args:
            fields: texts by name.
            template: the prompt's template.
            parse: whether special tokens in the fields are parsed.
            cuts: counts the prompt if it was cut.

        Returns:
            The prompt and its ids.

        Raises:
            UserError: the template alone is too long.
        """
        given = dict(fields)
        fields = self.bounded(fields, template)

        def made() -> tuple[str, list[int]]:
            text = template.render(self.encoder.guard(fields, parse))
            return encodable(self.encoder.plain(text), "the prompt"), self._once(self.encoder.ids(text, True), text)

        for cut in template.cut_order:
            text, ids = made()
            while len(ids) > self.most and fields[cut]:
                fields[cut] = self._cut_end(fields[cut], len(ids) - self.most)
                text, ids = made()
            if len(ids) <= self.most:
                if cuts is not None and any(fields[c] != (given.get(c) or "") for c in template.cut_order):
                    cuts[PROMPTS_CUT] += 1
                return text, ids
        raise UserError(f"the prompt template alone is {len(ids)} tokens, above max_prompt_length {self.most}")

    def bounded(self, fields: Mapping[str, Any], template: PromptTemplate) -> dict[str, Any]:
        """The fields. Those that may be cut lose the text for which there would be no room anyway."""
        return {**fields, **{c: (fields.get(c) or "")[: self.most * LONGEST_TOKEN] for c in template.cut_order}}

    def is_cut(self, fields: Mapping[str, Any]) -> bool:
        """Whether `bounded` would cut one of these fields."""
        return any(len(text or "") > self.most * LONGEST_TOKEN for text in fields.values())

    def shorter_chat(
        self, chat: ChatTemplate, conversation: Conversation, parse: bool, cuts: Counter[str]
    ) -> tuple[Conversation, str, list[int], str]:
        """Render a conversation that is too long without its oldest exchanges, and if necessary with a cut question.

        Args:
            chat: renders the conversation.
            conversation: the conversation. Its last question is kept.
            parse: whether special tokens in its texts are parsed.
            cuts: counts what was cut.

        Returns:
            The shorter conversation, its guarded prompt, the prompt's ids, and the answer as the template renders it.

        Raises:
            UserError: the prompt is too long even without its question.
        """

        def made(c: Conversation) -> tuple[str, list[int], str]:
            prompt, answer = chat.split(c, parse)
            return prompt, self.encoder.ids(self._readable(prompt)), answer

        exchanges = len(conversation.exchanges())
        dropped = bisect_left(range(exchanges), True, key=lambda n: len(made(conversation.without(n))[1]) <= self.most)
        shorter = conversation.without(min(dropped, exchanges - 1))
        question = shorter.turns[-1]["content"]
        text = question[: self.most * LONGEST_TOKEN]
        prompt, ids, answer = made(shorter.asking(text))
        while len(ids) > self.most and text:
            text = self._cut_end(text, len(ids) - self.most)
            prompt, ids, answer = made(shorter.asking(text))
        if len(ids) > self.most:
            raise UserError(
                f"without its older turns and its question the chat is still longer than max_prompt_length {self.most}"
            )
        cuts[TURNS_DROPPED] += len(conversation.turns) - len(shorter.turns)
        cuts[PROMPTS_CUT] += text != question
        return shorter.asking(text), prompt, ids, answer

    def _readable(self, text: str) -> str:
        """A text; if it is very long, only as much of it as surely has more tokens than there is room for."""
        return text[: (self.most + 1) * LONGEST_TOKEN]

    def _once(self, ids: list[int], text: str) -> list[int]:
        """A prompt's ids without doubled special tokens, and without an end token unless it is for an encoder."""
        bos, eos = self._bos, self._eos
        if self._encoder_decoder:
            return ids[1:] if ids[:2] == [bos, bos] else ids
        if ids[:2] == [bos, bos]:  # rendered already
            return self.encoder.ids(text)
        # Some tokenizers put an end token after every text. After the prompt, it would end the sample.
        return ids[:-1] if ids[-1:] == [eos] and self.encoder.ids(text)[-1:] != [eos] else ids

    def _cut_end(self, text: str, excess: int) -> str:
        ids = self.encoder.ids(self.encoder.guard(text))
        shorter = str(self.tokenizer.decode(ids[: max(0, len(ids) - excess)], skip_special_tokens=True)).rstrip("�")
        return shorter if len(shorter) < len(text) else text[: len(text) - excess]
