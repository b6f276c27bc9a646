"""A plan: each layer's compressor, the tensors that stay, their bytes, and the lines that show it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields, replace

import torch

from compress.embeddings.plan import OutsideBlocks
from compress.exports.base import EXPORTS
from compress.exports.storage import Storage
from compress.families.base import Compressor
from compress.planning.layer import PlannedLayer
from compress.planning.text import correction_notes, shared_lines
from compress.report.report import KeptTensor

OUTSIDE = "outside the decoder blocks"


@dataclass(frozen=True)
class Plan:
    """The compressor of each layer, the tensors that stay, and the bytes of everything."""

    layers: tuple[PlannedLayer, ...]
    selected: tuple[str, ...]
    """Layers that --include and --exclude choose: the planned ones, and those that the method leaves dense."""
    kept: tuple[KeptTensor, ...]
    n_blocks: int
    input_statistics_bytes: int
    gradient_statistics_bytes: int
    """An upper bound of what the saved statistics take."""
    dtype: torch.dtype = torch.float32
    """The dtype of most of the checkpoint, which the dense export writes."""
    exports: tuple[str, ...] = ("native",)
    """The formats to write."""
    original_bytes: int | None = None
    """Bytes of the original, if the kept tensors are those of a base checkpoint."""
    base_bytes: int | None = None
    """Bytes of that base checkpoint, as stored."""
    outside: OutsideBlocks = field(default_factory=OutsideBlocks)
    """Embeddings and heads, which are not among the kept tensors, and kept tensors that are stored narrower."""

    @property
    def blocks_at_once(self) -> int:
        """How many decoder blocks are loaded together."""
        return max((layer.compressor.blocks_at_once for layer in self.layers), default=1)

    @property
    def bytes_before(self) -> int:
        """Bytes of tensor data in the original checkpoint."""
        if self.original_bytes is not None:
            return self.original_bytes
        tables = sum(table.n_bytes for table in self.outside.tables)
        return sum(layer.bytes_before for layer in self.layers) + tables + self.kept_bytes

    @property
    def bytes_after(self) -> int:
        """Bytes of tensor data in the native export."""
        return self.export_bytes("native")

    def export_bytes(self, name: str) -> int:
        """Tensor data of an export by its format's name, that of a base that it does not hold included."""
        base = (self.base_bytes or 0) if EXPORTS[name].traits.needs_base else 0
        return self.written_bytes(name) + base

    def written_bytes(self, name: str) -> int:
        """Bytes of an export without an adapter's base, which is elsewhere."""
        return EXPORTS[name].planned_bytes(self)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on effects that the options have on the bytes."""
        return correction_notes(self.layers, self.exports)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tensors that are copied, as the source stores them."""
        return sum(tensor.n_bytes for tensor in self.kept)

    def kept_in(self, export: str) -> tuple[KeptTensor, ...]:
        """The tensors that a format copies as numbers, embeddings without codes included, with their bytes."""
        saved = self.outside.narrowed if self.outside.narrows(export) else {}
        kept = [replace(t, n_bytes=t.n_bytes - saved.get(t.name, 0)) for t in self.kept]
        for table in self.outside.tables:
            storage = table.storage(export)
            if storage.bits is not None:
                continue
            names = table.tensors if storage is Storage.AS_IS else (table.tensor,)
            size = table.bytes_in(export) // len(names)
            kept += [
                KeptTensor(name=n, shape=table.shape, reason=OUTSIDE, n_bytes=size) for n in names
            ]
        return tuple(kept)

    def rest_bytes(self, export: str) -> int:
        """Bytes of everything but the compressed layers in a format."""
        tables = sum(table.n_bytes for table in self.outside.tables)
        return self.kept_bytes + tables - self.outside.saved_bytes(export)

    def lines(self) -> list[str]:
        """The lines that show the plan in a terminal: layers of a kind together, what is kept and why, totals."""
        shapes = {layer.shape for layer in self.layers}
        if len({(layer.shape, layer.rank) for layer in self.layers}) > len(shapes):
            return [*self._ranks(), *self._rest()]
        if len({(layer.shape, layer.correction) for layer in self.layers}) > len(shapes):
            return [*self._corrections(), *self._rest()]
        kinds: dict[tuple[str, tuple[int, int], str], list[PlannedLayer]] = defaultdict(list)
        for layer in self.layers:
            kinds[layer.name.rpartition(".")[2], layer.shape, _options(layer.compressor)].append(
                layer
            )
        out = [
            f"{'layers':<22}{'out x in':>14}{'bytes before':>15}{'after':>13}{'bits/weight':>13}"
        ]
        for (leaf, (o, i), _), group in kinds.items():
            before = sum(layer.bytes_before for layer in group)
            after = sum(layer.held_bytes(self.exports) for layer in group)
            bits = 8 * after / (len(group) * o * i)
            out.append(
                f"{len(group)} x {leaf:<18}{f'{o} x {i}':>14}{before:>15,}{after:>13,}{bits:>13.2f}"
            )
        out += [f"method: {text}" for text in dict.fromkeys(options for _, _, options in kinds)]
        return [*out, *shared_lines(self.layers), *self._rest()]

    def _ranks(self) -> list[str]:
        """Every layer's rank, share and predicted error, then all ranks as a recipe has them."""
        out = [f"{'layer':<44}{'out x in':>14}{'rank':>7}{'kept':>9}{'predicted':>11}"]
        for layer in self.layers:
            shape, share = (
                f"{layer.shape[0]} x {layer.shape[1]}",
                layer.bytes_after / layer.bytes_before,
            )
            error = "-" if layer.predicted_error is None else f"{layer.predicted_error:.4f}"
            out.append(
                f"{layer.name:<44}{shape:>14}{layer.rank:>7}{100 * share:>7.1f} %{error:>11}"
            )
        left = [name for name in self.selected if name not in {layer.name for layer in self.layers}]
        out += [f"{name:<44}{'':>14}{'dense':>7}{'100.0 %':>9}" for name in left]
        if any(layer.predicted_error is not None for layer in self.layers):
            out.append(
                "predicted: relative error in the method's own metric, before factors are rounded"
            )
        ranks = [f"{layer.name}={layer.rank}" for layer in self.layers]
        out += ["in a recipe, to be edited:", "method:", "  ranks:"]
        return out + [f"  - {entry}" for entry in (*ranks, *(f"{name}=dense" for name in left))]

    def _corrections(self) -> list[str]:
        """Every layer's correction, its bytes, and the error that is predicted."""
        out = [f"{'layer':<44}{'out x in':>14}{'correction':>20}{'bytes':>11}{'predicted':>11}"]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            error = "-" if layer.predicted_error is None else f"{layer.predicted_error:.4f}"
            n_bytes = layer.held_correction_bytes(self.exports)
            out.append(
                f"{layer.name:<44}{shape:>14}{layer.correction:>20}{n_bytes:>11,}{error:>11}"
            )
        return out

    def _tables(self) -> list[str]:
        """A line for each matrix of the vocabulary and each way in which formats store it."""
        out = []
        for table in self.outside.tables:
            v, d = table.shape
            for storage in dict.fromkeys(table.storage(name) for name in self.exports):
                names = [name for name in self.exports if table.storage(name) is storage]
                bits = "" if storage.bits is None else " bits"
                tied = f", shared with {table.head}" if table.head else ""
                out.append(
                    f"{table.role}: {table.name}, {v} x {d}, {table.n_bytes:,} -> {table.bytes_in(names[0]):,} bytes, "
                    f"{storage}{bits} in {', '.join(names)}{tied}"
                )
        return out

    def _rest(self) -> list[str]:
        """The lines on embeddings, kept tensors and totals."""
        out = [*self._tables()]
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
        coded, widened = (
            sum(getattr(layer, name) for layer in self.layers)
            for name in ("correction_bytes", "adapter_bytes")
        )
        if coded and not any(layer.predicted_error for layer in self.layers):
            out.append(
                f"corrections: {coded:,} bytes, bits and ranks as given; --adapter-bits auto looks for those with less "
                "error in as many"
            )
        if coded != widened:
            out.append(
                f"corrections: {coded:,} bytes in the native format; a PEFT adapter, which has no format for few bits, "
                f"holds the same values in {widened:,}"
            )
        n_bytes = self.input_statistics_bytes + self.gradient_statistics_bytes
        out.append(f"saved statistics: at most {n_bytes:,} bytes")
        out += [f"note: {note}" for note in self.notes]
        return out


@dataclass(frozen=True)
class Forecast:
    """A plan and a rough estimate of its time."""

    plan: Plan
    seconds_of_forward: float
    """One plain forward pass over the calibration tokens."""
    text: tuple[str, ...] = ()
    """Lines on the windows of text, the model's files, and the memory that compressing takes."""

    def lines(self) -> list[str]:
        """The lines that show the plan and its time in a terminal."""
        once, low, high = (round(k * self.seconds_of_forward) for k in (1, 2, 6))
        forward = f"about {once} s" if once else "under a second"
        work = f"{low} to {high} s" if low else f"up to {high} s" if high else "under a second"
        return [
            *self.plan.lines(),
            *self.text,
            f"one forward pass over the calibration text: {forward}; "
            f"calibrating and compressing: {work}; verification and evaluation come on top",
        ]


def _options(compressor: Compressor) -> str:
    """The options of a compressor in one line."""
    parts = []
    compressor = compressor.resolved()
    for entry in fields(compressor):
        if not entry.repr:
            continue
        value = getattr(compressor, entry.name)
        if isinstance(value, Compressor):
            parts.append(f"{entry.name}=({_options(value)})")
        elif value is not None:
            parts.append(f"{entry.name}={value}")
    return f"{compressor.name}: {', '.join(parts)}"
