"""Programs of others that load exports: each is asked, in a process of its own, what it makes of a few tokens."""

from compress.engines.base import ENGINES, Engine

__all__ = ["ENGINES", "Engine"]
