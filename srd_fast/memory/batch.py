"""A micro-batch, as far as memory goes."""

from dataclasses import dataclass

from ..data import padded_tokens


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Args:
        lengths: of its samples, in tokens.
        rows: how many tokens have a loss.
        prompts: tokens of each prompt, for encoder-decoder models.
    """

    lengths: tuple[int, ...]
    rows: int
    prompts: tuple[int, ...] | None = None

    @property
    def sequences(self) -> list[tuple[int, ...]]:
        """Tokens of the sequences that a model makes of each sample, as `data.sequence_lengths` says them."""
        if self.prompts is None:
            return [(n,) for n in self.lengths]
        return [(prompt, 1 + n - prompt) for n, prompt in zip(self.lengths, self.prompts)]

    def tokens(self, flattened: bool) -> int:
        """Of the batch, padding included."""
        return sum(map(sum, self.sequences)) if flattened else padded_tokens(self.sequences)
