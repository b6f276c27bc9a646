"""Notes on a plan's bytes: corrections that few bits make larger, and layers that share what they store."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from compress.exports.base import stores_codes, widens
from compress.families.correction import Correction
from compress.families.correction_options import FULL_BITS
from compress.planning.layer import PlannedLayer


def correction_notes(layers: Sequence[PlannedLayer], exports: Sequence[str]) -> tuple[str, ...]:
    """A sentence for each reason for which few bits save nothing in the formats that are written."""
    if widens(exports):
        coded = [layer for layer in layers if layer.correction_bytes != layer.adapter_bytes]
        return (_widened(coded),) if coded else ()
    wasteful = [layer for layer in layers if layer.correction_bytes > layer.adapter_bytes]
    return (_wasted(wasteful),) if wasteful and stores_codes(exports) else ()


def _widened(layers: Sequence[PlannedLayer]) -> str:
    written = sum(layer.adapter_bytes for layer in layers)
    return (
        f"{_corrections_of(layers)} are rounded to few bits and written in {FULL_BITS} all the same, {written:,} "
        "bytes, "
        "for a PEFT adapter has no other format; export native too, which stores the codes, or use --adapter-bits 16"
    )


def _wasted(layers: Sequence[PlannedLayer]) -> str:
    coded, wide = (
        sum(getattr(layer, name) for layer in layers)
        for name in ("correction_bytes", "adapter_bytes")
    )
    ranks = [_least_rank(layer) for layer in layers]
    paying = [rank for rank in ranks if rank is not None]
    more = f", or a rank of {max(paying)} or more" if len(paying) == len(ranks) else ""
    return (
        f"{_corrections_of(layers)} take more bytes in few bits than in {FULL_BITS}, {coded:,} against {wide:,}, for "
        "rows "
        f"of codes are packed by 32 and have scales; use --adapter-bits 16{more}"
    )


def _corrections_of(layers: Sequence[PlannedLayer]) -> str:
    return f"the corrections of {len(layers)} layers, {layers[0].name} the first,"


def _least_rank(layer: PlannedLayer) -> int | None:
    """The least rank from which on the correction's bits save bytes; None if no rank does."""
    method = layer.compressor
    assert isinstance(method, Correction)  # others have no correction
    bits = int(method.adapter_bits)
    ranks = range(1, min(layer.shape) + 1)
    return next(
        (
            rank
            for rank in ranks
            if method.correction_bytes(layer.shape, rank, bits)
            < method.correction_bytes(layer.shape, rank, FULL_BITS)
        ),
        None,
    )


def shared_lines(layers: Sequence[PlannedLayer]) -> list[str]:
    """A line for each kind of layers that share what one of them stores, with what they take together."""
    named = {layer.name: layer for layer in layers}
    readers: dict[str, list[PlannedLayer]] = defaultdict(list)
    for layer in layers:
        if layer.owner:
            readers[layer.owner].append(layer)
    kinds: dict[tuple[str, str], list[list[PlannedLayer]]] = defaultdict(list)
    for owner, members in readers.items():
        counts = Counter(_leaf(member.name) for member in members)
        text = ", ".join(leaf if n == 1 else f"{n} {leaf}" for leaf, n in counts.items())
        kinds[_leaf(owner), text].append([named[owner], *members])
    return [_shared_line(leaf, text, groups) for (leaf, text), groups in kinds.items()]


def _shared_line(leaf: str, text: str, groups: Sequence[Sequence[PlannedLayer]]) -> str:
    layers = [layer for group in groups for layer in group]
    before, after = (
        sum(getattr(layer, f"bytes_{when}") for layer in layers) for when in ("before", "after")
    )
    bits = 8 * after / sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return (
        f"shared: {len(groups)} x {leaf} stores what {text} reads too: together {before:,} -> {after:,} bytes, "
        f"{bits:.2f} bits/weight"
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
