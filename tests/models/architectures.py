"""Tiny configurations of the causal language models in transformers: what each adds to the sizes that all share.

One file, because it is one table: an architecture a line.
"""

from itertools import cycle, islice
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

VOCAB = 512
WIDTH = 32
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_LATENT |= {"num_key_value_heads": 4, "head_dim": None}
_DEEPSEEK = {**_ROUTED, **_LATENT, "first_k_dense_replace": 1, "n_shared_experts": 1}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
_DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_SHARED = {"shared_expert_intermediate_size": 32}
_SLIDING = {"sliding_window": 4}
_CAPPED = {**_SLIDING, "final_logit_softcapping": 4.0}
_SCALED = {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}
_PER_LAYER_INPUTS = {**_SLIDING, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
_PER_LAYER_INPUTS |= {"vocab_size_per_layer_input": VOCAB}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LONG_ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8}
_LONG_ROPE |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
_NO_GROUPS = {"num_key_value_heads": 4}

# Name: (configuration, what it adds; None takes an entry out).
_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, **_SHARED}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "decoder_sparse_step": 2}),
    "qwen3_next": ("Qwen3Next", {**_EXPERTS, **_SHARED, **_DELTA}),
    "qwen3_5_text": ("Qwen3_5Text", _DELTA),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _SLIDING),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmo_hybrid": ("OlmoHybrid", {}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {"logit_scale": 0.25, **_SLIDING}),
    "granite": ("Granite", _SCALED),
    "granitemoe": ("GraniteMoe", {**_SCALED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {**_SCALED, **_MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    ),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", _CAPPED),
    "gemma3_text": ("Gemma3Text", _SLIDING),
    "gemma3n_text": (
        "Gemma3nText",
        {**_PER_LAYER_INPUTS, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4_text": ("Gemma4Text", {**_PER_LAYER_INPUTS, "global_head_dim": 8}),
    "vaultgemma": ("VaultGemma", _SLIDING),
    "recurrent_gemma": ("RecurrentGemma", {"lru_width": WIDTH, "attention_window_size": 4}),
    "phi": ("Phi", _NO_GROUPS),
    "phi3": ("Phi3", _SLIDING),
    "phi3_longrope": ("Phi3", {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 8}),
    "phimoe": ("Phimoe", {"num_local_experts": 4}),
    "mistral": ("Mistral", _SLIDING),
    "ministral": ("Ministral", _SLIDING),
    "ministral3": ("Ministral3", {}),
    "mistral4": ("Mistral4", {**_ROUTED, **_LATENT}),
    "stablelm": ("StableLm", {}),
    "falcon": ("Falcon", {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("Falcon", {"head_dim": None, "alibi": True, "multi_query": True}),
    "falcon_h1": (
        "FalconH1",
        {**_MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "falcon_mamba": ("FalconMamba", {"state_size": 8}),
    "mamba": ("Mamba", {"state_size": 8, "intermediate_size": None}),
    "mamba2": (
        "Mamba2",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "intermediate_size": None},
    ),
    "jamba": (
        "Jamba",
        {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    ),
    "bamba": ("Bamba", {**_MAMBA, "mamba_chunk_size": 8, "attn_layer_indices": [1, 3]}),
    "zamba2": (
        "Zamba2",
        {
            **_NO_GROUPS,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 4,
            "mamba_d_state": 8,
            "adapter_rank": 4,
            "head_dim": None,
            "chunk_size": 8,
        },
    ),
    "nemotron": ("Nemotron", {}),
    "nemotron_h": (
        "NemotronH",
        {
            **_ROUTED,
            "num_hidden_layers": None,
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "glm4_moe": ("Glm4Moe", {**_ROUTED, "first_k_dense_replace": 1}),
    "deepseek_v2": ("DeepseekV2", _DEEPSEEK),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "kimi_linear": ("KimiLinear", {**_EXPERTS, **_LATENT, "q_lora_rank": None}),
    "longcat_flash": (
        "LongcatFlash",
        {
            **_LATENT,
            "num_hidden_layers": None,
            "num_layers": 4,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "zero_expert_num": 1,
            "head_dim": 4,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _PLAIN_ROPE},
    ),
    "llama4_text": (
        "Llama4Text",
        {
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "interleave_moe_layer_step": 2,
        },
    ),
    "smollm3": ("SmolLM3", {}),
    "minimax": ("MiniMax", {"num_local_experts": 4, "block_size": 8}),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5": ("Ernie4_5", {}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    ),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2}),
    "seed_oss": ("SeedOss", {}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "apertus": ("Apertus", {}),
    "exaone4": ("Exaone4", _SLIDING),
    "nanochat": ("NanoChat", {}),
    "starcoder2": ("Starcoder2", {}),
    "diffllama": ("DiffLlama", {}),
    "dots1": ("Dots1", {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "modernbert_decoder": ("ModernBertDecoder", {}),
    "bitnet": ("BitNet", {}),
    "helium": ("Helium", {}),
    "persimmon": ("Persimmon", {}),
    "doge": ("Doge", {}),
    "gpt2": ("GPT2", {}),
    "gpt_bigcode": ("GPTBigCode", {}),
    "gpt_neo": ("GPTNeo", {"attention_types": [[["global", "local"], 2]], "window_size": 4}),
    "gpt_neox": ("GPTNeoX", {}),
    "gptj": ("GPTJ", {"rotary_dim": 4}),
    "codegen": ("CodeGen", {"rotary_dim": 4}),
    "opt": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
    "bloom": ("Bloom", {}),
    "mpt": ("Mpt", {"max_seq_len": 1024}),
    "xglm": ("XGLM", {"ffn_dim": 64, "attention_heads": 4}),
    "biogpt": ("BioGpt", {}),
    "rwkv": ("Rwkv", {"attention_hidden_size": WIDTH}),
    "xlnet": ("XLNet", {"d_inner": 64, "d_head": 8, "max_position_embeddings": None}),
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {}),
}

_SIGHT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_PATCHES = {**_SIGHT, "image_size": 28, "patch_size": 14}
_QWEN_SIGHT = {"depth": 1, "num_heads": 2, "patch_size": 14, "hidden_size": 16}
_QWEN_SIGHT_OUT = {**_QWEN_SIGHT, "out_hidden_size": WIDTH, "intermediate_size": 32}
_ROPE_3D = {"rope_parameters": {**_PLAIN_ROPE, "mrope_section": [1, 1, 2]}}
_IMAGE = {"image_token_id": VOCAB - 2, "video_token_id": VOCAB - 3}
_QWEN_TOKENS = {**_IMAGE, "vision_start_token_id": VOCAB - 4, "vision_end_token_id": VOCAB - 5}
_GEMMA3_TOKENS = {"image_token_index": VOCAB - 2, "boi_token_index": VOCAB - 3, "eoi_token_index": VOCAB - 4}
_GEMMA4_TOKENS = {**_IMAGE, "boi_token_id": VOCAB - 4, "eoi_token_id": VOCAB - 5, "audio_token_id": VOCAB - 6}

# Name: (configuration, its text tower: a name of `_TEXT` and what it adds, the other towers).
_SEEING: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("Gemma3", "gemma3_text", {}, {"vision_config": _PATCHES, "mm_tokens_per_image": 4, **_GEMMA3_TOKENS}),
    "gemma4": (
        "Gemma4",
        "gemma4_text",
        {},
        {"vision_config": {**_SIGHT, "num_key_value_heads": 2, "head_dim": 8}, "audio_config": None, **_GEMMA4_TOKENS},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        "qwen2",
        _ROPE_3D,
        {"vision_config": {**_QWEN_SIGHT, "embed_dim": 16, "hidden_size": WIDTH}, **_QWEN_TOKENS},
    ),
    "qwen2_5_vl": ("Qwen2_5_VL", "qwen2", _ROPE_3D, {"vision_config": _QWEN_SIGHT_OUT, **_QWEN_TOKENS}),
    "qwen3_vl": (
        "Qwen3VL",
        "qwen3",
        _ROPE_3D,
        {"vision_config": {**_QWEN_SIGHT_OUT, "deepstack_visual_indexes": [0]}, **_QWEN_TOKENS},
    ),
    "llava": (
        "Llava",
        "llama",
        {},
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **_PATCHES},
            "image_token_index": VOCAB - 2,
            "image_seq_length": 4,
        },
    ),
    "mistral3": (
        "Mistral3",
        "mistral",
        {},
        {"vision_config": {"model_type": "pixtral", **_PATCHES}, "image_token_index": VOCAB - 2},
    ),
}
_TEXT["phi4_multimodal"] = (
    "Phi4Multimodal",
    {
        "vision_config": {**_PATCHES, "num_hidden_layers": 2, "crop_size": 28},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "nemo_final_size": 16,
            "ext_pw_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
)

NAMES = (*_TEXT, *_SEEING)
# Kinds of layers that most of these models choose by a list.
_KINDS = {
    "Qwen3Next": ("linear_attention", "full_attention"),
    "Qwen3_5Text": ("linear_attention", "full_attention"),
    "OlmoHybrid": ("linear_attention", "full_attention"),
    "KimiLinear": ("linear_attention", "full_attention"),
    "MiniMax": ("linear_attention", "full_attention"),
    "GraniteMoeHybrid": ("mamba", "attention"),
    **dict.fromkeys(
        ("Olmo3", "Cohere2", "Gemma3Text", "Gemma3nText", "Gemma4Text", "Ministral", "GptOss", "Exaone4"),
        ("sliding_attention", "full_attention"),
    ),
}
# Weights with a meaning of their own, which noise would not have.
_OWN = ("A_log", "dt_bias", ".D", "conv1d", "conv.", "rg_lru", "slope", "time_decay", "time_first", "time_mix", "sinks")


def _sizes(kind: str, layers: int) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind in _KINDS:
        sizes["layer_types"] = list(islice(cycle(_KINDS[kind]), layers))
    return sizes


def make_config(name: str, layers: int = 4, **more: Any) -> PreTrainedConfig:
    """The configuration of an architecture.

    Args:
        name: one of `NAMES`.
        layers: of the text part, where no list of the architecture counts them.
        more: entries of the text part.
    """
    if name in _SEEING:
        kind, text, own, others = _SEEING[name]
        part = make_config(text, layers, **own, **more)
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}
        if kind.startswith("Gemma"):
            ends["tie_word_embeddings"] = True
        told = part.to_dict()
        if kind in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"):
            told.pop("model_type")
        return getattr(transformers, f"{kind}Config")(text_config=told, **others, **ends)
    kind, own = _TEXT[name]
    made = getattr(transformers, f"{kind}Config")
    entries = _sizes(kind, layers) | own | more
    return made(**{k: v for k, v in entries.items() if v is not None})


def make_architecture(name: str, layers: int = 4, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A random model in float32 and eval mode, without dropout, whose logits spread over a few units."""
    config = make_config(name, layers, **more)
    for part in (config, config.get_text_config()):
        for entry in [n for n in vars(part) if "drop" in n and isinstance(getattr(part, n), float)]:
            setattr(part, entry, 0.0)
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText
    if type(config) in auto._model_mapping:
        model = auto.from_config(config)
    else:
        model = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for entry, parameter in model.named_parameters():
            if parameter.is_floating_point() and not any(own in entry for own in _OWN):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.2) if parameter.dim() > 1 else parameter.add_(noise * 0.1)
    return model.eval()
