"""Tiny random models of the families that the walk must serve, and tokens for them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128
_MODERN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
_CLASSIC = {"n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": _MODERN,
    "qwen3": {**_MODERN, "head_dim": 8},
    "mistral": {**_MODERN, "sliding_window": 8},
    "gemma3_text": {**_MODERN, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6},
    "opt": {**_MODERN, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": _CLASSIC,
    "gpt_bigcode": _CLASSIC,
    "starcoder2": _MODERN,
    "phi3": _MODERN,
    "gpt_neox": _MODERN,
    "olmo2": _MODERN,
    "qwen2": _MODERN,
    "qwen3_moe": {
        **_MODERN,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "mixtral": {**_MODERN, **_LOCAL},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "codegen": {**_CLASSIC, "rotary_dim": 4, "n_ctx": 64, "n_positions": 64},
    "gptj": {**_CLASSIC, "rotary_dim": 4},
}

_MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
_DELTA_NET = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
}
_SCAN = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}

HYBRIDS: dict[str, dict[str, object]] = {
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bamba": {**_MODERN, **_MAMBA_2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MODERN, **_MAMBA_2, "head_dim": 8, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **_MODERN,
        **_MAMBA_2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "jamba": {
        **_MODERN,
        "num_hidden_layers": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_dt_rank": 16,
    },
    "lfm2": {
        **_MODERN,
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "mamba": {**_SCAN, "time_step_rank": 16},
    "mamba2": {**_SCAN, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {**_MODERN, **_DELTA_NET, "mlp_only_layers": [0, 1]},
    "qwen3_5_text": {**_MODERN, **_DELTA_NET},
    "recurrent_gemma": {
        **_MODERN,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 8,
    },
    "zamba": {
        **_MODERN,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "mamba_dt_rank": 16,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        **_MODERN,
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "adapter_rank": 16,
    },
}
"""Families whose blocks are of several kinds, or called or made otherwise than a Llama's."""

EXPERTS: dict[str, dict[str, object]] = {
    "phimoe": {**_MODERN, **_LOCAL},
    "qwen2_moe": {
        **_MODERN,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32,
    },
    "granitemoe": {**_MODERN, **_LOCAL},
    "gpt_oss": {**_MODERN, **_LOCAL, "head_dim": 8, "sliding_window": 8},
    "llama4_text": {
        **_MODERN,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 64,
        "head_dim": 8,
    },
    "deepseek_v3": {
        **_MODERN,
        **_DEEPSEEK,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "nemotron_h": {
        **_MODERN,
        **_DEEPSEEK,
        "head_dim": 8,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
}
MIXTURES = (
    "mixtral",
    "qwen3_moe",
    "jamba",
    *EXPERTS,
)
"""Families with experts, in tensors of their own or stacked; gated or not, transposed, interleaved, with biases."""


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of a family, in eval mode, with every bias and norm away from its trivial start."""
    torch.manual_seed(seed)
    options = {"vocab_size": VOCABULARY, **{**FAMILIES, **HYBRIDS, **EXPERTS}[family], **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_ids(n_sequences: int = 2, seq_len: int = 16, seed: int = 1) -> torch.Tensor:
    """Token ids without special ones: (n, t)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n_sequences, seq_len), generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes 0 .. 127 as tokens, end of text as id 2, so that ASCII text fits the tiny vocabulary."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    printable = [c for c in sorted(alphabet) if c.isascii()] + ["Ġ", "Ċ"]
    vocabulary = {token: k for k, token in enumerate([*special, *printable])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny(folder: Path, family: str = "llama", **changes: object) -> PreTrainedModel:
    """An ordinary Hugging Face folder with a tiny random model and its tokenizer."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model
