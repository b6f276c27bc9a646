"""Makes a plan with its sizes, and refuses everything that can be refused before work."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from calibration.layers import is_linear
from calibration.skeleton import PartLoader, decoder_blocks
from calibration.statistics import always_collected
from calibration.statistics.base import GradientStatistic, ObservedStatistic
from calibration.store import stored_bytes
from compress.bases import AsDense
from compress.embeddings.plan import OutsideBlocks
from compress.errors import CheckpointError, RecipeError, inside
from compress.exports.checkpoint import main_dtype
from compress.families.base import Compressor, LayerShape, Survey
from compress.families.correction import Correction
from compress.models.checkpoint import Tensors
from compress.models.layers import is_transposed
from compress.models.names import select
from compress.planning.beside import NOTE, chosen_beside, refuse_inputs, refuse_tables
from compress.planning.layer import PlannedLayer
from compress.planning.left import ROUTER, is_router, left_alone, outside
from compress.planning.plan import Plan
from compress.report.report import KeptTensor

SPARE_DISK = 64 << 20


def make_plan(  # noqa: PLR0913  (all but four have defaults)
    loader: PartLoader,
    reader: Tensors,
    method: Compressor,
    patterns: tuple[tuple[str, ...], tuple[str, ...]],
    surveys: Mapping[str, Survey] = MappingProxyType({}),
    uncalled: Collection[str] = (),
    others: Callable[[Linears], OutsideBlocks] = lambda _: OutsideBlocks(),
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Plan for the skeleton of a loader and its checkpoint; `patterns` are those to include and to exclude.

    `surveys` is what the method asked for and was found; `uncalled` are layers whose weight is read without a call.
    `others`: what is stored otherwise than in the source, given the layers. `left_out`: chosen layers that stay as they
    are all the same, with the reason.

    Raises RecipeError for patterns that match nothing, for layers that would not get smaller, and whatever the method
    refuses; CheckpointError for a tensor whose shape contradicts the configuration.
    """
    found = chosen_linears(loader, reader, patterns, surveys, uncalled)
    refuse_inputs(found.beside, method)
    small = {**method.leaves(found.shapes), **left_out}
    shapes = {name: shape for name, shape in found.shapes.items() if name not in small}
    stored = others(found)
    rest = reader.total_bytes - sum(shape.n_bytes for shape in shapes.values())
    rest -= stored.saved_bytes(stored.budgeted)
    layers = _planned_layers(found, shapes, method, rest)
    owners = method.owners(shapes)
    layers = tuple(replace(layer, owner=owners.get(layer.name, "")) for layer in layers)
    refuse_no_gain(layers)
    left = dict.fromkeys(set(shapes) - {layer.name for layer in layers}, "left dense by the plan")
    replaced = {layer.tensor for layer in layers} | {
        key for table in stored.tables for key in table.tensors
    }
    reasons = {**found.reasons, **left, **small}
    kept = kept_tensors(reader, loader, found.prefix, replaced, reasons)
    statistics = _statistics_bytes(method, [layer.shape for layer in shapes.values()])
    return Plan(
        layers,
        tuple(shapes),
        kept,
        found.n_blocks,
        *statistics,
        main_dtype(reader),
        outside=stored,
        config=loader.model.config,
    )


@dataclass(frozen=True)
class Linears:
    """The linear layers of a model's decoder blocks, and which of them are chosen."""

    prefix: str
    """The prefix of the blocks' names."""
    n_blocks: int
    reasons: Mapping[str, str | None]
    """The reason for which a layer is not chosen, by name; None for those that are."""
    shapes: dict[str, LayerShape]
    """The shapes of chosen layers, by name."""
    tensors: dict[str, str]
    """The names of their weights in the checkpoint."""
    beside: tuple[str, ...] = ()
    """Names of those that are outside the decoder blocks."""


def chosen_linears(
    loader: PartLoader,
    reader: Tensors,
    patterns: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    surveys: Mapping[str, Survey] = MappingProxyType({}),
    uncalled: Collection[str] = (),
) -> Linears:
    """The layers that a method can be asked to compress; raises as `make_plan` does for patterns and shapes."""
    refuse_other_shapes(loader, reader)
    prefix, blocks = decoder_blocks(loader.model)
    linears = block_linears(prefix, blocks)
    beside, patterns = chosen_beside(loader, linears, patterns)
    refuse_tables(loader, linears, patterns)
    keys = {name: found[0] for name, found in loader.keys_of().items() if len(found) == 1}
    if beside and not patterns[0]:
        selected: Mapping[str, str | None] = dict.fromkeys(linears, "not among --include")
    else:
        selected = select(linears, *patterns)
    linears |= beside
    left = left_alone(linears, loader, uncalled)
    reasons = _with_left({**selected, **dict.fromkeys(beside)}, left)
    tensors = {name: keys[f"{name}.weight"] for name, why in reasons.items() if why is None}
    shapes = {
        name: _shape(linears[name], reader, tensor, surveys.get(name))
        for name, tensor in tensors.items()
    }
    return Linears(prefix, len(blocks), reasons, shapes, tensors, tuple(beside))


def _with_left(
    chosen: Mapping[str, str | None], left: Mapping[str, str]
) -> Mapping[str, str | None]:
    """Reasons of patterns, and of layers that stay whatever the method. Raises RecipeError if no layer is left."""
    reasons = {name: why or left.get(name) for name, why in chosen.items()}
    if reasons and None not in reasons.values():
        name = next(name for name, why in chosen.items() if why is None)
        raise RecipeError(
            f"none of the chosen layers is compressed: {name} {left[name]}", option="include"
        )
    return reasons


def block_linears(prefix: str, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The linear layers of the decoder blocks by name."""
    return {
        f"{prefix}.{index}.{part}": layer
        for index, block in enumerate(blocks)
        for part, layer in block.named_modules()
        if is_linear(layer)
    }


def _planned_layers(
    found: Linears, shapes: Mapping[str, LayerShape], method: Compressor, rest: int
) -> tuple[PlannedLayer, ...]:
    """The layers that a method compresses; `rest`: bytes of all else. Raises RecipeError whatever it refuses."""
    with inside("method"):
        layers = [
            _planned(name, found.tensors[name], shapes[name], compressor)
            for name, compressor in method.plan(shapes, rest).items()
        ]
    if isinstance(method, Correction):
        layers = [
            layer
            if isinstance(layer.compressor, Correction)
            else replace(layer, note=method.why_none(layer.shape))
            for layer in layers
        ]
    return tuple(replace(one, note=NOTE) if one.name in found.beside else one for one in layers)


def _statistics_bytes(method: Compressor, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The most bytes that statistics of inputs and of gradients take, as if no layers shared an input."""
    asked = method.needs | (method.surveys or frozenset())
    gradients = GradientStatistic.among(asked)
    inputs = ObservedStatistic.among(always_collected()) | (asked - gradients)
    n_stores = (
        2 if method.surveys else 1
    )  # those of the original model, and those through compressed blocks
    cheap = GradientStatistic.among(always_collected())
    return (
        n_stores * sum(stored_bytes(shape, inputs) for shape in shapes),
        sum(stored_bytes(shape, gradients | cheap) for shape in shapes) if gradients else 0,
    )


def _planned(name: str, tensor: str, layer: LayerShape, compressor: Compressor) -> PlannedLayer:
    planned, predicted = compressor.planned_bytes(layer.shape), compressor.predicted_error(layer)
    return PlannedLayer(name, tensor, layer.shape, layer.n_bytes, planned, compressor, predicted)


def refuse_other_shapes(loader: PartLoader, reader: Tensors) -> None:
    """Raises CheckpointError naming the first tensor that is not shaped as the configuration says."""
    for key, stored, shape in other_shapes(loader, reader):
        raise CheckpointError(
            f"{key}: its shape in the checkpoint is {stored}, but config.json makes it {shape}; "
            "the two do not belong together, download the checkpoint again or correct config.json"
        )


def other_shapes(
    loader: PartLoader, reader: Tensors | AsDense
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Tensors that the model has in another shape: name in the checkpoint, shape there, shape in the model.

    Tensors that are merged or split on loading are left to the loader.
    """
    expected = loader.model.state_dict()
    for name, found in loader.keys_of().items():
        if name not in expected or len(found) > 1 or loader.is_converted(name):
            continue
        stored, shape = tuple(reader.shape(found[0])), tuple(expected[name].shape)
        if stored != shape:
            yield found[0], stored, shape


def refuse_no_gain(layers: Sequence[PlannedLayer]) -> None:
    """Raises RecipeError if a layer's planned form takes as many bytes as its weight, or more.

    Layers that share something count together: one of them stores it for all.
    """
    saved: dict[str, int] = defaultdict(int)
    for layer in layers:
        saved[layer.stored_by] += layer.bytes_before - layer.bytes_after
    wasteful = [
        layer for layer in layers if saved[layer.stored_by] <= 0 and layer.compressor.saves_bytes
    ]
    if not wasteful:
        return
    layer, options = wasteful[0], []
    method: object = layer.compressor
    while method is not None:
        options += [f"{n} ({getattr(method, n)})" for n in ("rank", "bits") if hasattr(method, n)]
        method = getattr(method, "base", None)
    lower = f"lower the {' or the '.join(options)}" if options else "choose another method"
    raise RecipeError(
        f"with {layer.compressor.name}, {len(wasteful)} of {len(layers)} layers would not get smaller, such as "
        f"{layer.name} ({layer.bytes_before} bytes before, {layer.bytes_after} after); {lower}, or --exclude them",
        option="method",
    )


def _shape(layer: nn.Module, reader: Tensors, tensor: str, survey: Survey | None) -> LayerShape:
    rows, columns = layer.weight.shape  # type: ignore[misc]
    shape = (columns, rows) if is_transposed(layer) else (rows, columns)
    dtype, n_bytes = reader.dtype(tensor), reader.nbytes(tensor)
    return LayerShape((int(shape[0]), int(shape[1])), n_bytes, dtype, survey)


def kept_tensors(
    reader: Tensors,
    loader: PartLoader,
    prefix: str,
    replaced: set[str],
    reasons: Mapping[str, str | None],
) -> tuple[KeptTensor, ...]:
    """The tensors that are copied, each with the reason."""
    kept = []
    for key in reader:
        if key in replaced:
            continue
        name = loader.memory_names[key]
        module = name.rpartition(".")[0]
        shape = tuple(reader.shape(key))
        if name not in loader.known:
            reason = outside(name, loader)
        elif name.endswith((".bias", "correction_bias")) and (
            name.startswith(f"{prefix}.") or module in reasons
        ):
            reason = "bias"
        elif module in reasons:
            reason = reasons[module] or "part of a compressed layer"
        elif not name.startswith(f"{prefix}."):
            reason = outside(name, loader)
        elif is_router(module):
            reason = ROUTER
        elif ".experts." in name or "Expert" in type(loader.model.get_submodule(module)).__name__:
            reason = (
                "experts that this family calls in a way of its own, which no method compresses"
            )
        else:
            reason = (
                "not a linear layer"
                if len(shape) < 2
                else "of no linear layer: a convolution, a table or a matrix of a scan"
            )
        kept.append(KeptTensor(name=key, shape=shape, reason=reason, n_bytes=reader.nbytes(key)))
    return tuple(kept)


def refuse_full_disk(folder: Path, needed: int, what: str) -> None:
    """Raises RecipeError if the disk of a folder (or of its nearest parent) has less than `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_DISK:
        raise RecipeError(
            f"{(needed + SPARE_DISK) / 1e6:.0f} MB are needed in {existing}, {free / 1e6:.0f} MB are free",
            option=what,
        )


def seconds_of_forward(n_parameters: int, n_tokens: int, device: torch.device) -> float:
    """A rough time for one forward pass: two operations a parameter and token, at the speed of a small product."""
    a = torch.randn(1024, 1024, device=device)
    a @ a
    started = time.perf_counter()
    for _ in range(4):
        a = (a @ a).tanh_()
    float(a[0, 0])
    return 2 * n_parameters * n_tokens / (4 * 2 * 1024**3) * (time.perf_counter() - started)
