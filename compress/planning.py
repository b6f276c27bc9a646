"""Everything that can be refused is refused here, before work; what is left is a plan with its sizes."""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from calibration.skeleton import PartLoader, decoder_blocks
from calibration.store import stored_bytes
from calibration.walk import is_linear
from compress.checkpoint import Reader
from compress.compressor import Compressor, LayerShape
from compress.errors import CheckpointError, RecipeError
from compress.exports.base import main_dtype
from compress.layers import is_transposed, select
from compress.quantiser import Quantiser
from compress.report import KeptTensor

SPARE_DISK = 64 << 20


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that will be compressed."""

    name: str
    tensor: str
    """Its weight's name in the checkpoint."""
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    compressor: Compressor

    @property
    def gptq_bytes(self) -> int:
        """What the GPTQ layout takes, adapter included; the native size for methods without codes, which it refuses."""
        method: object = self.compressor
        while not isinstance(method, Quantiser):
            method = getattr(method, "base", None)
            if method is None:
                return self.bytes_after
        return self.bytes_after + method.gptq_extra_bytes(self.shape)


@dataclass(frozen=True)
class Plan:
    """Which layer is compressed how, what stays, and what it all weighs."""

    layers: tuple[PlannedLayer, ...]
    kept: tuple[KeptTensor, ...]
    n_blocks: int
    statistics_bytes: int
    """An upper bound of what the saved statistics take."""
    dtype: torch.dtype = torch.float32
    """What holds most of the checkpoint; the dense export's weights are in it."""
    exports: tuple[str, ...] = ("native",)
    """Formats asked for."""

    @property
    def bytes_before(self) -> int:
        """Tensor data of the checkpoint."""
        return sum(layer.bytes_before for layer in self.layers) + self.kept_bytes

    @property
    def bytes_after(self) -> int:
        """Tensor data of the native export."""
        return self.export_bytes("native")

    def export_bytes(self, name: str) -> int:
        """Tensor data of an export by its name. Raises KeyError for one that is not native, gptq or dense."""
        layers = {
            "native": (layer.bytes_after for layer in self.layers),
            "gptq": (layer.gptq_bytes for layer in self.layers),
            "dense": (
                layer.shape[0] * layer.shape[1] * self.dtype.itemsize for layer in self.layers
            ),
        }
        return sum(layers[name]) + self.kept_bytes

    @property
    def kept_bytes(self) -> int:
        """Tensors that are copied."""
        return sum(tensor.n_bytes for tensor in self.kept)

    def lines(self) -> list[str]:
        """The plan for a terminal: layers of a kind together, what is kept and why, totals."""
        kinds: dict[tuple[str, tuple[int, int], str], list[PlannedLayer]] = defaultdict(list)
        for layer in self.layers:
            kinds[layer.name.rpartition(".")[2], layer.shape, _options(layer.compressor)].append(
                layer
            )
        out = [
            f"{'layers':<22}{'out x in':>14}{'bytes before':>15}{'after':>13}{'bits/weight':>13}"
        ]
        for (leaf, (o, i), _), group in kinds.items():
            before, after = (
                sum(getattr(e, f"bytes_{w}") for e in group) for w in ("before", "after")
            )
            bits = 8 * after / (len(group) * o * i)
            out.append(
                f"{len(group)} x {leaf:<18}{f'{o} x {i}':>14}{before:>15,}{after:>13,}{bits:>13.2f}"
            )
        out += [f"method: {text}" for text in dict.fromkeys(options for _, _, options in kinds)]
        for reason in dict.fromkeys(tensor.reason for tensor in self.kept):
            members = [tensor for tensor in self.kept if tensor.reason == reason]
            size = sum(tensor.n_bytes for tensor in members)
            out.append(f"kept as they are: {len(members)} tensors, {size:,} bytes ({reason})")
        for name in self.exports:
            size = self.export_bytes(name)
            share = 100 * size / self.bytes_before
            out.append(
                f"whole checkpoint, {name}: {self.bytes_before:,} -> {size:,} bytes ({share:.1f} % kept)"
            )
        out.append(f"saved statistics: at most {self.statistics_bytes:,} bytes")
        return out


@dataclass(frozen=True)
class Forecast:
    """A plan and roughly how long it will take."""

    plan: Plan
    seconds_of_forward: float
    """One plain forward pass over the calibration tokens."""

    def lines(self) -> list[str]:
        """For a terminal."""
        once, low, high = (round(k * self.seconds_of_forward) for k in (1, 2, 6))
        forward = f"about {once} s" if once else "under a second"
        work = f"{low} to {high} s" if low else f"up to {high} s" if high else "under a second"
        return [
            *self.plan.lines(),
            f"one forward pass over the calibration text: {forward}; "
            f"calibrating and compressing: {work}; verification and evaluation come on top",
        ]


def _options(compressor: Compressor) -> str:
    """A compressor's options in one line."""
    parts = []
    for entry in fields(compressor):  # type: ignore[arg-type]  # every compressor is a dataclass
        value = getattr(compressor, entry.name)
        if isinstance(value, Compressor):
            parts.append(f"{entry.name}=({_options(value)})")
        elif value is not None:
            parts.append(f"{entry.name}={value}")
    return f"{compressor.name}: {', '.join(parts)}"


def make_plan(
    model: PreTrainedModel,
    loader: PartLoader,
    reader: Reader,
    method: Compressor,
    patterns: tuple[tuple[str, ...], tuple[str, ...]],
) -> Plan:
    """Plan for a skeleton and its checkpoint; `patterns` are those to include and to exclude.

    Raises RecipeError for patterns that match nothing, for layers that would not get smaller, and whatever the method
    refuses; CheckpointError for a tensor whose shape contradicts the configuration.
    """
    refuse_other_shapes(model, loader, reader)
    prefix, blocks = decoder_blocks(model)
    linears = {
        f"{prefix}.{index}.{part}": layer
        for index, block in enumerate(blocks)
        for part, layer in block.named_modules()
        if is_linear(layer)
    }
    keys = {name: found[0] for name, found in loader.keys_of().items() if len(found) == 1}
    reasons = select(linears, *patterns)
    chosen = {name: linears[name] for name, reason in reasons.items() if reason is None}
    shapes = {name: _shape(layer, reader, keys[f"{name}.weight"]) for name, layer in chosen.items()}
    layers = tuple(
        PlannedLayer(
            name,
            keys[f"{name}.weight"],
            shapes[name].shape,
            shapes[name].n_bytes,
            compressor.planned_bytes(shapes[name].shape),
            compressor,
        )
        for name, compressor in method.plan(shapes).items()
    )
    refuse_no_gain(layers)
    kept = _kept(reader, loader, prefix, {layer.tensor for layer in layers}, reasons)
    # Most inputs serve several layers; a block's distinct widths, once each, are a close upper bound with q, k, v one.
    statistics = sum(stored_bytes(shape.shape[1]) for shape in shapes.values())
    return Plan(layers, kept, len(blocks), statistics, main_dtype(reader))


def refuse_other_shapes(model: PreTrainedModel, loader: PartLoader, reader: Reader) -> None:
    """Raises CheckpointError naming the first tensor that is not shaped as the configuration says.

    Tensors that are merged or split on loading are left to the loader.
    """
    expected = model.state_dict()
    for name, found in loader.keys_of().items():
        if name not in expected or len(found) > 1 or loader.is_converted(name):
            continue
        stored, shape = tuple(reader.shape(found[0])), tuple(expected[name].shape)
        if stored != shape:
            raise CheckpointError(
                f"{found[0]}: its shape in the checkpoint is {stored}, but config.json makes it {shape}; "
                "the two do not belong together, get the checkpoint again or correct config.json"
            )


def refuse_no_gain(layers: Sequence[PlannedLayer]) -> None:
    """Raises RecipeError if a layer's planned form takes as many bytes as its weight, or more."""
    wasteful = [layer for layer in layers if layer.bytes_after >= layer.bytes_before]
    if not wasteful:
        return
    layer, options = wasteful[0], []
    method: object = layer.compressor
    while method is not None:
        options += [f"{n} ({getattr(method, n)})" for n in ("rank", "bits") if hasattr(method, n)]
        method = getattr(method, "base", None)
    lower = f"lower the {' or the '.join(options)}" if options else "choose another method"
    raise RecipeError(
        f"method: with {layer.compressor.name}, {len(wasteful)} of {len(layers)} layers would not get smaller, such as "
        f"{layer.name} ({layer.bytes_before} bytes before, {layer.bytes_after} after); {lower}, or --exclude them"
    )


def _shape(layer: nn.Module, reader: Reader, tensor: str) -> LayerShape:
    rows, columns = layer.weight.shape  # type: ignore[misc]
    shape = (columns, rows) if is_transposed(layer) else (rows, columns)
    return LayerShape((int(shape[0]), int(shape[1])), reader.nbytes(tensor))


def _kept(
    reader: Reader,
    loader: PartLoader,
    prefix: str,
    replaced: set[str],
    reasons: Mapping[str, str | None],
) -> tuple[KeptTensor, ...]:
    kept = []
    for key in reader:
        if key in replaced:
            continue
        name = loader.memory_names[key]
        module = name.rpartition(".")[0]
        shape = tuple(reader.shape(key))
        if not name.startswith(f"{prefix}."):
            reason = "outside the decoder blocks"
        elif name.endswith(".bias"):
            reason = "bias"
        elif module in reasons:
            reason = reasons[module] or "part of a compressed layer"
        elif "expert" in name:
            reason = "stacked experts, which no method compresses yet"
        else:
            reason = (
                "not a linear layer" if len(shape) < 2 else "not a layer that a method compresses"
            )
        kept.append(KeptTensor(name=key, shape=shape, reason=reason, n_bytes=reader.nbytes(key)))
    return tuple(kept)


def refuse_full_disk(folder: Path, needed: int, what: str) -> None:
    """Raises RecipeError if the disk of a folder (or of its nearest parent) has less than `needed` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + SPARE_DISK:
        raise RecipeError(
            f"{what}: {(needed + SPARE_DISK) / 1e6:.0f} MB are needed in {existing}, {free / 1e6:.0f} MB are free"
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
