"""What a base checkpoint holds, in the place of a method: the base of a correction that compresses nothing itself."""

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
    """As the model calls it."""
    stored_bytes: int
    """Of its weight in the base checkpoint."""
    native_bytes: int
    """Of the form that stands for it."""


@dataclass(frozen=True, kw_only=True)
class Given(Compressor):
    """Planned like the forms of a method; the forms themselves are read from the checkpoint, layer by layer."""

    name: ClassVar[str] = "checkpoint"
    paper: ClassVar[str] = ""

    stored_as: str = field(metadata={"help": "format and hash of the base checkpoint"})
    held: tuple[Held, ...] = field(
        repr=False, metadata={"help": "its layers that can be corrected"}
    )

    @property
    def saves_bytes(self) -> bool:
        """A correction on top of a checkpoint adds to it, whatever the original weighs."""
        return False

    @property
    def together(self) -> Compressor:
        """The same for all layers, so that those with one input share its factorisation."""
        return replace(self, held=())

    def plan(self, layers: Mapping[str, LayerShape], rest_bytes: int = 0) -> dict[str, Compressor]:
        """Each layer that the checkpoint has changed, in the model's order."""
        del rest_bytes
        found = {held.name: held for held in self.held}
        return {name: replace(self, held=(found[name],)) for name in layers if name in found}

    def compress(self, weights: Sequence[Tensor], stats: Statistics) -> list[Form]:
        """It has no weights' names to look forms up by: `Correction.corrections` takes what was read."""
        raise NotImplementedError("the forms of a base checkpoint are read, not computed")

    def planned_bytes(self, shape: tuple[int, int]) -> int:
        """As stored in the checkpoint."""
        del shape
        return sum(held.stored_bytes for held in self.held)

    @property
    def native_difference(self) -> int:
        """What the forms take beyond what the checkpoint stores; negative where they take less."""
        return sum(held.native_bytes - held.stored_bytes for held in self.held)
