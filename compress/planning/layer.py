"""A layer of a plan: which compressor serves it, and the bytes it takes in each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.exports.base import widens
from compress.families.base import Compressor
from compress.families.correction import Correction
from compress.families.factorisation import Factorisation
from compress.families.given import Given


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that will be compressed."""

    name: str
    tensor: str
    """Its weight's name in the checkpoint."""
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    compressor: Compressor
    predicted_error: float | None = None
    """Relative, of the outputs."""
    note: str = ""
    """What the plan decided of it that is not to be seen from its compressor."""
    owner: str = ""
    """The layer that stores what this one shares with it; empty for one that stores all of its own."""

    @property
    def rank(self) -> int | None:
        """Of its two factors; None for methods that do not replace the weight by two."""
        return self.compressor.rank if isinstance(self.compressor, Factorisation) else None

    @property
    def correction(self) -> str:
        """What is added to its base: `rank 64, 4 bits`."""
        if not isinstance(self.compressor, Correction):
            return "no correction"
        return f"rank {self.compressor.rank}, {self.compressor.adapter_bits} bits"

    @property
    def native_bytes(self) -> int:
        """What its form takes, which stands for what a base checkpoint stores in another layout."""
        base = getattr(self.compressor, "base", self.compressor)
        more = base.native_difference if isinstance(base, Given) else 0
        return self.bytes_after + more

    @property
    def correction_bytes(self) -> int:
        """Of what is added to a base, as the native format stores it."""
        if not isinstance(self.compressor, Correction):
            return 0
        return self.bytes_after - self.compressor.resolved_base.planned_bytes(self.shape)

    @property
    def adapter_bytes(self) -> int:
        """The same in a PEFT adapter."""
        if not isinstance(self.compressor, Correction):
            return 0
        return self.compressor.adapter_bytes(self.shape)

    def held_bytes(self, exports: Sequence[str]) -> int:
        """What it takes where these formats are written: without a native one, its correction is in a PEFT adapter."""
        return self.bytes_after + (self.held_correction_bytes(exports) - self.correction_bytes)

    def held_correction_bytes(self, exports: Sequence[str]) -> int:
        """The same of its correction alone."""
        return self.adapter_bytes if widens(exports) else self.correction_bytes
