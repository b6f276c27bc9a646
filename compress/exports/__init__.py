"""What a compressed model can be written as; `load.load_export` reads every one of them back."""

from collections.abc import Mapping

from compress.exports.base import Exporter, LayerExport
from compress.exports.dense import DenseExporter
from compress.exports.gptq import GptqExporter
from compress.exports.native import NativeExporter

EXPORTS: Mapping[str, type[Exporter]] = {
    exporter.name: exporter for exporter in (NativeExporter, GptqExporter, DenseExporter)
}
"""Every export by name."""

__all__ = ["EXPORTS", "Exporter", "LayerExport"]
