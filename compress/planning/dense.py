"""Layers that formats store as ordinary dense weights: those that none stores in codes, and notes on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compress.exports.base import EXPORTS
from compress.planning.layer import PlannedLayer


def stored_in_no_codes(layers: Sequence[PlannedLayer], exports: Sequence[str]) -> Mapping[str, str]:
    """Layers that every format stores as dense weights, each with the first format's reason, by name.

    An ordinary checkpoint does so with all layers, and has no say.
    """
    kinds = [EXPORTS[name] for name in exports if not EXPORTS[name].traits.ordinary]
    reasons = {
        layer.name: [kind.stores_dense(layer.compressor, layer.shape) for kind in kinds]
        for layer in layers
    }
    return {
        name: f"no format of this run stores its codes: {found[0]}"
        for name, found in reasons.items()
        if found and all(found)
    }


def dense_notes(layers: Sequence[PlannedLayer], exports: Sequence[str]) -> tuple[str, ...]:
    """A sentence for each format and reason for which it stores compressed layers as dense weights."""
    notes = []
    for export in exports:
        found: dict[str, list[str]] = {}
        for layer in layers:
            reason = EXPORTS[export].stores_dense(layer.compressor, layer.shape)
            if reason:
                found.setdefault(reason, []).append(layer.name)
        notes += [
            f"{export} stores {len(names)} of {len(layers)} compressed layers as dense weights, {names[0]} the first: "
            f"{reason}"
            for reason, names in found.items()
        ]
    return tuple(notes)
