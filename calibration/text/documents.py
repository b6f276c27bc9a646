"""What a source of text holds: documents, or ready token ids; each fetched when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, each fetched when asked for, with their lengths in characters."""

    texts: Sequence[str]
    lengths: Sequence[int]
    provenance: dict[str, Any] = field(default_factory=dict)
    labels: Sequence[int] | None = None
    """The class of each, if the source says."""


@dataclass(frozen=True)
class Rows:
    """Ready token ids, one sequence each, in a fixed order; `masks` has as many, or is None."""

    ids: Sequence[Sequence[int]]
    masks: Sequence[Sequence[int]] | None
    provenance: dict[str, Any] = field(default_factory=dict)
    labels: Sequence[int] | None = None
    """The class of each, if the source says."""
