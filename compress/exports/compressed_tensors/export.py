"""Quantised layers as compressed-tensors' pack-quantized, with corrections as an adapter beside them.

Symmetric and asymmetric grids of 2 to 8 bits, in groups or whole rows, the scales of either sign as they are.
transformers matches modules by name and class, vLLM its own modules by the checkpoint's names: `ignore` has every
linear layer that is an ordinary weight by the names of both.

The layout knows no transposed weights, so GPT-2's Conv1D is written like Linear; transformers does not read that, for
the class `Linear` does not cover Conv1D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from calibration.heads import Head
from calibration.layers import is_linear
from calibration.skeleton import build_skeleton
from compress.bases import format_in, open_base
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports.base import CorrectionStorage, LayerExport, Planned, Traits, Use
from compress.exports.card import (
    CardFacts,
    load_adapter_beside,
    load_with_transformers,
    packed_introduction,
    vllm,
    widened_note,
)
from compress.exports.checkpoint import ADAPTER, LOADING_READS, CheckpointExporter
from compress.exports.codes import dense_bytes, innermost, quantised_part, quantiser_of
from compress.exports.compressed_tensors.fused import PLAIN, fused_warnings
from compress.exports.compressed_tensors.schemes import Stored, quantisation, settled
from compress.exports.compressed_tensors.tensors import packed_bytes, packed_tensors
from compress.exports.contents import Contents, contents_of_base
from compress.exports.peft import AdapterWriter, corrections_in, read_adapter
from compress.exports.reading import add_corrections, load_bare
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.quantiser import Quantiser
from compress.forms.dense import Dense
from compress.models.checkpoint import write_json
from compress.models.model_config import read_config
from compress.solvers.grid import Symmetry

DRAFT = "mtp."
"""The prefix of draft heads' tensors, which vLLM builds by that name."""


class CompressedTensorsExporter(CheckpointExporter, name="compressed-tensors"):
    """Quantised layers in one checkpoint, their low-rank corrections in `adapter/` beside it."""

    traits = Traits(
        uses=frozenset({Use.MODEL}),
        heads=frozenset({Head.NEXT_TOKEN, Head.IMAGE_TEXT}),
        corrections=CorrectionStorage.HALF,
        needs_base=False,
        own_folder=False,
        adapter=ADAPTER,
        ordinary=False,
        loading_reads=(*LOADING_READS, f"{ADAPTER}/*.json"),
        library="transformers",
        relation="quantized",
        weights="packed",
        vllm=True,
        outside=Outside.HALF,
    )

    def _begin(self) -> None:
        self._stored: dict[str, Stored] = {}
        self._names: set[str] = set()
        self._adapter: AdapterWriter | None = None

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype, in the adapter, of factors that were on grids; or that of layers that are stored dense."""
        adapter = None if self._adapter is None else self._adapter.rounded
        return adapter or (self.dtype if self._dense else None)

    @classmethod
    def problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """It holds codes on a grid whose zero points are whole numbers, in groups of adjacent inputs."""
        del shape
        base = quantiser_of(compressor)
        if base is None:
            return f"{innermost(compressor).name} does not quantise; choose native or dense"
        if not base.in_order:
            return (
                "vLLM refuses groups in activation order; choose --act-order none, native or dense"
            )
        if base.symmetry not in (Symmetry.SYMMETRIC, Symmetry.ASYMMETRIC):
            return (
                f"its zero points are whole numbers, and {base.symmetry} grids have offsets that are none; choose "
                "--symmetry asymmetric, native or dense"
            )
        return ""

    @classmethod
    def stores_dense(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """Layers whose last group would be shorter than the others."""
        base = quantiser_of(compressor)
        return "" if base is None else _obstacle(base.group_of(shape[1]), shape)

    @classmethod
    def warnings(
        cls, compressors: Mapping[str, Compressor], shapes: Mapping[str, tuple[int, int]]
    ) -> tuple[str, ...]:
        """Layers that servers compute as one, and that are not stored alike."""
        stored = {
            name: _told(compressors[name], shape)
            if name in compressors and not cls.stores_dense(compressors[name], shape)
            else PLAIN
            for name, shape in shapes.items()
        }
        return tuple(fused_warnings(stored))

    @classmethod
    def planned_bytes(cls, plan: Planned) -> int:
        """Codes, scales, shape and zero points of each layer, and its correction in the adapter."""
        layers = 0
        for layer in plan.layers:
            base = quantiser_of(layer.compressor)
            if base is None:
                raise ValueError(f"{layer.name}: {layer.compressor.name} does not quantise")
            if cls.stores_dense(layer.compressor, layer.shape):
                layers += dense_bytes(plan, layer.shape)
            else:
                layers += _layer_bytes(base, layer.shape) + layer.adapter_bytes
        return layers + plan.rest_bytes(cls.name)

    @classmethod
    def problem_of_expert(cls, compressor: Compressor) -> str:
        """transformers stacks the experts that it reads, and PEFT finds no layers to correct."""
        return (
            "PEFT adds no correction to an expert of a compressed-tensors checkpoint"
            if isinstance(compressor, Correction)
            else ""
        )

    @classmethod
    def problem_of_stacks(cls) -> str:
        """It has tensors for one matrix each."""
        return "its tensors are of one matrix each, and have no name for an expert of a stack"

    @classmethod
    def experts_text(cls) -> str:
        """Packed, by the source's names."""
        return (
            "packed, each matrix under its name in the source, as vLLM and transformers read them"
        )

    def _write_layer(self, layer: LayerExport) -> None:
        if layer.source_name and isinstance(layer.form, Dense):
            self._copy_expert(layer)
            return
        base, correction = quantised_part(layer, self.name)
        if base.g_idx is not None:
            raise CheckpointError(
                f"{self.name} export: {layer.name}: vLLM refuses groups in activation order; choose native"
            )
        if _obstacle(base.group_size, base.shape):
            self._write_dense(layer)
            return
        self._stored[layer.stored_name] = Stored.of(base)
        self._names.add(layer.name)
        for key, tensor in packed_tensors(base).items():
            self.writer.add(f"{layer.stored_name}.{key}", tensor)
        if layer.bias is not None:
            self.writer.add(f"{layer.stored_name}.bias", layer.bias)
        if correction is not None:
            if self._adapter is None:
                self._adapter = AdapterWriter(self.folder / ADAPTER)
            self._adapter.add(layer, correction)

    def _write_config(self) -> None:
        if not self._stored:
            raise CheckpointError(f"{self.name} export: no layer was quantised")
        plain = self._plain()
        settings = quantisation(settled(self._stored), (), plain)
        write_json(
            self.folder / "config.json", self.base_config() | {"quantization_config": settings}
        )
        if self._adapter is not None:
            bare = set(self._stored) - set(self._adapter.ranks)
            self._adapter.close(bare | set(plain), self.base_reference)

    def _plain(self) -> list[str]:
        """Every linear layer that is an ordinary weight, by the names of the model and of its source."""
        modules = dict(build_skeleton(read_config(self.source.folder), self.dtype).named_modules())
        found = {name for name, module in modules.items() if is_linear(module)} - self._names
        found |= {
            name.removesuffix(".weight")
            for name, shape in self._copied.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        found = {name for name in found if not isinstance(modules.get(name), nn.Embedding)}
        draft = ["re:^mtp.*"] if any(name.startswith(DRAFT) for name in found) else []
        return [*draft, *sorted(found | set(self._dense))]

    @classmethod
    def is_in(cls, folder: Path) -> bool:
        """Whether the quantisation in config.json is compressed-tensors'."""
        return format_in(folder) == cls.name

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """Read without compressed-tensors; the corrections of an adapter beside it are added."""
        model = load_bare(folder, dtype, device)
        if (folder / ADAPTER).is_dir():
            add_corrections(model, read_adapter(folder / ADAPTER), folder)
        return model

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """Grids of the layers, and ranks of their corrections."""
        found = contents_of_base(open_base(folder), progress)
        return replace(found, corrections=corrections_in(folder / ADAPTER))

    @classmethod
    def introduction(cls, card: CardFacts) -> str:
        """Forms, bits and size, and what the adapter makes of few bits."""
        notes = [] if card.adapter is None else widened_note(card)
        return "\n\n".join([packed_introduction(card), *notes])

    @classmethod
    def how_to_load(cls, card: CardFacts) -> str:
        """With transformers and compressed-tensors; the corrections with PEFT."""
        code = load_with_transformers(card)
        text = (
            "As a compressed-tensors checkpoint, with transformers and compressed-tensors 0.18 or later installed:"
            f"\n\n{code}"
        )
        return text if card.adapter is None else f"{text}\n\n{load_adapter_beside(card)}"

    @classmethod
    def how_to_serve(cls, card: CardFacts) -> str:
        """With vLLM, which takes the adapter as a LoRA."""
        return vllm(card)


def _told(compressor: Compressor, shape: tuple[int, int]) -> str:
    """The grid of a planned layer in words."""
    base = quantiser_of(compressor)
    if base is None:
        return PLAIN
    size = base.group_of(shape[1])
    rows = "whole rows" if base.group_size == -1 else f"groups of {size}"
    return f"{base.bits} bits, {rows}, {base.symmetry}"


def _layer_bytes(base: Quantiser, shape: tuple[int, int]) -> int:
    n_groups = -(-shape[1] // base.group_of(shape[1]))
    zero_points = 0 if base.symmetry is Symmetry.SYMMETRIC else n_groups
    return packed_bytes(shape, base.bits, n_groups, zero_points=zero_points)


def _obstacle(group_size: int, shape: tuple[int, int]) -> str:
    """Why a layer's codes have no place in the layout; empty if they have."""
    i = shape[1]
    uneven = group_size < i and i % group_size
    return f"groups of {group_size} do not divide its {i} inputs" if uneven else ""
