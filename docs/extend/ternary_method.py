"""Ternary weights by the mean magnitude of each output: a method for a form of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ternary_form import BITS, Ternary
from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.families.base import Compressor
from compress.forms.base import Form
from compress.forms.packing import words_for


@dataclass(frozen=True, kw_only=True)
class Ternarise(Compressor, name="ternarise"):
    """Rounding to -1, 0 and 1."""

    paper: ClassVar[str] = "none"

    def compress(
        self,
        weights: Sequence[Tensor],
        stats: Statistics,  # noqa: ARG002  (the inputs do not count)
    ) -> list[Form]:
        """Each weight by itself."""
        return [Ternary.of(weight) for weight in weights]

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Codes in 32-bit words, and a scale of 4 bytes for each output."""
        o, i = shape
        return 4 * words_for(i, BITS) * o + 4 * o
