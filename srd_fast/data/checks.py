"""Checks of samples before a model sees them."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from ..errors import UserError

_AT_ONCE = 10_000


def check_token_ids(samples: Dataset | Iterable[Mapping[str, Any]], embeddings: Mapping[str, int]) -> None:
    """Refuse a sample with a token for which a model has no embedding.

    Args:
        samples: tokenised samples, with input_ids.
        embeddings: number of rows of each model's input embeddings, by the name that messages use for the model.

    Raises:
        UserError: a token has no embedding. The message names the sample, the token and the model.
    """
    who = min(embeddings, key=lambda name: embeddings[name])
    if isinstance(samples, Dataset):
        arrow = samples.select_columns(["input_ids"]).with_format("arrow")
        highest = (pc.max(pc.list_flatten(part["input_ids"])).as_py() for part in arrow.iter(_AT_ONCE))
        if all(x is None or x < embeddings[who] for x in highest):
            return
    for sample in samples:
        token = max(sample["input_ids"], default=0)
        if token >= embeddings[who]:
            name = str(sample.get("sample_id", "")) or "of the data"
            raise UserError(
                f"sample {name!r} has token {token}, and the {who} has embeddings for {embeddings[who]} tokens: "
                f"tokenise without that token, or give the {who} more (resize_token_embeddings)"
            )
