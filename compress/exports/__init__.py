"""What a compressed model can be written as; `load.load_export` reads every one of them back."""

from collections.abc import Mapping

from compress.exports.adapter import AdapterExporter
from compress.exports.base import Exporter, LayerExport
from compress.exports.dense import DenseExporter
from compress.exports.gptq import GptqExporter
from compress.exports.native import NativeExporter

EXPORTS: Mapping[str, type[Exporter]] = {
    exporter.name: exporter for exporter in (NativeExporter, GptqExporter, DenseExporter)
}
"""Every export of a compressed model by name."""

ON_BASE: Mapping[str, type[Exporter]] = {
    exporter.name: exporter for exporter in (AdapterExporter, NativeExporter)
}
"""What a run on top of a compressed checkpoint can be written as."""

__all__ = ["EXPORTS", "ON_BASE", "Exporter", "LayerExport"]
