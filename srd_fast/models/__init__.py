"""Language models as distillation sees them: a body that gives hidden states, a head that gives logits."""

from .adapters import (
    merge_adapters,
    refuse_trained_prompts,
    save_adapter,
    save_base,
    untie_adapted_embeddings,
    why_not_plain_lora,
    with_adapters,
)
from .compilation import compile_layers, uncompile_layers
from .digest import model_digest
from .encoder_decoder import check_same_kind, decoder_start, is_encoder_decoder, with_decoder
from .flattening import enable_flattening, evaluating, unfit_for_shared_prefix
from .gathering import whole_student
from .head_files import head_of_files
from .heads import (
    body_of,
    body_output,
    check_head,
    classes_of,
    embeddings_of,
    find_head,
    hidden_states,
    through_head,
    unwrap,
)
from .in_shards import divide_vocabulary, why_not_in_shards
from .loading import (
    cache_folder,
    check_spread,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    make_model,
    quantisation_of,
    resolve_model,
)
from .placement import (
    called_by_parts,
    entry_device,
    is_dispatched,
    is_fully_sharded,
    is_sharded,
    run_inside,
    tensor_parallel_group,
    unpack,
    whole,
    whole_head,
)
from .positions import check_positions, max_positions
from .prefix import SharedPrefix, common_prefix, share_prefix, shared_starts
from .pruning import prune_depth
from .routing import RouterLoss, router_loss
from .saved_student import check_saved, save_student
from .saving import mend_generation_config, model_without_weights, try_hub, try_merging, try_saving
from .text import text_config, text_tower
from .tokenizers import check_tokenizers, tokenizer_digest
from .wrapping import call_through, gathered, is_emptied, loading_whole

__all__ = [
    "RouterLoss",
    "SharedPrefix",
    "body_of",
    "body_output",
    "cache_folder",
    "call_through",
    "called_by_parts",
    "check_head",
    "check_positions",
    "check_same_kind",
    "check_saved",
    "check_spread",
    "check_tokenizers",
    "classes_of",
    "common_prefix",
    "compile_layers",
    "decoder_start",
    "divide_vocabulary",
    "embeddings_of",
    "enable_flattening",
    "entry_device",
    "evaluating",
    "find_head",
    "fingerprint",
    "gathered",
    "head_of_files",
    "hidden_states",
    "is_dispatched",
    "is_emptied",
    "is_encoder_decoder",
    "is_fully_sharded",
    "is_sharded",
    "load_config",
    "load_model",
    "load_tokenizer",
    "loading_whole",
    "make_model",
    "max_positions",
    "mend_generation_config",
    "merge_adapters",
    "model_digest",
    "model_without_weights",
    "prune_depth",
    "quantisation_of",
    "refuse_trained_prompts",
    "resolve_model",
    "router_loss",
    "run_inside",
    "save_adapter",
    "save_base",
    "save_student",
    "share_prefix",
    "shared_starts",
    "tensor_parallel_group",
    "text_config",
    "text_tower",
    "through_head",
    "tokenizer_digest",
    "try_hub",
    "try_merging",
    "try_saving",
    "uncompile_layers",
    "unfit_for_shared_prefix",
    "unpack",
    "untie_adapted_embeddings",
    "unwrap",
    "whole",
    "whole_head",
    "whole_student",
    "why_not_in_shards",
    "why_not_plain_lora",
    "with_adapters",
    "with_decoder",
]
