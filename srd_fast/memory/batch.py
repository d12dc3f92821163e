"""The sizes of a micro-batch that matter for memory."""

from dataclasses import dataclass

from ..data import padded_tokens


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Args:
        lengths: lengths of its samples, in tokens.
        rows: how many tokens have a loss.
        prompts: lengths of the prompts in tokens, for encoder-decoder models.
    """

    lengths: tuple[int, ...]
    rows: int
    prompts: tuple[int, ...] | None = None

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """Lengths of the sequences that a model makes of each sample, as `data.sequence_lengths` returns them."""
        if self.prompts is None:
            return [(n,) for n in self.lengths]
        return [(prompt, 1 + n - prompt) for n, prompt in zip(self.lengths, self.prompts)]

    def tokens(self, flattened: bool) -> int:
        """Tokens of the batch, including padding."""
        return sum(map(sum, self.sequences)) if flattened else padded_tokens(self.sequences)
