"""Rotary embeddings as keys and tensors of a file; `compress.models.gguf_rope` reads them.

Shapes: f = frequencies, half the features of a head that are rotated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compress.exports.gguf.families import FAMILIES, ROPE_COUNTED, size_of

_KNOWN = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    ),
    "yarn": frozenset(("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")),
    "longrope": frozenset(
        ("short_factor", "long_factor", "factor", "original_max_position_embeddings")
    ),
}
"""Kinds of scaling that llama.cpp knows, with their settings."""
_EVERYWHERE = frozenset(("rope_type", "rope_theta", "partial_rotary_factor", "type"))
_WITH_FACTORS = ("phi3",)
"""Families whose long and short factors llama.cpp reads."""
_OF_FORMULA = ("llama",)
"""Architectures for which llama.cpp reads factors of every frequency."""


def parameters_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """The settings of layers that see the whole text."""
    found: Mapping[str, Any] = config.rope_parameters
    whole: Mapping[str, Any] = found.get("full_attention", found)
    return whole


def problem_of_rope(config: PretrainedConfig) -> str:
    """Why llama.cpp would rotate otherwise; empty if it would not."""
    settings = parameters_of(config)
    kind = str(settings.get("rope_type", "default"))
    if kind not in _KNOWN:
        return f"its rotary embeddings are scaled by {kind}, which has no key; known are {', '.join(_KNOWN)}"
    strange = sorted(
        name for name in set(settings) - _KNOWN[kind] - _EVERYWHERE if settings[name] is not None
    )
    if strange:
        return f"rope_parameters have {', '.join(strange)}, which has no key"
    architecture = FAMILIES[config.model_type].architecture
    if kind == "longrope" and config.model_type not in _WITH_FACTORS:
        return f"llama.cpp reads no longrope factors in {config.model_type}"
    if kind == "llama3" and architecture not in _OF_FORMULA:
        return f"llama.cpp reads no factors of frequencies in {config.model_type}"
    if float(settings.get("partial_rotary_factor", 1.0)) != 1.0 and architecture != "phi3":
        return f"partial_rotary_factor is {settings['partial_rotary_factor']}; llama.cpp rotates whole heads"
    window = config.rope_parameters.get("sliding_attention", {})
    if window.get("rope_type", "default") != "default":
        return "rotary embeddings of layers with a window are scaled, which has no key"
    return ""


def rope_keys(config: PretrainedConfig) -> dict[str, str | int | float]:
    """Keys below the architecture's name, with their values."""
    settings, architecture = parameters_of(config), FAMILIES[config.model_type].architecture
    kind = settings.get("rope_type", "default")
    keys: dict[str, str | int | float] = {"rope.freq_base": float(settings["rope_theta"])}
    window = config.rope_parameters.get("sliding_attention")
    if window is not None:
        keys["rope.freq_base_swa"] = float(window["rope_theta"])
    if architecture in ROPE_COUNTED:
        keys["rope.dimension_count"] = 2 * n_frequencies(config)
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(settings["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = int(
            settings["original_max_position_embeddings"]
        )
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        keys |= {
            f"rope.scaling.{ours}": float(settings[k]) for k, ours in names.items() if k in settings
        }
    if config.model_type in _WITH_FACTORS:
        keys["rope.scaling.original_context_length"] = _original(config)
    if kind == "longrope":
        keys["rope.scaling.attn_factor"] = _attention_factor(config)
    return keys


def rope_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Divisors of the frequencies, (f,) in fp32, by the name of their tensor; none where all are 1."""
    settings = parameters_of(config)
    kind = settings.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3(config)}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": torch.tensor(
                settings[f"{name}_factor"], dtype=torch.float32
            )
            for name in ("long", "short")
        }
    return {}


def n_frequencies(config: PretrainedConfig) -> int:
    """Half the features of a head that are rotated."""
    partial = float(parameters_of(config).get("partial_rotary_factor", 1.0))
    return int(size_of(config, "head_dim") * partial) // 2


def _original(config: PretrainedConfig) -> int:
    settings = parameters_of(config)
    own = getattr(config, "original_max_position_embeddings", None)
    found = settings.get("original_max_position_embeddings") or own
    return int(found or config.max_position_embeddings)


def _attention_factor(config: PretrainedConfig) -> float:
    """The factor of longrope's paper (Ding et al. 2024, arXiv:2402.13753): sqrt(1 + ln(s) / ln(original context))."""
    original = _original(config)
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def _llama3(config: PretrainedConfig) -> Tensor:
    """What Llama 3.1 divides each frequency by: 1 for short waves, `factor` for long ones, between them a mean."""
    settings, n = parameters_of(config), n_frequencies(config)
    factor, low, high, original = (
        float(settings[name])
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    exponents = torch.arange(n, dtype=torch.float32) / n
    waves = 2 * math.pi * float(settings["rope_theta"]) ** exponents
    share = ((original / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)
