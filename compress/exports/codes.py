"""Common to checkpoints of codes: quantised weights, dense ones where codes have no place, an adapter beside them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from calibration.heads import Head
from compress.bases import open_base
from compress.callbacks import Progress
from compress.errors import CheckpointError
from compress.exports.base import CorrectionStorage, LayerExport, Traits, Use
from compress.exports.checkpoint import ADAPTER, LOADING_READS, CheckpointExporter
from compress.exports.contents import Contents, contents_of_base
from compress.exports.peft import AdapterWriter, corrections_in, read_adapter
from compress.exports.planned import Planned, PlannedLayer
from compress.exports.reading import add_corrections, load_bare
from compress.exports.storage import Outside
from compress.families.base import Compressor
from compress.families.low_rank import Factors
from compress.families.quantiser import Quantiser
from compress.forms.base import Form
from compress.forms.dense import Dense
from compress.forms.low_rank import LowRank
from compress.forms.product import Product
from compress.forms.quantised import Quantised
from compress.forms.sum import Sum
from compress.models.checkpoint import some


def traits_of_codes(engines: tuple[str, ...]) -> Traits:
    """The facts that formats of codes have in common, with the engines that one is for."""
    return Traits(
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
        engines=engines,
        outside=Outside.HALF,
    )


class CodesExporter(CheckpointExporter):
    """Quantised layers in one checkpoint, their low-rank corrections in `adapter/` beside it."""

    def _begin(self) -> None:
        self._adapter: AdapterWriter | None = None

    @property
    def rounded(self) -> torch.dtype | None:
        """The dtype, in the adapter, of factors that were on grids; or that of layers that are stored dense."""
        adapter = None if self._adapter is None else self._adapter.rounded
        return adapter or (self.dtype if self._dense else None)

    @classmethod
    def stores_dense(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        """Layers whose shape the layout of the codes does not hold."""
        base = quantiser_of(compressor)
        return "" if base is None else cls._obstacle(base.group_of(shape[1]), shape)

    @classmethod
    def dense_layer_bytes(cls, plan: Planned, layer: PlannedLayer) -> int:
        """Bytes of a layer that is stored dense, its correction in the weight, and of zeros in a padded adapter."""
        zeros = 0 if layer.padded_rank is None else layer.adapter_bytes
        return dense_bytes(plan, layer.shape) + zeros

    @classmethod
    def problem_of_stacks(cls) -> str:
        """It has tensors for one matrix each."""
        return "its tensors are of one matrix each, and have no name for an expert of a stack"

    @classmethod
    def _obstacle(cls, group_size: int, shape: tuple[int, int]) -> str:
        """Why the layout has no place for codes of a weight (o, i); empty if it has."""
        i = shape[1]
        uneven = group_size < i and i % group_size
        return f"groups of {group_size} do not divide its {i} inputs" if uneven else ""

    @classmethod
    @abstractmethod
    def _unheld(cls, form: Quantised) -> str:
        """Why the format cannot hold codes on such a grid; empty if it can."""

    @abstractmethod
    def _write_codes(self, layer: LayerExport, form: Quantised) -> None:
        """Write the codes of a layer, and note what the configuration says of them."""

    def _write_layer(self, layer: LayerExport) -> None:
        if layer.source_name and isinstance(layer.form, Dense):
            self._copy_expert(layer)
            return
        base, correction = quantised_part(layer, self.name)
        if problem := self._unheld(base):
            raise CheckpointError(f"{self.name} export: {layer.name}: {problem}")
        if self._obstacle(base.group_size, base.shape):
            self._write_dense(layer)
            self._add_factors(layer, None)
            return
        refuse_inexact_scales(layer, base, self.name)
        self._write_codes(layer, base)
        if layer.bias is not None:
            self.writer.add(f"{layer.stored_name}.bias", layer.bias)
        self._add_factors(layer, correction)

    def _add_factors(self, layer: LayerExport, correction: Factors | None) -> None:
        if correction is not None or layer.padded_rank is not None:
            if self._adapter is None:
                self._adapter = AdapterWriter(self.folder / ADAPTER)
            self._adapter.add(layer, correction)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """Read without the libraries of the format; the corrections of an adapter beside it are added."""
        model = load_bare(folder, dtype, device)
        if (folder / ADAPTER).is_dir():
            add_corrections(model, read_adapter(folder / ADAPTER), folder)
        return model

    @classmethod
    def contents(cls, folder: Path, progress: Progress) -> Contents | None:
        """Grids of the layers, and ranks of their corrections."""
        found = contents_of_base(open_base(folder), progress)
        return replace(found, corrections=corrections_in(folder / ADAPTER))


def quantised_part(layer: LayerExport, export: str) -> tuple[Quantised, Factors | None]:
    """The codes of a layer's form, and the correction of them. Raises CheckpointError for any other form."""
    form: Form = layer.form
    terms = [form] if not isinstance(form, Sum) else list(form.terms)
    match terms:
        case [Quantised() as base]:
            return base, None
        case [Quantised() as base, (LowRank() | Product()) as correction]:
            return base, correction
    kinds = some([type(term).__name__ for term in terms])
    raise CheckpointError(
        f"{export} export: {layer.name} is a sum of {kinds}; the format holds a quantised weight and "
        "one low-rank correction of it"
    )


def quantiser_of(compressor: Compressor) -> Quantiser | None:
    """The method that makes the codes, a base at any depth; None if nothing quantises."""
    method: object = compressor
    while method is not None and not isinstance(method, Quantiser):
        method = getattr(method, "base", None)
    return method


def innermost(compressor: Compressor) -> Compressor:
    """The method at the bottom of bases of bases: the one that makes what the others correct."""
    base = getattr(compressor, "base", None)
    return innermost(base) if isinstance(base, Compressor) else compressor


def dense_bytes(plan: Planned, shape: tuple[int, int]) -> int:
    """Bytes of a weight (o, i) in the dtype of most of the source."""
    return shape[0] * shape[1] * plan.dtype.itemsize


def refuse_inexact_scales(layer: LayerExport, form: Quantised, export: str) -> None:
    """Raises CheckpointError for scales that a server changes when it casts them to the model's dtype."""
    exact = form.scales.float()
    for dtype in (torch.bfloat16, torch.float16):
        if not torch.equal(exact.to(dtype).float(), exact):
            raise CheckpointError(
                f"{export} export: {layer.name}: {dtype} does not hold its scales, and servers cast them to the model's"
                " dtype; its method must round them to 8 significant bits; choose native"
            )
