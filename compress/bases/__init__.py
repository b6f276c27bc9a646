"""Compressed checkpoints to build on, whoever wrote them: one reader a format, found by the checkpoint's own config."""

from compress.bases.base import Base
from compress.bases.detecting import open_base
from compress.bases.view import AsDense

__all__ = ["AsDense", "Base", "open_base"]
