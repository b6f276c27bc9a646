"""Tiny configurations of families of the installed transformers, for `scripts/architectures`.

Every kind of block that a family mixes stands in its tiny model. Those with experts are in `mixture_families.py`.
"""

from typing import Any

VOCABULARY = 320
"""Above the 259 tokens of the tokenizer of bytes, and a multiple of 64."""
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODERN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **_SPECIAL,
}
CLASSIC: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, **_SPECIAL}
HEADS = {**MODERN, "head_dim": 16}
_SLIDING = {**HEADS, "sliding_window": 16}
MAMBA_2 = {
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
    "mamba_expand": 2,
}
DELTA_NET = {
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
}
_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5},
    **{"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
}

LINEAR_ATTENTION = ["linear_attention", "full_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    # Decoders of one kind of block
    "apertus": MODERN,
    "arcee": MODERN,
    "biogpt": MODERN,
    "bitnet": MODERN,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, **_SPECIAL},
    "codegen": {**CLASSIC, "rotary_dim": 8, "n_ctx": 512},
    "cohere": MODERN,
    "cohere2": {**_SLIDING, "num_hidden_layers": 4},
    "ctrl": {**CLASSIC, "dff": 128},
    "cwm": {**HEADS, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "diffllama": MODERN,
    "doge": MODERN,
    "ernie4_5": HEADS,
    "exaone4": {**MODERN, "sliding_window": 16},
    "falcon": {
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
        **_SPECIAL,
    },
    "gemma": HEADS,
    "gemma2": _SLIDING,
    "gemma3_text": {**_SLIDING, "num_hidden_layers": 6},
    "gemma3n_text": {
        **{**_SLIDING, "num_hidden_layers": 5, "vocab_size_per_layer_input": VOCABULARY},
        **{"hidden_size_per_layer_input": 32, "laurel_rank": 32, "num_kv_shared_layers": 0},
        **{"intermediate_size": 128, "activation_sparsity_pattern": [0.0] * 5},
    },
    "gemma4_text": {
        **{**_SLIDING, "num_hidden_layers": 6, "vocab_size_per_layer_input": VOCABULARY},
        **{"hidden_size_per_layer_input": 32, "num_kv_shared_layers": 0, "global_head_dim": 32},
    },
    "glm": HEADS,
    "glm4": HEADS,
    "gpt2": CLASSIC,
    "gpt_bigcode": CLASSIC,
    "gpt_neo": {
        **{"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512},
        **{"attention_types": [[["global", "local"], 1]], "window_size": 16, **_SPECIAL},
    },
    "gpt_neox": MODERN,
    "gptj": {**CLASSIC, "rotary_dim": 8},
    "granite": MODERN,
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "llama": MODERN,
    "minicpm3": {
        **{**MODERN, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    },
    "ministral": _SLIDING,
    "mistral": _SLIDING,
    "modernbert-decoder": {**_ENCODER, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2},
    "nanochat": MODERN,
    "nemotron": MODERN,
    "olmo": MODERN,
    "olmo2": MODERN,
    "olmo3": {**MODERN, "sliding_window": 16, "num_hidden_layers": 4},
    "openai-gpt": CLASSIC,
    "opt": {**MODERN, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "persimmon": MODERN,
    "phi": MODERN,
    "phi3": MODERN,
    "qwen2": MODERN,
    "qwen3": HEADS,
    "seed_oss": HEADS,
    "smollm3": MODERN,
    "stablelm": MODERN,
    "starcoder2": MODERN,
    "vaultgemma": _SLIDING,
    "xglm": {
        **{"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
        **{"max_position_embeddings": 512, **_SPECIAL},
    },
    "youtu": {
        **{**MODERN, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32},
        **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    },
    # State spaces, recurrences and hybrids
    "bamba": {**MODERN, **MAMBA_2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": {
        **{**HEADS, **MAMBA_2, "mamba_d_ssm": 128},
    },
    "falcon_mamba": {
        **{"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 32},
        **_SPECIAL,
    },
    "granitemoehybrid": {
        **{**MODERN, **MAMBA_2, "num_local_experts": 0, "num_experts_per_tok": 0},
        **{"shared_intermediate_size": 128, "layer_types": ["mamba", "attention"]},
    },
    "jamba": {
        **{**MODERN, "num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        **{"num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": 32},
    },
    "lfm2": {
        **{**MODERN, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
        **{"block_auto_adjust_ff_dim": False},
    },
    "mamba": {
        **{"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 32},
        **_SPECIAL,
    },
    "mamba2": {
        **{"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "head_dim": 16},
        **{"num_heads": 8, "n_groups": 1, "chunk_size": 16, **_SPECIAL},
    },
    "nemotron_h": {
        **{**HEADS, "hybrid_override_pattern": "M*-", "num_hidden_layers": 3},
        **{"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1},
        **{"chunk_size": 16, "mamba_hidden_act": "silu"},
    },
    "olmo_hybrid": {
        **{**MODERN, **DELTA_NET, "num_key_value_heads": 4, "linear_num_value_heads": 2},
        **{"layer_types": LINEAR_ATTENTION},
    },
    "qwen3_next": {
        **{**HEADS, **DELTA_NET, "layer_types": LINEAR_ATTENTION, "mlp_only_layers": [0, 1]},
    },
    "qwen3_5_text": {**HEADS, **DELTA_NET, "layer_types": LINEAR_ATTENTION},
    "recurrent_gemma": {
        **{**MODERN, "lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3},
        **{"num_key_value_heads": 1, "conv1d_width": 4},
    },
    "rwkv": {
        **{"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64},
        **{"intermediate_size": 128, "context_length": 512, **_SPECIAL},
    },
    "xlstm": {
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 4},
        **{"chunk_size": 16, "qk_dim_factor": 1.0, **_SPECIAL},
    },
    "zamba": {
        **{**MODERN, "num_key_value_heads": 4, "num_hidden_layers": 6, "attn_layer_period": 3},
        **{"attn_layer_offset": 2, "mamba_dt_rank": 16, "n_mamba_heads": 2},
        **{"attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "zamba2": {
        **{**MODERN, "num_key_value_heads": 4, "num_hidden_layers": 6, "mamba_d_state": 16},
        **{"mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16},
        **{"layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "num_mem_blocks": 1},
        **{"adapter_rank": 16},
    },
    # Encoders
    "bert": _ENCODER,
    "modernbert": {**_ENCODER, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
    # Text beside images
    "gemma3": {
        "text_config": {**_SLIDING, "vocab_size": VOCABULARY},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 300,
        "boi_token_index": 301,
        "eoi_token_index": 302,
    },
    "llava": {
        "text_config": {"model_type": "llama", **MODERN, "vocab_size": VOCABULARY},
        "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 64},
        "image_token_index": 300,
    },
    "qwen2_5_vl": {
        "text_config": {
            **{**MODERN, "vocab_size": VOCABULARY, "head_dim": 16},
            **{"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        },
        "vision_config": {
            **{"depth": 5, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4},
            **{"out_hidden_size": 64, "patch_size": 14, "fullatt_block_indexes": [4]},
        },
        **{"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302},
        **{"vision_end_token_id": 303},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **HEADS, "vocab_size": VOCABULARY},
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16},
        "image_token_index": 300,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **HEADS, "vocab_size": VOCABULARY},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        **{"image_token_index": 300, "projection_dim": 64},
    },
    "qwen3_5": {
        "text_config": {
            **{**HEADS, **DELTA_NET, "layer_types": LINEAR_ATTENTION, "vocab_size": VOCABULARY},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            **{"depth": 5, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4},
            **{"out_hidden_size": 64, "patch_size": 14, "num_position_embeddings": 16},
        },
        **{"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302},
        **{"vision_end_token_id": 303},
    },
    "qwen3_vl": {
        "text_config": {
            **{**HEADS, "vocab_size": VOCABULARY},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        "vision_config": {
            **{"depth": 5, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4},
            **{"out_hidden_size": 64, "patch_size": 14, "num_position_embeddings": 16},
            **{"deepstack_visual_indexes": [1, 2]},
        },
        **{"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302},
        **{"vision_end_token_id": 303},
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **MODERN, "vocab_size": VOCABULARY},
        "vision_config": VISION,
        **{"image_token_id": 300, "scale_factor": 1},
    },
    # Refused
    "bart": {
        **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128},
        **{"decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    },
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
}
