"""Lines of a plan on the experts of a mixture: how many, whose statistics they get, what exports make of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from calibration.experts.routing import Routing
from compress.exports.base import EXPORTS
from compress.models.kinds import expert_of

STATISTICS = {
    Routing.ROUTED: "of the tokens that the router sends to each; where these are fewer than the layer's inputs, the "
    "layer's others are mixed in, and the report tells by what weight",
    Routing.POOLED: "of the tokens that are sent to any expert of the layer, the same for all",
    Routing.ALL: "of all tokens, each sent through every expert",
}
"""Whose tokens the statistics of experts are of, by the option `moe`."""


def mixture_lines(names: Iterable[str], routing: Routing, exports: Sequence[str]) -> list[str]:
    """The lines for the compressed layers of these names; none where none is an expert's."""
    experts = [found for name in names if (found := expert_of(name)) is not None]
    if not experts:
        return []
    n_experts = len({(one.module, one.number) for one in experts})
    n_layers = len({one.module for one in experts})
    told = [
        f"experts: {n_experts:,} in {n_layers} layers",
        f"statistics of experts (--moe {routing}): {STATISTICS[routing]}",
    ]
    texts = ((name, EXPORTS[name].experts_text()) for name in exports)
    return told + [f"experts in {name}: {text}" for name, text in texts if text]
