"""What the source calls the layers of experts, which formats of ordinary names keep; and which experts are opened."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from calibration.skeleton import PartLoader
from compress.exports import LayerExport


def with_source(layer: LayerExport, loader: PartLoader) -> LayerExport:
    """The layer with its name in the source, or the slices that it is there; itself unless it is an expert's."""
    if not is_of_experts(layer.name, loader):
        return layer
    keys = loader.keys_of()
    (weight,) = keys[f"{layer.name}.weight"]
    if weight not in loader.slices:
        return replace(layer, source_name=weight.removesuffix(".weight"))
    names = [weight, *(keys[f"{layer.name}.bias"] if layer.bias is not None else ())]
    return replace(layer, slices=tuple(loader.slices[name] for name in names))


def is_of_experts(name: str, loader: PartLoader) -> bool:
    """Whether a layer or tensor of this name in the model is an expert's."""
    return name.startswith(tuple(f"{path}." for path in loader.experts))


def is_beside_experts(name: str, loader: PartLoader) -> bool:
    """Whether a tensor of this name in the model belongs to a module that holds experts: a router, a shared expert."""
    return name.startswith(tuple(f"{path.rpartition('.')[0]}." for path in loader.experts))


def opened_experts(loader: PartLoader, compressed: Collection[str]) -> tuple[str, ...]:
    """The prefixes of modules of experts in which layers are compressed: formats store every expert of these alone."""
    prefixes = (f"{path}." for path in loader.experts)
    return tuple(one for one in prefixes if any(name.startswith(one) for name in compressed))
