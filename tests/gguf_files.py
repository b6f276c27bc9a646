"""A tiny random Llama, and the same one as a GGUF file written the way llama.cpp's converter does."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<end>", "<|start|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "t h", "th e", "Ċ Ċ"]
TOKENS = [*SPECIAL, *LETTERS, *[merge.replace(" ", "") for merge in MERGES]]

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tiny_llama(**settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        **({"tie_word_embeddings": True} | settings),
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path, model, kind="F32", **fields):
    """`kind` is the storage of the matrices; `fields` replace or add metadata (None: leave out); `tensors`: more."""
    more = fields.pop("tensors", {})
    writer = GGUFWriter(path, fields.pop("architecture", "llama"))
    _write_metadata(writer, model.config, fields)
    n_heads = {
        "attn_q": model.config.num_attention_heads,
        "attn_k": model.config.num_key_value_heads,
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        ours = _gguf_name(name)
        array = tensor.float().numpy()
        for key, n in n_heads.items():
            if f".{key}." in ours:
                array = _permute(array, n)
        storage = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(ours, quantize(np.ascontiguousarray(array), storage), raw_dtype=storage)
    for name, values in more.items():
        writer.add_tensor(name, np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer, config, fields):
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if fields.pop("tokenizer", "present"):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        tokens = fields.pop("tokens", TOKENS)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
        writer.add_token_merges(fields.pop("merges", MERGES))
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}")
    for key, value in fields.items():
        kinds = {int: writer.add_uint16, float: writer.add_float32, str: writer.add_string}
        kinds |= {list: writer.add_array}
        add = writer.add_uint32 if type(value) is int and value >> 16 else kinds[type(value)]
        key = key.replace("__", ".")
        writer.kv_data[0].pop(key, None)  # older writers refuse a second value
        add(key, value)


def _gguf_name(name):
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _permute(weight, n_heads):
    """llama.cpp's order of rotary pairs."""
    rows, columns = weight.shape
    halves = weight.reshape(n_heads, 2, rows // n_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)
