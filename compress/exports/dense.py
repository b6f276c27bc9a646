"""An ordinary checkpoint: every layer is the dense weight that its form stands for."""

from __future__ import annotations

import torch

from compress.errors import CheckpointError
from compress.exports.base import Exporter, LayerExport
from compress.families.base import Compressor
from compress.models.checkpoint import write_json


class DenseExporter(Exporter):
    """Loads wherever the source does, and is as large; weights are rounded to the source's dtype."""

    name = "dense"

    @classmethod
    def _problem(cls, compressor: Compressor, shape: tuple[int, int]) -> str:
        del shape
        method: object = compressor
        while isinstance(method, Compressor):
            if method.shifts_outputs:
                return (
                    f"{method.name} puts the outputs' mean back, and most layers have no bias to hold that; choose "
                    "native, or --centre none"
                )
            method = getattr(method, "base", None)
        return ""

    def _write_layer(self, layer: LayerExport) -> None:
        weight = layer.form.dense().contiguous()
        stored = (weight.T if layer.transposed else weight).to(self.dtype)
        if not bool(torch.isfinite(stored).all()):
            largest = float(weight.abs().max())
            raise CheckpointError(
                f"{layer.name}: a weight of {largest:.3g} does not fit the source's {self.dtype}; "
                "choose the native export"
            )
        self.writer.add(f"{layer.name}.weight", stored)
        if layer.bias is not None:
            self.writer.add(f"{layer.name}.bias", layer.bias)

    def _write_config(self) -> None:
        write_json(self.folder / "config.json", self.base_config())
