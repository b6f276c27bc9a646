"""Grouping of loaded layers that are compressed together: those with one input, or with something that they share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from calibration.experts.pooling import Routed
from calibration.statistics.base import GradientStatistic
from calibration.statistics.collection import Pooled, Statistics
from calibration.walk import SharedInput
from compress.families.base import Compressor
from compress.forms.base import Form
from compress.forms.shared import Shared
from compress.models.kinds import leaf_of
from compress.planning.layer import PlannedLayer

STACK_ENTRIES = 1 << 26
"""Numbers in fp32 that experts solved as one stack may take: 268 MB."""
STACK_ENTRIES_APART = 1 << 28
"""The same on a device with memory of its own, where launching a step takes longer than doing it."""


@dataclass(frozen=True)
class Group:
    """Layers that are compressed together, with their statistics."""

    layers: list[PlannedLayer]
    stats: Statistics
    """The statistics by which they are compressed."""
    own: list[Statistics]
    """The statistics of each layer's input: the same object for all, if they have one input."""
    routed: Mapping[str, Routed] = field(default_factory=dict)
    """How those of experts were collected, by the layer's name."""

    @property
    def shares(self) -> bool:
        """Whether its layers share what the first of them stores."""
        return any(layer.owner for layer in self.layers)

    def apart(self) -> Iterator[Group]:
        """A group of each single layer."""
        for layer, own in zip(self.layers, self.own, strict=True):
            yield Group([layer], own, [own], self.routed)

    def without(self, names: Collection[str]) -> Group:
        """The other layers, of which the first stores what they share."""
        left = [
            (layer, own)
            for layer, own in zip(self.layers, self.own, strict=True)
            if layer.name not in names
        ]
        first = left[0][0].name
        layers = [replace(layer, owner="" if layer.name == first else first) for layer, _ in left]
        own = [stats for _, stats in left]
        return Group(layers, _pooled(own), own, self.routed)


Inputs = Sequence[SharedInput]


def inputs_in_turn(
    found: Iterable[SharedInput], waiting: Mapping[str, PlannedLayer]
) -> Iterator[Inputs]:
    """Inputs whose layers can be compressed: each alone, unless its layers share something with those of others.

    Those come together, as soon as every layer that shares it has been found; at the end, if some never are.
    """
    stored_by = {name: layer.stored_by for name, layer in waiting.items()}
    held: list[list[SharedInput]] = []
    for shared in found:
        owners = _owners([shared], stored_by)
        bundle = [shared]
        for other in [each for each in held if owners & _owners(each, stored_by)]:
            held.remove(other)
            bundle = other + bundle
        owners, come = _owners(bundle, stored_by), {n for each in bundle for n in each.names}
        if all(name in come for name, owner in stored_by.items() if owner in owners):
            yield bundle
        else:
            held.append(bundle)
    yield from held


def alike(
    turns: Iterable[Inputs], waiting: Mapping[str, PlannedLayer], device: torch.device
) -> Iterator[list[Inputs]]:
    """Inputs in turn, those of experts in one place whose layers have one plan together, as many as a stack holds."""
    entries = STACK_ENTRIES if device.type == "cpu" else STACK_ENTRIES_APART
    held: list[Inputs] = []
    for inputs in turns:
        if held and _plan_of(held[0], waiting) != _plan_of(inputs, waiting):
            yield held
            held = []
        held.append(inputs)
        if len(held) >= _most_in_a_stack(inputs, waiting, entries):
            yield held
            held = []
    if held:
        yield held


Place = tuple[str, tuple[int, int], Compressor]


def _plan_of(inputs: Inputs, waiting: Mapping[str, PlannedLayer]) -> list[Place]:
    """The plans of the layers that read an expert's input, by the layers' own names in it."""
    found = [waiting[name] for name in inputs[0].names if name in waiting]
    return [(leaf_of(each.name), each.shape, each.compressor.together) for each in found]


def _most_in_a_stack(inputs: Inputs, waiting: Mapping[str, PlannedLayer], entries: int) -> int:
    """How many experts like this one are solved at once; 1 for any other layers, and for those that share something."""
    layers = [waiting[name] for name in inputs[0].names if name in waiting]
    if len(inputs) > 1 or inputs[0].routed is None or not layers:
        return 1
    if any(GradientStatistic.among(layer.compressor.needs) for layer in layers):
        return 1
    return max(1, entries // sum(entries_in_a_stack(layer.shape) for layer in layers))


def entries_in_a_stack(shape: tuple[int, int]) -> int:
    """Numbers in fp32 that one expert's weight (o, i) takes in a stack: what is left of it, its codes and its errors,
    and the factor of its Gram.
    """
    o, i = shape
    return 4 * o * i + i * i


def _owners(inputs: Inputs, stored_by: Mapping[str, str]) -> set[str]:
    """The layers that store what the layers of these inputs share."""
    return {stored_by[name] for shared in inputs for name in shared.names if name in stored_by}


def groups_of(
    inputs: Inputs, waiting: Mapping[str, PlannedLayer], gradients: Mapping[str, Statistics]
) -> Iterator[Group]:
    """Groups of layers with the same plan, in the order of their first; each alone if it reads its own gradients.

    Layers that share something are a group of their own, and the one that stores it comes first.
    """
    stores = {layer.owner for layer in waiting.values() if layer.owner}
    alike: dict[tuple[Compressor, str], list[tuple[PlannedLayer, Statistics]]] = {}
    for shared in inputs:
        # Saved statistics know layers too that the plan leaves dense.
        for layer in (waiting[name] for name in shared.names if name in waiting):
            owner = layer.stored_by if layer.stored_by in stores else ""
            alike.setdefault((layer.compressor.together, owner), []).append((layer, shared.stats))
    routed = {name: shared.routed for shared in inputs if shared.routed for name in shared.names}
    for (method, owner), found in alike.items():
        members = _storing_first(found, owner)
        layers, own = [layer for layer, _ in members], [stats for _, stats in members]
        if not GradientStatistic.among(method.needs):
            yield Group(layers, _pooled(own), own, routed)
            continue
        for layer, stats in members:
            joined = stats.joined(gradients.get(layer.name, Statistics()))
            yield Group([layer], joined, [joined], routed)


def _storing_first(
    members: list[tuple[PlannedLayer, Statistics]], owner: str
) -> list[tuple[PlannedLayer, Statistics]]:
    """Layers with their input's statistics, the owner first; layers of one input stay side by side."""
    first = next((stats for layer, stats in members if layer.name == owner), None)
    return sorted(members, key=lambda each: (each[1] is not first, each[0].name != owner))


def _pooled(own: Sequence[Statistics]) -> Statistics:
    """The statistics of all layers of a group; those of their input if it is one."""
    counts: list[tuple[int, Statistics]] = []
    for stats in own:
        if counts and counts[-1][1] is stats:
            counts[-1] = (counts[-1][0] + 1, stats)
        else:
            counts.append((1, stats))
    return counts[0][1] if len(counts) == 1 else Pooled(counts)


def name_owners(names: Sequence[str], forms: Sequence[Form]) -> None:
    """Tells forms that read another layer's tensors where these will be in the model."""
    paths = {
        id(module): f"{name}.form.{path}".removesuffix(".")
        for name, form in zip(names, forms, strict=True)
        for path, module in form.named_modules()
    }
    for form in forms:
        for module in form.modules():
            if isinstance(module, Shared):
                module.owner = paths[id(module.form)]
