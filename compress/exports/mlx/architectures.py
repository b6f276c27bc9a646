"""What mlx-lm asks of a model's config.json, and the architectures that were seen to be right in it.

mlx-lm has its own code for each architecture, by `model_type`, with names, defaults and constants of its own. What it
lacks in a config it fills in without a word: a llama without `tie_word_embeddings` is tied, and one whose
`rope_parameters` hold the base of its rotary embeddings, as transformers 5 writes it, gets 10,000. So the entries are
written out as transformers understands them. Names here are those of the table alone, each tried with mlx-lm 0.32.2 and
random weights against transformers; others that mlx-lm has may work, and are refused until somebody looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

from compress.models.model_config import read_config

DENSE = frozenset(("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"))
"""Architectures without experts."""
MIXTURES: Mapping[str, str] = MappingProxyType(
    {
        "mixtral": "num_local_experts",
        "olmoe": "num_experts",
        "qwen2_moe": "num_experts",
        "qwen3_moe": "num_experts",
    }
)
"""Architectures with experts, each with the entry that counts them."""
TIE = "tie_word_embeddings"
SLIDING = frozenset(("gemma3_text",))
"""Those whose sliding attention mlx-lm has too."""


def problem_of(named: str) -> str:
    """Why mlx-lm does not run models of this `model_type`; empty if it does."""
    if named in DENSE or named in MIXTURES:
        return ""
    known = ", ".join(sorted({*DENSE, *MIXTURES}))
    return f"its architecture, {named}, is none that was seen to be right in mlx-lm: {known}"


def warnings_of(config: PretrainedConfig) -> tuple[str, ...]:
    """What mlx-lm computes otherwise than the model's authors, where that is known."""
    named, window = config.model_type, getattr(config, "sliding_window", None)
    if named in SLIDING or not window or not getattr(config, "use_sliding_window", True):
        return ()
    return (
        f"attention sees the last {window} tokens in some layers, and all of them in mlx-lm's code for {named}: longer "
        "texts come out differently there",
    )


def n_experts(config: Mapping[str, Any], source: Path) -> int:
    """Experts of a block; 0 for an architecture without."""
    key = MIXTURES.get(str(config.get("model_type")))
    return 0 if key is None else int(getattr(read_config(source), key))


def complete(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """A config.json with what it leaves to transformers' defaults, and rotary embeddings as mlx-lm reads them."""
    common = set(PretrainedConfig().to_dict()) - {TIE}
    defaults = {k: v for k, v in read_config(source).to_dict().items() if k not in common}
    found = {**{key: value for key, value in defaults.items() if value is not None}, **config}
    key = MIXTURES.get(str(config.get("model_type")))
    experts = {} if key is None else {key: n_experts(config, source)}
    return found | experts | _rotary(found)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and its like, of `rope_parameters`; layers that slide may have a base of their own."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        return {}
    whole = parameters.get("full_attention", parameters)
    sliding = parameters.get("sliding_attention", {})
    found = {}
    if "rope_theta" in whole:
        found["rope_theta"] = whole["rope_theta"]
    if "rope_theta" in sliding:
        found["rope_local_base_freq"] = sliding["rope_theta"]
    if "partial_rotary_factor" in whole:
        found["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if whole.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: it for key, it in whole.items() if key != "rope_theta"}
        found["rope_scaling"]["type"] = whole["rope_type"]
    return found
