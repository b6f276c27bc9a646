"""Export formats, each in a file of its own; `load.load_export` reads every one of them back."""

from compress.exports.base import EXPORTS, Exporter, LayerExport, Use, formats_for

__all__ = ["EXPORTS", "Exporter", "LayerExport", "Use", "formats_for"]
