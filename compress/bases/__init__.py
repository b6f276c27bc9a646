"""Compressed checkpoints to build on, whoever wrote them: one reader a format, found by the checkpoint's own config."""

from compress.bases.base import BASES, Base, Loading
from compress.bases.dequantised import Dequantised, open_original
from compress.bases.detecting import format_in, kind_of, open_base
from compress.bases.folder import CheckpointFolder
from compress.bases.view import AsDense, SlicedView

__all__ = [
    "BASES",
    "AsDense",
    "Base",
    "CheckpointFolder",
    "Dequantised",
    "Loading",
    "SlicedView",
    "format_in",
    "kind_of",
    "open_base",
    "open_original",
]
