"""Tiny configurations of families with experts in the installed transformers, for `scripts/architectures --mixtures`.

Each has 4 experts, of which a token goes to 2 (Llama 4: 1), and what its family has beside them: dense blocks, shared
experts, their gates, biases, a router's correction bias.
"""

from typing import Any

from architecture_families import DELTA_NET, HEADS, LINEAR_ATTENTION, MAMBA_2, VISION, VOCABULARY

EXPERTS: dict[str, Any] = {
    **HEADS,
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    **{"num_shared_experts": 1, "shared_expert_intermediate_size": 32, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "sliding_window": 16},
}
"""By every name that the families have for the same."""
_LATENT = {
    **{**EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "head_dim": 32},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 32, "v_head_dim": 16},
}
_INDEXED = {**_LATENT, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 16}
_DELTA = {
    **{**EXPERTS, **DELTA_NET, "linear_num_value_heads": 2, "layer_types": LINEAR_ATTENTION},
}
_SLIDED = {
    **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    **{"sliding_window_size": 16, "rel_extent": 64, "d_rel": 8, "unpadded_vocab_size": VOCABULARY},
}
_TOWER = {
    **{"depth": 3, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4},
    **{"out_hidden_size": 64, "patch_size": 14, "num_position_embeddings": 16},
}
_PLACES = {
    **{"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302},
    "vision_end_token_id": 303,
}
_TURNED = {"rope_type": "default", "mrope_section": [2, 3, 3]}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "afmoe": EXPERTS,
    "axk1": _LATENT,
    "axk2": {**_INDEXED, "gated_norm_rank": 32},
    "bailing_hybrid": {**_LATENT, "layer_types": LINEAR_ATTENTION},
    "beam": {**EXPERTS, "mlp_layer_types": ["dense", "sparse"]},
    "cohere2_moe": EXPERTS,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": {**_INDEXED, "head_dim": 32, "o_lora_rank": 32},
    "dots1": EXPERTS,
    "ernie4_5_moe": EXPERTS,
    "exaone_moe": EXPERTS,
    "flex_olmo": EXPERTS,
    "flint": {**EXPERTS, "mlp_only_layers": [0]},
    "gemma4_text": {
        **{**EXPERTS, "num_hidden_layers": 6, "vocab_size_per_layer_input": VOCABULARY},
        **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 32},
        **{"enable_moe_block": True, "top_k_experts": 2},
    },
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _INDEXED,
    "gpt_oss": EXPERTS,
    "granitemoe": EXPERTS,
    "granitemoe_swa": EXPERTS,
    "granitemoehybrid": {
        **{**EXPERTS, **MAMBA_2, "mamba_n_heads": 32, "mamba_d_head": 4},
        "shared_intermediate_size": 128,
        "layer_types": ["mamba", "attention"],
    },
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 128},
    "hunyuan_v1_moe": {**EXPERTS, "moe_topk": 2},
    "hy_v3": EXPERTS,
    "hy_v4": _INDEXED,
    "inkling_text": {**EXPERTS, **_SLIDED},
    "inkling2_text": {**EXPERTS, **_SLIDED, "moe_intermediate_size": 32},
    "jamba": {
        **{**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "mamba_dt_rank": 32},
    },
    "kimi_linear": {
        **_LATENT,
        "linear_num_heads": 2,
        "linear_head_dim": 32,
        "layer_types": LINEAR_ATTENTION,
    },
    "kolibri1": EXPERTS,
    "laguna": EXPERTS,
    "lfm2_moe": {
        **{**EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        "num_hidden_layers": 3,
    },
    "llama4_text": {**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
    "mellum": EXPERTS,
    "mimo_v2_flash": EXPERTS,
    "minimax": {**EXPERTS, "layer_types": LINEAR_ATTENTION},
    "minimax_m2": EXPERTS,
    "minimax_m3_vl_text": {**EXPERTS, "shared_intermediate_size": 32},
    "nemotron_h": {
        **{**EXPERTS, "hybrid_override_pattern": "ME*E", "num_hidden_layers": 4},
        **{"ssm_state_size": 16, "mamba_num_heads": 32, "mamba_head_dim": 4, "n_groups": 1},
        **{"chunk_size": 16, "mamba_hidden_act": "silu"},
        **{"moe_shared_expert_intermediate_size": 32},
    },
    "olmoe": EXPERTS,
    "phimoe": EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_moe": EXPERTS,
    "qwen3_next": _DELTA,
    "solar_open": EXPERTS,
    "zaya": {**EXPERTS, "num_experts_per_tok": 1, "router_hidden_size": 32},
    # Text beside images
    "glm4v_moe": {
        "text_config": {
            **{**EXPERTS, "vocab_size": VOCABULARY},
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {**_TOWER, "image_size": 28, "merge_size": 2},
        **{**_PLACES, "image_start_token_id": 304, "image_end_token_id": 305},
    },
    "llama4": {
        "text_config": {
            **{**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
            "vocab_size": VOCABULARY,
        },
        "vision_config": {**VISION, "vision_output_dim": 64, "projector_output_dim": 64},
        "image_token_index": 300,
    },
    "qwen3_vl_moe": {
        "text_config": {**EXPERTS, "vocab_size": VOCABULARY, "rope_parameters": _TURNED},
        "vision_config": {**_TOWER, "deepstack_visual_indexes": [1, 2]},
        **_PLACES,
    },
    "qwen3_5_moe": {
        "text_config": {
            **{**_DELTA, "vocab_size": VOCABULARY},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        "vision_config": _TOWER,
        **_PLACES,
    },
    "aria": {
        "text_config": {
            **{**EXPERTS, "vocab_size": VOCABULARY, "moe_num_experts": 4, "moe_topk": 2},
            "moe_num_shared_experts": 1,
        },
        "vision_config": {"model_type": "idefics3_vision", **VISION},
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {**EXPERTS, "vocab_size": VOCABULARY, "rope_parameters": _TURNED},
        "vision_config": {**_TOWER, "deepstack_visual_indexes": [1, 2]},
        "audio_config": {
            **{"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "output_dim": 64},
            **{"encoder_ffn_dim": 96, "downsample_hidden_size": 16, "num_mel_bins": 16},
        },
        **{**_PLACES, "audio_token_id": 304},
    },
    "step3p7": {
        "text_config": {
            **{**EXPERTS, "vocab_size": VOCABULARY, "mlp_layer_types": ["dense", "sparse"]},
            "share_expert_dim": 32,
        },
        "vision_config": VISION,
        "image_token_id": 300,
    },
    "mistral3": {
        "text_config": {
            **{**_LATENT, "model_type": "mistral4", "vocab_size": VOCABULARY},
            **{"qk_nope_head_dim": 32, "head_dim": 64},
        },
        "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 16},
        "image_token_index": 300,
    },
    # Experts of other kinds: left as they are
    "dbrx": {
        **{**EXPERTS, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
    },
    "jetmoe": {**EXPERTS, "kv_channels": 16, "num_key_value_heads": 2},
    "longcat_flash": {
        **{**_LATENT, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
        **{"moe_topk": 2, "num_layers": 2, "n_routed_experts": 4},
    },
    "muse_spark_text": {**EXPERTS, "moe_hidden_size": 64},
    "switch_transformers": {
        **{"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4},
        "num_experts": 4,
    },
}
