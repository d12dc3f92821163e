"""Language models as distillation sees them: a body that gives hidden states, a head that gives logits."""

from .adapters import merge_adapters, refuse_trained_prompts, with_adapters
from .compilation import compile_layers, uncompile_layers
from .encoder_decoder import check_same_kind, decoder_start, is_encoder_decoder
from .flattening import enable_flattening, unfit_for_shared_prefix
from .heads import check_head, find_head, hidden_states, unwrap
from .loading import (
    check_tokenizers,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    make_model,
    model_digest,
    resolve_model,
)
from .positions import check_positions
from .prefix import SharedPrefix, common_prefix, share_prefix, shared_starts
from .pruning import prune_depth
from .saving import check_saved, save_student
from .text import text_config, text_tower
from .wrapping import call_through

__all__ = [
    "SharedPrefix",
    "call_through",
    "check_head",
    "check_positions",
    "check_same_kind",
    "check_saved",
    "check_tokenizers",
    "common_prefix",
    "compile_layers",
    "decoder_start",
    "enable_flattening",
    "find_head",
    "fingerprint",
    "hidden_states",
    "is_encoder_decoder",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_model",
    "merge_adapters",
    "model_digest",
    "prune_depth",
    "refuse_trained_prompts",
    "resolve_model",
    "save_student",
    "share_prefix",
    "shared_starts",
    "text_config",
    "text_tower",
    "uncompile_layers",
    "unfit_for_shared_prefix",
    "unwrap",
    "with_adapters",
]
