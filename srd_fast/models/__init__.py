"""Causal language models as distillation sees them: a body that gives hidden states, a head that gives logits."""

from .compilation import compile_layers, uncompile_layers
from .flattening import enable_flattening, unfit_for_shared_prefix
from .heads import body_output, check_head, embeddings_of, find_head, hidden_states, unwrap
from .loading import (
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    model_digest,
    resolve_model,
)
from .positions import check_positions
from .prefix import SharedPrefix, common_prefix, share_prefix, shared_starts
from .pruning import prune_depth
from .routing import RouterLoss, router_loss
from .saving import mend_generation_config, model_without_weights, try_hub, try_merging, try_saving
from .tokenizers import check_tokenizers, tokenizer_digest
from .wrapping import call_through, with_adapters

__all__ = [
    "RouterLoss",
    "SharedPrefix",
    "body_output",
    "call_through",
    "check_head",
    "check_positions",
    "check_tokenizers",
    "common_prefix",
    "compile_layers",
    "embeddings_of",
    "enable_flattening",
    "find_head",
    "fingerprint",
    "hidden_states",
    "load_config",
    "load_model",
    "load_tokenizer",
    "mend_generation_config",
    "model_digest",
    "model_without_weights",
    "prune_depth",
    "resolve_model",
    "router_loss",
    "share_prefix",
    "shared_starts",
    "tokenizer_digest",
    "try_hub",
    "try_merging",
    "try_saving",
    "uncompile_layers",
    "unfit_for_shared_prefix",
    "unwrap",
    "with_adapters",
]
