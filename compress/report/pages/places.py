"""The place of a weight: its block, its projection, and the part of the model that its bytes count for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from compress.models.kinds import EMBEDDINGS, HEAD, NORMS, expert_of
from compress.report.report import Report

NO_BLOCK = "-"


@dataclass(frozen=True)
class Place:
    """Place of one layer in the model."""

    block: str
    """The number of its block; "-" where its name has none."""
    projection: str
    """Name without the block, as short as is unique: "q_proj"."""


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Places by layer name: `model.layers.3.self_attn.q_proj` is q_proj of block 3.

    A layer of any expert is `experts.gate_proj`.
    """
    parts = {name: _split(name) for name in names}
    short = _shortened({rest for _, rest in parts.values()})
    return {name: Place(block, short[rest]) for name, (block, rest) in parts.items()}


def part_of(name: str, reason: str) -> str:
    """Part of the model that a kept tensor belongs to: embeddings, head, norms, biases, or the reason it was kept."""
    if HEAD.search(name):
        return "head"
    if NORMS.search(name):
        return "norms"
    if EMBEDDINGS.search(name):
        return "embeddings"
    return "biases" if name.endswith("bias") else f"kept: {reason}"


def bytes_by_part(report: Report) -> list[tuple[str, int, int]]:
    """Part, bytes before and bytes after, in the model's order: each projection, then what was kept, largest first."""
    places = places_of([layer.name for layer in report.layers])
    layers: dict[str, tuple[int, int]] = {}
    for layer in report.layers:
        before, after = layers.get(places[layer.name].projection, (0, 0))
        sizes = before + layer.bytes_before, after + layer.bytes_after
        layers[places[layer.name].projection] = sizes
    for table in report.embeddings:
        part = part_of(f"{table.name}.weight", table.note)
        layers[part] = (table.bytes_before, table.bytes_after)
    kept: dict[str, int] = {}
    for tensor in report.kept:
        part = part_of(tensor.name, tensor.reason)
        kept[part] = kept.get(part, 0) + tensor.n_bytes
    largest = sorted(kept.items(), key=lambda entry: -entry[1])
    rest = [(part, n_bytes, n_bytes) for part, n_bytes in largest]
    return [*((part, *sizes) for part, sizes in layers.items()), *rest]


def _split(name: str) -> tuple[str, str]:
    """Block and the rest of the name behind it, without an expert's number; without a block, the whole name."""
    expert = expert_of(name)
    found = re.search(r"(?:^|\.)(\d+)\.(.+)$", name if expert is None else expert.of_all)
    return (found[1], found[2]) if found else (NO_BLOCK, name)


def _shortened(names: set[str]) -> dict[str, str]:
    """The last components of each, as many as no other shares."""
    return {name: _shortest(name, names - {name}) for name in names}


def _shortest(name: str, others: set[str]) -> str:
    components = name.split(".")
    for start in range(len(components) - 1, 0, -1):
        ending = ".".join(components[start:])
        if components[start - 1] == "experts":
            continue
        if not any(other == ending or other.endswith(f".{ending}") for other in others):
            return ending
    return name
