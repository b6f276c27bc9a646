"""Rotary embeddings of a GGUF file beyond their base: scaling in its metadata, and factors that are tensors.

transformers 5.23 reads neither for most architectures, and computes something else at every position but the first.
llama.cpp divides each frequency by its factor (`rope_freqs.weight` of Llama 3.1, `rope_factors_long` and `_short` of
Phi 3), and scales as `{architecture}.rope.scaling.*` says (`llama_model_base::load_hparams`, `ggml_rope_ext`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from transformers import PretrainedConfig

from compress.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader

_ALWAYS, _SHORT, _LONG = "rope_freqs", "rope_factors_short", "rope_factors_long"
_EXPRESSED = frozenset(
    ("factor", "attn_factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
)
"""Entries of rope.scaling that a configuration has a place for."""
_LOW, _HIGH = 1.0, 4.0
"""Llama 3's low_freq_factor and high_freq_factor, which its files do not hold."""
_EXACT = 1e-4
"""Relative difference up to which factors are those of Llama 3's formula: they are stored in fp32."""


@dataclass(frozen=True)
class RopeScaling:
    """All that a file says of it."""

    kind: str = "none"
    """none, linear, yarn or longrope."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Entries of rope.scaling: factor, attn_factor, original_context_length, yarn_beta_fast ..."""
    factors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Divisors of the frequencies by the name of their tensor, those that are all 1 left out."""


def read_rope(reader: GGUFReader, architecture: str) -> RopeScaling:
    """What a file says of rotary scaling."""
    prefix = f"{architecture}.rope.scaling."
    found = {
        key.removeprefix(prefix): value.contents()
        for key, value in reader.fields.items()
        if key.startswith(prefix)
    }
    old = reader.get_field(f"{architecture}.rope.scale_linear")
    kind = str(found.pop("type", "none" if old is None else "linear"))
    if old is not None:
        found.setdefault("factor", old.contents())
    factors = {
        name: tuple(float(value) for value in np.asarray(tensor.data, dtype=np.float32).reshape(-1))
        for tensor in reader.tensors
        if (name := tensor.name.removesuffix(".weight")) in (_ALWAYS, _SHORT, _LONG)
    }
    settings = {key: float(value) for key, value in found.items() if _is_number(value)}
    return RopeScaling(kind, settings, {k: v for k, v in factors.items() if set(v) != {1.0}})


def apply_rope(config: PretrainedConfig, rope: RopeScaling, path: Path) -> None:
    """Write it into a model's configuration, unless transformers has read it.

    Raises CheckpointError for what no configuration expresses.
    """
    if not rope.factors and rope.kind == "none":
        return
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        _refuse(path, rope, f"{type(config).__name__} has no rope_parameters")
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    # Where layers differ, those with a window of their own keep their frequencies.
    target = nested.get("full_attention") if nested else parameters
    if target is None:
        _refuse(path, rope, f"its layers differ ({', '.join(nested)})")
    if target.get("rope_type", "default") != "default":
        return
    strange = sorted(set(rope.settings) - _EXPRESSED)
    if strange:
        _refuse(path, rope, f"there is no place for {', '.join(strange)}")
    target |= _parameters(config, target, rope, path)
    if "original_max_position_embeddings" in target and hasattr(
        config, "original_max_position_embeddings"
    ):
        config.original_max_position_embeddings = target["original_max_position_embeddings"]


def _parameters(
    config: PretrainedConfig, target: Mapping[str, Any], rope: RopeScaling, path: Path
) -> dict[str, Any]:
    """Entries of rope_parameters, beside rope_theta."""
    n_frequencies = _n_frequencies(config, target)
    for name, factors in rope.factors.items():
        if len(factors) != n_frequencies or not all(0 < each < math.inf for each in factors):
            _refuse(path, rope, f"{name} should hold {n_frequencies} numbers above 0")
    original = rope.settings.get("original_context_length", config.max_position_embeddings)
    if rope.factors:
        if rope.kind not in ("none", "longrope"):
            _refuse(path, rope, f"no configuration has factors beside {rope.kind} scaling")
        return _with_factors(config, target, rope, int(original))
    factor = rope.settings.get("factor", 0.0)
    if rope.kind not in ("linear", "yarn") or not 0 < factor < math.inf:
        _refuse(path, rope, "linear and yarn with a factor above 0 are known")
    found: dict[str, Any] = {"rope_type": rope.kind, "factor": factor}
    if rope.kind == "yarn":
        found["original_max_position_embeddings"] = int(original)
        names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        found |= {ours: rope.settings[key] for key, ours in names.items() if key in rope.settings}
        if "attn_factor" in rope.settings:
            usual = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
            found["attention_factor"] = rope.settings["attn_factor"] * usual
    return found


def _with_factors(
    config: PretrainedConfig, target: Mapping[str, Any], rope: RopeScaling, original: int
) -> dict[str, Any]:
    """As Llama 3's formula if they are its, which every server knows; else the factors themselves."""
    always = rope.factors.get(_ALWAYS)
    if always is not None:
        formula = _as_llama3(np.array(always), float(target["rope_theta"]))
        if formula is not None:
            return formula
        original = config.max_position_embeddings
    ones = (1.0,) * _n_frequencies(config, target)
    return {
        "rope_type": "longrope",
        "short_factor": list(always or rope.factors.get(_SHORT, ones)),
        "long_factor": list(always or rope.factors.get(_LONG, ones)),
        "original_max_position_embeddings": original,
        "factor": config.max_position_embeddings / original,
        "attention_factor": rope.settings.get("attn_factor", 1.0),
    }


def _as_llama3(factors: np.ndarray[Any, Any], theta: float) -> dict[str, Any] | None:
    """The settings of Llama 3's formula that make these factors; None if none do."""
    n, factor = len(factors), float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(n) / n)
    between = (factors > 1 + _EXACT) & (factors < factor * (1 - _EXACT))
    if factor <= 1 or not between.any():
        return None
    # 1 / f = (1 - s) / factor + s with s = (original / wavelength - low) / (high - low)
    smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
    lengths = wavelengths[between] * (smooth * (_HIGH - _LOW) + _LOW)
    original = round(float(np.median(lengths)))
    if original < 1:
        return None
    s = np.clip((original / wavelengths - _LOW) / (_HIGH - _LOW), 0, 1)
    made = 1 / ((1 - s) / factor + s)
    if not np.allclose(made, factors, rtol=_EXACT, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": original,
    }


def _n_frequencies(config: PretrainedConfig, target: Mapping[str, Any]) -> int:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * target.get("partial_rotary_factor", 1.0)) // 2


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse(path: Path, rope: RopeScaling, reason: str) -> NoReturn:
    what = [*rope.factors, *([] if rope.kind == "none" else [f"rope.scaling.type {rope.kind}"])]
    raise CheckpointError(
        f"{path}: its rotary embeddings are scaled ({', '.join(what)}), which this toolkit cannot write into a "
        f"config.json: {reason}; name the safetensors checkpoint that it was made from"
    )
