"""Grouping of loaded layers that are compressed together: those with one input, or with something that spans blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from calibration.experts.pooling import Routed
from calibration.statistics.base import GradientStatistic
from calibration.statistics.collection import Pooled, Statistics
from calibration.walk import SharedInput
from compress.families.base import Compressor
from compress.forms.base import Form
from compress.forms.shared import Shared
from compress.models.names import block_and_place
from compress.planning.layer import PlannedLayer


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

    def apart(self) -> Iterator[Group]:
        """A group of each single layer."""
        for layer, own in zip(self.layers, self.own, strict=True):
            yield Group([layer], own, [own], self.routed)


Inputs = Sequence[SharedInput]


def inputs_in_turn(
    found: Iterable[SharedInput], waiting: Mapping[str, PlannedLayer], n_blocks: int
) -> Iterator[Inputs]:
    """Inputs whose layers can be compressed: each alone, unless its layers share something with other blocks'.

    Those come together, the same place in every block, when the last of them has been found.
    """
    held: dict[str, list[SharedInput]] = {}
    for shared in found:
        if not any(waiting[n].compressor.spans_blocks for n in shared.names if n in waiting):
            yield [shared]
            continue
        _, place = block_and_place(shared.names[0])
        held.setdefault(place, []).append(shared)
        if len(held[place]) == n_blocks:
            yield held.pop(place)
    yield from held.values()


def groups_of(
    inputs: Inputs, waiting: Mapping[str, PlannedLayer], gradients: Mapping[str, Statistics]
) -> Iterator[Group]:
    """Groups of layers with the same plan, in the order of their first; each alone if it reads its own gradients.

    The layer that stores what a group shares comes first.
    """
    alike: dict[Compressor, list[tuple[PlannedLayer, Statistics]]] = {}
    for shared in inputs:
        # Saved statistics know layers too that the plan leaves dense.
        for layer in (waiting[name] for name in shared.names if name in waiting):
            alike.setdefault(layer.compressor.together, []).append((layer, shared.stats))
    routed = {name: shared.routed for shared in inputs if shared.routed for name in shared.names}
    for key, members in alike.items():
        members.sort(key=lambda member: member[0].compressor != key)
        layers, own = [layer for layer, _ in members], [stats for _, stats in members]
        if not GradientStatistic.among(key.needs):
            yield Group(layers, _pooled(own), own, routed)
            continue
        for layer, stats in members:
            joined = stats.joined(gradients.get(layer.name, Statistics()))
            yield Group([layer], joined, [joined], routed)


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
