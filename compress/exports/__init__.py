"""What a compressed model can be written as: one format a file; `load.load_export` reads every one of them back."""

from compress.exports.base import EXPORTS, Exporter, LayerExport, Use, formats_for

__all__ = ["EXPORTS", "Exporter", "LayerExport", "Use", "formats_for"]
