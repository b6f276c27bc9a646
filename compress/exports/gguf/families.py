"""Families of models that the format knows: the keys of each one's configuration, and what no key can say.

llama.cpp computes a family in code of its own, which takes its sizes from keys of the file and everything else as
given. So a configuration can be written if its sizes have keys, and if all else is as that code has it (`implied`).
Reading goes the other way: sizes from keys, all else as implied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_HEAD_SIZE = {"head_dim": "attention.key_length"}
_LOCAL_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_SILU = {"hidden_act": "silu"}
_GELU = "gelu_pytorch_tanh"
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_MAPPING: Mapping[str, Any] = MappingProxyType({})


def _nothing(config: PretrainedConfig) -> str:
    del config
    return ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family of transformers is in the format."""

    model_type: str
    """In config.json."""
    architecture: str
    """The name that llama.cpp gives it."""
    sizes: Mapping[str, str]
    """Attributes of the configuration, with the keys below the architecture's name that hold them."""
    implied: Mapping[str, object] = field(default_factory=lambda: _MAPPING)
    """Attributes that have no key, with the value that llama.cpp computes with."""
    fault: Callable[[PretrainedConfig], str] = _nothing
    """What else of a configuration llama.cpp computes otherwise; empty for nothing."""
    optional: Mapping[str, object] = field(default_factory=lambda: _MAPPING)
    """Attributes whose keys are left out where they have this value."""
    permuted: bool = False
    """Whether the two halves of a head's rows alternate in the weights of queries and keys."""
    shifted_norms: bool = False
    """Whether norms are stored with the 1 that the model adds to them."""
    has_own_head: bool = True
    """Whether a head that is not the embeddings is read."""
    must_own_head: bool = False
    """Whether embeddings cannot be the head too."""

    @property
    def has_experts(self) -> bool:
        """Whether its blocks are mixtures of experts."""
        return "expert_count" in self.sizes.values()


def _gemma_fault(config: PretrainedConfig) -> str:
    of_all_heads = config.num_hidden_layers in (46, 62)  # the largest of each generation
    right = config.hidden_size // config.num_attention_heads if of_all_heads else config.head_dim
    if config.query_pre_attn_scalar != right:
        return (
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes {right}"
        )
    return ""


def _gemma2_fault(config: PretrainedConfig) -> str:
    return _gemma_fault(config) or _windows_fault(config, 2)


def _gemma3_fault(config: PretrainedConfig) -> str:
    return _gemma_fault(config) or _windows_fault(config, 6)


def _windows_fault(config: PretrainedConfig, period: int) -> str:
    kinds = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != kinds:
        return f"its layer_types are not those that llama.cpp takes, full attention in every {period}th layer"
    return ""


_LLAMA = Family(
    model_type="llama",
    architecture="llama",
    sizes={**_SIZES, **_HEAD_SIZE},
    implied={**_SILU, "mlp_bias": False},
    permuted=True,
)
FAMILIES = {
    family.model_type: family
    for family in (
        _LLAMA,
        Family(
            model_type="mistral",
            architecture="llama",
            sizes={**_SIZES, **_HEAD_SIZE},
            implied=_SILU,
            permuted=True,
        ),
        Family(
            model_type="mixtral",
            architecture="llama",
            sizes={**_SIZES, **_HEAD_SIZE, **_LOCAL_EXPERTS},
            implied=_SILU,
            permuted=True,
        ),
        Family(
            model_type="qwen2",
            architecture="qwen2",
            sizes=_SIZES,
            implied=_SILU,
        ),
        Family(
            model_type="qwen3",
            architecture="qwen3",
            sizes={**_SIZES, **_HEAD_SIZE},
            implied={**_SILU, "attention_bias": False},
        ),
        Family(
            model_type="qwen2_moe",
            architecture="qwen2moe",
            sizes={
                **_SIZES,
                **_EXPERTS,
                "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
            },
            implied={**_SILU, **_ALL_SPARSE, "norm_topk_prob": False},
            must_own_head=True,
        ),
        Family(
            model_type="qwen3_moe",
            architecture="qwen3moe",
            sizes={**_SIZES, **_HEAD_SIZE, **_EXPERTS},
            implied={
                **_SILU,
                **_ALL_SPARSE,
                "attention_bias": False,
                "norm_topk_prob": True,
            },
        ),
        Family(
            model_type="gemma2",
            architecture="gemma2",
            sizes={
                **_SIZES,
                **_HEAD_SIZE,
                "sliding_window": "attention.sliding_window",
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            implied={"hidden_activation": _GELU, "attention_bias": False},
            fault=_gemma2_fault,
            shifted_norms=True,
            has_own_head=False,
        ),
        Family(
            model_type="gemma3_text",
            architecture="gemma3",
            sizes={
                **_SIZES,
                **_HEAD_SIZE,
                "sliding_window": "attention.sliding_window",
                "final_logit_softcapping": "final_logit_softcapping",
            },
            implied={
                "hidden_activation": _GELU,
                "attention_bias": False,
                "attn_logit_softcapping": None,
                "use_bidirectional_attention": False,
            },
            optional={"final_logit_softcapping": None},
            fault=_gemma3_fault,
            shifted_norms=True,
        ),
        Family(
            model_type="phi3",
            architecture="phi3",
            sizes=_SIZES,
            implied=_SILU,
        ),
    )
}
"""By the `model_type` of config.json."""
ROPE_COUNTED = ("llama", "phi3")
"""Architectures whose files say how many features of a head are rotated."""


def size_of(config: PretrainedConfig, name: str) -> Any:
    """An attribute of a configuration; the features of a head follow from others where they are not given."""
    found = getattr(config, name, None)
    if found is None and name == "head_dim":
        return config.hidden_size // config.num_attention_heads
    return found


def window_of(config: PretrainedConfig) -> int | None:
    """The tokens that attention of every layer reaches back, of a family whose window llama.cpp does not know.

    None: all of them, or a family whose windows have keys.
    """
    if config.model_type in ("gemma2", "gemma3_text"):
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window or None


def context_of(config: PretrainedConfig) -> int:
    """The longest text for which llama.cpp computes what the model does: no longer than a window that it ignores."""
    longest, window = int(config.max_position_embeddings), window_of(config)
    return longest if window is None else min(longest, window)


def family_of(config: PretrainedConfig) -> Family | None:
    """The family of a model; None if the format does not know it."""
    return FAMILIES.get(config.model_type)


def family_in(architecture: str, keys: Mapping[str, object]) -> Family | None:
    """The family that a file is read as, by its architecture and keys; None if the format does not know it.

    Mistral is Llama for llama.cpp, and is read as that.
    """
    has_experts = f"{architecture}.expert_count" in keys
    among = (f for f in FAMILIES.values() if f.architecture == architecture)
    return next((f for f in among if f.has_experts == has_experts), None)


def problem_of_config(config: PretrainedConfig, owns_head: str) -> str:
    """Why llama.cpp would compute something else than a model of this configuration; empty if it would not.

    `owns_head`: the name of a head that is stored beside the embeddings; empty if these are the head too.
    """
    family = family_of(config)
    if family is None:
        return f"{config.model_type} is none of the families that it knows: {', '.join(FAMILIES)}"
    for name, value in family.implied.items():
        found = getattr(config, name, value)
        if found != value:
            return f"{name} is {found!r} in config.json, and llama.cpp computes {config.model_type} with {value!r}"
    for name in family.sizes:
        if size_of(config, name) is None and name not in family.optional:
            return f"{name} is absent from config.json, and llama.cpp wants a number"
    if owns_head and not family.has_own_head:
        return f"{owns_head} is not the embeddings, which llama.cpp takes for it in {config.model_type}"
    if not owns_head and family.must_own_head:
        return (
            f"its head is tied to its embeddings, and llama.cpp wants a head in {config.model_type}"
        )
    return family.fault(config)
