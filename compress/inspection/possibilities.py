"""What methods could do to a model, as their own plans tell: bytes at common settings, group sizes, ranks that save."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compress.errors import RecipeError
from compress.families.base import METHODS, Compressor, LayerShape
from compress.families.correction import Correction
from compress.families.factorisation import Factorisation
from compress.families.pruner import Pruner
from compress.families.quantiser import GROUP_SIZES, Quantiser
from compress.inspection.checkpoint import Ordinary
from compress.planning.make import make_plan
from compress.solvers.masks import Pattern
from compress.solvers.rank_allocation import Curve

_SETTINGS: Mapping[type, Sequence[Mapping[str, Any]]] = {
    Quantiser: ({"bits": 8}, {"bits": 4}, {"bits": 3}, {"bits": 2}),
    Correction: ({"rank": 32}, {"rank": 64}),
    Pruner: ({"sparsity": 0.5}, {"pattern": Pattern.TWO_OF_FOUR}),
    Factorisation: ({"keep": 0.8}, {"keep": 0.6}),
}
"""Common settings by kind of method; the other methods are shown at their defaults."""
_SIZES = (256, *GROUP_SIZES, 16)


@dataclass(frozen=True, kw_only=True)
class Possibility:
    """Methods that would come to the same bytes with a setting."""

    methods: tuple[str, ...]
    setting: str
    layer_bytes: int | None
    """Bytes of the compressed layers; None if the setting is refused."""
    n_bytes: int | None
    """Bytes of the whole native checkpoint."""
    refusal: str
    """Reason for a refusal; empty if the setting is possible."""


def possibilities(model: Ordinary) -> list[Possibility]:
    """Every method at common settings, those of equal setting and result together."""
    found: dict[tuple[str, int | None, int | None, str], list[str]] = {}
    for name, setting, method in _common():
        found.setdefault((setting, *_planned(model, method)), []).append(name)
    return [
        Possibility(
            methods=tuple(names), setting=key[0], layer_bytes=key[1], n_bytes=key[2], refusal=key[3]
        )
        for key, names in found.items()
    ]


def _common() -> Iterator[tuple[str, str, Compressor]]:
    for name, kind in sorted(METHODS.items()):
        settings = next((s for base, s in _SETTINGS.items() if issubclass(kind, base)), ({},))
        for options in settings:
            text = ", ".join(f"{key} {value}" for key, value in options.items())
            method = kind(**options).resolved()
            base = getattr(method, "base", None)
            yield name, _said(text, base), method


def _said(text: str, base: object) -> str:
    """A setting, and what the default base is."""
    if not isinstance(base, Compressor):
        return text or "default"
    bits = f" {base.bits} bits" if isinstance(base, Quantiser) else ""
    return f"{text or 'default'} on {base.name}{bits}"


def _planned(model: Ordinary, method: Compressor) -> tuple[int | None, int | None, str]:
    try:
        plan = make_plan(model.loader, model.reader, method, ((), ()), uncalled=model.uncalled)
    except RecipeError as error:
        return None, None, str(error)
    return sum(layer.bytes_after for layer in plan.layers), plan.bytes_after, ""


def dividing_groups(model: Ordinary) -> dict[int, int]:
    """Group sizes, each with the number of layers whose inputs it divides: those that quantisers do not refuse."""
    counts = dict.fromkeys(_SIZES, 0)
    for size in _SIZES:
        method = METHODS["rtn"](group_size=size)
        for name, layer in model.linears.shapes.items():
            try:
                method.plan({name: layer})
            except RecipeError:
                continue
            counts[size] += 1
    return counts


def saving_rank(layer: LayerShape) -> int:
    """The largest rank at which two factors in the weight's dtype take fewer bytes than the weight; 0 if none does."""
    planned = METHODS["svd"]().stored_as(layer)  # type: ignore[attr-defined]  # a factorisation
    nothing = torch.zeros(min(layer.shape), dtype=torch.float64)
    curve = Curve(layer.shape, layer.n_bytes, partial(planned.factor_bytes, layer.shape), nothing)
    return curve.paid_by(layer.n_bytes - 1, 1)
