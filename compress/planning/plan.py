"""A plan: each layer's compressor, the tensors that stay, their bytes, and the lines that show it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields, replace

import torch
from transformers import PretrainedConfig

from compress.embeddings.plan import OutsideBlocks
from compress.exports.base import EXPORTS
from compress.exports.storage import Storage
from compress.families.base import Compressor
from compress.models.kinds import Kind, has_experts, kind_of, leaf_of
from compress.planning.dense import dense_notes
from compress.planning.layer import PlannedLayer
from compress.planning.rows import Rows, aligned, corrections_table, ranks_in_a_recipe, ranks_table
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
    config: PretrainedConfig | None = None
    """The model's configuration."""

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
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what no server of a format reads, and which export they do read."""
        compressors, shapes = self._matrices()
        return tuple(
            f"{name}: {warning}"
            for name in self.exports
            for warning in (
                *EXPORTS[name].warnings(compressors, shapes),
                *(() if self.config is None else EXPORTS[name].warnings_of_model(self.config)),
            )
        )

    def refusals(self, export: str) -> tuple[str, ...]:
        """Reasons for which servers will refuse an export."""
        return EXPORTS[export].refusals(*self._matrices())

    def _matrices(self) -> tuple[dict[str, Compressor], dict[str, tuple[int, int]]]:
        """Compressors of the layers, and shapes of these and of matrices that stay as they are, by name."""
        shapes = {
            tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
            for tensor in self.kept
            if len(tensor.shape) == 2
        }
        shapes |= {layer.name: layer.shape for layer in self.layers}
        return {layer.name: layer.compressor for layer in self.layers}, shapes

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on layers that formats store as dense weights, and on effects of the options on the bytes."""
        return (
            *dense_notes(self.layers, self.exports),
            *correction_notes(self.layers, self.exports),
        )

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

    def lines(self, rows: Rows = Rows.KINDS) -> list[str]:
        """The lines that show the plan in a terminal: layers of a kind together, what is kept and why, totals.

        Where layers of a shape differ in rank or correction, each has a line, and so has each expert if `rows` says so.
        """
        shapes = {layer.shape for layer in self.layers}
        if len({(layer.shape, layer.rank) for layer in self.layers}) > len(shapes):
            return [*self._ranks(rows), *self._rest()]
        if len({(layer.shape, layer.correction) for layer in self.layers}) > len(shapes):
            return [*corrections_table(self.layers, self.exports, rows), *self._rest()]
        kinds: dict[tuple[str, tuple[int, int], str], list[PlannedLayer]] = defaultdict(list)
        for layer in self.layers:
            kinds[leaf_of(layer.name), layer.shape, _options(layer.compressor)].append(layer)
        cells = [("layers", "out x in", "bytes before", "after", "bits/weight")]
        for (leaf, (o, i), _), group in kinds.items():
            before = sum(layer.bytes_before for layer in group)
            after = sum(layer.held_bytes(self.exports) for layer in group)
            bits = f"{8 * after / (len(group) * o * i):.2f}"
            cells.append(
                (f"{len(group):,} x {leaf}", f"{o} x {i}", f"{before:,}", f"{after:,}", bits)
            )
        out = aligned(cells)
        out += [f"method: {text}" for text in dict.fromkeys(options for _, _, options in kinds)]
        return [*out, *shared_lines(self.layers), *self._rest()]

    def _ranks(self, rows: Rows) -> list[str]:
        """The ranks, their shares and predicted errors, then all ranks as a recipe has them."""
        left = [name for name in self.selected if name not in {layer.name for layer in self.layers}]
        out = ranks_table(self.layers, left, rows)
        if any(layer.predicted_error is not None for layer in self.layers):
            out.append(
                "predicted: relative error in the method's own metric, before factors are rounded"
            )
        entries, n_left_out = ranks_in_a_recipe(self.layers, left, rows)
        if n_left_out:
            out.append(
                f"{n_left_out:,} layers of experts have ranks of their own, which `compress plan --layers` lists for a "
                "recipe; of the others,"
            )
        out += ["in a recipe, to be edited:", "method:", "  ranks:"]
        return out + [f"  - {entry}" for entry in entries]

    def bytes_by_kind(self) -> dict[Kind, tuple[int, int]]:
        """Bytes of each kind of weights, before and after: layers in their native form, all else in the first format.

        On a base checkpoint, what no correction changes has the base's bytes before as after.
        """
        first = self.exports[0]
        saved = self.outside.narrowed if self.outside.narrows(first) else {}
        sizes = [(one.name, one.bytes_before, one.held_bytes(self.exports)) for one in self.layers]
        sizes += [
            (one.name, one.n_bytes, one.n_bytes - saved.get(one.name, 0)) for one in self.kept
        ]
        found: dict[Kind, tuple[int, int]] = {}
        for name, before, after in sizes:
            kind = kind_of(name)
            sums = found.get(kind, (0, 0))
            found[kind] = (sums[0] + before, sums[1] + after)
        for table in self.outside.tables:
            sums = found.get(Kind.TABLES, (0, 0))
            found[Kind.TABLES] = (sums[0] + table.n_bytes, sums[1] + table.bytes_in(first))
        return {kind: found[kind] for kind in Kind if kind in found}

    def _kinds(self) -> list[str]:
        """The bytes of each kind of weights; none of a model without experts."""
        if not has_experts(layer.name for layer in self.layers):
            return []
        cells = [("bytes by kind", "before", "after", "of all")]
        found = self.bytes_by_kind()
        whole = sum(after for _, after in found.values())
        for kind, (before, after) in found.items():
            cells.append((str(kind), f"{before:,}", f"{after:,}", f"{100 * after / whole:.1f} %"))
        return aligned(cells)

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
        out = [*self._kinds(), *self._tables()]
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
        out += [f"warning: {warning}" for warning in self.warnings]
        out += [f"note: {note}" for note in self.notes]
        return out


@dataclass(frozen=True)
class Forecast:
    """A plan and a rough estimate of its time."""

    plan: Plan
    seconds_of_forward: float
    """One plain forward pass over the calibration tokens."""
    text: tuple[str, ...] = ()
    """Lines on experts, the windows of text, the model's files, and the memory that compressing takes."""

    def lines(self, rows: Rows = Rows.KINDS) -> list[str]:
        """The lines that show the plan and its time in a terminal; `rows` as in `Plan.lines`."""
        once, low, high = (round(k * self.seconds_of_forward) for k in (1, 2, 6))
        forward = f"about {once} s" if once else "under a second"
        work = f"{low} to {high} s" if low else f"up to {high} s" if high else "under a second"
        return [
            *self.plan.lines(rows),
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
