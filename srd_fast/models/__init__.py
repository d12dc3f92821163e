"""Causal language models as distillation sees them: a body that gives hidden states, a head that gives logits."""

from .heads import check_head, find_head, last_hidden_state, unwrap
from .loading import check_tokenizers, fingerprint, load_model, load_tokenizer, resolve_model
from .pruning import prune_depth

__all__ = [
    "check_head",
    "check_tokenizers",
    "find_head",
    "fingerprint",
    "last_hidden_state",
    "load_model",
    "load_tokenizer",
    "prune_depth",
    "resolve_model",
    "unwrap",
]
