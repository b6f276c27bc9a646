"""The largest difference of log-probabilities that the arithmetic of two computations explains.

Each product of a layer adds an error of its own, relative to its outputs: the rounding of its inputs, of its weights,
and of sums over n inputs in fp32. Independent errors of 2 sublayers in each of L blocks add as squares. An error of a
share e in the last hidden state moves a logit by about e times the standard deviation s of the logits, and the largest
of many positions by some more, for which a factor of 4 stands; 8 for a mixture of experts, whose router sends a token
elsewhere where two scores are close:

    bound = 4 s sqrt(2 L ((2 a^2 + w^2 + c^2 + 2 q^2) / 3 + n 2^-48)) + 2 a m + 1e-5

a, w, c: unit roundoffs of activations, weights and cached keys and values; q: half a step of inputs that are rounded to
integers, relative to their root mean square, in both products that follow one another in a sublayer; a third of the
square of each is that of an error spread evenly up to it. m: the largest absolute logit, itself rounded; 1e-5: the
softmax in fp32. All of them are sums over both computations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.engines.base import Arithmetic, n_experts

ROUNDOFF: Mapping[str, float] = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
SAFETY = 4.0
SAFETY_OF_MIXTURES = 8.0
SOFTMAX = 1e-5


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The largest difference that passes, and the arithmetic behind it in words."""

    value: float
    text: str
    """"activations in bfloat16, 30 blocks"."""


def bound_of(
    engine: Arithmetic, reference: Arithmetic, config: Mapping[str, Any], logits_nv: Tensor
) -> Bound:
    """The bound for two computations of a model with this config.json, whose logits at some positions are given."""
    blocks, width = _blocks(config), _width(config)
    squares, last = 0.0, 0.0
    for each in (engine, reference):
        a, w = ROUNDOFF[each.activations], ROUNDOFF[each.weights]
        c, q = ROUNDOFF[each.cache], _integers(each)
        squares += (2 * a**2 + w**2 + c**2 + 2 * q**2) / 3 + width * 2.0**-48
        last += 2 * a
    logits = logits_nv.double()
    spread, largest = float(logits.std(-1).mean()), float(logits.abs().max())
    safety = SAFETY_OF_MIXTURES if n_experts(config) else SAFETY
    value = safety * spread * math.sqrt(2 * blocks * squares) + last * largest + SOFTMAX
    return Bound(value=value, text=f"{_told(engine, reference)}, {blocks} blocks")


def _integers(each: Arithmetic) -> float:
    """Half a step of a symmetric grid up to the largest of a group, over the root of the mean square."""
    if each.activation_bits is None:
        return 0.0
    return each.activation_peak / ((1 << each.activation_bits) - 2)


def _told(engine: Arithmetic, reference: Arithmetic) -> str:
    parts = [f"activations in {engine.activations}"]
    if engine.activation_bits is not None:
        parts.append(f"inputs of products in {engine.activation_bits} bits")
    if engine.weights not in ("float32", engine.activations):
        parts.append(f"weights in {engine.weights}")
    if engine.cache not in ("float32", engine.activations):
        parts.append(f"cache in {engine.cache}")
    if ROUNDOFF[reference.activations] > ROUNDOFF[engine.activations]:
        parts.append(f"compared with {reference.activations}")
    return ", ".join(parts)


def _blocks(config: Mapping[str, Any]) -> int:
    return int(_of_text(config, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 32))


def _width(config: Mapping[str, Any]) -> int:
    return int(_of_text(config, ("intermediate_size", "n_inner", "hidden_size", "n_embd"), 4096))


def _of_text(config: Mapping[str, Any], names: tuple[str, ...], default: int) -> Any:
    """A size of the language model, which some configurations have in a part of its own."""
    inner = config.get("text_config")
    places = [config, inner] if isinstance(inner, Mapping) else [config]
    found = (place[name] for place in places for name in names if place.get(name))
    return next(found, default)
