"""A layer of a plan: which compressor serves it, and the bytes it takes in each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from compress.exports.base import widens
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.correction_options import FACTOR_BYTES, padded_rank
from compress.families.factorisation import Factorisation
from compress.families.given import Given


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that will be compressed, with its compressor and its bytes before and after."""

    NO_CORRECTION: ClassVar = "no correction"
    name: str
    tensor: str
    """The name of its weight in the checkpoint."""
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    compressor: Compressor
    predicted_error: float | None = None
    """The relative error of its outputs that the plan predicts."""
    note: str = ""
    """A decision of the plan that its compressor does not show."""
    owner: str = ""
    """The layer that stores what this one shares with it; empty if it stores everything itself."""

    padded_rank: int | None = None
    """The rank that it has in a PEFT adapter of one rank for all layers; None where each layer has its own."""

    @property
    def stored_by(self) -> str:
        """The layer that stores what it shares: its owner, or itself."""
        return self.owner or self.name

    @property
    def rank(self) -> int | None:
        """The rank of its two factors; None for methods that do not replace the weight by two."""
        return self.compressor.rank if isinstance(self.compressor, Factorisation) else None

    @property
    def correction(self) -> str:
        """The correction in words: `rank 64, 4 bits`, or `no correction`."""
        if not isinstance(self.compressor, Correction):
            return self.NO_CORRECTION
        return f"rank {self.compressor.rank}, {self.compressor.adapter_bits} bits"

    @property
    def native_bytes(self) -> int:
        """Bytes of its native form, which stands for the layout of a base checkpoint."""
        base = getattr(self.compressor, "base", self.compressor)
        more = base.native_difference if isinstance(base, Given) else 0
        return self.bytes_after + more

    @property
    def correction_bytes(self) -> int:
        """Bytes of its correction in the native format."""
        if not isinstance(self.compressor, Correction):
            return 0
        return self.bytes_after - self.compressor.resolved_base.planned_bytes(self.shape)

    @property
    def adapter_bytes(self) -> int:
        """Bytes of its correction in a PEFT adapter, zeros that pad its rank included."""
        if self.padded_rank is not None:
            return self.padded_rank * sum(self.shape) * FACTOR_BYTES
        if not isinstance(self.compressor, Correction):
            return 0
        return self.compressor.adapter_bytes(self.shape)

    def held_bytes(self, exports: Sequence[str]) -> int:
        """Bytes in the formats that are written: without a native one, its correction is in a PEFT adapter."""
        return self.bytes_after + (self.held_correction_bytes(exports) - self.correction_bytes)

    def held_correction_bytes(self, exports: Sequence[str]) -> int:
        """Bytes of its correction in the formats that are written."""
        return self.adapter_bytes if widens(exports) else self.correction_bytes


def padded(layers: Sequence[PlannedLayer]) -> tuple[PlannedLayer, ...]:
    """The layers with one rank in the adapter: the highest of their corrections, rounded up to one that vLLM takes.

    Layers without a correction have factors of zeros there: servers stack q, k and v, or gate and up, at one rank.
    """
    ranks = [
        layer.compressor.resolved_rank
        for layer in layers
        if isinstance(layer.compressor, Correction)
    ]
    rank = padded_rank(max(ranks)) if ranks else None
    return tuple(replace(layer, padded_rank=rank) for layer in layers)
