"""A base checkpoint's layers in the place of a base method: a correction's base that compresses nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from calibration.statistics.collection import Statistics
from compress.families.base import Compressor, LayerShape
from compress.forms.base import Form


@dataclass(frozen=True)
class Held:
    """A layer of a base checkpoint."""

    name: str
    """The layer's name in the model."""
    stored_bytes: int
    """Bytes of its weight in the base checkpoint."""
    native_bytes: int
    """Bytes of the native form that stands for it."""


@dataclass(frozen=True, kw_only=True)
class Given(Compressor):
    """A base whose forms are read from a checkpoint, layer by layer, and planned like the forms of a method."""

    name: ClassVar[str] = "checkpoint"
    paper: ClassVar[str] = ""

    stored_as: str = field(metadata={"help": "format and hash of the base checkpoint"})
    held: tuple[Held, ...] = field(
        repr=False, metadata={"help": "its layers that can be corrected"}
    )

    @property
    def saves_bytes(self) -> bool:
        """False: a correction of a checkpoint adds bytes to it, whatever the original weighs."""
        return False

    @property
    def together(self) -> Compressor:
        """One key for all layers, so that those with one input share its factorisation."""
        return replace(self, held=())

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """The layers that the checkpoint has changed, in the model's order."""
        del rest_bytes
        found = {held.name: held for held in self.held}
        return {name: replace(self, held=(found[name],)) for name in layers if name in found}

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """Raises NotImplementedError: the forms of a base checkpoint are read, not computed."""
        raise NotImplementedError("the forms of a base checkpoint are read, not computed")

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the layer's weight in the checkpoint."""
        del shape
        return sum(held.stored_bytes for held in self.held)

    @property
    def native_difference(self) -> int:
        """Bytes that the native forms take beyond what the checkpoint stores; negative where they take less."""
        return sum(held.native_bytes - held.stored_bytes for held in self.held)
